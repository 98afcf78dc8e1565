"""The studies: each runs with a tiny model, writes its file, resumes, is reported."""

import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT))

from benchmarks import common, report, speed, statistics  # noqa: E402

STUDIES = {
    "accuracy": "--seeds 1"
    " --recipes search recommended-fast full-512 frozen-256 tfidf-nb-svm",
    "labels": "--sizes 160 --seeds 1",
    "memory": "--models bert-base --length 16 --steps 1",
    "speed": "--length 16 --steps 1 --rounds 1 --methods fast --dataset x --rows 64",
    "load": "",
}


def run_study(study, options, folder, notebook, monkeypatch) -> Path:
    """Run a study with a tiny model, and return the file that it writes."""
    monkeypatch.setattr(common, "notebook", lambda: notebook)  # imported once
    arguments = [study, "--tiny", "--out", str(folder), *options.split()]
    monkeypatch.setattr(sys, "argv", arguments)
    importlib.import_module(f"benchmarks.{study}").main()
    return folder / f"{study}.json"


@pytest.fixture(scope="module", params=STUDIES)
def written(request, notebook, tmp_path_factory):
    """The file of a study that was run with a tiny model."""
    study = request.param
    folder = tmp_path_factory.mktemp(study)
    with pytest.MonkeyPatch.context() as monkeypatch:
        return run_study(study, STUDIES[study], folder, notebook, monkeypatch)


# ---- The files


def test_a_study_says_what_it_ran_on_and_tells_no_local_path(written):
    text = written.read_text()
    file = json.loads(text)
    assert file["runs"]
    assert file["about"].keys() == {"study", "device", "versions", "settings"}
    assert all(run["commit"] for run in file["runs"])
    assert "/tmp" not in text
    assert str(written.parent) not in text


def test_a_study_started_again_measures_nothing(written, notebook, monkeypatch):
    before = written.read_text()
    study = written.stem
    run_study(study, STUDIES[study], written.parent, notebook, monkeypatch)
    assert written.read_text() == before


def test_what_is_measured_is_not_measured_again(tmp_path):
    first = common.Study("speed", tmp_path, {"steps": 1})
    first.add({"method": "a"}, lambda: {"samples_per_second": 1.0})
    again = common.Study("speed", tmp_path, {"steps": 1})
    run = again.add({"method": "a"}, pytest.fail)
    assert run["samples_per_second"] == 1.0


def test_a_file_of_other_settings_is_not_added_to(tmp_path):
    common.Study("speed", tmp_path, {"steps": 1})
    with pytest.raises(SystemExit, match="--out"):
        common.Study("speed", tmp_path, {"steps": 2})


def test_two_processes_that_write_one_file_lose_no_run(tmp_path):
    first = common.Study("speed", tmp_path, {})
    second = common.Study("speed", tmp_path, {})

    def measure():
        """Measure while another process adds a run, and one of the same name."""
        second.add({"method": "b"}, lambda: {"samples_per_second": 2.0})
        second.add({"method": "a"}, lambda: {"samples_per_second": 3.0})
        return {"samples_per_second": 1.0}

    first.add({"method": "a"}, measure)
    methods = [run["method"] for run in first.read()["runs"]]
    assert methods == ["b", "a"]


@pytest.mark.parametrize("study", [*STUDIES, "report"])
def test_help_says_how_to_run_a_study(study):
    command = [sys.executable, "-m", f"benchmarks.{study}", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"python -m benchmarks.{study}" in done.stdout


# ---- The report


def write_file(folder, study, settings, runs):
    """Write the file of a study as if it had measured `runs`."""
    made = common.Study(study, folder, settings)
    for run in runs:
        run["commit"] = "0123456789"
    made.write(runs)


def write_report(folder) -> str:
    """Write the report of the files in a folder, and its figures; return its text."""
    report.write(folder, folder / "REPORT.md", folder)
    return (folder / "REPORT.md").read_text(encoding="utf-8")


def test_the_report_shows_a_study_with_its_figures(written):
    folder = written.parent
    text = write_report(folder)
    assert f"Source: [{written.name}]" in text
    for figure in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (folder / figure).exists()


def test_the_text_is_the_same_without_figures(written, tmp_path):
    text = write_report(written.parent)
    report.write(written.parent, tmp_path / "REPORT.md", None)
    assert (tmp_path / "REPORT.md").read_text(encoding="utf-8") == text
    assert not list(tmp_path.glob("*.png"))


SETTINGS = {
    "accuracy": {"model": "base", "dataset": "imdb20k", "further": "imdb_test10k"},
    "labels": {"model": "base", "dataset": "imdb20k", "preset": "recommended,fast"},
    "memory": {"length": 256, "steps": 5},
    "speed": {"length": 256, "steps": 40},
    "load": {},
}


def test_a_study_that_has_measured_nothing_yet_does_not_stop_the_report(tmp_path):
    for study, settings in SETTINGS.items():
        write_file(tmp_path, study, settings, [])
    text = write_report(tmp_path)
    assert "![" not in text
    assert all(f"[{study}.json]" in text for study in SETTINGS)


def recipe_run(recipe, seed, n_right) -> dict:
    """Return a run of the accuracy study that answers `n_right` of 100 texts right."""
    answers = common.pack(np.arange(100) < n_right)
    return {
        "recipe": recipe,
        "seed": seed,
        "validation": 0.9,
        "learning_rate": 5e-4,
        "seconds": 60.0,
        "samples_per_second": 100.0,
        "peak_mb": None,
        "shipped_test": answers,
        "shipped_further": answers,
        "by_length": [{"texts": 100, "share": n_right / 100}] * 4,
    }


def row_of(text, name) -> list[str]:
    """Return the cells of the first row of a table that has this name."""
    for line in text.splitlines():
        if line.startswith(f"|{name}|"):
            return line[1:-1].split("|")
    raise ValueError(f"There is no row {name}.")


def test_a_recipe_is_compared_with_full_on_the_seeds_that_both_have(tmp_path):
    runs = [
        recipe_run("recommended", 1, n_right=97),
        recipe_run("recommended", 2, n_right=55),
        recipe_run("full-512", 1, n_right=97),
        recipe_run("full-512", 3, n_right=75),
    ]
    write_file(tmp_path, "accuracy", SETTINGS["accuracy"], runs)
    row = row_of(write_report(tmp_path), "QLoRA recommended")
    assert row[1] == "2"  # seeds
    assert row[4].startswith("76.0% [")
    assert row[6] == "+0.0 [+0.0, +0.0]"


def test_like_lengths_are_compared_with_random_batches(tmp_path):
    random = recipe_run("default", 1, n_right=90)
    grouped = recipe_run("default-like-lengths", 1, n_right=92)
    grouped["validation"] = 0.91
    write_file(tmp_path, "accuracy", SETTINGS["accuracy"], [random, grouped])
    text = write_report(tmp_path)
    assert "+1.00 points on validation" in text
    assert "+2.0 [" in text


def test_what_four_bits_change_is_said(tmp_path):
    four_bits = recipe_run("recommended-fast", 1, n_right=90)
    sixteen_bits = recipe_run("recommended-fast-16-bit", 1, n_right=92)
    runs = [four_bits, sixteen_bits]
    write_file(tmp_path, "accuracy", SETTINGS["accuracy"], runs)
    assert "LoRA on a 16-bit base is -2.0 [" in write_report(tmp_path)


def test_a_method_that_failed_is_shown_beside_the_others(tmp_path):
    failed = {"method": "QLoRA fast, compiled", "samples_per_second": None}
    failed["error"] = "No | kernel"
    no_memory = {"method": "full, eager, 16 x 2", "samples_per_second": None}
    measured = {"method": "QLoRA fast, captured", "samples_per_second": 800.0}
    runs = [failed, no_memory, measured]
    for run in runs:
        run["model"] = "random"
        run["round"] = 0
    write_file(tmp_path, "speed", SETTINGS["speed"], runs)
    text = write_report(tmp_path)
    assert row_of(text, "QLoRA fast, compiled")[1] == "failed: No / kernel"
    assert row_of(text, "full, eager, 16 x 2")[1] == "not measured"
    assert row_of(text, "QLoRA fast, captured")[1] == "800"


def test_compiled_steps_are_compared_with_captured_ones(tmp_path):
    measured = {
        "QLoRA fast, captured": (800.0, 200.0),
        "QLoRA fast, compiled": (600.0, 90.0),
        "full, captured, 32 x 1": (400.0, 300.0),
        "full, compiled, 32 x 1": (500.0, 210.0),
    }
    runs = []
    for method, (texts, peak_mb) in measured.items():
        run = {"method": method, "model": "random", "round": 0}
        run["samples_per_second"] = texts
        run["peak_mb"] = peak_mb
        run["seconds_before"] = 35.0
        runs.append(run)
    write_file(tmp_path, "speed", SETTINGS["speed"], runs)
    text = write_report(tmp_path)
    assert "0.75 times as fast as captured, with 45.0% of its peak, after 35 s" in text
    assert "compiled, trains 1.25 times as fast as captured, with 70.0% of" in text
    assert "`fast` is 1.60 times as fast as that" in text


def test_a_compiled_model_keeps_the_names_of_its_arguments(model_to_compile):
    """Trainer drops the columns of a data set that they do not name."""
    before = list(inspect.signature(model_to_compile.forward).parameters)
    compiled = speed.compile_forward(model_to_compile)
    assert list(inspect.signature(compiled.forward).parameters) == before


@pytest.fixture
def model_to_compile(notebook, tiny_bert):
    """A classifier, as full fine-tuning trains it."""
    kind = notebook.AutoModelForSequenceClassification
    return kind.from_pretrained(tiny_bert)


def memory_run(method, peak_mb, parameters) -> dict:
    """Return a run of the memory study."""
    return {
        "model": "bert-large",
        "method": method,
        "trainable_parameters": parameters,
        "weights_mb": 500.0,
        "peak_mb": peak_mb,
        "samples_per_second": 100.0,
        "outside_the_allocator_mb": 600.0,
    }


def test_the_card_that_a_method_needs_holds_what_cuda_holds_too(tmp_path):
    runs = [
        memory_run("full fine-tuning", None, parameters=None),  # no memory
        memory_run(
            "full fine-tuning, checkpointed, 8-bit AdamW", 81_000.0, 335_000_000
        ),
        memory_run("LoRA, 16-bit base, checkpointed", 7500.0, 1_000_000),
        memory_run("QLoRA, lean", 7300.0, 1_000_000),
    ]
    write_file(tmp_path, "memory", SETTINGS["memory"], runs)
    text = write_report(tmp_path)
    assert "335 million parameters" in text
    assert "full fine-tuning not measured" in text
    assert "-200 MB" in text
    fits = [line[1:-1].split("|")[-1] for line in re.findall(r"\|bert.*", text)]
    assert fits == ["", "none of them", "16 GB", "8 GB"]


@pytest.mark.parametrize(
    "accuracies, size",
    [
        ({100: 0.6, 200: 0.8, 400: 0.9}, 200),
        ({100: 0.9, 200: 0.6, 400: 0.9}, 400),  # above at 100 does not count
        ({100: 0.8, 200: 0.8, 400: 0.8}, 100),
        ({100: 0.9, 200: 0.9, 400: 0.7}, None),
    ],
)
def test_methods_cross_where_one_stays_above_the_other(accuracies, size):
    means = {}
    for texts, accuracy in accuracies.items():
        means[texts, "QLoRA"] = accuracy
        means[texts, "TF-IDF"] = 0.7
    means[800, "QLoRA"] = 0.1  # the other has not run
    assert statistics.crossing(means, "QLoRA", "TF-IDF") == size


def speed_runs(method, speeds, peak_mb) -> list[dict]:
    """Return runs of the speed study, one for each round."""
    runs = []
    for number, samples_per_second in enumerate(speeds):
        run = {
            "method": method,
            "round": number,
            "samples_per_second": samples_per_second,
            "peak_mb": peak_mb,
        }
        runs.append(run)
    return runs


def test_ratios_compare_medians():
    runs = speed_runs("QLoRA fast, captured", [300.0, 900.0, 301.0], peak_mb=300.0)
    runs += speed_runs("full, captured, 32 x 1", [7.0, 200.0, 201.0], peak_mb=200.0)
    runs.append({"epoch": "random", "round": 0, "samples_per_second": 100.0})
    runs.append({"epoch": "group_by_length", "round": 0, "samples_per_second": 150.0})
    ratios = statistics.ratios(statistics.medians(runs))
    assert ratios["fast_over_full_captured"] == 301 / 200
    assert ratios["fast_peak_over_full_captured"] == 1.5
    assert ratios["like_lengths_over_random"] == 1.5
    assert ratios["default_captured_over_eager"] is None


@pytest.mark.parametrize("same_texts", [True, False])
def test_the_interval_over_seeds_covers_the_mean_of_new_seeds(same_texts):
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(100):
        answers = []
        for rate in 0.9 + 0.005 * rng.standard_normal(3):
            packed = json.dumps(common.pack(rng.random(500) < rate))  # as in a file
            answers.append(common.unpack(json.loads(packed)))
        _, (low, high) = statistics.mean_and_interval(answers, same_texts)
        covered += low <= 0.9 <= high
    assert 85 <= covered <= 100


def test_with_one_seed_the_interval_is_that_of_the_texts():
    answers = np.arange(1000) < 900
    mean, (low, high) = statistics.mean_and_interval([answers], same_texts=True)
    assert mean == 0.9
    assert high - low == pytest.approx(2 * 1.96 * (0.9 * 0.1 / 1000) ** 0.5, rel=0.15)


def test_fewer_labels_are_compared_with_all():
    means = {(100, "TF-IDF"): 0.7, (100, "QLoRA"): 0.8, (200, "QLoRA"): 0.9}
    assert report.fewer_labels_sentence(means, "frozen base", "it") == ""
    assert report.fewer_labels_sentence(means, "TF-IDF", "it") == ""
    means[400, "TF-IDF"] = 0.85
    said = "With 200 labels it is above TF-IDF with 400 (85.0%)."
    assert report.fewer_labels_sentence(means, "TF-IDF", "TF-IDF") == said
