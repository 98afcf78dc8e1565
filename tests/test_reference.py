"""The reference measurements of speed: they keep what the notebook and the README say, and the fast execution is as accurate as the plain one."""

import json
import re

import nbformat
import pytest
from conftest import NOTEBOOK, ROOT
from scipy.stats import ttest_ind

REFERENCE = ROOT / "Data" / "reference"
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def speed():
    return json.loads((REFERENCE / "h100-bert-base-shapes" / "speed.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def accuracies():
    files = {name: REFERENCE / "h100-all-minilm" / f"accuracy-{name}-1-2-3.json" for name in ("fast", "plain")}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in files.items()}


@pytest.fixture(scope="module")
def notebook_text():
    """All prose of the notebook."""
    return "\n".join(cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "markdown")


def by_method(speed):
    return {row["method"]: row for row in speed["efficiency"]}


def test_fast_and_lean_are_as_fast_and_small_as_promised(speed):
    methods = by_method(speed)
    fast, lean, plain, full = (methods[name] for name in ("qlora_fast", "qlora_lean", "qlora_plain", "full_fp16"))
    assert fast["samples_per_second"] >= 10 * plain["samples_per_second"]
    assert fast["samples_per_second"] >= 3 * max(full["samples_per_second"], speed["full_fp16_32x1"]["samples_per_second"])
    assert fast["peak_mb"] < full["peak_mb"]
    assert lean["samples_per_second"] >= 4 * plain["samples_per_second"] and lean["peak_mb"] <= plain["peak_mb"]


def test_the_ratios_are_those_of_the_figures(speed):
    speeds = {name: row["samples_per_second"] for name, row in by_method(speed).items()}
    assert speed["ratios"]["fast_over_plain"] == pytest.approx(speeds["qlora_fast"] / speeds["qlora_plain"])
    assert speed["ratios"]["fast_share_of_floor"] == pytest.approx(speeds["qlora_fast"] / speed["floor"]["qlora_samples_per_second"])
    seconds = speed["floor"]["qlora_tflop_a_step"] / speed["floor"]["matrix_tflops"]
    assert speed["floor"]["qlora_samples_per_second"] == pytest.approx(32 / seconds)


def test_the_ladder_of_the_reference_is_the_notebook_s(speed, notebook):
    assert [row["rung"] for row in speed["ladder"]] == list(notebook.ladder_rungs(notebook.Config()))
    assert [row["method"] for row in speed["efficiency"]] == list(notebook.efficiency_methods().index)


def test_fast_is_as_accurate_as_plain(accuracies):
    """Same seeds, model, data and learning rate: the 95 % interval of the difference of the means holds 0, and is narrow enough to say something."""
    fast, plain = accuracies["fast"], accuracies["plain"]
    for name in ("model", "dataset", "learning_rate", "num_train_epochs", "max_length"):
        assert fast[name] == plain[name], name
    scores = {name: [run["accuracy"] for run in runs["runs"]] for name, runs in accuracies.items()}
    assert [run["seed"] for run in fast["runs"]] == [run["seed"] for run in plain["runs"]] == [1, 2, 3]
    interval = ttest_ind(scores["fast"], scores["plain"], equal_var=False).confidence_interval(0.95)
    assert interval.low <= 0 <= interval.high and interval.high - interval.low < 0.02


def test_three_fast_epochs_take_at_most_75_seconds(accuracies):
    assert all(run["epochs"] == 3 and run["seconds"] <= 75 for run in accuracies["fast"]["runs"])


def test_the_readme_s_table_is_the_reference(speed):
    methods = by_method(speed)
    floors = {name: speed["floor"][f"{name}_samples_per_second"] for name in ("qlora", "full")}
    rows = {
        "full fine-tuning, fp16 autocast, 16 x 2": (methods["full_fp16"], floors["full"]),
        "full fine-tuning, fp16 autocast, 32 x 1": (speed["full_fp16_32x1"], floors["full"]),
        **{f"QLoRA, {name}": (methods[f"qlora_{name}"], floors["qlora"]) for name in ("plain", "lean", "fast")},
    }
    for name, (row, floor) in rows.items():
        share = row["samples_per_second"] / floor
        assert f"| {name} | {row['samples_per_second']:,.0f} | {row['peak_mb']:,.0f} | {share * 100:.0f} % |" in README


def test_the_notebook_s_table_is_the_reference(speed, notebook_text):
    for row in speed["ladder"]:
        assert f"| {row['rung']} | {row['samples_per_second']:,.0f} | {row['peak_mb']:,.0f} |" in notebook_text
    methods = by_method(speed)
    for row in (methods["full_fp16"], speed["full_fp16_32x1"], methods["qlora_fast"], *speed["tried"]):
        assert re.search(rf"\b{row['samples_per_second']:,.0f}\b", notebook_text) and f"{row['peak_mb']:,.0f}" in notebook_text


def test_the_texts_tell_the_accuracies_of_the_reference(accuracies, notebook_text):
    for text in (README, notebook_text):
        for runs in accuracies.values():
            assert ", ".join(f"{run['accuracy'] * 100:.1f}" for run in runs["runs"]) + " %" in text
            seconds = [run["seconds"] for run in runs["runs"]]
            assert f"{min(seconds):.0f} to {max(seconds):.0f} s" in text
