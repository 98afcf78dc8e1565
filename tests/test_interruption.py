"""Section 8: a training that is killed, or runs out of memory, goes on and ends as if nothing had been."""

import gc
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import threading
import weakref
from pathlib import Path

import peft
import pytest
import torch

FULL = "CUDA out of memory. Tried to allocate 20.00 MiB."
CLOCKS = ("_seconds", "_runtime", "_per_second", "_time")  # ends of names of what no two runs share


@pytest.fixture
def short_config(tiny_config):
    """Four epochs of 10 steps, with dropout: its random numbers have to go on too."""
    changes = {
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 1,
        "lora_dropout": 0.3,
    }
    return tiny_config.model_copy(update=changes | {"num_train_epochs": 4.0, "early_stopping_patience": 9})


def runs_out(notebook, fits: int = 10**9, step: int = 0):
    """Return a callback that fails as a full GPU does, from `step` on, where more than `fits` texts are a micro-batch.

    It notes each attempt: its micro-batch, accumulation and steps, and whether models of attempts before were kept.
    """

    class RunsOut(notebook.TrainerCallback):
        attempts, models = [], []

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            gc.collect()
            kept = sum(each() is not None for each in self.models)
            self.models.append(weakref.ref(model))
            self.attempts.append((args.per_device_train_batch_size, args.gradient_accumulation_steps, kept, []))

        def on_step_begin(self, args, state, control, **kwargs):
            self.attempts[-1][-1].append(state.global_step)
            if args.per_device_train_batch_size > fits and state.global_step >= step:
                raise torch.OutOfMemoryError(FULL)

    return RunsOut()


def adapter_of(trainer) -> dict[str, torch.Tensor]:
    return peft.get_peft_model_state_dict(trainer.model)


def train(notebook, config, task, tokenized, result: Path, killed_after: float = 0.0) -> None:
    """Do as section 8 does, and write what came of it to `result`; or be killed some seconds after training began."""

    class Kill(notebook.TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            timer = threading.Timer(killed_after, os.kill, (os.getpid(), signal.SIGKILL))
            timer.daemon = True  # the end of the training is waited for, and the timer is not
            timer.start()

    torch.set_num_threads(1)
    folder, note = notebook.training_folder(config, tokenized, 1)[0], runs_out(notebook)
    epoch = notebook.last_checkpoint(folder)[1]
    trainer = notebook.train_within_memory(config, task, tokenized, folder, [note] + [Kill()] * bool(killed_after))
    rows = [row for row in trainer.state.log_history if "train_loss" not in row]
    history = [{n: value for n, value in row.items() if not n.endswith(CLOCKS)} for row in rows]
    adapter = {name: each.double().sum().item() for name, each in adapter_of(trainer).items()}
    seconds = [row["train_seconds"] for row in rows if "train_seconds" in row][-1]
    found = {"history": history, "adapter": adapter, "epochs": trainer.state.epoch, "begun": epoch}
    notebook.atomic_write(result, json.dumps(found | {"steps": len(note.attempts[0][-1]), "seconds": seconds}))


def comes_to_its_end(*arguments) -> bool:
    """Train in a process of its own, and tell whether it was not killed."""
    process = multiprocessing.get_context("fork").Process(target=train, args=arguments)
    process.start()
    process.join(120)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode == 0


def outcome(path: Path) -> list:
    return [json.loads(path.read_text())[name] for name in ("history", "adapter", "epochs")]


# Kills


def test_killed_at_random_moments_it_ends_as_if_it_had_not_been(notebook, short_config, task, tokenized, tmp_path):
    whole, begun, moments, kills = tmp_path / "whole.json", set(), random.Random(0), 0
    assert comes_to_its_end(notebook, short_config, task, tokenized, whole)
    seconds = json.loads(whole.read_text())["seconds"]
    for number in range(9):
        shutil.rmtree(short_config.output_dir)
        result = tmp_path / f"killed-{number}.json"
        for moment in (moments.uniform(0.1, 1) * seconds, moments.uniform(0.1, 0.5) * seconds, 0.0):
            if comes_to_its_end(notebook, short_config, task, tokenized, result, moment):
                break
            kills += 1
        assert outcome(result) == outcome(whole)
        begun.add(json.loads(result.read_text())["begun"])
        if kills >= 4 and begun & {1, 2, 3}:  # one at least went on in the middle
            return
    raise AssertionError(f"{kills} kills, and it went on after epochs {begun} only")


def test_a_finished_training_is_not_trained_again(notebook, short_config, task, tokenized, tmp_path):
    first, again, anew = (tmp_path / f"{name}.json" for name in ("first", "again", "anew"))
    assert comes_to_its_end(notebook, short_config, task, tokenized, first)
    assert comes_to_its_end(notebook, short_config, task, tokenized, again)
    shutil.rmtree(short_config.output_dir)
    assert comes_to_its_end(notebook, short_config, task, tokenized, anew)
    assert outcome(first) == outcome(again) == outcome(anew)  # the same seed gives the same to the last digit
    before, after = (json.loads(path.read_text()) for path in (first, again))
    assert (before["steps"], after["steps"], after["begun"]) == (40, 0, 4)
    assert before["seconds"] == after["seconds"]  # the first run's, and not those of doing nothing


def test_early_stopping_counts_on_and_what_it_ended_is_not_trained_on(
    notebook, short_config, task, tokenized, tmp_path, monkeypatch
):
    """The second epoch is the best. The fourth is interrupted, and made again, is the last."""
    accuracies = itertools.chain([0.1, 0.5, 0.9], itertools.repeat(0.6))
    monkeypatch.setattr(notebook, "compute_metrics", lambda _: {"accuracy": next(accuracies)})
    config = short_config.model_copy(update={"num_train_epochs": 9.0, "early_stopping_patience": 2})
    folder, _ = notebook.training_folder(config, tokenized, 1)

    class Interrupt(notebook.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 35:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        notebook.train_within_memory(config, task, tokenized, folder, [Interrupt()])
    assert notebook.last_checkpoint(folder) == (folder / "checkpoint-30", 3, False)
    first, again = tmp_path / "first.json", tmp_path / "again.json"
    train(notebook, config, task, tokenized, first)
    assert notebook.last_checkpoint(folder) == (folder / "checkpoint-40", 4, True)
    train(notebook, config, task, tokenized, again)
    assert outcome(again) == outcome(first) and outcome(first)[-1] == 4
    assert json.loads(first.read_text())["steps"] == 10 and json.loads(again.read_text())["steps"] == 0


def test_a_half_written_checkpoint_is_skipped_and_written_again(notebook, short_config, task, tokenized, tmp_path):
    """Killed while it wrote: the file that is written last is missing or cut, the others may be anything."""
    config, folder = short_config.model_copy(update={"num_train_epochs": 2.0}), tmp_path / "run"
    kept = adapter_of(notebook.train_within_memory(config, task, tokenized, folder))
    assert notebook.last_checkpoint(folder) == (folder / "checkpoint-20", 2, True)
    path, *others = sorted((folder / "checkpoint-20").iterdir(), key=lambda each: each.name != "trainer_state.json")
    assert path.stat().st_mtime_ns >= max(other.stat().st_mtime_ns for other in others)
    content = path.read_bytes()
    for share in (0, 0.5, 0.98, None):
        path.unlink() if share is None else path.write_bytes(content[: int(share * len(content))])
        assert notebook.last_checkpoint(folder) == (folder / "checkpoint-10", 1, False)
    for other in others:
        other.write_bytes(b"half")
    again = adapter_of(notebook.train_within_memory(config, task, tokenized, folder))
    assert notebook.last_checkpoint(folder) == (folder / "checkpoint-20", 2, True)
    assert all(torch.equal(again[name], kept[name]) for name in kept)


def test_the_newest_checkpoint_is_that_of_the_most_steps(notebook, tmp_path):
    """As numbers, not as text, and whichever was touched last."""
    (tmp_path / "checkpoint-200").mkdir()
    assert notebook.last_checkpoint(tmp_path) == notebook.last_checkpoint(tmp_path / "none") == (None, 0, False)
    for steps, stopped in ((100, True), (20, False), (9, False)):
        control = {"TrainerControl": {"args": {"should_training_stop": stopped}}}
        state = {"epoch": steps / 10, "stateful_callbacks": control}
        notebook.atomic_write(tmp_path / f"checkpoint-{steps}" / "trainer_state.json", json.dumps(state))
    assert notebook.last_checkpoint(tmp_path) == (tmp_path / "checkpoint-100", 10, True)


# Which training goes on


def test_other_settings_or_data_get_another_folder_and_the_line_says_what_differs(notebook, short_config, tokenized):
    own, line = notebook.training_folder(short_config, tokenized, 1)
    assert line == "" and own.parent == Path(short_config.output_dir) / "checkpoints"
    fewer = notebook.DatasetDict({**tokenized, "train": tokenized["train"].select(range(150))})
    labels = [1 - label for label in tokenized["validation"]["label"]]
    relabelled = tokenized["validation"].remove_columns("label").add_column("label", labels)
    changes = {"learning_rate": 5e-4, "seed": 1, "lora_r": 2}
    cases = [({name: value}, tokenized, name) for name, value in changes.items()]
    cases += [
        ({}, fewer, "data"),
        ({}, notebook.DatasetDict({**tokenized, "validation": relabelled}), "data"),
    ]
    cases += [({"per_device_train_batch_size": 4}, tokenized, "batch")]
    for changes, data, differs in cases:
        other, line = notebook.training_folder(short_config.model_copy(update=changes), data, 1)
        assert other != own and line.endswith(f"another {differs}."), differs
        os.utime(other / "settings.json", (0, 0))  # so that the first is the newest again
    _, line = notebook.training_folder(short_config.model_copy(update={"seed": 2, "max_length": 16}), tokenized, 1)
    assert {"seed", "max_length"} == set(line.removesuffix(".").split("another ")[1].split(", "))


ELSEWHERE = {
    "data_dir": "elsewhere",
    "preset": "fast",
    "wandb_project": "other",
    "push_to_hub": "me/it",
}
ELSEWHERE |= {"ranks": [1], "rank_epochs": 1.0, "rank_learning_rate": 1.0, "rank_train_samples": 32}
ELSEWHERE |= {"cuda_graphs": True, "efficiency_steps": 1}


def test_what_does_not_concern_training_keeps_the_folder(notebook, short_config, tokenized):
    kept = (notebook.training_folder(short_config, tokenized, 1)[0], "")
    assert notebook.training_folder(short_config.model_copy(update=ELSEWHERE), tokenized, 1) == kept
    for micro, steps, processes in ((4, 4, 1), (1, 16, 1), (8, 1, 2), (1, 4, 4)):
        parts = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": steps}
        config = short_config.model_copy(update=parts | {"per_device_eval_batch_size": micro})
        assert notebook.training_folder(config, tokenized, processes) == kept
    other = notebook.DatasetDict({**tokenized, "test": tokenized["validation"]})
    assert notebook.training_folder(short_config, other, 1) == kept  # the test split plays no part


# Memory


@pytest.fixture
def undropped(short_config):
    """Two epochs of ten steps on 16 texts, without dropout, whose numbers depend on the micro-batch."""
    return short_config.model_copy(update={"num_train_epochs": 2.0, "lora_dropout": 0.0})


@pytest.fixture
def whole_adapter(notebook, undropped, task, tokenized, tmp_path):
    """The adapter of a training that has all the memory it needs."""
    return adapter_of(notebook.train_within_memory(undropped, task, tokenized, tmp_path / "whole"))


def assert_alike(adapter: dict, other: dict) -> None:
    assert max((adapter[name] - other[name]).abs().max() for name in other) < 2e-4


@pytest.mark.parametrize(("step", "resumed"), [(3, 0), (15, 10)])
def test_when_memory_runs_out_in_a_step_it_goes_on_with_smaller_micro_batches(
    notebook, undropped, task, tokenized, tmp_path, whole_adapter, step, resumed
):
    """Within the first epoch, and in the second, after a checkpoint."""
    full = runs_out(notebook, fits=4, step=step)
    trainer = notebook.train_within_memory(undropped, task, tokenized, tmp_path / "run", [full])
    steps = [[*range(step + 1)], [*range(resumed, step + 1)], [*range(resumed, 20)]]
    batches = [(16, 1), (8, 2), (4, 4)]  # and no model of before takes memory
    assert full.attempts == [(*parts, 0, made) for parts, made in zip(batches, steps)]
    assert_alike(adapter_of(trainer), whole_adapter)


def test_when_memory_runs_out_in_a_validation_it_goes_on_with_smaller_batches(
    notebook, undropped, task, tokenized, tmp_path, whole_adapter, monkeypatch
):
    """In the second epoch's validation; it is made again, and so is its epoch."""
    predict, sizes, note = notebook.Trainer.prediction_step, [], runs_out(notebook)

    def prediction_step(self, model, inputs, *args, **kwargs):
        sizes.append(len(inputs["labels"]))
        if self.state.global_step == 20 and sizes[-1] > 16:
            raise torch.OutOfMemoryError(FULL)
        return predict(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(notebook.Trainer, "prediction_step", prediction_step)
    trainer = notebook.train_within_memory(undropped, task, tokenized, tmp_path / "run", [note])
    assert [(micro, accumulation) for micro, accumulation, *_ in note.attempts] == [
        (16, 1),
        (8, 2),
        (4, 4),
    ]
    assert [steps[0] for *_, steps in note.attempts] == [0, 10, 10]
    assert sizes[-2:] == [16, 4]  # the 20 texts, in two batches
    assert_alike(adapter_of(trainer), whole_adapter)


def test_each_try_keeps_the_effective_batch_and_if_none_fits_the_error_says_what_to_do(
    notebook, short_config, monkeypatch, tmp_path
):
    tried = []

    def build_qlora(config, *args):
        tried.append((config.per_device_train_batch_size, config.gradient_accumulation_steps))
        raise torch.OutOfMemoryError(FULL)

    monkeypatch.setattr(notebook, "build_qlora", build_qlora)
    parts = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
    with pytest.raises(MemoryError, match="32 tokens.*lean"):
        notebook.train_within_memory(short_config.model_copy(update=parts), None, None, tmp_path)
    assert tried == [(4, 3), (3, 4), (2, 6), (1, 12)]
