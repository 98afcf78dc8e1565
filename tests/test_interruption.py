"""Section 8: a training that is killed, or finished, goes on as if nothing had been."""

import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

CLOCKS = ("_runtime", "_per_second", "seconds")  # what no two trainings share


@pytest.fixture(autouse=True)
def one_thread():
    """Let each process compute alike: what is compared here has to be the same."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def config(tiny_config):
    """Four epochs of 10 steps; the random numbers of dropout have to go on, too."""
    changes = {
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 1,
        "lora_dropout": 0.3,
        "num_train_epochs": 4.0,
        "early_stopping_patience": 9,
    }
    return tiny_config.model_copy(update=changes)


@pytest.fixture
def section_8(notebook, names, head, tokenizer, tokenized):
    """A function that does as the run cells of section 8, and returns `finished`."""

    def run(config, *callbacks):
        folder, about = notebook.training_folder(config, tokenized, "hash")
        notebook.write_json(folder / "settings.json", about)
        finished = folder / "finished"
        if not finished.exists():
            trainer = notebook.within_memory(
                notebook.train_qlora,
                config,
                names,
                head,
                tokenizer,
                tokenized,
                folder,
                [notebook.Clock(), *callbacks],
            )
            summary = notebook.training_summary(trainer, len(tokenized["train"]))
            notebook.keep_finished(trainer, summary, config.model_name, finished)
        return finished

    return run


@pytest.fixture
def section_8_apart(section_8):
    """The same in a process of its own, which may be killed."""

    def run(*arguments):
        context = multiprocessing.get_context("fork")
        process = context.Process(target=section_8, args=arguments)
        process.start()
        process.join(300)
        return process.exitcode

    return run


class Interrupt(TrainerCallback):
    """Raise KeyboardInterrupt when a step begins."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


class Wait(TrainerCallback):
    """Let the second step take some seconds longer."""

    def __init__(self, seconds):
        self.seconds = seconds

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            time.sleep(self.seconds)


class Kill(TrainerCallback):
    """Kill the process some seconds after a step began, or a later one."""

    timer = None

    def __init__(self, step, delay):
        self.step = step
        self.delay = delay

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step >= self.step and self.timer is None:
            kill = (os.getpid(), signal.SIGKILL)
            self.timer = threading.Timer(self.delay, os.kill, kill)
            self.timer.start()

    def on_train_end(self, args, state, control, **kwargs):
        self.timer.join()  # on a fast machine it comes no sooner


class KillAtTheEnd(TrainerCallback):
    """Kill the process when all is trained, and nothing is kept yet."""

    def on_train_end(self, args, state, control, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)


class CountSteps(TrainerCallback):
    """Count the steps that are trained."""

    steps = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1


def summary_of(finished):
    """Return what a finished training was summed up to."""
    return json.loads((finished / "training.json").read_text())


def history_of(finished):
    """Return the losses and scores of a finished training, without its times."""
    history = []
    for row in summary_of(finished)["history"]:
        if "train_loss" not in row:
            kept = {k: value for k, value in row.items() if not k.endswith(CLOCKS)}
            history.append(kept)
    return history


def adapter_of(folder):
    """Return all numbers of an adapter."""
    weights = load_file(folder / "adapter_model.safetensors")
    return torch.cat([weights[name].flatten() for name in sorted(weights)])


def assert_equal(first, second):
    """Assert that two finished trainings came to the same."""
    assert history_of(first) == history_of(second)
    assert torch.equal(adapter_of(first / "adapter"), adapter_of(second / "adapter"))


def elsewhere(config, tmp_path):
    """Return the same configuration, with another folder for outputs."""
    return config.model_copy(update={"output_dir": str(tmp_path / "elsewhere")})


def test_killed_at_random_moments_it_ends_as_if_it_had_not_been(
    section_8, section_8_apart, config, tmp_path
):
    chance = random.Random(0)
    for first, last in [(3, 14), (15, 24), (25, 36)]:
        kill = Kill(chance.randint(first, last), delay=chance.uniform(0, 0.2))
        assert section_8_apart(config, kill) == -signal.SIGKILL
    count = CountSteps()
    resumed = section_8(config, count)
    assert 0 < count.steps < 40
    whole = section_8(elsewhere(config, tmp_path))
    assert_equal(resumed, whole)


def test_killed_before_it_is_kept_it_ends_as_if_it_had_not_been(
    section_8, section_8_apart, config, tmp_path
):
    assert section_8_apart(config, KillAtTheEnd()) == -signal.SIGKILL
    count = CountSteps()
    again = section_8(config, count)
    assert 10 <= count.steps < 40  # from the last checkpoint that was not the end
    whole = section_8(elsewhere(config, tmp_path))
    assert_equal(again, whole)


@pytest.mark.parametrize("epochs", [1.0, 1.5])
def test_what_is_finished_is_not_trained_again(section_8, config, epochs):
    config = config.model_copy(update={"num_train_epochs": epochs})
    count = CountSteps()
    finished = section_8(config, count)
    summary = summary_of(finished)
    assert summary["epochs"] == epochs
    assert section_8(config, count) == finished
    assert summary_of(finished) == summary
    assert count.steps == 10 * epochs


def test_a_finished_training_can_be_moved(section_8, config, tmp_path):
    config = config.model_copy(update={"num_train_epochs": 1.0})
    before = adapter_of(section_8(config) / "adapter")
    moved = elsewhere(config, tmp_path)
    shutil.move(config.output_dir, moved.output_dir)
    count = CountSteps()
    finished = section_8(moved, count)
    assert count.steps == 0
    assert torch.equal(adapter_of(finished / "adapter"), before)


def test_an_interrupted_training_can_be_moved(
    section_8, notebook, config, monkeypatch, tmp_path
):
    """Its best epoch, the second, is found where the folder is now."""
    play_accuracies(monkeypatch, notebook, [0.1, 0.5, 0.9, 0.6])
    with pytest.raises(KeyboardInterrupt):
        section_8(config, Interrupt(35))
    moved = elsewhere(config, tmp_path)
    shutil.move(config.output_dir, moved.output_dir)
    finished = section_8(moved)
    assert summary_of(finished)["best_epoch"] == 2
    best = adapter_of(finished.parent / "checkpoint-20")
    assert torch.equal(adapter_of(finished / "adapter"), best)


def play_accuracies(monkeypatch, notebook, accuracies):
    """Let validations have these accuracies, and all after them the last one."""
    played = itertools.chain(accuracies, itertools.repeat(accuracies[-1]))
    monkeypatch.setattr(
        notebook, "compute_metrics", lambda _: {"accuracy": next(played)}
    )


def test_after_early_stopping_the_best_epoch_is_kept_and_nothing_trained_again(
    section_8, notebook, config, monkeypatch
):
    play_accuracies(monkeypatch, notebook, [0.1, 0.5, 0.9, 0.6])
    monkeypatch.setattr(notebook, "MIN_STEPS", 10)
    config = config.model_copy(update={"early_stopping_patience": 2})
    config = config.model_copy(update={"num_train_epochs": 9.0})
    count = CountSteps()
    finished = section_8(config, count)
    section_8(config, count)
    assert count.steps == 40
    summary = summary_of(finished)
    assert summary["epochs"] == 4
    assert summary["best_epoch"] == 2
    best = finished.parent / "checkpoint-20"
    last = finished.parent / "checkpoint-40"
    kept = adapter_of(finished / "adapter")
    assert torch.equal(kept, adapter_of(best))
    assert not torch.equal(kept, adapter_of(last))
    assert notebook.last_checkpoint(finished.parent) == str(best)


def test_early_stopping_counts_on_after_an_interruption(
    section_8, notebook, config, monkeypatch
):
    """The second epoch is the best; the fourth is interrupted, and the last."""
    play_accuracies(monkeypatch, notebook, [0.1, 0.5, 0.9, 0.6])
    monkeypatch.setattr(notebook, "MIN_STEPS", 10)
    config = config.model_copy(update={"early_stopping_patience": 2})
    config = config.model_copy(update={"num_train_epochs": 9.0})
    with pytest.raises(KeyboardInterrupt):
        section_8(config, Interrupt(35))
    count = CountSteps()
    summary = summary_of(section_8(config, count))
    assert count.steps == 10
    assert summary["epochs"] == 4
    assert summary["best_epoch"] == 2


@pytest.mark.parametrize(("min_steps", "epochs"), [(40, 5), (41, 6), (60, 7), (99, 9)])
def test_early_stopping_waits_for_enough_steps(
    section_8, notebook, config, monkeypatch, min_steps, epochs
):
    play_accuracies(monkeypatch, notebook, [0.1, 0.5, 0.9, 0.6])
    monkeypatch.setattr(notebook, "MIN_STEPS", min_steps)
    config = config.model_copy(update={"early_stopping_patience": 2})
    config = config.model_copy(update={"num_train_epochs": 9.0})
    summary = summary_of(section_8(config))
    assert summary["epochs"] == epochs
    assert summary["best_epoch"] == 2


def test_a_part_of_an_epoch_is_not_trained_on_where_stopping_must_wait(
    section_8, notebook, config
):
    config = config.model_copy(update={"num_train_epochs": 1.5})
    count = CountSteps()
    section_8(config, count)
    assert count.steps == 15 < notebook.MIN_STEPS


def test_the_seconds_have_those_before_an_interruption(section_8, config):
    with pytest.raises(KeyboardInterrupt):
        section_8(config, Wait(1.0), Interrupt(25))
    summary = summary_of(section_8(config))
    last_attempt = summary["history"][-1]["train_runtime"]
    assert summary["seconds"] > 1.0 + last_attempt
    seconds = [row["seconds"] for row in summary["history"]]
    assert seconds == sorted(seconds)


def interrupted(section_8, notebook, config, tokenized):
    """Train until the third epoch; return the folder of checkpoints 10 and 20."""
    with pytest.raises(KeyboardInterrupt):
        section_8(config, Interrupt(25))
    folder, _ = notebook.training_folder(config, tokenized, "hash")
    assert notebook.last_checkpoint(folder) == str(folder / "checkpoint-20")
    return folder


def test_a_half_written_checkpoint_is_skipped(section_8, notebook, config, tokenized):
    """Trainer writes `trainer_state.json` last: then it is missing, or cut."""
    folder = interrupted(section_8, notebook, config, tokenized)
    path = folder / "checkpoint-20" / "trainer_state.json"
    content = path.read_bytes()
    for length in (0, len(content) // 2, len(content) - 2):
        path.write_bytes(content[:length])
        assert notebook.last_checkpoint(folder) == str(folder / "checkpoint-10")
    path.unlink()
    assert notebook.last_checkpoint(folder) == str(folder / "checkpoint-10")


def test_a_half_written_checkpoint_is_written_again(
    section_8, notebook, config, tokenized, tmp_path
):
    folder = interrupted(section_8, notebook, config, tokenized)
    for path in (folder / "checkpoint-20").iterdir():
        path.write_bytes(b"half")
    resumed = section_8(config)
    whole = section_8(elsewhere(config, tmp_path))
    assert_equal(resumed, whole)


def test_trainer_writes_the_file_last_that_tells_whole_from_half(
    section_8, notebook, config, tokenized
):
    folder = interrupted(section_8, notebook, config, tokenized)
    times = {}
    for path in (folder / "checkpoint-20").iterdir():
        times[path.name] = path.stat().st_mtime_ns
    assert max(times, key=times.get) == "trainer_state.json"
