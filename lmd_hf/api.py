"""The public functions: the stages, read aloud."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub.utils import tqdm

from lmd_hf.changes import Pair
from lmd_hf.errors import SettingsError, SourceError
from lmd_hf.records import MatrixRef, Plan, Settings, Work
from lmd_hf.report.build import build_report
from lmd_hf.report.compare import Comparison, build_comparison
from lmd_hf.report.report import Report
from lmd_hf.run.compare import compare_all
from lmd_hf.run.estimate import estimate
from lmd_hf.run.execute import HeadStart, execute, head_start
from lmd_hf.run.pairs import match
from lmd_hf.run.plan import make_plan
from lmd_hf.weights.identity import with_hashes
from lmd_hf.weights.inventory import list_by_name, list_matrices
from lmd_hf.weights.source import FileSource, Source, open_source


if TYPE_CHECKING:
    from torch import nn

QUIET_SECONDS = 2  # work shorter than this shows no progress bar


def analyze(
    model: str | Path | nn.Module,
    *,
    revision: str | None = None,
    subfolder: str = "",
    token: str | bool | None = None,
    download: bool = False,
    base: str | Path | None = None,
    metric: str = "identity",
    kernel: str = "auto",
    tolerance: float = 0.01,
    roles: tuple[str, ...] = (),
    layers: str = "",
    match: str = "",
    device: str = "auto",
) -> Report:
    """Decompose every weight matrix of a model and return the report.

    `model` is a folder in Hub layout, a `.safetensors` file, a Hub id or a live module; weights are read one tensor at
    a time and the model is never built with real memory. Of a Hub id only the tensors that are selected are fetched,
    and not kept; `download` keeps whole files in the cache. A PEFT LoRA adapter gives one row for each pair, the update
    that it makes; with `base` (a model, or `auto` for the one that it names) the rows are those of the base with
    the updates added. The keywords after that are the fields of `Settings`.
    Every stored parameter is accounted for: decomposed, or skipped with its reason; what could not be read to the end
    is in `report.unread`. Raises `SourceError`, `FormatError` or `SettingsError`, each with its remedy.
    """
    settings = Settings(metric, kernel, tolerance, tuple(roles), layers, match, device)
    started = time.perf_counter()
    source = open_source(model, revision=revision, subfolder=subfolder, token=token, download=download, base=base)
    opened = time.perf_counter()
    background = ThreadPoolExecutor(1)
    try:
        with _ahead(source, settings) as ahead:  # transformers takes seconds to import: the first matrices overlap it
            todo = make_plan(list_matrices(source), source.identity, settings)
            planned = time.perf_counter()
            identity = background.submit(with_hashes, source)  # hashing the files overlaps with the decomposition
            with tqdm(total=100, desc="decomposing", delay=QUIET_SECONDS, name="lmd_hf.analyze", **_BAR) as bar:
                results = execute(todo, source, ahead=ahead, progress=_advance(bar, todo.works))
        hashed = identity.result()
    finally:
        background.shutdown(wait=False, cancel_futures=True)
    timing = {"open": opened - started, "plan": planned - opened, **results.timing}
    timing["total"] = time.perf_counter() - started
    report = build_report(hashed, todo, replace(results, timing=timing))
    if report.unread and not report.matrices:
        raise SourceError(report.unread[0].reason)
    return report


def plan(
    model: str | Path | nn.Module,
    *,
    revision: str | None = None,
    subfolder: str = "",
    token: str | bool | None = None,
    base: str | Path | None = None,
    settings: Settings | None = None,
) -> Plan:
    """What `analyze` would do, from headers alone: no weight is fetched or read. Half a second of the same arithmetic
    on random numbers tells how long it would take here."""
    source = open_source(model, revision=revision, subfolder=subfolder, token=token, base=base)
    todo = make_plan(list_matrices(source), source.identity, settings or Settings())
    return replace(todo, estimate=estimate(todo, source))


def compare(
    base: str | Path | nn.Module,
    tuned: str | Path | nn.Module,
    *,
    base_revision: str | None = None,
    tuned_revision: str | None = None,
    token: str | bool | None = None,
    settings: Settings | None = None,
) -> Comparison:
    """What changed from one model to another, matrix by matrix: the spectrum of the difference, the drift of S', the
    angles between the leading subspaces.

    Matrices are paired by name, across prefixes, fused and split projections, tied heads and resized vocabularies; what
    has no partner is listed with its reason. Models are named as for `analyze`; one pair is in memory at a time in each
    worker. Of `settings`, roles, layers, match and device apply. What could not be read to the end is in
    `comparison.unread`. Raises what `analyze` does.
    """
    settings = settings or Settings()
    started = time.perf_counter()
    first = open_source(base, revision=base_revision, token=token)
    second = open_source(tuned, revision=tuned_revision, token=token)
    opened = time.perf_counter()
    background = ThreadPoolExecutor(1)
    try:
        matching = match(list_matrices(first), list_matrices(second), settings)
        planned = time.perf_counter()
        identities = background.submit(lambda: (with_hashes(first), with_hashes(second)))
        with tqdm(total=100, desc="comparing", delay=QUIET_SECONDS, name="lmd_hf.compare", **_BAR) as bar:
            advance = _advance(bar, matching.pairs)
            changes = compare_all(matching, first, second, device=settings.device, progress=advance)
        hashed = identities.result()
    finally:
        background.shutdown(wait=False, cancel_futures=True)
    timing = {"open": opened - started, "plan": planned - opened, **changes.timing}
    timing["total"] = time.perf_counter() - started
    comparison = build_comparison(*hashed, settings, matching, replace(changes, timing=timing))
    if comparison.unread and not comparison.matrices:
        raise SourceError(f"none of the {len(matching.pairs)} pairs could be compared: {comparison.unread[0].reason}")
    return comparison


_BAR = {"leave": False, "disable": None, "bar_format": "{desc}: {percentage:3.0f}% |{bar}| {elapsed}<{remaining}"}


def _ahead(source: Source, settings: Settings) -> AbstractContextManager[HeadStart | None]:
    """The matrices that names alone reveal, under way. A live module needs none: its libraries are imported."""
    if source.module is not None or source.updates or settings.metric != "identity":
        return nullcontext()
    try:
        early = make_plan(list_by_name(source), source.identity, settings)
        if isinstance(source, FileSource) and source.connection is not None:
            certain = tuple(index for index in early.shards[0] if _is_certain(early.works[index].ref))
            early = replace(early, shards=(certain,))
        return head_start(early, source)
    except SettingsError:  # names alone may miss what was selected; the final plan decides
        return nullcontext()


def _is_certain(ref: MatrixRef) -> bool:
    """Whether the name alone tells role and cut for sure, so that bytes may be fetched before the plan is final."""
    return ref.block != "" and ref.layer is not None and not ref.rows and ref.expert is None and len(ref.tensors) == 1


def _advance(bar: tqdm, works: Iterable[Work | Pair]) -> Callable[[Work | Pair], None]:
    total = sum(work.flops for work in works) or 1.0
    return lambda work: bar.update(100 * work.flops / total) and None
