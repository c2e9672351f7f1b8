"""Gathering the evidence on convergence: what a trainer left beside the weights, an earlier checkpoint, the weights."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from lmd_hf.changes import MatrixChange, Pair
from lmd_hf.errors import FormatError, SettingsError, SourceError
from lmd_hf.evidence import UNKNOWN, Convergence, Evidence, Thresholds
from lmd_hf.records import MatrixReport, Settings
from lmd_hf.run.asked import check_model
from lmd_hf.run.compare import compare_all
from lmd_hf.run.convergence import conclude, judge_change, judge_loss, judge_weights
from lmd_hf.run.pairs import match
from lmd_hf.run.world import World
from lmd_hf.weights.inventory import list_matrices
from lmd_hf.weights.source import FileSource, Source, open_source
from lmd_hf.weights.training import read_history


Progress = Callable[[Sequence[Pair]], AbstractContextManager[Callable[[Pair], None]]]


def open_before(
    before: str | Path | nn.Module,
    model: str | Path | nn.Module | FileSource,
    source: Source,
    where: dict[str, Any],
) -> Source:
    """The earlier checkpoint of a model, which was opened with `where` as `source`: a folder, a file, a module, a Hub
    id, `id@revision`, or `@revision` of the model's own repository. Raises what `open_source` does, and `SettingsError`
    for a model of another type."""
    check_model(before)
    named, options = before, {"token": where.get("token"), "download": where.get("download", False)}
    if isinstance(before, str) and "@" in before and not Path(before).expanduser().exists():
        named, _, options["revision"] = before.rpartition("@")
        if not named:
            if not isinstance(model, str) or Path(model).expanduser().exists():
                raise SettingsError(
                    f"'{before}' is a revision of a Hub repository, which {model} is not; give a folder"
                )
            named, options["subfolder"] = model, where.get("subfolder", "")
    earlier = open_source(named, **options)
    kinds = [each.identity.model_type for each in (earlier, source)]
    if None not in kinds and kinds[0] != kinds[1]:
        raise SettingsError(f"{before}: no earlier checkpoint of this {kinds[1]} model, but a {kinds[0]} model")
    return earlier


def judge(
    source: Source,
    matrices: Sequence[MatrixReport],
    changes: Evidence | None,
    *,
    thresholds: Thresholds,
    world: World,
) -> Convergence:
    """The verdict from all that there is: the loss curve beside the weights, `changes` from an earlier checkpoint where
    one was named, and the weights. Rank 0 looks for the curve, and every rank has its answer."""
    found = world.gather(judge_curve(source, thresholds) if world.rank == 0 else None)[0]
    return conclude(piece for piece in (found, changes, judge_weights(matrices, thresholds)) if piece is not None)


def judge_curve(source: Source, thresholds: Thresholds) -> Evidence | None:
    """`judge_loss` of the trainer's state beside the weights; `None` where there is none. One that cannot be read is
    evidence of nothing, and says why."""
    try:
        found = read_history(source)
    except (SourceError, FormatError) as error:
        return Evidence("loss curve", "trainer_state.json", UNKNOWN, f"cannot be read: {error}")
    return None if found is None else judge_loss(found[1], found[0], thresholds)


def compare_checkpoints(
    before: Source, after: Source, settings: Settings, *, thresholds: Thresholds, world: World, progress: Progress
) -> Evidence:
    """`judge_change` from one checkpoint to the next, on the matrices that `settings` select; each rank compares its
    share of the pairs. What could not be compared is counted in the text."""
    plain = replace(settings, metric="identity", rank=0)
    matching = world.together(lambda: match(list_matrices(before), list_matrices(after), plain))
    mine = replace(matching, pairs=matching.pairs[world.rank :: world.size], vectors=())
    with progress(mine.pairs) as count:
        changes = world.together(lambda: compare_all(mine, before, after, device=settings.device, progress=count))
    rows = {(row.name, row.part): row for share in world.gather(changes.matrices) for row in share}
    keys = [(pair.base.name, pair.base.part) for pair in matching.pairs]
    ordered: list[MatrixChange] = [rows[key] for key in keys if key in rows]
    at = f" at {before.identity.commit[:12]}" if before.identity.commit else ""
    evidence = judge_change(ordered, f"{before.identity.id}{at}", thresholds)
    lost = len(keys) - len(ordered)
    return replace(evidence, text=f"{evidence.text}; {lost} matrices could not be compared") if lost else evidence
