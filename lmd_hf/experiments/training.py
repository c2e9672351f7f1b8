"""Training: how the factors of a small Transformer change from initialisation to convergence.

The paper proposes to watch the factors during training and takes stable convergence as a premise; when it counts as
reached is this project's rule (two checkpoints whose S' differs by 1 % at most and whose leading subspaces agree).
"""

import copy
import platform
import statistics
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from lmd_hf.api import analyze, compare
from lmd_hf.changes import MatrixChange
from lmd_hf.demo.train import read_corpus
from lmd_hf.experiments.catalogue import EXPERIMENTS
from lmd_hf.experiments.figures import dots, panels
from lmd_hf.experiments.outcome import Cell, Check, Outcome, averaged, counted, spread
from lmd_hf.experiments.seeding import each, generator, seed_of
from lmd_hf.records import Settings
from lmd_hf.report.findings import noise_ratio
from lmd_hf.report.plain import Row
from lmd_hf.run.convergence import looks_untrained


if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "training"
ROLES = ("q", "k", "v", "o", "gate", "up", "down")
WINDOW, BATCH, RATE = 64, 16, 4e-3  # bytes the model sees at once, windows a step, peak learning rate
HELD_OUT = 64  # windows
NOISE_AT_FIRST, NOISE_AT_LAST = 0.8, 0.1  # share of the matrices that cannot be told from noise
SPECTRUM_CHANGE, SUBSPACE_COS2 = 0.01, 0.99  # stable: at most, at least
SHARE = 0.9  # a claim holds on at least nine of ten seeds
METHOD = (
    "A LLaMA of 2 layers, width 64, 4 heads with 2 for keys and values, over bytes, learns Python's standard library "
    f"({platform.python_version()}; AdamW, one-cycle rate up to 4e-3 and down to nothing, which is what makes the "
    "weights stop; decay 0.1). Its 14 matrices are analysed (metric `identity`) and compared with the last checkpoint. "
    "Like noise: no Marchenko–Pastur spike, and a bulk that fits. Participation: the participation ratio of S' over "
    "that of noise of the same shape. Distance: ‖S'(step) − S'(last)‖ / ‖S'(last)‖. cos²: mean over the principal "
    "angles of the top-n' subspaces, n' of the last, the lesser of both sides. All are means over the matrices."
)


@dataclass(frozen=True)
class Setup:
    """Steps of training; checkpoints are kept at 0, at doublings up to the last, and at nine tenths."""

    steps: int = 640
    first: int = 10


@dataclass(frozen=True)
class Checkpoint:
    """Means over the matrices at one step, and the loss (nats a byte) on held-out text."""

    step: int
    loss: float
    like_noise: float
    participation: float
    distance: float
    cos2: float


Run = list[Checkpoint]  # one seed, from step 0 to the last


def run(seeds: Sequence[int], setup: Setup = Setup()) -> Outcome:
    """Train one model a seed, keep checkpoints, and follow their factors to the last."""
    training, held_out = (torch.frombuffer(bytearray("".join(texts).encode()), dtype=torch.uint8) for texts in _texts())
    starts = [_new_model(seed) for seed in seeds]
    cases = list(zip(starts, seeds, strict=True))
    kept = each(lambda case: _train(*case, training, setup), cases, what=NAME)
    losses = each(lambda models: [_loss(m, held_out) for m in models.values()], kept, what=f"{NAME}, held out")
    runs = [_follow(*pair) for pair in zip(kept, losses, strict=True)]
    rows = [{"step": c[0].step, **_row(c)} for c in zip(*runs, strict=True)]
    return Outcome(
        NAME, EXPERIMENTS[NAME], METHOD, judge(runs), tuple(seeds), {"by step": rows}, {"training": _figure(runs)}
    )


def judge(runs: Sequence[Run]) -> tuple[Check, ...]:
    """The stated rules, applied to the means over the matrices."""
    first, before_last, last = ([r[place] for r in runs] for place in (0, -2, -1))
    noise_first, noise_last = ([c.like_noise for c in side] for side in (first, last))
    emerged = [end <= NOISE_AT_LAST for end in noise_last]
    lower = [b.participation < a.participation for a, b in zip(first, last, strict=True)]
    stable = [c.distance <= SPECTRUM_CHANGE and c.cos2 >= SUBSPACE_COS2 for c in before_last]
    nearer = [_falls([c.distance for c in r]) and _falls([-c.cos2 for c in r]) for r in runs]
    needed = f"on at least {SHARE:.0%} of the seeds"
    return (
        Check(
            f"at initialisation at least {NOISE_AT_FIRST:.0%} of the matrices are like noise, mean over the seeds",
            spread(noise_first),
            statistics.fmean(noise_first) >= NOISE_AT_FIRST,
        ),
        Check(
            f"after training at most {NOISE_AT_LAST:.0%} are, {needed}",
            f"{spread(noise_last)}; that few {counted(emerged)}",
            sum(emerged) >= SHARE * len(runs),
        ),
        Check(
            f"training concentrates S': lower participation than at initialisation {needed}",
            f"from {spread([c.participation for c in first])} to {spread([c.participation for c in last])} of noise's; "
            f"lower {counted(lower)}",
            sum(lower) >= SHARE * len(runs),
        ),
        Check(
            f"S' and the leading subspaces come nearer to their last state from each checkpoint to the next {needed}",
            f"throughout {counted(nearer)}",
            sum(nearer) >= SHARE * len(runs),
        ),
        Check(
            f"stable in the last tenth: S' changes by at most {SPECTRUM_CHANGE:.0%}, cos² at least {SUBSPACE_COS2}, "
            + needed,
            f"change {spread([c.distance for c in before_last], '.4f')}, cos² "
            f"{spread([c.cos2 for c in before_last], '.4f')}; stable {counted(stable)}",
            sum(stable) >= SHARE * len(runs),
        ),
    )


def _falls(values: Sequence[float]) -> bool:
    return all(after < before for before, after in pairwise(values))


def _texts() -> tuple[list[str], list[str]]:
    return read_corpus(Path(sysconfig.get_path("stdlib")))


def _new_model(seed: int) -> LlamaForCausalLM:
    """transformers draws initial weights from torch's global state, so this is no work for threads."""
    set_seed(seed_of(f"{NAME}/weights", seed))
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def checkpoints(setup: Setup) -> tuple[int, ...]:
    """0, first, 2·first, 4·first … before nine tenths, nine tenths, and the last step."""
    late = setup.steps * 9 // 10
    doublings = [setup.first * 2**power for power in range(setup.steps.bit_length())]
    return (0, *(step for step in doublings if step < late), late, setup.steps)


def _train(model: LlamaForCausalLM, seed: int, text: Tensor, setup: Setup) -> dict[int, LlamaForCausalLM]:
    random = generator(f"{NAME}/batches", seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=setup.steps, pct_start=0.05)
    kept = {0: copy.deepcopy(model)}
    for step in range(1, setup.steps + 1):
        windows = _windows(text, torch.randint(len(text) - WINDOW, (BATCH,), generator=random))
        optimizer.zero_grad()
        model(input_ids=windows, labels=windows).loss.backward()
        optimizer.step()
        schedule.step()
        if step in checkpoints(setup):
            kept[step] = copy.deepcopy(model)
    return kept


@torch.no_grad()
def _loss(model: LlamaForCausalLM, text: Tensor) -> float:
    windows = _windows(text, torch.arange(HELD_OUT) * (len(text) // HELD_OUT - WINDOW))
    return model(input_ids=windows, labels=windows).loss.item()


def _windows(text: Tensor, starts: Tensor) -> Tensor:
    return torch.stack([text[start : start + WINDOW] for start in starts.tolist()]).long()


def _follow(kept: dict[int, LlamaForCausalLM], losses: Sequence[float]) -> Run:
    *_, last = kept.values()
    found = []
    for (step, model), loss in zip(kept.items(), losses, strict=True):
        matrices = analyze(model, roles=ROLES).matrices
        changes = compare(last, model, settings=Settings(roles=ROLES)).matrices
        found.append(
            Checkpoint(
                step,
                loss,
                statistics.fmean(map(looks_untrained, matrices)),
                _mean(noise_ratio, matrices),
                _mean(lambda c: c.spectrum_drift, changes),
                _mean(_lesser_cos2, changes),
            )
        )
    return found


def _lesser_cos2(change: MatrixChange) -> float | None:
    left, right = change.left_cos2, change.right_cos2
    return None if left is None or right is None else min(left, right)


def _mean(measure: Callable[[Row], float | None], matrices: Sequence[Row]) -> float:
    return statistics.fmean(value for m in matrices if (value := measure(m)) is not None)


def _row(checkpoints: Sequence[Checkpoint]) -> dict[str, Cell]:
    return {
        **averaged("held-out loss", [c.loss for c in checkpoints]),
        **averaged("like noise", [c.like_noise for c in checkpoints]),
        **averaged("participation", [c.participation for c in checkpoints]),
        **averaged("distance", [c.distance for c in checkpoints]),
        **averaged("cos²", [c.cos2 for c in checkpoints]),
    }


def _figure(runs: Sequence[Run]) -> "Figure":
    figure, axes = panels(("held-out loss, nats a byte", "S' against noise", "towards the last checkpoint"))
    steps = [c.step for c in runs[0]]
    lines: tuple[tuple[int, str, Callable[[Checkpoint], float]], ...] = (
        (0, "loss", lambda c: c.loss),
        (1, "share of matrices like noise", lambda c: c.like_noise),
        (1, "participation, of noise's", lambda c: c.participation),
        (2, "distance of S'", lambda c: c.distance),
        (2, "cos² of the top-n' subspaces", lambda c: c.cos2),
    )
    for panel, label, measure in lines:
        dots(axes[panel], label, {step: [measure(r[i]) for r in runs] for i, step in enumerate(steps)})
    for ax in axes:
        ax.set_xscale("symlog", linthresh=steps[1], base=2)
        ax.set_xlabel("step")
    for ax in axes[1:]:
        ax.legend(fontsize="x-small")
    return figure
