"""Which layers to train: those whose matrices stand farthest above the edge of noise."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lmd_hf.errors import SettingsError
from lmd_hf.matrix.noise import bulk_is_mp_like
from lmd_hf.recipes.modules import modules_of, whole_spectrum
from lmd_hf.records import MatrixReport
from lmd_hf.report.report import Report
from lmd_hf.run.asked import NUMBER, check_type, texts


@dataclass(frozen=True)
class Signal:
    """One module: `signal` is the share of Σσ² that lies above the Marchenko–Pastur edge of its noise, of a fused
    module that of its parts together; `noise_like` says whether what lies below looks like noise at all."""

    name: str
    role: str
    layer: int | None
    parameters: int
    signal: float
    noise_like: bool
    trained: bool


@dataclass(frozen=True)
class FreezeRecipe:
    """Every selected module with its signal, and whether it is trained; what is not selected stays frozen.

    `whole_names` says that modules are called as in the model: a checkpoint may leave out what its class puts before
    them (`h.0` for `transformer.h.0`)."""

    base: str
    share: float
    modules: tuple[Signal, ...]
    whole_names: bool = True

    @property
    def trained(self) -> tuple[str, ...]:
        """The parameters to train, by their full names."""
        return tuple(f"{module.name}.weight" for module in self.modules if module.trained)

    @property
    def patterns(self) -> tuple[str, ...]:
        """axolotl's `unfrozen_parameters`: it takes a full name between ^ and $, and escapes each dot itself, but for
        one before a plus."""
        before = "" if self.whole_names else "(.+.)?"
        return tuple(f"^{before}{name}$" for name in self.trained)

    def to_dict(self) -> dict[str, Any]:
        """JSON types: `unfrozen_parameters`, and the signals that they come from."""
        return {
            "base_model": self.base,
            "share": self.share,
            "unfrozen_parameters": list(self.patterns),
            "trained_parameters": sum(module.parameters for module in self.modules if module.trained),
            "modules": [vars(module) for module in self.modules],
        }

    def to_yaml(self) -> str:
        """What goes into an axolotl configuration."""
        return "\n".join(["unfrozen_parameters:", *(f"  - {pattern}" for pattern in self.patterns)]) + "\n"


def freeze_recipe(
    report: Report, *, share: float = 0.5, roles: Iterable[str] = (), names: Mapping[str, str] | None = None
) -> FreezeRecipe:
    """Train of each role the `share` of layers (rounded up) with the most signal; attention and MLP by default.

    Signal = Σ_{σ > e} σ²/Σσ², e = √v·(1+√β) the edge of Marchenko–Pastur with v = median(σ²)/median of the law at
    β = min/max of the shape (`matrix.noise.mp_edge`): a share, the same for every scale and near 0 for pure noise of
    any shape. (Taking the interquartile range of the singular values for the deviation of the entries puts the
    threshold below the whole bulk of a matrix that is not square, and calls all of it signal.) Roles are ranked by
    themselves, for their shapes differ. That layers with more signal are the ones to train is an assumption.

    `names` gives modules other names than the checkpoint's. Raises `SettingsError` for a report in another metric than
    `identity`, a share outside (0, 1], and all that `modules.modules_of` names.
    """
    check_type("report", report, (Report, "what lmd_hf.analyze gave"))
    check_type("share", share, NUMBER)
    if not 0 < share <= 1:
        raise SettingsError(f"share is {share}; give the share of layers to train, above 0, at most 1")
    metric = report.settings.get("metric", "identity")
    if metric != "identity":
        raise SettingsError(f"noise has an edge in the metric 'identity' alone, not in '{metric}'; analyze again")
    modules, _ = modules_of(report, roles, names)
    rows = {module.name: [r for r in module.rows if isinstance(r, MatrixReport)] for module in modules}
    signals = {name: _signal(found) for name, found in rows.items()}
    trained = set()
    for role in {module.role for module in modules}:
        same = sorted((m for m in modules if m.role == role), key=lambda m: -signals[m.name])
        count = math.ceil(share * len(same) * (1 - 1e-12))  # 0.28 of 25 layers are 7, and in floating point a bit more
        trained |= {module.name for module in same[: max(1, count)]}
    return FreezeRecipe(
        report.model.id,
        share,
        tuple(
            Signal(
                name=module.name,
                role=module.role,
                layer=module.layer,
                parameters=module.shape[0] * module.shape[1],
                signal=signals[module.name],
                noise_like=all(_is_noise_like(row) for row in rows[module.name]),
                trained=module.name in trained,
            )
            for module in modules
        ),
        whole_names=bool(names),
    )


def freeze(model: nn.Module, recipe: FreezeRecipe | Iterable[str]) -> dict[str, int]:
    """Let the recipe's parameters (or those whose whole names, or ends of names, these regular expressions match) take
    gradients, and no other; then give the model to a Trainer.

    Returns how many parameters are `trained` and `frozen`. Nothing is changed where an error is raised: `SettingsError`
    for a pattern that matches nothing or a parameter that cannot take gradients (a quantised one), and for a model that
    peft has wrapped.
    """
    if getattr(model, "peft_config", None):
        raise SettingsError("the model is wrapped by peft, which freezes its base itself; freeze before, or unload it")
    patterns = [re.escape(n) for n in recipe.trained] if isinstance(recipe, FreezeRecipe) else texts("recipe", recipe)
    parameters = dict(model.named_parameters())
    chosen: set[str] = set()
    for pattern in patterns:
        try:
            wanted = re.compile(rf"(?:.*\.)?(?:{pattern.removeprefix('^').removesuffix('$')})")
            exact = {name for name in parameters if re.fullmatch(pattern, name)}
        except re.error as error:
            raise SettingsError(
                f"'{pattern}' is no regular expression ({error}); re.escape makes one of a name"
            ) from None
        found = exact or {name for name in parameters if wanted.fullmatch(name)}
        if not found:
            raise SettingsError(
                f"'{pattern}' matches no parameter of this {type(model).__name__}; make a recipe for it"
            )
        chosen |= found
    if not chosen:
        raise SettingsError("the recipe trains nothing; give a larger share")
    for name in chosen:
        if not parameters[name].is_floating_point():
            kind = str(parameters[name].dtype).removeprefix("torch.")
            raise SettingsError(f"'{name}' is stored as {kind} and takes no gradients; load the model unquantised")
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in chosen)
    trained = sum(parameters[name].numel() for name in chosen)
    return {"trained": trained, "frozen": sum(p.numel() for p in parameters.values()) - trained}


def _signal(rows: list[MatrixReport]) -> float:
    """Σ_{σ > e} σ² / Σσ² over the parts of a module, each with its own edge."""
    above = total = 0.0
    for row in rows:
        energies = whole_spectrum(row) ** 2
        held = energies.sum() if row.singular_value_ranks is None else row.frobenius_norm**2
        total += held
        above += float(energies[whole_spectrum(row) > row.mp_edge].sum()) if row.mp_edge is not None else 0.0
    return above / total if total > 0 else 0.0


def _is_noise_like(row: MatrixReport) -> bool:
    return row.mp_fit_distance is not None and bulk_is_mp_like(row.mp_fit_distance, min(row.shape))
