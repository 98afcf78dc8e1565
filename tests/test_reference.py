"""The saved run and the studies: their figures agree with each other, and README, report and notebook give them."""

import json
import re
import sys

import nbformat
import numpy as np
import pytest
from conftest import NOTEBOOK, ROOT

sys.path.insert(0, str(ROOT))

from benchmarks import recipes, report, speed  # noqa: E402

README = (ROOT / "README.md").read_text(encoding="utf-8")
LESSON = "\n".join(cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells)
RESULTS = json.loads((report.REFERENCE / "results.json").read_text(encoding="utf-8"))
METHODS = {row["method"]: row for row in RESULTS["efficiency"]}
SPEED = json.loads((report.REFERENCE / "speed.json").read_text(encoding="utf-8"))["models"]
ACCURACY = json.loads((report.REFERENCE / "accuracy.json").read_text(encoding="utf-8"))
ROWS = {  # of the README's table of efficiency
    "full fine-tuning, 32 x 1": "full fp16, captured, 32 x 1",
    "full fine-tuning, 16 x 2, checkpointed": "full fp16, captured, 16 x 2, checkpointed",
    "LoRA on fp16, 16 x 2, checkpointed": "LoRA fp16, captured, 16 x 2, checkpointed",
    "QLoRA, default": "QLoRA default, captured",
    "QLoRA, `fast`": "QLoRA fast, captured",
    "QLoRA, `lean`": "QLoRA lean, captured",
}


@pytest.mark.parametrize("scores", [RESULTS["test"], RESULTS["test_merged"]])
def test_the_scores_are_those_of_the_confusion_matrix(scores, notebook):
    matrix = np.array(scores["confusion_matrix"])
    assert matrix.sum() == scores["n"] == RESULTS["provenance"]["rows"]["test"]
    for each, value in notebook.rates(matrix).items():
        assert scores[each] == pytest.approx(value) and scores[f"{each}_ci95"][0] < value < scores[f"{each}_ci95"][1]


def test_it_is_the_default_recipe_captured(notebook):
    config, ordered = RESULTS["provenance"]["config"], notebook.Config().model_dump()
    changed = {name for name in config if config[name] != ordered[name]}
    assert changed <= {"model_name", "dataset_name", "target_modules"}  # the last: this family's query and value
    assert RESULTS["training"]["captured_share"] >= 0.95


def test_the_readme_gives_the_figures_of_the_run(notebook):
    shown = map(notebook.percent, (RESULTS["test"], RESULTS["test_merged"], *RESULTS["baselines"].values()))
    assert all(each in README for each in [*shown, f"{RESULTS['provenance']['largest_class']:.1%}"])
    costs = [RESULTS["training"][name] for name in ("seconds", "peak_mb", "captured_share")]
    assert "{:.0f} s and {:,.0f} MB, {:.1%} of its steps captured".format(*costs) in README


def test_the_readme_gives_the_rows_of_the_accuracy_study_and_these_follow_from_its_answers():
    names, rows = ("tfidf_nb_svm", "full_finetuning", "default", "recommended"), {}
    trained, stored = 3 * RESULTS["provenance"]["rows"]["train"], {row["name"]: row for row in ACCURACY["rows"]}
    for row in json.loads(json.dumps(recipes.summarize([run for run in ACCURACY["runs"] if run["recipe"] in names]))):
        rows[row["name"]] = row
        costs = [f"{cost:,.0f}" if row["peak_mb"] else "" for cost in (row["peak_mb"], trained / row["seconds"])]
        cells = [report.percent(row["final"], row["final_ci95"]), *costs, f"{row['seconds']:.0f}"]
        assert stored[row["name"]] | row == stored[row["name"]] and f"|{'|'.join(cells)}|" in README
        assert " | ".join(["", *cells[:2]]) in LESSON
    assert all(report.gap(rows["recommended"][f"final_over_{other}"]) in README for other in names[:2])
    groups = np.array([[group["texts"], *(group[name] for name in names)] for group in ACCURACY["by_length"]])
    assert groups[:, 0] @ groups[:, 1:] / groups[:, 0].sum() == pytest.approx([rows[name]["final"] for name in names])
    assert f"{100 * ACCURACY['by_length'][-1]['default']:.1f}% right" in README


def test_the_readme_gives_the_figures_of_the_speed_study():
    found = {row["method"]: row for row in SPEED["all-mpnet-base-v2"]["methods"]}
    for shown, name in ROWS.items():
        assert f"|{shown}|{found[name]['peak_mb']:,.0f}|{found[name]['samples_per_second']:,.0f}|" in README
    names = ("fast_over_full_captured", "lean_over_full_captured_checkpointed", "default_captured_over_eager")
    fast, lean = (SPEED["all-mpnet-base-v2"]["ratios"][name] for name in names[:2])
    assert f"{fast:.2f} times as fast as captured full fine-tuning" in README
    shapes = SPEED["bert-base, random weights"]["ratios"]
    assert f"{lean:.2f} times as fast as checkpointed" in README and f"to {shapes[names[2]]:.1f} times (bert" in README
    assert "{:.2f} and {:.2f}, `lean` at {:.0f} MB".format(*(shapes[n] for n in (*names[:2], "lean_peak_mb"))) in README


def test_the_ratios_follow_from_the_rounds():
    for found in SPEED.values():
        assert speed.ratios(found["methods"], found["floors"]) == found["ratios"]
        assert all(np.median(row["rounds"]) == row["samples_per_second"] for row in found["methods"] if row["measured"])


def test_the_report_is_that_of_its_files(tmp_path):
    report.write(report.REFERENCE, tmp_path / "REPORT.md", None)
    assert (tmp_path / "REPORT.md").read_text() == (report.REFERENCE / "REPORT.md").read_text(encoding="utf-8")


def test_the_notebook_s_figures_are_those_of_the_run():
    eager, captured, full = (METHODS[n] for n in ("QLoRA default", "QLoRA default, captured", "full fp16, captured"))
    speeds = [each["samples_per_second"] for each in (eager, captured, full, METHODS["LoRA fp16, captured"])]
    assert f"{speeds[1] / speeds[0]:.1f} times as fast, {speeds[0]:.0f} to {speeds[1]:,.0f} texts per second" in LESSON
    assert f"{captured['peak_mb'] - eager['peak_mb']:.0f} MB more" in LESSON
    assert f"{speeds[1] / speeds[2]:.0%} of captured full fine-tuning and {speeds[1] / speeds[3]:.0%}" in LESSON
    peaks = [each["peak_mb"] for each in (full, METHODS["LoRA fp16, captured"], captured)]
    assert "{:,.0f} MB, LoRA on an fp16 base {:,.0f}, QLoRA {:,.0f}".format(*peaks) in LESSON
    ranks = {(row["modules"], row["rank"]): row["accuracy"] for row in RESULTS["rank_sensitivity"]}
    assert all(f"{ranks[key]:.1%}" in LESSON for key in (("q, v", 1), ("q, v", 16), ("all-linear", 16)))


def test_the_readme_s_diagram_is_the_flow():
    flow = (ROOT / "Flow" / "workflow.mmd").read_text(encoding="utf-8").rstrip()
    assert re.search(r"```mermaid\n(.*?)\n```", README, flags=re.DOTALL).group(1) == flow
