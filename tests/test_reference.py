"""The saved run: its figures agree with each other, and the README and the notebook give them as they are."""

import json
import re

import nbformat
import numpy as np
import pytest
from conftest import NOTEBOOK, ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = json.loads((ROOT / "Data" / "reference" / "results.json").read_text(encoding="utf-8"))
METHODS = {row["method"]: row for row in RESULTS["efficiency"]}
ROWS = {  # of the README's table of efficiency
    "full fine-tuning, fp16, captured as CUDA graphs": "full fp16, captured",
    "LoRA on an fp16 base, captured": "LoRA fp16, captured",
    "QLoRA, default, eager": "QLoRA default",
    "QLoRA, default, captured": "QLoRA default, captured",
}


def saved_text() -> str:
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def percent(scores: dict) -> str:
    low, high = scores["accuracy_ci95"]
    return f"{scores['accuracy']:.1%} [{100 * low:.1f}, {100 * high:.1f}]"


@pytest.mark.parametrize("name", ["test", "test_merged"])
def test_the_scores_are_those_of_the_confusion_matrix(name, notebook):
    scores = RESULTS[name]
    matrix = np.array(scores["confusion_matrix"])
    assert matrix.sum() == scores["n"] == RESULTS["provenance"]["rows"]["test"]
    for each, value in notebook.rates(matrix).items():
        assert scores[each] == pytest.approx(value) and scores[f"{each}_ci95"][0] < value < scores[f"{each}_ci95"][1]


def test_it_is_the_default_recipe_captured(notebook):
    config, ordered = RESULTS["provenance"]["config"], notebook.Config().model_dump()
    assert {name for name in config if config[name] != ordered[name]} <= {"model_name", "dataset_name"}
    assert RESULTS["training"]["captured_share"] >= 0.95


def test_the_readme_gives_its_figures():
    for name in ("test", "test_merged"):
        assert percent(RESULTS[name]) in README
    assert (
        percent(RESULTS["baselines"]["tfidf_logreg"]) in README
        and f"{RESULTS['provenance']['largest_class']:.1%}" in README
    )
    training = RESULTS["training"]
    assert f"| {training['seconds']:.0f} | {training['peak_mb']:.0f} | {training['captured_share']:.1%} |" in README
    for shown, name in ROWS.items():
        row = METHODS[name]
        cells = [row["weights_mb"], row["peak_mb"], row["samples_per_second"]]
        line = " | ".join([shown, f"{row['trainable_parameters']:,}", *(f"{cell:,.0f}" for cell in cells)])
        assert f"| {line} |" in README


def test_the_notebook_s_ratios_are_those_of_the_run():
    text = saved_text()
    eager, captured, full = (METHODS[n] for n in ("QLoRA default", "QLoRA default, captured", "full fp16, captured"))
    speeds = [each["samples_per_second"] for each in (eager, captured, full, METHODS["LoRA fp16, captured"])]
    assert f"{speeds[1] / speeds[0]:.1f} times as fast, {speeds[0]:.0f} to {speeds[1]:,.0f} texts per second" in text
    assert f"{captured['peak_mb'] - eager['peak_mb']:.0f} MB more" in text
    assert f"{speeds[1] / speeds[2]:.0%} of captured full fine-tuning and {speeds[1] / speeds[3]:.0%}" in text
    assert f"{full['peak_mb']:.0f} to {METHODS['LoRA fp16, captured']['peak_mb']:.0f} MB" in text
    ranks = {(row["modules"], row["rank"]): row["accuracy"] for row in RESULTS["rank_sensitivity"]}
    shown = [ranks["query, value", 1], ranks["query, value", 16], ranks["all-linear", 16]]
    assert all(f"{accuracy:.1%}" in text for accuracy in shown)


def test_the_readme_s_diagram_is_the_flow():
    flow = (ROOT / "Flow" / "workflow.mmd").read_text(encoding="utf-8").rstrip()
    assert re.search(r"```mermaid\n(.*?)\n```", README, flags=re.DOTALL).group(1) == flow


@pytest.mark.parametrize("preset", ["fast", "lean"])
def test_the_readme_gives_the_figures_of_the_other_presets(preset):
    results = json.loads((ROOT / "Data" / "reference" / f"results-{preset}.json").read_text(encoding="utf-8"))
    training = results["training"]
    cells = [f"{training['seconds']:.0f}", f"{training['peak_mb']:.0f}", f"{training['captured_share']:.1%}"]
    assert results["provenance"]["config"]["preset"] == preset and training["captured_share"] >= 0.95
    assert re.search(rf"`{preset}`.*\| {results['test']['accuracy']:.1%} \| {re.escape(' | '.join(cells))} \|", README)
