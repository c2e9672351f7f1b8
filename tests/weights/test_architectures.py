"""The sweep over architectures on a fixed sample; the whole of it is `benchmarks/architectures.py`."""

import subprocess
import sys
from pathlib import Path

import pytest


SWEEP = Path(__file__).parents[2] / "benchmarks" / "architectures.py"
SAMPLE = (
    "albert bart bert blip clip codegen cohere deberta deberta-v2 deepseek_v2 deepseek_v3 dinov2 distilbert electra "
    "falcon fuyu gemma2 gpt2 gpt_bigcode gpt_neox gpt_oss gptj granite granitemoe jamba llama llama4_text llava mamba "
    "mamba2 mixtral modernbert mpt nllb-moe olmo2 opt paligemma persimmon phi3 qwen2_moe qwen2_vl qwen3 qwen3_moe "
    "roberta siglip swin switch_transformers t5 timesformer vit wav2vec2 whisper xlm xlm-roberta"
)


@pytest.mark.slow
def test_a_sample_of_architectures_is_counted_and_named():
    """Each type in full size, on the meta device."""
    done = subprocess.run(
        [sys.executable, str(SWEEP), *SAMPLE.split()], capture_output=True, text=True, timeout=300, check=True
    )
    count = len(SAMPLE.split())
    assert f"{count} of them build" in done.stdout, done.stdout
    assert f"every parameter counted: {count} of {count} (100.0%)" in done.stdout
    assert f"saved names agree: {count} of {count} (100.0%)" in done.stdout, done.stdout
