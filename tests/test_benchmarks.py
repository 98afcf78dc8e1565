"""The studies: each runs with a tiny model and writes its file, and resumes."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT))

from benchmarks import common, recipes, report, speed  # noqa: E402

STUDIES = {
    "speed": "--model random --methods fast --length 16 --steps 1 --rounds 1",
    "memory": "--length 16 --lengths --batches 2 --caps --steps 1",
    "ranks": "--ranks 4 --seeds 1 2 --rows 32",
    "recipes": "--recipes fast tfidf_nb_svm --seeds 1",
    "lengths": "--rows 64 --steps 8 64",
    "load": "",
}


def run_study(study, options, folder, notebook, monkeypatch) -> Path:
    """Run a study with a tiny model, and return the file that it writes."""
    monkeypatch.setattr(common, "notebook", lambda: notebook)  # imported once
    arguments = [study, "--tiny", "--out", str(folder), *options.split()]
    monkeypatch.setattr(sys, "argv", arguments)
    importlib.import_module(f"benchmarks.{study}").main()
    (path,) = folder.glob("*.json")
    return path


@pytest.fixture(scope="module", params=STUDIES)
def written(request, notebook, tmp_path_factory):
    """The file of a study that was run with a tiny model."""
    study = request.param
    folder = tmp_path_factory.mktemp(study)
    with pytest.MonkeyPatch.context() as monkeypatch:
        return run_study(study, STUDIES[study], folder, notebook, monkeypatch)


def test_a_study_writes_its_file(written):
    text = written.read_text()
    results = json.loads(text)
    assert results["runs"]
    assert {"device", "versions", "commit", "command"} <= results["provenance"].keys()
    assert "/tmp" not in text
    assert str(written.parent) not in text


def test_the_report_shows_a_study(written):
    folder = written.parent
    report.write(folder, folder / "REPORT.md", folder)
    text = (folder / "REPORT.md").read_text()
    assert f"Source: [{written.name}]" in text
    for figure in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (folder / figure).exists()


def test_trained_recipes_are_scored_on_further_texts(notebook, tmp_path, monkeypatch):
    options = STUDIES["recipes"]
    run_study("recipes", options, tmp_path, notebook, monkeypatch)
    options += " --final further"
    path = run_study("recipes", options, tmp_path, notebook, monkeypatch)
    rows = {row["name"]: row for row in json.loads(path.read_text())["rows"]}
    assert 0 <= rows["tfidf_nb_svm"]["final"] <= 1
    assert 0 <= rows["fast"]["merged_agrees"] <= 1


@pytest.mark.parametrize("study", [*STUDIES, "report"])
def test_help_says_how_to_run_a_study(study):
    command = [sys.executable, "-m", f"benchmarks.{study}", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"python -m benchmarks.{study}" in done.stdout


@pytest.fixture
def study_arguments(tmp_path, monkeypatch):
    """The arguments of a study that writes to a folder of the test's own."""
    monkeypatch.setattr(sys, "argv", ["speed"])
    parser = common.parser("speed", "")
    return parser.parse_args(["--out", str(tmp_path)])


def test_what_is_measured_is_not_measured_again(study_arguments):
    first = common.Study("speed", study_arguments, {"steps": 1})
    first.add({"method": "a"}, lambda: {"samples_per_second": 1.0})
    again = common.Study("speed", study_arguments, {"steps": 1})
    row = again.add({"method": "a"}, pytest.fail)
    assert row["samples_per_second"] == 1.0


def test_a_file_of_other_settings_is_not_added_to(study_arguments):
    first = common.Study("speed", study_arguments, {"steps": 1})
    first.add({"method": "a"}, lambda: {"samples_per_second": 1.0})
    with pytest.raises(SystemExit, match="--fresh"):
        common.Study("speed", study_arguments, {"steps": 2})


def speed_rows(method: str, speeds: list[float], peak: float) -> list[dict]:
    """Return rows of the speed study, one for each round."""
    rows = []
    for number, samples_per_second in enumerate(speeds):
        row = {
            "method": method,
            "round": number,
            "measured": True,
            "samples_per_second": samples_per_second,
            "peak_mb": peak,
        }
        rows.append(row)
    return rows


def test_ratios_compare_medians():
    rows = speed_rows("QLoRA fast, captured", [300.0, 900.0, 301.0], peak=300.0)
    rows += speed_rows("full fp16, captured, 32 x 1", [7.0, 200.0, 201.0], peak=200.0)
    floor = {"arithmetic_samples_per_second": 602.0}
    ratios = speed.ratios(speed.summarize(rows), floor)
    assert ratios["fast_over_full_captured"] == 301 / 200
    assert ratios["fast_share_of_floor"] == 0.5
    assert ratios["fast_peak_over_full_captured"] == 1.5
    assert ratios["default_captured_over_eager"] is None


@pytest.mark.parametrize("shared", [True, False])
def test_the_interval_over_seeds_covers_the_mean_of_new_seeds(shared):
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(100):
        answers = []
        for rate in 0.9 + 0.005 * rng.standard_normal(3):
            packed = json.dumps(common.pack(rng.random(500) < rate))  # as in a file
            answers.append(common.unpack(json.loads(packed)))
        _, (low, high) = recipes.mean_and_interval(answers, shared, 500)
        covered += low <= 0.9 <= high
    assert 85 <= covered <= 100
