"""Building the model that a configuration names: nothing is fetched and no code is run for it, and it ends soon."""

import json
import socket

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers.integrations import hub_kernels

from lmd_hf.errors import SourceError
from lmd_hf.run.loading import load_model, origin
from lmd_hf.weights.inventory import list_matrices
from lmd_hf.weights.skeleton import BUILD_ERRORS, build, own_config
from lmd_hf.weights.source import open_source


LLAMA = {"model_type": "llama", "architectures": ["LlamaModel"], "hidden_size": 8, "num_attention_heads": 2,
         "num_hidden_layers": 1, "intermediate_size": 12, "vocab_size": 10}  # fmt: skip
BACKBONE = {"use_timm_backbone": False, "use_pretrained_backbone": True, "backbone": "evil/repo"}


@pytest.fixture
def alone(monkeypatch):
    """A machine with the package `kernels`, on which every use of it and of the network is counted, and fails."""
    asked = []

    def refuse(*arguments, **_):
        asked.append(arguments)
        raise OSError("there is no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(hub_kernels, "get_kernel", refuse)
    for module in (hub_kernels, transformers.modeling_utils):
        monkeypatch.setattr(module, "is_kernels_available", lambda *_: True)
    yield
    assert not asked


def folder(path, config):
    save_file({"a.weight": torch.ones(6, 4)}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation", "_experts_implementation"])
@pytest.mark.parametrize("value", ["evil/kernel", "kernels-community/flash-attn2", "flash_attention_2"])
def test_no_kernel_is_fetched(alone, key, value):
    model = build({**LLAMA, key: value}, 9)
    assert model.config._attn_implementation in ("eager", "sdpa")
    nested = {"model_type": "clip", "architectures": ["CLIPModel"], "text_config": {key: value}}
    assert build(nested, 9).text_model.config._attn_implementation in ("eager", "sdpa")


def test_no_kernel_is_fetched_to_run_a_model(alone, tmp_path):
    model = transformers.LlamaModel(transformers.LlamaConfig(**LLAMA))
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "_attn_implementation": "evil/kernel"}))
    source = open_source(tmp_path)
    loaded = load_model(source, origin(source), "cpu")
    assert torch.equal(loaded.norm.weight, model.norm.weight)


@pytest.mark.parametrize("config", [
    {"model_type": "detr", "architectures": ["DetrModel"], **BACKBONE},
    {"model_type": "dpt", "architectures": ["DPTForDepthEstimation"], **BACKBONE},
    {"model_type": "maskformer", "architectures": ["MaskFormerModel"], **BACKBONE},
    {"model_type": "upernet", "backbone": "evil"},
    {"model_type": "maskformer", "backbone": "evil"},
    {"model_type": "detr", "use_timm_backbone": True, "backbone": "evil/repo"},
    {"model_type": "detr", "backbone_config": "evil/repo"},
    {"model_type": "timm_backbone", "backbone": "hf-hub:evil/repo"},
    {"model_type": "timm_wrapper", "architecture": "local-dir:evil"},
    {"model_type": "timm_wrapper", "architecture": "resnet18", "model_args": {"checkpoint_path": "evil.pt"}},
    {"model_type": "llava", "vision_config": {"model_type": "upernet", "backbone": "evil/repo"}},
])  # fmt: skip
def test_nothing_is_asked_of_another_repository(alone, tmp_path, config):
    source = open_source(folder(tmp_path, config))
    assert "evil" in list_matrices(source).notes[0]
    with pytest.raises(SourceError, match=r"names '.*evil.*', and nothing is fetched"):
        origin(source)


def test_what_is_the_models_own_is_kept():
    timm = {"model_type": "detr", "use_timm_backbone": True, "backbone": "resnet50", "_attn_implementation": "eager"}
    for config in (
        LLAMA,
        timm,
        {**LLAMA, "id2label": {0: "a", 1: "b"}},
        {"model_type": "dpt", "backbone": "x", "backbone_config": {"model_type": "bit"}},
    ):
        assert own_config(config) == config


def test_a_class_in_another_repository_is_not_asked_for(monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run remote code"))
    decoder = {"model_type": "clip_vision_model", "auto_map": {"AutoModelForCausalLM": "evil/repo--m.M"}}
    config = {"model_type": "encoder-decoder", "architectures": ["EncoderDecoderModel"], "encoder": LLAMA}
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        build({**config, "decoder": decoder}, 9)


@pytest.mark.parametrize("change", [
    {"num_hidden_layers": 300_000}, {"num_hidden_layers": 2_000_000_000}, {"num_hidden_layers": float("inf")},
    {"num_attention_heads": 0}, {"hidden_size": 0, "num_attention_heads": 0}, {"dtype": []}, {"num_hidden_layers": "x"},
])  # fmt: skip
def test_what_cannot_be_built_says_so_at_once(change):
    with pytest.raises(BUILD_ERRORS):
        build({**LLAMA, **change}, 9)


@pytest.mark.parametrize("named", [["TextStreamer"], ["DataCollatorWithPadding"], ["pipeline"], 5, {"a": 1}, [], [7]])
def test_a_class_that_is_no_model_is_not_built(tmp_path, named):
    source = open_source(folder(tmp_path, {**LLAMA, "architectures": named}))
    assert len(list_matrices(source).selected) == 1


@pytest.mark.parametrize("model_type", [["llama"], {"a": 1}, 5])
def test_a_model_type_that_is_no_name(tmp_path, model_type):
    source = open_source(folder(tmp_path, {**LLAMA, "model_type": model_type}))
    assert "unknown to transformers" in list_matrices(source).notes[0]


@pytest.mark.parametrize("limit", [float("inf"), float("-inf"), 0.5])
def test_infinity_as_transformers_writes_it_is_read(tmp_path, limit):
    sizes = {"hidden_size": 16, "num_heads": 4, "head_dim": 8, "state_size": 4, "n_groups": 1, "vocab_size": 20}
    config = transformers.Mamba2Config(**sizes, num_hidden_layers=1, time_step_limit=(0.0, limit))
    transformers.Mamba2Model(config).save_pretrained(tmp_path)
    found = list_matrices(open_source(tmp_path))
    assert found.notes == ()
    assert found.config["time_step_limit"] == [0.0, limit]
    assert {ref.role for ref in found.selected} == {"embed", "conv", "ssm"}
