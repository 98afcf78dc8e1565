"""Sections 2, 8 and 13: two processes train what one does, agree with each other, and write once. On CPUs, through gloo."""

import dataclasses
import functools
import json
import multiprocessing
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
import torch
from conftest import NOTEBOOK, ROOT
from hypothesis import given
from hypothesis import strategies as st
from nbclient import NotebookClient
from safetensors.numpy import load_file


@pytest.fixture
def config(tiny_config):
    """Two epochs of ten steps. With plain SGD an update is the gradient itself; Adam would hide a factor."""
    changes = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "optim": "sgd", "learning_rate": 1.0, "num_train_epochs": 2.0}
    return dataclasses.replace(tiny_config, **changes)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(job, rank: int, count: int, port: int, folder: Path, arguments: tuple) -> None:
    """Do as a launcher does, in a process of its own: name the process by environment variables, then run ``job``."""
    torch.set_num_threads(1)
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in launched.items()} if count > 1 else {})
    torch.save(job(*arguments), folder / f"{count}-{rank}.pt")


def together(count: int, folder: Path, job, *arguments) -> list:
    """Run ``job`` in ``count`` processes launched together; return what each returned."""
    folder.mkdir(exist_ok=True)
    context, port = multiprocessing.get_context("fork"), free_port()
    processes = [context.Process(target=start, args=(job, rank, count, port, folder, arguments)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * count
    return [torch.load(folder / f"{count}-{rank}.pt", weights_only=False) for rank in range(count)]


def train(notebook, config, data, count: int, **changes) -> dict:
    """Train as section 8 does, as one of ``count`` processes, and return what came of it."""
    notebook.AcceleratorState._reset_state(reset_partial_state=True)  # what tests before this one left
    processes = notebook.PartialState(cpu=True)
    tokenizer, tokenized = data
    shared = notebook.share_batch(config, processes.num_processes)
    config = notebook.carried_out(shared) if config.execution != "plain" else shared
    folder = Path(config.output_dir) / "checkpoints"
    model = notebook.build_qlora(config, ["classifier"])
    before = adapter(model)
    make = functools.partial(notebook.make_main_trainer, model=model, folder=folder, tokenizer=tokenizer, tokenized=tokenized)
    trainer, _ = notebook.train_within_memory(make, config, folder)
    logits = trainer.predict(tokenized["validation"]).predictions
    keep = ("loss", "eval_loss", "eval_accuracy", "epoch")
    history = [{name: row[name] for name in keep if name in row} for row in trainer.state.log_history if "train_loss" not in row]
    state = {name: getattr(trainer.state, name) for name in ("global_step", "epoch", "best_metric", "best_global_step")}
    return {"processes": processes.num_processes, "before": before, "adapter": adapter(model), "logits": logits, "history": history, "state": state}


def adapter(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def differ(first: dict, second: dict) -> float:
    """Return the largest difference of two adapters."""
    return max((first[name] - second[name]).abs().max().item() for name in first)


@pytest.mark.parametrize(
    ("execution", "order", "micro", "accumulation"),
    [("plain", "random", 8, 2), ("plain", "group_by_length", 8, 4), ("plain", "random", 16, 1), ("fast", "group_by_length", 8, 2), ("lean", "group_by_length", 4, 4)],
)
def test_two_processes_train_what_one_does(notebook, config, small_data, tmp_path, execution, order, micro, accumulation):
    """Accumulation divided, a part of it left, the micro-batch divided, and the executions that average all gradients in one message."""
    changes = {"execution": execution, "train_sampling_strategy": order, "per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulation}
    config = dataclasses.replace(config, **changes)
    (alone,) = together(1, tmp_path / "one", train, notebook, dataclasses.replace(config, output_dir=str(tmp_path / "a")), small_data, 1)
    first, second = together(2, tmp_path / "two", train, notebook, dataclasses.replace(config, output_dir=str(tmp_path / "b")), small_data, 2)
    assert (alone["processes"], first["processes"], second["processes"]) == (1, 2, 2)
    moved = differ(alone["before"], alone["adapter"])
    assert differ(alone["before"], first["before"]) == 0 and moved > 0.005
    assert differ(first["adapter"], second["adapter"]) == 0
    assert differ(alone["adapter"], first["adapter"]) < moved / 1000
    assert np.array_equal(first["logits"], second["logits"]) and np.allclose(alone["logits"], first["logits"], atol=1e-4)
    assert np.array_equal(alone["logits"].argmax(-1), first["logits"].argmax(-1))
    assert first["state"] == second["state"] and first["state"]["global_step"] == alone["state"]["global_step"] == 320 // (micro * accumulation)
    losses = [[row["loss"] for row in run["history"] if "loss" in row] for run in (alone, first)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_resumed_it_ends_as_if_it_had_not_been_interrupted(notebook, config, small_data, tmp_path):
    """Dropout included: each process has its own random state in the checkpoint."""
    config = dataclasses.replace(config, lora_dropout=0.3)
    whole, _ = together(2, tmp_path / "whole", train, notebook, config, small_data, 2)
    folder = Path(config.output_dir) / "checkpoints"
    assert {path.name for path in (folder / "checkpoint-10").iterdir()} >= {"rng_state_0.pth", "rng_state_1.pth"}
    shutil.rmtree(folder / "checkpoint-20")
    resumed, other = together(2, tmp_path / "resumed", train, notebook, config, small_data, 2)
    assert (resumed["history"], resumed["state"]) == (whole["history"], whole["state"]) and differ(resumed["adapter"], whole["adapter"]) == 0
    assert notebook.is_whole(folder / "checkpoint-20")
    state = folder / "checkpoint-20" / "rng_state_1.pth"
    state.write_bytes(state.read_bytes()[:100])
    assert not notebook.is_whole(folder / "checkpoint-20")


def test_both_processes_stop_early_and_keep_the_same_best(notebook, config, small_data, tmp_path):
    config = dataclasses.replace(config, learning_rate=1e-12, num_train_epochs=9.0, early_stopping_patience=2)
    first, second = together(2, tmp_path / "runs", train, notebook, config, small_data, 2)
    assert first["state"] == second["state"] and first["state"]["epoch"] == 3 and first["state"]["best_global_step"] == 10


def batches(notebook, config, data) -> list[list]:
    """Return the texts of two epochs' batches of this process, its random state having been moved as dropout moves it."""
    notebook.AcceleratorState._reset_state(reset_partial_state=True)
    processes = notebook.PartialState(cpu=True)
    model = notebook.build_qlora(config, ["classifier"])
    trainer = notebook.make_main_trainer(config, model, config.output_dir, *data)
    loader, epochs = trainer.get_train_dataloader(), []
    for _ in range(2):
        torch.rand(1 + processes.process_index)
        epochs.append([tuple(row[row > 0].tolist()) for batch in loader for row in batch["input_ids"]])
    return epochs


@pytest.mark.parametrize("order", ["random", "group_by_length"])
def test_each_review_is_trained_once_an_epoch(notebook, config, small_data, tmp_path, order):
    config = dataclasses.replace(config, train_sampling_strategy=order)
    first, second = together(2, tmp_path / "runs", batches, notebook, config, small_data)
    rows = sorted(tuple(ids) for ids in small_data[1]["train"]["input_ids"])
    for epoch in range(2):
        assert sorted(first[epoch] + second[epoch]) == rows
    assert first[0] != first[1]


def save(notebook, folder: Path) -> bool:
    """Save a figure to a folder of this process's own; tell whether it is there."""
    notebook.AcceleratorState._reset_state(reset_partial_state=True)
    own = folder / str(notebook.PartialState(cpu=True).process_index)
    notebook.save_figure(notebook.plt.figure(), str(own), "figure.png")
    return (own / "figure.png").exists()


def test_the_first_process_alone_saves_figures(notebook, tmp_path):
    assert together(2, tmp_path / "runs", save, notebook, tmp_path) == [True, False]


# The effective batch


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 130))
def test_processes_share_the_effective_batch_or_none_is_trained(notebook, micro, accumulation, processes):
    config = notebook.Config(per_device_train_batch_size=micro, gradient_accumulation_steps=accumulation)
    batch = micro * accumulation
    if batch % processes:
        with pytest.raises(ValueError, match=f"batch of {micro} x {accumulation} reviews cannot be divided among {processes} processes. Allowed: .*QLORA_PER_DEVICE"):
            notebook.share_batch(config, processes)
        return
    shared = notebook.share_batch(config, processes)
    assert shared.per_device_train_batch_size * shared.gradient_accumulation_steps * processes == batch
    if accumulation % processes == 0:
        assert shared.per_device_train_batch_size == micro


def test_the_number_of_processes_changes_neither_settings_nor_folder(notebook, config):
    """So a run that began on two GPUs goes on on one: what is hashed is the effective batch of all."""
    data = {name: {"input_ids": [[1]], "label": [0]} for name in ("train", "validation")}
    shared = notebook.share_batch(config, 2)
    together = dataclasses.replace(shared, gradient_accumulation_steps=shared.gradient_accumulation_steps * 2)
    assert notebook.settings_of_training(together, data) == notebook.settings_of_training(config, data)


def test_a_process_that_runs_out_of_memory_ends_and_does_not_leave_the_others(notebook, config, tmp_path):
    """The others wait for its gradients: it must not go on alone with smaller batches."""

    def full(**options):
        raise torch.OutOfMemoryError

    trainer = SimpleNamespace(model=torch.nn.Linear(2, 2), args=SimpleNamespace(world_size=2), train=full)
    with pytest.raises(torch.OutOfMemoryError):
        notebook.train_within_memory(lambda config: trainer, config, tmp_path)


def test_the_device_s_line_counts_the_processes(notebook):
    assert "; 2 processes" in notebook.describe_environment(["torch"], 2)["device"]
    assert "processes" not in notebook.describe_environment(["torch"])["device"]


def test_launched_processes_install_nothing(notebook, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(RuntimeError, match="launched together install nothing.*pip install 'peft>=99' 'torch=="):
        notebook.install(["peft>=99"])


# The whole notebook


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_bert, sentences):
    """The notebook alone in a folder, with a tiny model, few sentences, and settings that make a run short."""
    folder = tmp_path_factory.mktemp("script")
    (folder / "reviews").mkdir()
    sentences.sample(400, random_state=0).to_csv(folder / "reviews" / "reviews.csv", index=False)
    shutil.copy(NOTEBOOK, folder)
    settings = {"PROFILE": "demo", "MODEL_NAME": tiny_bert, "DATASET_NAME": "./reviews", "MAX_LENGTH": 32, "NUM_TRAIN_EPOCHS": 2, "LORA_DROPOUT": 0, "OPTIM": "sgd", "LEARNING_RATE": 1}
    settings |= {"PER_DEVICE_TRAIN_BATCH_SIZE": 8, "GRADIENT_ACCUMULATION_STEPS": 2, "RANK_TRAIN_SAMPLES": 32, "RANKS": 1, "EFFICIENCY_STEPS": 1, "GROWTH_BATCHES": 1, "GROWTH_LENGTHS": 16}
    (folder / ".env").write_text("".join(f"QLORA_{name}={value}\n" for name, value in settings.items()))
    return folder


@pytest.fixture(scope="module")
def environ():
    """The environment of a program: the tools of this Python first, no settings, one thread a process."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("QLORA_", "WANDB_"))}
    return kept | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def swept(folder, environ) -> Path:
    """The results of the sweep that section 13 shows, with the one seed 42, the default, instead of three."""
    _, sweep = block("bash", "papermill").splitlines()
    sweep = sweep.replace("in 1 2 3", "in 42").replace("do papermill", f"do {sys.executable} -m papermill")
    done = subprocess.run(sweep, shell=True, cwd=folder, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "Data" / "seed-42" / "results.json"


def section_13() -> str:
    """Return the prose of the notebook's last section."""
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    first = next(index for index, cell in enumerate(cells) if "## 13 Going further" in cell.source)
    return "\n".join(cell.source for cell in cells[first:] if cell.cell_type == "markdown")


def block(language: str, word: str) -> str:
    """Return the code that section 13 shows in ``language`` and that holds ``word``."""
    (found,) = [code for code in re.findall(rf"```{language}\n(.+?)```", section_13(), flags=re.DOTALL) if word in code]
    return found


def wrote_once(folder: Path, output: str) -> dict:
    """Check that one process of two wrote and printed, and return its results."""
    results = json.loads((folder / "Data" / "results.json").read_text())
    assert results["provenance"]["processes"] == 2 and results["training"]["epochs"] == 2
    assert output.count("Before training: validation accuracy") == output.count("holds every figure of this run") == 1
    assert "8 x 1 reviews a step in each of 2 processes" in output
    assert not list(folder.rglob("*.part*")) and len(list((folder / "Data").glob("*.png"))) == 9
    return results


def test_the_exported_script_runs_under_accelerate_launch(folder, environ, swept):
    """The first two commands of section 13: two processes come to the end, and the adapter is that of one."""
    export, launch, _ = block("bash", "accelerate launch").splitlines()
    export, launch = (line.replace("jupyter nbconvert", f"{sys.executable} -m nbconvert").replace("accelerate launch", f"{sys.executable} -m accelerate.commands.launch --main_process_port {free_port()}") for line in (export, launch))
    subprocess.run(export, shell=True, cwd=folder, env=environ, check=True, capture_output=True)
    done = subprocess.run(launch, shell=True, cwd=folder, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    two = wrote_once(folder, done.stdout)
    one = json.loads((folder / "Data" / "seed-42" / "results.json").read_text())
    first, second = (load_file(folder / "outputs" / name / "adapter" / "adapter_model.safetensors") for name in ("seed-42", ""))
    assert max(np.abs(first[name] - second[name]).max() for name in first) < 1e-4 < max(np.abs(value).max() for name, value in first.items() if "lora_B" in name)
    assert two["test"] == one["test"]


def test_a_fresh_notebook_launches_it_by_notebook_launcher(folder, environ):
    """The cell that section 13 shows, alone in a new kernel."""
    shutil.rmtree(folder / "outputs" / "checkpoints", ignore_errors=True)
    for path in (folder / "Data").glob("*.*"):
        path.unlink()
    cell = nbformat.v4.new_code_cell(block("python", "notebook_launcher").replace("num_processes=2", f"num_processes=2, use_port='{free_port()}'"))
    nb = nbformat.v4.new_notebook(cells=[cell])
    NotebookClient(nb, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute(env=environ)
    wrote_once(folder, "".join(output.get("text", "") for output in cell.outputs))


# Sweeps


def test_papermill_sets_seed_and_folders(swept):
    results = json.loads(swept.read_text())
    assert results["provenance"]["seed"] == 42 and results["provenance"]["processes"] == 1


def test_a_script_prints_the_table(swept, environ):
    table = subprocess.run([sys.executable, ROOT / "scripts" / "collect_seeds.py", swept], env=environ, capture_output=True, text=True)
    accuracy = f"{100 * json.loads(swept.read_text())['test']['accuracy']:.1f}"
    assert next(line for line in table.stdout.splitlines() if line.startswith("QLoRA  ")).split()[1:] == ["1", accuracy, "-", "-", accuracy]
    none = subprocess.run([sys.executable, ROOT / "scripts" / "collect_seeds.py"], env=environ, capture_output=True, text=True)
    assert none.returncode == 1 and none.stderr.splitlines()[-1].startswith("No results.json to collect.")


def results_of(seed: int, accuracy: float, **changes) -> dict:
    provenance = {"profile": "full", "execution": "fast", "recipe": "mission", "model": "m", "dataset": "d", "rows": {"test": 100}, "seed": seed} | changes
    return {"provenance": provenance, "test": {"accuracy": accuracy}, "baselines": {"tfidf": {"accuracy": 0.8}}}


@pytest.fixture
def write_results(tmp_path):
    def write(*results):
        paths = [tmp_path / f"{number}.json" for number in range(len(results))]
        for path, each in zip(paths, results):
            path.write_text(json.dumps(each))
        return paths

    return write


def test_the_interval_is_student_s(notebook, write_results):
    """Of 89, 90 and 91: mean 90, standard deviation 1, so 4.303 / sqrt(3) to each side (t of 2 degrees of freedom)."""
    table = notebook.collect_results(write_results(results_of(2, 0.90), results_of(1, 0.89), results_of(3, 0.91)))
    row = table.loc["QLoRA"]
    assert row["seeds"] == 3 and row["mean"] == pytest.approx(90) and [row["low"], row["high"]] == pytest.approx([90 - 2.484, 90 + 2.484], abs=1e-3)
    assert list(table.columns[-3:]) == ["seed 1", "seed 2", "seed 3"] and row["seed 1"] == pytest.approx(89)
    assert table.loc["QLoRA - tfidf", "mean"] == pytest.approx(10)
    (alone,) = notebook.collect_results(write_results(results_of(1, 0.9))).loc[["QLoRA"]].to_dict("records")
    assert alone["mean"] == pytest.approx(90) and np.isnan(alone["low"])


def test_what_is_no_sweep_is_not_collected(notebook, write_results):
    with pytest.raises(ValueError, match="execution is \"fast\" and \"plain\""):
        notebook.collect_results(write_results(results_of(1, 0.9), results_of(2, 0.9, execution="plain")))
    with pytest.raises(ValueError, match="same seed"):
        notebook.collect_results(write_results(results_of(1, 0.9), results_of(1, 0.9)))
    with pytest.raises(ValueError, match="No results.json"):
        notebook.collect_results([])
