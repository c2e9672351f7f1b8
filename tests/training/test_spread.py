"""Trainings whose parameters are really spread over two processes: checkpoints are measured, or the reason is told."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import transformers
from models import make
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from transformers import Trainer, TrainingArguments, default_data_collator, set_seed

from lmd_hf import LMDCallback, LmdError, LMDTracker, analyze
from lmd_hf.training.series import read_series


TESTS = Path(__file__).parents[1]
STEPS, FULL, IN_PARTS = 6, (2, 4), 6  # steps of the loop, those whose checkpoint is whole, the one whose is not


def launch(*arguments):
    """What the first of two processes tells."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("TOLD "))
    return json.loads(line.removeprefix("TOLD "))


def same_as_the_checkpoints(out, steps):
    """The series has these steps, and of each the numbers of the folder saved then."""
    points = read_series(out / "lmd" / "series.parquet")
    assert sorted({point.step for point in points}) == list(steps)
    for step in steps:
        measured = {point.name: point.spectral_norm for point in points if point.step == step}
        saved = analyze(out / f"checkpoint-{step}").matrices
        assert measured == pytest.approx({row.name: row.spectral_norm for row in saved}, rel=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(transformers.PreTrainedModel, "is_distributed_loading_by_transformers"),
    reason="this transformers trains no model that it has sharded itself",
)
def test_the_trainer_with_shards(tmp_path):
    make("llama").save_pretrained(tmp_path / "start")
    plain = launch("trainer", str(tmp_path), "plain")
    watched = launch("trainer", str(tmp_path), "watched")
    assert watched["losses"] == plain["losses"]
    assert len(watched["losses"]) == STEPS
    (warned,) = watched["warnings"]
    assert "LMDCallback measures saved checkpoints instead" in warned
    assert "is a DTensor spread over 2 processes" in warned
    assert watched["steps"] == [2, 4, 6]
    same_as_the_checkpoints(tmp_path / "watched", (2, 4, 6))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("fully_shard", "is a DTensor spread over 2 processes"),
        ("flat", "FSDP keeps its parameters flat"),
        ("flat_original", "FSDP keeps its parameters flat"),
    ],
)
def test_a_loop_with_shards(tmp_path, kind, reason):
    told = launch("loop", str(tmp_path), kind)
    assert len(told["refused"]) == 4  # the wrapper and the module inside, by the tracker and by analyze
    assert all(reason in refusal and "full_state_dict=True" in refusal for refusal in told["refused"])
    instead, without = told["warnings"]
    assert "LMDCallback measures saved checkpoints instead" in instead
    assert reason in instead
    assert f"goes on without: {tmp_path}/checkpoint-{IN_PARTS}: no whole weights in it" in without
    same_as_the_checkpoints(tmp_path, FULL)


def by_trainer(folder, name):
    settings = TrainingArguments(
        output_dir=str(folder / name), max_steps=STEPS, per_device_train_batch_size=4, logging_steps=1, save_steps=2,
        save_only_model=True, report_to="none", disable_tqdm=True, use_cpu=True, seed=3, ddp_backend="gloo",
    )  # fmt: skip
    assert settings.world_size == 2  # which begins the process group
    from transformers.distributed import DistributedConfig

    set_seed(1)
    model = transformers.LlamaForCausalLM.from_pretrained(
        folder / "start", distributed_config=DistributedConfig(fsdp_size=2)
    )
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(60, (64, 12), generator=torch.Generator())]
    callbacks = [LMDCallback(budget=None)] if name == "watched" else []
    trainer = Trainer(
        model=model, args=settings, train_dataset=rows, data_collator=default_data_collator, callbacks=callbacks
    )
    trainer.train()
    history = trainer.state.log_history
    return {
        "losses": [entry["loss"] for entry in history if "loss" in entry],
        "steps": [entry["lmd/step"] for entry in history if "lmd/step" in entry],
    }


def shard(kind):
    mesh = init_device_mesh("cpu", (2,))
    model = make("llama")
    if kind == "fully_shard":
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=kind == "flat_original")


def refusals(*models):
    for model in models:
        for read in (LMDTracker, analyze):
            try:
                read(model)
            except LmdError as error:
                yield str(error)


def by_loop(out, kind):
    """The Trainer's events by hand: accelerate, which wraps models for it, does not on CPUs."""
    dist.init_process_group("gloo")
    model, first = shard(kind), dist.get_rank() == 0
    inner = getattr(model, "module", model)
    refused = list(refusals(model, inner)) if first else []  # a collective in there would wait for ever
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    args = SimpleNamespace(output_dir=str(out), save_strategy="steps", load_best_model_at_end=False)
    state = SimpleNamespace(is_world_process_zero=first, global_step=0, max_steps=STEPS, log_history=[])
    callback = LMDCallback(every=1, budget=None)
    callback.on_train_begin(args, state, None, model=model)
    for step in range(1, STEPS + 1):
        state.global_step = step
        ids = torch.randint(60, (4, 12), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        callback.on_step_end(args, state, None, model=model)
        folder = out / f"checkpoint-{step}"
        if step in FULL:
            whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
            if first:
                inner.save_pretrained(folder, state_dict=whole)
            callback.on_save(args, state, None, model=model)
        elif step == IN_PARTS:
            checkpoint.save({"model": get_model_state_dict(model)}, checkpoint_id=folder / "pytorch_model_fsdp_0")
            callback.on_save(args, state, None, model=model)
    callback.on_train_end(args, state, None, model=model)
    return {"refused": refused}


def test_what_one_process_holds_whole_is_watched_while_it_trains(tmp_path):
    """FSDP on a single GPU: parameters are DTensors, and all there."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = fully_shard(make("llama"), mesh=init_device_mesh("cpu", (1,)))
        tracker = LMDTracker(model, every=1, budget=None)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        ids = torch.arange(1, 13)[None]
        for _ in range(2):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            tracker.step()
        plain = make("llama")
        plain.load_state_dict({name: value.full_tensor() for name, value in model.state_dict().items()})
    finally:
        dist.destroy_process_group()
    rows = {row.name: row.spectral_norm for row in analyze(plain).matrices}
    last = {point.name: point.spectral_norm for point in tracker.points if point.step == 2}
    start = {point.name: point.spectral_norm for point in tracker.points if point.step == 0}
    assert last == pytest.approx(rows, rel=1e-6)
    assert all(last[name] != start[name] for name in last)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    how, out, name = sys.argv[1:]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        told = {"trainer": by_trainer, "loop": by_loop}[how](Path(out), name)
    told["warnings"] = [str(warning.message) for warning in seen if "LMDCallback" in str(warning.message)]
    if dist.get_rank() == 0:
        sys.stdout.write(f"TOLD {json.dumps(told)}\n")
        sys.stdout.flush()
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # past the end of Python, where a thread that torch still has now and then aborts the process
