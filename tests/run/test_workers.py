"""How many hands, and what they hold."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from lmd_hf.compat import let_go_of_blas
from lmd_hf.records import Settings
from lmd_hf.run import workers
from lmd_hf.run.plan import make_plan
from lmd_hf.run.workers import single_torch_threads, upload, with_room, worker_pool
from lmd_hf.weights.inventory import list_matrices
from lmd_hf.weights.source import open_source


def blas():
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


def test_as_many_workers_as_fit():
    cpu = torch.device("cpu")
    assert workers.fitting([10, 30], 8, cpu, limit=100) == 2
    assert workers.fitting([10, 30] * 9, 8, cpu, limit=100) == 3
    assert workers.fitting([10, 30] * 9, 8, cpu, limit=1) == 1
    assert workers.fitting([], 8, cpu, limit=100) == 1
    assert workers.fitting([10, 2**60] * 9, 8, cpu) == 1


def test_one_thread_each_in_a_pool_and_as_before_after_it():
    before = blas()
    with worker_pool(2, 1000) as pool:
        assert pool.submit(blas).result() == {1}
    assert blas() == before


def in_new_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


@pytest.fixture
def two_threads():
    """Whatever the environment says."""
    own = torch.get_num_threads()
    torch.set_num_threads(2)
    with threadpool_limits(limits=2, user_api="blas"):
        let_go_of_blas()
        yield
    torch.set_num_threads(own)


def blas_of_a_worker():
    with worker_pool(1, 1000) as pool:
        return pool.submit(blas).result()


def test_a_pool_of_another_thread_after_one_of_this(two_threads):
    assert blas_of_a_worker() == in_new_thread(blas_of_a_worker) == {1}
    assert blas() == {2}


def test_an_interrupt_leaves_the_threads_as_they_were(two_threads):
    with pytest.raises(KeyboardInterrupt), worker_pool(1, 1000):
        raise KeyboardInterrupt
    deadline = time.monotonic() + 5
    while blas() != {2} and time.monotonic() < deadline:
        time.sleep(0.01)
    assert blas() == {2}


def test_two_runs_that_overlap_leave_the_threads_as_they_were(two_threads):
    """The first ends while the second, which found one thread, goes on."""
    opened, ended = threading.Event(), threading.Event()

    def first():
        with single_torch_threads(), worker_pool(1, 1000):
            opened.set()
            ended.wait(10)

    def second():
        opened.wait(10)
        with single_torch_threads(), worker_pool(1, 1000) as pool:
            ended.set()
            running.result()
            return pool.submit(blas).result()

    with ThreadPoolExecutor(2) as both:
        running = both.submit(first)
        assert both.submit(second).result() == {1}
    assert blas() == {2}
    assert in_new_thread(torch.get_num_threads) == 2


def test_ranks_of_one_machine_share_its_cores(monkeypatch):
    alone = workers._cores()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert workers._cores() == max(1, alone // 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert workers._cores() == 1


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory"),  # of pinned memory, or the driver's own
        RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED"),
        torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge"),
    ],
)
def test_what_a_device_cannot_do_the_cpu_does(error):
    def step(device):
        if device.type != "cpu":
            raise error
        return device.type

    assert with_room(step, torch.device("cuda")) == "cpu"


def test_other_errors_of_a_device_are_errors():
    def step(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        with_room(step, torch.device("cuda"))


def test_on_the_cpu_nothing_is_copied():
    w = torch.ones(3, 4, dtype=torch.bfloat16)
    assert upload(w, torch.device("cpu")) is w


def test_worker_threads_take_the_devices_in_turn():
    """Each its own, whatever device the caller names; `cpu` and `cpu:0` are two names here."""
    devices = (torch.device("cpu"), torch.device("cpu", 0))
    barrier = threading.Barrier(4, timeout=10)

    def seen(_):
        barrier.wait()  # four threads, not one that is quick
        return workers._hand.device

    with worker_pool(4, 4, devices) as pool:
        assert sorted(map(str, pool.map(seen, range(4)))) == ["cpu", "cpu", "cpu:0", "cpu:0"]
    with worker_pool(1, 1) as pool:
        assert not pool.submit(hasattr, workers._hand, "device").result()


def test_all_gpus_are_taken_where_the_name_leaves_the_choice(monkeypatch):
    monkeypatch.setattr(workers, "pick_device", lambda name: torch.device("cuda", 1))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    gpus = tuple(torch.device("cuda", index) for index in range(3))
    assert workers.pick_devices("auto") == workers.pick_devices("cuda") == gpus
    assert workers.pick_devices("cuda:1") == (gpus[1],)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # the other ranks have theirs
    assert workers.pick_devices("auto") == (gpus[1],)


def test_no_works_leave_one_worker_and_devices_multiply_them(save):
    source, cpu = open_source(save("llama")), torch.device("cpu")
    works = list(make_plan(list_matrices(source), source.identity, Settings()).works)
    assert workers.worker_count([], (cpu,), source) == 1
    one = workers.worker_count(works, (cpu,), source)
    assert workers.worker_count(works, (cpu, cpu), source) == min(2 * one, len(works))
