"""The journal: what is finished is found again, and nothing that was torn, changed or only planned is."""

import json
import logging
import os
import resource
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import models
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lmd_hf import analyze, cli
from lmd_hf.matrix.spectrum import Spectrum
from lmd_hf.records import LowRank, ModelIdentity, Settings
from lmd_hf.run.execute import Output, execute
from lmd_hf.run.journal import PLACE, SUFFIX, Keys, clear_kept, folder_name, list_kept, open_journal, place_key
from lmd_hf.run.measure import Spectra
from lmd_hf.run.plan import make_plan
from lmd_hf.weights.inventory import list_matrices
from lmd_hf.weights.source import open_source
from lmd_hf.weights.stored import Rounding


IDENTITY = ModelIdentity("org/model", None, None, None, (), ())


def spectra(seed: int, used: bool = False) -> Spectra:
    values = torch.rand(64, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    spectrum = Spectrum(values.sort(descending=True).values, 1e-12, "gram")
    return Spectra(spectrum, replace(spectrum, method="svd") if used else None, Rounding(0.0, 0.25))


def numbers(report):
    """Everything of a report but when and by whom it was made."""
    values = report.to_dict()
    del values["timing"], values["environment"]
    return values


def only_file(folder):
    (path,) = folder.glob("lmd_hf/*/*.spectra")
    return path


def test_what_was_written_is_found_bit_for_bit(no_memory):
    with open_journal(IDENTITY) as journal:
        for seed in range(3):
            journal.add(Keys(f"{seed:032x}", f"{PLACE}{seed:032x}" if seed else PLACE), spectra(seed, used=seed == 2))
    with open_journal(IDENTITY) as journal:
        for seed in range(3):
            found = journal.find(f"{seed:032x}")
            assert torch.equal(found.raw.values, spectra(seed).raw.values)
            assert (found.raw.error_bound, found.rounding) == (1e-12, Rounding(0.0, 0.25))
            assert (found.used.method if found.used else None) == ("svd" if seed == 2 else None)
        assert journal.has(f"{PLACE}{2:032x}")
        assert not journal.has(PLACE)  # a file of unknown hash is no place at all
        assert journal.find(f"{9:032x}") is None
        assert journal.reused == 3


@pytest.mark.parametrize("damage", ["torn", "flipped", "joined"])
def test_a_damaged_line_is_passed_over_and_the_others_are_found(no_memory, damage):
    with open_journal(IDENTITY) as journal:
        for seed in range(4):
            journal.add(Keys(f"{seed:032x}", PLACE), spectra(seed))
    path = only_file(no_memory)
    lines = path.read_bytes().splitlines(keepends=True)
    middle = len(lines[2]) // 2
    if damage == "torn":  # the last line, cut by a kill
        lines, lost = [*lines[:3], lines[3][:middle]], {3}
    elif damage == "flipped":
        lines[2], lost = lines[2][:middle] + b"#" + lines[2][middle + 1 :], {2}
    else:  # a file system that lost a block in the middle
        lines, lost = [lines[0], lines[1][:middle] + lines[2][middle:], lines[3]], {1, 2}
    path.write_bytes(b"".join(lines))
    with open_journal(IDENTITY) as journal:
        assert {seed for seed in range(4) if journal.find(f"{seed:032x}") is None} == lost


def test_a_full_disk_costs_the_memory_and_not_the_run(no_memory, caplog):
    """The file may grow to a line and a half: the second is written in part, taken back, and the third fits again."""
    with open_journal(IDENTITY) as journal, caplog.at_level(logging.WARNING):
        journal.add(Keys("a" * 32, PLACE), spectra(0))
        line = only_file(no_memory).stat().st_size
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (line * 3 // 2, hard))
        try:
            journal.add(Keys("b" * 32, PLACE), spectra(1))
            journal.add(Keys("b" * 32, PLACE), spectra(1))
            assert only_file(no_memory).stat().st_size == line
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        journal.add(Keys("c" * 32, PLACE), spectra(2))
    assert len(caplog.records) == 1  # said once, not once a matrix
    with open_journal(IDENTITY) as journal:
        assert [journal.has(key * 32) for key in "abc"] == [True, False, True]


def test_a_worker_that_outlives_the_run_writes_nothing(no_memory, tmp_path):
    """The file that is opened next gets the number of the one that was closed."""
    closed = threading.Event()
    with open_journal(IDENTITY) as journal:
        journal.add(Keys("a" * 32, PLACE), spectra(0))
        number, size = journal.file, only_file(no_memory).stat().st_size
        late = threading.Thread(target=lambda: (closed.wait(), journal.add(Keys("b" * 32, PLACE), spectra(1))))
        late.start()
    with (tmp_path / "of the user").open("wb") as file:
        assert file.fileno() == number
        closed.set()
        late.join()
    assert (tmp_path / "of the user").stat().st_size == 0
    assert only_file(no_memory).stat().st_size == size


def test_closing_waits_for_the_line_that_is_being_written(no_memory, tmp_path, monkeypatch):
    begun, write = threading.Event(), os.write

    def slowly(number: int, line: bytes) -> int:
        begun.set()
        time.sleep(0.1)
        return write(number, line)

    with open_journal(IDENTITY) as journal:
        journal.add(Keys("a" * 32, PLACE), spectra(0))
        monkeypatch.setattr(os, "write", slowly)
        late = threading.Thread(target=journal.add, args=(Keys("b" * 32, PLACE), spectra(1)))
        late.start()
        begun.wait()
    with (tmp_path / "of the user").open("wb"):
        late.join()
    assert (tmp_path / "of the user").stat().st_size == 0
    with open_journal(IDENTITY) as journal:
        assert journal.has("b" * 32)


def test_a_cache_that_cannot_be_written_is_a_warning(no_memory, save, caplog):
    no_memory.write_text("a file where the folder should be")
    report = analyze(save("llama"))
    assert len(report.matrices) == 16
    assert "not kept for a later run" in caplog.text


def refusing(name, error):
    """A method of Path that refuses the first file that it is called for."""
    original, refused = getattr(Path, name), []

    def method(path, *arguments, **options):
        if path.suffix == SUFFIX and path in [*refused, path][:1]:
            refused.append(path)
            raise error
        return original(path, *arguments, **options)

    return method


@pytest.mark.parametrize("name", ["open", "stat"])
@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), FileNotFoundError(2, "No such file")])
def test_a_file_of_another_user_or_one_that_is_cleared_is_passed_over(no_memory, monkeypatch, name, error):
    for key in "ab":
        with open_journal(IDENTITY) as journal:
            journal.add(Keys(key * 32, PLACE), spectra(0))
    monkeypatch.setattr(Path, name, refusing(name, error))
    if name == "open":
        with open_journal(IDENTITY) as journal:
            assert [journal.has(key * 32) for key in "ab"].count(True) == 1
    assert sum(kept.matrices for kept in list_kept()) == (name == "open")


def test_others_may_read_what_the_umask_lets_them(no_memory):
    with open_journal(IDENTITY) as journal:
        journal.add(Keys("a" * 32, PLACE), spectra(0))
    umask = os.umask(0)
    os.umask(umask)
    assert only_file(no_memory).stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize(("error", "told"), [(FileNotFoundError(2, "gone"), ""), (OSError(30, "Read-only"), "told")])
def test_a_cache_that_cannot_be_cleared_is_one_line(no_memory, monkeypatch, capsys, error, told):
    with open_journal(IDENTITY) as journal:
        journal.add(Keys("a" * 32, PLACE), spectra(0))
    monkeypatch.setattr(shutil, "rmtree", lambda _: (_ for _ in ()).throw(error))
    assert cli.run(["cache", "clear"]) == bool(told)
    assert ("cannot be cleared (Read-only)" in capsys.readouterr().err) == bool(told)


@pytest.mark.parametrize("identifier", ["/data/" + "ü" * 300, "a" * 300, "org/name", "."])
def test_every_model_has_a_name_that_a_folder_may_have(tmp_path, identifier):
    (tmp_path / folder_name(identifier)).mkdir()


def test_many_writers_lose_nothing_and_count_nothing_twice(no_memory):
    def write(run: int) -> None:
        with open_journal(IDENTITY) as journal:
            for seed in range(20):
                journal.add(Keys(f"{seed:032x}", PLACE), spectra(seed))
            journal.add(Keys(f"{100 + run:032x}", PLACE), spectra(run))

    runs = [threading.Thread(target=write, args=(run,)) for run in range(4)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    with open_journal(IDENTITY) as journal:
        assert len(journal.places) == 24
    (kept,) = list_kept()
    assert (kept.model, kept.matrices) == ("org--model", 24)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "phi3"])
def test_a_rerun_computes_nothing_and_gives_the_same_report(save, family):
    first, second = analyze(save(family)), analyze(save(family))
    assert (first.environment["reused"], second.environment["reused"]) == (0, len(first.matrices))
    assert numbers(first) == numbers(second)
    assert "from an earlier run" in second.summary()
    assert "from an earlier run" not in first.summary() + second.card()
    for a, b in zip(first.matrices, second.matrices, strict=True):
        np.testing.assert_array_equal(a.singular_values, b.singular_values)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_a_run_without_a_head_start_finds_what_one_with_it_has_done(save, family):
    """GPT-2's matrices are turned round by the final plan only, and GPT-NeoX's fused ones cut by it."""
    report = analyze(save(family))
    source = open_source(save(family))
    with open_journal(source.identity) as journal:
        results = execute(make_plan(list_matrices(source), source.identity, Settings()), source, output=Output(journal))
    assert results.environment["reused"] == len(report.matrices)


def test_only_what_changed_is_computed_again(save, tmp_path):
    tensors = load_file(save("llama") / "model.safetensors")
    (tmp_path / "config.json").write_bytes((save("llama") / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    before = analyze(tmp_path)
    changed = "model.layers.1.mlp.up_proj.weight"
    tensors[changed] = tensors[changed] * 2
    save_file(tensors, tmp_path / "model.safetensors")
    after = analyze(tmp_path)
    assert after.environment["reused"] == len(before.matrices) - 1
    norms = {m.name: m.spectral_norm for m in before.matrices}
    for matrix in after.matrices:
        factor = 2 if matrix.name == changed else 1
        assert matrix.spectral_norm == pytest.approx(factor * norms[matrix.name])


def test_a_matrix_is_turned_before_an_update_is_added_to_it(save):
    """As where a configuration came later than the weights, and says that they are GPT-2's."""
    ref = list_matrices(open_source(save("llama"))).selected[0]
    pair = LowRank(*ref.tensors, *ref.tensors, scale=1.0)

    def place(low_rank: LowRank | None, transposed: bool) -> str:
        changed = replace(ref, low_rank=low_rank, transposed=transposed)
        return place_key(changed, {ref.tensors[0].file: "0" * 64}, "identity", "exact", torch.device("cpu"))

    assert place(None, True) == place(None, False)
    assert place(pair, True) != place(pair, False)


def test_another_selection_reuses_and_another_metric_computes_what_it_changes(save):
    whole = analyze(save("llama"))
    part = analyze(save("llama"), roles=("q", "o"))
    assert part.environment["reused"] == len(part.matrices) == 4
    scaled = analyze(save("llama"), metric="norm")
    unchanged = [m for m in scaled.matrices if m.metric == "identity"]
    assert 0 < len(unchanged) < len(whole.matrices)
    assert scaled.environment["reused"] == len(unchanged)
    assert analyze(save("llama"), metric="norm").environment["reused"] == len(whole.matrices)


def test_of_a_hub_model_what_is_finished_is_not_fetched_again(hub, save):
    hub.add("org/model", {p.name: p.read_bytes() for p in save("llama").iterdir()})
    first = analyze("org/model")
    second = analyze("org/model")
    assert second.environment["reused"] == len(first.matrices)
    assert numbers(first) == numbers(second)
    size = (save("llama") / "model.safetensors").stat().st_size
    assert first.environment["bytes_fetched"] > 0.9 * size
    assert second.environment["bytes_fetched"] <= 100_000


def test_a_live_module_leaves_nothing_behind(no_memory):
    analyze(models.make("llama"))
    assert not list(no_memory.rglob("*.spectra"))


def test_the_cache_is_listed_and_cleared(save, capsys):
    analyze(save("llama"))
    analyze(save("gpt2"))
    assert cli.run(["cache", "list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [entry["matrices"] for entry in listed] == [len(analyze(save(f)).matrices) for f in ("gpt2", "llama")]
    assert cli.run(["cache", "clear", str(save("gpt2"))]) == 0
    out = capsys.readouterr().out
    assert "gpt2" in out
    assert "llama" not in out
    assert analyze(save("llama")).environment["reused"] == 16
    assert analyze(save("gpt2")).environment["reused"] == 0
    clear_kept()
    assert list_kept() == []


def test_a_sketch_is_kept_with_what_its_intervals_are_made_of(tmp_path):
    w = torch.randn(1200, 1100, generator=torch.Generator().manual_seed(0))
    save_file({"layers.0.mlp.up_proj.weight": w}, tmp_path / "model.safetensors")
    first, second = (analyze(tmp_path, kernel="sketch") for _ in range(2))
    (matrix,) = first.matrices
    assert matrix.method == "krylov+quadrature"
    assert matrix.intervals
    assert second.environment["reused"] == 1
    assert numbers(first) == numbers(second)
    assert analyze(tmp_path, kernel="sketch", tolerance=0.02).environment["reused"] == 0
    assert analyze(tmp_path).environment["reused"] == 0
