"""How many hands, and what they hold."""

import torch
from threadpoolctl import threadpool_info

from lmd_hf.run import workers
from lmd_hf.run.workers import upload, worker_pool


def blas():
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


def test_as_many_workers_as_fit():
    assert workers._fitting([10, 30], 8, 100) == 2
    assert workers._fitting([10, 30] * 9, 8, 100) == 3
    assert workers._fitting([10, 30] * 9, 8, 1) == 1
    assert workers._fitting([], 8, 100) == 1


def test_one_thread_each_in_a_pool_and_as_before_after_it():
    before = blas()
    with worker_pool(2, 1000) as pool:
        assert pool.submit(blas).result() == {1}
    assert blas() == before


def test_ranks_of_one_machine_share_its_cores(monkeypatch):
    alone = workers._cores()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert workers._cores() == max(1, alone // 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert workers._cores() == 1


def test_on_the_cpu_nothing_is_copied():
    w = torch.ones(3, 4, dtype=torch.bfloat16)
    assert upload(w, torch.device("cpu")) is w
