"""Measuring a model while it trains, in a share of the training's own time."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lmd_hf.errors import FormatError, NoDataError, SettingsError, SourceError
from lmd_hf.evidence import Convergence, Thresholds
from lmd_hf.records import MatrixRef, MatrixReport, Settings, Work
from lmd_hf.report.files import text_writer, write_folder
from lmd_hf.run.convergence import conclude, judge_change, judge_loss, judge_weights
from lmd_hf.run.measure import measure, read_metric, to_row
from lmd_hf.run.plan import make_plan
from lmd_hf.training.budget import FLOOR_SECONDS, Budget
from lmd_hf.training.series import Point, latest, read_series, summary, to_point, write_series
from lmd_hf.training.source import open_training, takes_gradients
from lmd_hf.training.views import Moved, View, from_tensors, look, moved, to_tensors
from lmd_hf.weights.inventory import list_matrices
from lmd_hf.weights.live import LiveSource
from lmd_hf.weights.source import Source, open_source
from lmd_hf.weights.stored import read_stored


if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

SERIES, VIEWS, VERDICT = "series.parquet", "views.safetensors", "training.json"
FIRST, OLDER, NEWER = ("first", "older", "newer")
Key = tuple[str, str]
# what keeps one matrix from being measured, and must not end a training: no data, NaN, no convergence, a full GPU
UNMEASURED = (
    *(NoDataError, SourceError, FormatError, ValueError, torch.OutOfMemoryError),
    torch.linalg.LinAlgError,  # type: ignore[attr-defined]
)


class LMDTracker:
    """The series of a model's matrices over a training loop of one's own: `step()` after every optimiser step.

        tracker = LMDTracker(model, every=100)
        for batch in batches:
            ...
            optimizer.step()
            tracker.step(loss.item())  # numbers for a logger every 100 steps, else None
        tracker.save("lmd")

    The start is measured at once, then every `every` steps as many matrices as fit into `budget`, a share of the time
    that the training itself takes (`None`: all of them, whatever it takes): those first that were measured longest ago,
    of these the cheapest. The rest waits for its turn; one that takes longer than there is room lets others go first
    for as long as it takes, and then they wait for it. What takes no gradients is measured once, and again after it
    took some; of a model with adapters of peft, their updates are measured. `roles` and `metric` (`identity` or `norm`)
    are as for `analyze`; spectra come from the kernel `auto`, sketched above a short side of 8,192.

    The training is left as it was: weights are read, no gradient, random state, dtype or number of threads is touched.
    `resume` is the folder of an earlier `checkpoint` (`None`: there is none) and the step to go on from. Raises
    `SettingsError` for a selection that leaves nothing, or nothing that is trained, `FormatError` for a checkpoint that
    is damaged or in another metric, and `SourceError` where parameters are spread over processes.
    """

    def __init__(
        self,
        model: nn.Module | str | Path,
        *,
        every: int = 100,
        roles: Iterable[str] = (),
        metric: str = "identity",
        budget: float | None = 0.02,
        resume: tuple[str | Path | None, int] | None = None,
    ) -> None:
        if every < 1:
            raise SettingsError(f"every is {every}; give a number of steps from 1 on")
        options = checked(roles, metric, budget)
        self.budget = Budget(budget)
        self.model, self.every = model, every
        self.points: list[Point] = []
        self.skipped: dict[str, str] = {}
        self.steps = 0
        self._losses: list[dict[str, Any]] = []
        self._last: dict[Key, Point] = {}
        self._views: dict[Key, dict[str, View]] = {}
        self._rows: dict[Key, MatrixReport] = {}
        self._moved: dict[Key, Moved] = {}
        self._frozen: set[Key] = set()
        self._moving: set[Key] = set()  # what has taken gradients since its last point, or takes them now
        self._waited: dict[Key, float] = {}  # seconds that others took while there was no room for this one
        with self.budget.spending():
            sources = self._open()
            listed = [list_matrices(source) for source in sources]
            whole = replace(listed[0], selected=tuple(ref for each in listed for ref in each.selected))
            todo = make_plan(whole, sources[0].identity, Settings(metric=metric, roles=options["roles"], device="cpu"))
            self._metric, self._works = metric, sorted(todo.works, key=lambda work: work.flops)
            self._look_for_gradients(sources)
            if len(self._frozen) == len(self._works):
                raise SettingsError(
                    "no selected matrix takes gradients; unfreeze one, or select other roles: nothing here will move"
                )
            if resume is not None:
                self.steps = resume[1]
                if resume[0] is not None:
                    self._restore(Path(resume[0]))
        self.measure(floor=FLOOR_SECONDS)

    def step(self, loss: float | None = None) -> dict[str, float] | None:
        """Count an optimiser step; every `every` steps measure what the budget allows and return the means, else
        `None`. The losses are evidence for the verdict."""
        self.steps += 1
        if loss is not None:
            self._losses.append({"step": self.steps, "loss": loss})
        return self.measure() if self.steps % self.every == 0 else None

    def measure(self, *, floor: float = 0.0) -> dict[str, float]:
        """Measure now, for as long as the budget has room, but at least `floor` seconds; the means over the last point
        of every matrix (`lmd/latent_dim`, `lmd/subspace_cos2` …)."""
        room = self.budget.room(floor)
        if room > 0:
            if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
                torch.cuda.synchronize()  # what the training has queued there is its own time
            with self.budget.spending():
                sources = self._open()
                self._look_for_gradients(sources)
            passed: list[Key] = []
            taken = 0.0
            for work in self._due():
                seconds = self.budget.expected(work)
                if seconds <= room - taken:
                    taken += seconds
                    self._waited.pop(_key(work), None)
                    with self.budget.spending(work):
                        self._measure(sources, work)
                elif floor or self._waited.get(_key(work), 0.0) < seconds:
                    passed.append(_key(work))
                else:  # it has let others go first for as long as it takes; now they save up for it
                    break
            self._waited |= {key: self._waited.get(key, 0.0) + taken for key in passed}
        return summary(self._last.values(), self.steps)

    def convergence(self, history: Sequence[dict[str, Any]] | None = None) -> Convergence:
        """The verdict from the losses (`history`: a Trainer's `log_history`), from how far the matrices moved since
        about the middle of what was seen, and from the weights; see `lmd_hf.run.convergence`."""
        limits = Thresholds()
        since = sorted({each.since for each in self._moved.values()})
        source = f"step {since[0]:,}" + (f" to {since[-1]:,}" if len(since) > 1 else "") if since else "no earlier step"
        return conclude(
            [
                judge_loss(self._losses if history is None else history, "the training's log", limits),
                judge_change(list(self._moved.values()), source, limits),
                judge_weights(list(self._rows.values()), limits),
            ]
        )

    def to_pandas(self) -> "pandas.DataFrame":
        """One row a matrix and step; the columns are those of `training.series.Point`."""
        import pandas

        return pandas.DataFrame([vars(point) for point in self.points], columns=list(Point.__dataclass_fields__))

    def plot(self) -> "dict[str, Figure]":
        """{name: figure}: `spectra`, S' of each role from the first step to the last, and `evolution` of latent
        dimension, subspace drift and capacity."""
        from lmd_hf.training.figures import figures

        return figures(self.points)

    def save(self, folder: str | Path, *, history: Sequence[dict[str, Any]] | None = None) -> None:
        """Write `series.parquet`, `training.json` (the verdict, and what measuring took) and the figures; all or
        nothing. Raises `OutputError`."""
        from lmd_hf.report.plots import writer

        text = json.dumps(self.told(history), indent=1, ensure_ascii=False) + "\n"
        pictures = {f"{name}.png": writer(figure) for name, figure in self.plot().items()}
        series = {SERIES: lambda path: write_series(self.points, path)}
        write_folder(Path(folder), {**series, VERDICT: text_writer(text), **pictures})

    def checkpoint(self, folder: str | Path) -> None:
        """Write what `resume` goes on from: the series, and `views.safetensors`, S' and directions of the steps that
        later ones are compared with (some 3 MB for a matrix of 4,096 × 4,096). Raises `OutputError`."""
        views = {
            f"{kept}|{part}|{name}|{field}": tensor
            for (name, part), found in self._views.items()
            for kept, view in found.items()
            for field, tensor in to_tensors(view).items()
        }
        series = {SERIES: lambda path: write_series(self.points, path)}
        told = {"metric": self._metric}
        write_folder(Path(folder), {**series, VIEWS: lambda path: save_file(views, path, metadata=told)})

    def told(self, history: Sequence[dict[str, Any]] | None = None) -> dict[str, Any]:
        """The verdict and what measuring took, as JSON types."""
        from lmd_hf.report.plain import plain

        return {
            "schema": "lmd-training/1",
            "steps": self.steps,
            "metric": self._metric,
            "matrices": len(self._works),
            "frozen": len(self._frozen),
            "measured": len({(p.name, p.part) for p in self.points}),
            "points": len(self.points),
            "seconds": self.budget.spent,
            "share_of_training_time": self.budget.used,
            "skipped": dict(self.skipped),
            "convergence": plain(self.convergence(history)),
        }

    def _restore(self, folder: Path) -> None:
        """What an earlier process saw up to this step; nothing where it left nothing."""
        if not (folder / SERIES).is_file() or not (folder / VIEWS).is_file():
            return
        known = {_key(work) for work in self._works}
        self.points = [p for p in read_series(folder / SERIES) if p.step <= self.steps and (p.name, p.part) in known]
        self._last = latest(self.points)
        tensors: dict[tuple[Key, str], dict[str, Tensor]] = {}
        try:
            with safe_open(folder / VIEWS, framework="pt") as file:
                metric = (file.metadata() or {}).get("metric", self._metric)
                if metric != self._metric:
                    remedy = f"give metric='{metric}', or move it away to begin anew"
                    raise FormatError(f"{folder}: no series in the metric '{self._metric}' but in '{metric}'; {remedy}")
                for label in file.keys():  # noqa: SIM118 (it is no dictionary)
                    kept, part, name, field = label.split("|", 3)
                    tensors.setdefault(((name, part), kept), {})[field] = file.get_tensor(label)
            for (key, kept), fields in tensors.items():
                view = from_tensors(fields)
                if view.step <= self.steps and key in known:
                    self._views.setdefault(key, {})[kept] = view
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise FormatError(f"{folder / VIEWS}: damaged ({error}); move it away to begin anew") from None

    def _open(self) -> tuple[Source, ...]:
        return open_training(self.model) if isinstance(self.model, nn.Module) else (open_source(self.model),)

    def _look_for_gradients(self, sources: tuple[Source, ...]) -> None:
        """What is frozen now; a training may freeze and unfreeze as it goes."""
        self._frozen = {_key(w) for w in self._works if _is_frozen(sources, w.ref)}
        self._moving |= {_key(w) for w in self._works} - self._frozen

    def _due(self) -> list[Work]:
        """What was measured longest ago first (before that what never was), of these the cheapest; what has taken no
        gradients since its last point is not due."""
        seen = {key: point.step for key, point in self._last.items()}
        works = [w for w in self._works if _key(w) in self._moving or _key(w) not in seen]
        return sorted((w for w in works if seen.get(_key(w), -1) < self.steps), key=lambda w: seen.get(_key(w), -1))

    @torch.no_grad()
    def _measure(self, sources: tuple[Source, ...], work: Work) -> None:
        """The next point of one matrix; one that cannot be read or is not finite is named in `skipped`."""
        begun, ref = self.budget.clock(), work.ref
        source = _holder(sources, ref)
        if source is None:
            self.skipped[ref.name] = "it is in the model no longer, or in no active adapter"
            return
        try:
            stored = read_stored(source, ref)
            gain = read_metric(source, ref, self._metric)
            row = to_row(ref, measure(work, stored, gain), kernel=work.kernel)
            now = look(self.steps, row, stored, gain)
        except UNMEASURED as error:
            self.skipped[ref.name] = str(error)
            return
        self.skipped.pop(ref.name, None)
        self._moving -= {_key(work)} & self._frozen
        kept = self._views.setdefault(_key(work), {})
        if FIRST not in kept or (kept[FIRST].cut == 0 and now.cut):
            kept[FIRST] = now  # an adapter begins at 0, which has no directions
        if NEWER not in kept or self.steps >= 2 * kept[NEWER].step:  # so that OLDER is a half to a quarter of the way
            kept[OLDER], kept[NEWER] = kept.get(NEWER, now), now
        self._rows[_key(work)], self._moved[_key(work)] = row, moved(kept[OLDER], now, row)
        since_first = moved(kept[FIRST], now, row)
        self._last[_key(work)] = to_point(self.steps, row, since_first, self.budget.clock() - begun)
        self.points.append(self._last[_key(work)])


def checked(roles: Iterable[str], metric: str, budget: float | None) -> dict[str, Any]:
    """The options of a tracker as they are used. `SettingsError` for what can be told before there is a model."""
    if isinstance(roles, str):
        raise SettingsError(f"roles is the text '{roles}'; give a tuple: roles={tuple(roles.split(','))}")
    if metric not in ("identity", "norm"):
        raise SettingsError(f"a training is watched in the metric 'identity' or 'norm', not in '{metric}'")
    Budget(budget)
    return {"roles": tuple(roles), "metric": metric, "budget": budget}


def _key(work: Work) -> Key:
    return work.ref.name, work.ref.part


def _holder(sources: tuple[Source, ...], ref: MatrixRef) -> Source | None:
    """The source that a matrix is in; a training may have taken it out."""
    names = {tensor.name for tensor in ref.tensors}
    return next((s for s in sources if not isinstance(s, LiveSource) or names <= s.values.keys()), None)


def _is_frozen(sources: tuple[Source, ...], ref: MatrixRef) -> bool:
    source = _holder(sources, ref)
    return source is None or (isinstance(source, LiveSource) and not takes_gradients(source, ref))
