"""The MLPs of a model, from its inventory: which matrices hold the keys and the values of one."""

from collections.abc import Iterable
from typing import Any

from lmd_hf.circuits import MlpRef
from lmd_hf.records import MatrixRef


def list_mlps(refs: Iterable[MatrixRef]) -> tuple[MlpRef, ...]:
    """Every MLP, and every expert, that has one up and one down matrix of matching widths, in the order of `down`."""
    groups: dict[tuple[Any, ...], list[MatrixRef]] = {}
    for ref in refs:
        if ref.role in ("up", "gate", "down") and ref.stored != "lora":
            groups.setdefault((ref.stack, ref.layer, ref.block, ref.expert), []).append(ref)
    found = []
    for group in groups.values():
        parts = [group] if len({ref.role for ref in group}) == len(group) else _by_module(group)
        found += [mlp for part in parts if (mlp := _mlp(part)) is not None]
    return tuple(found)


def mlp_matrices(mlp: MlpRef) -> tuple[MatrixRef, ...]:
    """Every matrix of an MLP."""
    return tuple(ref for ref in (mlp.up, mlp.gate, mlp.down) if ref is not None)


def _by_module(refs: list[MatrixRef]) -> list[list[MatrixRef]]:
    modules: dict[str, list[MatrixRef]] = {}
    for ref in refs:
        modules.setdefault(ref.name.removesuffix(".weight").rpartition(".")[0], []).append(ref)
    return list(modules.values())


def _mlp(refs: list[MatrixRef]) -> MlpRef | None:
    one = {ref.role: ref for ref in refs}
    if len(one) < len(refs) or not {"up", "down"} <= one.keys():
        return None
    up, gate, down = one["up"], one.get("gate"), one["down"]
    fits = up.shape[0] == down.shape[1] and (gate is None or gate.shape == up.shape)
    return MlpRef(up, gate, down) if fits else None
