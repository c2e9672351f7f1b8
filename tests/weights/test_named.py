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
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from lmd_hf.records import TensorRef
from lmd_hf.run.measure import ACTIVATIONS
from lmd_hf.weights import inventory
from lmd_hf.weights.adapter import read_tree
from lmd_hf.weights.families import _table
from lmd_hf.weights.formats import list_weights
from lmd_hf.weights.heads import list_heads
from lmd_hf.weights.inventory import list_matrices
from lmd_hf.weights.named import is_named


ENCODERS, DECODERS = (
    [model_type for row in _table()["named"] if row["kind"] == kind for model_type in row["models"]]
    for kind in ("encoder", "decoder")
)
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 60, "head_dim": 8,
         "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}  # fmt: skip


def saved(model_type, **changes):
    """The headers that `save_pretrained` would write, and the configuration."""
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        config = CONFIG_MAPPING[model_type](**{**SMALL, **changes})
        classes = MODEL_MAPPING_NAMES if model_type in ENCODERS else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        model = getattr(t, classes[model_type])(config)
    tied = model.all_tied_weights_keys or {}
    values = {name: value for name, value in model.state_dict().items() if name not in tied}
    tensors = tuple(TensorRef(name, "m", 0, 4 * v.numel(), "F32", tuple(v.shape)) for name, v in values.items())
    described = model.config.to_diff_dict() | {"architectures": [type(model).__name__], "model_type": model_type}
    return SimpleNamespace(config=described, tensors=tensors, module=None, shared=(), notes=(), updates=(), read=None)


def known(source):
    return is_named(list_weights(source.tensors, source.config, source.read), source.config)


def same(monkeypatch, source):
    """What names tell of the matrices and heads, which is what the module tree tells."""
    assert known(source)
    told = list_matrices(source)
    with monkeypatch.context() as patch:
        patch.setattr(inventory, "find_tree", read_tree)
        asked = list_matrices(source)
    assert asked == told
    assert list_heads(asked) == list_heads(told)
    return told


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("model_type", DECODERS)
def test_names_say_what_the_module_tree_says(monkeypatch, model_type, tie):
    told = same(monkeypatch, saved(model_type, tie_word_embeddings=tie))
    assert len(told.selected) == 7 * 3 + 2 - tie
    assert len(told.aliases) == tie
    heads, unformed = list_heads(told)
    assert (len(heads), len(unformed)) == (4 * 3, 0)


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("model_type", ENCODERS)
def test_encoders_too(monkeypatch, model_type, pooled):
    source = saved(model_type)
    source.tensors = tuple(tensor for tensor in source.tensors if pooled or not tensor.name.startswith("pooler"))
    source.tensors += (TensorRef("embeddings.position_ids", "m", 0, 8 * 512, "I64", (1, 512)),)
    told = same(monkeypatch, source)
    assert len(told.selected) == 6 * 3 + 3 + pooled
    assert len(list_heads(told)[0]) == 4 * 3


@pytest.mark.parametrize("model_type", ENCODERS + DECODERS)
def test_what_a_configuration_leaves_open_changes_nothing(monkeypatch, model_type):
    """Either names do not tell all without that key, or it makes no difference."""
    keys = [
        key
        for key in saved(model_type).config
        if key not in ("head_dim", "model_type", "architectures", "pad_token_id")
    ]
    for key in keys:
        source = saved(model_type)
        del source.config[key]
        if known(source):
            same(monkeypatch, source)


def test_layers_without_positions_are_told_by_names_too(monkeypatch):
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    told = same(monkeypatch, saved("exaone4", layer_types=kinds, sliding_window=8))
    assert [head.rotary for head in list_heads(told)[0][::4]] == [True, False, True]


def test_a_tie_that_is_stored_twice_is_found_by_name(monkeypatch):
    source = saved("qwen3", tie_word_embeddings=True)
    head = next(tensor for tensor in source.tensors if tensor.name == TABLE)
    source.tensors += (TensorRef(HEAD, "m", 0, head.stop, "F32", head.shape),)
    told = list_matrices(source)
    monkeypatch.setattr(inventory, "find_tree", read_tree)
    assert list_matrices(source) == told
    assert next(ref.tied_to for ref in told.selected if ref.name == HEAD) == TABLE


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
