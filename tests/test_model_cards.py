"""The template is what the committed cards have in common."""

import importlib.util
from pathlib import Path

import pytest


CARDS = Path(__file__).parents[1] / "model_cards"
MODELS = ("lmd-hf--stdlib-llama-1m", "sentence-transformers--all-MiniLM-L6-v2")


@pytest.fixture
def made():
    """The script that makes them."""
    spec = importlib.util.spec_from_file_location("make_cards", CARDS / "make.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_the_template_is_what_the_cards_have_in_common(made):
    template = made.template([(CARDS / model / "README.md").read_text(encoding="utf-8") for model in MODELS])
    assert template == (CARDS / "template.md").read_text(encoding="utf-8")
    assert "## Layer Matrix Decomposition" in template
    assert "| attention q | … |" in template
    assert not any(model.partition("--")[2] in template for model in MODELS)


def test_a_word_that_differs_is_left_open(made):
    assert made.template(["Each of 3 matrices\n| q | 1 | 2 |\n", "Each of 40 matrices\n| q | 3 | 4 |\n"]) == (
        "Each of … matrices\n| q | … |\n"
    )
