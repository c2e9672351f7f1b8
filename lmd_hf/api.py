"""The public functions: the stages, read aloud."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from huggingface_hub.utils import tqdm

from lmd_hf.changes import Pair
from lmd_hf.circuits import Heads
from lmd_hf.errors import LmdError, SettingsError, SourceError
from lmd_hf.evidence import Evidence, Thresholds
from lmd_hf.records import Data, Inventory, MatrixRef, Plan, Settings, Work
from lmd_hf.report.build import build_report
from lmd_hf.report.compare import Comparison, build_comparison
from lmd_hf.report.report import Report
from lmd_hf.run.compare import compare_all
from lmd_hf.run.estimate import estimate
from lmd_hf.run.evidence import compare_checkpoints, judge, open_before
from lmd_hf.run.execute import HeadStart, Output, execute, head_start
from lmd_hf.run.focus import with_focus
from lmd_hf.run.heads import measure_heads
from lmd_hf.run.journal import Journal, open_journal
from lmd_hf.run.mlps import measure_mlps
from lmd_hf.run.pairs import match
from lmd_hf.run.plan import make_plan, plan_heads, plan_mlps
from lmd_hf.run.world import World
from lmd_hf.weights.families import load_table
from lmd_hf.weights.identity import with_hashes
from lmd_hf.weights.inventory import list_by_name, list_matrices
from lmd_hf.weights.named import names_tell_all
from lmd_hf.weights.source import FileSource, Source, open_source


if TYPE_CHECKING:
    from torch import nn

QUIET_SECONDS = 2  # work shorter than this shows no progress bar
REFRESH_SECONDS = 0.2


@overload
def analyze(
    model: str | Path | nn.Module,
    *,
    revision: str | None = None,
    subfolder: str = "",
    token: str | bool | None = None,
    download: bool = False,
    base: str | Path | None = None,
    before: str | Path | nn.Module | None = None,
    thresholds: Thresholds | None = None,
    metric: str = "identity",
    kernel: str = "auto",
    tolerance: float = 0.01,
    roles: tuple[str, ...] = (),
    layers: str = "",
    match: str = "",
    heads: bool = False,
    rank: int = 0,
    device: str = "auto",
    data: str | Path | Data | None = None,
    factors: str | Path | None = None,
    world: World | None = None,
) -> Report: ...


@overload
def analyze(model: list[Any] | tuple[Any, ...], **options: Any) -> list[Report]: ...


def analyze(  # type: ignore[misc]  # the keywords stand once
    model: str | Path | nn.Module | list[Any] | tuple[Any, ...],
    *,
    revision: str | None = None,
    subfolder: str = "",
    token: str | bool | None = None,
    download: bool = False,
    base: str | Path | None = None,
    before: str | Path | nn.Module | None = None,
    thresholds: Thresholds | None = None,
    metric: str = "identity",
    kernel: str = "auto",
    tolerance: float = 0.01,
    roles: tuple[str, ...] = (),
    layers: str = "",
    match: str = "",
    heads: bool = False,
    rank: int = 0,
    device: str = "auto",
    data: str | Path | Data | None = None,
    factors: str | Path | None = None,
    world: World | None = None,
) -> Report | list[Report]:
    """Decompose every weight matrix of a model and return the report; of a list of models, a list of reports.

    `model` is a folder in Hub layout, a `.safetensors` file, a Hub id or a live module; weights are read one tensor at
    a time and the model is never built with real memory. Of a Hub id only the tensors that are selected are fetched,
    and not kept; `download` keeps whole files in the cache. A PEFT LoRA adapter gives one row for each pair, the update
    that it makes; with `base` (a model, or `auto` for the one that it names) the rows are those of the base with
    the updates added. The keywords after that are the fields of `Settings`.

    With `heads`, `report.heads` holds the Hopfield reading of every attention head of which a matrix is selected (with
    data its k90 and class too), `report.mlps` that of the MLPs; what cannot be formed is in the notes of the coverage.

    Whether the training had converged is judged by what there is: the loss curve in a `trainer_state.json` beside the
    weights (or in the last `checkpoint-N` folder there), with `before` an earlier checkpoint of the same training (a
    folder, a file, a module, a Hub id, `id@revision`, or `@revision` of the same repository), and what weights alone
    tell against it; `thresholds` says where a verdict turns. Without evidence it is `unknown`.

    With `rank` and `factors`, the rank that has a matrix also writes its leading axes into that folder, one safetensors
    file each: `projection` (U·Odist), `s` (S') and `similarity` (Idist·Vᵀ), as `lmd_hf.decompose` gives them (of
    several models, into folders 0, 1, 2 …).

    Finished spectra are kept below the Hugging Face cache as they come, and not computed again for the same weights,
    settings and version (`lmd-hf cache` lists and clears them); a live module's are not kept. `world`, from
    `lmd_hf.run.world.join()`, shares the work between the processes of torchrun or `accelerate launch`, all of which
    have to make the same call and get the same report; several models are shared out whole.
    Every stored parameter is accounted for: decomposed, or skipped with its reason; what could not be read to the end
    is in `report.unread`. Raises `SourceError`, `FormatError` or `SettingsError`, each with its remedy; of several
    models, after the others are done.
    """
    settings = Settings(
        metric=metric,
        kernel=kernel,
        tolerance=tolerance,
        roles=tuple(roles),
        layers=layers,
        match=match,
        heads=heads,
        rank=rank,
        device=device,
        data=Data(str(data)) if isinstance(data, (str, Path)) else data,
    )
    if (rank > 0) != (factors is not None):
        raise SettingsError("rank (how many axes) and factors (the folder) go together; give both or neither")
    world = world or World()
    where = {"revision": revision, "subfolder": subfolder, "token": token, "download": download, "base": base}
    judged = {"before": before, "thresholds": thresholds}
    if isinstance(model, (list, tuple)):
        folders = None if factors is None else [Path(factors) / str(place) for place in range(len(model))]
        return _analyze_all(model, where | judged, settings, world, folders)
    return _analyze_one(model, where | judged, settings, world, None if factors is None else Path(factors))


def _analyze_one(
    model: str | Path | nn.Module, where: dict[str, Any], settings: Settings, world: World, factors: Path | None
) -> Report:
    started = time.perf_counter()
    before, thresholds = where.get("before"), where.get("thresholds") or Thresholds()
    where = {name: value for name, value in where.items() if name not in ("before", "thresholds")}
    background = ThreadPoolExecutor(1)
    try:
        table = background.submit(load_table)  # while the Hub answers
        source = world.together(lambda: open_source(model, **where))
        earlier = None if before is None else world.together(lambda: open_before(before, model, source, where))
        table.result()
        opened = time.perf_counter()
        with ExitStack() as open_files:
            forgets = source.module is not None or settings.data is not None
            kept = nullcontext(Journal()) if forgets else open_journal(source.identity)
            journal = open_files.enter_context(kept)
            # transformers takes seconds to import: the first matrices overlap it
            ahead = open_files.enter_context(_ahead(source, settings, world, journal))
            inventory, todo = world.together(lambda: _planned(source, settings, world))
            world.check_same(repr((todo.identity, todo.works)))
            planned = time.perf_counter()
            identity = background.submit(with_hashes, source)  # hashing the files overlaps with the decomposition
            with _progress("decomposing", todo.works, world) as progress:
                output = Output(journal, factors)
                results = execute(todo, source, world=world, output=output, ahead=ahead, progress=progress)
            decomposed = time.perf_counter()
            heads = _heads(inventory, source, settings, world)
        hashed = identity.result()
    finally:
        background.shutdown(wait=False, cancel_futures=True)
    timing = {"open": opened - started, "plan": planned - opened, **results.timing}
    judged = time.perf_counter()
    timing |= {"heads": judged - decomposed} if settings.heads else {}
    changes = None if earlier is None else _compare_with(earlier, source, settings, thresholds, world)
    convergence = judge(source, results.matrices, changes, thresholds=thresholds, world=world)
    ended = time.perf_counter()
    timing |= {"evidence": ended - judged, "total": ended - started}
    report = build_report(hashed, todo, replace(results, timing=timing), heads=heads, convergence=convergence)
    if report.unread and not report.matrices:
        raise SourceError(report.unread[0].reason)
    return report


def _planned(source: Source, settings: Settings, world: World) -> tuple[Inventory, Plan]:
    inventory = list_matrices(source)
    return inventory, make_plan(inventory, source.identity, settings, world.size)


def _compare_with(before: Source, source: Source, settings: Settings, thresholds: Thresholds, world: World) -> Evidence:
    return compare_checkpoints(
        before,
        source,
        settings,
        thresholds=thresholds,
        world=world,
        progress=lambda pairs: _progress("comparing", pairs, World()),
    )


def _heads(inventory: Inventory, source: Source, settings: Settings, world: World) -> Heads:
    """The Hopfield reading of heads and MLPs, where it is asked for."""
    folded = settings.metric == "norm"
    heads = measure_heads(plan_heads(inventory, settings), source, folded=folded, world=world)
    mlps, notes = measure_mlps(plan_mlps(inventory, settings), source, folded=folded, world=world)
    heads = replace(heads, mlps=mlps, notes=(*heads.notes, *notes))
    if settings.data is None:
        return heads
    return with_focus(heads, source, settings.data, device=settings.device, world=world)


def analyze_each(
    models: Sequence[str | Path],
    where: dict[str, Any],
    settings: Settings,
    world: World,
    *,
    factors: Sequence[Path] | None = None,
) -> Iterator[tuple[int, Report | LmdError]]:
    """(place in the list, its report or what went wrong) for the models that fall to this rank: always the next one
    that no rank has taken."""
    tickets = world.counter()
    folders: Sequence[Path | None] = factors or [None] * len(models)
    while (index := round(tickets.add(1)) - 1) < len(models):
        try:
            yield (
                index,
                _analyze_one(models[index], where, settings, World(), folders[index]),
            )
        except LmdError as error:
            yield index, error


def _analyze_all(
    models: Sequence[str | Path],
    where: dict[str, Any],
    settings: Settings,
    world: World,
    factors: Sequence[Path] | None,
) -> list[Report]:
    shares = world.gather(dict(analyze_each(models, where, settings, world, factors=factors)))
    outcomes = {index: outcome for share in shares for index, outcome in share.items()}
    for index, model in enumerate(models):
        if isinstance(error := outcomes[index], LmdError):
            raise type(error)(f"{model}: {error}" if str(model) not in str(error) else str(error))
    return [outcomes[index] for index in range(len(models))]  # type: ignore[misc]


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
        with _progress("comparing", matching.pairs, World()) as progress:
            changes = compare_all(matching, first, second, device=settings.device, progress=progress)
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
    return ref.block != "" and ref.layer is not None and not ref.rows and ref.expert is None and len(ref.tensors) == 1


@contextmanager
def _progress(what: str, works: Sequence[Work | Pair], world: World) -> Iterator[Callable[[Work | Pair], None]]:
    """A bar over the work of all ranks, on rank 0; what it gives counts one work as done."""
    total = sum(work.flops for work in works) or 1.0
    over = threading.Event()
    done = world.counter()
    hidden = None if world.rank == 0 else True  # None: where there is a terminal
    with tqdm(total=100, desc=what, delay=QUIET_SECONDS, name="lmd_hf.analyze", **(_BAR | {"disable": hidden})) as bar:

        def follow() -> None:
            while not over.wait(REFRESH_SECONDS):
                bar.update(100 * done.add(0) / total - bar.n)

        follower = threading.Thread(target=follow if world.rank == 0 else over.wait, daemon=True)
        follower.start()

        def count(work: Work | Pair) -> None:
            done.add(work.flops)

        try:
            yield count
        finally:
            over.set()
            follower.join()
