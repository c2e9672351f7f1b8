"""The sweep over architectures on a fixed sample; the whole of it is `benchmarks/architectures.py`."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lmd_hf.weights.inventory import list_matrices


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
    ("claim", "names"),
    [
        ("count", "grounding-dino neucodec xclip xcodec2"),  # their parts count heads in places of their own
        ("scale", "step3p7 granite"),
        ("qk_norm", "nanochat neomme muse_glimmer_text qwen3"),  # the first three without a gain
        ("rotary", "smollm3 cohere2 exaone4 exaone_moe afmoe flint kolibri1 beam muse_glimmer_text"),  # not all layers
    ],
)
def test_claims_of_heads_are_those_of_their_modules(monkeypatch, claim, names):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import head_claims
    from architectures import class_of
    from tiny_models import build

    for name in set(names.split()) & set(CONFIG_MAPPING):
        found = list(head_claims.differences(next(build(name, class_of(name)))))
        assert not [each for each in found if each[2] != each[3]], name
        told = {value for of, _, value, _ in found if of == claim}
        assert told == {"qk_norm": {True}, "rotary": {True, False}}.get(claim, told), name
        assert told
