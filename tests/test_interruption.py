"""Section 8: a training that is killed, or runs out of memory, goes on and ends as if nothing had been."""

import gc
import itertools
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import peft
import pytest
import torch
from safetensors.torch import load_file

FULL = "CUDA out of memory. Tried to allocate 20.00 MiB."
CLOCKS = ("_seconds", "_runtime", "_per_second", "_time")  # ends of names of what no two runs share


@pytest.fixture
def short_config(tiny_config):
    """Four epochs of 10 steps, with dropout: its random numbers have to go on too."""
    changes = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "lora_dropout": 0.3}
    return tiny_config.model_copy(update=changes | {"num_train_epochs": 4.0, "early_stopping_patience": 9})


def adapter_of(trainer) -> dict[str, torch.Tensor]:
    return peft.get_peft_model_state_dict(trainer.model)


def train(notebook, config, task, tokenized, result: Path, kill_at: int = -1, delay: float = 0.0) -> None:
    """Do as section 8 does, and write what came of it to `result`; or be killed some seconds after a step began."""

    class Kill(notebook.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == kill_at:
                threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()

    torch.set_num_threads(1)
    folder, _ = notebook.training_folder(config, tokenized, 1)
    begun = notebook.last_checkpoint(folder)[1]
    trainer = notebook.train_within_memory(config, task, tokenized, folder, [Kill()])
    rows = [row for row in trainer.state.log_history if "train_loss" not in row]
    history = [{n: value for n, value in row.items() if not n.endswith(CLOCKS)} for row in rows]
    adapter = {name: each.double().sum().item() for name, each in adapter_of(trainer).items()}
    found = {"outcome": [history, adapter, trainer.state.epoch], "begun": begun, "steps": trainer.steps["all"]}
    found["seconds"] = [row["train_seconds"] for row in rows if "train_seconds" in row][-1]
    notebook.atomic_write(result, json.dumps(found))


def train_apart(*arguments) -> dict | None:
    """Train in a process of its own; return what came of it, or None if it was killed."""
    process = multiprocessing.get_context("fork").Process(target=train, args=arguments)
    process.start()
    process.join(300)
    assert process.exitcode in (0, -signal.SIGKILL)
    return json.loads(arguments[4].read_text()) if process.exitcode == 0 else None


def test_killed_at_random_moments_it_ends_as_if_it_had_not_been(notebook, short_config, task, tokenized, tmp_path):
    setting, result = (notebook, short_config, task, tokenized), tmp_path / "result.json"
    whole, again = train_apart(*setting, result), train_apart(*setting, result)
    assert whole["outcome"] == again["outcome"] and whole["seconds"] == again["seconds"]  # not those of doing nothing
    assert (whole["steps"], again["steps"], again["begun"]) == (40, 0, 4)  # what is finished is not trained again
    shutil.rmtree(short_config.output_dir)
    chance = random.Random(0)
    for first, last in ((3, 14), (15, 24), (25, 36)):
        assert train_apart(*setting, result, chance.randint(first, last), chance.uniform(0, 0.2)) is None
    resumed = train_apart(*setting, result)
    assert resumed["outcome"] == whole["outcome"] and resumed["begun"] >= 2


def test_early_stopping_counts_on(notebook, short_config, task, tokenized, tmp_path, monkeypatch):
    """The accuracies are played: the second epoch is the best. The fourth is interrupted, made again, and the last."""
    accuracies = itertools.chain([0.1, 0.5, 0.9], itertools.repeat(0.6))
    monkeypatch.setattr(notebook, "compute_metrics", lambda _: {"accuracy": next(accuracies)})
    config = short_config.model_copy(update={"num_train_epochs": 9.0, "early_stopping_patience": 2})
    setting = (config, task, tokenized, tmp_path)

    class Interrupt(notebook.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 35:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        notebook.train_within_memory(*setting, [Interrupt()])
    assert notebook.last_checkpoint(tmp_path) == (tmp_path / "checkpoint-30", 3, False)
    for steps in (10, 0):  # what it ended is not trained on
        trainer = notebook.train_within_memory(*setting)
        assert notebook.last_checkpoint(tmp_path) == (tmp_path / "checkpoint-40", 4, True)
        assert (trainer.steps["all"], trainer.state.epoch, trainer.state.best_global_step) == (steps, 4, 20)
        kept = adapter_of(trainer)
        best, last = (load_file(tmp_path / f"checkpoint-{n}" / "adapter_model.safetensors") for n in (20, 40))
        assert all(torch.equal(kept[name], best[name]) for name in best)
        assert not all(torch.equal(kept[name], last[name]) for name in last)
        before, *scored = [row for row in trainer.state.log_history if "eval_loss" in row]
        assert before["step"] == 0 and before["eval_loss"] == pytest.approx(math.log(2), abs=0.1)
        assert [row["step"] for row in scored] == [row["steps_all"] for row in scored] == [10, 20, 30, 40]
        seconds = [row["train_seconds"] for row in scored]
        assert seconds == sorted(seconds) and 0 < seconds[0] < seconds[-1] < 60


def test_a_half_written_checkpoint_is_skipped_and_written_again(notebook, short_config, task, tokenized, tmp_path):
    """Killed while it wrote: the file that is written last is missing or cut, the others may be anything."""
    changes = {"per_device_train_batch_size": 20, "num_train_epochs": 2.0}  # 8 steps an epoch, 16 is more, as a number
    config, folder = short_config.model_copy(update=changes), tmp_path / "run"
    kept = adapter_of(notebook.train_within_memory(config, task, tokenized, folder))
    whole, half = (folder / "checkpoint-16", 2, True), (folder / "checkpoint-8", 1, False)
    path, *others = sorted(whole[0].iterdir(), key=lambda each: each.name != "trainer_state.json")
    assert path.stat().st_mtime_ns >= max(other.stat().st_mtime_ns for other in others)
    content = path.read_bytes()
    for share in (1, 0, 0.5, 0.98, None):
        path.unlink() if share is None else path.write_bytes(content[: int(share * len(content))])
        assert notebook.last_checkpoint(folder) == (whole if share == 1 else half)
    for other in others:
        other.write_bytes(b"half")
    again = adapter_of(notebook.train_within_memory(config, task, tokenized, folder))
    assert notebook.last_checkpoint(folder) == whole and all(torch.equal(again[name], kept[name]) for name in kept)


def test_other_settings_or_data_get_another_folder_and_the_line_says_what_differs(notebook, short_config, tokenized):
    own, line = notebook.training_folder(short_config, tokenized, 1)
    assert line == "" and own.parent == Path(short_config.output_dir) / "checkpoints"
    fewer = notebook.DatasetDict({**tokenized, "train": tokenized["train"].select(range(150))})
    cases = [({"seed": 1}, tokenized, "seed"), ({"lora_r": 2, "max_length": 16}, tokenized, "max_length, lora_r")]
    cases += [({"per_device_train_batch_size": 4}, tokenized, "batch"), ({}, fewer, "data")]
    for changes, data, differs in cases:
        other, line = notebook.training_folder(short_config.model_copy(update=changes), data, 1)
        assert other != own and f" {differs}." in line, differs
        os.utime(other / "settings.json", (0, 0))  # so that the first is the newest again
    same = [({"data_dir": "elsewhere", "preset": "fast", "wandb_project": "other", "push_to_hub": "me/it"}, 1)]
    same += [({"ranks": [1], "rank_epochs": 1.0, "rank_learning_rate": 1.0, "rank_train_samples": 32}, 1)]
    same += [({"cuda_graphs": True, "efficiency_steps": 1, "per_device_eval_batch_size": 3}, 1)]
    for micro, steps, processes in ((4, 4, 1), (1, 16, 1), (8, 1, 2), (1, 4, 4)):
        same += [({"per_device_train_batch_size": micro, "gradient_accumulation_steps": steps}, processes)]
    other = notebook.DatasetDict({**tokenized, "test": tokenized["validation"]})  # plays no part
    for changes, processes in same:
        assert notebook.training_folder(short_config.model_copy(update=changes), other, processes)[0] == own


def test_micro_batches_shrink(notebook, short_config, task, tokenized, tmp_path, monkeypatch):
    """In the first epoch, in the second, after a checkpoint, and in the second's validation, which is made again."""
    config = short_config.model_copy(update={"num_train_epochs": 2.0, "lora_dropout": 0.0})
    whole = adapter_of(notebook.train_within_memory(config, task, tokenized, tmp_path / "whole"))
    predict, sizes, attempts, models = notebook.Trainer.prediction_step, [], [], []

    class RunsOut(notebook.TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            gc.collect()
            assert not any(each() for each in models)  # no model of an attempt before takes memory
            models.append(weakref.ref(model))
            attempts.append((args.per_device_train_batch_size, args.gradient_accumulation_steps, []))

        def on_step_begin(self, args, state, control, **kwargs):
            attempts[-1][-1].append(state.global_step)
            if state.global_step == {16: 3, 8: 15}.get(args.per_device_train_batch_size):
                raise torch.OutOfMemoryError(FULL)

    def prediction_step(self, model, inputs, *args, **kwargs):
        sizes.append(len(inputs["labels"]))
        if self.state.global_step == 20 and sizes[-1] > 8:
            raise torch.OutOfMemoryError(FULL)
        return predict(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(notebook.Trainer, "prediction_step", prediction_step)
    adapter = adapter_of(notebook.train_within_memory(config, task, tokenized, tmp_path / "run", [RunsOut()]))
    assert attempts[:2] == [(16, 1, [*range(3 + 1)]), (8, 2, [*range(15 + 1)])]
    assert attempts[2:] == [(4, 4, [*range(10, 20)]), (2, 8, [*range(10, 20)])]
    assert sizes[-3:] == [8, 8, 4]  # the 20 texts
    assert max((adapter[name] - whole[name]).abs().max() for name in whole) < 2e-4


TRIES = [(4, 3), (3, 4), (2, 6), (1, 12)]  # each keeps the effective batch
OTHERS = map(RuntimeError, ["CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"])
UNFIT = [(1, full, MemoryError, "32 tokens.*lean", TRIES) for full in (torch.OutOfMemoryError(FULL), *OTHERS)]
UNFIT += [(2, torch.OutOfMemoryError(FULL), torch.OutOfMemoryError, FULL, TRIES[:1])]  # the other waits for gradients
UNFIT += [(1, RuntimeError("a bug"), RuntimeError, "a bug", TRIES[:1])]


@pytest.mark.parametrize(("processes", "error", "raised", "said", "tries"), UNFIT)
def test_what_never_fits_is_said(notebook, short_config, monkeypatch, tmp_path, processes, error, raised, said, tries):
    build = MagicMock(side_effect=error)
    monkeypatch.setattr(notebook, "build_qlora", build)
    monkeypatch.setattr(notebook, "PartialState", lambda: SimpleNamespace(num_processes=processes))
    parts = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
    config = short_config.model_copy(update=parts)
    for train, last in ((notebook.train_within_memory, tmp_path), (notebook.train_briefly, 4)):
        with pytest.raises(raised, match=said):
            train(config, None, None, last)
    tried = [call.args[0] for call in build.call_args_list]
    assert [(each.per_device_train_batch_size, each.gradient_accumulation_steps) for each in tried] == 2 * tries
