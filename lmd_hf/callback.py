"""`LMDCallback`: the matrices of a model while transformers' Trainer, or trl's, trains it."""

import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pyarrow import ArrowException
from safetensors import SafetensorError
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lmd_hf import __version__
from lmd_hf.errors import FormatError, LmdError, SettingsError, SourceError
from lmd_hf.hub.section import place
from lmd_hf.report.files import bytes_writer, write_folder
from lmd_hf.training.budget import FLOOR_SECONDS
from lmd_hf.training.card import section
from lmd_hf.training.tracker import SERIES, VIEWS, LMDTracker, checked


FOLDER, CARD, FIGURE = "lmd", "README.md", "lmd/evolution.png"  # below the Trainer's output folder
WHEN = ("steps", "save", "epoch")
PARTS = 100  # of a training, one measurement each where nothing else is asked for
LAST_LOG = "train_loss"  # what the Trainer tells in its last log alone
# what reading and writing may raise: our own refusals, the disk, text that is none, and the libraries that write
UNTOLD = (LmdError, OSError, ValueError, ArrowException, SafetensorError)


class LMDCallback(TrainerCallback):  # type: ignore[misc]  # transformers has no types for mypy
    """Watches S', latent dimension, subspaces and capacity of every matrix that is trained.

        Trainer(..., callbacks=[LMDCallback()])

    Measures at the start, then `every` steps (default: a hundredth of the training), checkpoints (`on="save"`) or
    epochs, and at the end, in at most `budget`, a share of the training's own time (`LMDTracker` tells how it keeps
    to it; `None`: no limit). Means go into the Trainer's next log, and so to every tracker; the series, the figures and
    the verdict on convergence into `lmd/` in the output folder, and a section into the model card there. Optimiser
    steps are counted, so accumulation changes nothing; of several processes the first measures; a training that is
    resumed goes on in the series of its checkpoint; each trial of a hyperparameter search writes into its own folder;
    of a model with adapters of peft, their updates are measured. Where FSDP or ZeRO-3 spreads parameters over
    processes, each saved checkpoint is measured instead, if it holds whole weights; a warning says so, or why not. The
    training itself comes out the same, bit for bit, and what cannot be read or written at its end is a warning.
    """

    def __init__(
        self,
        *,
        every: int | None = None,
        on: str = "steps",
        roles: Iterable[str] = (),
        metric: str = "identity",
        budget: float | None = 0.02,
    ) -> None:
        if on not in WHEN:
            raise SettingsError(f"no on '{on}'; known: {', '.join(WHEN)}")
        if every is not None and (not isinstance(every, int) or every < 1):
            raise SettingsError(f"every is {every}; give a number from 1 on, or leave it out")
        self.on, self.every = on, every
        self.tracker: LMDTracker | None = None
        self._options = checked(roles, metric, budget)
        self._pending: dict[str, float] = {}
        self._count = 0
        self._ended: int | None = None  # the step at which the end was measured
        self._loaded: int | None = None  # the step of the checkpoint that was loaded then, as the best one
        self._sharded = False
        self._out = Path()
        self._resumed: Path | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **told: Any
    ) -> None:
        """Measure the start, or take up the series of the training that is resumed."""
        self.tracker, self._pending, self._count, self._sharded = None, {}, 0, False
        self._ended = self._loaded = None
        if not state.is_world_process_zero:
            return
        trainer, call = _find_training()
        self._out = Path(args.output_dir)
        resumed = self._checkpoint(state) if state.global_step else None
        if trainer is not None:
            _join(self, trainer)
            self._out = Path(trainer._get_output_dir(call.get("trial")))  # a trial of a search has a folder of its own
            resumed = call["resume_from_checkpoint"]
        self._resumed = None if resumed is None else Path(resumed) / FOLDER
        try:
            self.tracker = self._track(told["model"], state)
        except SourceError as error:
            self._sharded = True
            instead = "saved checkpoints instead" if args.save_strategy != "no" else "nothing (save_strategy is 'no')"
            warnings.warn(f"LMDCallback measures {instead}: {error}", stacklevel=2)
        else:
            self._pending = self.tracker.measure()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **told: Any) -> None:
        """Measure if it is time."""
        every = self.every or max(1, state.max_steps // PARTS)
        if self.on == "steps" and state.global_step % every == 0:
            self._measure(state)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **told: Any) -> None:
        """Measure if it is time."""
        if self.on == "epoch" and self._is_turn():
            self._measure(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **told: Any) -> None:
        """Measure if it is time, or if only checkpoints can be; keep with the checkpoint what resuming needs."""
        if self._sharded and state.is_world_process_zero:
            self._open_checkpoint(state)
        elif self.on == "save" and self._is_turn():
            self._measure(state)
        if self.tracker is not None and self._checkpoint(state).is_dir():
            with self.tracker.budget.spending(), _no_reason_to_stop():
                self.tracker.checkpoint(self._checkpoint(state) / FOLDER)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **told: Any,
    ) -> None:
        """Add the means that were measured since the last log; measure the end at the Trainer's last log, after which
        it may load its best checkpoint."""
        if logs is not None and LAST_LOG in logs and self._ended != state.global_step:
            self._measure(state, floor=FLOOR_SECONDS)
            self._ended = state.global_step
        if self._pending and logs is not None:
            logs.update(self._pending)
            if state.log_history:
                state.log_history[-1].update(self._pending)
            self._pending = {}

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **told: Any) -> None:
        """Write series, figures, verdict and the card's section; measure the end where no last log has told of it."""
        if self.tracker is None:
            return
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._loaded = state.best_global_step
        elif self._ended != state.global_step:
            self._measure(state, floor=FLOOR_SECONDS)
        with self.tracker.budget.spending(), _no_reason_to_stop():
            self.tracker.save(self._out / FOLDER, history=state.log_history)
        self.write_section(self._out / CARD, state)

    def write_section(self, card: Path, state: TrainerState) -> None:
        """Put the section on this training into a model card, or begin one with it."""
        if self.tracker is None or not self.tracker.points:
            return
        with _no_reason_to_stop():  # a person has to decide; the card is as it was
            there = Path(os.path.realpath(card))  # what a link leads to
            told = self.tracker.told(state.log_history)
            figure = Path(os.path.relpath(self._out / FIGURE, card.parent)).as_posix()
            body = section(self.tracker.points, told, figure=figure, loaded=self._loaded)
            written = place(_text_of(there), body, lmd_hf=__version__)
            write_folder(there.parent, {there.name: bytes_writer(written.encode())})

    def _is_turn(self) -> bool:
        self._count += 1
        return self._count % (self.every or 1) == 0

    def _measure(self, state: TrainerState, floor: float = 0.0) -> None:
        if self.tracker is not None and not self._sharded:
            self.tracker.steps, before = state.global_step, len(self.tracker.points)
            with _no_reason_to_stop():
                means = self.tracker.measure(floor=floor)
                if len(self.tracker.points) > before:
                    self._pending = means

    def _checkpoint(self, state: TrainerState) -> Path:
        return self._out / f"checkpoint-{state.global_step}"

    def _track(self, model: nn.Module | Path, state: TrainerState) -> LMDTracker:
        """A tracker that goes on in the series of the checkpoint that is resumed; in a new one where that has none, or
        none that can be read."""
        step = state.global_step
        try:
            if self._resumed is not None and not all((self._resumed / name).is_file() for name in (SERIES, VIEWS)):
                raise FormatError(f"{self._resumed} holds no whole one")
            return LMDTracker(model, **self._options, resume=(self._resumed, step))
        except FormatError as error:
            if self._resumed is None:
                raise
            warnings.warn(f"LMDCallback begins its series anew at step {step}: {error}", stacklevel=3)
        return LMDTracker(model, **self._options, resume=(None, step))

    def _open_checkpoint(self, state: TrainerState) -> None:
        """Measure the checkpoint that was just saved, or say why that cannot be."""
        folder = self._checkpoint(state)
        with _no_reason_to_stop():
            if self.tracker is None:
                self.tracker = self._track(folder, state)
            self.tracker.model, self.tracker.steps = folder, state.global_step
            self._pending = self.tracker.measure()


@contextmanager
def _no_reason_to_stop() -> Iterator[None]:
    """What we cannot read or write becomes a warning: the training is worth more than what is told of it."""
    try:
        yield
    except UNTOLD as error:
        warnings.warn(f"LMDCallback goes on without: {error}", stacklevel=4)


def _text_of(card: Path) -> str:
    """The card with the line breaks that it has, "" where there is none."""
    try:
        return card.read_bytes().decode() if card.is_file() else ""
    except UnicodeDecodeError:
        raise FormatError(f"{card}: not UTF-8, which the Hub requires; convert it first") from None


def _find_training() -> tuple[Trainer | None, dict[str, Any]]:
    """The Trainer that trains, and what its loop was called with (`resume_from_checkpoint`, `trial`).

    It hands no reference to itself to a callback, so it is found where it is: among the callers.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), Trainer) and "resume_from_checkpoint" in frame.f_locals:
            return frame.f_locals["self"], frame.f_locals
        frame = frame.f_back  # type: ignore[assignment]
    return None, {}


def _join(callback: LMDCallback, trainer: Trainer) -> None:
    """Go before the trackers, and write into every card that the Trainer writes.

    The Trainer calls its trackers' callbacks before those that it is given, so that what these add to a log would come
    too late; and it writes the model card, when asked for one, over what is there, without an event.
    """
    callbacks = trainer.callback_handler.callbacks
    if any(isinstance(each, LMDCallback) and each is not callback for each in callbacks):
        raise SettingsError(
            "two LMDCallbacks on one Trainer would write the same files; give one, with the roles of both"
        )
    if callback not in callbacks:
        return
    callbacks.remove(callback)
    callbacks.insert(0, callback)
    if getattr(trainer.create_model_card, "lmd_callback", None) is callback:
        return
    create = trainer.create_model_card

    def create_model_card(*positional: Any, **named: Any) -> None:
        create(*positional, **named)
        if trainer.is_world_process_zero():
            callback.write_section(Path(trainer.args.output_dir) / CARD, trainer.state)

    create_model_card.lmd_callback = callback  # type: ignore[attr-defined]
    trainer.create_model_card = create_model_card
