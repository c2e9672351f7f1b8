"""The modules that a recipe is about: the matrices of a report put together as they are stored."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lmd_hf.changes import MatrixChange
from lmd_hf.errors import SettingsError
from lmd_hf.records import ROLES, MatrixReport
from lmd_hf.report.compare import Comparison
from lmd_hf.report.report import Report
from lmd_hf.run.asked import texts
from lmd_hf.run.plan import EXPERTS
from lmd_hf.weights.formats import FORMATS, list_weights
from lmd_hf.weights.lora import ENDS, ROOT
from lmd_hf.weights.named import find_tree
from lmd_hf.weights.source import Source


DEFAULT_ROLES = ("q", "k", "v", "kv", "o", "gate", "up", "down")
TYING = ("embed", "head")
CONV1D_TYPES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")  # transformers' weights of shape (in, out)
Row = MatrixReport | MatrixChange


@dataclass(frozen=True)
class Module:
    """One module with a weight of shape (out, in): of a fused one, its parts together. `values` are singular values,
    descending: of a fused module those of its parts, merged. `most` is the largest rank that means something."""

    name: str
    role: str
    layer: int | None
    shape: tuple[int, int]
    values: np.ndarray
    most: int
    rows: tuple[Row, ...]

    @property
    def unit(self) -> int:
        """Parameters of one rank: out + in."""
        return sum(self.shape)

    @property
    def energy(self) -> float:
        """Σσ², with the part that a sketch knows by its sum alone."""
        whole = sum(row.frobenius_norm**2 for row in self.rows if isinstance(row, MatrixReport))
        return max(whole, float((self.values**2).sum()))


def modules_of(
    report: Report | Comparison, roles: Iterable[str] = (), names: Mapping[str, str] | None = None
) -> tuple[list[Module], dict[str, str]]:
    """(the modules of these roles, {tensor: why it is none}). `names` gives modules other names than the checkpoint's.

    Raises `SettingsError` for an unknown role, a tied embedding, a model that peft has wrapped, a GGUF file (whose
    names are llama.cpp's), and where nothing is left.
    """
    wanted = texts("roles", roles) or DEFAULT_ROLES
    for role in wanted:
        if role not in ROLES:
            raise SettingsError(f"no role '{role}'; known: {', '.join(ROLES)}")
    _check_ties(report, wanted)
    groups: dict[str, list[Row]] = {}
    left_out: dict[str, str] = {}
    for row in report.matrices:
        if ".base_layer." in row.name:
            raise SettingsError(
                f"'{row.name}': the model is wrapped by peft already; use its base (`model.unload()`, or its folder)"
            )
        if row.role not in wanted and not (row.role == "other" and row.part in wanted):
            continue
        if row.role == "conv" or "expert" in row.part or re.search(EXPERTS, row.name):
            left_out[row.name] = "an expert or a convolution: no Linear module of its own"
            continue
        groups.setdefault(module_name(row, names or {}), []).append(row)
    if not groups:
        raise SettingsError(f"no matrix of the roles {', '.join(wanted)} is there; `lmd-hf plan` lists what is")
    return [_module(name, rows) for name, rows in groups.items()], left_out


def module_name(row: Row, names: Mapping[str, str]) -> str:
    """The module whose weight a row is, or is a part of."""
    if row.name in names:
        return names[row.name]
    stored = getattr(row, "stored", "plain")
    if stored == "gguf":
        raise SettingsError(f"'{row.name}' is llama.cpp's name; use the original model, whose names transformers knows")
    if (pair := ENDS.match(row.name)) is not None:
        return pair.group(1).removeprefix(ROOT)
    endings = next(iter(FORMATS[stored].parts.values())) if stored in FORMATS else (".weight",)
    return row.name.removesuffix(next((e for e in endings if row.name.endswith(e)), ".weight"))


def names_in(source: Source) -> dict[str, str]:
    """{stored tensor: the module whose weight it is, or is a part of}, as the model class names it."""
    weights = list_weights(source.tensors, source.config, source.read)
    places = find_tree(weights, source.config, source.module).places
    return {
        tensor.name: places[weight.name].path.removesuffix(".weight") for weight in weights for tensor in weight.tensors
    }


def whole_spectrum(row: Row) -> np.ndarray:
    """σ of a row, descending; where a saved report has thinned it, in between by linear interpolation. Of a sketch the
    leading values alone."""
    if row.singular_value_ranks is None:
        return np.asarray(row.singular_values)
    ranks = np.array(row.singular_value_ranks)
    return np.interp(np.arange(1, ranks[-1] + 1), ranks, row.singular_values)


def fits(name: str, longer: str) -> bool:
    """Whether peft takes a target of this name for the longer one too."""
    return longer == name or longer.endswith(f".{name}")


def _module(name: str, rows: Sequence[Row]) -> Module:
    out, into = sum(row.shape[0] for row in rows), rows[0].shape[1]
    values = np.sort(np.concatenate([whole_spectrum(row) for row in rows]))[::-1]
    worth = out * into // (out + into)  # a larger pair of factors has more entries than the matrix
    known = sum(row.update_rank if isinstance(row, MatrixChange) else len(whole_spectrum(row)) for row in rows)
    role = rows[0].role if len(rows) == 1 else "_".join(row.role for row in rows)
    return Module(name, role, rows[0].layer, (out, into), values, max(1, min(worth, known)), tuple(rows))


def _check_ties(report: Report | Comparison, wanted: Sequence[str]) -> None:
    if not set(wanted) & set(TYING):
        return
    if isinstance(report, Comparison):
        tied = next((row.name for row in report.matrices if row.role in TYING and row.tied), None)
    else:
        tied = next((a.name for a in report.coverage.aliases if "head" in a.name or "embed" in a.name), None)
    if tied is not None:
        raise SettingsError(
            f"'{tied}' is tied: what trains one of embedding and head would leave or drag the other; leave out the "
            "roles embed and head"
        )
