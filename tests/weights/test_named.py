"""Where names tell everything, transformers is not asked, and would say the same."""

import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
import transformers as t
from transformers.activations import ACT2FN
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lmd_hf.records import TensorRef
from lmd_hf.run.measure import ACTIVATIONS
from lmd_hf.weights import inventory, named
from lmd_hf.weights.adapter import read_tree
from lmd_hf.weights.families import _table
from lmd_hf.weights.formats import list_weights
from lmd_hf.weights.inventory import list_matrices
from lmd_hf.weights.named import is_named


TYPES = [model_type for row in _table()["named"] for model_type in row["models"]]
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 60, "head_dim": 8,
         "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}  # fmt: skip


def saved(model_type, **changes):
    """The headers that `save_pretrained` would write, and the configuration."""
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        config = CONFIG_MAPPING[model_type](**{**SMALL, **changes})
        model = getattr(t, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])(config)
    tied = model.all_tied_weights_keys or {}
    values = {name: value for name, value in model.state_dict().items() if name not in tied}
    tensors = tuple(TensorRef(name, "m", 0, 4 * v.numel(), "F32", tuple(v.shape)) for name, v in values.items())
    described = model.config.to_diff_dict() | {"architectures": [type(model).__name__], "model_type": model_type}
    return SimpleNamespace(config=described, tensors=tensors, module=None, shared=(), notes=(), updates=(), read=None)


def known(source):
    return is_named(list_weights(source.tensors, source.config, source.read), source.config)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("model_type", TYPES)
def test_names_say_what_the_module_tree_says(monkeypatch, model_type, tie):
    source = saved(model_type, tie_word_embeddings=tie)
    assert known(source)
    told = list_matrices(source)
    monkeypatch.setattr(inventory, "find_tree", read_tree)
    assert list_matrices(source) == told
    assert len(told.selected) == 7 * 3 + 2 - tie
    assert len(told.aliases) == tie


def test_a_tie_that_is_stored_twice_is_found_by_name(monkeypatch):
    source = saved("qwen3", tie_word_embeddings=True)
    head = next(tensor for tensor in source.tensors if tensor.name == named.EMBEDDING)
    source.tensors += (TensorRef(named.HEAD, "m", 0, head.stop, "F32", head.shape),)
    told = list_matrices(source)
    monkeypatch.setattr(inventory, "find_tree", read_tree)
    assert list_matrices(source) == told
    assert next(ref.tied_to for ref in told.selected if ref.name == named.HEAD) == named.EMBEDDING


@pytest.mark.parametrize(
    "change",
    [
        {"architectures": ["LlamaForSequenceClassification"]},
        {"architectures": None},
        {"model_type": "gpt9"},
        {"tie_word_embeddings": None},
        {"hidden_act": None},
        {"hidden_size": 31},
        {"num_hidden_layers": 2},
        {"num_hidden_layers": None},
    ],
)
def test_a_configuration_that_leaves_something_open_is_left_to_transformers(change):
    source = saved("llama")
    source.config |= change
    assert not known(source)


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.0.mlp.gate_proj.qweight", "score.weight", "model.x"]
)
def test_any_other_name_is_left_to_transformers(name):
    source = saved("llama")
    assert known(source)
    source.tensors += (TensorRef(name, "m", 0, 128, "F32", (32,)),)
    assert not known(source)


def test_an_analysis_of_a_plain_decoder_imports_no_transformers(save):
    code = f"import sys, lmd_hf; lmd_hf.analyze({str(save('llama'))!r}); print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_transformers(name):
    x = torch.linspace(-30, 30, 601, dtype=torch.float64)
    torch.testing.assert_close(ACTIVATIONS[name](x), ACT2FN[name](x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "change",
    [
        *({"num_hidden_layers": n} for n in ("x", [1], float("inf"), 2_000_000_000)),
        *({"hidden_size": n} for n in ([32], {})),
        *({"architectures": n} for n in (5, {"a": 1}, "LlamaForCausalLM")),
        {"model_type": ["llama"]},
    ],
)
def test_a_configuration_of_odd_types_is_left_to_transformers(change):
    source = saved("llama")
    source.config |= change
    assert not known(source)
