"""GGUF, the file of llama.cpp: header, names and blocks, through the format's own library."""

import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmd_hf.errors import FormatError
from lmd_hf.records import MatrixRef, TensorRef
from lmd_hf.weights.families import Config, gguf_names, gguf_types
from lmd_hf.weights.unpack import E2M1_ROUNDOFF, Unpacked


PLAIN = ("F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64")  # ggml's names of plain types are safetensors' own
BLOCK = 16  # entries: every type's scales hold for this many at least
# The largest magnitude of a block is 2ᵇ⁻¹ steps in the types that are symmetric about 0 …
SYMMETRIC = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 127, "Q3_K": 4, "Q6_K": 32, "TQ1_0": 1, "TQ2_0": 1}
FLOATS = ("MXFP4", "NVFP4")
ARCHITECTURE = "gguf_architecture"  # llama.cpp's own word, among what the metadata tell
PAIRED = "llama"  # the architecture of LLaMA, Mistral and Mixtral


def read_gguf(path: Path, name: str) -> tuple[tuple[TensorRef, ...], dict[str, Any]]:
    """The tensors of a GGUF file (axes in torch's order, (out, in); `dtype` is ggml's name), and the configuration
    that its metadata tell, in transformers' words. Raises `FormatError` if the file is damaged."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        told = _config(reader)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise FormatError(f"{path}: not a readable GGUF file ({error}); download it again") from None
    tensors = []
    for tensor in reader.tensors:
        start, shape = int(tensor.data_offset), tuple(int(size) for size in reversed(tensor.shape.tolist()))
        if start + int(tensor.n_bytes) > path.stat().st_size:
            raise FormatError(f"{path}: '{tensor.name}' ends beyond the file; truncated: download it again")
        tensors.append(TensorRef(tensor.name, name, start, start + int(tensor.n_bytes), tensor.tensor_type.name, shape))
    rows = {tensor.name: tensor.shape[0] for tensor in tensors if tensor.shape}
    vocabulary = {"vocab_size": rows["token_embd.weight"]} if "token_embd.weight" in rows else {}
    return tuple(tensors), told | vocabulary


def _config(reader: Any) -> dict[str, Any]:
    def get(key: str) -> Any:
        field = reader.get_field(key)
        return None if field is None else field.contents()

    architecture = str(get("general.architecture"))
    values = {
        "num_hidden_layers": get(f"{architecture}.block_count"),
        "hidden_size": get(f"{architecture}.embedding_length"),
        "intermediate_size": get(f"{architecture}.feed_forward_length"),
        "num_attention_heads": get(f"{architecture}.attention.head_count"),
        "num_key_value_heads": get(f"{architecture}.attention.head_count_kv"),
        "head_dim": get(f"{architecture}.attention.key_length"),
        "num_local_experts": get(f"{architecture}.expert_count"),
    }
    known = {key: value for key, value in values.items() if isinstance(value, int)}
    return {"model_type": gguf_types().get(architecture, architecture), ARCHITECTURE: architecture, **known}


def in_model_order(ref: MatrixRef, config: Config) -> MatrixRef:
    """A matrix with its rows in the order of transformers. llama.cpp stores LLaMA's queries and keys for a rotary form
    that turns neighbouring rows, where transformers turns the halves of a head: of each head the even rows come first,
    then the odd ones (as transformers' `LlamaTensorProcessor` has it)."""
    counts = {"q": ("num_attention_heads",), "k": ("num_key_value_heads", "num_attention_heads")}
    heads = config.get(*counts.get(ref.role, ()))
    known = config.get(ARCHITECTURE) == PAIRED and isinstance(heads, int) and heads > 0
    if not known or ref.shape[0] % (2 * heads):
        return ref
    size = ref.shape[0] // heads
    starts = range(0, ref.shape[0], size)
    return replace(ref, rows=tuple((start + odd, start + size, 2) for start in starts for odd in (0, 1)))


@cache
def module_name(name: str) -> str:
    """What transformers would call a tensor of a GGUF file: `blk.3.attn_q` → `model.layers.3.self_attn.q_proj`.
    A name that the table of families.toml does not know keeps its own words."""
    for pattern, replacement in gguf_names().items():
        name = re.sub(rf"(^|\.){pattern}(?=\.|$)", rf"\g<1>{replacement}", name)
    return name


def dequantise(raw: Tensor, kind: str) -> Unpacked:
    """W in float32 from the bytes of its rows, by ggml's own definition of the type (`gguf.quants`).

    How coarse the blocks are is read off their largest entries: exact where a block uses its outermost level, else an
    estimate from below.
    """
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    try:
        values = torch.from_numpy(np.ascontiguousarray(dequantize(raw.numpy(), GGMLQuantizationType[kind]))).float()
    except NotImplementedError:
        raise ValueError(f"stored as {kind}, which the gguf package cannot dequantise") from None
    if kind in FLOATS:
        return Unpacked(values, roundoff=E2M1_ROUNDOFF)
    blocks = values.reshape(*values.shape[:-1], -1, BLOCK)
    if kind in SYMMETRIC:
        step = blocks.abs().amax(-1) / SYMMETRIC[kind]
    else:
        bits = int(re.sub(r"\D*(\d).*", r"\1", kind))  # Q4_K, IQ2_XXS …
        step = (blocks.amax(-1) - blocks.amin(-1)) / (2**bits - 1)
    return Unpacked(values, half_step=step / 2)
