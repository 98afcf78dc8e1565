"""Two processes train what one does, agree with each other, and write once. On CPUs, through gloo."""

import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import nbformat
import numpy as np
import peft
import pytest
import torch
from conftest import NOTEBOOK

LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def config(tiny_config):
    """Two epochs of ten steps. With plain SGD an update is the gradient itself; Adam would hide a factor."""
    changes = {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2.0,
    }
    return tiny_config.model_copy(update=changes | {"optim": "sgd", "learning_rate": 1.0})


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(job, notebook, rank: int, count: int, port: int, folder: Path, arguments: tuple) -> None:
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
    context, port = multiprocessing.get_context("fork"), free_port()
    rest = (count, port, folder, arguments)
    processes = [context.Process(target=start, args=(job, notebook, rank, *rest)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * count
    files = [folder / f"{rank}.pt" for rank in range(count)]
    return [torch.load(file, weights_only=False) if file.exists() else None for file in files]


def adapter_of(model) -> dict[str, torch.Tensor]:
    return {name: each.clone() for name, each in peft.get_peft_model_state_dict(model).items()}


def differ(first: dict, second: dict) -> float:
    """Return the largest difference of two adapters."""
    return max((first[name] - second[name]).abs().max().item() for name in first)


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
    found = {
        "before": before,
        "adapter": adapter_of(trainer.accelerator.unwrap_model(trainer.model)),
    }
    return found | {"history": history, "folder": folder, "best": trainer.state.best_global_step}


@pytest.mark.parametrize(
    ("order", "micro", "accumulation"),
    [("random", 8, 2), ("random", 16, 1)],
)
def test_two_processes_train_what_one_does(notebook, config, task, tokenized, tmp_path, order, micro, accumulation):
    """Accumulation divided, or the micro-batch."""
    parts = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulation}
    config = config.model_copy(update=parts | {"train_sampling_strategy": order})
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
    assert {path.name for path in whole["folder"].glob("checkpoint-*")} == {
        "checkpoint-10",
        "checkpoint-20",
    }
    assert {path.name for path in whole["folder"].glob("*-10/rng*")} == {
        "rng_state_0.pth",
        "rng_state_1.pth",
    }
    shutil.rmtree(whole["folder"] / "checkpoint-20")
    resumed, other = together(2, tmp_path / "resumed", train, notebook, config, task, tokenized)
    assert resumed["history"] == whole["history"]
    assert differ(resumed["adapter"], whole["adapter"]) == differ(other["adapter"], whole["adapter"]) == 0


def batches(notebook, config, task, tokenized) -> list[list]:
    """Return the texts of two epochs of this process, its random state having been moved as dropout moves it."""
    arguments = notebook.training_arguments(config, Path(config.output_dir), **notebook.QUIET)
    model = notebook.build_qlora(config, task)
    trainer = notebook.make_trainer(model, config, arguments, task.tokenizer, tokenized["train"])
    loader, epochs = trainer.get_train_dataloader(), []
    for _ in range(2):
        torch.rand(1 + notebook.PartialState().process_index)
        epochs.append([tuple(row[row > 0].tolist()) for batch in loader for row in batch["input_ids"]])
    return epochs


@pytest.mark.parametrize("order", ["random", "group_by_length"])
def test_each_text_is_trained_once_an_epoch(notebook, config, task, tokenized, tmp_path, order):
    config = config.model_copy(update={"train_sampling_strategy": order})
    first, second = together(2, tmp_path / "runs", batches, notebook, config, task, tokenized)
    texts = sorted(map(tuple, tokenized["train"]["input_ids"]))
    for epoch in range(2):
        assert sorted(first[epoch] + second[epoch]) == texts
    assert first[0] != first[1] and len(first[0]) == len(second[0])


def draw_and_go_on(notebook, folder: Path) -> tuple:
    """Save a figure to a folder of this process's own, and be the first process alone from then on."""
    own = folder / str(notebook.PartialState().process_index)
    own.mkdir()
    notebook.save_figure(notebook.plt.figure(), "figure.png", str(own))
    notebook.go_on_alone()
    left = [name for name in LAUNCHED if name in os.environ]
    return notebook.PartialState(cpu=True).num_processes, torch.distributed.is_initialized(), left


def test_the_first_process_alone_writes_figures_and_goes_on_alone(notebook, tmp_path):
    first, second = together(2, tmp_path / "runs", draw_and_go_on, notebook, tmp_path)
    assert [path.parent.name for path in tmp_path.glob("[01]/figure.png")] == ["0"]
    assert first == (1, False, []) and second is None


def test_one_process_has_nobody_to_leave(notebook, tmp_path):
    ((count, initialized, _),) = together(1, tmp_path / "runs", draw_and_go_on, notebook, tmp_path)
    assert (count, initialized) == (1, False) and (tmp_path / "0" / "figure.png").exists()


def test_two_processes_can_write_a_file_at_the_same_moment(notebook, tmp_path, monkeypatch):
    """The other one writes after this one has written and before it renames."""
    replace, context = Path.replace, multiprocessing.get_context("fork")

    def meanwhile(self, target):
        monkeypatch.setattr(Path, "replace", replace)
        other = context.Process(target=notebook.atomic_write, args=(tmp_path / "file", "same"))
        other.start()
        other.join()
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", meanwhile)
    notebook.atomic_write(tmp_path / "file", "same")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "same"


@pytest.mark.parametrize(
    ("processes", "error"),
    [(2, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")), (1, RuntimeError("a bug"))],
)
def test_one_of_several_processes_does_not_shrink_alone_and_no_other_error_is_hidden(
    notebook, config, monkeypatch, tmp_path, processes, error
):
    """The others wait for its gradients."""
    build = MagicMock(side_effect=error)
    monkeypatch.setattr(notebook, "build_qlora", build)
    monkeypatch.setattr(notebook, "PartialState", lambda: SimpleNamespace(num_processes=processes))
    with pytest.raises(type(error), match=str(error)):
        notebook.train_within_memory(config, None, None, tmp_path)
    assert build.call_count == 1


# The notebook


@pytest.fixture
def environ() -> dict[str, str]:
    """The environment of a program: the tools of this Python first, no settings, one thread a process."""
    kept = {n: value for n, value in os.environ.items() if not n.startswith(("QLORA_", "WANDB_"))}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return kept | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": path}


def write_start(path: Path, words: str, after: str = "") -> None:
    """Write the notebook up to and without the cell that holds `words`, and a cell `after`."""
    nb = nbformat.read(NOTEBOOK, as_version=4)
    end = next(place for place, cell in enumerate(nb.cells) if words in cell.source)
    nb.cells = [*nb.cells[:end], nbformat.v4.new_code_cell(after)]
    nb.metadata.setdefault("language_info", {"name": "python", "file_extension": ".py"})
    nbformat.write(nb, path)


def call(command: str, folder: Path, environ: dict[str, str]) -> str:
    """Run a program of this Python in `folder`, and return what it printed."""
    words = [sys.executable, "-m", *command.split()]
    done = subprocess.run(words, cwd=folder, env=environ, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_notebook_is_exported_as_python():
    assert nbformat.read(NOTEBOOK, as_version=4).metadata.language_info.file_extension == ".py"


def test_the_exported_script_runs_under_accelerate_launch(tiny_bert, sentences, environ, tmp_path):
    """As section 13 says, up to the end of section 9."""
    write_start(tmp_path / "start.ipynb", "## 10 Efficiency")
    (tmp_path / "reviews").mkdir()
    sentences.sample(200, random_state=0).to_csv(tmp_path / "reviews" / "reviews.csv", index=False)
    settings = {
        "MODEL_NAME": tiny_bert,
        "DATASET_NAME": "reviews",
        "MAX_LENGTH": 32,
        "NUM_TRAIN_EPOCHS": 2,
    }
    (tmp_path / ".env").write_text("".join(f"QLORA_{name}={value}\n" for name, value in settings.items()))
    call("nbconvert --to script start.ipynb", tmp_path, environ)
    port = free_port()
    launch = f"accelerate.commands.launch --multi_gpu --num_processes 2 --main_process_port {port} start.py"
    printed = call(launch, tmp_path, environ)
    results = json.loads((tmp_path / "Data" / "results.json").read_text())
    assert results["provenance"]["processes"] == 2 and results["training"]["epochs"] == 2
    (about,) = tmp_path.glob("outputs/checkpoints/*/settings.json")
    assert json.loads(about.read_text())["batch"] == 32  # of both together
    assert np.sum(results["test"]["confusion_matrix"]) == results["provenance"]["rows"]["test"]
    assert printed.count("Starting from the pretrained weights") == printed.count("results.json holds") == 1
    assert (tmp_path / "outputs" / "merged" / "model.safetensors").exists() and not [*tmp_path.rglob("*.part")]


def test_papermill_sets_settings(tiny_bert, environ, tmp_path):
    write_start(
        tmp_path / "start.ipynb",
        "# @title Find a model or a data set",
        "print(config.seed, config.output_dir)",
    )
    (tmp_path / "parameters.yaml").write_text(f"settings: {{seed: 7, output_dir: mine, model_name: {tiny_bert}}}")
    call("papermill start.ipynb out.ipynb --parameters_file parameters.yaml", tmp_path, environ)
    last = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells[-1]
    assert last.outputs[0].text == "7 mine\n" and (tmp_path / "mine").is_dir()
