"""Every head of a report against dense float64 products, and what cannot be measured."""

import json
from dataclasses import replace

import models
import numpy as np
import pytest
import torch
import transformers as t
from safetensors.torch import load_file, save_file
from test_world import TORCHRUN, launch

from lmd_hf import analyze
from lmd_hf.errors import SourceError
from lmd_hf.matrix.batched import cores_each
from lmd_hf.matrix.capacity import softmax_capacity_log10
from lmd_hf.records import Settings
from lmd_hf.run import heads as run_heads
from lmd_hf.run.heads import measure_heads
from lmd_hf.run.plan import make_plan, plan_heads
from lmd_hf.weights.inventory import list_matrices
from lmd_hf.weights.source import open_source


def scores(matrix):
    """(symmetric energy, Σ Re λ/Σ|λ|) of a whole matrix."""
    symmetric = ((matrix + matrix.T) / 2).square().sum() / matrix.square().sum()
    eigenvalues = torch.linalg.eigvals(matrix)
    return symmetric.item(), (eigenvalues.real.sum() / eigenvalues.abs().sum()).item()


def check(head, qk, ov, gain=None):
    """A row against the dense QK (with its scale) and OV."""
    if gain is not None:
        qk, ov = torch.diag(gain) @ qk @ torch.diag(gain), ov @ torch.diag(gain)
    for values, dense in ((head.qk_singular_values, qk), (head.ov_singular_values, ov)):
        full = torch.linalg.svdvals(dense)
        torch.testing.assert_close(
            torch.tensor(values, dtype=torch.float64), full[: len(values)], rtol=1e-9, atol=1e-12
        )
        assert full[len(values) :].max() < 1e-12 * full[0]
    energy, score = scores(qk)
    assert head.qk_symmetric_energy == pytest.approx(energy, rel=1e-9)
    assert head.qk_eigenvalue_score == pytest.approx(score, abs=1e-6)
    assert head.copying_score == pytest.approx(scores(ov)[1], abs=1e-6)
    assert head.inverse_temperature == head.qk_singular_values[0]
    squares = torch.linalg.svdvals(qk) ** 2
    assert head.qk_participation_ratio == pytest.approx((squares.sum() ** 2 / (squares**2).sum()).item())


@pytest.mark.parametrize("metric", ["identity", "norm"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_grouped_queries_against_dense_products(family, metric):
    model = models.make(family)
    report = analyze(model, heads=True, metric=metric)
    assert len(report.heads) == models.L * models.HEADS
    for head in report.heads:
        block = model.model.layers[head.layer]
        w = {name: getattr(block.self_attn, f"{name}_proj").weight.detach().double() for name in "qkvo"}
        gain = block.input_layernorm.weight.detach().double() + (1 if family == "gemma2" else 0)
        d, rows = 8, slice(8 * head.head, 8 * head.head + 8)
        shared = slice(d * head.kv_head, d * head.kv_head + d)
        assert head.kv_head == head.head // 2
        scale = 256**-0.5 if family == "gemma2" else d**-0.5
        qk, ov = scale * w["k"][shared].T @ w["q"][rows], w["o"][:, rows] @ w["v"][shared]
        check(head, qk, ov, gain if metric == "norm" else None)
        assert head.conventions["norm_folded"] is (metric == "norm")
        assert head.conventions["norm"] == f"model.layers.{head.layer}.input_layernorm.weight"


def latent(**changes):
    torch.manual_seed(0)
    values = {
        **models.LLAMA, "num_key_value_heads": models.HEADS, "kv_lora_rank": 16, "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4, "v_head_dim": 7, "q_lora_rank": 12, "n_routed_experts": 4, "n_group": 2, "topk_group": 1,
        "num_experts_per_tok": 2, "moe_intermediate_size": 20, "first_k_dense_replace": 2,
    }  # fmt: skip
    model = t.DeepseekV3ForCausalLM(t.DeepseekV3Config(**{**values, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.3 * torch.randn(parameter.shape))
    return model


@pytest.mark.parametrize("rank", [12, None])
@pytest.mark.parametrize("metric", ["identity", "norm"])
def test_latent_attention_against_dense_products(metric, rank):
    model = latent(q_lora_rank=rank)
    report = analyze(model, heads=True, metric=metric)
    assert len(report.heads) == models.L * models.HEADS
    for head in report.heads:
        layer = model.model.layers[head.layer]
        own = {name: value.detach().double() for name, value in layer.self_attn.named_parameters()}
        folded = metric == "norm"
        inner = {
            n: own[f"{n}_a_layernorm.weight"] if folded else 1 for n in ("q", "kv") if f"{n}_a_layernorm.weight" in own
        }
        if rank:
            w_q = (own["q_b_proj.weight"] * inner["q"]) @ own["q_a_proj.weight"]
        else:
            w_q = own["q_proj.weight"]
        down, shared = own["kv_a_proj_with_mqa.weight"][:16], own["kv_a_proj_with_mqa.weight"][16:]
        up = own["kv_b_proj.weight"][13 * head.head : 13 * head.head + 13] * inner["kv"]
        w_k = torch.cat([up[:6] @ down, shared])
        w_q = w_q[10 * head.head : 10 * head.head + 10]
        w_o = own["o_proj.weight"][:, 7 * head.head : 7 * head.head + 7]
        gain = layer.input_layernorm.weight.detach().double() if folded else None
        check(head, 10**-0.5 * w_k.T @ w_q, w_o @ up[6:] @ down, gain)
        assert head.conventions["low_rank"]


def test_a_fused_projection_against_dense_products(save):
    tensors = load_file(save("gpt2") / "model.safetensors")
    report = analyze(save("gpt2"), heads=True)
    for head in report.heads:
        whole = tensors[f"transformer.h.{head.layer}.attn.c_attn.weight"].double()  # (in, out)
        q, k, v = (part[:, 8 * head.head : 8 * head.head + 8] for part in whole.split(models.H, dim=1))
        o = tensors[f"transformer.h.{head.layer}.attn.c_proj.weight"].double()[8 * head.head : 8 * head.head + 8]
        check(head, 8**-0.5 * k @ q.T, o.T @ v.T)
        assert head.conventions["biases"] == ["q", "k", "v", "o"]


def test_cross_attention_is_no_form_of_one_stream(save):
    report = analyze(save("t5"), heads=True)
    crossed = [head for head in report.heads if head.block == "cross_attention"]
    assert len(crossed) == models.L * models.HEADS
    for head in crossed:
        assert (head.qk_symmetric_energy, head.qk_eigenvalue_score, head.copying_score) == (None, None, None)
        assert head.conventions["scale"] == 1.0
        assert head.inverse_temperature > 0
    assert all(h.qk_symmetric_energy is not None for h in report.heads if h.block == "attention")


def test_the_capacity_takes_the_gains_whether_folded_or_not():
    """Wide heads with sharp scores, so that the theorem holds; ‖q‖ = ‖W_Q diag γ‖_F."""
    values = {
        **models.LLAMA,
        "hidden_size": 512,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_hidden_layers": 1,
    }
    torch.manual_seed(0)
    model = t.LlamaForCausalLM(t.LlamaConfig(**values))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 512**-0.5 if parameter.ndim > 1 else 3 * torch.ones(512))
    head = analyze(model, heads=True, roles=("k",)).heads[1]
    attention = model.model.layers[0].self_attn
    q, k = (3 * attention.get_submodule(f"{n}_proj").weight[256:].double().norm().item() for n in "qk")
    d = head.qk_participation_ratio
    assert head.capacity_log10 == pytest.approx(softmax_capacity_log10(d, 256**-0.5 * q * k / (d - 1)))
    folded = analyze(model, heads=True, roles=("k",), metric="norm").heads[1]
    assert folded.capacity_log10 == pytest.approx(head.capacity_log10)  # equal gains leave d as it is


def test_selection_by_layer(save):
    report = analyze(save("llama"), heads=True, layers="1")
    assert {head.layer for head in report.heads} == {1}
    assert not analyze(save("llama"), heads=True, roles=("up",)).heads
    assert len(analyze(save("llama"), heads=True, roles=("v",)).heads) == models.L * models.HEADS
    assert analyze(save("llama")).heads == ()


def test_a_head_that_holds_nan_is_a_note(save, tmp_path):
    tensors = load_file(save("llama") / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"][8:16] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((save("llama") / "config.json").read_text())
    report = analyze(tmp_path, heads=True)
    assert [(h.layer, h.head) for h in report.heads if h.layer == 1] == [(1, 0), (1, 2), (1, 3)]
    assert (
        "head 1 of 'model.layers.1.self_attn.q_proj.weight' left out: the factors hold NaN or infinity"
        in report.coverage.notes
    )


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "latent"])
def test_all_heads_of_an_attention_at_once_give_the_same(family, folded, monkeypatch):
    """As on GPUs, in two parts as where memory is short; one head holds no number."""
    model = latent() if family == "latent" else models.make(family)
    queries = ("q_proj", "q_b_proj", "q", "c_attn")
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if name.split(".")[-2] in queries).view(-1)[3] = torch.nan
    source = open_source(model)
    planned = plan_heads(list_matrices(source), Settings(heads=True))
    alone = measure_heads(planned, source, folded=folded)
    sizes = []
    monkeypatch.setattr(run_heads, "BATCHED_ON", ("cpu",))
    monkeypatch.setattr(run_heads, "cores_each", lambda ps, **how: sizes.append(len(ps)) or cores_each(ps, **how))
    monkeypatch.setattr(run_heads, "fitting", lambda sizes, most, device: most - 1)
    together = measure_heads(planned, source, folded=folded)
    assert set(sizes) == {models.HEADS - 1, 1}
    assert together.notes == alone.notes
    assert [note.partition(":")[2] for note in alone.notes] == [" the factors hold NaN or infinity"]
    for found, expected in zip(together.rows, alone.rows, strict=True):
        for key, value in vars(expected).items():
            if isinstance(value, (float, tuple)):
                np.testing.assert_allclose(getattr(found, key), value, rtol=1e-6, atol=1e-9, err_msg=key)
            else:
                assert getattr(found, key) == value


def test_where_a_gpu_is_full_the_heads_are_done_on_the_cpu(save, monkeypatch):
    source = open_source(save("llama"))
    planned = plan_heads(list_matrices(source), Settings(heads=True))
    alone = measure_heads(planned, source, folded=False)

    refused = []

    def full_at_first(products, **how):
        refused.append(len(products))
        if len(refused) % 3 == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return cores_each(products, **how)

    monkeypatch.setattr(run_heads, "BATCHED_ON", ("cpu",))
    monkeypatch.setattr(run_heads, "cores_each", full_at_first)
    found = measure_heads(planned, source, folded=False)
    assert refused == [models.HEADS] * 3 * models.L
    for row, other in zip(found.rows, alone.rows, strict=True):
        np.testing.assert_allclose(row.qk_singular_values, other.qk_singular_values, rtol=1e-9, atol=1e-14)


def test_what_cannot_be_read_or_formed_is_a_note(save):
    source = open_source(save("llama"))
    inventory = list_matrices(source)
    heads = plan_heads(inventory, Settings(heads=True))

    class Broken:
        def read(self, tensor, *span):
            raise SourceError("the file is gone")

    broken = measure_heads(heads, Broken(), folded=False)
    assert broken.rows == ()
    assert broken.notes[0] == "heads of 'model.layers.0.self_attn.q_proj.weight' could not be read: the file is gone"
    meta = open_source(models.make("llama").to("meta"))
    notes = measure_heads(plan_heads(list_matrices(meta), Settings(heads=True)), meta, folded=False).notes
    assert notes[0].startswith("heads of 'model.layers.0.self_attn.q_proj.weight' left out: no data")
    inventory = replace(inventory, config={**inventory.config, "head_dim": 16})
    assert plan_heads(inventory, Settings(heads=True)) == ()
    assert "the configuration says 16" in make_plan(inventory, source.identity, Settings(heads=True)).notes[-1]
    assert make_plan(inventory, source.identity, Settings()).notes == inventory.notes


@pytest.mark.slow
def test_two_processes_give_the_heads_of_one(save):
    expected = json.loads(analyze(save("t5"), heads=True).to_json())["heads"]
    answer = launch([*TORCHRUN, "--nproc_per_node", "2"], "analyze", save("t5"), "--heads", "--json")
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["heads"] == expected
