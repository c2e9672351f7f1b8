"""families.toml as functions: what a module path means, which norm feeds it, how a fused matrix is laid out."""

import re
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import resources
from typing import Any

from lmd_hf.compat import tomllib


_KEYS = {
    "container": {"class", "word"},
    "role": {"ends", "block", "role", "part"},
    "fused": {"ends", "models", "when", "blocks", "order", "interleaved", "source"},
    "flat": {"ends", "models", "transposed", "source"},
    "norm": {"ends", "models", "when", "gain"},
    "named": {"models", "kind", "also", "needs"},
    "heads": {
        "models",
        "when",
        "ends",
        "scale",
        "scale_key",
        "scale_power",
        "factor_key",
        "terms",
        "yarn",
        "by_layer",
        "rotary",
        "qk_norm",
        "gate",
        "count_key",
        "count_divisor",
        "reason",
        "source",
    },
    "family": {"models", "gain_offset", "activation", "experts_transposed"},
}
_TABLES = {"words", "facts", "stacks", "kinds", "activations", "gguf_names", "gguf_types"}
_PARTS = {"qkv": ("q", "k", "v"), "k_v": ("k", "v"), "gate_up": ("gate", "up")}


@dataclass(frozen=True)
class Role:
    """Block and role of a module. `part` tells the two matrices of a low-rank pair apart (`a` is applied first);
    `parts` are the roles inside a fused matrix."""

    block: str
    role: str
    part: str = ""

    @property
    def parts(self) -> tuple[str, ...]:
        """The roles inside a fused matrix; empty for a plain one."""
        return _PARTS.get(self.role, ())


@dataclass(frozen=True)
class Fused:
    """How a fused matrix is laid out: so many `blocks` of rows, in each of them the parts in `order` (as usual if
    empty); or row by row in turn, if `interleaved`."""

    blocks: int | str
    order: tuple[str, ...]
    interleaved: bool = False


@dataclass(frozen=True)
class Names:
    """The only names that a model type has, where they tell everything: a pattern of all, and of the number of a layer;
    the embedding and the head that may repeat it; how its class ends; the keys that its config.json must hold, each one
    or another of those between bars."""

    pattern: re.Pattern[str]
    layer: re.Pattern[str]
    embedding: str
    head: str
    ending: str
    needs: tuple[str, ...]


class Config:
    """Read-only view of a model's config.json (or of nothing), one sub-configuration for each stack."""

    def __init__(self, values: dict[str, Any] | None) -> None:
        self.values = values or {}

    @property
    def model_type(self) -> str | None:
        """transformers' name of the family."""
        return self.values.get("model_type")

    def get(self, *keys: str) -> Any:
        """The first of `keys` that has a value; of a composite model without one, the language model's."""
        inner = self.values.get("text_config")
        for values in (self.values, inner if isinstance(inner, dict) else {}):
            if (found := next((values[key] for key in keys if values.get(key) is not None), None)) is not None:
                return found
        return None

    def at(self, path: str) -> Any:
        """The value at the end of keys with dots between them, `None` where one is missing."""
        value: Any = self.values
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def of_stack(self, stack: str) -> "Config":
        """The sub-configuration of a stack (`vision_config` …), or the whole."""
        inner = self.values.get(f"{stack}_config")
        return Config(inner) if isinstance(inner, dict) else self


@lru_cache(maxsize=1)
def _table() -> dict[str, Any]:
    text = resources.files("lmd_hf.weights").joinpath("families.toml").read_text(encoding="utf-8")
    table = tomllib.loads(text)
    check_table(table)
    words = table["words"]
    for kind in ("role", "fused", "flat", "norm", "heads"):
        for row in table[kind]:
            pattern = re.sub(r"\{([A-Z_]+)\}", lambda m: words[m.group(1)], row.get("ends", ".*"))
            row["regex"] = re.compile(rf"(?:^|\.)(?:{pattern})(?:\.linear|\.base_layer)?$")  # it may be wrapped
    for row in table["container"]:
        row["regex"] = re.compile(row["class"])
    return table


def load_table() -> None:
    """Read the table now, so that the first question need not wait for it."""
    _table()


def check_table(table: dict[str, Any]) -> None:
    """`ValueError` for a table or a key that nothing reads: dead data would be believed."""
    unknown = set(table) - set(_KEYS) - _TABLES
    for kind, known in _KEYS.items():
        unknown |= {f"{kind}.{key}" for row in table.get(kind, []) for key in row if key not in known}
    if unknown:
        raise ValueError(f"families.toml has unknown keys: {', '.join(sorted(unknown))}")


@cache
def find_container(class_name: str) -> str:
    """The word for what a class of modules is (`attention`, `mlp` …), "" for any other class."""
    return next((row["word"] for row in _table()["container"] if row["regex"].fullmatch(class_name)), "")


@cache
def find_role(path: str, inside: str = "") -> Role | None:
    """Block and role of the module at `path`, held by a container that its class calls `inside`; `None` if no row
    fits."""
    rows = _table()["role"]
    row = next((row for row in rows if row["regex"].search(path)), None)
    if row is None and inside:
        row = next((row for row in rows if row["regex"].search(_within(path, inside))), None)
    return Role(row["block"], row["role"], row.get("part", "")) if row else None


def _within(path: str, inside: str) -> str:
    parent, _, leaf = path.rpartition(".")
    return f"{parent}.{inside}.{leaf}"


def find_fused(path: str, config: Config, inside: str = "") -> Fused | None:
    """The layout of a fused matrix. Without a model type only the rows that hold for every family count."""
    row = _family_row("fused", path, config) or (inside and _family_row("fused", _within(path, inside), config))
    return Fused(row["blocks"], tuple(row.get("order", ())), row.get("interleaved", False)) if row else None


def find_flat(path: str, config: Config) -> bool | None:
    """Whether a tensor of three axes, read as a matrix (first, all others), is W turned round; `None`: no matrix."""
    row = _family_row("flat", path, config)
    return row["transposed"] if row else None


def find_norm_paths(path: str, config: Config, places: dict[str, str]) -> list[str]:
    """Candidate paths of the norm that feeds `path`; `places` fills block, prev, sub, stack and last_encoder."""
    row = _family_row("norm", path, config)
    if row is None:
        return []
    filled = []
    for pattern in row["gain"]:
        wanted = re.findall(r"\{(\w+)\}", pattern)
        if all(name in places for name in wanted):
            filled.append(pattern.format(**places))
    return filled


def find_heads(path: str, config: Config) -> dict[str, Any]:
    """What is unusual in the attention whose query projection is at `path`, as [[heads]] says it; {} for nothing."""
    return _family_row("heads", path, config) or {}


@cache
def find_names(model_type: str) -> Names | None:
    """The names of a model type that tell everything; `None` where its modules have to be asked."""
    row = next((row for row in _table()["named"] if model_type in row["models"]), None)
    if row is None:
        return None
    kind = _table()["kinds"][row["kind"]]
    return Names(
        pattern=re.compile("|".join([kind["names"], *([row["also"]] if "also" in row else [])])),
        layer=re.compile(kind["layer"]),
        embedding=kind["embedding"],
        head=kind["head"],
        ending=kind["class"],
        needs=(*kind["needs"], *row["needs"]),
    )


def family_fact(key: str, config: Config) -> Any:
    """A single fact about a model type, `None` where the table says nothing."""
    rows = _table()["family"]
    return next((row[key] for row in rows if config.model_type in row["models"] and key in row), None)


def fact(key: str) -> Any:
    """A list or pattern that holds for every family."""
    return _table()["facts"][key]


def stack_words() -> dict[str, list[str]]:
    """{stack: components of a module path that name it}."""
    return _table()["stacks"]


def activation_classes() -> dict[str, str]:
    """{name of a class of modules: transformers' name of the activation}."""
    return _table()["activations"]


def gguf_names() -> dict[str, str]:
    """{pattern of a part of a GGUF name: transformers' words for it}."""
    return _table()["gguf_names"]


def gguf_types() -> dict[str, str]:
    """{llama.cpp's name of an architecture: transformers' model type}."""
    return _table()["gguf_types"]


def _family_row(kind: str, path: str, config: Config) -> dict[str, Any] | None:
    for row in _table()[kind]:
        if "models" in row and (config.model_type or "") not in row["models"]:
            continue
        applies = all(config.values.get(key) == value for key, value in row.get("when", {}).items())
        if applies and row["regex"].search(path):
            return row
    return None
