"""Which experiments there are, and the one way to run them. Importing this imports no torch.

An experiment NAME is the module of that name with `_` for `-`, loaded on demand. It holds

    run(seeds: Sequence[int], setup: Setup = Setup()) -> Outcome    Setup: a frozen dataclass of its sizes
    judge(…numbers…) -> tuple[Check, ...]                           the stated rules, applied to numbers alone
"""

from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from lmd_hf.errors import SettingsError


if TYPE_CHECKING:
    from lmd_hf.experiments.outcome import Outcome


SEEDS = 10  # a claim rests on ten seeds
EXPERIMENTS: dict[str, str] = {  # name: its question
    "swiss-roll": "Does S' find the intrinsic dimension of the data that a network was trained on?",
    "activations": "Does the latent dimension grow with the degree of the activation, and the held-out error with it?",
    "training": "How do the factors of a Transformer change from initialisation to convergence?",
    "convergence": "Do the verdicts on convergence tell trainings that were stopped early from long ones?",
    "high-dimension": "Does S' tell data of few intrinsic dimensions from data of many?",
    "semantics": "Do the latent axes of a trained network separate the classes that it learned?",
    "capacity": "How does the number of patterns that an associative memory recalls grow with its dimension?",
    "hopfield-similarity": "Which similarity finds a stored digit again from a noisy or a half hidden one?",
    "capacity-expressivity": "Which ratio of capacity to expressivity goes with the lowest error on which manifold?",
    "encoding-margin": "Does the encoding theorem's bound hold for trained networks, and how tight is it?",
    "adaptive": "Does a network trained in factors learn better if its latent spectrum decides their ranks?",
}


def load(name: str) -> ModuleType:
    """The module of an experiment. Raises `SettingsError`, with the known names, for any other name."""
    if name not in EXPERIMENTS:
        raise SettingsError(f"no experiment '{name}'; known: {', '.join(EXPERIMENTS)}")
    return import_module(f"lmd_hf.experiments.{name.replace('-', '_')}")


def reproduce(name: str, *, seeds: Sequence[int] = range(SEEDS)) -> "Outcome":
    """Run an experiment with these seeds; the same seeds give the same outcome, whatever the number of cores.

    Raises `SettingsError` for an unknown name and for no seeds.
    """
    module = load(name)
    if not seeds:
        raise SettingsError("an experiment needs at least one seed; give --seeds 1 or more")
    return module.run(tuple(seeds))
