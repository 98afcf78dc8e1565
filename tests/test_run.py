"""The whole notebook on 400 real sentences and a tiny BERT: artefacts, numbers that agree, cells run twice, faults."""

import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
from conftest import NOTEBOOK, ROOT
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from notebook_api import is_definition
from sklearn.metrics import confusion_matrix

PLOTS = ["dataset_stats", "confusion_matrix", "training_curves", "efficiency_comparison", "lora_rank_sensitivity"]
PLOTS = sorted(f"{name}.png" for name in [*PLOTS, "calibration"])
CANARIES = {"WANDB_API_KEY": "canary0wandb" * 4, "HF_TOKEN": "hf_canary0hub" * 3}  # must be found nowhere
SCORES = {"n", "confusion_matrix", "accuracy", "accuracy_ci95", "f1_weighted", "f1_weighted_ci95"}
TIMED = {"sections", "started", "wall_seconds", "seconds", "samples_per_second", "train_seconds"}  # differ each time
TIMED |= {f"{kind}_{of}" for kind in ("eval", "train") for of in ("runtime", "samples_per_second", "steps_per_second")}
TIMED |= {"eval_model_preparation_time", "peak_mb"}
TIMED |= {"train_loss"}  # of the steps since training was resumed, 0 without any
SETTINGS = {"preset": "full", "dataset_name": "reviews.csv", "label_column": "Verdict", "max_length": 32}
SETTINGS |= {"num_train_epochs": 1, "efficiency_steps": 1, "ranks": 1, "rank_train_samples": 32, "rank_epochs": 1}
SETTINGS |= {"learning_rate": 1e-2, "lora_alpha": 64, "gradient_checkpointing": False}  # enough to learn something
SETTINGS |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
ANSWER = """
import json, sys
sys.modules["bitsandbytes"] = None
from transformers import pipeline
classify = pipeline("text-classification", model=sys.argv[1])
print(json.dumps([each["label"] for each in classify(json.load(sys.stdin), truncation=True)]))
"""


class Kernel:
    """The notebook, alone in a folder, and a kernel that runs its cells when told to."""

    def __init__(self, folder):
        self.folder, self.nb = folder, nbformat.read(NOTEBOOK, as_version=4)
        self.client = NotebookClient(self.nb, timeout=300, resources={"metadata": {"path": str(folder)}})
        self.sections, name = {}, "0"
        for index, cell in enumerate(self.nb.cells):
            name = ([name] + re.findall(r"^## (\d+) ", cell.source, flags=re.MULTILINE))[-1]
            if cell.cell_type == "code":
                cell.outputs = []
                self.sections.setdefault(int(name), []).append(index)
        self.nb.cells.append(nbformat.v4.new_code_cell())  # for questions

    def run(self, index: int, source: str = "") -> list:
        """Run a cell, or other source in its place, and return its outputs."""
        cell = self.nb.cells[index]
        cell.outputs, before, cell.source = [], cell.source, source or cell.source
        try:
            self.client.execute_cell(cell, index)
        finally:
            cell.source = before
        return cell.outputs

    def ask(self, expression: str):
        """Return what an expression has for a value."""
        (said,) = self.run(-1, f"print(json.dumps({expression}, default=float))")
        return json.loads(said.text)

    def runs(self, index: int) -> bool:
        """Tell whether a cell does anything but define."""
        return not all(map(is_definition, ast.parse(self.nb.cells[index].source).body))

    def results(self) -> dict:
        return json.loads((self.folder / "Data" / "results.json").read_text(encoding="utf-8"))

    def digests(self) -> dict:
        """Return the sha256 of each file of the adapter and of the merged model."""
        files = [path for name in ("adapter", "merged") for path in (self.folder / "outputs" / name).iterdir()]
        return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.name != "README.md"}


@pytest.fixture(scope="module")
def reviews(sentences):
    """400 sentences of three classes: those with a quote or a question are neither praise nor pan."""
    rows = sentences.sample(400, random_state=0)
    verdict = rows["label"].replace({"positive": "praise", "negative": "pan"})
    return rows.assign(Verdict=verdict.mask(rows["text"].str.contains("[?']"), "quote"))[["text", "Verdict"]]


@pytest.fixture(scope="module")
def kernel(tmp_path_factory, tiny_bert, reviews):
    folder = tmp_path_factory.mktemp("run")
    reviews.rename(columns={"text": "Review"}).to_csv(folder / "reviews.csv", index=False)
    shutil.copy(NOTEBOOK, folder)
    lines = {f"QLORA_{name.upper()}": value for name, value in (SETTINGS | {"model_name": tiny_bert}).items()}
    lines |= CANARIES | {"WANDB_BASE_URL": "http://127.0.0.1:1", "HF_ENDPOINT": "http://127.0.0.1:1"}  # nobody answers
    (folder / ".env").write_text("".join(f"{name}={value}\n" for name, value in lines.items()))
    environ = {name: v for name, v in os.environ.items() if not name.startswith(("QLORA_", "WANDB_", "HF_"))}
    kernel = Kernel(folder)
    with kernel.client.setup_kernel(env=environ | {"HOME": str(folder / "home")}):
        yield kernel


@pytest.fixture(scope="module")
def run(kernel, tmp_path_factory):
    """One run from top to bottom: what it wrote and showed, and answers of its kernel at the end."""
    cells = [(section, index) for section, indices in kernel.sections.items() for index in indices]
    early, outputs = {}, []
    for section, index in cells:
        if section == 10 and not early:
            early = kernel.results()
        outputs += kernel.run(index)
    written = sorted(path.name for path in kernel.folder.iterdir())
    folder = tmp_path_factory.mktemp("kept") / "run"
    shutil.copytree(kernel.folder, folder)
    both = "predict_logits({}, test_texts, config, tokenizer)"
    gap = f"np.abs({both.format('in_memory')} - {both.format('load_adapter(adapter_dir, config, task)')}).max()"
    waits = "[hub.constants.HF_HUB_ETAG_TIMEOUT, hub.constants.HF_HUB_DOWNLOAD_TIMEOUT, hub.constants.HF_HUB_OFFLINE]"
    asked = {"gap": kernel.ask(gap), "waits": kernel.ask(waits), "results": kernel.results()}
    return SimpleNamespace(folder=folder, outputs=outputs, written=written, early=early, **asked)


@pytest.fixture(scope="module")
def twice(run, kernel):
    """Sections 3 to 12 from their beginning, each cell that does something run twice in a row: which failed."""
    shutil.rmtree(kernel.folder / "outputs")
    kernel.ask("os.environ.update(WANDB_MODE='disabled')")  # saves some seconds
    failed = {}
    for index in [index for section in range(3, 13) for index in kernel.sections[section]]:
        kernel.run(index)
        try:
            kernel.run(index) if kernel.runs(index) else None
        except CellExecutionError as error:
            failed[kernel.nb.cells[index].source] = f"{error.ename}: {error.evalue}"
    return SimpleNamespace(failed=failed, results=kernel.results())


def untimed(value):
    """Return what was measured or decided, without times."""
    if isinstance(value, dict):
        return {name: untimed(each) for name, each in value.items() if name not in TIMED}
    return [untimed(each) for each in value] if isinstance(value, list) else value


def test_no_cell_has_an_error_or_a_warning(run):
    assert [o for o in run.outputs if o.output_type == "error" or o.get("name") == "stderr"] == []
    assert not any("Warning" in str(output.get("text", "")) for output in run.outputs)


def test_every_artefact_is_there(run):
    data, outputs = run.folder / "Data", run.folder / "outputs"
    assert sorted(path.name for path in data.iterdir()) == sorted([*PLOTS, "results.json"])
    assert all((data / name).read_bytes().startswith(b"\x89PNG") for name in PLOTS)
    model = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    adapter = {"README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}
    assert model <= {path.name for path in (outputs / "merged").iterdir()}
    assert adapter <= {path.name for path in (outputs / "adapter").iterdir()}
    assert sum("image/png" in output.get("data", {}) for output in run.outputs) == len(PLOTS)


def test_results_have_the_shape_of_the_design(run):
    results = run.results
    parts = {"provenance", "test", "test_merged", "baselines", "training", "calibration", "efficiency"}
    assert set(results) == parts | {"rank_sensitivity", "sections"}
    about = {"config", "model", "dataset", "labels", "rows", "device", "versions", "seed", "git_commit"}
    assert about | {"started", "wall_seconds"} <= set(results["provenance"])
    assert all(SCORES <= set(scores) for scores in (results["test"], results["test_merged"]))
    assert all({"accuracy", "accuracy_ci95"} <= set(scores) for scores in results["baselines"].values())
    training = {"epochs", "seconds", "samples_per_second", "best_epoch", "peak_mb", "captured_share", "history"}
    assert training == set(results["training"])
    methods = {"method", "trainable_parameters", "weights_mb", "peak_mb", "samples_per_second", "measured"}
    assert results["efficiency"] and all(set(row) == methods for row in results["efficiency"])
    assert results["provenance"]["wall_seconds"] > results["training"]["seconds"] > 0


def test_the_test_scores_agree_with_each_other(run, reviews):
    results, rows = run.results, run.results["provenance"]["rows"]
    names = results["provenance"]["labels"]
    assert names == ["pan", "praise", "quote"] and sum(rows.values()) <= len(reviews) == 400
    assert rows["test"] == pytest.approx(0.1 * sum(rows.values()), abs=1)
    for scores in (results["test"], results["test_merged"]):
        matrix = np.array(scores["confusion_matrix"])
        assert matrix.shape == (3, 3) and matrix.sum() == scores["n"] == rows["test"]
        assert scores["accuracy"] == pytest.approx(matrix.trace() / matrix.sum())
        assert results["provenance"]["largest_class"] == pytest.approx(matrix.sum(1).max() / matrix.sum())
        f1 = [2 * matrix[i, i] / max(matrix[i].sum() + matrix[:, i].sum(), 1) for i in range(3)]
        assert scores["f1_weighted"] == pytest.approx(np.average(f1, weights=matrix.sum(1)))
    for scores in (results["test"], results["test_merged"], *results["baselines"].values()):
        low, high = scores["accuracy_ci95"]
        assert 0 <= low <= scores["accuracy"] <= high <= 1 and low < high
    calibrated = [each["accuracy"] for each in results["calibration"]["bins"]]
    assert np.mean(calibrated) == pytest.approx(results["test"]["accuracy"], abs=0.05)  # bins of about equal size


def test_the_training_s_numbers_agree_with_its_history(run):
    training, rows = run.results["training"], run.results["provenance"]["rows"]
    scored = {row["epoch"]: row for row in training["history"] if row.get("eval_loss") is not None}
    assert 1 in scored and training["epochs"] == training["best_epoch"] == 1
    assert training["samples_per_second"] == pytest.approx(rows["train"] / training["seconds"])


def test_the_loss_before_training_is_that_of_a_random_head(run):
    scored = [row for row in run.results["training"]["history"] if row.get("eval_loss") is not None]
    assert [row["epoch"] for row in scored] == [0, 1]
    assert scored[0]["eval_loss"] == pytest.approx(np.log(3), abs=0.3)


def test_the_methods_and_ranks_have_the_parameters_that_the_formula_gives(run):
    head, both = 64 * 3 + 3, 2 * 2 * (64 + 64)  # query and value, of two layers
    every = 2 * (4 * (64 + 64) + 2 * (64 + 128)) + (64 + 64)  # all linear layers of both, and the pooler
    for row in run.results["rank_sensitivity"]:
        layers = every if row["modules"] == "all-linear" else both
        assert row["trainable_parameters"] == row["rank"] * layers + head
        assert (row["accuracy"] is not None) == (row["rank"] in (1, 16))
    ranks = [row["rank"] for row in run.results["rank_sensitivity"] if row["modules"] != "all-linear"]
    assert ranks == [1, 2, 4, 8, 16, 32, 64]
    measured = {row["method"]: row for row in run.results["efficiency"] if row["measured"]}
    full, ours = measured["full fp32"], measured["QLoRA, this run"]
    assert ours["trainable_parameters"] == 16 * both + head < full["trainable_parameters"]
    assert full["weights_mb"] == pytest.approx(4e-6 * full["trainable_parameters"])
    assert ours["weights_mb"] < full["weights_mb"]
    assert all(row["samples_per_second"] > 0 for row in measured.values())
    assert all(row["samples_per_second"] is None for row in run.results["efficiency"] if not row["measured"])


def test_the_saved_adapter_is_the_trained_one_to_the_last_bit(run):
    assert run.gap == 0


def test_the_merged_model_answers_without_bitsandbytes_as_it_was_scored(run, notebook, reviews):
    config = notebook.Config(**run.results["provenance"]["config"])
    (table,) = notebook.read_tables(str(run.folder / "reviews.csv"))
    test = notebook.split_rows(notebook.clean(notebook.pick_columns([table], "", "Verdict"))[0], config)["test"]
    command = [sys.executable, "-c", ANSWER, str(run.folder / "outputs" / "merged")]
    done = subprocess.run(command, input=json.dumps(list(test["text"])), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answers = [run.results["provenance"]["labels"].index(label) for label in json.loads(done.stdout.splitlines()[-1])]
    matrix = confusion_matrix(test["label"], answers, labels=range(3))
    assert matrix.tolist() == run.results["test_merged"]["confusion_matrix"]
    assert len(set(answers)) > 1  # else the same answer to all would do


def test_the_hub_is_not_waited_for(run):
    assert run.waits == [5, 5, True]


def test_no_file_holds_a_key(run):
    files = [path for path in run.folder.rglob("*") if path.is_file() and path.name != ".env"]
    assert "canary0" in (run.folder / ".env").read_text() and "canary0" not in json.dumps(run.outputs).lower()
    assert any(path.suffix == ".wandb" for path in files) and any(path.name == "trainer_state.json" for path in files)
    for path in files:
        contents = [path.read_bytes()]
        if zipfile.is_zipfile(path):  # as PyTorch writes
            with zipfile.ZipFile(path) as archive:
                contents += [archive.read(name) for name in archive.namelist()]
        assert not any(b"canary0" in content.lower() for content in contents), path


def test_what_is_taken_away_names_no_path_of_this_machine(run):
    taken = [*(run.folder / "outputs" / "adapter").iterdir(), *(run.folder / "outputs" / "merged").iterdir()]
    for path in [*taken, run.folder / "Data" / "results.json"]:
        assert not re.search(rb"[\"'` ]~?/(root|home|work|tmp|Users|var)/", path.read_bytes()), path.name


def test_a_run_writes_to_its_own_places_only(run):
    assert {*run.written} - {"home"} == {".env", "Data", NOTEBOOK.name, "outputs", "reviews.csv", "wandb"}
    assert not (ROOT / "wandb").exists()


def test_results_and_models_are_written_before_section_10_and_stay(run):
    early, results = run.early, run.results
    assert set(early) == set(results) and early["efficiency"] == early["rank_sensitivity"] == []
    kept = set(results) - {"efficiency", "rank_sensitivity", "sections"}
    assert {name: untimed(early[name]) for name in kept} == {name: untimed(results[name]) for name in kept}


def test_every_run_cell_can_be_run_again(twice):
    assert twice.failed == {}


def test_run_cells_executed_twice_in_a_row_give_the_same_results(run, twice):
    first, second = untimed(run.results), untimed(twice.results)
    assert set(first) == set(second) and [name for name in first if first[name] != second[name]] == []


@pytest.mark.parametrize("section", [10, 11, 12])
def test_a_section_that_fails_loses_nothing_of_those_before(twice, kernel, section):
    """Its first run cell raises where its last statement was."""
    index = next(index for index in kernel.sections[section] if kernel.runs(index))
    before, models = kernel.results(), kernel.digests()
    tree = ast.parse(kernel.nb.cells[index].source)
    tree.body[-1:] = ast.parse("raise RuntimeError('injected')").body
    with pytest.raises(CellExecutionError, match="injected"):
        kernel.run(index, ast.unparse(tree))
    after = kernel.results() | {"rank_sensitivity": before["rank_sensitivity"]}  # section 11 had written its own
    assert after == before and kernel.digests() == models and models
