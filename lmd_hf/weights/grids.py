"""What the stored formats share: which tensors are numbers, grids of scales over a matrix, and codes out of words.

`ValueError` everywhere where a tensor is not what its place asks for: a wrong number is worse than none.
"""

import math
from collections.abc import Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor


ROUNDOFF = {  # half the distance of neighbouring values, relative to the value: 2⁻¹⁻ᵇ with b bits of mantissa
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
    torch.float8_e4m3fn: 2.0**-4,
    torch.float8_e4m3fnuz: 2.0**-4,
    torch.float8_e5m2: 2.0**-3,
    torch.float8_e5m2fnuz: 2.0**-3,
}
TILES = (32, 64, 128, 256)  # sides of the square blocks that share a scale; DeepSeek's are of 128
CHUNK = 2**21  # codes unpacked at a time where each needs eight bytes of room


def real(values: Tensor, what: str = "scale") -> Tensor:
    """The values themselves; `ValueError` if they are no floats."""
    if values.dtype not in ROUNDOFF and values.dtype != torch.float8_e8m0fnu:
        raise ValueError(f"its {what} is stored as {str(values.dtype).removeprefix('torch.')}, not as floats")
    return values


def exponent_or_float(scale: Tensor) -> Tensor:
    """Scales in float32; a byte is the exponent of a power of two, biased by 127 (E8M0)."""
    return torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else real(scale).float()


def sizes(values: Sequence[Any]) -> tuple[int, ...]:
    """Stored lengths of axes; `ValueError` if they are no positive whole numbers."""
    try:
        found = tuple(map(index, values))
    except TypeError:
        found = ()
    if not found or min(found) < 1:
        raise ValueError(f"{values} is no shape")
    return found


def spread(grid: Tensor, shape: torch.Size) -> Tensor:
    """A grid of scales over an array of `shape`: one number, one a row, one a group of a row, or one a square tile, the
    last ones of which may be cut. `ValueError` for a grid that is nothing of it."""
    grid = grid.reshape(grid_shape(grid, shape))
    pairs = list(zip(shape, grid.shape, strict=True))
    whole = [count in (1, size) for size, count in pairs]
    if all(whole):
        return grid
    if grid.shape[:-1] == shape[:-1] and grid.shape[-1] and shape[-1] % grid.shape[-1] == 0:
        return grid.repeat_interleave(shape[-1] // grid.shape[-1], dim=-1)
    side = next((n for n in TILES if all(-(-size // n) == count for size, count in pairs)), None)
    if side is None:
        raise ValueError(f"{tuple(grid.shape)} scales for {tuple(shape)} values are no known layout")
    for axis, size in enumerate(shape):
        grid = grid.repeat_interleave(side, dim=axis).narrow(axis, 0, size)
    return grid


def grid_shape(grid: Tensor, shape: torch.Size) -> tuple[int, ...]:
    """The grid's shape with as many axes as the array: one number fits all, one a row stands in the first axis."""
    if grid.ndim == len(shape):
        return tuple(grid.shape)
    if grid.numel() == 1:
        return (1,) * len(shape)
    if grid.shape != shape[:1]:
        raise ValueError(f"{tuple(grid.shape)} scales for {tuple(shape)} values are no known layout")
    return (*grid.shape, *[1] * (len(shape) - 1))


def beside(zero: Tensor, scale: Tensor) -> Tensor:
    """The zero points, as many as the scales."""
    if zero.shape != scale.shape and not zero.numel() == scale.numel() == 1:
        raise ValueError(f"zero points of shape {tuple(zero.shape)} beside scales of shape {tuple(scale.shape)}")
    return zero


def in_order(g_idx: Tensor, columns: int, groups: int) -> Tensor | None:
    """The group of every column, `None` where it is not set (−1 everywhere)."""
    if g_idx.shape != (columns,) or g_idx.is_floating_point():
        raise ValueError(f"g_idx has shape {tuple(g_idx.shape)} and type {g_idx.dtype} for {columns} columns")
    if (g_idx == -1).all():
        return None
    if g_idx.min() < 0 or g_idx.max() >= groups:
        raise ValueError(f"g_idx names groups from {int(g_idx.min())} to {int(g_idx.max())} of {groups}")
    return g_idx.long()


def unpack_bits(words: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of every row of 32-bit words, each `bits` wide, lowest bits first, across word ends.
    `ValueError` if the words are not as many as that takes."""
    words = words.contiguous()
    if bits < 1 or words.dtype != torch.int32 or words.shape[1] != -(-count * bits // 32):
        raise ValueError(f"{tuple(words.shape)} words do not hold rows of {count} codes")
    if 8 % bits == 0:
        packed = words.view(torch.uint8)
        codes = torch.stack([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], dim=-1)
        return codes.flatten(1)[:, :count].float()
    starts = torch.arange(count, device=words.device) * bits
    rows = max(1, CHUNK // count)
    return torch.cat([_straddling(part, starts, bits) for part in torch.split(words, rows)])


def _straddling(words: Tensor, starts: Tensor, bits: int) -> Tensor:
    wide = torch.nn.functional.pad(words.to(torch.int64) & 0xFFFFFFFF, (0, 1))
    word = starts // 32
    pair = wide[:, word] | (wide[:, word + 1] << 32)
    return ((pair >> (starts % 32)) & (2**bits - 1)).float()


def nibbles(packed: Tensor) -> Tensor:
    """The two halves of every byte, the lower first."""
    codes = packed.contiguous().view(torch.uint8)
    return torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)


def in_rows(scale: Tensor, rows: int, groups: int) -> Tensor:
    """Scales (rows, groups), also where they lie in the order that Blackwell's tensor cores read: 128 × 4 blocks of
    them, padded, row 32 a + b of a block as four entries of line b (cuBLAS, 1D block scaling factors layout)."""
    if tuple(scale.shape) == (rows, groups):
        return scale
    high, wide = math.ceil(rows / 128), math.ceil(groups / 4)
    if scale.numel() != 128 * high * 4 * wide:
        raise ValueError(f"{scale.numel()} scales for {rows} rows of {groups} groups are no known layout")
    blocks = scale.reshape(high, wide, 32, 4, 4).permute(0, 3, 2, 1, 4)
    return blocks.reshape(128 * high, 4 * wide)[:rows, :groups]
