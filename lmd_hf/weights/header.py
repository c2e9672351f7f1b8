"""The header of a safetensors file: bytes in, tensor references out, everything checked before any is believed."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lmd_hf.errors import FormatError
from lmd_hf.records import TensorRef


BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
QDATA = "_qdata"  # what torchao writes behind the names of weights whose class and shape it keeps in the metadata
MAX_HEADER = 100_000_000  # the limit of the safetensors library itself


def read_header(file: str, size: int, read: Callable[[int, int], bytes]) -> tuple[TensorRef, ...]:
    """Every tensor of a safetensors file, in the order of its bytes.

    `read(start, stop)` returns those bytes of the file, `size` is its length. Raises `FormatError` if the file is
    truncated, the header is no JSON object of tensors, a dtype is unknown, or offsets overlap, leave gaps, run
    backwards, disagree with the shape or pass the end of the file.
    """
    if size < 8:
        raise FormatError(f"{file}: only {size} bytes, no safetensors header; download the file again")
    length = int.from_bytes(read(0, 8), "little")
    if length > MAX_HEADER or 8 + length > size:
        raise FormatError(
            f"{file}: the header claims {length} bytes but the file has {size}; truncated or not safetensors: "
            "download it again"
        )
    try:
        entries = json.loads(read(8, 8 + length))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{file}: the header is not valid JSON ({error}); download the file again") from None
    if not isinstance(entries, dict):
        raise FormatError(f"{file}: the header is not a JSON object; the file is not safetensors")
    metadata = entries.pop("__metadata__", None)
    tensors = [_tensor(file, name, entry, 8 + length) for name, entry in entries.items()]
    tensors = [replace(t, declared=_declared(t.name, metadata)) if t.name.endswith(QDATA) else t for t in tensors]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop))
    end = 8 + length
    for tensor in tensors:
        if tensor.start != end:
            problem = "overlaps the tensor before it" if tensor.start < end else "leaves a gap before it"
            raise FormatError(f"{file}: '{tensor.name}' {problem} (byte {tensor.start}, expected {end})")
        end = tensor.stop
    if end > size:
        raise FormatError(f"{file}: tensors need {end} bytes but the file has {size}; truncated: download it again")
    return tuple(tensors)


def _tensor(file: str, name: str, entry: Any, base: int) -> TensorRef:
    try:
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise FormatError(f"{file}: the entry of '{name}' lacks dtype, shape or data_offsets") from None
    if not isinstance(dtype, str) or dtype not in BITS:
        raise FormatError(f"{file}: '{name}' has unknown dtype '{dtype}'; known: {', '.join(sorted(BITS))}")
    if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
        raise FormatError(f"{file}: '{name}' has a shape or offset that is no non-negative integer")
    if (stop - start) * 8 != math.prod(shape) * BITS[dtype]:
        raise FormatError(f"{file}: '{name}' of shape {list(shape)} and dtype {dtype} does not fill its byte range")
    return TensorRef(name, file, base + start, base + stop, dtype, shape)


def _declared(name: str, metadata: Any) -> tuple[str, tuple[int, ...]] | None:
    """What torchao's metadata say of the weight `m.weight` that `m._weight_qdata` belongs to: its class, its shape (()
    where that goes without saying); `None` where they say nothing."""
    module, _, leaf = name.removesuffix(QDATA).rpartition("._")
    try:
        entry = json.loads(metadata[f"{module}.{leaf}"])
        kind, shape = entry["_type"], tuple(entry["_data"].get("shape", ()))
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        return None
    known = isinstance(kind, str) and all(type(size) is int and size > 0 for size in shape)
    return (kind, shape) if known else None
