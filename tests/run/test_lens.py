"""Directions read as tokens: planted ones are found, through the lens that is stated; answers are the model's own."""

import models
import pytest
import torch
import transformers
from torch.nn.functional import normalize
from transformers import AutoModelForCausalLM, AutoTokenizer

from lmd_hf import read_directions
from lmd_hf.errors import SettingsError
from lmd_hf.run import lens
from lmd_hf.weights.source import EMBEDDED_FOLDER, EMBEDDED_ID


@pytest.fixture
def planted():
    """A LLaMA whose layer 1 reads token 7 and writes token 9, in its MLP and in its head 1, and 5 opposite to 9."""
    model = models.make("llama")
    with torch.no_grad():
        table, head = model.model.embed_tokens.weight, model.lm_head.weight
        head[5] = -head[9]
        block, last = model.model.layers[1], model.model.norm.weight
        hidden = torch.randn(models.F)
        block.mlp.up_proj.weight.copy_(torch.outer(hidden, table[7]) / block.post_attention_layernorm.weight)
        block.mlp.down_proj.weight.copy_(torch.outer(head[9] * last, hidden))
        inner = torch.randn(8)
        block.self_attn.v_proj.weight[:8] = torch.outer(inner, table[7]) / block.input_layernorm.weight
        block.self_attn.o_proj.weight[:, 8:16] = torch.outer(head[9] * last, inner)
    return model


def ends(near, opposite):
    """The nearest token on the side where the sign put it."""
    return [near[0], opposite[0]]


def test_a_planted_direction_is_found_through_the_gains(planted):
    up = read_directions(planted, "up", layer=1, axes=1).directions[0]
    assert ("#7", pytest.approx(1)) in ends(up.reads, up.reads_opposite)
    assert (up.writes, up.share, up.answers) == (None, None, None)
    down = read_directions(planted, "down", layer=1, axes=1).directions[0]
    assert {token for token, _ in ends(down.writes, down.writes_opposite)} == {"#9", "#5"}
    assert down.writes[0][1] == pytest.approx(1)
    assert down.reads is None


def test_a_head_reads_and_writes(planted):
    found = read_directions(planted, "head 1", layer=1, axes=1)
    direction = found.directions[0]
    assert ("#7", pytest.approx(1)) in ends(direction.reads, direction.reads_opposite)
    assert {direction.writes[0][0], direction.writes_opposite[0][0]} == {"#9", "#5"}
    positive = direction.reads[0] == ("#7", pytest.approx(1))  # what is read on one end is written on the same
    assert (direction.writes[0][0] == "#9") is positive
    assert "V: embedding, U: output head lm_head.weight with the last norm's gain; cosines" in found.lens
    assert "folded in: model.layers.1.input_layernorm.weight" in found.lens
    assert found.part == "layer 1 attention head 1"


def test_the_cosines_are_those_of_the_embedding():
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_FOLDER).double()
    found = read_directions(EMBEDDED_ID, "gate", layer=2, axes=3, tokens=4)
    block = model.model.layers[2]
    _, s, vh = torch.linalg.svd(block.mlp.gate_proj.weight * block.post_attention_layernorm.weight)
    cosines = normalize(model.model.embed_tokens.weight, dim=1) @ vh[:3].T
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_FOLDER)
    for place, direction in enumerate(found.directions):
        assert direction.strength == pytest.approx(s[place].item())
        values, order = cosines[:, place].abs().max(0)
        near = max(direction.reads[0], direction.reads_opposite[0], key=lambda pair: pair[1])
        assert near == (tokenizer.decode([int(order)]), pytest.approx(values.item(), rel=1e-5))
        assert len(direction.reads) == 4


def test_a_text_is_answered_as_the_model_computes():
    text, seen = "import os\nprint(os.path)", {}
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_FOLDER, dtype=torch.float32)
    down = model.model.layers[3].mlp.down_proj
    down.register_forward_hook(lambda m, args, output: seen.update(y=output[0].detach().double()))
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_FOLDER)
    batch = tokenizer(text, return_tensors="pt")
    model(input_ids=batch["input_ids"])
    found = read_directions(EMBEDDED_ID, "down", layer=3, text=text, axes=5, tokens=3)
    u = torch.linalg.svd(down.weight.detach().double()).U
    answers = seen["y"] @ u
    energy = answers.square().sum(0) / answers.square().sum()
    assert [each.index for each in found.directions] == energy.argsort(descending=True)[:5].tolist()
    words = [tokenizer.decode([i]) for i in batch["input_ids"][0].tolist()]
    for each in found.directions:
        assert each.share == pytest.approx(energy[each.index].item(), rel=1e-4)
        place = answers[:, each.index].abs().argmax().item()
        assert each.answers[0][0] == words[place]
        assert abs(each.answers[0][1]) == pytest.approx(answers[place, each.index].abs().item(), rel=1e-4)
    assert "of what answers" in str(found)
    assert "direction" in str(read_directions(EMBEDDED_ID, "head 0", layer=0, text=text))


def test_the_choice_must_be_one_thing(planted):
    with pytest.raises(SettingsError, match="nothing is called 'nose' in layer 1; give a role"):
        read_directions(planted, "nose", layer=1)
    with pytest.raises(SettingsError, match="'attention' in layer 0 may be 4 things: 'layer 0 attention q'"):
        read_directions(planted, "attention", layer=0)
    with pytest.raises(SettingsError, match="nothing is called 'head 9' in layer 0"):
        read_directions(planted, "head 9", layer=0)
    mixtral = models.make("mixtral")
    assert read_directions(mixtral, "up expert 2", layer=0).part == "layer 0 moe up expert 2"


def test_sides_that_are_no_stream_are_left_out():
    found = read_directions(models.make("bert"), "o", layer=0, axes=1)
    assert found.directions[0].reads is None
    assert found.directions[0].writes is not None
    q = read_directions(models.make("llama"), "q", layer=0, axes=1)
    assert q.directions[0].writes is None


def test_a_composite_model_is_read_through_its_own_output_head():
    """Its vocabulary is in the configuration of its language model."""
    text = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 64}
    vision = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "image_size": 32, "patch_size": 8}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**text),
        vision_config=transformers.CLIPVisionConfig(**vision),
        tie_word_embeddings=False,
    )
    found = read_directions(transformers.LlavaForConditionalGeneration(config), "text down", layer=0, axes=1)
    assert "U: output head lm_head.weight" in found.lens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axes": -1}, "axes is -1; give 1 or more"),
        ({"axes": 1.5}, "axes is 1.5; give a whole number"),
        ({"tokens": 0}, "tokens is 0; give 1 or more"),
        ({"text": 3}, "text is 3; give a text"),
        ({"part": 3}, "part is 3; give a text"),
        ({"part": "embed", "layer": None, "text": "a"}, "a text cannot be put to .* one-hot"),
    ],
)
def test_what_cannot_be_asked_is_one_clear_line(options, message):
    with pytest.raises(SettingsError, match=message):
        read_directions(EMBEDDED_ID, **{"part": "down", "layer": 0, **options})


def test_of_no_answer_nothing_has_a_share():
    answered = lens._Answered(torch.zeros(3, 2), ["a", "b", "c"])
    assert lens._answer(answered, 0, 2) == (None, (("a", 0.0), ("b", 0.0)))
