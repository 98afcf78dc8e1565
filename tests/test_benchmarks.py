"""The studies: each runs with a tiny model and writes its file; what is measured once is not measured again."""

import importlib
import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT))

from benchmarks import common, recipes, speed  # noqa: E402

STUDIES = {
    "speed": "--model random --methods fast --length 16 --steps 1 --rounds 1",
    "memory": "--length 16 --lengths --batches 2 --caps --steps 1",
    "ranks": "--ranks 4 --seeds 1 2 --rows 32",
    "recipes": "--recipes fast tfidf_nb_svm --seeds 1",
    "lengths": "--rows 64 --steps 8 64",
    "scaling": "--processes 1 --batches 32 --length 16 --steps 1 --rounds 1",
}


@pytest.mark.parametrize("study", STUDIES)
def test_a_study_writes_its_file(study, notebook, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "notebook", lambda: notebook)  # imported once
    monkeypatch.setattr(sys, "argv", [study, "--tiny", "--out", str(tmp_path), *STUDIES[study].split()])
    importlib.import_module(f"benchmarks.{study}").main()
    text = (tmp_path / f"{'accuracy' if study == 'recipes' else study}.json").read_text()
    results = json.loads(text)
    assert results["runs"] and {"device", "versions", "commit", "command"} <= results["provenance"].keys()
    assert str(tmp_path) not in text and "/tmp" not in text


@pytest.mark.parametrize("study", [*STUDIES, "report"])
def test_help_is_quick_and_says_how_to_run_it(study):
    command = [sys.executable, "-m", f"benchmarks.{study}", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"python -m benchmarks.{study}" in done.stdout


def test_a_file_of_other_settings_is_not_added_to(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["speed"])
    arguments = common.parser("speed", "").parse_args(["--out", str(tmp_path)])
    common.Study("speed", arguments, {"steps": 1}).add({"method": "a"}, lambda: {"samples_per_second": 1.0})
    again = common.Study("speed", arguments, {"steps": 1})
    assert again.add({"method": "a"}, pytest.fail)["samples_per_second"] == 1.0
    with pytest.raises(SystemExit, match="--fresh"):
        common.Study("speed", arguments, {"steps": 2})


def test_ratios_compare_medians():
    speeds = {"QLoRA fast, captured": 300.0, "full fp16, captured, 32 x 1": 200.0}
    kinds = [(name, turn, value) for name, value in speeds.items() for turn in range(3)]
    rows = [dict(method=n, round=t, measured=True, samples_per_second=v + t, peak_mb=v) for n, t, v in kinds]
    found = speed.ratios(speed.summarize(rows), {"arithmetic_samples_per_second": 602.0})
    assert found["fast_over_full_captured"] == 301 / 201 and found["fast_share_of_floor"] == 0.5
    assert found["fast_peak_over_full_captured"] == 1.5 and found["default_captured_over_eager"] is None


def test_the_interval_over_seeds_covers_the_mean_of_new_seeds():
    rng, covered = np.random.default_rng(1), {True: 0, False: 0}
    for _ in range(100):
        for shared in covered:
            rates = 0.9 + 0.005 * rng.standard_normal(3)
            packed = [json.dumps(common.pack(rng.random(500) < rate)) for rate in rates]  # as a study keeps them
            right = [common.unpack(json.loads(each)) for each in packed]
            _, (low, high) = recipes.mean_and_interval(right, shared, 500)
            covered[shared] += low <= 0.9 <= high
    assert all(85 <= count <= 100 for count in covered.values())
