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

from lmd_hf.weights.grids import (
    ROUNDOFF,
    beside,
    exponent_or_float,
    grid_shape,
    in_order,
    in_rows,
    nibbles,
    real,
    sizes,
    spread,
    unpack_bits,
)


E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # OCP Microscaling Formats 1.0, §5.3.3: one sign bit, then these
E2M1_ROUNDOFF = 2.0**-2
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # nibble that holds column 0, 1, … of eight (AutoAWQ, WQLinear_GEMM)
HQQ_PLANES = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}  # codes a word, by their bits


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
    scales = spread(exponent_or_float(scale), weight.shape)
    return Unpacked(weight.float() * scales, roundoff=ROUNDOFF[weight.dtype])


def scaled_int(weight: Tensor, scale: Tensor, zero: Tensor | None = None) -> Unpacked:
    """W = (q − z) · s with 8-bit q; s and z one number, one a row, a group or a block."""
    return affine(weight.float(), scale, zero)


def bitsandbytes_int8(weight: Tensor, scale: Tensor) -> Unpacked:
    """W = q · SCB / 127 with SCB the largest |W| of every row (LLM.int8(), Dettmers et al. 2022)."""
    if scale.shape != weight.shape[:1]:
        raise ValueError(f"SCB has shape {tuple(scale.shape)} for {len(weight)} rows")
    return affine(weight.float(), real(scale).float()[:, None] / 127)


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
    packed, count = weight.flatten().view(torch.uint8), math.prod(facts["shape"])
    if (absmax.dtype == torch.uint8) != (nested_absmax is not None and nested_code is not None):
        raise ValueError("absmax is stored in bytes where it is quantised itself, and only there")
    if nested_absmax is not None and nested_code is not None:
        blocks = _blockwise(nested_absmax, facts["nested_blocksize"], absmax.numel())
        absmax = _codebook(nested_code, 256)[absmax.flatten().long()] * blocks + facts["nested_offset"]
    if absmax.ndim == 2:  # as a forward pass on a CPU leaves it: one row a block of columns
        absmax = absmax.T
    if len(packed) != -(-count // 2):
        raise ValueError(f"{len(packed)} bytes hold {facts['shape']} of two a byte")
    values, codes = _codebook(code, 16), torch.stack((packed >> 4, packed & 15), dim=-1).flatten()[:count].int()
    scale = _blockwise(absmax, facts["blocksize"], count)
    return Unpacked(
        (values[codes] * scale).reshape(facts["shape"]),
        half_step=(_half_gaps(values)[codes] * scale).reshape(facts["shape"]),
    )


def _codebook(code: Tensor, size: int) -> Tensor:
    if code.shape != (size,):
        raise ValueError(f"a codebook has shape {tuple(code.shape)}, not {size} values")
    return real(code, "codebook").float()


def _blockwise(scale: Tensor, size: int, count: int) -> Tensor:
    """The scale of each of `count` values, `size` of which share one; the last block may be cut."""
    if scale.numel() != -(-count // size):
        raise ValueError(f"{scale.numel()} scales for {count} values in blocks of {size}")
    return real(scale).flatten().float().repeat_interleave(size)[:count]


def quant_state(state: Tensor) -> dict[str, Any]:
    """bitsandbytes' packed JSON: shape, blocksize and, with double quantisation, nested_blocksize and nested_offset.
    `ValueError` if it is none."""
    try:
        facts = json.loads(bytes(state.flatten().view(torch.uint8).tolist()))
        found = {"shape": sizes(facts["shape"]), "blocksize": sizes([facts["blocksize"]])[0]}
        if "nested_blocksize" in facts:
            found["nested_blocksize"] = sizes([facts["nested_blocksize"]])[0]
            found["nested_offset"] = float(facts["nested_offset"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise ValueError("no state of bitsandbytes") from None
    return found


def packed_int(
    weight: Tensor,
    scale: Tensor,
    shape: Tensor,
    zero: Tensor | None = None,
    g_idx: Tensor | None = None,
) -> Unpacked:
    """compressed-tensors `pack-quantized`: W = (q − z) · s, q and z offset by 2ᵇ⁻¹ and packed bit by bit into 32-bit
    words, q along rows and z along columns; b follows from the shapes."""
    rows, columns = sizes(shape.tolist())
    bits = weight.shape[-1] * 32 // columns
    half = 2 ** (bits - 1)
    if zero is not None and zero.dtype == torch.int32:
        zero = unpack_bits(zero.T, bits, rows).T - half
    return affine(unpack_bits(weight, bits, columns) - half, scale, zero, g_idx)


def gptq(weight: Tensor, zero: Tensor, scale: Tensor, g_idx: Tensor | None = None) -> Unpacked:
    """W = (q − z − 1) · s, groups along the input; q (I·b/32, O), z (G, O·b/32), s (G, O); without `g_idx` the groups
    follow one another. The first GPTQ layout stores z − 1 (AutoGPTQ, `QuantLinear.pack`)."""
    return _gptq(weight, zero, scale, g_idx, offset=1)


def gptq_v2(weight: Tensor, zero: Tensor, scale: Tensor, g_idx: Tensor | None = None) -> Unpacked:
    """As `gptq`, with z stored as it is (GPTQModel, `checkpoint_format: gptq_v2`)."""
    return _gptq(weight, zero, scale, g_idx, offset=0)


def _gptq(weight: Tensor, zero: Tensor, scale: Tensor, g_idx: Tensor | None, *, offset: int) -> Unpacked:
    rows, columns, bits = gptq_sizes(weight.shape, zero.shape, scale.shape)
    zeros_GO = (unpack_bits(zero, bits, rows) + offset) % 2**bits
    return affine(unpack_bits(weight.T, bits, columns), scale.T, zeros_GO.T, g_idx)


def gptq_sizes(weight: Sequence[int], zero: Sequence[int], scale: Sequence[int]) -> tuple[int, int, int]:
    """(rows, columns, bits) of W from the shapes of its parts; `ValueError` where they are not of one matrix."""
    (words, rows), (groups, width) = weight, zero
    bits = width * 32 // max(1, rows)
    if not 0 < bits <= 8 or width * 32 != rows * bits or words * 32 % bits or (groups, rows) != tuple(scale):
        raise ValueError(f"{weight}, {zero} and {scale} are no words, zeros and scales of one matrix")
    return rows, words * 32 // bits, bits


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
    values, scales = _e2m1(weight), exponent_or_float(scale)
    size = 32 if scale.dtype in (torch.uint8, torch.float8_e8m0fnu) else 16
    if scales.shape != (*values.shape[:-1], values.shape[-1] // size):
        raise ValueError(f"{tuple(scales.shape)} are no scales for groups of {size} in {tuple(values.shape)}")
    if divisor is not None:
        scales = scales / spread(real(divisor).float(), torch.Size())
    if factor is not None:
        scales = scales * spread(real(factor).float(), torch.Size())
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
    (count,), outer = sizes([bits.item()]), sizes(shape.tolist())
    planes = HQQ_PLANES[count]
    codes = torch.cat([(weight >> (count * (planes - 1 - plane))) & (2**count - 1) for plane in range(planes)])
    height = math.prod(outer) // codes.shape[1]
    if height * codes.shape[1] != math.prod(outer) or len(weight) != -(-height // planes):
        raise ValueError(f"{tuple(weight.shape)} words do not hold {outer} in {count} bits")
    codes = codes[:height]  # ten planes may leave rows that nothing fills
    if scale.shape not in ((height, 1), (1, codes.shape[1])):
        raise ValueError(f"{tuple(scale.shape)} are no scales for the rows or columns of {tuple(codes.shape)}")
    unpacked = affine(codes.float(), scale, real(zero, "zero"))
    steps = (scale.float().abs() / 2).expand(codes.shape)
    return Unpacked(unpacked.values.reshape(outer), half_step=steps.reshape(outer))


def torchao_int4(weight: Tensor, scale: Tensor, zero: Tensor) -> Unpacked:
    """torchao's `Int4Tensor`: W = q · s + z with signed q (O, I/2), two a byte, the lower half first; s and z (G, O),
    z in the units of W (`int4_row_quantize_zp` of FBGEMM)."""
    codes = (nibbles(weight) ^ 8).float() - 8
    scaled = affine(codes, scale.T)
    return Unpacked(scaled.values + spread(beside(real(zero, "zero"), scale).float().T, codes.shape), scaled.half_step)


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
    scales, zeros = (spread(grid, codes.shape) for grid in real(scale_zero).float().permute(2, 1, 0))
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
        step, columns = found.half_step, spread(real(pre, "factor").double()[None], found.values.shape)
        if step is not None:
            step = spread(step, found.values.shape) * columns.abs()
        return Unpacked(found.values.double() * columns, step, found.roundoff)

    return scaled


def weight_norm(weight: Tensor, gain: Tensor) -> Unpacked:
    """W = g · v/‖v‖, the norm over every axis but the one along which g has as many entries as v, or over all where g
    is a number (Salimans & Kingma 2016, eq. 2; torch's `weight_norm`, whose g has as many axes as v)."""
    axes = range(weight.ndim)
    shapes = {axis: tuple(size if other == axis else 1 for other in axes) for axis, size in enumerate(weight.shape)}
    along = next((axis for axis, shape in shapes.items() if shape == tuple(gain.shape)), None)
    if along is None and gain.ndim:
        raise ValueError(f"a gain of shape {tuple(gain.shape)} belongs to no axis of {tuple(weight.shape)}")
    length = torch.linalg.vector_norm(weight.double(), dim=[axis for axis in axes if axis != along], keepdim=True)
    return Unpacked(weight.double() * (real(gain, "gain").double() / length), roundoff=ROUNDOFF[weight.dtype])


def pruned(weight: Tensor, mask: Tensor) -> Unpacked:
    """W = w · m, entry by entry (`torch.nn.utils.prune`)."""
    return Unpacked(weight * mask.to(weight.dtype), roundoff=ROUNDOFF[weight.dtype])


# --- what the formats share --------------------------------------------------------------------------------------


def affine(codes: Tensor, scale: Tensor, zero: Tensor | None = None, order: Tensor | None = None) -> Unpacked:
    """(q − z) · s with scale and zero on one grid; `order` gives the grid's column of every column of q instead, where
    it is set."""
    codes, scale = codes.float(), real(scale).float()
    step, zero = scale, zero if zero is None else beside(zero, scale).float()
    if order is not None and (columns := in_order(order, codes.shape[1], scale.shape[-1])) is not None:
        scale, zero = scale[:, columns], zero if zero is None else zero[:, columns]
    if zero is not None:
        codes = codes - spread(zero, codes.shape)
    return Unpacked(codes * spread(scale, codes.shape), half_step=step.abs().reshape(grid_shape(step, codes.shape)) / 2)


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
