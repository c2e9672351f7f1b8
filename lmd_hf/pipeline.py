"""One model from its source to its report, and many models over the ranks: the stages, read aloud."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmd_hf import __version__
from lmd_hf.circuits import Heads
from lmd_hf.errors import LmdError, SettingsError, SourceError, first_line
from lmd_hf.evidence import Evidence, Thresholds
from lmd_hf.records import Inventory, MatrixRef, ModelIdentity, Plan, Settings
from lmd_hf.report.build import build_report
from lmd_hf.report.plain import plain
from lmd_hf.report.report import Report
from lmd_hf.run.asked import check_model
from lmd_hf.run.convergence import check_thresholds
from lmd_hf.run.evidence import compare_checkpoints, judge, open_before
from lmd_hf.run.execute import HeadStart, Output, execute, head_start, traffic, unfinished
from lmd_hf.run.focus import with_focus
from lmd_hf.run.heads import measure_heads
from lmd_hf.run.journal import Journal, open_journal
from lmd_hf.run.mlps import measure_mlps
from lmd_hf.run.plan import make_plan, plan_heads, plan_mlps
from lmd_hf.run.progress import progress_bar
from lmd_hf.run.read_ahead import ReadAhead
from lmd_hf.run.results import read_results
from lmd_hf.run.workers import room_ahead
from lmd_hf.run.world import World
from lmd_hf.weights.ahead import fetching
from lmd_hf.weights.families import load_table
from lmd_hf.weights.identity import marks, with_hashes
from lmd_hf.weights.inventory import list_by_name, list_matrices
from lmd_hf.weights.named import names_tell_all
from lmd_hf.weights.source import FileSource, Source, open_source


if TYPE_CHECKING:
    from torch import nn


REMEMBERED = 2**27  # bytes of what was fetched for the table and is read again for heads and MLPs


@dataclass(frozen=True)
class Request:
    """What is asked of each model: where its weights are (the keywords of `open_source`), what to compute, an earlier
    checkpoint to judge it by, and a dataset whose published result will do."""

    settings: Settings
    where: dict[str, Any] = field(default_factory=dict, repr=False)  # with the token
    before: str | Path | nn.Module | None = None
    thresholds: Thresholds = field(default_factory=Thresholds)
    reuse: str | None = None


def analyze_one(
    model: str | Path | nn.Module | FileSource, request: Request, world: World, factors: Path | None
) -> Report:
    """The report of one model, on every rank the same."""
    started, settings = time.perf_counter(), request.settings
    check_model(model, revision=request.where.get("revision"), subfolder=request.where.get("subfolder", ""))
    check_thresholds(request.thresholds)
    background = ThreadPoolExecutor(1)
    try:
        table = background.submit(load_table)  # while the Hub answers
        source = world.together(lambda: open_source(model, **request.where))
        if found := world.together(lambda: _published(source, request)):
            return found
        earlier = world.together(lambda: _earlier(model, source, request))
        if isinstance(source, FileSource) and source.ahead is not None:
            source.ahead.halt()  # the reads of the plan take over
        if isinstance(source, FileSource) and settings.heads:
            source.memory.room = REMEMBERED
        table.result()
        opened = time.perf_counter()
        with ExitStack() as open_files:
            forgets = source.module is not None or settings.data is not None
            journal = open_files.enter_context(nullcontext(Journal()) if forgets else open_journal(source.identity))
            # transformers takes seconds to import: the first matrices overlap it
            ahead = open_files.enter_context(_ahead(source, settings, world, journal))
            inventory, todo = world.together(lambda: _planned(source, settings, world))
            _check_same(todo, [source] if earlier is None else [source, earlier], world)
            planned = time.perf_counter()
            identity = background.submit(with_hashes, source)  # hashing the files overlaps with the decomposition
            with progress_bar("decomposing", todo.works, world) as progress:
                output = Output(journal, factors)
                results = execute(todo, source, world=world, output=output, ahead=ahead, progress=progress)
            decomposed = time.perf_counter()
            heads = _heads(inventory, source, settings, world)
            if isinstance(source, FileSource):
                source.forget()  # what follows needs other weights alone
        hashed = identity.result()
        world.check_same({file.name: file.sha256 for file in hashed.files})
    finally:
        background.shutdown(wait=False, cancel_futures=True)
    timing = {"open": opened - started, "plan": planned - opened, **results.timing}
    judged = time.perf_counter()
    timing |= {"heads": judged - decomposed} if settings.heads else {}
    changes = None if earlier is None else _compared(earlier, source, request, world)
    convergence = judge(source, results.matrices, changes, thresholds=request.thresholds, world=world)
    ended = time.perf_counter()
    timing |= {"evidence": ended - judged, "total": ended - started}
    sources = [source] if earlier is None else [source, earlier]
    environment = results.environment | traffic(*sources, world=world)  # heads and evidence have fetched too
    results = replace(results, timing=timing, environment=environment)
    report = build_report(hashed, todo, results, heads=heads, convergence=convergence)
    if report.unread and not report.matrices:
        raise SourceError(report.unread[0].reason)
    return report


def fetch_ahead(source: FileSource, settings: Settings) -> FileSource:
    """The source of a model whose turn will come, with what `analyze_one` reads first on its way from the Hub, as much
    as may wait in memory: what names alone reveal, for the imports of one model would meet those of another.

    What the journal holds is left out. Raises what opening and planning do.
    """
    if source.connection is None:
        return source
    named = names_tell_all(source)
    plan = make_plan(list_matrices(source) if named else list_by_name(source), source.identity, settings)
    with open_journal(source.identity) as journal:
        works = unfinished(plan, source, journal)
    chosen = {work: work.ref for work in works if named or _is_certain(work.ref) or _is_table(work.ref)}
    distant = {file.name for file in source.identity.files if not source.on_disk(file.name)}
    wanted, room = [], room_ahead()
    for span in ReadAhead(source, chosen).order():
        if span.tensor.file in distant and span.bytes <= room:
            room -= span.bytes
            wanted.append((span.tensor, span.start, span.stop))
    return fetching(source, wanted)


def analyze_each(
    models: Sequence[str | Path], request: Request, world: World, *, factors: Sequence[Path] | None = None
) -> Iterator[tuple[int, Report | LmdError]]:
    """(place in the list, its report or what went wrong) for the models that fall to this rank: always the next one
    that no rank has taken."""
    tickets = world.counter()
    folders: Sequence[Path | None] = factors or [None] * len(models)
    while (index := round(tickets.add(1)) - 1) < len(models):
        try:
            yield index, analyze_one(models[index], request, World(), folders[index])
        except LmdError as error:
            yield index, error
        except OSError as error:  # of a disk, in what was read beside the weights
            yield index, SourceError(first_line(error))


def analyze_all(
    models: Sequence[str | Path], request: Request, world: World, factors: Sequence[Path] | None
) -> list[Report]:
    """The reports of all models, on every rank. Raises the first error, after the others are done."""
    shares = world.gather(dict(analyze_each(models, request, world, factors=factors)))
    outcomes = {index: outcome for share in shares for index, outcome in share.items()}
    for index, model in enumerate(models):
        if isinstance(error := outcomes[index], LmdError):
            raise type(error)(f"{model}: {error}" if str(model) not in str(error) else str(error))
    return [outcomes[index] for index in range(len(models))]  # type: ignore[misc]


def _published(source: Source, request: Request) -> Report | None:
    """The result that a dataset holds of these very weights, by this version, with these settings; it says so. None
    where more is asked than a published report can hold: files to write, data on this machine, another verdict."""
    identity, settings = source.identity, request.settings
    more = settings.rank > 0 or settings.data is not None or request.before or request.thresholds != Thresholds()
    if request.reuse is None or identity.commit is None or more:
        return None
    wanted = {name: value for name, value in plain(settings).items() if name != "device"}
    found = read_results(request.reuse, model=identity.id, commit=identity.commit, token=request.where.get("token"))
    for values in found:
        report = Report.from_dict(values)
        had = {name: value for name, value in report.settings.items() if name != "device"}
        if report.lmd_hf == __version__ and had == wanted and _same_files(report.model, with_hashes(source)):
            return replace(report, environment={**report.environment, "published": request.reuse})
    return None


def _same_files(published: ModelIdentity, here: ModelIdentity) -> bool:
    """A commit may hold several models, in folders or with an adapter, and their files the same names and sizes: only
    hashes that are known tell them apart."""
    return published.files == here.files and all(file.sha256 for file in here.files)


def _earlier(model: str | Path | nn.Module | FileSource, source: Source, request: Request) -> Source | None:
    return None if request.before is None else open_before(request.before, model, source, request.where)


def _planned(source: Source, settings: Settings, world: World) -> tuple[Inventory, Plan]:
    inventory = list_matrices(source)
    return inventory, make_plan(inventory, source.identity, settings, world.size)


def _check_same(todo: Plan, sources: list[Source], world: World) -> None:
    """`SettingsError` on every rank if they have different work, or different bytes under the same names."""
    if world.size > 1:
        world.check_same({"works": repr(todo.works)})
        for source in sources:
            world.check_same(world.together(partial(marks, source)))


def _compared(before: Source, source: Source, request: Request, world: World) -> Evidence:
    return compare_checkpoints(
        before,
        source,
        request.settings,
        thresholds=request.thresholds,
        world=world,
        progress=lambda pairs: progress_bar("comparing", pairs, World()),
    )


def _heads(inventory: Inventory, source: Source, settings: Settings, world: World) -> Heads:
    """The Hopfield reading of heads and MLPs, where it is asked for."""
    folded = settings.metric == "norm"
    device, planned = settings.device, plan_heads(inventory, settings)
    heads = measure_heads(planned, source, folded=folded, device=device, world=world)
    mlps, notes = measure_mlps(plan_mlps(inventory, settings), source, folded=folded, world=world)
    heads = replace(heads, mlps=mlps, notes=(*heads.notes, *notes))
    if settings.data is None:
        return heads
    return with_focus(heads, source, settings.data, device=device, world=world)


def _ahead(
    source: Source, settings: Settings, world: World, journal: Journal
) -> AbstractContextManager[HeadStart | None]:
    """The matrices that names alone reveal, under way, where the plan waits for imports (a live module has them).
    Several ranks have none, for no rank knows its share before the plan, nor do factors, which have names."""
    live = source.module is not None or source.updates
    if live or world.size > 1 or settings.rank > 0 or settings.metric != "identity" or names_tell_all(source):
        return nullcontext()
    try:
        early = make_plan(list_by_name(source), source.identity, settings)
        if isinstance(source, FileSource) and source.connection is not None:
            certain = tuple(index for index in early.shards[0] if _is_certain(early.works[index].ref))
            early = replace(early, shards=(certain,))
        return head_start(early, source, journal)
    except SettingsError:  # names alone may miss what was selected; the final plan decides
        return nullcontext()


def _is_certain(ref: MatrixRef) -> bool:
    """Whether the name alone tells role and cut for sure, so that bytes may be fetched before the plan is final."""
    return ref.block != "" and ref.layer is not None and _is_whole(ref)


def _is_table(ref: MatrixRef) -> bool:
    """Whether the name alone tells that the whole tensor is read, though not what it is."""
    return ref.role == "embed" and _is_whole(ref)


def _is_whole(ref: MatrixRef) -> bool:
    return not ref.rows and ref.expert is None and len(ref.tensors) == 1
