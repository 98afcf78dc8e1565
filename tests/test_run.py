"""The runs of hosts.py: what is shown, what is written, and what is lost by a fault."""

import ast
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import NOTEBOOK
from nbclient.exceptions import CellExecutionError
from safetensors.torch import load_file
from sklearn.metrics import confusion_matrix

CLASSES = ["pan", "praise", "quote"]
PLOTS = [
    "calibration.png",
    "confusion_matrix.png",
    "dataset_stats.png",
    "efficiency_comparison.png",
    "lora_rank_sensitivity.png",
    "training_curves.png",
]
BEFORE_SECTION_10 = [
    "provenance",
    "test",
    "test_merged",
    "baselines",
    "cautions",
    "training",
    "calibration",
    "reliable",
]
PARTS = [*BEFORE_SECTION_10, "efficiency", "rank_sensitivity", "sections"]
SCORES = ["accuracy", "f1_weighted", "f1_macro"]
# Ends of names of what differs from run to run.
TIMES = (
    "seconds",
    "_second",
    "runtime",
    "started",
    "sections",
    "train_loss",
)


@pytest.fixture(scope="module")
def run(hosts, tmp_path_factory):
    """What Kaggle's run wrote, before tests go on with its kernel."""
    kernel = hosts.kaggle
    folder = tmp_path_factory.mktemp("kept") / "run"
    shutil.copytree(kernel.working, folder)
    return SimpleNamespace(
        kernel=kernel,
        folder=folder,
        results=kernel.results(),
        texts=kernel.ask("test_texts"),
        hooks=kernel.ask("str(hub.get_session().event_hooks)"),
    )


@pytest.fixture(params=["colab", "kaggle"])
def host(request, hosts):
    return getattr(hosts, request.param)


def test_every_cell_runs(host):
    failed = [f"{error.ename}: {error.evalue}" for error in host.outputs("error")]
    assert failed == []
    for cell in host.nb.cells:
        assert cell.cell_type == "markdown" or cell.execution_count


def test_no_warning_is_shown(host):
    for output in host.outputs("stream"):
        assert output.name == "stdout", output.text
        assert "Warning" not in output.text


def test_nothing_is_installed_where_all_is_there(host):
    """There is no package index, which pip would say."""
    first = host.sections[1][0]
    assert host.nb.cells[first].outputs == []


def test_tables_and_the_progress_of_training_are_shown(host):
    shown = []
    for output in host.outputs("display_data", "execute_result"):
        shown.append(output.data.get("text/html", ""))
    assert sum("<table" in html for html in shown) >= 10
    assert any("<progress" in html and "Validation Loss" in html for html in shown)


def test_nobody_is_asked_for_a_key(host):
    assert not (host.folder / "asked.txt").exists()


def test_without_a_key_or_a_network_a_line_says_that_wandb_is_not_used(host):
    reason = {"colab": "no WANDB_API_KEY", "kaggle": "network"}[host.name]
    lines = host.printed().splitlines()
    (line,) = [line for line in lines if line.startswith("W&B")]
    assert "not used" in line
    assert reason in line


def test_nothing_is_written_above_the_working_folder(host):
    """The folder above obeys its permissions, for root too: else this cannot fail."""
    opens = f"open({str(host.working.parent / 'x')!r}, 'w')"
    obeying = str(host.folder / "packages" / "obeying.py")
    probe = [sys.executable, obeying, "-c", opens]
    tried = subprocess.run(probe, capture_output=True, text=True)
    assert "Permission denied" in tried.stderr
    assert [path.name for path in host.working.parent.iterdir()] == ["working"]


def test_in_the_working_folder_only_data_and_outputs_are_written(host):
    written = {path.name for path in host.working.iterdir()}
    assert written - {".env", "wandb"} == {"Data", "outputs", NOTEBOOK.name}


def test_every_artefact_is_there(run):
    data = {path.name for path in (run.folder / "Data").iterdir()}
    assert data == {"results.json", *PLOTS}
    for name in PLOTS:
        assert (run.folder / "Data" / name).read_bytes().startswith(b"\x89PNG")
    merged = {path.name for path in (run.folder / "outputs" / "merged").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= merged
    adapter = {path.name for path in (run.folder / "outputs" / "adapter").iterdir()}
    assert {"README.md", "adapter_config.json", "tokenizer.json"} <= adapter
    assert "adapter_model.safetensors" in adapter


def test_every_plot_is_shown(run):
    shown = run.kernel.outputs("display_data", "execute_result")
    drawn = [output for output in shown if "image/png" in output.data]
    assert len(drawn) == len(PLOTS) + 2  # NF4, LoRA: shown, not written


def test_without_its_studies_all_else_is_complete(hosts):
    data = {path.name for path in (hosts.colab.working / "Data").iterdir()}
    assert data == {"results.json", *PLOTS} - {"efficiency_comparison.png"}
    results = hosts.colab.results()
    assert sorted(results) == sorted(PARTS)
    assert results["provenance"]["wall_seconds"] > 0  # written last
    assert results["efficiency"] == []
    for row in results["rank_sensitivity"]:
        assert row["adapter_parameters"] > 0
        assert row["accuracy"] is None
    assert (hosts.colab.working / "outputs" / "adapter" / "README.md").exists()


def test_without_its_studies_one_line_says_so_in_each_section(hosts):
    said = {10: "", 11: ""}
    for section in said:
        for place in hosts.colab.sections[section]:
            for output in hosts.colab.nb.cells[place].outputs:
                said[section] += output.get("text", "")
    assert said[10].endswith("efficiency_steps=0: nothing is measured.\n")
    assert said[11] == "ranks is empty: none was trained.\n"


def test_no_request_to_the_hub_waits_for_ever(run):
    assert "limit_wait" in run.hooks


def test_the_splits_are_those_of_the_data(run, reviews):
    about = run.results["provenance"]
    assert about["labels"] == CLASSES
    total = sum(about["rows"].values())
    assert total <= len(reviews)
    assert about["rows"]["test"] == pytest.approx(0.1 * total, abs=1)


@pytest.mark.parametrize("part", ["test", "test_merged"])
def test_test_scores_agree_with_their_confusion_matrix(run, part):
    scores = run.results[part]
    matrix = np.array(scores["confusion_matrix"])
    about = run.results["provenance"]
    assert matrix.shape == (3, 3)
    assert matrix.sum() == scores["n"] == about["rows"]["test"]
    assert scores["accuracy"] == pytest.approx(matrix.trace() / matrix.sum())
    largest = matrix.sum(axis=1).max() / matrix.sum()  # of a stratified split
    assert about["largest_class"] == pytest.approx(largest)


def test_every_score_lies_in_its_interval(run):
    results = run.results
    for scores in (
        results["test"],
        results["test_merged"],
        *results["baselines"].values(),
    ):
        for name in SCORES:
            low, high = scores[f"{name}_ci95"]
            assert 0 <= low <= scores[name] <= high <= 1
            assert low < high


def test_every_answer_on_the_test_split_is_written(run, reviews):
    path = run.folder / "outputs" / "test_predictions.csv"
    answers = pd.read_csv(path)
    assert list(answers["text"]) == run.texts
    verdicts = dict(zip(reviews["Review"], reviews["Verdict"]))
    assert list(answers["truth"]) == [verdicts[text] for text in run.texts]
    is_right = answers["truth"] == answers["answer"]
    assert is_right.mean() == pytest.approx(run.results["test_merged"]["accuracy"])
    assert answers["confidence"].between(1 / 3, 1).all()
    threshold = run.results["reliable"]["threshold"]
    if threshold is None:
        assert answers["reliable"].isna().all()
    else:
        expected = answers["confidence"] >= threshold
        assert list(answers["reliable"]) == list(expected)


def test_a_file_is_classified_row_by_row(hosts):
    path = hosts.colab.working / "outputs" / "predictions.csv"
    rows = pd.read_csv(path, dtype=str, keep_default_na=False)
    assert list(rows["id"]) == ["07", "08", "09"]
    assert rows["label"][1] == rows["confidence"][1] == ""
    for place in (0, 2):
        assert rows["label"][place] in CLASSES
        assert 1 / 3 < float(rows["confidence"][place]) <= 1
    assert not (hosts.kaggle.working / "outputs" / "predictions.csv").exists()


def test_the_baseline_is_kept_and_answers_as_scored(run, reviews):
    baseline = joblib.load(run.folder / "outputs" / "tfidf.joblib")
    verdicts = dict(zip(reviews["Review"], reviews["Verdict"]))
    truth = [verdicts[text] for text in run.texts]
    matrix = confusion_matrix(truth, baseline.predict(run.texts), labels=CLASSES)
    expected = run.results["baselines"]["tfidf_logreg"]["confusion_matrix"]
    assert matrix.tolist() == expected


def test_cautions_are_said_where_the_scores_are(run):
    results = run.results
    said = " ".join(results["cautions"])
    ours = results["test_merged"]
    for key, name in (("tfidf_logreg", "TF-IDF"), ("frozen_logreg", "frozen base")):
        for measure in ("accuracy", "f1_macro"):
            verdict = run.kernel.ask(f"gains.loc[{name!r}, {measure!r}]")
            verdict = verdict.split(": ")[1]
            words = f"By {measure} {verdict} than {name}"
            assert (words in said) == (verdict != "better")
            if ours[measure] <= results["baselines"][key][measure]:
                assert verdict in ("worse", "perhaps no better")
    for place, name in enumerate(CLASSES):
        row = ours["confusion_matrix"][place]
        words = f"{name} ({row[place]} of {sum(row)})"
        is_missed = row[place] < sum(row) / 4
        assert (words in said) == is_missed
    for caution in results["cautions"]:
        assert caution in run.kernel.printed()
        card = run.folder / "outputs" / "adapter" / "README.md"
        assert caution in card.read_text()


def test_what_is_taken_away_can_be_read_by_others(run):
    """As the umask says, which safetensors does not ask."""
    probe = run.folder / "probe"
    probe.touch()
    for path in (run.folder / "outputs").glob("[am]*/*"):
        assert path.stat().st_mode == probe.stat().st_mode, path.name


def test_the_calibration_is_of_the_test_answers(run):
    calibration = run.results["calibration"]
    bins = pd.DataFrame(calibration["bins"])
    assert bins["texts"].sum() == len(run.texts)
    accuracy = np.average(bins["accuracy"], weights=bins["texts"])
    assert accuracy == pytest.approx(run.results["test_merged"]["accuracy"])
    distances = (bins["accuracy"] - bins["confidence"]).abs()
    assert calibration["ece"] == pytest.approx(
        np.average(distances, weights=bins["texts"])
    )


def test_a_second_run_of_its_cell_does_not_divide_by_the_temperature_again(run):
    """Kaggle runs each cell twice; the checkpoint of the training stays as it was."""
    temperature = run.results["calibration"]["temperature"]
    (finished,) = (run.folder / "outputs" / "checkpoints").glob("*/finished")
    trained = load_file(finished / "adapter" / "adapter_model.safetensors")
    kept = load_file(run.folder / "outputs" / "adapter" / "adapter_model.safetensors")
    assert set(trained) == set(kept)
    for name in trained:
        factor = temperature if "classifier" in name else 1
        assert torch.allclose(kept[name] * factor, trained[name]), name


def test_the_merged_model_knows_from_where_on_it_can_be_relied_on(run):
    about = json.loads((run.folder / "outputs/merged/config.json").read_text())
    reliable = run.results["reliable"]
    assert about.get("reliable_confidence") == reliable["threshold"]
    assert reliable["words"] in run.kernel.printed()
    assert reliable["min_precision"] == 0.98


def test_results_have_all_parts(run):
    assert sorted(run.results) == sorted(PARTS)
    about = set(run.results["provenance"])
    assert {"config", "model", "dataset", "device", "versions", "seed"} <= about
    assert {"started", "processes"} <= about


def test_the_figures_of_training_agree_with_its_history(run):
    training = run.results["training"]
    about = run.results["provenance"]
    scored = []
    for row in training["history"]:
        if row.get("eval_loss") is not None:
            scored.append(row)
    assert [row["epoch"] for row in scored] == [0, 1]
    assert training["epochs"] == training["best_epoch"] == 1
    assert scored[0]["eval_loss"] == pytest.approx(np.log(3), abs=0.3)  # a random head
    speed = about["rows"]["train"] / training["seconds"]
    assert training["samples_per_second"] == pytest.approx(speed)
    assert about["wall_seconds"] > training["seconds"] > 0
    assert training["peak_mb"] is None  # without a GPU
    assert training["captured_share"] == 0


def test_ranks_have_their_sizes_and_a_score_where_they_were_trained(run):
    rows = run.results["rank_sensitivity"]
    assert [row["rank"] for row in rows] == [1, 2, 4, 8, 16, 32, 64]
    for row in rows:
        assert row["modules"] == "query, value"
        assert row["adapter_parameters"] == row["rank"] * 2 * 2 * (64 + 64)
    trained = [row["rank"] for row in rows if row["accuracy"] is not None]
    assert trained == [1]
    low, high = rows[0]["accuracy_ci95"]
    assert low <= rows[0]["accuracy"] <= high


def test_methods_have_the_figures_that_can_be_measured_without_a_gpu(run):
    methods = {row["method"]: row for row in run.results["efficiency"]}
    assert list(methods) == ["full fine-tuning", "QLoRA"]
    for row in methods.values():
        assert row["measured"]
        assert row["samples_per_second"] > 0
        assert row["peak_mb"] is None
    full = methods["full fine-tuning"]
    ours = methods["QLoRA"]
    assert ours["trainable_parameters"] == 16 * 2 * 2 * (64 + 64) + 64 * 3 + 3
    assert ours["weights_mb"] < full["weights_mb"]
    in_32_bits = 4e-6 * full["trainable_parameters"]
    assert full["weights_mb"] == pytest.approx(in_32_bits)


def matrix_of(program, run, folder, reviews):
    """Return the confusion matrix of what a program prints about the test texts."""
    done = subprocess.run(
        [sys.executable, "-c", program, str(run.folder / "outputs" / "merged"), "cpu"],
        input=json.dumps(run.texts),
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
    )
    if done.stdout.startswith("[["):  # the probabilities of each text
        answers = [CLASSES[np.argmax(row)] for row in json.loads(done.stdout)]
    else:
        answers = re.findall("|".join(CLASSES), done.stdout)
    verdicts = dict(zip(reviews["Review"], reviews["Verdict"]))
    truth = [verdicts[text] for text in run.texts]
    return confusion_matrix(truth, answers, labels=CLASSES).tolist()


def test_the_merged_model_answers_as_scored_without_bitsandbytes(
    run, notebook, reviews
):
    program = "import sys\nsys.modules['bitsandbytes'] = None\n" + notebook.CLASSIFY
    matrix = matrix_of(program, run, run.folder, reviews)
    assert matrix == run.results["test_merged"]["confusion_matrix"]
    answers = np.sum(matrix, axis=0)
    assert np.count_nonzero(answers) > 1  # else the same answer to all would do


@pytest.fixture
def card_code(run, tiny_bert, tmp_path):
    """The adapter's folder, its base where the card says, and the card's two codes."""
    outputs = tmp_path / "outputs"
    shutil.copytree(run.folder / "outputs", outputs)
    base = outputs / "adapter" / "path" / "to" / Path(tiny_bert).name
    shutil.copytree(tiny_bert, base)
    card = (outputs / "adapter" / "README.md").read_text()
    code = re.findall("^```python\n(.*?)^```", card, re.MULTILINE | re.DOTALL)
    return outputs / "adapter", code


def test_the_code_of_the_card_runs_as_written(card_code):
    adapter, code = card_code
    said = []
    for program in code:
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, cwd=adapter, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said.append(re.findall("|".join(CLASSES), done.stdout))
    merged, ours = said
    assert merged == ours
    assert len(ours) == 1


def test_the_code_of_the_card_answers_as_scored(run, reviews, card_code):
    adapter, (_, code) = card_code
    load, classify = code.split("inputs = ")
    loop = "import json, sys\nfor text in json.load(sys.stdin):\n inputs = "
    program = load + loop + classify.replace('"A text."', "text").replace("\n", "\n ")
    matrix = matrix_of(program, run, adapter, reviews)
    assert matrix == run.results["test"]["confusion_matrix"]


def contents(path):
    """Return the bytes in a file, and those in its parts if it is an archive."""
    found = [path.read_bytes()]
    if zipfile.is_zipfile(path):  # as PyTorch writes
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                found.append(archive.read(name))
    return found


def test_no_file_holds_a_key(run):
    assert "canary0" in (run.folder / ".env").read_text()
    files = [*run.folder.rglob("*"), *(run.kernel.folder / "home").rglob("*")]
    files = [path for path in files if path.is_file() and path.name != ".env"]
    kinds = {path.suffix for path in files}
    assert {".json", ".pt", ".safetensors", ".md"} <= kinds
    for path in files:
        for content in contents(path):
            assert b"canary0" not in content.lower(), path


def test_no_output_holds_a_key(run):
    assert "canary0" not in json.dumps(run.kernel.nb).lower()


def test_what_is_taken_away_names_no_path_of_this_machine(run):
    taken = list((run.folder / "outputs" / "adapter").iterdir())
    taken.extend((run.folder / "outputs" / "merged").iterdir())
    taken.append(run.folder / "Data" / "results.json")
    for path in taken:
        found = re.search(
            rb"[\"'` ]~?/(root|home|work|tmp|Users|var)/", path.read_bytes()
        )
        assert found is None, path.name


def untimed(value):
    """Return what was measured or decided, without times."""
    if isinstance(value, dict):
        kept = {}
        for name, each in value.items():
            if not name.endswith(TIMES):
                kept[name] = untimed(each)
        return kept
    if isinstance(value, list):
        return [untimed(each) for each in value]
    return value


def before_section_10(results):
    """Return what does not depend on sections 10 and 11, without times."""
    kept = untimed({name: results[name] for name in BEFORE_SECTION_10})
    for name in list(kept["provenance"]["config"]):
        if name.startswith(("rank", "efficiency_steps", "predict_name")):
            del kept["provenance"]["config"][name]
    return kept


def test_results_are_written_before_section_10_and_stay(run):
    early = run.kernel.early
    assert sorted(early) == sorted(PARTS)
    assert early["efficiency"] == []
    assert early["rank_sensitivity"] == []
    assert before_section_10(early) == before_section_10(run.results)


def test_a_classifier_of_another_training_is_not_replaced_without_a_word(run):
    """Its cell is asked with other settings, twice, and then with the run's own."""
    kernel = run.kernel
    for place in kernel.sections[8]:
        if "differing(shipped_settings" in kernel.nb.cells[place].source:
            break
    source = kernel.nb.cells[place].source
    said = []
    for seed in (9, 9, 42):  # 42 is its own
        kernel.run(0, f"config = config.model_copy(update={{'seed': {seed}}})")
        kernel.run(0, "tokenized_from = baseline_from = (config, splits)")
        kernel.run(0, "frozen_from = tokenized_from")
        outputs = kernel.run(place, source)
        said.append(" ".join("".join(output.text for output in outputs).split()))
    for each in said[:2]:
        assert "A new training." in each
        assert "another training (another seed)" in each
    assert "is finished" in said[2]
    assert "another" not in said[2]


def test_a_run_cell_can_be_run_twice(run):
    assert run.kernel.failed == {}


@pytest.mark.parametrize("part", BEFORE_SECTION_10)
def test_run_cells_run_twice_give_the_results_of_running_them_once(run, hosts, part):
    once = before_section_10(hosts.colab.results())
    twice = before_section_10(run.results)
    assert once[part] == twice[part]


def models(kernel):
    """Return all files of adapter and merged model."""
    files = {}
    for path in kernel.working.glob("outputs/*/*"):
        if path.is_file():
            files[path] = path.read_bytes()
    return files


@pytest.mark.parametrize("section", [10, 11, 12])
def test_a_section_that_fails_loses_nothing_of_those_before(run, section):
    """Its first run cell raises where its last statement was."""
    kernel = run.kernel
    before = kernel.results()
    files = models(kernel)
    place = next(filter(kernel.does_something, kernel.sections[section]))
    tree = ast.parse(kernel.nb.cells[place].source)
    tree.body[-1:] = ast.parse("raise RuntimeError('injected')").body
    with pytest.raises(CellExecutionError, match="injected"):
        kernel.run(place, ast.unparse(tree))
    assert kernel.results() == before
    assert models(kernel) == files
    assert len(files) >= 8


def test_each_section_can_be_run_again_after_a_finished_run(run):
    for section in range(12, 3, -1):
        for place in run.kernel.sections[section]:
            run.kernel.run(place)
    again = run.kernel.results()
    for part in ("test", "test_merged", "training"):
        assert untimed(again[part]) == untimed(run.results[part])
