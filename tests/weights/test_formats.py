"""Stored formats: quantised by each format's definition (and by its own library where that is installed), read back,
and compared entry by entry; then the singular values against float64 LAPACK on the dequantised matrix."""

import json
import math
from functools import lru_cache

import pytest
import torch
from models import make
from safetensors.torch import load_file, save_file
from stored import E2M1, FORMATS, groups, pack_awq, pack_bits, scale_order, tile_order, torchao_int4, two_a_byte

import lmd_hf
from lmd_hf.weights.inventory import list_matrices
from lmd_hf.weights.source import open_source
from lmd_hf.weights.stored import read_stored


OUT, IN = 192, 256
NAME = "model.layers.0.mlp.down_proj"
WORDS = torch.zeros(IN // 8, OUT, dtype=torch.int32)


def random(*shape, seed=0, scale=0.02):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def read(folder, tensors, metadata=None, **quantization):
    """The one matrix in a checkpoint of these tensors."""
    folder.mkdir(exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors", metadata)
    if quantization:
        (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    source = open_source(folder)
    inventory = list_matrices(source)
    assert len(inventory.selected) == 1, inventory
    assert {s.reason for s in inventory.skipped} <= {f"companion of {inventory.selected[0].name}", "vector"}
    counted = sum(math.prod(item.shape) for item in (*inventory.selected, *inventory.skipped))
    assert counted == inventory.parameters
    return inventory.selected[0], read_stored(source, inventory.selected[0])


@pytest.mark.parametrize("tile", [(128, 128), (1, IN), (OUT, IN), (64, 64)])
@pytest.mark.parametrize("ending", ["weight_scale_inv", "weight_scale"])
def test_fp8_with_tiles_rows_or_one_scale(tmp_path, tile, ending):
    rows, columns = (math.ceil(size / step) for size, step in zip((OUT, IN), tile, strict=True))
    scale = random(rows, columns, seed=1).abs() + 0.01
    q = random(OUT, IN, scale=1).to(torch.float8_e4m3fn)
    expected = torch.stack(
        [torch.stack([q[i, j].float() * scale[i // tile[0], j // tile[1]] for j in range(IN)]) for i in range(OUT)]
    )
    stored = scale.flatten()[0] if scale.numel() == 1 else scale
    ref, found = read(tmp_path, {f"{NAME}.weight": q, f"{NAME}.{ending}": stored})
    assert torch.equal(found.matrix, expected)
    assert (ref.stored, ref.shape, ref.dtype, found.rounding.relative) == ("fp8", (OUT, IN), "F8_E4M3", 2**-4)


def test_fp8_scales_may_be_powers_of_two(tmp_path):
    q = random(OUT, IN, scale=1).to(torch.float8_e5m2)
    exponents = torch.randint(120, 130, (OUT, IN // 32), dtype=torch.uint8)
    _, found = read(tmp_path, {f"{NAME}.weight": q, f"{NAME}.weight_scale": exponents})
    scale = 2.0 ** (exponents.double() - 127)
    assert torch.equal(found.matrix.double(), q.double() * scale.repeat_interleave(32, 1))
    assert found.rounding.relative == 2**-3


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("ordered", ["no g_idx", "in order", "act order"])
def test_gptq(tmp_path, bits, version, ordered):
    group = 64
    codes, scale, zero = groups(random(OUT, IN), bits, group)
    if version == "gptq":
        zero = zero.clamp(min=1)  # the first layout stores z − 1
    index = torch.arange(IN, dtype=torch.int32) // group
    if ordered == "act order":
        index = index[torch.randperm(IN, generator=torch.Generator().manual_seed(2))]
    expected = (codes - zero[:, index.long()]) * scale[:, index.long()]
    tensors = {
        f"{NAME}.qweight": pack_bits(codes, bits).T,
        f"{NAME}.qzeros": pack_bits(zero.T - int(version == "gptq"), bits),
        f"{NAME}.scales": scale.T.half(),
    }
    if ordered != "no g_idx":
        tensors[f"{NAME}.g_idx"] = index
    ref, found = read(tmp_path, tensors, quant_method="gptq", bits=bits, group_size=group, checkpoint_format=version)
    assert torch.equal(found.matrix, expected)
    assert (ref.shape, ref.stored) == ((OUT, IN), version.replace("_", "-"))
    assert found.rounding.absolute == pytest.approx(float((scale / 2).double().square().mean().sqrt()), rel=1e-6)


def test_awq(tmp_path):
    codes, scale, zero = groups(random(OUT, IN), 4, 32)

    tensors = {f"{NAME}.qweight": pack_awq(codes.T), f"{NAME}.qzeros": pack_awq(zero.T)}
    tensors[f"{NAME}.scales"] = scale.T.half()
    ref, found = read(tmp_path, tensors, quant_method="awq", bits=4, version="gemm")
    spread = [values.repeat_interleave(32, 1) for values in (scale, zero)]
    assert torch.equal(found.matrix, (codes - spread[1]) * spread[0])
    assert (ref.stored, ref.shape) == ("awq", (OUT, IN))


def e2m1_codes(*shape):
    return torch.randint(0, 16, shape, generator=torch.Generator().manual_seed(3), dtype=torch.uint8)


def test_mxfp4_experts_of_gpt_oss(tmp_path):
    experts, groups_, rows = 3, 4, 2 * OUT
    codes = e2m1_codes(experts, rows, groups_ * 32)
    exponents = torch.randint(118, 124, (experts, rows, groups_), dtype=torch.uint8)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    config = {"model_type": "gpt_oss", "num_hidden_layers": 1, "hidden_size": 128, "intermediate_size": OUT}
    config |= {"num_local_experts": experts, "vocab_size": 32, "num_attention_heads": 2, "head_dim": 64}
    config |= {"num_key_value_heads": 1, "architectures": ["GptOssForCausalLM"]}
    save_file(
        {f"{name}_blocks": two_a_byte(codes).reshape(experts, rows, groups_, 16), f"{name}_scales": exponents},
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = open_source(tmp_path)
    inventory = list_matrices(source)
    expected = E2M1[codes.int()] * torch.exp2(exponents.float() - 127).repeat_interleave(32, -1)
    assert [(ref.role, ref.expert) for ref in inventory.selected] == [(r, e) for r in ("gate", "up") for e in range(3)]
    for ref in inventory.selected:
        start = 0 if ref.role == "gate" else 1
        found = read_stored(source, ref)
        assert torch.equal(found.matrix, expected[ref.expert, start::2])
        assert found.rounding.relative == 2**-2
    assert inventory.parameters == codes.numel() + exponents.numel()


@pytest.mark.parametrize("kind", ["compressed-tensors", "modelopt", "mx"])
def test_fp4_in_bytes(tmp_path, kind):
    codes = e2m1_codes(OUT, IN)
    size = 32 if kind == "mx" else 16
    scale = (random(OUT, IN // size, scale=1).abs() + 1).to(torch.float8_e4m3fn)
    tensor_scale = torch.tensor([3.7])
    if kind == "mx":
        scale = torch.randint(120, 130, (OUT, IN // size), dtype=torch.uint8)
        factor, tensors = 2.0 ** (scale.float() - 127), {f"{NAME}.weight_packed": two_a_byte(codes)}
    elif kind == "modelopt":
        factor = scale.float() * tensor_scale
        tensors = {f"{NAME}.weight": two_a_byte(codes), f"{NAME}.weight_scale_2": tensor_scale[0]}
    else:
        factor = scale.float() / tensor_scale
        tensors = {f"{NAME}.weight_packed": two_a_byte(codes), f"{NAME}.weight_global_scale": tensor_scale}
    ref, found = read(tmp_path, tensors | {f"{NAME}.weight_scale": scale})
    assert torch.equal(found.matrix, E2M1[codes.int()] * factor.repeat_interleave(size, 1))
    assert ref.shape == (OUT, IN)


def test_mxfp6_is_not_taken_for_mxfp4(tmp_path):
    packed, scale = torch.zeros(OUT, IN * 6 // 8, dtype=torch.uint8), torch.zeros(OUT, IN // 32, dtype=torch.uint8)
    save_file({f"{NAME}.weight_packed": packed, f"{NAME}.weight_scale": scale}, tmp_path / "model.safetensors")
    inventory = list_matrices(open_source(tmp_path))
    assert not inventory.selected
    assert any("stored as U8, a format that is not read" in item.reason for item in inventory.skipped)
    assert inventory.parameters == packed.numel() + scale.numel()


def test_int8_by_row_and_by_tensor(tmp_path):
    q = torch.randint(-127, 128, (OUT, IN), dtype=torch.int8)
    for index, scale in enumerate((torch.rand(OUT, 1).bfloat16(), torch.rand(1))):
        _, found = read(tmp_path / str(index), {f"{NAME}.weight": q, f"{NAME}.weight_scale": scale})
        assert torch.equal(found.matrix, q.float() * scale.float())


@pytest.mark.parametrize("kind", ["float8", "int8"])
def test_torchaos_names(tmp_path, kind):
    """What `flatten_tensor_state_dict` writes: `_weight_qdata`, `_weight_scale` and perhaps `_weight_zero_point`."""
    scale, stem = torch.rand(OUT, 1) + 0.1, f"{NAME}._weight"
    if kind == "float8":
        q, zero = random(OUT, IN, scale=1).to(torch.float8_e4m3fn), torch.zeros(OUT, 1)
        tensors = {f"{stem}_qdata": q, f"{stem}_scale": scale}
    else:
        q, zero = torch.randint(-8, 8, (OUT, IN), dtype=torch.int8), torch.randint(-3, 3, (OUT, 1), dtype=torch.int8)
        tensors = {f"{stem}_qdata": q, f"{stem}_scale": scale, f"{stem}_zero_point": zero}
    ref, found = read(tmp_path, tensors, quant_method="torchao")
    assert torch.equal(found.matrix, (q.float() - zero.float()) * scale)
    assert (ref.stored, ref.role) == (f"torchao-{kind}", "down")


def torchao(kind, shape=(OUT, IN)):
    """What torchao writes into the metadata of a safetensors file."""
    return {f"{NAME}.weight": json.dumps({"_type": kind, "_data": {"block_size": [1, 64], "shape": shape}})}


@pytest.mark.parametrize("metadata", [None, torchao("Int4Tensor")])
@pytest.mark.parametrize("size", [64, IN, 2])
def test_torchaos_int4(tmp_path, metadata, size):
    tensors, expected = torchao_int4(random(OUT, IN), size)
    ref, found = read(tmp_path, {f"{NAME}.{key}": value for key, value in tensors.items()}, metadata)
    assert torch.allclose(found.matrix.double(), expected, rtol=0, atol=1e-8)
    assert (ref.stored, ref.shape, ref.role) == ("torchao-int4", (OUT, IN), "down")
    step = tensors["_weight_scale"].double() / 2
    assert found.rounding.absolute == pytest.approx(float(step.square().mean().sqrt()), rel=1e-6)


def test_torchaos_int4_with_the_factor_of_its_input(tmp_path):
    """AWQ: the layer computes W·(pre ∘ x)."""
    tensors, expected = torchao_int4(random(OUT, IN))
    pre = torch.rand(IN).bfloat16() + 0.5
    tensors |= {"_weight_act_pre_scale": pre}
    ref, found = read(tmp_path, {f"{NAME}.{key}": value for key, value in tensors.items()}, torchao("Int4Tensor"))
    assert torch.allclose(found.matrix, expected * pre.double(), rtol=0, atol=1e-8)
    assert ref.stored == "torchao-int4"


def test_torchaos_int4_in_words(tmp_path):
    codes, scale, zero = groups(random(OUT, IN), 4, 64)
    stem = f"{NAME}._weight"
    tensors = {f"{stem}_qdata": pack_bits(codes, 4), f"{stem}_scale": scale.T, f"{stem}_zero_point": zero.T.char()}
    ref, found = read(tmp_path, tensors, torchao("Int4PlainInt32Tensor"))
    assert torch.equal(found.matrix, (codes - zero.repeat_interleave(64, 1)) * scale.repeat_interleave(64, 1))
    assert (ref.stored, ref.shape) == ("torchao-int4 words", (OUT, IN))


@pytest.mark.parametrize("inner", [2, 8])
def test_torchaos_int4_in_the_order_of_tensor_cores(tmp_path, inner):
    """13 × 200, padded to 16 × 256: every code where the kernel puts it, the padding gone."""
    codes = torch.randint(0, 16, (16, IN), generator=torch.Generator().manual_seed(0))
    scale, zero = random(16, 4, seed=1).bfloat16(), random(16, 4, seed=2).bfloat16()
    grids = torch.stack((scale, zero), -1).transpose(0, 1)
    tensors = {f"{NAME}._weight_qdata": tile_order(codes, inner), f"{NAME}._weight_scale_and_zero": grids}
    pre = torch.rand(200) + 0.5
    tensors[f"{NAME}._weight_act_pre_scale"] = pre
    ref, found = read(tmp_path, tensors, torchao("Int4TilePackedTo4dTensor", (13, 200)))
    spread = [grid.double().repeat_interleave(64, 1) for grid in (scale, zero)]
    expected = ((codes - 8) * spread[0] + spread[1])[:13, :200] * pre.double()
    assert torch.allclose(found.matrix, expected, rtol=0, atol=1e-8)
    assert (ref.stored, ref.shape) == ("torchao-int4 tiles", (13, 200))


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4", "mxfp8"])
@pytest.mark.parametrize("rows", [OUT, 128])
@pytest.mark.parametrize("swizzled", [False, True])
def test_torchaos_block_scales_in_both_orders(tmp_path, kind, rows, swizzled):
    size = 16 if kind == "nvfp4" else 32
    codes = e2m1_codes(rows, IN)
    q = random(rows, IN, scale=1).to(torch.float8_e4m3fn) if kind == "mxfp8" else two_a_byte(codes)
    exponents = torch.randint(120, 130, (rows, IN // size), dtype=torch.uint8).view(torch.float8_e8m0fnu)
    scale = (random(rows, IN // size, scale=1).abs() + 1).to(torch.float8_e4m3fn) if kind == "nvfp4" else exponents
    stored = scale_order(scale) if swizzled else scale
    tensors = {f"{NAME}._weight_qdata": q, f"{NAME}._weight_scale": stored}
    factor = torch.tensor(0.37 if kind == "nvfp4" else 1.0)
    if kind == "nvfp4":
        tensors[f"{NAME}._weight_per_tensor_scale"] = factor
    ref, found = read(tmp_path, tensors, torchao("NVFP4Tensor" if kind == "nvfp4" else "MXTensor"))
    values = q.float() if kind == "mxfp8" else E2M1[codes.int()]
    assert torch.allclose(found.matrix, values * (scale.float() * factor).repeat_interleave(size, 1), rtol=2**-22)
    assert (ref.shape, ref.stored) == ((rows, IN), "torchao-mxfp8" if kind == "mxfp8" else "torchao-fp4")


def test_a_packing_of_torchao_that_only_a_device_knows_is_listed_with_its_class(tmp_path):
    tensors = {f"{NAME}._weight_qdata": WORDS, f"{NAME}._weight_scale": torch.ones(4, OUT)}
    save_file(tensors, tmp_path / "model.safetensors", torchao("Int4PreshuffledTensor"))
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "torchao"}}))
    reasons = [skipped.reason for skipped in list_matrices(open_source(tmp_path)).skipped]
    assert any("stored as I32 by 'torchao' (Int4PreshuffledTensor), a format that is not read" in r for r in reasons)


@pytest.mark.parametrize(
    "entry", ["no JSON", "3", '{"_type": 1}', '{"_type": "Int4Tensor", "_data": {"shape": ["x"]}}']
)
def test_metadata_that_say_nothing_are_passed_over(tmp_path, entry):
    tensors, _ = torchao_int4(random(OUT, IN))
    tensors = {f"{NAME}.{key}": value for key, value in tensors.items()}
    assert read(tmp_path, tensors, {f"{NAME}.weight": entry})[0].stored == "torchao-int4"


def test_fp8_without_a_scale_is_its_own_value(tmp_path):
    q = random(OUT, IN, scale=1).to(torch.float8_e4m3fn)
    save_file({f"{NAME}.weight": q}, tmp_path / "model.safetensors")
    row = lmd_hf.analyze(tmp_path).matrices[0]
    assert row.singular_values == pytest.approx(torch.linalg.svdvals(q.double()).numpy(), rel=1e-7)
    assert (row.dtype, row.stored) == ("F8_E4M3", "plain")


def test_bitsandbytes_int8(tmp_path):
    w = random(OUT, IN)
    largest = w.abs().amax(1)
    q = (w * 127 / largest[:, None]).round().to(torch.int8)
    ref, found = read(tmp_path, {f"{NAME}.weight": q, f"{NAME}.SCB": largest, f"{NAME}.weight_format": torch.tensor(0)})
    assert torch.allclose(found.matrix.double(), q.double() * largest.double()[:, None] / 127, rtol=2**-22, atol=0)
    assert ref.stored == "bitsandbytes-int8"


def test_bitnet(tmp_path):
    w = torch.randint(-1, 2, (OUT, IN), generator=torch.Generator().manual_seed(0))
    rows = (w + 1).to(torch.uint8).reshape(4, OUT // 4, IN)
    packed = rows[0] | rows[1] << 2 | rows[2] << 4 | rows[3] << 6
    tensors = {f"{NAME}.weight": packed, f"{NAME}.weight_scale": torch.tensor([0.25])}
    ref, found = read(tmp_path, tensors, quant_method="bitnet")
    assert torch.equal(found.matrix, w * 0.25)
    assert ref.shape == (OUT, IN)


@pytest.mark.parametrize(
    "names", [("parametrizations.weight.original1", "parametrizations.weight.original0"), ("weight_v", "weight_g")]
)
def test_weight_norm(tmp_path, names):
    conv = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv1d(8, 12, 5), dim=2).requires_grad_(False)
    conv.parametrizations.weight.original0.mul_(1.7)
    direction, gain = conv.parametrizations.weight.original1, conv.parametrizations.weight.original0
    ref, found = read(tmp_path, {f"conv.{names[0]}": direction, f"conv.{names[1]}": gain})
    assert torch.allclose(found.matrix.float(), conv.weight.reshape(12, 40), rtol=1e-6, atol=1e-8)
    assert (ref.role, ref.stored) == ("conv", "weight-norm")


def test_a_gain_that_may_belong_to_either_axis_is_refused(tmp_path):
    save_file({"m.weight_v": torch.ones(8, 8), "m.weight_g": torch.ones(8)}, tmp_path / "model.safetensors")
    inventory = list_matrices(open_source(tmp_path))
    assert not inventory.selected
    assert any(item.name == "m.weight_v" and "is computed from" in item.reason for item in inventory.skipped)


def test_a_live_module_with_weight_norm_too():
    conv = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv1d(8, 12, 5), dim=2)
    report = lmd_hf.analyze(torch.nn.Sequential(conv))
    expected = torch.linalg.svdvals(conv.weight.detach().double().reshape(12, 40))
    assert report.matrices[0].singular_values == pytest.approx(expected.numpy(), rel=1e-5)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (
            {"qweight": WORDS, "qzeros": torch.zeros(5, OUT // 8, dtype=torch.int32), "scales": torch.ones(5, OUT)},
            "(192, 5) scales for (192, 256) values are no known layout",
        ),
        ({"weight": torch.zeros(OUT, IN).to(torch.float8_e4m3fn), "weight_scale": torch.ones(7, 1)}, "no known layout"),
        (
            {"qweight": WORDS, "qzeros": torch.zeros(4, OUT // 8, dtype=torch.int32), "scales": torch.ones(4, OUT),
             "g_idx": torch.full((IN,), 9, dtype=torch.int32)},
            "its gptq tensors do not fit together",
        ),
        (
            {"W_q": torch.zeros(8, 8, dtype=torch.uint8), "scale": torch.ones(16, 1), "zero": torch.ones(16, 1),
             "shape": torch.tensor([100, 100]), "nbits": torch.tensor(4)},
            "its hqq tensors do not fit together",
        ),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_together_are_skipped_with_a_reason(tmp_path, tensors, reason):
    tensors = {f"{NAME}.{key}": value for key, value in tensors.items()}
    save_file(tensors | {"other.weight": torch.eye(4)}, tmp_path / "model.safetensors")
    report = lmd_hf.analyze(tmp_path)
    assert [m.name for m in report.matrices] == ["other.weight"]
    assert any(reason in s.reason for s in report.coverage.skipped), report.coverage.skipped


def told(state, **changes):
    """A bitsandbytes state, changed."""
    return torch.tensor(list(json.dumps({**json.loads(bytes(state.tolist())), **changes}).encode()), dtype=torch.uint8)


@lru_cache
def quantised(layout):
    """The tensors of one matrix, made once."""
    return FORMATS[layout](random(OUT, IN))


MISFITS = {
    "fp8, rows": [
        ("weight_scale", lambda t: t[:96]), ("weight_scale", lambda t: t[:128, 0]), ("weight_scale", lambda t: t[:0]),
        ("weight_scale", lambda t: t.bool()), ("weight_scale", lambda t: t.int()), ("weight_scale", lambda t: t[None]),
    ],
    "int8, rows": [("weight_scale", lambda t: t[:96]), ("weight_scale", lambda t: (10 * t).to(torch.uint8))],
    "bitsandbytes int8": [("SCB", lambda t: t[:96]), ("SCB", lambda t: t[0]), ("SCB", lambda t: t[:0])],
    "gptq, 4 bits": [
        ("scales", lambda t: t[:2]), ("qzeros", lambda t: t[:, :1]), ("qzeros", lambda t: t[:, :0]),
        ("qzeros", lambda t: torch.cat([t, t[:, : OUT // 16]], 1)), ("qzeros", lambda t: t[0]),
        ("scales", lambda t: t.flatten()), ("scales", lambda t: t[:, :0]), ("qweight", lambda t: t.flatten()),
        *(("g_idx", lambda t, g=g: g.int()) for g in (torch.arange(IN // 2) // 64, torch.arange(IN) // 64 - 1,
                                                      torch.arange(IN) // 64 + 1, torch.zeros(0))),
    ],
    "awq": [("qzeros", lambda t: t[:1]), ("qzeros", lambda t: t[:, :4]), ("scales", lambda t: t.flatten())],
    "compressed-tensors, 4 bits": [
        *(("weight_shape", lambda t, v=v: torch.tensor(v)) for v in (
            [OUT, IN // 2], [OUT, 250], [-OUT, IN], [OUT], OUT, [1.0 * OUT, IN], [10**9, 10**9])),
        ("weight_shape", lambda t: t[:0]), ("weight_scale", lambda t: t.T),
    ],
    "nvfp4": [
        ("weight_scale", lambda t: t[:, :4]), ("weight_scale", lambda t: t[:96]),
        ("weight_global_scale", lambda t: t.expand(OUT, 1)),
    ],
    "mxfp4": [("weight_scale", lambda t: t[:96]), ("weight_scale", lambda t: t.float())],
    "hqq, 4 bits": [
        *(("nbits", lambda t, v=v: torch.tensor(v)) for v in (0, 2, 8, 5, [4, 4])),
        ("scale", lambda t: t[0, 0]), ("zero", lambda t: t[0, 0]), ("zero", lambda t: t.to(torch.uint8)),
        ("shape", lambda t: t // 2),
    ],
    "torchao int4": [("_weight_zero_point", lambda t: t[:2]), ("_weight_zero_point", lambda t: t.char())],
    "weight norm": [
        ("parametrizations.weight.original0", lambda t: t[:, 0]),
        ("parametrizations.weight.original0", lambda t: t[:4]),
    ],
    "bitsandbytes nf4, double": [
        *(("weight.quant_state.bitsandbytes__nf4", lambda t, c=c: told(t, **c)) for c in (
            {"shape": [OUT, IN // 2]}, {"shape": "ab"}, {"shape": [1.0 * OUT, IN]}, {"shape": None}, {"blocksize": "x"},
            {"blocksize": 128}, {"blocksize": 0}, {"nested_blocksize": 64}, {"nested_offset": None})),
        ("weight.quant_state.bitsandbytes__nf4", lambda t: torch.tensor(list(b"[" * 50_000), dtype=torch.uint8)),
        ("weight.quant_state.bitsandbytes__nf4", lambda t: t[:0]), ("weight.absmax", lambda t: torch.cat([t, t])),
        ("weight.quant_map", lambda t: t[:0]), ("weight.quant_map", lambda t: torch.cat([t, t])),
        ("weight.absmax", lambda t: t.float()),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "part", "change"),
    [
        pytest.param(layout, *case, id=f"{layout} {i}")
        for layout, cases in MISFITS.items()
        for i, case in enumerate(cases)
    ],
)
def test_a_part_that_does_not_fit_gives_no_number(tmp_path, layout, part, change):
    if layout.startswith("bitsandbytes nf4"):
        pytest.importorskip("bitsandbytes.functional")
    tensors, _ = quantised(layout)
    tensors = {**tensors, part: change(tensors.get(part))}
    tensors = {f"{NAME}.{key}": value.contiguous() for key, value in tensors.items()}
    save_file(tensors | {"other.weight": torch.eye(4)}, tmp_path / "model.safetensors")
    report = lmd_hf.analyze(tmp_path)
    assert [m.name for m in report.matrices] == ["other.weight"]
    counted = sum(math.prod(item.shape) for item in (*report.matrices, *report.coverage.skipped))
    assert counted == report.coverage.parameters


@pytest.mark.parametrize("dtype", ["U16", "F4"])
def test_scales_and_gains_of_types_that_torch_lacks_are_not_taken_for_bytes(tmp_path, dtype):
    """A header may call any bytes so: here those of the scale of a matrix, and of the gain that feeds another."""
    norm = "model.layers.0.input_layernorm.weight"
    tensors = {
        f"{NAME}.weight": torch.ones(OUT, IN).to(torch.float8_e4m3fn),
        f"{NAME}.weight_scale": torch.ones(OUT, 1),
    }
    tensors |= {"model.layers.0.self_attn.q_proj.weight": torch.eye(8), norm: torch.ones(8)}
    save_file(tensors, tmp_path / "model.safetensors")
    raw = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    for name in (f"{NAME}.weight_scale", norm):
        header[name] |= {
            "dtype": dtype,
            "shape": [32 // {"U16": 16, "F4": 4}[dtype] * n for n in header[name]["shape"][:1]],
        }
    told = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(told).to_bytes(8, "little") + told + raw[8 + length :])
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    report = lmd_hf.analyze(tmp_path, metric="norm")
    assert report.matrices == ()
    assert sum(f"is stored as {dtype}, which is not read" in s.reason for s in report.coverage.skipped) == 2


@pytest.mark.parametrize("gain", [torch.ones(7), torch.ones(1), torch.ones(0), torch.ones(8, dtype=torch.uint8)])
def test_a_gain_that_does_not_fit_is_no_metric(tmp_path, gain):
    tensors = {"model.layers.0.self_attn.q_proj.weight": torch.eye(8), "model.layers.0.input_layernorm.weight": gain}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    report = lmd_hf.analyze(tmp_path, metric="norm")
    assert report.matrices == ()
    assert any("gain" in s.reason for s in report.coverage.skipped)


def test_blocks_of_three_axes_are_listed(tmp_path):
    tensors = {"m.experts.w_blocks": torch.zeros(4, 2, 16, dtype=torch.uint8)}
    tensors["m.experts.w_scales"] = torch.zeros(4, 2, dtype=torch.uint8)
    save_file(tensors, tmp_path / "model.safetensors")
    (reason,) = {s.reason for s in list_matrices(open_source(tmp_path)).skipped if "companion" not in s.reason}
    assert "its mxfp4 tensors do not fit together" in reason


def test_an_unknown_format_is_listed_with_its_method(tmp_path):
    save_file({f"{NAME}.codes": torch.zeros(4, 4, dtype=torch.int16)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "aqlm"}}))
    inventory = list_matrices(open_source(tmp_path))
    assert "stored as I16 by 'aqlm', a format that is not read" in inventory.skipped[0].reason


PIECES = {
    "sparse": {"compressed": torch.ones(32, 16, dtype=torch.bfloat16), "bitmask": torch.ones(32, 4).byte()},
    "quanto": {"weight._data": torch.ones(32, 32).to(torch.float8_e4m3fn), "weight._scale": torch.ones(32, 1)},
    "svdquant": {"qweight": torch.ones(32, 16).char(), "proj_down": torch.ones(32, 4), "wscales": torch.ones(1, 32)},
    "vptq": {"centroids.weight": torch.ones(1, 256), "indices": torch.ones(32, 2).int(), "bias": torch.ones(32)},
}  # fmt: skip


@pytest.mark.parametrize("kind", PIECES)
def test_pieces_of_a_format_that_is_not_read_are_no_matrices(tmp_path, kind):
    make("llama").save_pretrained(tmp_path)
    state, path = load_file(tmp_path / "model.safetensors"), "model.layers.0.self_attn.q_proj"
    del state[f"{path}.weight"]
    save_file(state | {f"{path}.{end}": value for end, value in PIECES[kind].items()}, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": kind}}))
    inventory = list_matrices(open_source(tmp_path))
    assert not [ref.name for ref in inventory.selected if path in ref.name]
    reasons = [item.reason for item in inventory.skipped if path in item.name and item.reason != "vector"]
    assert len(reasons) == len(PIECES[kind].keys() - {"bias"})
    assert all(reason.startswith(f"a part of '{path}' stored as ") and f"by '{kind}'" in reason for reason in reasons)


# --- against the formats' own libraries --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_4bit(tmp_path, kind, nested):
    functional = pytest.importorskip("bitsandbytes.functional")
    w = random(OUT, IN)
    packed, state = functional.quantize_4bit(w, quant_type=kind, compress_statistics=nested, blocksize=64)
    tensors = {f"{NAME}.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    ref, found = read(tmp_path, {f"{NAME}.weight": packed} | tensors, quant_method="bitsandbytes")
    expected = functional.dequantize_4bit(packed, state)
    assert torch.allclose(found.matrix, expected, rtol=2**-22, atol=1e-9)
    assert (found.matrix - w).abs().max() < 0.2 * w.abs().max()
    assert ref.shape == (OUT, IN)
    error = float((found.matrix - w).double().square().mean().sqrt())
    assert error < found.rounding.absolute < 4 * error  # the largest error is above the usual one


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("used", [False, True])
def test_bitsandbytes_4bit_live(nested, used):
    """Also after a forward pass, for which bitsandbytes packs a layer anew where the CPU has instructions for that."""
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(IN, OUT, bias=False, quant_type="nf4", compress_statistics=nested).to("cpu").eval()
    expected = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).clone()
    if used:
        layer(torch.ones(1, IN))
    source = open_source(torch.nn.Sequential(layer))
    (ref,) = list_matrices(source).selected
    found = read_stored(source, ref).matrix
    assert torch.linalg.norm(found - expected) < (0.01 if used else 1e-6) * torch.linalg.norm(expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("strategy", "symmetric"), [("group", True), ("group", False), ("channel", False)])
def test_compressed_tensors_packed(tmp_path, bits, strategy, symmetric):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    size = 64 if strategy == "group" else IN
    w = random(OUT, IN)
    arguments = QuantizationArgs(
        num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=size if strategy == "group" else None
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    _, scale, zero = groups(w, bits, size)
    zero = torch.zeros_like(zero) if symmetric else zero - 2 ** (bits - 1)
    state = {"weight": w, "weight_scale": scale, "weight_zero_point": zero.to(torch.int8)}
    compressed = PackedQuantizationCompressor.compress(state, scheme)
    expected = PackedQuantizationCompressor.decompress(dict(compressed), scheme)["weight"]
    ref, found = read(tmp_path, {f"{NAME}.{key}": value for key, value in compressed.items()})
    assert torch.equal(found.matrix, expected.float())
    assert (ref.stored, ref.shape) == ("pack-quantized", (OUT, IN))


@pytest.mark.parametrize("name", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig", "IntxWeightOnlyConfig"])
def test_torchao_in_safetensors(tmp_path, name):
    torchao = pytest.importorskip("torchao.quantization")
    support = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
    layer = torch.nn.Linear(IN, OUT, bias=False)
    torchao.quantize_(layer, getattr(torchao, name)())
    expected = layer.weight.dequantize().detach()
    tensors, metadata = support.flatten_tensor_state_dict({f"{NAME}.weight": layer.weight})
    ref, found = read(tmp_path, tensors, metadata)
    assert torch.equal(found.matrix, expected)
    assert ref.stored.startswith("torchao-")


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4", "mxfp8"])
@pytest.mark.parametrize("swizzled", [False, True])
def test_torchaos_block_formats_in_safetensors(tmp_path, kind, swizzled):
    support = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
    formats = pytest.importorskip("torchao.prototype.mx_formats")
    w = random(OUT, IN)
    if kind == "nvfp4":
        stored = formats.nvfp4_tensor.NVFP4Tensor.to_nvfp4(w, per_tensor_scale=w.max(), is_swizzled_scales=swizzled)
    else:
        dtype = torch.float8_e4m3fn if kind == "mxfp8" else torch.float4_e2m1fn_x2
        stored = formats.mx_tensor.MXTensor.to_mx(w, dtype, 32, is_swizzled_scales=swizzled)
    tensors, metadata = support.flatten_tensor_state_dict({f"{NAME}.weight": stored})
    ref, found = read(tmp_path, tensors, metadata)
    assert torch.allclose(found.matrix, stored.dequantize(torch.float32), rtol=2**-22, atol=0)
    assert ref.stored.startswith("torchao-")


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("axis", [0, 1])
def test_hqq(tmp_path, bits, axis):
    """By the definition of HQQ's `Quantizer`: groups are rows (axis 1) or columns (axis 0) of W reshaped."""
    size = 64
    w = random(OUT, IN)
    rows = w.reshape(-1, size) if axis == 1 else w.reshape(size, -1)
    low, high = rows.amin(axis, keepdim=True), rows.amax(axis, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    zero = -low / scale
    codes = (rows / scale + zero).round().clamp(0, 2**bits - 1)
    planes = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}[bits]
    height = math.ceil(len(codes) / planes)
    padded = torch.nn.functional.pad(codes.int(), (0, 0, 0, height * planes - len(codes)))
    packed = sum(part << bits * (planes - 1 - index) for index, part in enumerate(padded.split(height)))
    values = {"W_q": packed.to(torch.int32 if bits == 3 else torch.uint8), "scale": scale, "zero": zero}
    values |= {"shape": torch.tensor([OUT, IN]), "nbits": torch.tensor(bits), "axis": torch.tensor(axis)}
    values |= {"group_size": torch.tensor(size), "packing": torch.tensor(list(b"packing"), dtype=torch.uint8)}
    _, found = read(tmp_path, {f"{NAME}.{key}": value for key, value in values.items()})
    assert torch.equal(found.matrix, ((codes - zero) * scale).reshape(OUT, IN))


# --- what comes out ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_singular_values_are_those_of_the_dequantised_matrix(tmp_path, name):
    tensors, expected = FORMATS[name](random(OUT, IN))
    tensors = {f"{NAME}.{key}": value.contiguous() for key, value in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (row,) = lmd_hf.analyze(tmp_path).matrices
    reference = torch.linalg.svdvals(expected).numpy()
    kept = reference > 1e-6 * reference[0]
    assert row.singular_values[kept] == pytest.approx(reference[kept], rel=1e-6)
    assert row.shape == (OUT, IN)


def test_stacked_fp8_experts_take_their_own_scales(tmp_path):
    q = random(3, OUT, IN, scale=1).to(torch.float8_e4m3fn)
    scale = random(3, OUT, 1, seed=1).abs() + 0.01
    name = "model.layers.0.mlp.experts.down_proj"
    config = {"model_type": "qwen3_moe", "num_hidden_layers": 1, "hidden_size": OUT, "moe_intermediate_size": IN}
    config |= {"num_experts": 3, "vocab_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    save_file({name: q, f"{name}_scale": scale}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen3MoeForCausalLM"]}))
    source = open_source(tmp_path)
    found = list_matrices(source).selected
    assert [(ref.stored, ref.role, ref.expert) for ref in found] == [("fp8 experts", "down", e) for e in range(3)]
    for ref in found:
        assert torch.equal(read_stored(source, ref).matrix, q[ref.expert].float() * scale[ref.expert])


def test_singular_values_and_rank_of_a_quantised_low_rank_matrix(tmp_path):
    """Rank 5 stored in 4 bits: the values are those of the dequantised matrix, the rank sees through the steps."""
    w = random(OUT, 5, scale=1) @ random(5, IN, seed=1, scale=1)
    codes, scale, zero = groups(w, 4, 64)
    tensors = {
        f"{NAME}.qweight": pack_bits(codes, 4).T.contiguous(),
        f"{NAME}.qzeros": pack_bits(zero.T, 4),
        f"{NAME}.scales": scale.T.half().contiguous(),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"checkpoint_format": "gptq_v2"}}))
    row = lmd_hf.analyze(tmp_path).matrices[0]
    dense = ((codes - zero.repeat_interleave(64, 1)) * scale.repeat_interleave(64, 1)).double()
    assert row.singular_values == pytest.approx(torch.linalg.svdvals(dense).numpy(), rel=1e-6)
    assert (row.numerical_rank, row.dtype, row.stored) == (5, "I32", "gptq-v2")
