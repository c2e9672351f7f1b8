"""`LMDCallback` in transformers' Trainer: the training is the same, the numbers arrive, every way of training works."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from models import make
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator, set_seed
from transformers.trainer_utils import HPSearchBackend

from lmd_hf import LMDCallback
from lmd_hf.errors import SettingsError
from lmd_hf.training.series import read_series


ROWS = [{"input_ids": row, "labels": row} for row in torch.randint(60, (64, 12), generator=torch.Generator())]


class Tracker(TrainerCallback):
    """A tracker such as wandb's: it sees what it is handed at the time."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **told):
        self.seen.append(dict(logs))


def trainer(out, *callbacks, model=None, **options):
    set_seed(1)
    model = model or make("llama", attention_dropout=0.1).train()
    values = {
        "max_steps": 12, "per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "use_cpu": True, "seed": 3, "learning_rate": 1e-2,
    }  # fmt: skip
    settings = TrainingArguments(output_dir=str(out), **(values | options))
    return Trainer(
        model=model,
        args=settings,
        train_dataset=ROWS,
        eval_dataset=ROWS[:8],
        callbacks=list(callbacks),
        data_collator=default_data_collator,
    )


def losses(ran):
    return [entry["loss"] for entry in ran.state.log_history if "loss" in entry]


def steps_of(out):
    return sorted({point.step for point in read_series(Path(out) / "lmd" / "series.parquet")})


def run(out, *callbacks, **options):
    ran = trainer(out, *callbacks, **options)
    ran.train()
    return ran


def test_the_same_losses_bit_for_bit(tmp_path):
    plain = run(tmp_path / "a", gradient_accumulation_steps=2)
    watched = run(tmp_path / "b", LMDCallback(every=2, budget=None), gradient_accumulation_steps=2)
    assert losses(plain) == losses(watched)
    assert len(losses(plain)) == 12
    for a, b in zip(plain.model.parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert steps_of(tmp_path / "b") == [0, 2, 4, 6, 8, 10, 12]  # optimiser steps, not batches


def test_every_tracker_gets_the_numbers(tmp_path):
    tracker = Tracker()
    ran = trainer(tmp_path, tracker, LMDCallback(every=5, budget=None), logging_steps=5)
    ran.train()
    with_numbers = [logs for logs in tracker.seen if "lmd/latent_dim" in logs]
    assert [logs["lmd/step"] for logs in with_numbers] == [5, 10, 12]  # the last in the Trainer's own last log
    history = [entry["lmd/step"] for entry in ran.state.log_history if "lmd/step" in entry]
    assert history == [5, 10, 12]
    json.dumps(ran.state.log_history)


def test_the_default_settings_show_beginning_and_end(tmp_path):
    run(tmp_path, LMDCallback())
    points = read_series(tmp_path / "lmd" / "series.parquet")
    names = {point.name for point in points}
    for step in (0, 12):
        assert {point.name for point in points if point.step == step} == names
    assert len(names) == 16


def test_the_section_survives_the_card_that_the_trainer_writes(tmp_path):
    ran = run(tmp_path, LMDCallback(budget=None))
    card = tmp_path / "README.md"
    assert "during training" in card.read_text()
    ran.create_model_card(model_name="mine")
    text = card.read_text()
    assert "# mine" in text
    assert text.count("<!-- lmd:begin") == text.count("## Layer Matrix Decomposition during training") == 1
    assert "Convergence: **" in text
    assert (tmp_path / "lmd" / "evolution.png").is_file()
    ran.train()
    ran.create_model_card(model_name="mine")
    assert card.read_text().count("<!-- lmd:begin") == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [(b"<!-- lmd:begin v=1 -->\nno end\n", "README.md has several"), (b"# caf\xe9\n", "README.md: not UTF-8")],
)
def test_a_broken_card_is_left_alone(tmp_path, text, reason):
    card = tmp_path / "README.md"
    card.write_bytes(text)
    with pytest.warns(UserWarning, match=f"goes on without: .*{reason}"):
        ran = run(tmp_path, LMDCallback())
    assert card.read_bytes() == text
    assert len(losses(ran)) == 12


def test_a_card_keeps_its_line_breaks_and_a_link_stays_one(tmp_path):
    out, card = tmp_path / "out", tmp_path / "card.md"
    out.mkdir()
    text = b"---\r\nlicense: mit\r\n---\r\n# T\r\n"
    card.write_bytes(text)
    (out / "README.md").symlink_to(card)
    run(out, LMDCallback())
    written = card.read_bytes()
    assert (out / "README.md").is_symlink()
    assert written.startswith(text)
    assert written.count(b"\n") == written.count(b"\r\n") > 10


def test_the_card_names_what_could_not_be_measured_to_the_end(tmp_path):
    callback = LMDCallback(budget=None)
    ran = trainer(tmp_path, callback, max_steps=2)
    ran.train()
    assert "could not be measured" not in (tmp_path / "README.md").read_text()
    with torch.no_grad():
        ran.model.lm_head.weight[0, 0] = torch.nan
    callback.tracker.steps = 3
    callback.tracker.measure()
    callback.write_section(tmp_path / "README.md", ran.state)
    told = "1 could not be measured at the end, first `lm_head.weight` (the matrix holds NaN or infinity)"
    assert told in (tmp_path / "README.md").read_text()


def test_a_folder_that_takes_no_file_stops_no_training(tmp_path):
    (tmp_path / "lmd").write_text("in the way")
    with pytest.warns(UserWarning, match="goes on without: cannot write to"):
        ran = run(tmp_path, LMDCallback())
    assert len(losses(ran)) == 12


def test_the_last_point_is_of_the_last_step_not_of_the_best_checkpoint(tmp_path):
    seen = {}

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **told):
            seen[state.global_step] = torch.linalg.svdvals(model.lm_head.weight.detach().double())[0].item()

    ran = trainer(
        tmp_path, LMDCallback(roles=["head"]), Look(), max_steps=8, learning_rate=0.3, lr_scheduler_type="constant",
        eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, load_best_model_at_end=True,
        metric_for_best_model="loss", greater_is_better=True,
    )  # fmt: skip
    ran.train()
    best = ran.state.best_global_step
    assert best == 2
    points = {point.step: point.spectral_norm for point in read_series(tmp_path / "lmd" / "series.parquet")}
    assert points[8] == pytest.approx(seen[8], rel=1e-6)
    assert points[8] != pytest.approx(seen[best], rel=1e-3)
    card = (tmp_path / "README.md").read_text()
    assert "from step 0 to step 8" in card
    assert f"those of step {best}, the best checkpoint" in card


def test_a_training_that_is_stopped_without_a_last_log_is_measured_where_it_stopped(tmp_path):
    """As where a trial of a search is pruned: the Trainer tells of the end, and loads nothing."""

    class Prune(TrainerCallback):
        def on_step_end(self, args, state, control, **told):
            if state.global_step == 5:
                raise InterruptedError

    ran = trainer(
        tmp_path, LMDCallback(), Prune(), eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        load_best_model_at_end=True,
    )  # fmt: skip
    with pytest.raises(InterruptedError):
        ran.train()
    ran.callback_handler.on_train_end(ran.args, ran.state, ran.control)
    assert steps_of(tmp_path) == [0, 5]
    assert "best checkpoint" not in (tmp_path / "README.md").read_text()


def test_on_save_and_on_epoch(tmp_path):
    run(tmp_path / "save", LMDCallback(on="save", budget=None), save_strategy="steps", save_steps=4)
    assert steps_of(tmp_path / "save") == [0, 4, 8, 12]
    epochs = {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 16}
    run(tmp_path / "epoch", LMDCallback(on="epoch", budget=None), **epochs)
    assert steps_of(tmp_path / "epoch") == [0, 4, 8]


def test_resumed_training_goes_on_in_its_series(tmp_path):
    whole = run(tmp_path / "whole", LMDCallback(every=3, budget=None), save_strategy="steps", save_steps=6)
    first = trainer(tmp_path / "parts", LMDCallback(every=3, budget=None), save_strategy="steps", save_steps=6)
    first.add_callback(Stop(8))
    first.train()
    second = trainer(tmp_path / "parts", LMDCallback(every=3, budget=None), save_strategy="steps", save_steps=6)
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-6"))
    assert losses(second) == losses(whole)
    points = [read_series(tmp_path / part / "lmd" / "series.parquet") for part in ("whole", "parts")]
    kept = [[(p.step, p.name, p.spectral_norm, p.since, p.subspace_cos2) for p in each] for each in points]
    assert sorted(kept[0]) == sorted(kept[1])


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("views.safetensors", b"broken", "views.safetensors: damaged"),
        ("series.parquet", b"PAR1", "no series of a training"),
        ("series.parquet", None, "holds no whole one"),
        ("views.safetensors", None, "holds no whole one"),
    ],
)
def test_a_damaged_series_stops_no_resumed_training(tmp_path, file, content, reason):
    options = {"save_strategy": "steps", "save_steps": 6}
    run(tmp_path, LMDCallback(every=3, budget=None), **options)
    damaged = tmp_path / "checkpoint-6" / "lmd" / file
    damaged.unlink() if content is None else damaged.write_bytes(content)
    again = trainer(tmp_path, LMDCallback(every=3, budget=None), **options)
    with pytest.warns(UserWarning, match=f"begins its series anew at step 6: .*{reason}"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert steps_of(tmp_path) == [6, 9, 12]


def test_a_checkpoint_elsewhere_is_resumed_with_its_series(tmp_path):
    run(tmp_path / "a", LMDCallback(every=3, budget=None), save_strategy="steps", save_steps=6)
    trainer(tmp_path / "b", LMDCallback(every=3, budget=None)).train(str(tmp_path / "a" / "checkpoint-6"))
    assert steps_of(tmp_path / "b") == [0, 3, 6, 9, 12]


def test_each_trial_of_a_search_has_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)  # optuna is not needed
    search = trainer(tmp_path, LMDCallback(every=3, budget=None), save_strategy="steps", save_steps=12)
    search.model_init = lambda trial=None: make("llama")
    search.hp_search_backend, search.hp_name = HPSearchBackend.OPTUNA, None
    search.hp_space = lambda trial: {"learning_rate": 10.0 ** -(2 + trial.number)}
    for number in range(2):
        search.train(trial=SimpleNamespace(number=number, params={}))
    first, second = ({p.name for p in (tmp_path / f"run-{n}").iterdir()} for n in range(2))
    assert first == second == {"checkpoint-12", "lmd", "README.md"}
    assert (tmp_path / "run-1" / "checkpoint-12" / "lmd" / "series.parquet").is_file()
    assert not (tmp_path / "lmd").exists()


def test_two_on_one_trainer_are_refused(tmp_path):
    with pytest.raises(SettingsError, match="two LMDCallbacks on one Trainer"):
        run(tmp_path, LMDCallback(roles=["q"]), LMDCallback(roles=["down"]))


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **told):
        control.should_training_stop = state.global_step >= self.step


def test_a_peft_model(tmp_path):
    def wrapped():
        return peft.get_peft_model(make("llama"), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))

    plain = run(tmp_path / "a", model=wrapped())
    watched = run(tmp_path / "b", LMDCallback(every=4, budget=None), model=wrapped())
    points = read_series(tmp_path / "b" / "lmd" / "series.parquet")
    assert len({p.name for p in points}) == 4
    assert all("lora_A" in p.name for p in points)
    assert all(p.spectral_norm > 0 for p in points if p.step == 12)
    assert losses(plain) == losses(watched)


def test_where_parameters_are_in_parts_checkpoints_are_measured(tmp_path):
    """The Trainer's events by hand, and DeepSpeed's mark alone; `training/test_spread.py` has real shards."""
    model = make("llama")
    whole = make("llama")
    for parameter in model.parameters():
        parameter.ds_id, parameter.data = 0, torch.empty(0)
    args = SimpleNamespace(output_dir=str(tmp_path), save_strategy="no", load_best_model_at_end=False)
    state = SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=10, log_history=[])
    callback = LMDCallback(every=1, budget=None)
    with pytest.warns(UserWarning, match=r"measures nothing \(save_strategy is 'no'\): .*ZeRO-3"):
        callback.on_train_begin(args, state, None, model=model)
    args.save_strategy = "steps"
    with pytest.warns(UserWarning, match="measures saved checkpoints instead: .*ZeRO-3"):
        callback.on_train_begin(args, state, None, model=model)
    for step in (4, 8):
        state.global_step = step
        callback.on_step_end(args, state, None, model=model)
        whole.save_pretrained(tmp_path / f"checkpoint-{step}")
        callback.on_save(args, state, None, model=model)
    (tmp_path / "checkpoint-9").mkdir()
    state.global_step = 9
    with pytest.warns(UserWarning, match="goes on without: .*checkpoint-9.*no weights"):
        callback.on_save(args, state, None, model=model)
    callback.on_train_end(args, state, None, model=model)
    assert steps_of(tmp_path) == [4, 8]


def test_another_process_does_nothing(tmp_path):
    callback = LMDCallback()
    state = SimpleNamespace(is_world_process_zero=False, global_step=2, max_steps=2, log_history=[])
    args = SimpleNamespace(output_dir=str(tmp_path))
    callback.on_train_begin(args, state, None, model=make("llama"))
    callback.on_step_end(args, state, None)
    callback.on_save(args, state, None)
    callback.on_train_end(args, state, None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on": "noon"}, "no on 'noon'; known: steps, save, epoch"),
        ({"every": 0}, "every is 0"),
        ({"every": 1.5}, "every is 1.5"),
        ({"budget": 0}, "budget is 0"),
        ({"budget": "2%"}, "budget is 2%"),
        ({"metric": "data"}, "watched in the metric"),
        ({"roles": "down"}, r"give a tuple: roles=\('down',\)"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(SettingsError, match=message):
        LMDCallback(**options)


def test_layers_without_gradients(tmp_path):
    model = make("llama")
    model.model.embed_tokens.requires_grad_(False)
    with pytest.raises(SettingsError, match="no selected matrix takes gradients"):
        run(tmp_path, LMDCallback(roles=["embed"]), model=model)
    model = make("llama")
    model.model.layers[0].requires_grad_(False)
    run(tmp_path, LMDCallback(every=6, budget=None), model=model)
    counts = {}
    for point in read_series(tmp_path / "lmd" / "series.parquet"):
        counts.setdefault(point.layer, set()).add(point.step)
    assert (counts[0], counts[1]) == ({0}, {0, 6, 12})


@pytest.mark.slow
def test_two_processes(tmp_path):
    """The same losses with and without, on two processes; the first writes."""
    for name, with_callback in (("a", ""), ("b", "yes")):
        subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
                *(str(Path(__file__)), str(tmp_path / name), with_callback),
            ],
            check=True,
            timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        )
    told = [json.loads((tmp_path / name / "losses.json").read_text()) for name in "ab"]
    assert told[0] == told[1]
    assert len(told[0]) == 12
    assert steps_of(tmp_path / "b") == [0, 4, 8, 12]


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    out = Path(sys.argv[1])
    ran = run(out, *([LMDCallback(every=4, budget=None)] if sys.argv[2] else []), ddp_backend="gloo")
    if ran.is_world_process_zero():
        (out / "losses.json").write_text(json.dumps(losses(ran)))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()  # or its threads may still run when the process ends, which aborts it
