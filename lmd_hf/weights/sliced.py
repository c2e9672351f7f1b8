"""LLaMA's own files: `consolidated.00.pth` …, each with a slice of every matrix, joined as its authors cut them."""

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from lmd_hf.errors import FormatError
from lmd_hf.records import TensorRef
from lmd_hf.weights.source import FileSource


# fairscale's layers as LLaMA uses them (llama/model.py): ColumnParallelLinear cuts the outputs, RowParallelLinear the
# inputs; what comes out of the first, or goes into the second, is as wide as `dim`
AXES = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1}
EMBEDDING = "tok_embeddings"
COPIED = ("norm.weight", "rope.freqs")  # whole in every file


@dataclass(frozen=True)
class Slices:
    """The parts of a matrix, in order, and the axis along which they follow one another."""

    axis: int
    parts: tuple[TensorRef, ...]


@dataclass(frozen=True)
class SlicedSource(FileSource):
    """Files of which each holds a slice of every matrix."""

    slices: dict[str, Slices] = field(default_factory=dict)

    def read(self, tensor: TensorRef, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows of the whole matrix, a copy; nothing but that one is in memory."""
        if tensor.name not in self.slices:
            return super().read(tensor, start, stop)
        found = self.slices[tensor.name]
        return torch.cat([super(SlicedSource, self).read(part) for part in found.parts], found.axis)[start:stop]


def join(source: FileSource, tensors: list[TensorRef]) -> SlicedSource:
    """The source whose `tensors`, the same names in every file, are whole.

    `source.config` is params.json, whose `dim` has to confirm the axis that a name tells. Raises `FormatError` for any
    tensor of which it is not certain how it was cut.
    """
    files = [file.name for file in source.identity.files]
    by_name: dict[str, list[TensorRef]] = {}
    for tensor in tensors:
        by_name.setdefault(tensor.name, []).append(tensor)
    whole: list[TensorRef] = []
    slices: dict[str, Slices] = {}
    for name, parts in by_name.items():
        first = parts[0]
        alike = {(part.dtype, part.shape) for part in parts} == {(first.dtype, first.shape)}
        if name.endswith(COPIED) and alike and len(first.shape) == 1:
            whole.append(first)
            continue
        axis = _axis(first, len(files), (source.config or {}).get("dim"))
        if [part.file for part in parts] != files or not alike or axis is None:
            raise FormatError(
                f"{source.identity.id}: no rule joins the slices of '{name}' ({' × '.join(map(str, first.shape))} in "
                f"{len(parts)} of {len(files)} files); read the safetensors files, or join them with their authors' "
                "script"
            )
        shape = tuple(size * len(files) if place == axis else size for place, size in enumerate(first.shape))
        whole.append(replace(first, stop=first.start + sum(part.stop - part.start for part in parts), shape=shape))
        slices[name] = Slices(axis, tuple(parts))
    kept: dict[str, Any] = {item.name: getattr(source, item.name) for item in fields(source)}
    return SlicedSource(**{**kept, "tensors": tuple(whole)}, slices=slices)


def _axis(part: TensorRef, count: int, dim: Any) -> int | None:
    """The axis along which a matrix was cut; `None` if name and width do not agree on one."""
    leaf = part.name.removesuffix(".weight").rpartition(".")[2]
    if len(part.shape) != 2 or not isinstance(dim, int):
        return None
    if leaf == EMBEDDING:  # cut by width in LLaMA 1 and 2, by tokens in LLaMA 3
        return {dim: 0, dim // count: 1}.get(part.shape[1]) if dim % count == 0 else None
    axis = AXES.get(leaf)
    return axis if axis is not None and part.shape[1 - axis] == dim else None
