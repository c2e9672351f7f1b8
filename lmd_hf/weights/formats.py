"""Which stored tensors together are one weight: the formats that checkpoints use, recognised from headers.

A format is data: the endings of its tensors' names, the test that tells it from its neighbours, the shape of the
weight, and the function of `unpack` that computes it. Adding one is one entry of `FORMATS`.
"""

import math
import re
from collections.abc import Callable, Container, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lmd_hf.errors import first_line
from lmd_hf.records import TensorRef, Weight
from lmd_hf.weights import gguf, unpack
from lmd_hf.weights.grids import sizes
from lmd_hf.weights.lora import is_adapter, list_adapter_weights
from lmd_hf.weights.unpack import Unpacked


Parts = dict[str, TensorRef]
Read = Callable[[TensorRef], Tensor]
FP8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
FLOATS = ("F32", "F16", "BF16", "F64")
BYTES = ("U8", "I8")
SMALL_READS = 16  # at a time
INGREDIENT = (
    "one of the tensors that its weight is computed from; save a copy without the parametrisation "
    "(torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.remove_spectral_norm)"
)


@dataclass(frozen=True)
class Format:
    """How a weight is stored. `parts` are the arguments of `unpack` and the endings of the tensors' names that may
    hold them, the largest tensor first; those in `optional` may be missing. `weight` ends the name that the module
    gives the weight. `dtypes` are those of the largest tensor, `fits` looks at the other headers, and `shape` may
    read the small tensors among the parts."""

    unpack: Callable[..., Unpacked]
    parts: Mapping[str, tuple[str, ...]]
    dtypes: tuple[str, ...]
    shape: Callable[[Parts, Read], tuple[int, ...]]
    optional: tuple[str, ...] = ()
    weight: str = ".weight"
    fits: Callable[[Parts, dict[str, Any]], bool] = field(default=lambda parts, settings: True)

    def key(self, name: str) -> str:
        """Which part a tensor is, from its name: the longest ending that fits."""
        endings = [(e, key) for key, ends in self.parts.items() for e in ends if name.endswith(e)]
        return max(endings, key=lambda pair: len(pair[0]))[1]


def _same(parts: Parts, read: Read) -> tuple[int, ...]:
    return parts["weight"].shape


def _two_a_byte(parts: Parts, read: Read) -> tuple[int, ...]:
    *rest, columns = parts["weight"].shape
    return (*rest, 2 * columns)


def _stored_shape(parts: Parts, read: Read) -> tuple[int, ...]:
    return _held(parts["weight"], sizes(read(parts["shape"]).tolist()))


def _quant_state_shape(parts: Parts, read: Read) -> tuple[int, ...]:
    return _held(parts["weight"], unpack.quant_state(read(parts["state"]))["shape"])


def _held(tensor: TensorRef, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape that is stored beside a tensor; `ValueError` if it is no matrix's, or of more values than the tensor has
    bits."""
    if len(shape) < 2 or math.prod(shape) > 8 * (tensor.stop - tensor.start):
        raise ValueError(f"{shape} is not the shape of what {tensor.stop - tensor.start} bytes hold")
    return shape


def _gptq_shape(parts: Parts, read: Read) -> tuple[int, ...]:
    return unpack.gptq_sizes(*(parts[key].shape for key in ("weight", "zero", "scale")))[:2]


def _awq_shape(parts: Parts, read: Read) -> tuple[int, ...]:
    return parts["weight"].shape[1] * 8, parts["weight"].shape[0]


def _gpt_oss_shape(parts: Parts, read: Read) -> tuple[int, ...]:
    experts, rows, groups, size = parts["weight"].shape
    return experts, groups * size * 2, rows


def _is_gptq(parts: Parts, settings: dict[str, Any]) -> bool:
    layout = str(settings.get("checkpoint_format", "gptq")) + str(settings.get("packing_format", ""))
    other = any(word in layout for word in ("marlin", "bitblas", "awq", "exllama:", "qqq"))
    return not other and parts["weight"].shape[1:] == parts["scale"].shape[1:]


def _version(number: str) -> Callable[[Parts, dict[str, Any]], bool]:
    return lambda parts, settings: (
        _is_gptq(parts, settings) and ("v2" in str(settings.get("checkpoint_format"))) == (number == "v2")
    )


def _is_normed(parts: Parts, settings: dict[str, Any]) -> bool:
    """Whether the first of two tensors can be the lengths of the second's slices, or its own."""
    gain, shape = parts["gain"].shape, parts["weight"].shape
    return not gain or (len(gain) == len(shape) and all(g in (1, w) for g, w in zip(gain, shape, strict=True)))


def _is_mxfp4(parts: Parts, settings: dict[str, Any]) -> bool:
    """Whether every 16 bytes, of two numbers each, have an exponent: MXFP6 has one for every 24."""
    whole = tuple(16 * n for n in parts["scale"].shape[-1:]) == parts["weight"].shape[-1:]
    return whole and parts["scale"].dtype in ("F8_E8M0", "U8")


def _declared_shape(parts: Parts, read: Read | None = None) -> tuple[int, ...]:
    declared = parts["weight"].declared
    return () if declared is None else declared[1]


def _is_torchao(parts: Parts, *kinds: str) -> bool:
    """Whether the file's metadata call the weight so, or say nothing."""
    declared = parts["weight"].declared
    return declared is None or declared[0] in kinds


_PRE = {"pre": ("._weight_act_pre_scale",)}  # AWQ's and SmoothQuant's factor of the input
_GPTQ_PARTS = {"weight": (".qweight",), "zero": (".qzeros",), "scale": (".scales",), "g_idx": (".g_idx",)}
_SCALES = (".weight_scale_inv", ".weight_scale", ".qscale_weight", ".scale_weight", ".scale")
_STATE = tuple(f".weight.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))

FORMATS = {
    "fp8": Format(unpack.scaled_float, {"weight": (".weight",), "scale": _SCALES}, FP8, _same),
    "fp8 experts": Format(
        unpack.scaled_float,
        {"weight": ("_proj",), "scale": ("_proj_scale_inv", "_proj_scale", "_proj_weight_scale")},
        FP8,
        _same,
        weight="_proj",
    ),
    "mxfp4": Format(
        unpack.mxfp4_blocks, {"weight": ("_blocks",), "scale": ("_scales",)}, ("U8",), _gpt_oss_shape, weight=""
    ),
    "bitsandbytes-4bit": Format(
        unpack.bitsandbytes_4bit,
        {
            "weight": (".weight",),
            "absmax": (".weight.absmax",),
            "code": (".weight.quant_map",),
            "state": _STATE,
            "nested_absmax": (".weight.nested_absmax",),
            "nested_code": (".weight.nested_quant_map",),
        },
        ("U8", "I8", "BF16", "F16", "F32"),
        _quant_state_shape,
        optional=("nested_absmax", "nested_code"),
    ),
    "bitsandbytes-int8": Format(unpack.bitsandbytes_int8, {"weight": (".weight",), "scale": (".SCB",)}, ("I8",), _same),
    "bitnet": Format(
        unpack.bitnet,
        {"weight": (".weight",), "scale": (".weight_scale",)},
        BYTES,
        lambda parts, read: (4 * parts["weight"].shape[0], parts["weight"].shape[1]),
        fits=lambda parts, settings: settings.get("quant_method") == "bitnet",
    ),
    "nvfp4 modelopt": Format(
        unpack.fp4,
        {"weight": (".weight",), "scale": (".weight_scale",), "factor": (".weight_scale_2",)},
        BYTES,
        _two_a_byte,
        fits=lambda parts, settings: parts["scale"].dtype in FP8,
    ),
    "fp4": Format(
        unpack.fp4,
        {"weight": (".weight",), "scale": _SCALES},
        BYTES,
        _two_a_byte,
        fits=_is_mxfp4,
    ),
    "int8": Format(
        unpack.scaled_int,
        {"weight": (".weight",), "scale": (".weight_scale",), "zero": (".weight_zero_point",)},
        ("I8",),
        _same,
        optional=("zero",),
    ),
    "nvfp4": Format(
        unpack.fp4,
        {"weight": (".weight_packed",), "scale": (".weight_scale",), "divisor": (".weight_global_scale",)},
        BYTES,
        _two_a_byte,
    ),
    "mxfp4 packed": Format(
        unpack.fp4,
        {"weight": (".weight_packed",), "scale": (".weight_scale",)},
        BYTES,
        _two_a_byte,
        fits=_is_mxfp4,
    ),
    "pack-quantized": Format(
        unpack.packed_int,
        {
            "weight": (".weight_packed",),
            "scale": (".weight_scale",),
            "shape": (".weight_shape",),
            "zero": (".weight_zero_point",),
            "g_idx": (".weight_g_idx",),
        },
        ("I32",),
        _stored_shape,
        optional=("zero", "g_idx"),
    ),
    "gptq": Format(unpack.gptq, _GPTQ_PARTS, ("I32",), _gptq_shape, optional=("g_idx",), fits=_version("v1")),
    "gptq-v2": Format(unpack.gptq_v2, _GPTQ_PARTS, ("I32",), _gptq_shape, optional=("g_idx",), fits=_version("v2")),
    "awq": Format(
        unpack.awq,
        {"weight": (".qweight",), "zero": (".qzeros",), "scale": (".scales",)},
        ("I32",),
        _awq_shape,
        fits=lambda parts, settings: tuple(8 * n for n in parts["weight"].shape[1:]) == parts["scale"].shape[1:],
    ),
    "hqq": Format(
        unpack.hqq,
        {
            "weight": (".W_q",),
            "scale": (".scale",),
            "zero": (".zero",),
            "shape": (".shape",),
            "bits": (".nbits",),
        },
        ("U8", "I32"),
        _stored_shape,
    ),
    "torchao-float8": Format(
        unpack.fed_by(unpack.scaled_float),
        {"weight": ("._weight_qdata",), "scale": ("._weight_scale",), **_PRE},
        FP8,
        _same,
        optional=("pre",),
        fits=lambda parts, settings: parts["scale"].dtype != "F8_E8M0" and _is_torchao(parts, "Float8Tensor"),
    ),
    "torchao-mxfp8": Format(
        unpack.torchao_fp8,
        {"weight": ("._weight_qdata",), "scale": ("._weight_scale",)},
        FP8,
        _same,
        fits=lambda parts, settings: parts["scale"].dtype == "F8_E8M0" and _is_torchao(parts, "MXTensor"),
    ),
    "torchao-fp4": Format(
        unpack.torchao_fp4,
        {"weight": ("._weight_qdata",), "scale": ("._weight_scale",), "factor": ("._weight_per_tensor_scale",)},
        ("U8",),
        _two_a_byte,
        optional=("factor",),
        fits=lambda parts, settings: _is_torchao(parts, "NVFP4Tensor", "MXTensor"),
    ),
    "torchao-int8": Format(
        unpack.fed_by(unpack.scaled_int),
        {"weight": ("._weight_qdata",), "scale": ("._weight_scale",), "zero": ("._weight_zero_point",), **_PRE},
        ("I8",),
        _same,
        optional=("zero", "pre"),
        fits=lambda parts, settings: (
            (math.prod(parts["scale"].shape) == 1 or parts["scale"].shape[:1] == parts["weight"].shape[:1])
            and _is_torchao(parts, "Int8Tensor", "IntxUnpackedToInt8Tensor")
        ),
    ),
    "torchao-int4": Format(
        unpack.fed_by(unpack.torchao_int4),
        {"weight": ("._weight_qdata",), "scale": ("._weight_scale",), "zero": ("._weight_zero_point",), **_PRE},
        BYTES,
        _two_a_byte,
        optional=("pre",),
        fits=lambda parts, settings: (
            parts["scale"].shape[1:] == parts["weight"].shape[:1] and _is_torchao(parts, "Int4Tensor")
        ),
    ),
    "torchao-int4 words": Format(
        unpack.fed_by(unpack.torchao_int4_words),
        {"weight": ("._weight_qdata",), "scale": ("._weight_scale",), "zero": ("._weight_zero_point",), **_PRE},
        ("I32",),
        lambda parts, read: (parts["weight"].shape[0], 8 * parts["weight"].shape[1]),
        optional=("pre",),
        fits=lambda parts, settings: parts["zero"].dtype == "I8" and _is_torchao(parts, "Int4PlainInt32Tensor"),
    ),
    "torchao-int4 tiles": Format(
        unpack.fed_by(unpack.torchao_int4_tiles),
        {"weight": ("._weight_qdata",), "scale_zero": ("._weight_scale_and_zero",), **_PRE},
        ("I32",),
        _declared_shape,
        optional=("pre",),
        fits=lambda parts, settings: (
            len(_declared_shape(parts)) == 2 and _is_torchao(parts, "Int4TilePackedTo4dTensor")
        ),
    ),
    "weight-norm": Format(
        unpack.weight_norm,
        {
            "weight": (".parametrizations.weight.original1", ".weight_v"),
            "gain": (".parametrizations.weight.original0", ".weight_g"),
        },
        FLOATS,
        _same,
        fits=_is_normed,
    ),
    "pruned": Format(
        unpack.pruned,
        {"weight": (".weight_orig",), "mask": (".weight_mask",)},
        FLOATS,
        _same,
        fits=lambda parts, settings: parts["mask"].shape == parts["weight"].shape,
    ),
}


def list_weights(tensors: Iterable[TensorRef], config: dict[str, Any] | None, read: Read) -> tuple[Weight, ...]:
    """The weights that the network knows, each with the stored tensors that make it, in the order of the file; what
    no format claims is a weight of its own, as it is. `read` is asked for small tensors only (a shape, a JSON state).
    """
    if config is not None and is_adapter(config):
        return list_adapter_weights(tensors, config)
    settings = (config or {}).get("quantization_config") or (config or {}).get("compression_config") or {}
    by_name = {tensor.name: tensor for tensor in tensors}
    found: dict[str, tuple[str, str, Parts]] = {}  # name of the largest tensor → (format, weight's name, parts)
    for name, layout in FORMATS.items():
        for tensor in by_name.values():
            if tensor.dtype not in layout.dtypes or tensor.name in found:
                continue
            for ending in next(iter(layout.parts.values())):
                if not tensor.name.endswith(ending):
                    continue
                stem = tensor.name.removesuffix(ending)
                parts = _parts(stem, layout, by_name) | {"weight": tensor}
                if layout.parts.keys() - parts.keys() <= set(layout.optional) and layout.fits(parts, settings):
                    found[tensor.name] = (name, stem + layout.weight, parts)
    asking = [n for n, (layout, _, _) in found.items() if FORMATS[layout].shape in (_stored_shape, _quant_state_shape)]
    with ThreadPoolExecutor(SMALL_READS) as pool:  # each is a round trip where the file is far away
        told = dict(zip(asking, pool.map(lambda name: _shape(found[name], read), asking), strict=True))
    shapes = {name: told[name] if name in told else _shape(parts, read) for name, parts in found.items()}
    return tuple(_weight(*found[name], *shapes[name]) if name in found else _alone(t) for name, t in by_name.items())


def is_ingredient(name: str, names: Container[str]) -> bool:
    """Whether a tensor is but one of those that torch computes a weight from before every forward pass."""
    if re.search(r"(?:^|\.)parametrizations\.", name):
        return True
    found = re.fullmatch(r"((?:.*\.)?weight\w*)_(orig|mask|v|g)", name)
    beside = {"orig": ("mask", "u"), "mask": ("orig",), "v": ("g", "orig"), "g": ("v",)}
    return found is not None and any(f"{found[1]}_{ending}" in names for ending in beside[found[2]])


def _shape(found: tuple[str, str, Parts], read: Read) -> tuple[tuple[int, ...], str]:
    """The weight's shape, or that of its largest tensor and why it has none."""
    layout, _, parts = found
    try:
        return FORMATS[layout].shape(parts, read), ""
    except (ValueError, LookupError) as error:
        return parts["weight"].shape, _misfit(layout, error)


def _misfit(layout: str, error: Exception) -> str:
    return f"its {layout} tensors do not fit together ({first_line(error)})"


def _parts(stem: str, layout: Format, by_name: dict[str, TensorRef]) -> Parts:
    candidates = {key: (stem + ending for ending in endings) for key, endings in layout.parts.items()}
    present = {key: next((by_name[n] for n in names if n in by_name), None) for key, names in candidates.items()}
    return {key: tensor for key, tensor in present.items() if tensor is not None}


def _weight(layout: str, name: str, parts: Parts, shape: tuple[int, ...], unread: str) -> Weight:
    tensors = tuple(parts[key] for key in FORMATS[layout].parts if key in parts)
    return Weight(name, shape, parts["weight"].dtype, layout, tensors, unread=unread)


def _alone(tensor: TensorRef) -> Weight:
    """A tensor that is a weight by itself; in a GGUF file under llama.cpp's name, and perhaps in ggml's blocks."""
    if not tensor.file.endswith(".gguf"):
        return Weight(tensor.name, tensor.shape, tensor.dtype, "plain", (tensor,))
    layout = "plain" if tensor.dtype in gguf.PLAIN else "gguf"
    return Weight(gguf.module_name(tensor.name), tensor.shape, tensor.dtype, layout, (tensor,))


def unpack_weight(layout: str, tensors: tuple[TensorRef, ...], read: Read) -> Unpacked:
    """The weight that these tensors make; `read` returns their entries. `ValueError` if they do not fit together."""
    if layout == "plain":
        return unpack.plain(read(tensors[0]))
    if layout == "gguf":
        return gguf.dequantise(read(tensors[0]), tensors[0].dtype)
    known = FORMATS[layout]
    parts: dict[str, Any] = {known.key(tensor.name): read(tensor) for tensor in tensors}
    if known.shape is _declared_shape:
        parts["shape"] = _declared_shape({"weight": tensors[0]})
    try:
        return known.unpack(**parts)
    except (RuntimeError, LookupError, ValueError) as error:
        raise ValueError(_misfit(layout, error)) from None
