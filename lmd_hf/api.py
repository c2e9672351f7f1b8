"""The public functions."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from lmd_hf.errors import SettingsError, SourceError
from lmd_hf.evidence import Thresholds
from lmd_hf.pipeline import Request, analyze_all, analyze_one
from lmd_hf.records import Data, Plan, Settings
from lmd_hf.report.compare import Comparison, build_comparison
from lmd_hf.report.report import Report
from lmd_hf.run.asked import check_model, check_types, texts
from lmd_hf.run.compare import compare_all
from lmd_hf.run.estimate import estimate
from lmd_hf.run.pairs import match
from lmd_hf.run.plan import make_plan
from lmd_hf.run.progress import progress_bar
from lmd_hf.run.world import World
from lmd_hf.weights.identity import with_hashes
from lmd_hf.weights.inventory import list_matrices
from lmd_hf.weights.lora import is_adapter
from lmd_hf.weights.merged import open_merged
from lmd_hf.weights.source import FileSource, open_source


if TYPE_CHECKING:
    from torch import nn


@overload
def analyze(
    model: str | Path | nn.Module | FileSource,
    *,
    revision: str | None = None,
    subfolder: str = "",
    token: str | bool | None = None,
    download: bool = False,
    base: str | Path | None = None,
    before: str | Path | nn.Module | None = None,
    thresholds: Thresholds | None = None,
    reuse: str | None = None,
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
    model: str | Path | nn.Module | FileSource | list[Any] | tuple[Any, ...],
    *,
    revision: str | None = None,
    subfolder: str = "",
    token: str | bool | None = None,
    download: bool = False,
    base: str | Path | None = None,
    before: str | Path | nn.Module | None = None,
    thresholds: Thresholds | None = None,
    reuse: str | None = None,
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

    `model` is a folder in Hub layout, a `.safetensors` file, a Hub id, a live module or what `open_source` gave;
    weights are read one tensor at a time and the model is never built with real memory. Of a Hub id only the tensors
    that are selected are fetched, and not kept; `download` keeps whole files in the cache. A PEFT LoRA adapter gives
    one row for each pair, the update that it makes; with `base` (a model, or `auto` for the one that it names) the rows
    are those of the base with the updates added. The keywords after that are the fields of `Settings`.

    With `heads`, `report.heads` holds the Hopfield reading of every attention head of which a matrix is selected (with
    data its k90 and class too), `report.mlps` that of the MLPs; what cannot be formed is in the notes of the coverage.

    Whether the training had converged is judged by what there is: the loss curve in a `trainer_state.json` beside the
    weights (or in the last `checkpoint-N` folder there), with `before` an earlier checkpoint of the same training (a
    folder, a file, a module, a Hub id, `id@revision`, or `@revision` of the same repository), and what weights alone
    tell against it; `thresholds` says where a verdict turns. Without evidence it is `unknown`.

    With `rank` and `factors`, the rank that has a matrix also writes its leading axes into that folder, one safetensors
    file each: `projection` (U·Odist), `s` (S') and `similarity` (Idist·Vᵀ), as `lmd_hf.decompose` gives them (of
    several models, into folders 0, 1, 2 …).

    With `reuse`, a dataset that `push_results` wrote is asked first: what it holds of the same commit, by the same
    version with the same settings, is returned instead, and `report.environment["published"]` names the dataset.

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
        roles=texts("roles", roles),
        layers=layers,
        match=match,
        heads=heads,
        rank=rank,
        device=device,
        data=Data(str(data)) if isinstance(data, (str, Path)) else data,
    )
    check_types(settings)
    if rank < 0 or (rank > 0) != (factors is not None):
        raise SettingsError(
            "rank (how many axes) and factors (the folder) go together; give both or neither (in a shell, only `lmd-hf "
            "analyze MODEL --rank N --out DIR` writes factors)"
        )
    request = Request(
        settings,
        {"revision": revision, "subfolder": subfolder, "token": token, "download": download, "base": base},
        before=before,
        thresholds=thresholds or Thresholds(),
        reuse=reuse,
    )
    world = world or World()
    if isinstance(model, (list, tuple)):
        folders = None if factors is None else [Path(factors) / str(place) for place in range(len(model))]
        return analyze_all(model, request, world, folders)
    return analyze_one(model, request, world, None if factors is None else Path(factors))


def plan(
    model: str | Path | nn.Module | FileSource,
    *,
    revision: str | None = None,
    subfolder: str = "",
    token: str | bool | None = None,
    base: str | Path | None = None,
    settings: Settings | None = None,
) -> Plan:
    """What `analyze` would do, from headers alone: no weight is fetched or read. Half a second of the same arithmetic
    on random numbers tells how long it would take here."""
    check_model(model, revision=revision, subfolder=subfolder)
    source = open_source(model, revision=revision, subfolder=subfolder, token=token, base=base)
    todo = make_plan(list_matrices(source), source.identity, settings or Settings())
    return replace(todo, estimate=estimate(todo, source))


def compare(
    base: str | Path | nn.Module | FileSource,
    tuned: str | Path | nn.Module | FileSource,
    *,
    base_revision: str | None = None,
    tuned_revision: str | None = None,
    token: str | bool | None = None,
    settings: Settings | None = None,
) -> Comparison:
    """What changed from one model to another, matrix by matrix: the spectrum of the difference, the drift of S', the
    angles between the leading subspaces.

    Matrices are paired by name, across prefixes, fused and split projections, tied heads and resized vocabularies; what
    has no partner is listed with its reason. Models are named as for `analyze`; a LoRA adapter beside its base is the
    base with the updates added. One pair is in memory at a time in each worker. Of `settings`, roles, layers, match and
    device apply. What could not be read to the end is in `comparison.unread`. Raises what `analyze` does.
    """
    settings = settings or Settings()
    check_model(base, revision=base_revision)
    check_model(tuned, revision=tuned_revision)
    started = time.perf_counter()
    first = open_source(base, revision=base_revision, token=token)
    second = open_source(tuned, revision=tuned_revision, token=token)
    if isinstance(second, FileSource) and is_adapter(second.config) and not is_adapter(first.config):
        second = open_merged(second, first, token=token, download=False)
    elif is_adapter(first.config) and not is_adapter(second.config):
        raise SettingsError(f"{first.identity.id} is an adapter and {second.identity.id} is none; give the base first")
    opened = time.perf_counter()
    background = ThreadPoolExecutor(1)
    try:
        matching = match(list_matrices(first), list_matrices(second), settings)
        planned = time.perf_counter()
        identities = background.submit(lambda: (with_hashes(first), with_hashes(second)))
        with progress_bar("comparing", matching.pairs, World()) as progress:
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
