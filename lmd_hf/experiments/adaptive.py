"""Adaptive: does a network that is trained in factors learn better if its latent spectrum decides their ranks?

The paper asks whether n' can be adapted while training (its second open question). The answer under test is this
project's: orthonormal factors, S' as a parameter, ranks by equal marginal loss over the layers, extended and cut in
turn.
"""

import copy
import platform
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from lmd_hf.demo.train import read_corpus
from lmd_hf.experiments.catalogue import EXPERIMENTS
from lmd_hf.experiments.figures import dots, panels
from lmd_hf.experiments.images import digits
from lmd_hf.experiments.networks import perceptron
from lmd_hf.experiments.outcome import Check, Outcome, Row, averaged, counted, spread
from lmd_hf.experiments.seeding import each, generator, seed_of
from lmd_hf.layers.adaptive import adapt, grow, latent_spectrum, orthonormal, plain
from lmd_hf.layers.linear import LMDLinear
from lmd_hf.matrix.allocation import Curve, most_axes
from lmd_hf.matrix.lmd import decompose


if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "adaptive"
ADAPTIVE, FIXED, FREE, DENSE = "adaptive", "fixed rank", "free factors", "narrower"
KINDS = (ADAPTIVE, FIXED, FREE, DENSE)
LANGUAGE, DIGITS = TASKS = ("language", "digits")
RATE = 4e-3  # at the peak
EXTENDED = 4  # before each cut a layer gets a fourth of its first rank more
CUTS, LAST_CUT = 5, 0.5  # so many, the last at this share of the steps
SHARE = 0.9  # a claim holds on at least nine of ten seeds
WINDOW, BATCH, HELD_OUT = 64, 16, 64  # bytes, windows a step, held-out windows
WIDTHS = {LANGUAGE: (64, 40), DIGITS: (96, 40)}  # whole, and of the dense network of equal parameters
CLASSES, TRAINING = 10, 1200
METHOD = (
    "Language: a LLaMA of 2 layers and width 64 over bytes learns Python's standard library "
    f"({platform.python_version()}), its 14 matrices in factors. Digits: a ReLU network 64-96-96-96-10 learns the "
    "classes of scikit-learn's digits (1,200 for training, all in each step), its first three matrices in factors. "
    "AdamW for 240 steps, one-cycle rate up to 4e-3, which suits the dense networks, decay 0.1 on matrices and on S'. "
    "`narrower`: the same network, dense, of width 40. The others have at most its parameters, and start from the "
    "leading singular triplets of the same drawn matrices. `fixed rank`: orthonormal factors, the same share of every "
    "matrix's parameters. `adaptive`: the same, but five times in the first half of the training every layer gets a "
    "fourth more axes, with S' = 0, and after a tenth of the steps the least are cut, by equal marginal loss of S' "
    "over the layers, to the same number of parameters, with which it trains the second half. `free factors`: "
    "products of two matrices without constraints, at the fixed ranks."
)


@dataclass(frozen=True)
class Setup:
    """Steps of training on each task."""

    language: int = 240
    digits: int = 240


@dataclass(frozen=True)
class Trial:
    """One seed: held-out loss in nats and parameters of each kind of network, and the ranks, fixed and adapted."""

    losses: dict[str, float]
    parameters: dict[str, int]
    fixed: dict[str, int]
    adapted: dict[str, int]


@dataclass(frozen=True)
class Task:
    """One network of a seed: its model, the paths of the matrices to put in factors, the loss of a training step, and
    the held-out loss."""

    model: nn.Module
    paths: tuple[str, ...]
    loss: Callable[[nn.Module, int], Tensor]
    held_out: Callable[[nn.Module], Tensor]


def run(seeds: Sequence[int], setup: Setup = Setup()) -> Outcome:
    """Train four networks a seed on each task."""
    texts = [torch.frombuffer(bytearray("".join(t).encode()), dtype=torch.uint8) for t in _texts()]
    found: dict[str, list[Trial]] = {}
    for name, steps in ((LANGUAGE, setup.language), (DIGITS, setup.digits)):
        cases = [_language(seed, texts, steps) if name == LANGUAGE else _digits(seed) for seed in seeds]
        pairs = [(wide, kind, narrow) for wide, narrow in cases for kind in KINDS]
        trained = each(partial(_trained, steps=steps), pairs, what=f"{NAME}, {name}")
        found[name] = [_trial(trained[i : i + len(KINDS)]) for i in range(0, len(trained), len(KINDS))]
    tables: dict[str, Sequence[Row]] = {name: _rows(trials) for name, trials in found.items()}
    tables |= {f"{name}: axes by matrix": _ranks(trials) for name, trials in found.items()}
    return Outcome(NAME, EXPERIMENTS[NAME], METHOD, judge(found), tuple(seeds), tables, {"losses": _figure(found)})


def judge(found: dict[str, list[Trial]]) -> tuple[Check, ...]:
    """The stated rules, applied to the held-out losses."""
    return (
        *(_beats(name, FIXED, found[name]) for name in TASKS),
        *(_beats(name, DENSE, found[name]) for name in TASKS),
        *(_beats(name, FREE, found[name], decides=False) for name in TASKS),
    )


def _beats(task: str, other: str, trials: Sequence[Trial], *, decides: bool = True) -> Check:
    ours, theirs = ([trial.losses[kind] for trial in trials] for kind in (ADAPTIVE, other))
    lower = [a < b for a, b in zip(ours, theirs, strict=True)]
    return Check(
        f"{task}: adaptive ranks have a lower held-out loss than “{other}”, on at least {SHARE:.0%} of the seeds",
        f"{spread(ours, '.3f')} against {spread(theirs, '.3f')} nats; lower {counted(lower)}",
        sum(lower) >= SHARE * len(trials),
        decides,
    )


Trained = tuple[float, int, dict[str, int], dict[str, int]]  # held-out loss, parameters, ranks at first and at last


def _trained(case: tuple[Task, str, Task], *, steps: int) -> Trained:
    """One network of a kind, trained. What is drawn is drawn by the tasks: nothing here depends on order."""
    wide, kind, narrow = case
    task = narrow if kind == DENSE else wide
    model = copy.deepcopy(task.model)
    ranks = {} if kind == DENSE else _fixed_ranks(wide, _size(narrow.model))
    layers: dict[str, LMDLinear] = {}
    for path, rank in ranks.items():
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear), "the matrices of both networks are plain layers"
        if kind == FREE:
            model.set_submodule(path, _free(linear, rank))
        else:
            layers[path] = _factored(linear, rank, spare=kind == ADAPTIVE)
            model.set_submodule(path, layers[path])
    _fit(model, task, steps, adapting=list(layers.values()) if kind == ADAPTIVE else [])
    for path, layer in layers.items():
        model.set_submodule(path, plain(layer))
    with torch.no_grad():
        loss = task.held_out(model).item()
    return loss, _size(model), ranks, {path: len(latent_spectrum(layer)) for path, layer in layers.items()}


def _trial(kinds: Sequence[Trained]) -> Trial:
    named = dict(zip(KINDS, kinds, strict=True))
    return Trial(
        {kind: found[0] for kind, found in named.items()},
        {kind: found[1] for kind, found in named.items()},
        named[FIXED][2],
        named[ADAPTIVE][3],
    )


def _fit(model: nn.Module, task: Task, steps: int, *, adapting: Sequence[LMDLinear]) -> None:
    every = {name for name, _ in model.named_parameters()}
    decayed = {n for n in every if n.endswith(("weight", "parametrizations.s.original")) and "norm" not in n}
    named = dict(model.named_parameters())
    groups = [{"params": [named[n] for n in sorted(decayed)], "weight_decay": 0.1}]
    groups += [{"params": [named[n] for n in sorted(every - decayed)], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.05)
    cuts = {max(1, round(steps * LAST_CUT * (k + 1) / CUTS)) for k in range(CUTS)} if adapting else set()
    ranks = [len(latent_spectrum(layer)) for layer in adapting]
    budget = sum(rank * _axis(layer) for rank, layer in zip(ranks, adapting, strict=True))
    model.train()
    for step in range(steps):
        if cuts and step in {0, *cuts} - {max(cuts)}:
            for layer, rank in zip(adapting, ranks, strict=True):
                grow([layer], -(-rank // EXTENDED))
        optimizer.zero_grad()
        task.loss(model, step).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if step + 1 in cuts:
            adapt(adapting, budget)
    model.eval()


def _factored(linear: nn.Linear, rank: int, *, spare: bool) -> LMDLinear:
    """The leading triplets of a drawn matrix, orthonormal; with as many spare axes as pay, at most twice the rank."""
    shape = (linear.out_features, linear.in_features)
    axes = min(most_axes(shape), 2 * rank) if spare else rank
    layer = LMDLinear.from_lmd(decompose(linear.weight.detach(), rank=axes), bias=linear.bias)
    return orthonormal(layer, rank=rank)


def _free(linear: nn.Linear, rank: int) -> nn.Sequential:
    """The same product of two matrices, each with the root of S'."""
    lmd = decompose(linear.weight.detach(), rank=rank)
    root = lmd.s_K.sqrt()
    first = nn.Linear(linear.in_features, rank, bias=False)
    second = nn.Linear(rank, linear.out_features, bias=linear.bias is not None)
    first.weight = nn.Parameter((root[:, None] * lmd.similarity).float())
    second.weight = nn.Parameter((lmd.projection * root).float())
    if linear.bias is not None:
        second.bias = nn.Parameter(linear.bias.detach().clone())
    return nn.Sequential(first, second)


def _fixed_ranks(task: Task, budget: int) -> dict[str, int]:
    """The same share of every matrix, as large as the whole network's `budget` of parameters allows."""
    weights = {path: task.model.get_parameter(f"{path}.weight").shape for path in task.paths}
    curves = {path: Curve((shape[0], shape[1]), np.zeros(0), 0.0) for path, shape in weights.items()}
    whole = sum(curve.whole for curve in curves.values())
    share = (budget - (_size(task.model) - whole)) / whole
    return {path: max(1, int(share * curve.whole / curve.axis)) for path, curve in curves.items()}


def _axis(layer: LMDLinear) -> int:
    return layer.in_features + layer.out_features + 1


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _texts() -> tuple[list[str], list[str]]:
    return read_corpus(Path(sysconfig.get_path("stdlib")))


def _language(seed: int, texts: Sequence[Tensor], steps: int) -> tuple[Task, Task]:
    """The wide and the narrow model of a seed on the same batches; transformers draws from torch's global state."""
    random = generator(f"{NAME}/batches", seed)
    starts = torch.randint(len(texts[0]) - WINDOW, (steps, BATCH), generator=random)
    held_out = _windows(texts[1], torch.arange(HELD_OUT) * (len(texts[1]) // HELD_OUT - WINDOW))

    def loss(model: nn.Module, step: int) -> Tensor:
        windows = _windows(texts[0], starts[step])
        return model(input_ids=windows, labels=windows).loss

    def task(width: int) -> Task:
        set_seed(seed_of(f"{NAME}/weights", seed))
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=width,
            intermediate_size=width * 11 // 4,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=WINDOW,
            tie_word_embeddings=True,
        )
        model = LlamaForCausalLM(config)
        paths = tuple(path for path, m in model.named_modules() if isinstance(m, nn.Linear) and path != "lm_head")
        return Task(model, paths, loss, lambda trained: trained(input_ids=held_out, labels=held_out).loss)

    wide, narrow = map(task, WIDTHS[LANGUAGE])
    return wide, narrow


def _windows(text: Tensor, starts: Tensor) -> Tensor:
    return torch.stack([text[start : start + WINDOW] for start in starts.tolist()]).long()


def _digits(seed: int) -> tuple[Task, Task]:
    images, labels = digits(generator(f"{NAME}/digits", seed))
    x = images.float()

    def task(width: int) -> Task:
        sizes = (x.shape[1], width, width, width, CLASSES)
        return Task(
            perceptron(sizes, generator(f"{NAME}/perceptron", seed)),
            ("0", "2", "4"),
            lambda model, _: cross_entropy(model(x[:TRAINING]), labels[:TRAINING]),
            lambda model: cross_entropy(model(x[TRAINING:]), labels[TRAINING:]),
        )

    wide, narrow = map(task, WIDTHS[DIGITS])
    return wide, narrow


def _rows(trials: Sequence[Trial]) -> list[Row]:
    return [
        {
            "network": kind,
            **averaged("held-out loss", [trial.losses[kind] for trial in trials]),
            **averaged("parameters", [trial.parameters[kind] for trial in trials]),
        }
        for kind in KINDS
    ]


def _ranks(trials: Sequence[Trial]) -> list[Row]:
    return [
        {"matrix": path, "fixed": rank, **averaged("adapted", [trial.adapted[path] for trial in trials])}
        for path, rank in trials[0].fixed.items()
    ]


def _figure(found: dict[str, list[Trial]]) -> "Figure":
    figure, axes = panels([f"{name}: held-out loss, nats" for name in TASKS] + ["language: axes by matrix"])
    for ax, trials in zip(axes, found.values(), strict=False):
        for kind in KINDS:
            dots(ax, kind, {kind: [trial.losses[kind] for trial in trials]})
        ax.set_title(ax.get_title(), fontsize="medium")
        ax.tick_params(axis="x", labelrotation=15, labelsize="small")
    trials = found[LANGUAGE]
    for label, ranks in (
        ("fixed", [trial.fixed for trial in trials]),
        ("adapted", [trial.adapted for trial in trials]),
    ):
        dots(axes[2], label, {place: [r[path] for r in ranks] for place, path in enumerate(ranks[0])})
    names = [path.rpartition(".")[2].removesuffix("_proj") for path in trials[0].fixed]
    axes[2].set_xticks(range(len(names)), names, rotation=60, fontsize="small")
    axes[2].legend(fontsize="small")
    return figure
