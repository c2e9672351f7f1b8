"""Reads that were begun before anybody asked: given once, at the source's own risk never, ended at once."""

import threading
import time

import pytest
import torch
from safetensors.torch import save

from lmd_hf.errors import SourceError
from lmd_hf.weights import ranged
from lmd_hf.weights.ahead import fetching
from lmd_hf.weights.source import open_source


ROWS, COUNT = 256, 12
MATRICES = {f"w{i}": torch.full((ROWS, 1024), float(i)) for i in range(COUNT)}  # a megabyte each


@pytest.fixture
def source(hub):
    """A repository of such matrices, opened."""
    name = f"ahead/plain-{time.time_ns() % 10**9}"
    hub.add(name, {"model.safetensors": save(MATRICES), "config.json": b"{}"})
    opened = open_source(name)
    hub.requests.clear()
    return opened


def keys(source):
    return [(tensor, 0, ROWS) for tensor in source.tensors]


def starts(hub):
    return sorted(asked for _, path, asked in hub.requests if path.startswith("/cdn/"))


def test_what_was_begun_is_given_and_counted_once(hub, source):
    ahead = fetching(source, keys(source)[:2])
    for tensor in source.tensors[:3]:
        assert torch.equal(ahead.read(tensor), MATRICES[tensor.name])
    assert len(starts(hub)) == len(set(starts(hub))) == 3
    fetched = source.connection.bytes_fetched
    ahead.read(source.tensors[0])
    assert source.connection.bytes_fetched - fetched == 2**20
    assert len(starts(hub)) == 4


def test_what_was_not_begun_when_its_turn_came_is_read_then(hub, source):
    hub.bandwidth = 20 * 2**20
    ahead = fetching(source, keys(source))
    ahead.ahead.halt()
    assert 0 < sum(read.cancelled() for read in ahead.ahead._reads.values()) < COUNT
    for tensor in source.tensors:
        assert torch.equal(ahead.read(tensor), MATRICES[tensor.name])
    assert len(starts(hub)) == len(set(starts(hub))) == COUNT


@pytest.mark.parametrize("fault", ["error", "length", "loop"])
def test_what_goes_wrong_ahead_leaves_the_source_sound(hub, source, monkeypatch, fault):
    monkeypatch.setattr(ranged, "TRIES", 1)
    hub.faults = [fault]
    ahead = fetching(source, keys(source)[:1])
    ahead.ahead._reads[keys(source)[0]].exception()
    assert hub.faults == []
    assert source.connection.fault == ""
    assert torch.equal(ahead.read(source.tensors[0]), MATRICES[source.tensors[0].name])
    hub.always = fault
    with pytest.raises(SourceError):  # the source's own reads are judged as ever
        source.read(source.tensors[1])


def ended(hub, source):
    """The source with reads ahead that were begun, and then ended: soon, whatever they were waiting for."""
    ahead = fetching(source, keys(source))
    while not starts(hub):
        time.sleep(0.01)
    begun = time.monotonic()
    ahead.forget()
    while any(thread.name.startswith("lmd_hf.ahead") for thread in threading.enumerate()):
        assert time.monotonic() - begun < 8  # less than one slow read takes
        time.sleep(0.01)
    return ahead


def test_what_is_ended_breaks_off_in_the_middle(hub, source):
    hub.always = "slow"
    ahead = ended(hub, source)
    hub.always = ""
    assert torch.equal(ahead.read(source.tensors[0]), MATRICES[source.tensors[0].name])


def test_what_is_ended_waits_for_no_rate_limit(hub, source, monkeypatch):
    monkeypatch.setattr(ranged, "FIRST_WAIT", 60)
    hub.always = "error"
    ended(hub, source)
