"""Size: planning a model of 200 shards and 400 GB from headers, quickly and in little memory."""

import json
import subprocess
import sys

import pytest


LAYERS, HIDDEN, FFN, VOCAB, SHARDS = 126, 16384, 53248, 128256, 200


@pytest.fixture(scope="module")
def giant(tmp_path_factory):
    """A LLaMA-like checkpoint of 200 shards whose data are holes: headers and lengths are real, no byte is stored."""
    folder = tmp_path_factory.mktemp("giant")
    layer = {"q": (HIDDEN, HIDDEN), "k": (1024, HIDDEN), "v": (1024, HIDDEN), "o": (HIDDEN, HIDDEN)}
    tensors = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN)}
    for index in range(LAYERS // 2):
        prefix = f"model.layers.{index}"
        tensors |= {f"{prefix}.self_attn.{role}_proj.weight": shape for role, shape in layer.items()}
        tensors |= {f"{prefix}.mlp.{name}_proj.weight": (FFN, HIDDEN) for name in ("gate", "up")}
        tensors |= {f"{prefix}.mlp.down_proj.weight": (HIDDEN, FFN), f"{prefix}.input_layernorm.weight": (HIDDEN,)}
        tensors |= {f"{prefix}.post_attention_layernorm.weight": (HIDDEN,)}
    names = list(tensors)
    weight_map, total = {}, 0
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        header, offset = {}, 0
        for name in names[shard::SHARDS]:
            size = 2
            for axis in tensors[name]:
                size *= axis
            header[name] = {"dtype": "BF16", "shape": tensors[name], "data_offsets": [offset, offset + size]}
            offset += size
            weight_map[name] = file
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + offset)
        total += offset
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": FFN,
        "num_hidden_layers": LAYERS // 2, "num_attention_heads": 128, "num_key_value_heads": 8, "vocab_size": VOCAB,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder, total


PLAN = """
import json, sys, time
import torch, transformers
from transformers import LlamaForCausalLM
begun = time.perf_counter()
from lmd_hf.api import plan
works = plan(sys.argv[1]).works
# of this program alone: getrusage still counts what the process was before it started this program
peak = next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"seconds": time.perf_counter() - begun, "megabytes": peak, "matrices": len(works)}))
"""


@pytest.mark.slow
def test_a_400_gb_model_is_planned_in_seconds(giant):
    folder, total = giant
    assert total > 400e9
    answer = subprocess.run([sys.executable, "-c", PLAN, str(folder)], capture_output=True, text=True, check=True)
    figures = json.loads(answer.stdout)
    assert figures["matrices"] == 7 * (LAYERS // 2) + 2
    assert figures["seconds"] < 3
    assert figures["megabytes"] < 500


@pytest.mark.slow
def test_the_wheel_holds_everything_it_needs(tmp_path):
    """Data files travel with the package: the families, the schema, the embedded model and the type marker."""
    import zipfile
    from pathlib import Path

    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(root)]
    subprocess.run(command, check=True)
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    for name in ("py.typed", "weights/families.toml", "report/schema.json", "demo/model/model.safetensors"):
        assert f"lmd_hf/{name}" in names
