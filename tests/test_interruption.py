"""Section 8: a training that was interrupted, by a kill at any moment, goes on and ends as if it had not been."""

import dataclasses
import functools
import json
import multiprocessing
import os
import random
import shutil
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Trainer


@pytest.fixture
def short_config(tiny_config):
    return dataclasses.replace(tiny_config, per_device_train_batch_size=8, gradient_accumulation_steps=1, learning_rate=1e-3, lora_dropout=0.3, num_train_epochs=4.0, early_stopping_patience=9)


def train(notebook, config, data, result: Path) -> None:
    """Do as section 8 does, and write what came of it to ``result``."""
    torch.set_num_threads(1)
    tokenizer, tokenized = data
    folder, checkpoint, line = notebook.find_checkpoint(Path(config.output_dir) / "checkpoints", notebook.settings_of_training(config, tokenized))
    model = notebook.build_qlora(config, ["classifier"])
    steps = []

    class Steps(notebook.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    def make(config):
        trainer = notebook.make_main_trainer(config, model, folder, tokenizer, tokenized)
        trainer.add_callback(Steps)
        return trainer

    trainer, _ = notebook.train_within_memory(make, config, folder)
    history = [{name: value for name, value in row.items() if not name.endswith(("_runtime", "_per_second"))} for row in trainer.state.log_history]
    weights = {name: parameter.detach().double().sum().item() for name, parameter in model.named_parameters() if parameter.requires_grad}
    clock = next(each for each in trainer.callback_handler.callbacks if isinstance(each, notebook.TrainingClock))
    notebook.write_whole(result, json.dumps({"line": line, "history": [row for row in history if "train_loss" not in row], "best": trainer.state.best_metric, "epochs": trainer.state.epoch, "weights": weights, "seconds": clock.seconds, "steps": len(steps)}))


def run_for(seconds: float | None, *arguments) -> bool:
    """Train in a process of its own; kill it after ``seconds``. Tell whether it came to its end."""
    process = multiprocessing.get_context("fork").Process(target=train, args=arguments)
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
        return False
    assert process.exitcode == 0
    return True


def outcome(path: Path) -> dict:
    return {name: value for name, value in json.loads(path.read_text()).items() if name not in ("line", "seconds", "steps")}


def test_killed_at_ten_random_moments_it_ends_as_if_it_had_not_been(notebook, short_config, small_data, tmp_path):
    whole = tmp_path / "whole.json"
    start = time.monotonic()
    assert run_for(None, notebook, short_config, small_data, whole)
    duration = time.monotonic() - start
    shutil.rmtree(short_config.output_dir)
    moments, kills, resumed = random.Random(0), 0, 0
    while kills < 10:
        result = tmp_path / f"killed-{kills}.json"
        for _ in range(4):
            if run_for(moments.uniform(0.2, 1) * duration, notebook, short_config, small_data, result):
                break
            kills += 1
        else:
            assert run_for(None, notebook, short_config, small_data, result)
        assert outcome(result) == outcome(whole)
        resumed += "Resuming after epoch" in json.loads(result.read_text())["line"]
        shutil.rmtree(short_config.output_dir)
    assert resumed >= 1


def test_the_same_seed_gives_the_same_to_the_last_digit_and_a_finished_run_is_not_trained_again(notebook, short_config, small_data, tmp_path):
    first, again, third = (tmp_path / f"{number}.json" for number in (1, 2, 3))
    run_for(None, notebook, short_config, small_data, first)
    run_for(None, notebook, short_config, small_data, third)
    shutil.rmtree(short_config.output_dir)
    run_for(None, notebook, short_config, small_data, again)
    assert outcome(first) == outcome(again) == outcome(third)
    before, after = (json.loads(path.read_text()) for path in (first, third))
    assert before["steps"] == 4 * 20 and after["steps"] == 0
    assert "Resuming after epoch 4" in after["line"] and "nothing is trained again" in after["line"]
    assert before["seconds"] * 0.8 < after["seconds"] < before["seconds"] * 1.8  # the first run's time, kept


def test_a_run_that_early_stopping_ended_is_not_trained_on(notebook, short_config, small_data, tmp_path):
    config = dataclasses.replace(short_config, num_train_epochs=9.0, early_stopping_patience=2)
    first, again = tmp_path / "first.json", tmp_path / "again.json"
    assert run_for(None, notebook, config, small_data, first) and run_for(None, notebook, config, small_data, again)
    assert outcome(again) == outcome(first) and json.loads(again.read_text())["steps"] == 0
    assert json.loads(first.read_text())["epochs"] < 9 and "The training had ended there" in json.loads(again.read_text())["line"]
    history = [row["eval_accuracy"] for row in json.loads(first.read_text())["history"] if "eval_accuracy" in row]
    assert history[-3] == max(history)  # the best adapter is not the last


def test_the_clock_keeps_the_peak_of_before_the_interruption(notebook, monkeypatch):
    """Without a GPU: PyTorch's counter is played."""
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 700)
    clock = notebook.TrainingClock()
    assert clock.state()["attributes"] == {"seconds": 0.0, "peak": 0}  # the model's loading is not the training's
    clock.on_train_begin(None, None, None)
    kept = clock.state()["attributes"]
    resumed = notebook.TrainingClock.from_state({"args": {}, "attributes": kept})
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 300)
    resumed.on_train_begin(None, None, None)
    resumed.on_train_end(None, None, None)
    assert resumed.peak == 700 and resumed.seconds >= kept["seconds"]


@pytest.fixture(scope="module")
def two_epochs(notebook, tiny_bert, small_data, tmp_path_factory):
    """The folder of a training of two epochs, with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("two-epochs")
    environ = {"QLORA_PROFILE": "full", "QLORA_MODEL_NAME": tiny_bert, "QLORA_MAX_LENGTH": "32", "QLORA_OUTPUT_DIR": str(folder), "QLORA_NUM_TRAIN_EPOCHS": "2", "QLORA_GRADIENT_ACCUMULATION_STEPS": "1", "QLORA_PER_DEVICE_TRAIN_BATCH_SIZE": "8"}
    assert run_for(None, notebook, notebook.resolve_config(environ, cuda=False)[0], small_data, folder / "result.json")
    (checkpoints,) = (folder / "checkpoints").iterdir()
    assert [path.name for path in sorted(checkpoints.glob("checkpoint-*"))] == ["checkpoint-20", "checkpoint-40"]
    return checkpoints


@pytest.fixture
def checkpoints(two_epochs, tmp_path):
    """A copy of ``two_epochs``, to damage."""
    return Path(shutil.copytree(two_epochs, tmp_path / "checkpoints"))


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"])
@pytest.mark.parametrize("share", [None, 0, 0.5, 0.98])
def test_a_half_written_checkpoint_is_skipped(notebook, checkpoints, name, share):
    assert notebook.last_checkpoint(checkpoints).name == "checkpoint-40"
    path = checkpoints / "checkpoint-40" / name
    content = path.read_bytes()
    path.unlink() if share is None else path.write_bytes(content[: int(share * len(content))])
    assert notebook.last_checkpoint(checkpoints).name == "checkpoint-20"


def test_other_settings_and_other_data_start_anew_and_say_why(notebook, short_config, small_data, tmp_path):
    folder, settings = tmp_path / "checkpoints", notebook.settings_of_training(short_config, small_data[1])
    own, checkpoint, line = notebook.find_checkpoint(folder, settings)
    assert checkpoint is None and line == "Starting from the pretrained weights."
    for changes, reason in (({"learning_rate": 5e-4}, r"learning_rate 0.0005, not 0.001"), ({"data": "other"}, "the data")):
        os.utime(own / "settings.json")
        other, checkpoint, line = notebook.find_checkpoint(folder, settings | changes)
        assert other != own and checkpoint is None and f"{own} is kept and not resumed: other settings ({reason})" in line
        os.utime(other / "settings.json", (0, 0))


def test_what_does_not_concern_the_training_does_not_hinder_resuming(notebook, short_config, small_data):
    settings = notebook.settings_of_training(short_config, small_data[1])
    changes = {"data_dir": "elsewhere", "ranks": [1], "rank_seeds": 2, "efficiency_steps": 1, "growth_batches": [1], "memory_caps_gb": [4.0], "per_device_eval_batch_size": 16}
    assert notebook.settings_of_training(dataclasses.replace(short_config, **changes), small_data[1]) == settings
    for field in ("seed", "learning_rate", "tail_share", "model_name", "execution"):
        value = {"model_name": "other", "execution": "lean"}.get(field, 0.25)
        assert notebook.settings_of_training(dataclasses.replace(short_config, **{field: value}), small_data[1]) != settings
    fewer = notebook.DatasetDict(small_data[1] | {"train": small_data[1]["train"].select(np.arange(100))})
    assert notebook.settings_of_training(short_config, fewer)["data"] != settings["data"]


# Memory


class RunsOut:
    """A callback's step that fails as a full GPU does, from ``step`` on, while more than ``fits`` reviews are trained at once."""

    def __init__(self, notebook, fits: int, step: int):
        class Callback(notebook.TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if args.per_device_train_batch_size > fits and state.global_step >= step:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

        self.callback, self.made, self.sizes = Callback, [], []

    def make(self, notebook, model, folder, data):
        def make(config):
            assert not any(trainer() for trainer in self.made), "a Trainer that ran out of memory still holds some"
            trainer = notebook.make_main_trainer(config, model, folder, data[0], data[1])
            trainer.add_callback(self.callback)
            self.made.append(weakref.ref(trainer))
            self.sizes.append(sizes := set())
            collate = trainer.data_collator
            trainer.data_collator = lambda rows: (sizes.add(len(rows)), collate(rows))[1]
            return trainer

        return make


@pytest.mark.parametrize("step", [0, 7, 15])
def test_when_memory_runs_out_the_micro_batch_halves_and_the_training_stays_the_same(notebook, short_config, small_data, tmp_path, capsys, step):
    """At the first step, within the first epoch, and in the second, after a checkpoint, whose micro-batch does not come back: 16 x 1, then 8 x 2, then 4 x 4."""
    config = dataclasses.replace(short_config, per_device_train_batch_size=16, per_device_eval_batch_size=1, num_train_epochs=2.0, lora_dropout=0.0)
    model = notebook.build_qlora(config, ["classifier"])
    runs_out = RunsOut(notebook, fits=4, step=step)
    make = runs_out.make(notebook, model, tmp_path / "a", small_data)
    trainer, used = notebook.train_within_memory(make, config, tmp_path / "a")
    lines = [line for line in capsys.readouterr().out.splitlines() if "memory ran out" in line]
    assert lines == ["The GPU's memory ran out: 8 x 2 reviews a step from here on, instead of 16 x 1.", "The GPU's memory ran out: 4 x 4 reviews a step from here on, instead of 8 x 2."]
    assert (used.per_device_train_batch_size, used.gradient_accumulation_steps) == (4, 4) and trainer.state.global_step == 20
    assert [max(sizes) for sizes in runs_out.sizes] == [16, 8, 4]  # reviews that were trained at once
    written = sorted((tmp_path / "a").glob("checkpoint-*/trainer_state.json"))
    assert {json.loads(path.read_text())["train_batch_size"] for path in written} == ({4} if step < 10 else {16})
    whole = notebook.build_qlora(config, ["classifier"])
    make = functools.partial(notebook.make_main_trainer, model=whole, folder=tmp_path / "b", tokenizer=small_data[0], tokenized=small_data[1])
    notebook.train_within_memory(make, config, tmp_path / "b")
    for (name, parameter), other in zip(model.named_parameters(), whole.parameters()):
        if parameter.requires_grad:
            assert torch.allclose(parameter, other, atol=2e-4), name


@pytest.fixture
def validation_runs_out(monkeypatch):
    """Return a function after which a validation of more than ``fits`` reviews at once fails as on a full GPU."""

    def limit(fits: int) -> None:
        predict = Trainer.prediction_step

        def prediction_step(self, model, inputs, *args, **kwargs):
            if len(inputs["labels"]) > fits:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
            return predict(self, model, inputs, *args, **kwargs)

        monkeypatch.setattr(Trainer, "prediction_step", prediction_step)

    return limit


def test_when_memory_runs_out_in_a_validation_only_the_validation_is_made_again(notebook, short_config, small_data, tmp_path, capsys, validation_runs_out):
    config = dataclasses.replace(short_config, per_device_eval_batch_size=16, num_train_epochs=2.0)
    results = []
    for folder in ("a", "b"):
        model = notebook.build_qlora(config, ["classifier"])
        runs_out = RunsOut(notebook, fits=8, step=0)
        trainer, used = notebook.train_within_memory(runs_out.make(notebook, model, tmp_path / folder, small_data), config, tmp_path / folder)
        assert used == config and len(runs_out.made) == 1 and trainer.state.global_step == 40
        results.append([(row["eval_accuracy"], pytest.approx(row["eval_loss"], abs=1e-6)) for row in trainer.state.log_history if "eval_loss" in row])
        validation_runs_out(5)
    assert results[0] == results[1] and trainer.args.per_device_eval_batch_size == 4
    lines = [line for line in capsys.readouterr().out.splitlines() if "memory ran out" in line]
    assert lines == ["The GPU's memory ran out in a validation: 8 reviews at once from here on, instead of 16.", "The GPU's memory ran out in a validation: 4 reviews at once from here on, instead of 8."]


def test_a_validation_of_which_not_one_review_fits_is_an_error_that_says_what_to_do(notebook, short_config, small_data, tmp_path, validation_runs_out):
    validation_runs_out(0)
    trainer = notebook.make_main_trainer(short_config, notebook.build_qlora(short_config, ["classifier"]), tmp_path, *small_data)
    with pytest.raises(MemoryError, match="Not even one review of the validation.*QLORA_MAX_LENGTH, QLORA_EXECUTION=lean"):
        trainer.evaluate()


@pytest.mark.parametrize(("micro", "accumulation", "halved"), [(16, 2, (8, 4)), (3, 4, (1, 12)), (6, 1, (3, 2)), (2, 16, (1, 32))])
def test_the_effective_batch_stays(notebook, tiny_config, micro, accumulation, halved):
    config = dataclasses.replace(tiny_config, per_device_train_batch_size=micro, gradient_accumulation_steps=accumulation)
    smaller = notebook.smaller_batches(config)
    assert (smaller.per_device_train_batch_size, smaller.gradient_accumulation_steps) == halved


def test_one_review_that_does_not_fit_is_an_error_that_says_what_to_do(notebook, tiny_config):
    with pytest.raises(MemoryError, match="Not even one review of 32 tokens.*QLORA_MAX_LENGTH, QLORA_EXECUTION=lean"):
        notebook.smaller_batches(dataclasses.replace(tiny_config, per_device_train_batch_size=1))


# Disks


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_computed(notebook, tiny_config, tmp_path):
    (tmp_path / "file").write_text("")
    for field, folder in (("data_dir", tmp_path / "file"), ("output_dir", "/proc/none"), ("data_dir", tmp_path / "file" / "below")):
        with pytest.raises(OSError, match=f"cannot be written to.*QLORA_{field.upper()}=path/to/folder"):
            notebook.check_storage(dataclasses.replace(tiny_config, **{field: str(folder)}), 1000)


def test_a_full_disk_is_said_too(notebook, tiny_config, monkeypatch):
    notebook.check_storage(tiny_config, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9 - 10**8, 10**8))
    notebook.check_storage(tiny_config, 4_000_000)
    with pytest.raises(OSError, match="Only 100 MB are free.*up to 1,364 MB are needed.*QLORA_OUTPUT_DIR"):
        notebook.check_storage(tiny_config, 109_483_778)


def test_a_folder_is_replaced_only_when_the_new_one_is_whole(notebook, tmp_path):
    for content in ("first", "second"):
        with notebook.whole_folder(tmp_path / "adapter") as folder:
            (folder / content).write_text("")
    with pytest.raises(KeyboardInterrupt):
        with notebook.whole_folder(tmp_path / "adapter") as folder:
            (folder / "third").write_text("")
            raise KeyboardInterrupt
    assert [path.name for path in (tmp_path / "adapter").iterdir()] == ["second"]
