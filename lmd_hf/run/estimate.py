"""What a plan will cost here: bytes from the Hub, seconds by a short probe of this machine, memory."""

import itertools
import time
from functools import lru_cache

import psutil
import torch

from lmd_hf.matrix.cost import exact_flops
from lmd_hf.matrix.kernels import get_kernel
from lmd_hf.records import Estimate, Plan, Work
from lmd_hf.run.activations import input_bytes, passes
from lmd_hf.run.in_data import memory_limit
from lmd_hf.run.plan import expected_inputs
from lmd_hf.run.read_ahead import ROOM, merged, spans
from lmd_hf.run.workers import pick_devices, upload, worker_count, worker_pool
from lmd_hf.weights.source import FileSource, Source


PROBE_SECONDS = 0.5
PROBE_SIDES = (64, 768)  # small matrices run at a lower rate; past 768 one run would outlast the probe


def estimate(plan: Plan, source: Source) -> Estimate:
    """The cost of a plan on this machine, with as many workers as `execute` would use.

    `seconds` is the decomposition alone, without imports and transfer; within a factor of two on a machine that is as
    busy then as it is now. `memory_bytes` counts this process as it stands, every worker at the largest matrix, and
    what is read ahead.
    """
    works = list(plan.works)
    reads = merged(span for work in works for span in spans(work.ref))
    remote = [span for span in reads if isinstance(source, FileSource) and not source.on_disk(span.tensor.file)]
    devices = pick_devices(plan.settings.device)
    workers = worker_count(works, devices, source)
    flops = sum(work.flops for work in works)
    ahead = max(ROOM, max((span.bytes for span in reads), default=0))
    largest = max((work.bytes for work in works), default=0)
    number, gathered = _forward_passes(plan, devices[0])
    fetched = sum(span.bytes for span in remote)
    if plan.settings.data is not None and isinstance(source, FileSource):  # the model is loaded whole
        fetched = sum(file.bytes for file in source.identity.files if not source.on_disk(file.name))
    return Estimate(
        passes=number,
        input_bytes=gathered,
        fetch_bytes=fetched,
        seconds=flops / flops_per_second(devices, workers, len(works), _usual_side(works)) if works else 0.0,
        memory_bytes=psutil.Process().memory_info().rss + workers * largest + ahead,
    )


def _forward_passes(plan: Plan, device: torch.device) -> tuple[int | None, int | None]:
    """How often the model will run over the data, and the bytes of all inputs' moments and rows."""
    data = plan.settings.data
    if data is None:
        return None, None
    widths = expected_inputs(work.ref for work in plan.works)
    groups = passes({str(name): width for name, width in widths.items()}, data.graph, memory_limit(device))
    return len(groups), sum(input_bytes(width, data.graph) for width in widths.values())


def _usual_side(works: list[Work]) -> int:
    """The short side of the matrix at which half of the flops are done, within `PROBE_SIDES`."""
    ordered = sorted(works, key=lambda work: work.flops)
    sums = list(itertools.accumulate(work.flops for work in ordered))
    middle = next(work for work, total in zip(ordered, sums, strict=True) if total >= sums[-1] / 2)
    return min(max(min(middle.ref.shape), PROBE_SIDES[0]), PROBE_SIDES[1])


@lru_cache(maxsize=64)
def flops_per_second(devices: tuple[torch.device, ...], workers: int, matrices: int, side: int) -> float:
    """What all workers together reach with the exact kernel on 2·side × side matrices, in half a second."""
    w = torch.randn(2 * side, side, generator=torch.Generator().manual_seed(0))
    with worker_pool(workers, matrices, devices) as pool:
        pool.submit(lambda: get_kernel("exact")(upload(w[:64, :64], devices[0]))).result()  # it loads libraries
        begun = time.perf_counter()
        runs = sum(pool.map(lambda _: _runs_until(begun + PROBE_SECONDS, upload(w, devices[0])), range(workers)))
        return runs * exact_flops(2 * side, side) / (time.perf_counter() - begun)


def _runs_until(deadline: float, w: torch.Tensor) -> int:
    count = 0
    while not count or time.perf_counter() < deadline:
        get_kernel("exact")(w)
        count += 1
    return count
