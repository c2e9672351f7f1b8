"""Safetensors headers: what the library writes is read alike, and every kind of damage is named."""

import json

import pytest
import torch
from safetensors.torch import save

from lmd_hf.errors import FormatError
from lmd_hf.weights.header import BITS, read_header


def blob(header, data=b""):
    """A file from a header (JSON or bytes) and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def read(data):
    return read_header("x.safetensors", len(data), lambda start, stop: data[start:stop])


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_what_the_library_writes_is_read_back():
    tensors = {
        "a.weight": torch.ones(3, 4, dtype=torch.bfloat16),
        "b": torch.zeros(2, 2, 5),
        "c": torch.ones(7, dtype=torch.int64),
        "empty": torch.ones(0, 4),
        "scalar": torch.tensor(1.5),
    }
    data = save(tensors, metadata={"format": "pt"})
    found = {t.name: t for t in read(data)}
    assert {name: t.shape for name, t in found.items()} == {name: tuple(t.shape) for name, t in tensors.items()}
    assert found["a.weight"].dtype == "BF16"
    for name, tensor in tensors.items():
        stored = data[found[name].start : found[name].stop]
        assert stored == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "only 0 bytes"),
        (b"1234567", "only 7 bytes"),
        ((10**9).to_bytes(8, "little") + b"{}", "claims 1000000000 bytes but the file has 10"),
        (blob({"a": entry()}, b"1234"), "truncated"),
        (blob(b"\xff\xfe{}"), "not valid JSON"),
        (blob(b"{'a': 1}"), "not valid JSON"),
        (blob([1, 2]), "not a JSON object"),
        (blob({"a": 3}), "lacks dtype, shape or data_offsets"),
        (blob({"a": {"dtype": "F32"}}), "lacks dtype, shape or data_offsets"),
        (blob({"a": entry("F33")}, b"12345678"), "unknown dtype 'F33'; known: BF16"),
        (blob({"a": entry([])}, b"12345678"), "unknown dtype"),
        (blob(b'{"a": {"shape": [' + b"9" * 5000 + b"]}}"), "not valid JSON"),
        (blob(b"[" * 50_000), "not valid JSON"),
        (blob({"a": entry(shape=(-2,))}, b"12345678"), "no non-negative integer"),
        (blob({"a": entry(shape=(2.0,))}, b"12345678"), "no non-negative integer"),
        (blob({"a": entry(shape=(3,))}, b"12345678"), "does not fill its byte range"),
        (blob({"a": entry(offsets=(8, 0))}, b"12345678"), "does not fill its byte range"),
        (blob({"a": entry(), "b": entry(offsets=(4, 12))}, b"123456789012"), "'b' overlaps the tensor before it"),
        (blob({"a": entry(), "b": entry(offsets=(12, 20))}, b"1" * 20), "'b' leaves a gap"),
        (blob({"a": entry(offsets=(99992, 100000))}, b"12345678"), "leaves a gap"),
    ],
)
def test_damage_is_named(data, message):
    with pytest.raises(FormatError, match=message):
        read(data)


def test_all_dtypes_of_safetensors_are_known():
    for dtype, bits in BITS.items():
        data = blob({"a": entry(dtype, (8,), (0, bits))}, b"\0" * bits)
        assert read(data)[0].dtype == dtype


def test_metadata_that_cannot_be_read_say_nothing():
    header = {"__metadata__": {"m.weight": "[" * 50_000}, "m._weight_qdata": entry()}
    assert read(blob(header, b"12345678"))[0].declared is None
