"""The whole notebook, top to bottom, on a small slice of the real sentences: every artefact, a loss that falls, no warning."""

import json
import os
import re
import shutil
import subprocess
import time
import traceback
import zipfile

import nbformat
import numpy as np
import pytest
import torch
from conftest import NOTEBOOK, ROOT
from huggingface_hub import ModelCard
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

PLOTS = ["calibration.png", "confusion_matrix.png", "dataset_stats.png", "efficiency_comparison.png", "layer.png", "lora_rank_sensitivity.png", "memory_growth.png", "nf4_quantization.png", "training_curves.png"]
CANARIES = {"WANDB_API_KEY": "canary0wandb" * 4, "HF_TOKEN": "hf_canary0hub" * 3}  # keys of the right form that must be found nowhere
PRIVATE = ("QLORA_", "WANDB_", "HF_")


def holds_a_key(text: str | bytes) -> bool:
    """Tell whether a key, or its recognisable part in any coding that keeps letters, is in ``text``."""
    return b"canary0" in (text.encode() if isinstance(text, str) else text).lower()


@pytest.fixture(scope="module")
def run(tmp_path_factory, offline_model, sentences):
    """The folder and the executed notebook of one run, with the notebook alone in the folder as in Colab."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "reviews").mkdir()
    sentences.sample(1000, random_state=0).to_csv(folder / "reviews" / "reviews.csv", index=False)
    shutil.copy(NOTEBOOK, folder)
    settings = {
        "QLORA_PROFILE": "demo",
        "QLORA_MODEL_NAME": offline_model,
        "QLORA_DATASET_NAME": "./reviews",
        "QLORA_NUM_TRAIN_EPOCHS": "3",
        "QLORA_PER_DEVICE_TRAIN_BATCH_SIZE": "8",
        "QLORA_GRADIENT_ACCUMULATION_STEPS": "2",
        "QLORA_MAX_TRAIN_SAMPLES": "640",
        "QLORA_RANK_TRAIN_SAMPLES": "64",
        "QLORA_EFFICIENCY_STEPS": "2",
        "WANDB_API_KEY": CANARIES["WANDB_API_KEY"],  # and no server: the log is kept in wandb/
        "WANDB_BASE_URL": "http://127.0.0.1:1",
    }
    (folder / ".env").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
    nb = nbformat.read(NOTEBOOK, as_version=4)
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    environ = {name: value for name, value in os.environ.items() if not name.startswith(PRIVATE)} | {"HF_HUB_OFFLINE": "1", "HF_TOKEN": CANARIES["HF_TOKEN"], "HOME": str(folder / "home")}
    NotebookClient(nb, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute(env=environ)
    return folder, nb


@pytest.fixture(scope="module")
def results(run):
    return json.loads((run[0] / "Data" / "results.json").read_text(encoding="utf-8"))


def test_without_a_hub_the_defaults_fail_in_seconds_with_what_to_do(tmp_path):
    """From the first cell on, with nothing in the cache and nothing behind the Hub's address."""
    shutil.copy(NOTEBOOK, tmp_path)
    environ = {name: value for name, value in os.environ.items() if not name.startswith(PRIVATE)} | CANARIES
    environ |= {"HF_ENDPOINT": "http://127.0.0.1:1", "HF_HOME": str(tmp_path / "empty")}
    client = NotebookClient(nbformat.read(NOTEBOOK, as_version=4), timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}})
    started = []
    client.on_cell_start = lambda cell, cell_index: started.append(time.monotonic())
    with pytest.raises(CellExecutionError, match="ConnectionError.*QLORA_MODEL_NAME=path/to/folder") as caught:
        client.execute(env=environ)
    assert time.monotonic() - started[-1] < 10
    assert not holds_a_key(str(caught.value)) and not holds_a_key(nbformat.writes(client.nb))


def outputs(nb):
    return [output for cell in nb.cells if cell.cell_type == "code" for output in cell.outputs]


def test_no_cell_has_an_error_or_an_unexplained_warning(run):
    for output in outputs(run[1]):
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.text
        assert "Warning" not in str(output.get("text", ""))


def test_the_saved_adapter_is_the_trained_one_to_the_last_bit(run):
    lines = [line for output in outputs(run[1]) for line in output.get("text", "").splitlines()]
    assert "Largest difference between the logits in memory and from disk: 0." in lines


def test_every_artefact_is_there(run):
    folder, _ = run
    assert sorted(path.name for path in (folder / "Data").iterdir()) == sorted([*PLOTS, "results.json"])
    assert all((folder / "Data" / name).read_bytes().startswith(b"\x89PNG") for name in PLOTS)
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= {path.name for path in (folder / "outputs" / "adapter").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in (folder / "outputs" / "merged").iterdir()}


def test_results_have_the_design_s_shape(results):
    assert list(results) == ["provenance", "test", "baselines", "training", "efficiency", "rank_sensitivity", "recipes", "ladder", "ingredients", "growth", "largest_batch", "adapted_modules", "calibration", "accuracy_by_length", "ensemble", "inference"]
    assert set(results["provenance"]) == {"profile", "execution", "recipe", "model", "dataset", "revisions", "rows", "device", "processes", "versions", "seed", "git_commit", "started", "wall_seconds"}
    assert list(results["test"]) == ["n", "accuracy", "accuracy_ci95", "f1_weighted", "f1_weighted_ci95", "confusion_matrix"]
    assert list(results["baselines"]) == ["tfidf_logreg", "tfidf_nb_svm"]
    assert all(set(scores) == {"accuracy", "accuracy_ci95"} for scores in [*results["baselines"].values(), results["ensemble"]])
    assert {"epochs", "seconds", "samples_per_second", "best_epoch", "history"} <= set(results["training"])
    for row in results["efficiency"]:
        parts = ["weights_mb", "gradients_mb", "optimizer_mb", "activations_mb", "workspaces_mb", "update_mb"]
        assert list(row) == ["method", "trainable_parameters", *parts, "peak_mb", "samples_per_second", "measured"]
        assert torch.cuda.is_available() or row["peak_mb"] is row["activations_mb"] is None
    for row in results["rank_sensitivity"]:
        assert list(row) == ["rank", "trainable_parameters", "accuracy", "accuracy_ci95", "seeds", "gain", "gain_ci95"]
    assert [row["modules"] for row in results["adapted_modules"]] == ["query, value", "all of attention", "all linear layers"]
    assert {row["method"] for row in results["growth"]} >= {"qlora_lean" if torch.cuda.is_available() else "qlora_plain"}


def test_the_numbers_agree_with_each_other(results):
    test = results["test"]
    matrix = np.array(test["confusion_matrix"])
    assert matrix.sum() == test["n"] == results["provenance"]["rows"]["test"] == 100
    assert test["accuracy"] == pytest.approx(matrix.trace() / matrix.sum())
    assert test["accuracy_ci95"][0] <= test["accuracy"] <= test["accuracy_ci95"][1]
    assert results["provenance"]["rows"]["train"] == 640 and results["provenance"]["git_commit"] is None
    lengths = results["accuracy_by_length"]
    assert sum(row["n"] for row in lengths) == sum(row["n"] for row in results["calibration"]["bins"]) == test["n"]
    assert sum(row["n"] * row["accuracy"] for row in lengths) == pytest.approx(matrix.trace())
    assert [row["model"] for row in results["inference"][:2]] == ["adapter on 4-bit", "merged, fp32"] and all(row["samples_per_second"] > 0 for row in results["inference"])
    ranks = {row["rank"]: row for row in results["rank_sensitivity"]}
    assert list(ranks) == [1, 2, 4, 8, 16, 32, 64] and sum(row["accuracy"] is not None for row in ranks.values()) >= 3
    assert ranks[64]["trainable_parameters"] == 6 * 2 * 64 * (384 + 384) + 384 * 2 + 2


def test_the_loss_fell_and_the_test_split_is_better_than_chance(results):
    history = results["training"]["history"]
    evaluated = [row for row in history if row.get("eval_loss") is not None]
    assert len(evaluated) == 3 and evaluated[-1]["eval_loss"] < evaluated[0]["eval_loss"] < np.log(2) + 0.01
    losses = [row["loss"] for row in history if row.get("loss") is not None]
    assert losses[0] == pytest.approx(np.log(2), abs=0.1)  # on the validation loss's scale, with two accumulated batches
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.05
    assert results["test"]["accuracy_ci95"][0] > 0.5


def test_the_adapter_s_card_is_made_from_the_results_and_names_no_path(run, results):
    adapter = run[0] / "outputs" / "adapter"
    card = ModelCard.load(adapter / "README.md")
    assert {each.metric_type: each.metric_value for each in card.data.eval_results} == {"accuracy": results["test"]["accuracy"], "f1": results["test"]["f1_weighted"]}
    assert (card.data.base_model, card.data.eval_results[0].dataset_name) == ("all-MiniLM-L6-v2", "reviews")
    for path in adapter.iterdir():
        assert not re.search(rb"[\"' ]~?/(root|home|work|tmp|Users)/", path.read_bytes()), path.name


def test_the_evidence_is_saved_and_the_text_box_takes_little_room(run):
    data = [output.data for output in outputs(run[1]) if output.output_type == "display_data"]
    (shown,) = [each["text/html"] for each in data if "<bdi" in each.get("text/html", "")]
    assert "masterpiece;" in shown and re.search(r"<sub>[+-]\d\.\d\d</sub>", shown)
    (box,) = [each for each in data if "application/vnd.jupyter.widget-view+json" in each]
    assert box["text/plain"] == "Here is a text box for a review of your own, while the notebook runs."
    assert 0 < len(json.dumps(run[1].metadata["widgets"])) < 20_000


def test_a_run_writes_to_its_own_places_only(run):
    assert sorted(path.name for path in run[0].iterdir()) == [".env", "Data", NOTEBOOK.name, "home", "outputs", "reviews", "wandb"]
    assert not (ROOT / "wandb").exists()


def test_no_artefact_holds_a_key(run):
    """Pictures, checkpoints, logs, W&B's own files, and the notebook with its outputs; archives are looked into."""
    folder, nb = run
    assert any("kept" in line or "locally, to wandb/" in line for output in outputs(nb) for line in output.get("text", "").splitlines())
    assert holds_a_key((folder / ".env").read_bytes())
    assert not holds_a_key(nbformat.writes(nb))
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".env"]
    assert {"results.json", "adapter_model.safetensors", "trainer_state.json", "debug.log"} <= {path.name for path in files}
    assert any(path.suffix == ".wandb" for path in files)
    for path in files:
        contents = [path.read_bytes()]
        if zipfile.is_zipfile(path):  # as PyTorch writes
            with zipfile.ZipFile(path) as archive:
                contents += [archive.read(name) for name in archive.namelist()]
        assert not any(holds_a_key(content) for content in contents), path


def test_a_wrong_setting_beside_a_key_does_not_show_the_key(notebook):
    with pytest.raises(ValueError, match="QLORA_SEDE") as caught:
        notebook.resolve_config(CANARIES | {"QLORA_SEDE": "7"}, cuda=False)
    assert not holds_a_key("".join(traceback.format_exception(caught.value)))


def test_git_ignores_the_file_of_keys():
    assert subprocess.run(["git", "check-ignore", "--quiet", ".env"], cwd=ROOT).returncode == 0
