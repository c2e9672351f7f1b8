"""A LoRA configuration from the spectra of a report or a comparison."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmd_hf.compat import checkpoint_key_map
from lmd_hf.errors import SettingsError
from lmd_hf.recipes.modules import CONV1D_TYPES, Module, fits, module_name, modules_of
from lmd_hf.recipes.ranks import by_budget, by_energy
from lmd_hf.report.compare import Comparison
from lmd_hf.report.report import Report
from lmd_hf.run.asked import NUMBER, check_type


if TYPE_CHECKING:
    import peft
    from torch import nn

SCALE = 2  # α/r, the same for every module


@dataclass(frozen=True)
class LoraRecipe:
    """Ranks, module by module. `parameters` is what peft will train with it, `budget` what was asked for, `left_out`
    what is no module that peft can adapt so, with the reason."""

    base: str
    source: str
    modules: tuple[Module, ...]
    ranks: dict[str, int]
    scale: float
    budget: int | None
    left_out: dict[str, str]
    conv1d: bool
    others: tuple[str, ...]

    @property
    def parameters(self) -> int:
        """Σ rank · (out + in)."""
        return sum(self.ranks[module.name] * module.unit for module in self.modules)

    def to_dict(self) -> dict[str, Any]:
        """The fields of peft's `LoraConfig`, as adapter_config.json holds them."""
        usual = Counter(self.ranks.values()).most_common(1)[0][0]
        longest_first = sorted(self.ranks, key=lambda name: (-len(name), name))  # peft takes the first that fits
        odd = [n for n in longest_first if self.ranks[n] != usual or any(fits(o, n) for o in self.ranks if o != n)]
        excluded = sorted(o for o in self.others if any(fits(name, o) for name in self.ranks))
        return {
            "peft_type": "LORA",
            "base_model_name_or_path": self.base,
            "r": usual,
            "lora_alpha": _number(self.scale * usual),
            "target_modules": sorted(self.ranks),
            "exclude_modules": excluded or None,
            "rank_pattern": {re.escape(name): self.ranks[name] for name in odd},
            "alpha_pattern": {re.escape(name): _number(self.scale * self.ranks[name]) for name in odd},
            "fan_in_fan_out": self.conv1d,
            "bias": "none",
        }


def lora_recipe(
    report: Report | Comparison,
    *,
    budget: int | None = None,
    energy: float | None = None,
    roles: Iterable[str] = (),
    scale: float = SCALE,
    model: nn.Module | Mapping[str, str] | None = None,
) -> LoraRecipe:
    """How many ranks each module of a LoRA adapter gets.

    Of a report σ is S' in the report's metric, and each module counts by shares of its own energy; of a comparison σ is
    that of ΔW, in its own units and up to its rank above rounding: what full fine-tuning moved most. With `budget`, the
    most trainable parameters, the next rank always goes where it adds the largest share for each parameter, at least
    one to every module (`ranks.by_budget`: the rest is below one rank); with `energy`, each module gets the least rank
    that holds this share, of a fused module the spectra of its parts together, and none more than as many parameters as
    the module has. `scale` is α/r. `roles` are q, k, v, kv, o, gate, up and down by default. `model`, the module
    to be adapted, gives its own names where they are not the checkpoint's.

    That spectra of the weights tell where an adapter needs ranks is an assumption: see benchmarks/README.md for what
    it brought. Raises `SettingsError` for a budget below one rank a module, tied embeddings, a model that peft has
    wrapped, and all that `modules.modules_of` names.
    """
    if (budget is None) == (energy is None):
        raise SettingsError("give either a budget (trainable parameters) or an energy (share to hold), not both")
    check_type("report", report, ((Report, Comparison), "what lmd_hf.analyze or lmd_hf.compare gave"))
    for name, value in (("budget", budget), ("energy", energy), ("scale", scale)):
        if value is not None:
            check_type(name, value, NUMBER)
    if not 0 < scale < math.inf:
        raise SettingsError(f"scale is {scale}; it is α/r, a finite number above 0")
    compared = isinstance(report, Comparison)
    identity = report.base if isinstance(report, Comparison) else report.model
    names = _names(report, model)
    modules, left_out = modules_of(report, roles, names)
    if compared:
        modules = [module for module in modules if not all(row.identical for row in module.rows)]  # type: ignore[union-attr]
        if not modules:
            raise SettingsError("the two models are the same in every selected matrix; there is nothing to adapt")
    ranks = by_budget(modules, budget, relative=not compared) if budget is not None else by_energy(modules, energy or 0)
    everything = {module_name(row, names) for row in report.matrices if row.name not in left_out}
    return LoraRecipe(
        base=identity.id,
        source="comparison" if compared else str(report.settings.get("metric", "identity")),
        modules=tuple(modules),
        ranks=ranks,
        scale=scale,
        budget=budget,
        left_out=left_out,
        conv1d=identity.model_type in CONV1D_TYPES,
        others=tuple(everything - set(ranks)),
    )


def lora_config(
    report: Report | Comparison,
    *,
    budget: int | None = None,
    energy: float | None = None,
    roles: Iterable[str] = (),
    scale: float = SCALE,
    model: nn.Module | None = None,
) -> peft.LoraConfig:
    """`lora_recipe` as a `peft.LoraConfig`, with rank_pattern, alpha_pattern and target_modules.

        config = lmd_hf.lora_config(lmd_hf.analyze("org/model"), budget=1_000_000)
        model = peft.get_peft_model(model, config)

    Raises `SettingsError` as `lora_recipe` does, and where peft is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError:
        raise SettingsError("lora_config needs the package peft: pip install peft") from None
    recipe = lora_recipe(report, budget=budget, energy=energy, roles=roles, scale=scale, model=model)
    values = recipe.to_dict()
    del values["peft_type"], values["base_model_name_or_path"]
    return LoraConfig(**values)


def _names(report: Report | Comparison, model: nn.Module | Mapping[str, str] | None) -> Mapping[str, str]:
    """{tensor of the report: module of the model}, where those were asked for."""
    if model is None or isinstance(model, Mapping):
        return model or {}
    if getattr(model, "peft_config", None):
        raise SettingsError("the model is wrapped by peft already; make the recipe for its base (`model.unload()`)")
    if not hasattr(model, "base_model_prefix"):
        return {}
    told = checkpoint_key_map(model, [row.name for row in report.matrices])
    return {name: target.name.removesuffix(".weight") for name, target in told.items() if not target.converted}


def _number(value: float) -> int | float:
    return int(value) if value == int(value) else value
