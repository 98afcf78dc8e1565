"""The runs of hosts.py: their figures, and what is taken away."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from hosts import CLASSES, PARTS
from safetensors.torch import load_file
from sklearn.metrics import confusion_matrix

SCORES = ["accuracy", "f1_weighted", "f1_macro"]


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
            words = f"By {measure}, it is {verdict} than {name}"
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
