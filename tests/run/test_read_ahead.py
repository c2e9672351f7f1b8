"""Reading ahead: in order, within bounds, each byte once."""

import threading
from dataclasses import replace

import numpy as np
import pytest

from lmd_hf.records import Settings
from lmd_hf.run import read_ahead
from lmd_hf.run.execute import execute
from lmd_hf.run.plan import make_plan
from lmd_hf.run.read_ahead import Span, merged, reading_ahead, spans
from lmd_hf.weights.inventory import list_matrices
from lmd_hf.weights.source import FileSource, open_source
from lmd_hf.weights.stored import read_matrix


class Recorder(FileSource):
    """A folder that remembers what was read of it."""

    def read(self, tensor, start=0, stop=None):
        READ.append(Span(tensor, start, tensor.shape[0] if stop is None else stop))
        return super().read(tensor, start, stop)


READ: list[Span] = []


def recorded(folder):
    READ.clear()
    source = open_source(folder)
    return Recorder(**{name: getattr(source, name) for name in FileSource.__dataclass_fields__})


def works_of(source):
    plan = make_plan(list_matrices(source), source.identity, Settings())
    return [plan.works[index] for index in plan.shards[0]]


@pytest.mark.parametrize("room", [0, 10_000, 2**30])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3", "mixtral", "t5"])
def test_every_matrix_is_what_it_would_be_and_every_byte_is_read_once(save, monkeypatch, family, room):
    monkeypatch.setattr(read_ahead, "ROOM", room)
    source = recorded(save(family))
    works = works_of(source)
    with reading_ahead(source, works) as reads:
        assert sorted(map(id, reads.works)) == sorted(map(id, works))
        for work in reads.works:
            with reads.taking(work):
                ours = read_matrix(reads, work.ref)
            np.testing.assert_array_equal(ours, read_matrix(open_source(save(family)), work.ref))
        assert not reads._reads, "what is done is let go"
    assert sorted(READ, key=repr) == sorted(merged(READ), key=repr)


def test_no_more_is_read_ahead_than_there_is_room_for(save, monkeypatch):
    source = recorded(save("llama"))
    works = works_of(source)
    monkeypatch.setattr(read_ahead, "ROOM", 3 * max(span.bytes for work in works for span in spans(work.ref)))
    with reading_ahead(source, works) as reads:
        for work in reads.works[:5]:
            with reads.taking(work):
                assert sum(span.bytes for span in reads._ahead) <= read_ahead.ROOM
    assert len(READ) < len(works), "the others were never begun"


def test_works_that_share_bytes_stand_together(save):
    source = open_source(save("gpt2"))
    with reading_ahead(source, works_of(source)) as reads:
        names = [work.ref.name for work in reads.works]
    assert [n for n, before in zip(names, [None, *names], strict=False) if n != before] == list(dict.fromkeys(names))


def test_many_workers_in_a_narrow_room_do_not_wait_for_each_other(save, monkeypatch):
    """Ties need two tensors at once, and three workers take works up while hardly a byte may be ahead."""
    monkeypatch.setattr(read_ahead, "ROOM", 1)
    source = open_source(save("mixtral"))
    plan = make_plan(list_matrices(source), source.identity, Settings(device="cpu"))
    done = []
    worker = threading.Thread(target=lambda: done.append(execute(plan, source)), daemon=True)
    worker.start()
    worker.join(60)
    assert done
    assert len(done[0].matrices) == len(plan.works)


def test_spans_that_only_touch_stay_apart(save):
    tensor = open_source(save("llama")).tensors[0]
    touching = [Span(tensor, 4, 8), Span(tensor, 0, 4)]
    assert merged(touching) == touching[::-1]
    assert merged([*touching, Span(tensor, 3, 5)]) == [Span(tensor, 0, 8)]
    assert merged([Span(tensor, 0, 4), Span(replace(tensor, name="other"), 2, 6)])[1].start == 2
