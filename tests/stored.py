"""Quantising by each format's definition: the checkpoint tensors of one matrix, and the matrix that they mean."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


E2M1 = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # nibble i of a word holds this one of its eight columns (WQLinear_GEMM)
Stored = tuple[dict[str, Tensor], Tensor]


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """The codes of a row as one string of bits, lowest first, cut into 32-bit words."""
    words = []
    for row in codes.tolist():
        number = sum(int(code) << (bits * index) for index, code in enumerate(row))
        count = math.ceil(len(row) * bits / 32)
        words.append([number >> (32 * index) & 0xFFFFFFFF for index in range(count)])
    return torch.from_numpy(np.array(words, dtype=np.uint32).view(np.int32))


def pack_awq(values: Tensor) -> Tensor:
    """Eight 4-bit columns a word, in AutoAWQ's order."""
    columns = values.reshape(values.shape[0], -1, 8)[..., AWQ_ORDER]
    return pack_bits(columns.reshape(-1, 8), 4).reshape(values.shape[0], -1)


def two_a_byte(codes: Tensor) -> Tensor:
    """Two 4-bit codes a byte, the lower half first."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


def groups(w: Tensor, bits: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric groups along the input: codes (O, I), scale (O, G) exact in float16, zero point (O, G)."""
    parts = w.reshape(w.shape[0], -1, size)
    low, high = parts.amin(-1), parts.amax(-1)
    scale = ((high - low) / (2**bits - 1)).half().float()
    zero = (-low / scale).round().clamp(0, 2**bits - 1)
    codes = (parts / scale[..., None] + zero[..., None]).round().clamp(0, 2**bits - 1)
    return codes.reshape(w.shape), scale, zero


def ungrouped(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """(q − z) · s with scale and zero repeated over their groups."""
    size = codes.shape[1] // scale.shape[1]
    return (codes - zero.repeat_interleave(size, 1)) * scale.repeat_interleave(size, 1)


def nearest_e2m1(values: Tensor) -> Tensor:
    """The codes of the nearest values of FP4."""
    magnitude = (values.abs()[..., None] - E2M1[:8]).abs().argmin(-1).to(torch.uint8)
    return magnitude + 8 * (values < 0).to(torch.uint8)


def fp8(w: Tensor, tile: int = 128) -> Stored:
    """One scale for every tile × tile block (DeepSeek)."""
    rows, columns = (math.ceil(size / tile) for size in w.shape)
    padded = torch.nn.functional.pad(w, (0, columns * tile - w.shape[1], 0, rows * tile - w.shape[0]))
    largest = padded.reshape(rows, tile, columns, tile).abs().amax((1, 3))
    scale = largest / 448
    spread = scale.repeat_interleave(tile, 0).repeat_interleave(tile, 1)[: w.shape[0], : w.shape[1]]
    q = (w / spread).to(torch.float8_e4m3fn)
    return {"weight": q, "weight_scale_inv": scale}, q.double() * spread.double()


def fp8_rows(w: Tensor) -> Stored:
    """One scale for every row (compressed-tensors, FBGEMM)."""
    scale = w.abs().amax(1, keepdim=True) / 448
    q = (w / scale).to(torch.float8_e4m3fn)
    return {"weight": q, "weight_scale": scale}, q.double() * scale.double()


def gptq(w: Tensor, bits: int) -> Stored:
    """Groups of 64, the first layout, which stores z − 1."""
    codes, scale, zero = groups(w, bits, 64)
    zero = zero.clamp(min=1)
    tensors = {"qweight": pack_bits(codes, bits).T, "qzeros": pack_bits(zero.T - 1, bits), "scales": scale.T.half()}
    return tensors, ungrouped(codes.double(), scale.double(), zero.double())


def awq(w: Tensor) -> Stored:
    """Groups of 64, gemm order."""
    codes, scale, zero = groups(w, 4, 64)
    tensors = {"qweight": pack_awq(codes.T), "qzeros": pack_awq(zero.T), "scales": scale.T.half()}
    return tensors, ungrouped(codes.double(), scale.double(), zero.double())


def packed(w: Tensor, bits: int) -> Stored:
    """compressed-tensors `pack-quantized`, asymmetric groups of 64; zero points packed along the columns."""
    codes, scale, zero = groups(w, bits, 64)
    tensors = {"weight_packed": pack_bits(codes, bits), "weight_scale": scale, "weight_shape": torch.tensor(w.shape)}
    tensors["weight_zero_point"] = pack_bits(zero.T, bits).T
    return tensors, ungrouped(codes.double(), scale.double(), zero.double())


def int8(w: Tensor) -> Stored:
    """One scale for every row."""
    scale = w.abs().amax(1, keepdim=True) / 127
    q = (w / scale).round().to(torch.int8)
    return {"weight": q, "weight_scale": scale}, q.double() * scale.double()


def bitsandbytes_int8(w: Tensor) -> Stored:
    """LLM.int8(): the largest entry of every row is 127."""
    largest = w.abs().amax(1)
    q = (w * 127 / largest[:, None]).round().to(torch.int8)
    return {"weight": q, "SCB": largest}, q.double() * largest.double()[:, None] / 127


def bitsandbytes_4bit(w: Tensor, kind: str, nested: bool) -> Stored:
    """By bitsandbytes itself."""
    from bitsandbytes import functional

    values, state = functional.quantize_4bit(w, quant_type=kind, compress_statistics=nested, blocksize=64)
    tensors = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    return {"weight": values, **tensors}, functional.dequantize_4bit(values, state).double()


def nvfp4(w: Tensor) -> Stored:
    """compressed-tensors: scales of 16 in e4m3, multiplied by one number for the tensor."""
    whole = 448 * 6 / w.abs().max()
    scale = (w.reshape(w.shape[0], -1, 16).abs().amax(-1) / 6 * whole).to(torch.float8_e4m3fn)
    steps = (scale.double() / whole.double()).repeat_interleave(16, 1)
    codes = nearest_e2m1((w.double() / steps).float())
    tensors = {"weight_packed": two_a_byte(codes), "weight_scale": scale, "weight_global_scale": whole[None]}
    return tensors, E2M1[codes.int()].double() * steps


def mxfp4(w: Tensor) -> Stored:
    """compressed-tensors: scales of 32 that are powers of two."""
    exponents = (w.reshape(w.shape[0], -1, 32).abs().amax(-1) / 6).log2().ceil() + 127
    steps = torch.exp2(exponents.double() - 127).repeat_interleave(32, 1)
    codes = nearest_e2m1((w.double() / steps).float())
    tensors = {"weight_packed": two_a_byte(codes), "weight_scale": exponents.to(torch.uint8)}
    return tensors, E2M1[codes.int()].double() * steps


def hqq(w: Tensor, bits: int) -> Stored:
    """Groups of 64 as rows, packed by planes."""
    rows = w.reshape(-1, 64)
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    zero = -low / scale
    codes = (rows / scale + zero).round().clamp(0, 2**bits - 1)
    planes = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}[bits]
    height = math.ceil(len(codes) / planes)
    padded = torch.nn.functional.pad(codes.int(), (0, 0, 0, height * planes - len(codes)))
    words = sum(part << bits * (planes - 1 - index) for index, part in enumerate(padded.split(height)))
    tensors = {"W_q": words.to(torch.int32 if bits == 3 else torch.uint8), "scale": scale, "zero": zero}
    tensors |= {"shape": torch.tensor(w.shape), "nbits": torch.tensor(bits)}
    return tensors, ((codes.double() - zero.double()) * scale.double()).reshape(w.shape)


def torchao_int4(w: Tensor, size: int = 64) -> Stored:
    """`Int4Tensor` by FBGEMM's `int4_row_quantize_zp`: z is the value of code 8 of 15, codes are stored less 8."""
    parts = w.reshape(w.shape[0], -1, size)
    low, high = parts.amin(-1), parts.amax(-1)
    scale = (high - low) / 15
    codes = ((parts - low[..., None]) / scale[..., None]).round().clamp(0, 15).to(torch.int8).reshape(w.shape) - 8
    scale, zero = scale.bfloat16(), (low + 8 * scale).bfloat16()
    packed = (codes[:, ::2] & 15) | (codes[:, 1::2] << 4)
    tensors = {"_weight_qdata": packed, "_weight_scale": scale.T, "_weight_zero_point": zero.T}
    spread = [grid.double().repeat_interleave(size, 1) for grid in (scale, zero)]
    return tensors, codes.double() * spread[0] + spread[1]


def tile_order(codes: Tensor, inner: int = 8) -> Tensor:
    """Word by word as `matrix_to_m16n8k16_Bint4_layout` writes it: `inner` tiles of 16 columns a lane, two a word."""
    rows, columns = codes.shape
    words = torch.zeros(rows // 8, columns // (16 * inner), 32, inner // 2, dtype=torch.int64)
    for tile, block, lane, word in np.ndindex(words.shape):
        row, start = 8 * tile + lane // 4, (block * inner + 2 * word) * 16 + 2 * (lane % 4)
        pairs = [start, start + 8, start + 16, start + 24]
        places = [*pairs, *(pair + 1 for pair in pairs)]
        words[tile, block, lane, word] = sum(int(codes[row, k]) << 4 * i for i, k in enumerate(places))
    return torch.from_numpy(words.numpy().astype(np.uint32).view(np.int32))


def scale_order(scale: Tensor) -> Tensor:
    """Scales as cuBLAS wants them: blocks of 128 × 4, line b of a block holding its rows b, 32 + b, 64 + b, 96 + b."""
    rows, groups = scale.shape
    padded = torch.nn.functional.pad(scale.view(torch.uint8), (0, -groups % 4, 0, -rows % 128))
    lines = [
        torch.cat([padded[top + line + 32 * a, left : left + 4] for a in range(4)])
        for top in range(0, padded.shape[0], 128)
        for left in range(0, padded.shape[1], 4)
        for line in range(32)
    ]
    return torch.stack(lines).reshape(padded.shape[0] // 4, -1).view(scale.dtype)


def weight_norm(w: Tensor) -> Stored:
    """A direction and the length of every row."""
    length = w.double().norm(dim=1, keepdim=True)
    tensors = {"parametrizations.weight.original0": length.float(), "parametrizations.weight.original1": 3 * w}
    return tensors, length.float().double() * w.double() / length


FORMATS: dict[str, Callable[[Tensor], Stored]] = {
    "fp8, tiles of 128 × 128": fp8,
    "fp8, rows": fp8_rows,
    "mxfp4": mxfp4,
    "nvfp4": nvfp4,
    **{f"gptq, {bits} bits": lambda w, bits=bits: gptq(w, bits) for bits in (2, 3, 4, 8)},
    "awq": awq,
    **{f"compressed-tensors, {bits} bits": lambda w, bits=bits: packed(w, bits) for bits in (4, 8)},
    "int8, rows": int8,
    "bitsandbytes int8": bitsandbytes_int8,
    **{
        f"bitsandbytes {kind}{', double' if nested else ''}": lambda w, k=kind, n=nested: bitsandbytes_4bit(w, k, n)
        for kind in ("nf4", "fp4")
        for nested in (False, True)
    },
    **{f"hqq, {bits} bits": lambda w, bits=bits: hqq(w, bits) for bits in (1, 2, 3, 4, 8)},
    "torchao int4": torchao_int4,
    "weight norm": weight_norm,
}
