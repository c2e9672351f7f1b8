"""Stored numbers to the weights that the forward pass uses: one function a format, tensors in, tensors out.

Every function takes the tensors of one matrix (of one expert, where they are stacked) and returns W in float32 or
float64, in which the products below are computed; nothing goes through the checkpoint's compute dtype. Shapes: O = out,
I = in of the matrix, G = groups or blocks along I.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # OCP Microscaling Formats 1.0, §5.3.3: one sign bit, then these
E2M1_ROUNDOFF = 2.0**-2
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # nibble that holds column 0, 1, … of eight (AutoAWQ, WQLinear_GEMM)
CHUNK = 2**21  # codes unpacked at a time where each needs eight bytes of room


@dataclass(frozen=True)
class Unpacked:
    """W, and how coarsely it was stored: `half_step` is half the distance between neighbouring values, on a grid
    whose axes divide those of W (or W's own); without one, `roundoff` is that distance relative to each entry."""

    values: Tensor
    half_step: Tensor | None = None
    roundoff: float = 0.0


def plain(weight: Tensor) -> Unpacked:
    """W as it is."""
    return Unpacked(weight, roundoff=ROUNDOFF[weight.dtype])


def scaled_float(weight: Tensor, scale: Tensor) -> Unpacked:
    """W = q · s, q an 8-bit float, s one number, one a row, or one a block (transformers' `Fp8Dequantize`)."""
    scales = spread(exponent_or_float(scale), weight.shape, _tile)
    return Unpacked(weight.float() * scales, roundoff=ROUNDOFF[weight.dtype])


def scaled_int(weight: Tensor, scale: Tensor, zero: Tensor | None = None) -> Unpacked:
    """W = (q − z) · s with 8-bit q; s and z one number, one a row, a group or a block."""
    return affine(weight.float(), scale, zero)


def bitsandbytes_int8(weight: Tensor, scale: Tensor) -> Unpacked:
    """W = q · SCB / 127 with SCB the largest |W| of every row (LLM.int8(), Dettmers et al. 2022)."""
    return affine(weight.float(), scale.float()[:, None] / 127)


def bitsandbytes_4bit(
    weight: Tensor,
    absmax: Tensor,
    code: Tensor,
    state: Tensor,
    nested_absmax: Tensor | None = None,
    nested_code: Tensor | None = None,
) -> Unpacked:
    """W = code[q] · absmax of q's block, over W flattened; with double quantisation absmax is itself stored so, less
    its mean (QLoRA, Dettmers et al. 2023). The higher half of a byte comes first."""
    facts = quant_state(state)
    if nested_absmax is not None and nested_code is not None:
        blocks = nested_absmax.float().repeat_interleave(facts["nested_blocksize"])[: absmax.numel()]
        absmax = nested_code.float()[absmax.flatten().long()] * blocks + facts["nested_offset"]
    count = math.prod(facts["shape"])
    packed = weight.flatten().view(torch.uint8)
    index = torch.stack((packed >> 4, packed & 15), dim=-1).flatten()[:count].int()
    scale = absmax.float().repeat_interleave(facts["blocksize"])[:count]
    values = (code.float()[index] * scale).reshape(facts["shape"])
    return Unpacked(values, half_step=(_half_gaps(code.float())[index] * scale).reshape(facts["shape"]))


def quant_state(state: Tensor) -> dict[str, Any]:
    """bitsandbytes' packed JSON: shape, blocksize and, with double quantisation, nested_blocksize and nested_offset."""
    return json.loads(bytes(state.flatten().view(torch.uint8).tolist()))


def packed_int(
    weight: Tensor,
    scale: Tensor,
    shape: Tensor,
    zero: Tensor | None = None,
    g_idx: Tensor | None = None,
) -> Unpacked:
    """compressed-tensors `pack-quantized`: W = (q − z) · s, q and z offset by 2ᵇ⁻¹ and packed bit by bit into 32-bit
    words, q along rows and z along columns; b follows from the shapes."""
    rows, columns = shape.tolist()
    bits = weight.shape[-1] * 32 // columns
    half = 2 ** (bits - 1)
    if zero is not None and zero.dtype == torch.int32:
        zero = unpack_bits(zero.T, bits, rows).T - half
    return affine(unpack_bits(weight, bits, columns) - half, scale, zero, _in_order(g_idx))


def gptq(weight: Tensor, zero: Tensor, scale: Tensor, g_idx: Tensor | None = None) -> Unpacked:
    """W = (q − z − 1) · s, groups along the input; q (I·b/32, O), z (G, O·b/32), s (G, O); without `g_idx` the groups
    follow one another. The first GPTQ layout stores z − 1 (AutoGPTQ, `QuantLinear.pack`)."""
    return _gptq(weight, zero, scale, g_idx, offset=1)


def gptq_v2(weight: Tensor, zero: Tensor, scale: Tensor, g_idx: Tensor | None = None) -> Unpacked:
    """As `gptq`, with z stored as it is (GPTQModel, `checkpoint_format: gptq_v2`)."""
    return _gptq(weight, zero, scale, g_idx, offset=0)


def _gptq(weight: Tensor, zero: Tensor, scale: Tensor, g_idx: Tensor | None, *, offset: int) -> Unpacked:
    rows = scale.shape[1]
    bits = zero.shape[1] * 32 // rows
    columns = weight.shape[0] * 32 // bits if g_idx is None else g_idx.shape[0]
    zeros_GO = (unpack_bits(zero, bits, rows) + offset) % 2**bits
    return affine(unpack_bits(weight.T, bits, columns), scale.T, zeros_GO.T, _in_order(g_idx))


def awq(weight: Tensor, zero: Tensor, scale: Tensor) -> Unpacked:
    """W = (q − z) · s, groups along the input; q (I, O/8), z (G, O/8), s (G, O), the eight 4-bit columns of a word in
    AutoAWQ's order."""
    return affine(_awq_columns(weight).T, scale.T, _awq_columns(zero).T)


def _awq_columns(packed: Tensor) -> Tensor:
    codes = unpack_bits(packed, 4, packed.shape[1] * 8)
    return codes.reshape(packed.shape[0], -1, 8)[..., list(AWQ_ORDER)].reshape(packed.shape[0], -1)


def fp4(weight: Tensor, scale: Tensor, divisor: Tensor | None = None, factor: Tensor | None = None) -> Unpacked:
    """W = e2m1[q] · s of q's group along the input, two q a byte, the lower half first: MXFP4 (s a power of two) and
    NVFP4 (s an 8-bit float, over the tensor's `divisor` or times its `factor`)."""
    values = _e2m1(weight)
    scales = exponent_or_float(scale)
    if divisor is not None:
        scales = scales / divisor.float()
    if factor is not None:
        scales = scales * factor.float()
    return Unpacked(values * spread(scales, values.shape), roundoff=E2M1_ROUNDOFF)


def mxfp4_blocks(weight: Tensor, scale: Tensor) -> Unpacked:
    """gpt-oss: blocks (O, G, 16) and exponents (O, G) of an expert, returned (I, O) as the module holds it."""
    return Unpacked(fp4(weight.flatten(1), scale).values.T, roundoff=E2M1_ROUNDOFF)


def bitnet(weight: Tensor, scale: Tensor) -> Unpacked:
    """W = (q − 1) / s or · s, four q a byte, the bytes' lowest bits holding the first quarter of the rows
    (transformers' `unpack_weights`)."""
    packed = weight.view(torch.uint8)
    codes = torch.cat([(packed >> shift) & 3 for shift in (0, 2, 4, 6)])
    return affine(codes.float() - 1, scale)


def hqq(weight: Tensor, scale: Tensor, zero: Tensor, shape: Tensor, bits: Tensor) -> Unpacked:
    """W = (q − z) · s reshaped to (O, I), q unpacked by planes: the first rows hold the highest bits (HQQ, `BitPack`).
    Scale and zero have one entry for every row or column of q."""
    count = int(bits)
    planes = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}[count]
    codes = torch.cat([(weight >> (count * (planes - 1 - plane))) & (2**count - 1) for plane in range(planes)])
    sizes = shape.tolist()
    codes = codes[: math.prod(sizes) // codes.shape[1]]  # ten planes may leave rows that nothing fills
    unpacked = affine(codes.float(), scale, zero)
    steps = (scale.float().abs() / 2).expand(codes.shape)
    return Unpacked(unpacked.values.reshape(sizes), half_step=steps.reshape(sizes))


def torchao_int4(weight: Tensor, scale: Tensor, zero: Tensor) -> Unpacked:
    """torchao's `Int4Tensor`: W = q · s + z with signed q (O, I/2), two a byte, the lower half first; s and z (G, O),
    z in the units of W (`int4_row_quantize_zp` of FBGEMM)."""
    codes = (nibbles(weight) ^ 8).float() - 8
    values = codes * spread(scale.float().T, codes.shape) + spread(zero.float().T, codes.shape)
    return Unpacked(values, half_step=scale.float().T.abs() / 2)


def torchao_int4_words(weight: Tensor, scale: Tensor, zero: Tensor) -> Unpacked:
    """torchao's `Int4PlainInt32Tensor` for Intel: W = (q − z) · s, eight q a word, lowest first; s and z (G, O)."""
    return affine(unpack_bits(weight, 4, 8 * weight.shape[1]), scale.T, zero.T)


def torchao_int4_tiles(weight: Tensor, scale_zero: Tensor, shape: Sequence[int]) -> Unpacked:
    """torchao's `Int4TilePackedTo4dTensor`: W = (q − 8) · s + z of `shape`, padded to whole tiles; s, z (G, O, 2).

    q (O/8, I/16t, 32, t/2) lies as Nvidia's tensor cores read it (PyTorch, `matrix_to_m16n8k16_Bint4_layout`): of a
    tile of 8 rows and 16 columns, lane l has row l // 4 and columns 2 (l mod 4) + {0, 1, 8, 9}; a word holds two such
    tiles, even columns in its lower half. AMD GPUs order the same shape in another way, which the file does not tell.
    """
    tiles, blocks, lanes, words = weight.shape
    codes = unpack_bits(weight.reshape(-1, words), 4, 8 * words)
    codes = codes.reshape(tiles, blocks, lanes // 4, 4, words, 2, 2, 2)  # … row, pair, word, parity, tile, half
    codes = codes.permute(0, 2, 1, 4, 6, 7, 3, 5).reshape(8 * tiles, 32 * words * blocks)
    scales, zeros = (spread(grid, codes.shape) for grid in scale_zero.float().permute(2, 1, 0))
    rows, columns = shape
    values = (codes - 8) * scales + zeros
    return Unpacked(values[:rows, :columns], half_step=(scales.abs() / 2).expand(codes.shape)[:rows, :columns])


def torchao_fp8(weight: Tensor, scale: Tensor) -> Unpacked:
    """MXFP8 of torchao's `MXTensor`: scales of 32 along the input, perhaps in the order of `in_rows`."""
    return scaled_float(weight, in_rows(scale, weight.shape[0], weight.shape[1] // 32))


def torchao_fp4(weight: Tensor, scale: Tensor, factor: Tensor | None = None) -> Unpacked:
    """torchao's `NVFP4Tensor` (scales of 16, times the tensor's `factor`) and `MXTensor` (scales of 32), both perhaps
    in the order of `in_rows`."""
    size = 16 if scale.dtype == torch.float8_e4m3fn else 32
    return fp4(weight, in_rows(scale, weight.shape[0], 2 * weight.shape[1] // size), factor=factor)


def fed_by(unpack: Callable[..., Unpacked]) -> Callable[..., Unpacked]:
    """The same format in a layer that multiplies its input by `pre` (I, or one number) first: W · diag(pre)."""

    def scaled(pre: Tensor | None = None, **parts: Tensor) -> Unpacked:
        found = unpack(**parts)
        if pre is None:
            return found
        step, columns = found.half_step, pre.double().abs()
        if step is not None:
            step = spread(step, found.values.shape) * columns
        return Unpacked(found.values.double() * pre.double(), step, found.roundoff)

    return scaled


def weight_norm(weight: Tensor, gain: Tensor) -> Unpacked:
    """W = g · v/‖v‖, the norm over every axis along which g has one entry (Salimans & Kingma 2016, eq. 2)."""
    axes = [axis for axis, size in enumerate(gain.shape) if size == 1 and weight.shape[axis] > 1]
    length = torch.linalg.vector_norm(weight.double(), dim=axes, keepdim=True)
    return Unpacked(weight.double() * (gain.double() / length), roundoff=ROUNDOFF[weight.dtype])


def pruned(weight: Tensor, mask: Tensor) -> Unpacked:
    """W = w · m, entry by entry (`torch.nn.utils.prune`)."""
    return Unpacked(weight * mask.to(weight.dtype), roundoff=ROUNDOFF[weight.dtype])


# --- what the formats share --------------------------------------------------------------------------------------


def affine(codes: Tensor, scale: Tensor, zero: Tensor | None = None, order: Tensor | None = None) -> Unpacked:
    """(q − z) · s with scale and zero on a grid; `order` gives the grid's column of every column of q instead."""
    codes, scale = codes.float(), scale.float()
    step = scale
    if order is not None:
        scale, zero = scale[:, order], zero if zero is None else zero[:, order]
    if zero is not None:
        codes = codes - spread(zero.float(), codes.shape)
    return Unpacked(
        codes * spread(scale, codes.shape), half_step=step.abs().reshape(_grid_shape(step, codes.shape)) / 2
    )


def spread(grid: Tensor, shape: torch.Size, block: Callable[[int, int], int] | None = None) -> Tensor:
    """A grid of scales over an array of `shape`, every entry repeated over its block (`block` tells its length)."""
    grid = grid.reshape(_grid_shape(grid, shape))
    for axis, size in enumerate(shape):
        count = grid.shape[axis]
        if count not in (1, size):
            grid = grid.repeat_interleave((block or _group)(size, count), dim=axis).narrow(axis, 0, size)
    return grid


def _group(size: int, count: int) -> int:
    """Groups are equal. `ValueError` where they cannot be."""
    if size % count:
        raise ValueError(f"{count} scales along an axis of {size} is no known layout")
    return size // count


def _tile(size: int, count: int) -> int:
    """Tiles (the 128 × 128 of fp8) are a power of two, the last one perhaps cut: only one power of two fits."""
    block = 1 << math.ceil(math.log2(size / count))
    return block if math.ceil(size / block) == count else _group(size, count)


def _grid_shape(grid: Tensor, shape: torch.Size) -> tuple[int, ...]:
    """The grid's shape with as many axes as the array: one number fits all, one a row stands in the first axis."""
    if grid.ndim == len(shape):
        return tuple(grid.shape)
    return (*grid.shape, *[1] * (len(shape) - grid.ndim))


def exponent_or_float(scale: Tensor) -> Tensor:
    """Scales in float32; a byte is the exponent of a power of two, biased by 127 (E8M0)."""
    return torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()


def unpack_bits(words: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of every row of 32-bit words, each `bits` wide, lowest bits first, across word ends."""
    words = words.contiguous()
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


def _in_order(g_idx: Tensor | None) -> Tensor | None:
    """The group of every column, `None` where it is absent or not set (a first entry of −1)."""
    return None if g_idx is None or int(g_idx[0]) < 0 else g_idx.long()


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


def _e2m1(packed: Tensor) -> Tensor:
    table = torch.tensor([*E2M1, *(-value for value in E2M1)], device=packed.device)
    return table[nibbles(packed).int()]


def _half_gaps(code: Tensor) -> Tensor:
    """Half the distance from every entry of a codebook to the farther of its neighbours."""
    ordered, order = code.sort()
    gaps = torch.nn.functional.pad(ordered.diff(), (1, 1))
    result = torch.empty_like(code)
    result[order] = torch.maximum(gaps[:-1], gaps[1:]) / 2
    return result
