"""nn.Modules made of the decomposition: `LMDLinear`, `UniversalHopfield`. Loaded on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from lmd_hf.layers.hopfield import UniversalHopfield
    from lmd_hf.layers.linear import LMDLinear

_HOMES = {"LMDLinear": "lmd_hf.layers.linear", "UniversalHopfield": "lmd_hf.layers.hopfield"}
__all__ = ["LMDLinear", "UniversalHopfield"]


def __getattr__(name: str) -> Any:
    """Importing the package imports no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'lmd_hf.layers' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
