"""Who does what: every matrix once, every row of a sum once, and nobody much busier than the others."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest

from lmd_hf.matrix.cost import exact_flops
from lmd_hf.records import MatrixRef, Settings, TensorRef, Work
from lmd_hf.run.shares import BATCH_BYTES, EVEN, GRAIN, LEAST_FLOPS, batched, imbalance, loads, share_out


EXACT = Settings(kernel="exact")


def work(index, out, into, **changes):
    tensor = TensorRef(f"w{index}", "m", 0, 2 * out * into, "BF16", (out, into))
    ref = MatrixRef(tensor.name, "", "", "mlp", "up", 0, (out, into), "BF16", "plain", (tensor,))
    return Work(replace(ref, **changes), "exact", exact_flops(max(out, into), min(out, into)), 0)


def llama_70b():
    """The matrices of LLaMA-3-70B by their published shapes."""
    block = [(8192, 8192), (1024, 8192), (1024, 8192), (8192, 8192), (28672, 8192), (28672, 8192), (8192, 28672)]
    return [work(i, *shape) for i, shape in enumerate([(128256, 8192), *block * 80, (128256, 8192)])]


def check(works, shards, pieces):
    """Every matrix has one owner; what is cut is summed whole, in pieces that do not overlap."""
    assert sorted(index for shard in shards for index in shard) == list(range(len(works)))
    spans = {}
    for piece in (piece for mine in pieces for piece in mine):
        spans.setdefault(piece.work, []).append((piece.start, piece.stop))
    for index, found in spans.items():
        found.sort()
        assert found[0][0] == 0
        assert found[-1][1] == max(works[index].ref.shape)
        assert all(stop == start for (_, stop), (start, _) in pairwise(found))
        assert all(stop - start >= GRAIN for start, stop in found)
    return set(spans)


@pytest.mark.parametrize("ranks", [1, 2, 8, 32, 64, 128, 256])
def test_the_70b_shapes_are_shared_evenly(ranks):
    works = llama_70b()
    shards, pieces = share_out(works, EXACT, ranks)
    cut = check(works, shards, pieces)
    found = loads(works, shards, pieces)
    assert imbalance(found) <= EVEN
    assert sum(found) == pytest.approx(sum(w.flops for w in works), rel=1e-12)
    assert (ranks > 32) == bool(cut)
    assert share_out(works, EXACT, ranks) == (shards, pieces)


@pytest.mark.parametrize("seed", range(5))
def test_any_works_are_shared_out_whole(seed):
    draw = random.Random(seed)
    works = [work(i, draw.randrange(1, 20000), draw.randrange(1, 4000)) for i in range(draw.randrange(1, 40))]
    for ranks in (1, 3, 7, 40):
        shards, pieces = share_out(works, EXACT, ranks)
        check(works, shards, pieces)
        whole = share_out(works, replace(EXACT, metric="norm"), ranks)
        assert max(loads(works, shards, pieces)) <= max(loads(works, *whole))


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({"dtype": "F64"}, EXACT),
        ({"stored": "gptq"}, EXACT),
        ({"tied_to": "embed"}, EXACT),
        ({}, replace(EXACT, metric="norm")),
        ({"shape": (GRAIN, GRAIN)}, EXACT),
    ],
)
def test_what_cannot_be_cut_stays_whole(changes, settings):
    assert any(share_out([work(0, 40000, 2048)], EXACT, 4)[1])
    assert not any(share_out([work(0, 40000, 2048, **changes)], settings, 4)[1])


@pytest.mark.parametrize(("shape", "transposed", "fetched"), [
    ((40000, 2048), False, True), ((2048, 40000), False, False), ((2048, 40000), True, True),
    ((40000, 2048), True, False),
])  # fmt: skip
def test_of_distant_files_only_what_is_fetched_in_pieces_is_cut(shape, transposed, fetched):
    """Else every rank would fetch the whole matrix for its piece."""
    works = [work(0, *shape, transposed=transposed)]
    assert any(share_out(works, EXACT, 4)[1])
    assert any(share_out(works, EXACT, 4, distant=True)[1]) == fetched


def test_what_is_done_in_a_moment_is_not_cut():
    quick = work(0, 4 * GRAIN, 128)
    assert quick.flops < LEAST_FLOPS
    assert not any(share_out([quick], EXACT, 4)[1])


def test_no_works_and_no_cost():
    assert share_out([], EXACT, 3) == (((), (), ()), ((), (), ()))


def test_small_works_of_one_shape_are_batched_in_their_order():
    small = [replace(work(i, 128, 300), bytes=2**20) for i in range(5)]
    other, large = work(5, 300, 128), work(6, 4096, 4096)
    sketched = [replace(each, kernel="sketch") for each in small[:2]]
    works = [large, *small, other, small[0], *sketched]
    batches = batched(works)
    assert [each for batch in batches for each in batch] == works
    assert [len(batch) for batch in batches] == [1, 5, 1, 1, 1, 1]
    wide = [replace(each, bytes=BATCH_BYTES // 2) for each in small]
    assert [len(batch) for batch in batched(wide)] == [2, 2, 1]
