"""Evidence on convergence found by itself, in a folder and on the Hub, and between checkpoints that the user names."""

import copy
import json
import shutil

import models
import pytest
import torch
import transformers
from huggingface_hub import hf_hub_download
from safetensors.torch import save as to_bytes
from safetensors.torch import save_file

from lmd_hf import Thresholds, analyze
from lmd_hf.errors import SettingsError, SourceError
from lmd_hf.weights.repository import newest_state
from lmd_hf.weights.source import EMBEDDED_FOLDER, EMBEDDED_ID


def state(last, points=20, step=10):
    losses = [3.0 - (3.0 - last) * i / points for i in range(points)] if last else [2.0] * points
    return json.dumps({"log_history": [{"step": step * (i + 1), "loss": loss} for i, loss in enumerate(losses)]})


@pytest.fixture
def folder(save, tmp_path):
    return shutil.copytree(save("llama"), tmp_path / "run")


def kinds(report):
    return {piece.kind: (piece.verdict, piece.source) for piece in report.convergence.evidence}


def test_the_embedded_model_is_stable_with_its_evidence():
    report = analyze(EMBEDDED_ID)
    assert report.convergence.verdict == "stable"
    assert kinds(report)["loss curve"] == ("stable", "trainer_state.json")
    assert kinds(report)["weights"][0] == "unknown"
    assert "convergence: stable" in report.summary()
    assert "loss curve (trainer\\_state.json): stable" in report.card()
    assert {each.layer for each in report.convergence.layers} == {None, 0, 1, 2, 3}


def test_the_same_file_beside_a_single_weight_file():
    report = analyze(EMBEDDED_FOLDER / "model.safetensors")
    assert kinds(report)["loss curve"] == ("stable", "trainer_state.json")


def test_a_model_at_its_initialisation_is_unstable():
    config_class, model_class, values, _ = models.FAMILIES["llama"]
    torch.manual_seed(0)
    report = analyze(getattr(transformers, model_class)(config_class(**values)))
    assert report.convergence.verdict == "unstable"
    assert list(kinds(report)) == ["weights"]


def test_no_evidence_is_unknown_and_said(tmp_path):
    torch.manual_seed(0)
    low = torch.randn(60, 4) @ torch.randn(4, 90) + 0.05 * torch.randn(60, 90)
    save_file({"low.weight": low}, tmp_path / "model.safetensors")
    report = analyze(tmp_path)
    assert report.convergence.verdict == "unknown"
    assert "weights alone cannot show that a training has converged" in report.summary()


def test_the_newest_state_is_the_one_beside_the_weights_else_the_last_checkpoints(folder):
    assert newest_state([]) is None
    names = ["checkpoint-900/trainer_state.json", "checkpoint-1000/trainer_state.json", "x/trainer_state.json"]
    assert newest_state(names) == "checkpoint-1000/trainer_state.json"
    assert newest_state([*names, "trainer_state.json"]) == "trainer_state.json"
    for step, last in ((900, 1.0), (1000, None)):
        (folder / f"checkpoint-{step}").mkdir()
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(state(last))
    assert kinds(analyze(folder))["loss curve"] == ("stable", "checkpoint-1000/trainer_state.json")
    (folder / "trainer_state.json").write_text(state(1.0))
    assert kinds(analyze(folder))["loss curve"] == ("unstable", "trainer_state.json")
    loose = analyze(folder, thresholds=Thresholds(loss_change=10, untrained_share=2))
    assert loose.convergence.verdict == "stable"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"log_history": 3}', "not json", '{"log_history": [1, null]}'])
def test_a_state_that_cannot_be_read_is_evidence_of_nothing(folder, content):
    (folder / "trainer_state.json").write_text(content)
    report = analyze(folder, roles=("q",))
    verdict, _ = kinds(report)["loss curve"]
    assert verdict == "unknown"


@pytest.fixture
def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_on_the_hub_it_is_fetched_by_itself(hub, files):
    hub.add("org/trained", {**files, "trainer_state.json": state(None).encode()})
    report = analyze("org/trained", roles=("q",))
    assert kinds(report)["loss curve"] == ("stable", "trainer_state.json")
    hub.add("org/resumed", {**files, "checkpoint-20/trainer_state.json": state(1.0).encode()})
    assert kinds(analyze("org/resumed", roles=("q",)))["loss curve"][0] == "unstable"
    hub.add("org/weights-only", files)
    assert "loss curve" not in kinds(analyze("org/weights-only", roles=("q",)))


def test_a_state_too_large_for_a_curve_is_not_fetched(hub, files, monkeypatch):
    monkeypatch.setattr("lmd_hf.weights.repository.STATE_BYTES", 100)
    hub.add("org/huge-state", {**files, "trainer_state.json": state(None).encode()})
    report = analyze("org/huge-state", roles=("q",))
    assert kinds(report)["loss curve"][0] == "unknown"
    assert "which no loss curve needs" in report.summary()
    assert not [path for _, path, _ in hub.requests if "trainer_state" in path]


def test_in_the_cache_it_is_found_online_and_offline(hub, files, monkeypatch):
    hub.add("org/cached", {**files, "trainer_state.json": state(None).encode()})
    first = analyze("org/cached", download=True)
    assert kinds(first)["loss curve"][0] == "stable"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert kinds(analyze("org/cached"))["loss curve"][0] == "stable"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub.add("org/cached-bare", files)
    analyze("org/cached-bare", download=True)
    asked = [path for _, path, _ in hub.requests if "trainer_state" in path]
    assert asked == [path for path in asked if "cached-bare" not in path]  # the listing had said that there is none
    again = analyze("org/cached-bare")
    assert "loss curve" not in kinds(again)


def test_weights_that_were_cached_without_it_find_it_on_the_hub(hub, files):
    hub.add("org/half-cached", {**files, "trainer_state.json": state(None).encode()})
    for name in files:
        hf_hub_download("org/half-cached", name)
    assert kinds(analyze("org/half-cached", roles=("q",)))["loss curve"] == ("stable", "trainer_state.json")


def moved(model, by):
    """The same model, every matrix moved by a share of its own norm in a random direction."""
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in other.parameters():
            step = torch.randn_like(p)
            p += by * p.norm() / step.norm() * step
    return other


def test_two_checkpoints_that_the_user_names():
    model = models.make("llama")
    before = analyze(model, before=moved(model, 1e-4), thresholds=no_weights())
    assert before.convergence.verdict == "stable"
    assert kinds(before)["checkpoints"][0] == "stable"
    evidence = before.convergence.evidence[0]
    assert 0 < evidence.numbers["spectrum_change"] < 1e-4
    assert evidence.numbers["subspace_cos2"] > 0.999
    assert {each.layer for each in evidence.layers} == {None, 0, 1}
    far = analyze(model, before=moved(model, 0.5), thresholds=no_weights())
    assert far.convergence.verdict == "unstable"
    same = analyze(model, before=copy.deepcopy(model), thresholds=no_weights())
    assert same.convergence.verdict == "unknown"
    assert "no training between" in same.summary()


def no_weights():
    """Thresholds under which random weights count for nothing."""
    return Thresholds(untrained_share=2.0)


def test_a_selection_holds_for_the_comparison_too():
    model = models.make("llama")
    report = analyze(model, before=moved(model, 1e-4), metric="norm", layers="0", roles=("q", "k"))
    assert [each.layer for each in report.convergence.evidence[0].layers] == [0]


def test_revisions_of_a_repository(hub, files, save):
    commit = hub.add("org/steps", files)
    other = moved(models.make("llama"), 1e-4)
    tensors = {name: value.contiguous() for name, value in other.state_dict().items()}
    hub.repos["org/steps"].commit({**files, "model.safetensors": to_bytes(tensors)}, branch="step-2")
    for before in ("@step-2", "org/steps@step-2"):
        report = analyze("org/steps", before=before, roles=("q",))
        (piece,) = (each for each in report.convergence.evidence if each.kind == "checkpoints")
        assert piece.source.startswith("org/steps at ")
        assert (piece.verdict, report.model.commit) == ("stable", commit)


def test_a_checkpoint_that_is_not_there_stops_before_the_work(folder):
    with pytest.raises(SourceError, match="no such folder"):
        analyze(folder, before=folder / "checkpoint-1")
    with pytest.raises(SettingsError, match="revision of a Hub repository"):
        analyze(folder, before="@main")


def test_a_model_with_nothing_in_common_is_evidence_of_nothing(tmp_path):
    for name in ("a", "b"):
        save_file({f"{name}.weight": torch.randn(12, 9)}, tmp_path / f"{name}.safetensors")
    report = analyze(tmp_path / "a.safetensors", before=tmp_path / "b.safetensors")
    assert kinds(report)["checkpoints"][0] == "unknown"
    assert "no matrix in common" in report.summary()


def test_a_model_of_another_type_is_no_checkpoint(save):
    with pytest.raises(SettingsError, match="but a vit model"):
        analyze(save("llama"), before=save("vit"))
