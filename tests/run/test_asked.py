"""What is asked for in another type, or cannot mean anything where it stands, is one line that says what is wanted."""

from pathlib import Path

import numpy as np
import pytest
import torch

import lmd_hf
from lmd_hf.errors import SettingsError, SourceError
from lmd_hf.records import Data, Settings
from lmd_hf.run.asked import check_types, hub_id
from lmd_hf.weights.source import EMBEDDED_FOLDER, EMBEDDED_ID


@pytest.fixture(scope="module")
def report():
    return lmd_hf.analyze(EMBEDDED_ID, roles=("q",))


@pytest.mark.parametrize("model", [None, 5, torch.ones(2, 2), {"weight": torch.ones(2, 2)}, [None]], ids=type)
def test_what_is_no_model(model):
    for use in (
        lmd_hf.analyze,
        lmd_hf.plan,
        lambda m: lmd_hf.compare(EMBEDDED_ID, m),
        lambda m: lmd_hf.truncate(m, rank=1),
    ):
        with pytest.raises(SettingsError, match="give a Hub id, a folder, a weight file or a torch module"):
            use(model)
    with pytest.raises(SettingsError, match="the model is of the type"):
        lmd_hf.analyze(EMBEDDED_ID, before=5)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ({"layers": 1}, "layers is 1; give a text: only these layers, such as 0-3"),
        ({"layers": [0, 1]}, r"layers is \[0, 1\]; give a text"),
        ({"match": ["a"]}, r"match is \['a'\]; give a text"),
        ({"roles": None}, "roles is None; give a tuple of names"),
        ({"roles": "down"}, "roles is 'down'; give a tuple of names"),
        ({"roles": (1,)}, "one of roles is 1; give a text"),
        ({"tolerance": "x"}, "tolerance is 'x'; give a number"),
        ({"rank": True}, "rank is True; give a whole number"),
        ({"rank": "3"}, "rank is '3'; give a whole number"),
        ({"heads": "no"}, "heads is 'no'; give True or False"),
        ({"data": 5}, "data is 5; give the name of a dataset"),
    ],
)
def test_a_setting_of_another_type(setting, told):
    for use in (
        lambda: lmd_hf.analyze(EMBEDDED_ID, **setting),
        lambda: lmd_hf.plan(EMBEDDED_ID, settings=Settings(**setting)),
    ):
        with pytest.raises(SettingsError, match=told):
            use()


def test_settings_of_the_right_types():
    check_types(Settings(tolerance=1, roles=["q"], data=Data("x")))
    check_types(Data("x", samples=np.int64(3)))
    with pytest.raises(SettingsError, match=r"samples is 1\.5; give a whole number"):
        check_types(Data("x", samples=1.5))


@pytest.mark.parametrize(
    ("use", "told"),
    [
        (lambda r: lmd_hf.analyze(EMBEDDED_ID, thresholds=0.1), "thresholds is 0.1; give a value of lmd_hf.Thresholds"),
        (lambda r: lmd_hf.analyze(EMBEDDED_ID, thresholds=lmd_hf.Thresholds("x")), "loss_change is 'x'; give a number"),
        (lambda r: lmd_hf.lora_config(r, budget="5000"), "budget is '5000'; give a number"),
        (lambda r: lmd_hf.lora_config(r, budget=9000, scale=float("inf")), "scale is inf"),
        (lambda r: lmd_hf.lora_config(r, budget=9000, roles="q"), "roles is 'q'; give a tuple"),
        (lambda r: lmd_hf.lora_config(None, budget=9000), "report is None; give what lmd_hf.analyze"),
        (lambda r: lmd_hf.freeze_recipe(None), "report is None; give what lmd_hf.analyze gave"),
        (lambda r: lmd_hf.freeze_recipe(r, share="a"), "share is 'a'; give a number"),
        (lambda r: lmd_hf.freeze(torch.nn.Linear(2, 2), ["("]), r"'\(' is no regular expression"),
        (lambda r: lmd_hf.freeze(torch.nn.Linear(2, 2), "weight"), "recipe is 'weight'; give a tuple"),
        (lambda r: lmd_hf.truncate(EMBEDDED_ID, ratio="0.5"), "ratio is '0.5'; give a number"),
        (lambda r: lmd_hf.truncate(EMBEDDED_ID, rank=1, roles="q"), "roles is 'q'; give a tuple"),
        (lambda r: lmd_hf.push_results(None, "org/results"), "report is None; give what lmd_hf.analyze gave"),
    ],
)
def test_an_argument_of_another_type(report, use, told):
    with pytest.raises(SettingsError, match=told):
        use(report)


@pytest.mark.parametrize("model", [EMBEDDED_FOLDER, str(EMBEDDED_FOLDER), EMBEDDED_FOLDER / "model.safetensors"])
def test_a_revision_of_what_is_here_is_refused(model):
    for use in (
        lambda: lmd_hf.analyze(model, revision="main"),
        lambda: lmd_hf.plan(model, revision="main"),
        lambda: lmd_hf.compare(model, model, tuned_revision="main"),
        lambda: lmd_hf.truncate(model, rank=1, revision="main"),
    ):
        with pytest.raises(SettingsError, match="is on this machine, and only repositories on the Hub have revisions"):
            use()


def test_a_revision_of_a_module_is_refused():
    with pytest.raises(SettingsError, match="Linear: is on this machine"):
        lmd_hf.analyze(torch.nn.Linear(2, 2), revision="main")


@pytest.mark.parametrize("subfolder", ["../x", "a/../../x", "/etc"])
def test_a_subfolder_is_inside_its_repository(subfolder):
    with pytest.raises(SettingsError, match="give a folder inside the repository"):
        lmd_hf.analyze("org/m", subfolder=subfolder)


def test_what_can_be_an_id():
    assert hub_id("org/name") == "org/name"
    for wrong in ("org/name@main", "a b", "a/b/c", str(Path("/x")), "https://huggingface.co/org/name", ""):
        with pytest.raises(SourceError, match="write org/name"):
            hub_id(wrong)
