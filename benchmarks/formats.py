"""Every stored format: how far are the singular values from those of the matrix that the format means?

    python benchmarks/formats.py [--out benchmarks/formats.md]

A Gaussian matrix is quantised by the format's definition (`tests/stored.py`; bitsandbytes and GGUF by their own
libraries), written as a checkpoint and analysed. The reference is float64 LAPACK on the dequantised matrix; the error
is the largest relative one over the values above 1e-6 · σ₁. The numerical rank is that of a matrix of rank 8.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import gguf
import torch
from safetensors.torch import save_file

from lmd_hf import analyze


sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from stored import FORMATS


SHAPE = (384, 768)
RANK = 8
NAME = "model.layers.0.mlp.down_proj"
GGML = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")


def matrix(*, rank: int = 0) -> torch.Tensor:
    """Gaussian, of full rank or of this one, with entries of size 0.02."""
    generator = torch.Generator().manual_seed(0)
    if not rank:
        return torch.randn(*SHAPE, generator=generator) * 0.02
    left, right = (torch.randn(size, rank, generator=generator, dtype=torch.float64) for size in SHAPE)
    return (left @ right.T * (0.02 / rank**0.5)).float()


def write(folder: Path, name: str, w: torch.Tensor) -> tuple[Path, torch.Tensor]:
    """A checkpoint of this format, and the matrix that it means."""
    if name.startswith("gguf "):
        kind = gguf.GGMLQuantizationType[name.split()[1]]
        blocks = gguf.quants.quantize(w.numpy(), kind)
        writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
        writer.add_tensor("blk.0.ffn_down.weight", blocks, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return folder / "model.gguf", torch.from_numpy(gguf.quants.dequantize(blocks, kind)).double()
    tensors, expected = FORMATS[name](w)
    save_file({f"{NAME}.{key}": value.contiguous() for key, value in tensors.items()}, folder / "model.safetensors")
    return folder, expected


def judge(name: str) -> str:
    """One row of the table."""
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        path, expected = write(Path(first), name, matrix())
        (row,) = analyze(path).matrices
        reference = torch.linalg.svdvals(expected).numpy()
        kept = reference > 1e-6 * reference[0]
        error = (abs(row.singular_values[kept] - reference[kept]) / reference[kept]).max()
        low, _ = write(Path(second), name, matrix(rank=RANK))
        (small,) = analyze(low).matrices
    return f"| {name} | {row.stored} | {row.dtype} | {error:.1e} | {small.numerical_rank} |"


def main() -> None:
    """Judge every format, and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    lines = [
        "# Stored formats\n",
        "Made by `python benchmarks/formats.py --out benchmarks/formats.md`, which says what is measured.\n",
        f"| format | read as | largest tensor | largest relative error | numerical rank of a rank-{RANK} matrix |",
        "|---|---|---|---|---|",
        *(judge(name) for name in (*FORMATS, *(f"gguf {kind}" for kind in GGML))),
    ]
    text = "\n".join(lines) + "\n"
    if options.out:
        options.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
