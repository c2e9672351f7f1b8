"""families.toml as functions: what a module path means, which norm feeds it, how a fused matrix is laid out."""

import re
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import resources
from typing import Any

from lmd_hf.compat import tomllib


_KEYS = {
    "role": {"ends", "block", "role"},
    "fused": {"ends", "models", "when", "layout", "kv_heads", "source"},
    "norm": {"ends", "models", "when", "gain"},
    "family": {"models", "gain_offset", "activation"},
}
_TABLES = {"words", "facts", "stacks"}
_SUBLISTS = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}


@dataclass(frozen=True)
class Role:
    """Block and role of a module; `parts` are the roles inside a fused one."""

    block: str
    role: str

    @property
    def parts(self) -> tuple[str, ...]:
        """The roles inside a fused matrix; empty for a plain one."""
        return _SUBLISTS.get(self.role, ())


@dataclass(frozen=True)
class Fused:
    """How a fused matrix is laid out: `concat`, `groups` or `interleaved`; `kv_heads` is "", "heads" or "one"."""

    layout: str
    kv_heads: str


class Config:
    """Read-only view of a model's config.json (or of nothing), one sub-configuration for each stack."""

    def __init__(self, values: dict[str, Any] | None) -> None:
        self.values = values or {}

    @property
    def model_type(self) -> str | None:
        """transformers' name of the family."""
        return self.values.get("model_type")

    def get(self, *keys: str) -> Any:
        """The first of `keys` that has a value."""
        return next((self.values[key] for key in keys if self.values.get(key) is not None), None)

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
    for kind in ("role", "fused", "norm"):
        for row in table[kind]:
            pattern = re.sub(r"\{([A-Z]+)\}", lambda m: words[m.group(1)], row["ends"])
            row["regex"] = re.compile(rf"(?:^|\.)(?:{pattern})$")
    return table


def check_table(table: dict[str, Any]) -> None:
    """`ValueError` for a table or a key that nothing reads: dead data would be believed."""
    unknown = set(table) - set(_KEYS) - _TABLES
    for kind, known in _KEYS.items():
        unknown |= {f"{kind}.{key}" for row in table.get(kind, []) for key in row if key not in known}
    if unknown:
        raise ValueError(f"families.toml has unknown keys: {', '.join(sorted(unknown))}")


@cache
def find_role(path: str) -> Role | None:
    """Block and role of the module at `path`, `None` where no row fits."""
    row = next((row for row in _table()["role"] if row["regex"].search(path)), None)
    return Role(row["block"], row["role"]) if row else None


def find_fused(path: str, config: Config) -> Fused | None:
    """The layout of a fused matrix. Without a model type only the rows that hold for every family count."""
    row = _family_row("fused", path, config)
    return Fused(row["layout"], row.get("kv_heads", "")) if row else None


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


def _family_row(kind: str, path: str, config: Config) -> dict[str, Any] | None:
    for row in _table()[kind]:
        if "models" in row and (config.model_type or "") not in row["models"]:
            continue
        applies = all(config.values.get(key) == value for key, value in row.get("when", {}).items())
        if applies and row["regex"].search(path):
            return row
    return None
