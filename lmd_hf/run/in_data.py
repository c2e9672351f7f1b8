"""The metric `data`: rounds of forward passes that observe inputs, and the matrices measured with what was seen."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from lmd_hf.compat import local_processes
from lmd_hf.matrix import dimension
from lmd_hf.matrix.graph import RANGE, Graph, graph_of, scatter, topology_spectrum
from lmd_hf.matrix.intrinsic import Dimension, intrinsic_dimensions
from lmd_hf.matrix.metrics import Metric, dense
from lmd_hf.matrix.neighbours import NEIGHBOURS, nearest
from lmd_hf.matrix.sampled import compact, energy_errors, energy_share, leading_axes
from lmd_hf.records import Data, DataFigures, Factored, MatrixRef, Plan, Work
from lmd_hf.run.activations import ROWS, Observed, needed_tokens, observe, passes
from lmd_hf.run.batches import Batches, load_batches
from lmd_hf.run.loading import load_model, origin
from lmd_hf.run.measure import Spectra, measure, spectrum
from lmd_hf.run.taps import Tap, find_taps
from lmd_hf.run.workers import MEMORY_SHARE, with_room, worker_pool
from lmd_hf.run.world import World
from lmd_hf.weights.source import Source
from lmd_hf.weights.stored import Stored


Dimensions = tuple[Dimension | None, Dimension | None]
ESTIMATORS = ("two_nn", "maximum_likelihood")


@dataclass(frozen=True)
class Seen:
    """One input, ready for the matrices that read it: its metric M = `gram` from `samples` rows, and some `rows` (about
    the mean where the layer has a bias), each from one of `examples`, with their graph and intrinsic dimensions."""

    samples: int
    metric: Metric
    gram: Tensor
    rows: Tensor
    examples: Tensor
    graph: Graph
    dimensions: Dimensions
    data: Data


Sight = tuple[Tap, Seen] | str  # or why there is none


@dataclass(frozen=True)
class Round:
    """Matrices whose inputs were observed in one pass, and what was seen; without the metric `data` all of them, and
    nothing."""

    indices: frozenset[int]
    seen: dict[Work, Sight]
    notes: tuple[str, ...] = ()


def rounds(plan: Plan, source: Source, device: torch.device, world: World) -> Iterator[Round]:
    """One round for each pass over the data. All ranks go through them together."""
    data = plan.settings.data
    if data is None:
        yield Round(frozenset(range(len(plan.works))), {})
        return
    model, batches = world.together(lambda: _loaded(source, data, plan.settings.device))
    if world.size > 1:
        world.check_same({data.dataset: world.together(batches.digest)}, "datasets")
    refs = [work.ref for work in plan.works]
    for number, (taps, observed, count) in enumerate(
        observations(model, batches, refs, data, device=device, world=world)
    ):
        found = list(zip(plan.works, taps, strict=True))
        biases = {(t.input, t.biased) for _, t in found if isinstance(t, Tap) and t.input in observed}
        sights = _prepared(observed, sorted(biases), data, device)
        seen: dict[Work, Sight] = {}
        for work, tap in found:
            if isinstance(tap, Tap) and tap.input in observed:
                sight = sights[tap.input, tap.biased]
                seen[work] = sight if isinstance(sight, str) else (tap, sight)
            elif isinstance(tap, str) and number == 0:
                seen[work] = tap
        indices = frozenset(i for i, work in enumerate(plan.works) if work in seen)
        yield Round(indices, seen, _about(data, batches, observed, count) if number == 0 else ())


def observations(
    model: nn.Module, batches: Batches, refs: list[MatrixRef], data: Data, *, device: torch.device, world: World
) -> Iterator[tuple[list[Tap | str], dict[str, Observed], int]]:
    """One entry for each pass over the data: the taps of `refs` in their order, what this pass saw of which inputs, and
    how many passes there are."""
    longest = batches.build([batches.examples - 1])
    taps = world.together(lambda: find_taps(model, refs, longest))
    widths = {tap.input: ref.shape[1] for ref, tap in zip(refs, taps, strict=True) if isinstance(tap, Tap)}
    tokens = world.together(lambda: needed_tokens(widths.values(), data, batches))
    groups = passes(widths, data.graph, min(world.gather(memory_limit(device)))) or [[]]
    for group in groups:
        yield taps, observe(model, batches, group, data, tokens=tokens, world=world), len(groups)


def memory_limit(device: torch.device) -> float:
    """Bytes that one pass may take."""
    free = psutil.virtual_memory().available / local_processes()
    if device.type == "cuda":
        free = min(free, torch.cuda.mem_get_info(device)[0])
    return free * MEMORY_SHARE


def measure_in_data(work: Work, stored: Stored, sight: Sight) -> Spectra:
    """σ(W), S' in the metric of its inputs and all that the data say; without a sight of them, the identity metric with
    the reason. Raises what `measure` does."""
    w_OI = stored.matrix
    if isinstance(sight, str) or isinstance(w_OI, Factored):
        return replace(measure(work, stored, None), note=sight if isinstance(sight, str) else "a product of factors")
    tap, seen = sight
    w_OI = w_OI.to(torch.float64)
    raw = spectrum(work, stored.matrix)
    if not tap.fits(w_OI):
        return Spectra(raw, None, stored.rounding, note="its module gives something else than W·x + b")
    used = spectrum(work, seen.metric.power_times(0.5, w_OI.T).T)
    kept = dimension.energy_rank(used.values.numpy(), 0.90)
    figures, topology = _figures(w_OI, kept, seen)
    return Spectra(raw, used, stored.rounding, metric="data", data=figures, topology=topology)


def input_metric(sight: Sight) -> Metric | None:
    """The metric of what was seen."""
    return None if isinstance(sight, str) else sight[1].metric


def _loaded(source: Source, data: Data, device: str) -> tuple[nn.Module, Batches]:
    place = origin(source)
    model = load_model(source, place, device)
    return model, load_batches(model, place, data)


def _about(data: Data, batches: Batches, observed: dict[str, Observed], count: int) -> tuple[str, ...]:
    tokens = "" if batches.tokens is None else f", {batches.tokens:,} tokens"
    most = max((seen.count for seen in observed.values()), default=0)
    rows = max((len(seen.rows) for seen in observed.values()), default=0)
    covariance = f"{most:,} rows of each input in its covariance, " if data.graph == "complete" else ""
    graph = f"{rows:,} in its {data.neighbours}-nearest-neighbour graph"
    times = "once" if count == 1 else f"{count} times"
    told = f"data: {batches.examples} examples of {data.dataset} ({batches.about}{tokens}), passed {times} through"
    return (f"{told} the model; {covariance}{graph}",)


def _prepared(
    observed: dict[str, Observed], wanted: list[tuple[str, bool]], data: Data, device: torch.device
) -> dict[tuple[str, bool], Seen | str]:
    with worker_pool(min(len(wanted), psutil.cpu_count() or 1) or 1, max(len(wanted), 1)) as pool:
        near = dict(zip(observed, pool.map(lambda seen: _neighbourhood(seen, data), observed.values()), strict=True))
        made = pool.map(lambda key: _prepare(observed[key[0]], near[key[0]], key[1], data, device), wanted)
        return dict(zip(wanted, made, strict=True))


def _neighbourhood(seen: Observed, data: Data) -> tuple[Graph | None, Dimensions]:
    """The graph of an input's rows and their intrinsic dimensions; nothing where rows are too few or not finite."""
    if len(seen.rows) <= data.neighbours or not torch.isfinite(seen.rows).all():
        return None, (None, None)
    return _graph_and_dimensions(seen.rows, data.neighbours)


def _graph_and_dimensions(rows: Tensor, neighbours: int) -> tuple[Graph, Dimensions]:
    """Both from one search, which is what they cost."""
    found = nearest(rows, min(max(neighbours, NEIGHBOURS), len(rows) - 1))
    return graph_of(found.first(neighbours)), intrinsic_dimensions(rows, found)


def _prepare(
    seen: Observed, near: tuple[Graph | None, Dimensions], biased: bool, data: Data, device: torch.device
) -> Seen | str:
    graph, dimensions = near
    found = gram_of(seen, graph, biased, data)
    if isinstance(found, str) or graph is None:
        return found if isinstance(found, str) else too_few(seen, data)
    metric, gram = with_room(lambda where: (dense(moved := found.to(where)), moved), device)
    rows = seen.rows.to(torch.float64) - _center(seen, biased)
    return Seen(_samples(seen, data), metric, gram, rows, seen.examples, graph, dimensions, data)


def gram_of(seen: Observed, graph: Graph | None, biased: bool, data: Data) -> Tensor | str:
    """The metric's matrix (float64, not regularised) of an input: its scatter over `graph` with `knn`, else its second
    moments, about the mean where the layer is `biased`; or why there is none."""
    if _samples(seen, data) == 0:
        return "no row of its input is a token of the data"
    if not torch.isfinite(seen.rows).all() or not torch.isfinite(seen.mean).all():
        return "its input holds NaN or infinity"
    if _samples(seen, data) <= seen.rows.shape[1] or (data.graph == "knn" and graph is None):
        return too_few(seen, data)
    if data.graph == "knn":
        assert graph is not None, "asked for above"
        gram = scatter(seen.rows, graph)
    else:
        assert seen.covariance is not None, "it is kept for the complete graph"
        gram = seen.covariance if biased else torch.addr(seen.covariance, seen.mean, seen.mean)
    if gram.trace() <= RANGE * (seen.rows.to(torch.float64) ** 2).sum() / len(seen.rows):
        return "its input never changes" + (" from a sample to its neighbours" if data.graph == "knn" else "")
    return gram


def too_few(seen: Observed, data: Data) -> str:
    """The reason where an input has fewer rows than its metric needs."""
    width = seen.rows.shape[1]
    most = f" (a graph has {ROWS['knn']:,} at most)" if data.graph == "knn" and width >= ROWS["knn"] else ""
    return f"{_samples(seen, data):,} rows of its input are too few for the metric, which needs {width + 1:,}{most}"


def _samples(seen: Observed, data: Data) -> int:
    return len(seen.rows) if data.graph == "knn" else seen.count


def _center(seen: Observed, biased: bool) -> Tensor:
    return seen.mean if biased else torch.zeros_like(seen.mean)


def _figures(w_OI: Tensor, kept: int | None, seen: Seen) -> tuple[DataFigures, np.ndarray | None]:
    """All that the rows of an input say of one matrix, in compact coordinates of its outputs, and τ."""
    w_RI = compact(w_OI)
    gram_RR = w_RI @ seen.gram.to(w_RI) @ w_RI.T
    outputs_NR = seen.rows.to(w_RI) @ w_RI.T
    axes_RK, plain_RK = (leading_axes(each, kept or 0) for each in (gram_RR, w_RI @ w_RI.T))
    latent_NK = (outputs_NR @ axes_RK / ((axes_RK.T @ gram_RR) * axes_RK.T).sum(1).sqrt()).cpu()  # Idist·Vᵀ·x
    outputs_NR, gram_RR = outputs_NR.cpu(), gram_RR.cpu()
    of_outputs, output_dimensions = _graph_and_dimensions(outputs_NR, seen.data.neighbours)
    errors = energy_errors(outputs_NR, gram_RR, seen.examples, seen.graph if seen.data.graph == "knn" else None)
    nothing: Dimensions = (None, None)
    figures = DataFigures(
        samples=seen.samples,
        energy=gram_RR.trace().item(),
        energy_error=errors[0],
        participation_ratio_error=errors[1],
        metric_share=energy_share(gram_RR, axes_RK.cpu()),
        weights_share=energy_share(gram_RR, plain_RK.cpu()),
        graph_samples=len(seen.rows),
        components={"input": seen.graph.components, "output": of_outputs.components},
        dimensions={
            "input": _named(seen.dimensions),
            "latent": _named(intrinsic_dimensions(latent_NK) if kept else nothing),
            "output": _named(output_dimensions if kept else nothing),
        },
    )
    topology = topology_spectrum(outputs_NR, seen.graph, of_outputs).numpy()
    topology.flags.writeable = False
    return figures, topology


def _named(found: Dimensions) -> dict[str, tuple[float, float] | None]:
    return {name: None if one is None else (one.value, one.error) for name, one in zip(ESTIMATORS, found, strict=True)}
