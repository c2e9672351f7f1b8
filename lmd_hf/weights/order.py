"""The order in which the matrices of a model are listed."""

import re
from typing import Any

from lmd_hf.records import ROLES, STACKS, MatrixRef


def reading_order(ref: MatrixRef) -> tuple[Any, ...]:
    """Embeddings first, then layer by layer along the forward pass, then what follows the blocks."""
    inside = ref.layer is not None
    place = 1 if inside else 0 if ref.role in ("embed", "conv") else 2
    experts = ref.expert if ref.expert is not None else 0
    return (
        place,
        STACKS.index(ref.stack),
        ref.layer or 0,
        ref.block,
        ROLES.index(ref.role),
        experts,
        _natural(ref.name),
    )


def _natural(name: str) -> list[tuple[int, str]]:
    """A sort key in which `experts.10` follows `experts.9`."""
    pieces = [piece.lstrip("0") if piece.isdecimal() else piece for piece in re.split(r"(\d+)", name)]
    return [(len(piece) if place % 2 else -1, piece) for place, piece in enumerate(pieces)]
