"""Gram products that ranks share: real processes, the numbers of one."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from lmd_hf import analyze
from lmd_hf.records import Settings
from lmd_hf.run.plan import make_plan
from lmd_hf.weights.inventory import list_matrices
from lmd_hf.weights.source import open_source
from lmd_hf.weights.stored import read_long, read_matrix


LAYER = "model.layers.0.mlp"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A long embedding, a wide projection, one with small values that are refined, and one that is no number."""
    torch.manual_seed(0)
    small = torch.randn(4800, 700) * torch.cat((torch.ones(690), torch.full((10,), 1e-5)))
    broken = torch.randn(4800, 700)
    broken[3000, 5] = torch.nan
    tensors = {
        "model.embed_tokens.weight": torch.randn(9000, 800).bfloat16(),
        f"{LAYER}.down_proj.weight": torch.randn(700, 5000),
        f"{LAYER}.gate_proj.weight": small,
        f"{LAYER}.up_proj.weight": broken.half(),
        "model.layers.0.self_attn.q_proj.weight": torch.randn(256, 256),
    }
    folder = tmp_path_factory.mktemp("long")
    save_file(tensors, folder / "model.safetensors")
    return folder


def launch(folder, ranks, *options, script=("-m", "lmd_hf"), **environment):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), *script]
    return subprocess.run(
        [*command, "analyze", str(folder), "--json", *options],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )


def plan(folder, ranks):
    source = open_source(folder)
    return make_plan(list_matrices(source), source.identity, Settings(), ranks)


@pytest.mark.parametrize(("ranks", "cut"), [(1, 0), (3, 1), (6, 4)])
def test_so_many_of_these_matrices_are_cut(folder, ranks, cut):
    assert len({piece.work for mine in plan(folder, ranks).pieces for piece in mine}) == cut


def test_rows_of_the_long_side(folder):
    source = open_source(folder)
    for ref in list_matrices(source).selected:
        w = read_matrix(source, ref)
        long = w if w.shape[0] >= w.shape[1] else w.T
        assert torch.equal(read_long(source, ref, 100, 200).nan_to_num(), long[100:200].nan_to_num())


COUNTING = """
import runpy, sys
from lmd_hf.run import sums
whole = sums.lower_gram
def counting(*arguments):
    sys.stderr.write("summed again\\n")
    return whole(*arguments)
sums.lower_gram = counting
runpy.run_module("lmd_hf", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [3, 6])
def test_several_processes_give_the_numbers_of_one(folder, tmp_path, ranks):
    alone = json.loads(analyze(folder).to_json())
    answer = launch(folder, ranks, HF_ASSETS_CACHE=str(tmp_path / "fresh"))
    assert answer.returncode == 0, answer.stderr
    shared = json.loads(answer.stdout)
    assert shared["environment"]["processes"] == ranks
    assert shared["coverage"] == alone["coverage"]  # the reason of the broken one included
    assert "NaN" in json.dumps(alone["coverage"]["skipped"])
    for found, expected in zip(shared["matrices"], alone["matrices"], strict=True):
        assert found["method"] == expected["method"]
        assert found["singular_values"] == pytest.approx(expected["singular_values"], rel=1e-10)
        assert {k: v for k, v in found.items() if not isinstance(v, (float, list))} == {
            k: v for k, v in expected.items() if not isinstance(v, (float, list))
        }
    assert {row["method"] for row in alone["matrices"]} > {"gram"}  # small values were refined
    (tmp_path / "script.py").write_text(COUNTING)
    again = launch(folder, ranks, script=[str(tmp_path / "script.py")], HF_ASSETS_CACHE=str(tmp_path / "fresh"))
    assert json.loads(again.stdout)["environment"]["reused"] == len(alone["matrices"])
    assert ("summed again" in again.stderr) == (ranks == 6)  # the broken one alone, which is never kept
    assert again.stderr.count("summed again") <= ranks


DYING = """
import os, runpy, sys
from lmd_hf.run import sums
whole = sums.lower_gram
def dying(*arguments):
    if os.environ["RANK"] == "1":
        os._exit(9)
    return whole(*arguments)
def unreadable(*arguments):
    if os.environ["RANK"] == "1":
        raise ValueError("these rows cannot be read")
    return whole(*arguments)
sums.lower_gram = {"die": dying, "fail": unreadable}[os.environ["HOW"]]
runpy.run_module("lmd_hf", run_name="__main__")
"""


@pytest.mark.slow
def test_a_rank_that_dies_before_it_sends_ends_the_run_with_an_error(folder, tmp_path):
    (tmp_path / "script.py").write_text(DYING)
    answer = launch(folder, 3, script=[str(tmp_path / "script.py")], HOW="die")
    assert answer.returncode == 1
    assert "exitcode  : 9" in answer.stderr
    assert answer.stdout == ""


@pytest.mark.slow
def test_what_one_rank_cannot_sum_the_owner_sums(folder, tmp_path):
    (tmp_path / "script.py").write_text(DYING)
    alone = json.loads(analyze(folder).to_json())["matrices"]
    assert any(piece.work not in plan(folder, 3).shards[1] for piece in plan(folder, 3).pieces[1])  # it is sent
    answer = launch(folder, 3, script=[str(tmp_path / "script.py")], HOW="fail", HF_ASSETS_CACHE=str(tmp_path / "own"))
    assert answer.returncode == 0, answer.stderr
    for found, expected in zip(json.loads(answer.stdout)["matrices"], alone, strict=True):
        assert found["singular_values"] == pytest.approx(expected["singular_values"], rel=1e-10)
