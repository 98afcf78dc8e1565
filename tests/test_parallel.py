"""Two processes train what one does, agree with each other, and write once. On CPUs, through gloo."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import peft
import pytest
import torch
from conftest import NOTEBOOK

LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def config(tiny_config):
    """Two epochs of five steps. With plain SGD an update is the gradient itself; Adam would hide a factor."""
    changes = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4, "num_train_epochs": 2.0}
    return tiny_config.model_copy(update=changes | {"optim": "sgd", "learning_rate": 1.0})


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(rank: int, count: int, port: int, folder: Path, job, notebook, arguments: tuple) -> None:
    """Be a process that a launcher started: named by environment variables, and doing `job`."""
    torch.set_num_threads(1)
    values = (rank, rank, count, count, "127.0.0.1", port)
    os.environ.update({name: str(value) for name, value in zip(LAUNCHED, values)} if count > 1 else {})
    notebook.AcceleratorState._reset_state(reset_partial_state=True)  # what tests before this one left
    assert notebook.PartialState(cpu=True).num_processes == count
    torch.save(job(notebook, *arguments), folder / f"{rank}.pt")


def together(count: int, folder: Path, job, notebook, *arguments) -> list:
    """Run `job` in `count` processes launched together; return what each returned, None for one that ended early."""
    folder.mkdir()
    rest = (count, free_port(), folder, job, notebook, arguments)
    torch.multiprocessing.start_processes(start, rest, count, start_method="fork")
    files = [folder / f"{rank}.pt" for rank in range(count)]
    return [torch.load(file, weights_only=False) if file.exists() else None for file in files]


def adapter_of(model) -> torch.Tensor:
    return torch.cat([each.flatten() for each in peft.get_peft_model_state_dict(model).values()])


def differ(first: torch.Tensor, second: torch.Tensor) -> float:
    return (first - second).abs().max().item()


def train(notebook, config, task, tokenized) -> dict:
    """Train as section 8 does, as one of the processes there are, and return what came of it."""
    count = notebook.PartialState().num_processes
    shared = notebook.share_batch(config, count)
    with notebook.PartialState().main_process_first():
        folder, _ = notebook.training_folder(shared, tokenized, count)
    before = adapter_of(notebook.build_qlora(shared, task))
    trainer = notebook.train_within_memory(shared, task, tokenized, folder)
    kept = ("loss", "eval_loss", "eval_accuracy", "epoch", "step", "steps_all")
    rows = [row for row in trainer.state.log_history if "train_loss" not in row]
    history = [{name: row[name] for name in kept if name in row} for row in rows]
    adapter = adapter_of(trainer.accelerator.unwrap_model(trainer.model))
    found = {"before": before, "adapter": adapter, "history": history, "folder": folder}
    return found | {"best": trainer.state.best_global_step}


def test_two_processes_train_what_one_does(notebook, config, task, tokenized, tmp_path):
    elsewhere = config.model_copy(update={"output_dir": str(tmp_path / "elsewhere")})
    (alone,) = together(1, tmp_path / "one", train, notebook, elsewhere, task, tokenized)
    first, second = together(2, tmp_path / "two", train, notebook, config, task, tokenized)
    moved = differ(alone["before"], alone["adapter"])
    assert differ(alone["before"], first["before"]) == 0 and moved > 0.005
    assert differ(first["adapter"], second["adapter"]) == 0
    assert differ(alone["adapter"], first["adapter"]) < moved / 1000
    assert first["folder"].name == alone["folder"].name  # so what began on two goes on on one
    assert first["best"] == second["best"] == alone["best"]
    for name in ("loss", "eval_loss"):
        one, two, other = ([row[name] for row in r["history"] if name in row] for r in (alone, first, second))
        assert two == other and one == pytest.approx(two, abs=1e-4) and len(one) > 1


def test_resumed_they_end_as_if_they_had_not_been_interrupted(notebook, config, task, tokenized, tmp_path):
    """Dropout included: each process has its own random state in the checkpoint."""
    config = config.model_copy(update={"lora_dropout": 0.3})
    whole, _ = together(2, tmp_path / "whole", train, notebook, config, task, tokenized)
    assert len([*whole["folder"].glob("checkpoint-5/rng*")]) == 2
    shutil.rmtree(whole["folder"] / "checkpoint-10")
    resumed, other = together(2, tmp_path / "resumed", train, notebook, config, task, tokenized)
    assert resumed["history"] == whole["history"]
    assert differ(resumed["adapter"], whole["adapter"]) == differ(other["adapter"], whole["adapter"]) == 0


def batches(notebook, config, task, tokenized) -> dict[str, list]:
    """Return this process's texts of two epochs in each order, its random state having been moved as by dropout."""
    model, orders = notebook.build_qlora(config, task), {}
    for order in ("random", "group_by_length"):
        changed = config.model_copy(update={"train_sampling_strategy": order})
        arguments = notebook.training_arguments(changed, Path(config.output_dir), **notebook.QUIET)
        trainer = notebook.make_trainer(model, changed, arguments, task.tokenizer, tokenized["train"])
        loader, orders[order] = trainer.get_train_dataloader(), []
        for _ in range(2):
            torch.rand(1 + notebook.PartialState().process_index)
            orders[order].append([tuple(row[row > 0].tolist()) for batch in loader for row in batch["input_ids"]])
    return orders


def test_each_text_is_trained_once_an_epoch(notebook, config, task, tokenized, tmp_path):
    runs = together(2, tmp_path / "runs", batches, notebook, config, task, tokenized)
    texts = sorted(map(tuple, tokenized["train"]["input_ids"]))
    for order in ("random", "group_by_length"):
        first, second = (run[order] for run in runs)
        assert all(sorted(first[epoch] + second[epoch]) == texts for epoch in range(2))
        assert first[0] != first[1] and len(first[0]) == len(second[0])


def test_the_exported_script_runs_under_accelerate_launch(tiny_bert, sentences, tmp_path):
    """As section 13 says, up to the end of section 9."""
    nb = nbformat.read(NOTEBOOK, as_version=4)
    nb.cells = nb.cells[: next(place for place, cell in enumerate(nb.cells) if "## 10 Efficiency" in cell.source)]
    nb.cells.append(nbformat.v4.new_code_cell("open(f'{os.getpid()}.ended', 'w').close()"))
    nbformat.write(nb, tmp_path / "start.ipynb")
    (tmp_path / "reviews").mkdir()
    sentences.sample(200, random_state=0).to_csv(tmp_path / "reviews" / "reviews.csv", index=False)
    settings = {"MODEL_NAME": tiny_bert, "DATASET_NAME": "reviews", "MAX_LENGTH": 32, "NUM_TRAIN_EPOCHS": 1}
    (tmp_path / ".env").write_text("".join(f"QLORA_{name}={value}\n" for name, value in settings.items()))
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("QLORA_", "WANDB_"))}
    environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    launch = f"accelerate.commands.launch --multi_gpu --num_processes 2 --main_process_port {free_port()} start.py"
    for command in ("nbconvert --to script start.ipynb", launch):
        words = [sys.executable, "-m", *command.split()]
        done = subprocess.run(words, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "Data" / "results.json").read_text())
    assert results["provenance"]["processes"] == 2 and results["training"]["epochs"] == 1
    (about,) = tmp_path.glob("outputs/checkpoints/*/settings.json")
    assert json.loads(about.read_text())["batch"] == 32  # of both together
    assert np.sum(results["test"]["confusion_matrix"]) == results["provenance"]["rows"]["test"]
    assert done.stdout.count("results.json holds") == 1 == len([*tmp_path.glob("*.ended")])  # the first goes on alone
    assert (tmp_path / "outputs" / "merged" / "model.safetensors").exists() and not [*tmp_path.rglob("*.part")]
