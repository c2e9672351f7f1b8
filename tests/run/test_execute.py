"""Doing a plan: numbers against LAPACK, matrices that cannot be done, threads, ties, the norm metric."""

import math
import os
import shutil
import threading
from dataclasses import replace

import models
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lmd_hf import analyze
from lmd_hf.matrix.batched import exact_each
from lmd_hf.records import Settings
from lmd_hf.run import execute as execution
from lmd_hf.run.execute import Output, execute, head_start
from lmd_hf.run.journal import Journal, open_journal
from lmd_hf.run.plan import make_plan
from lmd_hf.run.workers import pick_device
from lmd_hf.run.world import World
from lmd_hf.weights.inventory import list_by_name, list_matrices
from lmd_hf.weights.source import FileSource, open_source


NO_DATA = "no data: it is on the meta device; load or materialise it first"


def lapack(w):
    return np.linalg.svd(w.detach().double().numpy(), compute_uv=False)


def test_every_matrix_of_a_model_equals_lapack(save):
    model = models.make("qwen3")
    weights = dict(model.state_dict())
    for matrix in analyze(save("qwen3")).matrices:
        np.testing.assert_allclose(matrix.singular_values, lapack(weights[matrix.name]), rtol=1e-9, atol=1e-12)
        assert matrix.frobenius_norm == pytest.approx(weights[matrix.name].double().norm().item())
        assert matrix.spectral_norm == matrix.singular_values[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_storage_is_read_exactly(save, tmp_path, dtype):
    models.make("llama").to(dtype).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    report = analyze(tmp_path)
    assert {m.dtype for m in report.matrices} == {{torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]}
    for matrix in report.matrices:
        np.testing.assert_allclose(matrix.singular_values, lapack(stored[matrix.name]), rtol=1e-9, atol=1e-12)


def test_the_norm_metric_is_the_spectrum_of_w_times_the_gain(save):
    model = models.make("gemma")
    report = analyze(save("gemma"), metric="norm")
    plain = {m.name: m for m in analyze(save("gemma")).matrices}
    by_name = {m.name: m for m in report.matrices}
    attention = model.model.layers[1].self_attn
    gain = 1 + model.model.layers[1].input_layernorm.weight.double()
    q = by_name["model.layers.1.self_attn.q_proj.weight"]
    assert q.metric == "norm"
    np.testing.assert_allclose(q.singular_values, lapack(attention.q_proj.weight.double() * gain.double()), rtol=1e-9)
    assert q.mp_edge == plain[q.name].mp_edge  # the noise of the entries does not depend on the metric
    o = by_name["model.layers.1.self_attn.o_proj.weight"]
    assert o.metric == "identity"
    assert o.effective_rank == plain[o.name].effective_rank


def test_nan_and_infinity_skip_that_matrix_and_no_other(save, tmp_path):
    tensors = load_file(save("llama") / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = float("nan")
    tensors["model.layers.1.self_attn.q_proj.weight"][0, :2] = float("inf")
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((save("llama") / "config.json").read_bytes())
    report = analyze(tmp_path)
    reasons = {s.name: s.reason for s in report.coverage.skipped if "NaN" in s.reason}
    assert reasons == {
        "model.layers.0.mlp.up_proj.weight": "the matrix holds NaN or infinity (1 of 1536 entries)",
        "model.layers.1.self_attn.q_proj.weight": "the matrix holds NaN or infinity (2 of 1024 entries)",
    }
    assert len(report.matrices) == 14


def test_a_nan_among_8_bit_floats_is_counted_and_the_others_are_done(save, tmp_path):
    """In the format of many checkpoints what is too large for it becomes NaN; torch has no `isfinite` for it."""
    tensors = load_file(save("llama") / "model.safetensors")
    tensors = {name: w.to(torch.float8_e4m3fn) if w.ndim == 2 else w for name, w in tensors.items()}
    tensors["lm_head.weight"].view(torch.uint8)[0, :3] = 0x7F
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(save("llama") / "config.json", tmp_path)
    report = analyze(tmp_path, rank=2, factors=tmp_path / "factors")
    reasons = {s.name: s.reason for s in report.coverage.skipped if s.reason != "vector"}
    assert reasons == {"lm_head.weight": "the matrix holds NaN or infinity (3 of 1920 entries)"}
    assert len(report.matrices) == len(list((tmp_path / "factors").iterdir())) == 15


def test_of_a_file_that_is_replaced_the_rest_is_unread_and_nothing_is_of_another(save, tmp_path, monkeypatch):
    shutil.copytree(save("llama"), tmp_path, dirs_exist_ok=True)
    path, fresh = tmp_path / "model.safetensors", tmp_path / "fresh"
    before = analyze(tmp_path)
    save_file({name: 2 * w for name, w in load_file(path).items()}, fresh)
    read, lock = FileSource.read, threading.Lock()

    def replacing(source, tensor, *rows):
        with lock:
            value = read(source, tensor, *rows)
            if fresh.exists():
                os.replace(fresh, path)
            return value

    monkeypatch.setattr(FileSource, "read", replacing)
    report = analyze(tmp_path)
    expected = {m.name: m.spectral_norm for m in before.matrices}
    assert {m.name: m.spectral_norm for m in report.matrices}.items() < expected.items()
    assert report.model.files[0].sha256 in (None, before.model.files[0].sha256)
    assert len(report.unread) + len(report.matrices) == len(before.matrices)
    assert "the file changed while it was being read; run again" in report.unread[0].reason


def test_degenerate_matrices_have_null_not_nonsense(tmp_path):
    save_file(
        {"zero.weight": torch.zeros(6, 4), "row.weight": torch.randn(1, 9), "one.weight": torch.ones(1, 1),
         "rank1.weight": torch.ones(8, 5), "same.weight": torch.eye(7)},
        tmp_path / "model.safetensors",
    )  # fmt: skip
    report = analyze(tmp_path)
    by_name = {m.name.removesuffix(".weight"): m for m in report.matrices}
    zero = by_name["zero"]
    assert (zero.spectral_norm, zero.numerical_rank) == (0, 0)
    assert zero.stable_rank is zero.effective_rank is zero.latent_dim is zero.mp_edge is zero.capacity_log10 is None
    assert by_name["row"].shape == (1, 9)
    assert (by_name["row"].latent_dim, by_name["row"].expressivity) == (1, None)
    assert by_name["rank1"].numerical_rank == 1
    assert by_name["one"].mp_fit_distance is None
    assert by_name["same"].effective_rank == pytest.approx(7)
    assert "NaN" not in report.to_json()


def test_a_second_copy_of_a_tied_weight_is_an_alias_only_if_it_is_equal(save, tmp_path):
    tensors = load_file(save("gpt2") / "model.safetensors")
    (tmp_path / "config.json").write_bytes((save("gpt2") / "config.json").read_bytes())
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    report = analyze(tmp_path)
    assert [(a.name, a.of, a.stored) for a in report.coverage.aliases] == [
        ("lm_head.weight", "transformer.wte.weight", True)
    ]
    decomposed = sum(math.prod(m.shape) for m in report.matrices)
    assert report.coverage.decomposed == decomposed
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    report = analyze(tmp_path)
    assert not report.coverage.aliases
    assert report.matrices[-1].name == "lm_head.weight"


def test_experts_of_a_live_model_and_of_its_checkpoint_agree(save):
    disk, live = analyze(save("mixtral")), analyze(models.make("mixtral"))

    def key(matrix):
        return (matrix.layer or 0, matrix.role, matrix.spectral_norm)

    assert [m.part for m in live.matrices if m.role == "gate"][:3] == [
        "expert 0 gate",
        "expert 1 gate",
        "expert 2 gate",
    ]
    for a, b in zip(sorted(disk.matrices, key=key), sorted(live.matrices, key=key), strict=True):
        assert (a.role, a.layer, a.shape) == (b.role, b.layer, b.shape)
        np.testing.assert_allclose(a.singular_values, b.singular_values, rtol=1e-9)
        assert (a.energy_degree, a.capacity_log10) == (b.energy_degree, pytest.approx(b.capacity_log10))


def test_capacity_uses_the_degree_of_the_mlp(save):
    gated = {m.role: m.energy_degree for m in analyze(save("llama")).matrices}
    assert gated == {"embed": 2, "q": 2, "k": 2, "v": 2, "o": 2, "gate": 3, "up": 3, "down": 3, "head": 2}
    plain = {m.role: (m.energy_degree, m.effective_degree) for m in analyze(save("opt")).matrices if m.block}
    assert plain["up"] == (2, pytest.approx(1.466942, abs=1e-6))
    assert plain["q"] == (2, None)


def test_parameters_on_the_meta_device_are_skipped_with_the_remedy():
    model = models.make("bert")
    model.bert.encoder.layer[0].intermediate.to("meta")
    report = analyze(model)
    skipped = {s.name: s.reason for s in report.coverage.skipped if s.reason != "vector"}
    assert skipped == {"bert.encoder.layer.0.intermediate.dense.weight": NO_DATA}


def test_every_share_of_the_work_gives_the_same_numbers(save):
    """The rows of three ranks together are those of one, whatever the order in which threads finish."""
    source = open_source(save("mixtral"))
    inventory = list_matrices(source)
    whole = execute(make_plan(inventory, source.identity, Settings(device="cpu")), source)
    plan = make_plan(inventory, source.identity, Settings(device="cpu"), world_size=3)
    parts = {m.name: m for rank in range(3) for m in execute(plan, source, world=World(rank, 3)).matrices}
    assert [m.name for m in whole.matrices] == [w.ref.name for w in plan.works]
    for matrix in whole.matrices:
        assert matrix == replace(parts[matrix.name], singular_values=matrix.singular_values)


@pytest.mark.parametrize("family", ["mixtral", "gpt2"])
def test_batches_on_several_devices_give_the_same_numbers(save, tmp_path, monkeypatch, family):
    """As on GPUs: small matrices of one shape together, the workers on two devices; one matrix is no number."""
    tensors = load_file(save(family) / "model.safetensors")
    broken = next(name for name in tensors if "w1" in name or "c_fc.weight" in name or "gate_proj" in name)
    tensors[broken].view(-1)[3] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((save(family) / "config.json").read_text())
    source = open_source(tmp_path)
    plan = make_plan(list_matrices(source), source.identity, Settings(device="cpu"))
    alone = execute(plan, source)
    sizes = []
    monkeypatch.setattr(execution, "BATCHED_ON", ("cpu",))
    monkeypatch.setattr(execution, "pick_devices", lambda _: (torch.device("cpu"), torch.device("cpu", 0)))
    monkeypatch.setattr(execution, "exact_each", lambda ws: sizes.append(len(ws)) or exact_each(ws))
    with open_journal(source.identity) as journal:
        together = execute(plan, source, output=Output(journal))
    assert max(sizes) > 1
    assert together.environment["device"] == "2 × cpu"
    assert (together.skipped, together.aliases) == (alone.skipped, alone.aliases)
    assert any("NaN" in skipped.reason for skipped in together.skipped)
    for found, expected in zip(together.matrices, alone.matrices, strict=True):
        assert (found.name, found.part, found.method) == (expected.name, expected.part, expected.method)
        np.testing.assert_allclose(found.singular_values, expected.singular_values, rtol=1e-10, atol=1e-14)
    with open_journal(source.identity) as journal:
        again = execute(plan, source, output=Output(journal))
    assert again.environment["reused"] == len(again.matrices)
    assert again.matrices == together.matrices


@pytest.mark.parametrize("batched_on", ["cpu", "cuda"])
@pytest.mark.parametrize("told", ["CUDA out of memory", "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling"])
def test_where_a_gpu_is_full_the_cpu_goes_on(save, monkeypatch, tmp_path, batched_on, told):
    """Its memory ends in every batch, in every matrix by itself, and where factors are written."""
    source = open_source(save("mixtral"))
    plan = make_plan(list_matrices(source), source.identity, Settings(device="cpu", rank=2))
    alone = execute(plan, source)
    refused = []

    def full_at_first(step):
        def call(*arguments, **options):
            if len(refused) % 2 == 0:
                refused.append(step)
                raise torch.OutOfMemoryError(told) if "out of" in told else RuntimeError(told)
            refused.append(None)
            return step(*arguments, **options)

        return call

    for name in ("measure", "exact_each", "write_factors"):
        monkeypatch.setattr(execution, name, full_at_first(getattr(execution, name)))
    monkeypatch.setattr(execution, "BATCHED_ON", (batched_on,))
    monkeypatch.setattr(execution, "worker_count", lambda *_: 1)
    found = execute(plan, source, output=Output(factors=tmp_path))
    assert {step.__name__ for step in refused if step} == {"write_factors", *(
        ["exact_each"] if batched_on == "cpu" else []), "measure"}  # fmt: skip
    assert len(found.matrices) == len(alone.matrices)
    for row, other in zip(found.matrices, alone.matrices, strict=True):
        np.testing.assert_allclose(row.singular_values, other.singular_values, rtol=1e-9, atol=1e-12)
    assert len(list(tmp_path.glob("*.safetensors"))) == len(alone.matrices)


def test_an_error_that_is_none_of_memory_is_not_tried_again(save, monkeypatch):
    source = open_source(save("llama"))
    plan = make_plan(list_matrices(source), source.identity, Settings(device="cpu"))
    calls = []

    def broken(*arguments, **options):
        calls.append(1)
        raise RuntimeError("device-side assert triggered")

    monkeypatch.setattr(execution, "measure", broken)
    monkeypatch.setattr(execution, "worker_count", lambda *_: 1)
    with pytest.raises(RuntimeError, match="device-side assert"):
        execute(plan, source)
    assert calls


def test_progress_is_reported_in_this_thread(save):
    source = open_source(save("bert"))
    plan = make_plan(list_matrices(source), source.identity, Settings())
    seen = []
    execute(plan, source, progress=lambda work: seen.append((work.ref.name, threading.current_thread())))
    assert {name for name, _ in seen} == {w.ref.name for w in plan.works}
    assert {thread for _, thread in seen} == {threading.main_thread()}


def test_an_interrupt_stops_the_work(save):
    source = open_source(save("bert"))
    plan = make_plan(list_matrices(source), source.identity, Settings())

    def interrupt(work):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(plan, source, progress=interrupt)


def test_an_unknown_device_is_named():
    from lmd_hf.errors import SettingsError

    with pytest.raises(SettingsError, match="device 'abacus' cannot be used"):
        pick_device("abacus")
    assert pick_device("cpu").type == "cpu"


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "mixtral", "vit", "t5"])
@pytest.mark.parametrize("metric", ["identity", "norm"])
def test_a_head_start_from_names_alone_changes_no_number(save, family, metric):
    source = open_source(save(family))
    settings = Settings(metric=metric)
    final = make_plan(list_matrices(source), source.identity, settings)
    alone = execute(final, source)
    with head_start(make_plan(list_by_name(source), source.identity, settings), source, Journal()) as ahead:
        [
            future.exception() for _, future in ahead.spectra.values()
        ]  # all done before the plan is known: the other extreme
        together = execute(final, source, ahead=ahead)
    assert together.matrices == alone.matrices
    for one, other in zip(together.matrices, alone.matrices, strict=True):
        np.testing.assert_array_equal(one.singular_values, other.singular_values)
    assert (together.skipped, together.aliases) == (alone.skipped, alone.aliases)
