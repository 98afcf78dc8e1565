"""Section 13's recipe for several GPUs: two processes train what one does. On CPUs."""

import json
import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import NOTEBOOK, code_cells

# With plain SGD an update is the gradient itself; Adam would hide a wrong factor.
SETTINGS = {
    "QLORA_DATASET_NAME": "reviews.csv",
    "QLORA_PRESET": "full",
    "QLORA_MAX_LENGTH": "32",
    "QLORA_LORA_DROPOUT": "0",
    "QLORA_OPTIM": "sgd",
    "QLORA_LEARNING_RATE": "1.0",
    "QLORA_NUM_TRAIN_EPOCHS": "2",
    "QLORA_PER_DEVICE_TRAIN_BATCH_SIZE": "8",
    "QLORA_GRADIENT_ACCUMULATION_STEPS": "4",
    "QLORA_PER_DEVICE_EVAL_BATCH_SIZE": "10",  # 20 texts: nothing fills a batch up
    "QLORA_EFFICIENCY_STEPS": "0",
    "QLORA_RANKS": "none",
}


def free_port():
    """Return a port at which the processes can meet."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def run(command, folder):
    """Run a Python module in `folder`, and return what it printed."""
    environ = {}
    for name, value in os.environ.items():
        if not name.startswith(("QLORA_", "WANDB_")):
            environ[name] = value
    environ["HF_HUB_OFFLINE"] = "1"
    environ["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environ,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def run_notebook(folder, tiny_bert, sentences, launcher=()):
    """Export the notebook as a script and run it; return what it printed and wrote."""
    sentences.sample(200, random_state=0).to_csv(folder / "reviews.csv", index=False)
    lines = [f"{name}={value}" for name, value in SETTINGS.items()]
    lines.append(f"QLORA_MODEL_NAME={tiny_bert}")
    (folder / ".env").write_text("\n".join(lines))
    export = ["-m", "nbconvert", "--to", "script", "--output-dir", str(folder)]
    run([*export, str(NOTEBOOK)], folder)
    said = run([*launcher, NOTEBOOK.with_suffix(".py").name], folder)
    results = json.loads((folder / "Data" / "results.json").read_text())
    return SimpleNamespace(folder=folder, said=said, results=results)


@pytest.fixture(scope="module")
def one(tmp_path_factory, tiny_bert, sentences):
    """The run of a process by itself."""
    return run_notebook(tmp_path_factory.mktemp("one"), tiny_bert, sentences)


@pytest.fixture(scope="module")
def two(tmp_path_factory, tiny_bert, sentences):
    """The run of two processes."""
    launcher = [
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",  # or, without a GPU, several processes on CPUs
        "--num_processes",
        "2",
        "--main_process_port",
        free_port(),
    ]
    folder = tmp_path_factory.mktemp("two")
    return run_notebook(folder, tiny_bert, sentences, launcher)


def history(results, name):
    """Return a column of the training's history."""
    return [row[name] for row in results["training"]["history"] if name in row]


def test_two_processes_take_the_same_steps_as_one(one, two):
    assert two.results["provenance"]["processes"] == 2
    steps = history(two.results, "step")
    assert max(steps) == 10  # 160 texts, 32 a step, two epochs
    assert steps == history(one.results, "step")


@pytest.mark.parametrize("name", ["loss", "eval_loss", "grad_norm"])
def test_two_processes_have_the_losses_and_gradients_of_one(one, two, name):
    values = history(one.results, name)
    assert history(two.results, name) == pytest.approx(values, rel=1e-3)
    assert np.ptp(values) > 0.01


def confidences(results):
    """Return the mean confidence in each bin of the calibration."""
    return [each["confidence"] for each in results["calibration"]["bins"]]


def test_two_processes_answer_the_test_split_as_one_does(one, two):
    assert two.results["test"] == one.results["test"]
    assert two.results["test_merged"] == one.results["test_merged"]
    expected = pytest.approx(confidences(one.results), rel=1e-4)
    assert confidences(two.results) == expected


def test_of_two_processes_the_first_alone_speaks_and_writes(two):
    assert two.said.count("results.json holds") == 1
    assert two.said.count("A new training.") == 1
    assert list(two.folder.rglob("*.part")) == []
    assert (two.folder / "outputs" / "merged" / "model.safetensors").exists()


def test_two_processes_end_after_section_9(one, two):
    assert (one.folder / "Data" / "lora_rank_sensitivity.png").exists()
    assert not (two.folder / "Data" / "lora_rank_sensitivity.png").exists()


def test_an_accumulation_that_cannot_be_divided_is_refused(notebook, tiny_config):
    config = tiny_config.model_copy(update={"gradient_accumulation_steps": 3})
    names = dict(vars(notebook))
    names["config"] = config
    names["splits"] = None
    names["begin"] = lambda step, after: None
    names["process_state"] = SimpleNamespace(num_processes=2)
    words = "processes. Set a multiple"
    (check,) = [cell.source for cell in code_cells() if words in cell.source]
    with pytest.raises(ValueError, match="gradient_accumulation_steps=3 .* multiple"):
        exec(check, names)
