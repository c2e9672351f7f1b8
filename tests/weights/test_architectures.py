"""The sweep over architectures on a fixed sample; the whole of it is `benchmarks/architectures.py`."""

import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import transformers
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from lmd_hf.weights.heads import list_heads
from lmd_hf.weights.inventory import list_matrices
from lmd_hf.weights.source import open_source


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SAMPLE = """
    albert bart bert blip clip codegen cohere deberta deberta-v2 deepseek_v2 deepseek_v3 dinov2 distilbert electra
    falcon fuyu gemma2 gpt2 gpt_bigcode gpt_neox gpt_oss gptj granite granitemoe jamba jetmoe llama llama4_text llava
    mamba mamba2 mixtral modernbert moonshine moshi mpt nllb-moe olmo2 opt paligemma persimmon phi3 phi4_multimodal
    qwen2_moe qwen2_vl qwen3 qwen3_moe roberta siglip swin switch_transformers t5 timesformer vit wav2vec2 whisper xlm
    xlm-roberta
"""
WITHOUT_PAIRS = ("mamba", "mamba2")


@pytest.mark.slow
def test_a_sample_of_architectures_is_counted_named_and_runs_as_claimed():
    """(a) and (c) each type in full size, on the meta device; (b) a small one in its forward pass."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "architectures.py"), *SAMPLE.split()],
        **{"capture_output": True, "text": True, "timeout": 600, "check": True},
    )
    count = len(SAMPLE.split())
    judged = count - len(WITHOUT_PAIRS)
    assert f"{count} of them build" in done.stdout, done.stdout
    assert f"every parameter counted: {count} of {count} (100.0%)" in done.stdout
    assert f"holds in the forward pass: {judged} of {judged} (100.0%)" in done.stdout, done.stdout
    assert f"saved names agree: {count} of {count} (100.0%)" in done.stdout, done.stdout


@pytest.fixture
def forward_pass(monkeypatch):
    """The check (b) as a module; its folder is no package."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import forward_pass
    import tiny_models

    return forward_pass, lambda name, cls: next(tiny_models.build(name, cls))


def wrong(refs, kind):
    """The same matrices with one false claim in layer 1."""
    roles = {"v and k": {"k": "v", "v": "k"}, "gate and up": {"gate": "up", "up": "gate"}, "shifted rows": {}}[kind]
    for ref in refs:
        if ref.layer == 1 and kind == "shifted rows" and ref.role in ("q", "k"):
            (start, stop, step), *more = ref.rows
            ref = replace(ref, rows=((start + 4, stop + 4, step), *more))
        yield replace(ref, role=roles.get(ref.role, ref.role)) if ref.layer == 1 else ref


@pytest.mark.parametrize(
    ("name", "kind"),
    [("gpt2", "v and k"), ("gpt2", "shifted rows"), ("llama", "gate and up"), ("mixtral", "gate and up")],
)
def test_the_forward_pass_finds_a_false_claim(forward_pass, monkeypatch, name, kind):
    module, build = forward_pass
    model = build(name, {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}.get(name, "MixtralForCausalLM"))
    transformers.logging.disable_progress_bar()
    assert not module.judge_forward(model).failed
    right = list_matrices
    monkeypatch.setattr(
        module, "list_matrices", lambda source: replace(inv := right(source), selected=tuple(wrong(inv.selected, kind)))
    )
    outcome = module.judge_forward(model)
    assert outcome.failed
    assert all(".1" in failure for failure in outcome.failed)


@pytest.mark.parametrize(
    ("name", "class_name"),
    [
        ("moonshine", "MoonshineForConditionalGeneration"),  # fc1 holds up and gate, in the decoder alone
        ("moshi", "MoshiForCausalLM"),  # fc1 holds gate and up
        ("phi4_multimodal", "Phi4MultimodalForCausalLM"),  # text: gate, up; sound: up, gate
        ("jetmoe", "JetMoeForCausalLM"),  # experts that are pairs of q and o
        ("axk2", "AXK2ForCausalLM"),  # two MLPs in a layer, one of them gated
        ("tipsv2_text_model", "Tipsv2TextModel"),  # a converter that names only the leaves of its pieces
    ],
)
def test_what_the_forward_pass_has_found_stays_right(forward_pass, name, class_name):
    module, build = forward_pass
    if not hasattr(transformers, class_name):
        pytest.skip("too old")
    outcome = module.judge_forward(build(name, class_name))
    assert outcome.passed
    assert not outcome.failed


@pytest.mark.parametrize(
    ("name", "class_name"),
    [
        ("grounding-dino", "GroundingDinoForObjectDetection"),
        ("neucodec", "NeuCodecModel"),
        ("step3p7", "Step3p7ForConditionalGeneration"),
        ("xclip", "XCLIPModel"),
        ("xcodec2", "Xcodec2Model"),
    ],
)
def test_heads_are_as_many_as_the_module_has_and_scaled_as_it_does(forward_pass, name, class_name):
    """Of the parts of a model that count their heads in a place of their own, too."""
    if not hasattr(transformers, class_name):
        pytest.skip(f"transformers {transformers.__version__} has no {class_name}")
    model = forward_pass[1](name, class_name)
    heads, _ = list_heads(list_matrices(open_source(model)))
    of_module = Counter(head.q[0].ref.name.rsplit(".", 2)[0] for head in heads)
    scales = {head.q[0].ref.name.rsplit(".", 2)[0]: head.scale for head in heads}
    assert of_module
    for path, count in of_module.items():
        attention = model.get_submodule(path)
        names = [key for key in ("num_heads", "num_attention_heads") if hasattr(attention, key)]
        own = getattr(attention, names[0]) if names else attention.config.num_attention_heads
        assert count == own, path
        scale = getattr(attention, "scaling", getattr(attention, "scale", None))
        assert scale is None or scales[path] == pytest.approx(scale), path


@pytest.mark.parametrize("name", ["nanochat", "neomme", "muse_glimmer_text", "qwen3", "llama"])
def test_norms_of_queries_and_keys_are_told_though_they_have_no_gain(forward_pass, name):
    if (class_name := MODEL_MAPPING_NAMES.get(name)) is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    model = forward_pass[1](name, class_name)
    heads, _ = list_heads(list_matrices(open_source(model)))
    names = [path for path, _ in model.named_modules() if re.search(r"\b(?:q|k|qk)_norm$", path)]
    assert {head.qk_norm for head in heads} == {bool(names)} == {name != "llama"}
