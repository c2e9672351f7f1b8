"""Reading tensors out of files on the Hub: only what is selected, whatever goes wrong on the way."""

import json

import models
import numpy as np
import pytest
import torch

from lmd_hf import analyze, cli
from lmd_hf.api import plan
from lmd_hf.errors import SettingsError, SourceError
from lmd_hf.pipeline import _is_certain
from lmd_hf.records import Settings, TensorRef
from lmd_hf.run.journal import clear_kept
from lmd_hf.run.plan import make_plan
from lmd_hf.run.read_ahead import merged, spans
from lmd_hf.weights import ranged
from lmd_hf.weights.identity import with_hashes
from lmd_hf.weights.inventory import list_by_name, list_matrices
from lmd_hf.weights.source import Memory, open_source


FIRST = 4000


def files_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".safetensors", ".json")}


@pytest.fixture(autouse=True)
def in_pieces(impatient):
    impatient(FIRST)


@pytest.fixture
def put(hub, save):
    """A function that puts a tiny model on the Hub under its family's name, which no cache knows; its id."""

    def put(family, name="", **flags):
        name = name or f"ranged/{family}"
        hub.add(name, files_of(save(family)), **flags)
        return name

    return put


def same(one, other):
    assert [(m.name, m.part) for m in one.matrices] == [(m.name, m.part) for m in other.matrices]
    for a, b in zip(one.matrices, other.matrices, strict=True):
        np.testing.assert_array_equal(a.singular_values, b.singular_values)
    assert one.coverage == other.coverage


@pytest.mark.parametrize("family", ["llama", "bert", "mixtral"])
def test_heads_and_mlps_read_what_the_table_has_fetched(hub, put, save, family, monkeypatch):
    file = (save(family) / "model.safetensors").stat().st_size
    remembered = analyze(put(family), heads=True)
    assert remembered.environment["bytes_fetched"] <= file + FIRST
    monkeypatch.setattr("lmd_hf.pipeline.REMEMBERED", 0)
    clear_kept()
    again = analyze(put(family), heads=True)
    assert again.environment["bytes_fetched"] > 1.2 * file
    same(remembered, again)
    assert remembered.heads == again.heads
    assert remembered.mlps == again.mlps


def test_a_memory_gives_once_and_keeps_to_its_room(monkeypatch):
    monkeypatch.setattr("lmd_hf.weights.source.LARGEST", 1000)
    memory = Memory(4000)
    ref = TensorRef("w", "m", 0, 400, "U8", (400,))
    values = [torch.full((1000,), i, dtype=torch.uint8) for i in range(6)]
    for i, value in enumerate(values):
        memory.keep((ref, i, i + 1), value)
    assert [memory.take((ref, i, i + 1)) is values[i] for i in range(6)] == [True] * 3 + [True, False, False]
    assert memory.take((ref, 0, 1)) is None
    memory.keep((ref, 9, 10), torch.zeros(1001, dtype=torch.uint8))
    assert memory.take((ref, 9, 10)) is None
    assert memory.room == 4000
    memory.clear()
    memory.keep((ref, 0, 1), values[0])
    assert memory.take((ref, 0, 1)) is None


@pytest.mark.parametrize("fault", ["cut", "short", "busy", "error", "expired", "all"])
def test_a_fault_that_a_retry_heals_changes_nothing(hub, put, save, fault):
    name = put("llama")
    hub.faults = (
        ["", "cut", "short", "busy", "error", "expired", "cut", "cut"] if fault == "all" else [fault, "", fault]
    )
    report = analyze(name)
    assert hub.faults == []
    same(report, analyze(save("llama")))


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("length", r"has \d+ bytes where its commit lists \d+; it was replaced: run again"),
        ("replaced", "model.safetensors was replaced while it was read; run again"),
        ("loop", "model.safetensors redirects in a circle; try again later"),
        ("shifted", "is sent from another byte than was asked for; --download reads whole files"),
        ("packed", "model.safetensors arrives as gzip, which nobody asked for; --download reads whole files"),
        ("error", r"gave up reading from the Hub \(it answers 500\); check the connection and run again"),
        ("cut", r"gave up reading from the Hub \(.*\); check the connection and run again"),
        ("revoked", r"the Hub refuses model.safetensors \(401\); has the token expired\? `hf auth login`"),
    ],
)
def test_a_fault_that_stays_keeps_what_is_finished(hub, put, save, monkeypatch, fault, reason):
    monkeypatch.setattr(ranged, "TRIES", 3)
    name = put("llama", private=True)
    hub.token, hub.faults, hub.always = "hf_first", [""] * 5, fault
    report = analyze(name, token="hf_first")
    whole = {m.name: m for m in analyze(save("llama")).matrices}
    assert 0 < len(report.matrices) < len(whole) == len(report.matrices) + len(report.unread)
    for matrix in report.matrices:
        np.testing.assert_array_equal(matrix.singular_values, whole[matrix.name].singular_values)
    assert all(s.reason.startswith(f"could not be read: {name}: ") for s in report.unread)
    assert len({s.reason for s in report.unread}) == 1
    with pytest.raises(SourceError, match=reason):
        raise SourceError(report.unread[0].reason)
    assert "could not be read" in report.summary()


def test_nothing_at_all_is_an_error(hub, put, monkeypatch):
    monkeypatch.setattr(ranged, "TRIES", 2)
    name = put("llama")
    hub.always = "error"
    with pytest.raises(SourceError, match="could not be read: ranged/llama: gave up"):
        analyze(name)


def test_an_incomplete_report_is_printed_and_exits_1(hub, put, capsys, tmp_path):
    name = put("llama")
    hub.faults, hub.always = [""] * 5, "length"
    assert cli.run(["analyze", name, "--json", "--out", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["matrices"]
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert "matrices could not be read" in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "mixtral", "llama", "phi3", "falcon-new"])
@pytest.mark.parametrize("roles", [("q", "k"), ("gate", "up"), ()])
def test_each_byte_that_is_selected_is_fetched_once_and_no_other(hub, put, save, family, roles):
    name = put(family, f"ranged/once-{family}")
    source = open_source(name)
    chosen = plan(name).works if not roles else [w for w in plan(name).works if w.ref.role in roles]
    if not chosen:
        pytest.skip("no such role")
    wanted = sum(span.bytes for span in merged(span for work in chosen for span in spans(work.ref)))
    length = min(tensor.start for tensor in source.tensors)
    headers = FIRST if length <= FIRST else FIRST + length - 8
    report = analyze(name, roles=roles)
    assert report.environment["bytes_fetched"] == wanted + headers
    assert report.environment["files_touched"] == 1
    local = analyze(save(family), roles=roles)
    same(report, local)


@pytest.mark.parametrize("family", sorted(models.FAMILIES))
@pytest.mark.parametrize(
    "settings", [Settings(roles=("q", "k")), Settings(layers="0"), Settings(layers="-1"), Settings()]
)
def test_what_is_fetched_before_the_plan_is_final_is_wanted_by_it(save, family, settings):
    source = open_source(save(family))

    def read(inventory):
        works = make_plan(inventory, source.identity, settings).works
        return {(t, w.ref.expert, w.ref.rows) for w in works if w.ref.tied_to is None for t in w.ref.tensors}, works

    final, _ = read(list_matrices(source))
    try:
        _, early = read(list_by_name(source))
    except SettingsError:  # names alone see nothing of the kind: nothing is fetched
        early = ()
    assert {(w.ref.tensors[0], None, ()) for w in early if _is_certain(w.ref)} <= final


def test_what_heads_fetch_a_second_time_is_counted(hub, put, monkeypatch):
    monkeypatch.setattr("lmd_hf.pipeline.REMEMBERED", 0)
    plain = analyze(put("llama", "ranged/plain")).environment["bytes_fetched"]
    report = analyze(put("llama", "ranged/heads"), heads=True)
    blocks = [m for m in report.matrices if m.block]
    again = sum(4 * m.shape[0] * m.shape[1] for m in blocks)
    assert report.heads
    assert report.environment["bytes_fetched"] >= plain + again


def test_hashes_fetch_nothing(hub, put):
    name = put("llama", lfs=False)
    source = open_source(name)
    before = hub.sent
    assert [file.sha256 for file in with_hashes(source).files] == [None]
    assert hub.sent == before
    hub.sent = 0
    with_hashes(open_source(name, download=True))
    assert hub.sent < 2 * FIRST, "header and config.json only"


def test_files_in_git_itself_are_read_without_a_redirect(hub, put, save):
    name = put("llama", lfs=False, private=True)
    same(analyze(name, token=hub.token), analyze(save("llama")))
    assert not [path for _, path, _ in hub.requests if path.startswith("/cdn/")]


def test_weight_files_that_are_not_read_are_named(hub, save):
    dense = {f"2_Dense/{name}": data for name, data in files_of(save("bert")).items()}
    hub.add(
        "ranged/sentence",
        {**files_of(save("bert")), **dense, "pytorch_model.bin": b"", "3_Dense/pytorch_model.bin": b""},
    )
    notes = analyze("ranged/sentence", roles=("q",)).coverage.notes
    named = "2_Dense/model.safetensors, 3_Dense/pytorch_model.bin"
    assert notes == (f"weight files not read: {named}; --subfolder reads a folder",)
    assert not [n for n in analyze("ranged/sentence", subfolder="2_Dense", roles=("q",)).coverage.notes if "files" in n]


def test_a_repository_with_weights_in_folders_only_names_them(hub, save):
    hub.add("ranged/folders", {f"{f}/{n}": d for f in ("unet", "vae") for n, d in files_of(save("bert")).items()})
    with pytest.raises(SourceError, match="give --subfolder, one of: unet, vae"):
        open_source("ranged/folders")
