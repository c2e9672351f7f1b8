"""LoRA adapters that PEFT itself wrote: the update of every pair, and the base with the updates added."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from models import make
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import lmd_hf
from lmd_hf.errors import SettingsError, SourceError
from lmd_hf.matrix.kernels import thin
from lmd_hf.records import Factored
from lmd_hf.weights.inventory import list_matrices
from lmd_hf.weights.source import open_source
from lmd_hf.weights.stored import read_matrix


def trained(family, **options):
    """A PEFT model whose adapter is random instead of zero."""
    model = get_peft_model(make(family), LoraConfig(**{"r": 4, "lora_alpha": 10, **options}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + ("magnitude" in name))
    return model


@pytest.fixture
def adapter(tmp_path):
    """Saves an adapter and its base; returns (folder of the adapter, folder of the base, PEFT model)."""

    def save_both(family, **options):
        make(family).save_pretrained(tmp_path / "base")
        model = trained(family, **options)
        model.save_pretrained(tmp_path / "adapter")
        path = tmp_path / "adapter" / "adapter_config.json"
        values = json.loads(path.read_text())
        path.write_text(json.dumps({**values, "base_model_name_or_path": str(tmp_path / "base")}))
        return tmp_path / "adapter", tmp_path / "base", model

    return save_both


CASES = {
    "plain": ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    "rslora": ("llama", {"target_modules": ["q_proj", "v_proj"], "use_rslora": True}),
    "patterns": (
        "llama",
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"0.\\w+.v_proj": 3}},
    ),
    "everything": ("bert", {"target_modules": "all-linear"}),
    "fan_in_fan_out": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "o_proj"]}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_pair_is_the_update_that_peft_makes(adapter, case):
    family, options = CASES[case]
    folder, _, model = adapter(family, **options)
    layers = {
        n.removeprefix("base_model.model."): m for n, m in model.named_modules() if hasattr(m, "get_delta_weight")
    }
    report = lmd_hf.analyze(folder)
    pairs = [row for row in report.matrices if row.stored == "lora"]
    assert len(pairs) == len(layers) > 0
    assert len(report.matrices) == len(pairs) + (case == "embedding")  # PEFT saves a changed embedding's base too
    for row in pairs:
        layer = layers[row.name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0]]
        delta = layer.get_delta_weight("default").detach().double()
        turned = getattr(layer, "fan_in_fan_out", False) or isinstance(layer.get_base_layer(), torch.nn.Embedding)
        delta = delta.T if turned else delta  # PEFT's is as the base stores it
        assert row.shape == tuple(delta.shape)
        rank = len(row.singular_values)
        expected = torch.linalg.svdvals(delta)
        np.testing.assert_allclose(row.singular_values, expected[:rank], rtol=2e-6)
        assert rank < min(row.shape)
        assert row.numerical_rank == rank
        assert (row.stored, row.method, row.smallest_singular_value) == ("lora", "qr", 0)
        assert row.role != "other" or family == "gpt2" or "predictions.transform" in row.name
    stored = sum(t.numel() for t in load_file(folder / "adapter_model.safetensors").values())
    assert report.coverage.parameters == stored == report.coverage.decomposed
    assert f"a LoRA adapter for {folder.parent / 'base'}" in report.coverage.notes[0]


MERGED = {
    "llama": {"target_modules": ["q_proj", "down_proj", "embed_tokens"]},
    "gpt2": {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    "bert": {"target_modules": ["query", "dense"]},
}


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", MERGED)
def test_the_base_with_the_adapter_is_what_peft_merges(adapter, tmp_path, family, dora):
    options = dict(MERGED[family])
    if dora:
        options["target_modules"] = [name for name in options["target_modules"] if name != "embed_tokens"]
    folder, base, model = adapter(family, use_dora=dora, **options)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    found, expected = (
        {(m.name, m.part): m for m in report.matrices}
        for report in (lmd_hf.analyze(folder, base="auto"), lmd_hf.analyze(tmp_path / "merged"))
    )
    assert found.keys() == expected.keys()
    for key, row in found.items():
        np.testing.assert_allclose(row.singular_values, expected[key].singular_values, rtol=3e-4, atol=1e-6)
    changed = {k for k, m in {(m.name, m.part): m for m in lmd_hf.analyze(base).matrices}.items()
               if abs(m.spectral_norm - found[k].spectral_norm) > 1e-6}  # fmt: skip
    assert len(changed) >= len([m for m in lmd_hf.analyze(folder).matrices if m.stored == "lora"])


def test_modules_saved_whole_are_rows_and_take_the_place_of_the_bases(adapter):
    folder, base, _ = adapter("llama", target_modules=["q_proj"], modules_to_save=["lm_head"])
    rows = {m.role: m for m in lmd_hf.analyze(folder).matrices}
    assert (rows["head"].stored, rows["q"].stored) == ("plain", "lora")
    with torch.no_grad():
        state = load_file(folder / "adapter_model.safetensors")
        name = next(n for n in state if "lm_head" in n)
        save_file({**state, name: state[name] * 2}, folder / "adapter_model.safetensors")
    merged = {m.role: m for m in lmd_hf.analyze(folder, base=base).matrices}
    plain = {m.role: m for m in lmd_hf.analyze(base).matrices}
    assert merged["head"].spectral_norm == pytest.approx(2 * plain["head"].spectral_norm, rel=1e-6)


WHOLE = {
    "fused": ("gpt2", ["c_proj"], ["c_attn"]),
    "fused, gated": ("phi3", ["o_proj"], ["gate_up_proj"]),
    "tied embedding": ("gpt2", ["c_attn"], ["wte"]),
    "tied head": ("gpt2", ["c_attn"], ["lm_head"]),
    "both": ("gpt2", ["c_attn"], ["wte", "lm_head"]),
    "convolution with DoRA": ("vit", ["projection"], []),
}  # fmt: skip


@pytest.mark.parametrize("case", WHOLE)
def test_a_fused_or_tied_module_saved_whole_is_what_peft_makes_of_it(tmp_path, case):
    family, targets, whole = WHOLE[case]
    make(family).save_pretrained(tmp_path / "base")
    model = trained(family, target_modules=targets, modules_to_save=whole, use_dora="DoRA" in case)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    ours, theirs = lmd_hf.analyze(tmp_path / "adapter", base=tmp_path / "base"), lmd_hf.analyze(tmp_path / "merged")
    found, expected = ({(m.name, m.part): m for m in report.matrices} for report in (ours, theirs))
    assert found.keys() == expected.keys()
    for key, row in found.items():
        np.testing.assert_allclose(row.singular_values, expected[key].singular_values, rtol=3e-4, atol=1e-6)
        assert (row.role, row.shape) == (expected[key].role, expected[key].shape)
    assert ours.coverage.parameters == theirs.coverage.parameters
    assert not [note for note in ours.coverage.notes if "left out" in note]


@pytest.mark.parametrize(("family", "module"), [("vit", "attention.query"), ("mixtral", "experts.1.w1")])
def test_an_adapter_made_when_the_class_had_other_names_goes_by_the_checkpoint(tmp_path, family, module):
    make(family).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    pairs = {}
    for name in (name for name in stored if name.endswith(f"{module}.weight")):
        rows, columns = stored[name].shape
        pairs[f"base_model.model.{name.removesuffix('weight')}lora_A.weight"] = torch.ones(2, columns)
        pairs[f"base_model.model.{name.removesuffix('weight')}lora_B.weight"] = torch.ones(rows, 2)
    (tmp_path / "adapter").mkdir()
    save_file(pairs, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 3})
    )
    source = open_source(tmp_path / "adapter", base=tmp_path)
    changed = [ref for ref in list_matrices(source).selected if ref.low_rank is not None]
    assert len(changed) == len(pairs) / 2 > 0
    for ref in changed:
        torch.testing.assert_close(read_matrix(source, ref), stored[ref.name].double() + 3)


def test_a_comparison_takes_an_adapter_for_the_base_with_its_updates(adapter):
    folder, base, model = adapter("llama", target_modules=["q_proj"])
    change = lmd_hf.compare(base, folder)
    rows = {row.name: row for row in change.matrices}
    assert len(rows) == len(lmd_hf.analyze(base).matrices)
    for name, row in rows.items():
        delta = model.get_submodule(f"base_model.model.{name.removesuffix('.weight')}")
        expected = float(delta.get_delta_weight("default").norm()) if "q_proj" in name else 0
        assert row.update_norm == pytest.approx(expected, rel=1e-6)
        assert row.update_rank == (4 if "q_proj" in name else 0)
    assert lmd_hf.compare(folder, folder).matrices[0].identical
    with pytest.raises(SettingsError, match=r"is an adapter and .* is none; give the base first"):
        lmd_hf.compare(folder, base)
    with pytest.raises(SourceError, match="LlamaForCausalLM: the base of an adapter must be files or a Hub id"):
        lmd_hf.compare(make("llama"), folder)


def test_dora_alone_says_what_is_not_in_the_rows(adapter):
    folder, _, _ = adapter("llama", target_modules=["q_proj"], use_dora=True)
    coverage = lmd_hf.analyze(folder).coverage
    assert "DoRA's magnitudes rescale" in coverage.notes[0]
    assert {s.reason.split(" of ")[0] for s in coverage.skipped} == {"companion"}
    assert coverage.decomposed + sum(s.shape[0] for s in coverage.skipped) == coverage.parameters


def test_experts_in_one_pair_of_tensors(tmp_path):
    """PEFT's ParamWrapper: ΔW_e = s · B[:, :, e] · A[e] with A (E, r, I) and B (O, r, E)."""
    experts, rank, out, into = 3, 2, 12, 8
    a, b = torch.randn(experts * rank, into), torch.randn(out, rank * experts)
    name = "base_model.model.model.layers.0.mlp.experts"
    save_file({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_parameters": ["mlp.experts.down_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    source = open_source(tmp_path)
    delta = 2 * torch.einsum("ore,eri->eoi", b.reshape(out, rank, experts), a.reshape(experts, rank, into)).double()
    for ref in list_matrices(source).selected:
        torch.testing.assert_close(read_matrix(source, ref), delta[ref.expert], rtol=1e-5, atol=1e-6)
    report = lmd_hf.analyze(tmp_path)
    assert (len(report.matrices), report.coverage.decomposed) == (experts, a.numel() + b.numel())


def test_unselected_and_broken_pairs_still_add_up(adapter):
    folder, _, _ = adapter("llama", target_modules=["q_proj", "v_proj"])
    state = load_file(folder / "adapter_model.safetensors")
    broken = next(name for name in state if "q_proj.lora_B" in name)
    state[broken][0, 0] = float("nan")
    save_file(state, folder / "adapter_model.safetensors")
    report = lmd_hf.analyze(folder, roles=("q",))
    reasons = [s.reason for s in report.coverage.skipped]
    assert (len(report.matrices), reasons.count("not selected")) == (1, 4)
    assert reasons.count("the factors hold NaN or infinity") == 2


PAIR = "base_model.model.model.layers.0.self_attn.q_proj"


def pair(folder, a, b, **config):
    """The report of an adapter of one pair, r = 4 and α = 8 unless `config` tells otherwise."""
    save_file({f"{PAIR}.lora_A.weight": a, f"{PAIR}.lora_B.weight": b}, folder / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    return lmd_hf.analyze(folder)


def test_an_alpha_of_zero_is_no_update(tmp_path):
    report = pair(tmp_path, torch.randn(4, 16), torch.randn(24, 4), lora_alpha=0)
    assert report.matrices[0].spectral_norm == 0


FITTING = (torch.ones(4, 16), torch.ones(24, 4))
MISFITS = {
    "r is 8": ({"r": 8}, FITTING),
    "r is 2, and the module has no experts": ({"r": 2}, FITTING),
    "r is 2 by a pattern": ({"rank_pattern": {"q_proj": 2}}, FITTING),
    "other experts": ({"r": 2, "target_parameters": ["mlp.experts.down_proj", "gate_up_proj"]}, FITTING),
    "parameters of two ranks": (
        {"target_parameters": ["q_proj.a", "q_proj.b"], "rank_pattern": {"q_proj.a": 2}}, FITTING,
    ),
    "B of another rank": ({}, (torch.ones(4, 16), torch.ones(24, 2))),
    "B of 3 × 3": ({}, (torch.ones(4, 3, 2, 2), torch.ones(24, 4, 3, 3))),
    "nothing": ({}, (torch.zeros(0, 16), torch.zeros(24, 0))),
    "integers": ({}, (FITTING[0].to(torch.int8), FITTING[1])),
    "larger than float64": ({"lora_alpha": 1e308}, (1e3 * FITTING[0], FITTING[1])),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_a_pair_that_is_not_what_its_configuration_says_is_listed(tmp_path, case):
    config, (a, b) = MISFITS[case]
    coverage = pair(tmp_path, a, b, **config).coverage
    assert (coverage.decomposed, coverage.parameters) == (0, a.numel() + b.numel())
    assert sum(s.shape[0] * s.shape[1] for s in coverage.skipped) == coverage.parameters
    assert all(s.reason.startswith(("its factors A and B are", "its A", "the product")) for s in coverage.skipped)


BEYOND = {
    "pissa": ({"init_lora_weights": "pissa"}, "pissa began it with a part of the base's weights moved"),
    "olora": ({"init_lora_weights": "olora"}, "olora began it"),
    "activated": ({"alora_invocation_tokens": [1]}, "aLoRA adds its updates from certain tokens on"),
    "repeated": ({"layer_replication": [[0, 2], [0, 2]]}, "its base repeats layers"),
}  # fmt: skip


@pytest.mark.parametrize("case", BEYOND)
def test_updates_that_do_not_make_the_tuned_model_of_the_base_are_not_added_to_it(adapter, case):
    options, reason = BEYOND[case]
    folder, _, _ = adapter("llama", target_modules=["q_proj"], **options)
    report = lmd_hf.analyze(folder)
    assert {m.stored for m in report.matrices} == {"lora"}
    assert f"; with them the base is not yet the tuned model: {reason}" in report.coverage.notes[0]
    with pytest.raises(SourceError, match=reason):
        lmd_hf.analyze(folder, base="auto")


@pytest.mark.parametrize(
    "told", [{"kasa_config": {"beta": 1e-4}}, {"use_bdlora": {"nblocks": 2}}, {"use_qalora": True}]
)
def test_updates_that_are_no_product_of_two_factors_are_listed(tmp_path, told):
    coverage = pair(tmp_path, *FITTING, **told).coverage
    assert (coverage.decomposed, len(coverage.skipped)) == (0, 2)


def test_a_base_whose_update_does_not_fit_is_listed_too(adapter):
    folder, base, _ = adapter("llama", target_modules=["q_proj"])
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 8}))
    report = lmd_hf.analyze(folder, base=base, roles=("q", "k"))
    assert {m.role for m in report.matrices} == {"k"}
    assert sum("r is 8 in adapter_config.json" in s.reason for s in report.coverage.skipped) == 2


def test_the_rank_of_another_kind_of_adapter_is_its_own(tmp_path):
    assert len(pair(tmp_path, *FITTING, peft_type="OFT", r=0).matrices) == 2


@pytest.mark.parametrize(
    "told",
    [
        {"r": 0}, {"r": -4, "use_rslora": True}, {"r": float("inf")}, {"r": 4.7}, {"rank_pattern": {"q_proj": 0}},
        {"lora_alpha": float("nan")}, {"lora_alpha": float("inf")}, {"alpha_pattern": {"*": 4}}, {"rank_pattern": [1]},
        {"rank_pattern": {"(": 4}}, {"alpha_pattern": {"(([a-z._0-9]+)+)+!": 4}}, {"rank_pattern": {".*.*.*.*!": 4}},
        {"base_model_name_or_path": 5}, {"base_model_name_or_path": ["x"]}, {"revision": 5},
    ],
)  # fmt: skip
def test_a_broken_configuration_is_one_clear_line(tmp_path, told):
    with pytest.raises(SourceError, match=r"^adapter_config.json: .*; save the adapter again$"):
        pair(tmp_path, *FITTING, **told)


@pytest.mark.parametrize(
    ("config", "base", "message"),
    [
        ({"peft_type": "LORA", "r": "four"}, None, "save the adapter again"),
        ({"peft_type": "LORA"}, "auto", "names no base model"),
        ({"peft_type": "IA3", "base_model_name_or_path": "x/y"}, "auto", "a IA3 adapter; merge it with peft"),
        ({"peft_type": "LORA", "r": 2}, "OTHER", "no pair of the adapter belongs to a matrix of the base"),
    ],
)
def test_what_cannot_be_done_is_one_clear_line(tmp_path, config, base, message):
    tensors = {
        "base_model.model.a.lora_A.weight": torch.ones(2, 4),
        "base_model.model.a.lora_B.weight": torch.ones(3, 2),
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    if base == "OTHER":
        base = tmp_path / "other"
        base.mkdir()
        save_file({"b.weight": torch.ones(3, 4)}, base / "model.safetensors")
    with pytest.raises(SourceError, match=message):
        list_matrices(open_source(tmp_path, base=base))


def test_a_base_for_a_model_that_is_no_adapter(save):
    with pytest.raises(SourceError, match="not a PEFT adapter; leave out the base"):
        open_source(save("llama"), base="auto")


def test_other_kinds_of_adapter_are_read_tensor_by_tensor(tmp_path):
    save_file({"base_model.model.q.hada_w1_a": torch.randn(8, 2)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LOHA"}))
    report = lmd_hf.analyze(tmp_path)
    assert "kind LOHA" in report.coverage.notes[0]
    assert len(report.matrices) == 1


@pytest.mark.parametrize("size", [(40, 30, 5), (6, 50, 6), (30, 4, 8), (20, 20, 1)])
def test_the_spectrum_of_a_product_that_is_never_formed(size):
    out, into, rank = size
    generator = torch.Generator().manual_seed(1)
    b, a = torch.randn(out, rank, generator=generator), torch.randn(rank, into, generator=generator)
    found = thin(Factored(b, a, -0.5))
    expected = torch.linalg.svdvals(0.5 * b.double() @ a.double())[: len(found.values)]
    np.testing.assert_allclose(found.values, expected, rtol=1e-12, atol=1e-13)
    assert (
        float((found.values - expected)[expected > 1e-6].abs().max()) <= found.error_bound * float(expected[0]) + 1e-13
    )


def test_products_of_nothing_or_of_zeros():
    assert thin(Factored(torch.zeros(4, 2), torch.ones(2, 3), 1.0)).values.tolist() == [0, 0]
    with pytest.raises(ValueError, match="empty factors"):
        thin(Factored(torch.ones(4, 0), torch.ones(0, 3), 1.0))


def test_an_adapter_on_the_hub_and_its_base(adapter, hub):
    """The base is pinned to its own commit; of it only what is selected is fetched."""
    folder, base, _ = adapter("llama", target_modules=["q_proj", "v_proj"])
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".json", ".safetensors")}
    config = {**json.loads(files["adapter_config.json"]), "base_model_name_or_path": "org/lora-base"}
    tip = hub.add("org/lora", {**files, "adapter_config.json": json.dumps(config).encode()})
    below = hub.add("org/lora-base", {path.name: path.read_bytes() for path in base.iterdir()})
    alone, merged = lmd_hf.analyze("org/lora"), lmd_hf.analyze("org/lora", base="auto", roles=("q",))
    expected = lmd_hf.analyze(folder, base=base, roles=("q",))
    assert (alone.model.commit, len(alone.matrices)) == (tip, 4)
    assert [m.singular_values.tolist() for m in merged.matrices] == [
        m.singular_values.tolist() for m in expected.matrices
    ]
    assert any(f"added to org/lora-base at {below}" in note for note in merged.coverage.notes)
    assert merged.environment["bytes_fetched"] > 0


def test_the_command_reads_adapters(adapter):
    folder, base, _ = adapter("llama", target_modules=["q_proj"])
    for options in ([], ["--base", "auto"], ["--base", str(base)]):
        answer = subprocess.run(
            [sys.executable, "-m", "lmd_hf", "analyze", str(folder), "--json", *options], capture_output=True, text=True
        )
        assert answer.returncode == 0, answer.stderr
        assert json.loads(answer.stdout)["coverage"]["fraction"] > 0.9
