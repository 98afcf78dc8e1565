"""The saved runs and the studies: their figures are those of README and lesson."""

import json
import re
import sys

import nbformat
import numpy as np
import pytest
from conftest import NOTEBOOK, ROOT

sys.path.insert(0, str(ROOT))

from benchmarks import accuracy_report, report, statistics, words  # noqa: E402


def read(name: str):
    """Return what a JSON file of the reference folder holds."""
    return json.loads((report.REFERENCE / name).read_text(encoding="utf-8"))


def rows_by(column: str, rows: list[dict]) -> dict[str, dict]:
    """Return rows by the names in one of their columns."""
    return {row[column]: row for row in rows}


def read_lesson() -> str:
    """Return the notebook's markdown."""
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


README = (ROOT / "README.md").read_text(encoding="utf-8")
LESSON = read_lesson()
SAVED_RUNS = sorted(path.name for path in report.REFERENCE.glob("results*.json"))
RESULTS = read("results.json")
METHODS = rows_by("method", RESULTS["efficiency"])
ACCURACY = accuracy_report.summarize(read("accuracy.json")["runs"])
SPEED = statistics.medians(
    [run for run in read("speed.json")["runs"] if run["model"] == "random"]
)
MEMORY = read("memory.json")["runs"]


def section(text: str, title: str) -> str:
    """Return the section of a text in Markdown that has this title."""
    for part in re.split(r"(?m)^#+ ", text):
        if part.startswith(title):
            return part
    raise ValueError(f"There is no section {title}.")


def numbers(text: str) -> set[str]:
    """Return the numbers in a text, as they are written: 1,306 or 93.7."""
    return set(re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", text))


def table_rows(text: str) -> list[list[str]]:
    """Return the cells of each row of the tables in a text in Markdown."""
    rows = []
    for line in text.splitlines():
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line[1:-1].split("|")])
    return rows


# ---- The saved runs


@pytest.mark.parametrize("scored", ["test", "test_merged"])
@pytest.mark.parametrize("name", SAVED_RUNS)
def test_the_scores_are_those_of_the_confusion_matrix(name, scored, notebook):
    results = read(name)
    scores = results[scored]
    matrix = np.array(scores["confusion_matrix"])
    assert matrix.sum() == scores["n"] == results["provenance"]["rows"]["test"]
    for kind, value in notebook.scores_of(matrix).items():
        low, high = scores[f"{kind}_ci95"]
        assert scores[kind] == pytest.approx(value)
        assert low < value < high


@pytest.mark.parametrize("name", SAVED_RUNS)
def test_the_readme_gives_the_scores_of_each_saved_run(name, notebook):
    assert notebook.percent(read(name)["test"]) in README


def test_the_saved_run_has_the_default_recipe(notebook):
    config = RESULTS["provenance"]["config"]
    changed = set()
    for name, default in notebook.Config().model_dump().items():
        if config[name] != default:
            changed.add(name)
    # the last: the names of this family for query and value
    assert changed <= {"model_name", "dataset_name", "target_modules"}


def test_the_saved_run_was_captured():
    assert RESULTS["training"]["captured_share"] >= 0.95


def test_the_readme_gives_the_figures_of_the_saved_run(notebook):
    training = RESULTS["training"]
    text = section(README, "Results")
    tfidf = RESULTS["baselines"]["tfidf_logreg"]
    assert notebook.percent(RESULTS["test_merged"]) in text
    assert notebook.percent(tfidf) in text
    assert f"{RESULTS['provenance']['largest_class']:.1%}" in text
    assert f"{training['seconds']:.0f} s" in text
    assert f"{training['peak_mb']:,.0f} MB" in text
    assert f"{training['captured_share']:.1%}" in text


@pytest.mark.parametrize("text", [README, LESSON], ids=["README", "lesson"])
def test_no_figure_is_still_a_placeholder(text):
    assert "@@" not in text


def test_the_lesson_gives_the_scores_of_the_saved_run():
    found = numbers(section(LESSON, "9 Evaluation"))
    tfidf = RESULTS["baselines"]["tfidf_logreg"]
    gain = 100 * (RESULTS["test"]["accuracy"] - tfidf["accuracy"])
    assert f"{100 * RESULTS['test']['accuracy']:.1f}" in numbers(LESSON)
    assert f"{gain:.1f} points above the TF-IDF baseline" in LESSON
    assert f"{100 * RESULTS['calibration']['ece']:.1f}" in found


def test_the_lesson_gives_the_speeds_of_the_saved_run():
    found = numbers(section(LESSON, "10 Efficiency"))
    eager = METHODS["QLoRA, eager"]["samples_per_second"]
    captured = METHODS["QLoRA"]["samples_per_second"]
    full = METHODS["full fine-tuning"]["samples_per_second"]
    assert {f"{eager:,.0f}", f"{captured:,.0f}"} <= found
    assert f"{captured / eager:.1f}" in found
    assert f"{100 * captured / full:.0f}" in found


def test_the_lesson_gives_the_memory_of_the_saved_run():
    found = numbers(section(LESSON, "10 Efficiency"))
    eager = METHODS["QLoRA, eager"]["peak_mb"]
    captured = METHODS["QLoRA"]
    full = METHODS["full fine-tuning"]
    assert f"{captured['peak_mb'] - eager:.0f}" in found
    for row in (captured, full):
        assert f"{row['peak_mb']:,.0f}" in found
        assert f"{row['weights_mb']:,.0f}" in found


def test_the_lesson_gives_the_peaks_of_the_memory_study():
    shown = {}
    for model, *cells in table_rows(section(LESSON, "10 Efficiency")):
        shown[model] = cells[1:]
    methods = [
        "full fine-tuning",
        "LoRA, 16-bit base, checkpointed",
        "QLoRA, default",
        "QLoRA, lean",
    ]
    needed = {}
    for run in MEMORY:
        gigabytes = f"{statistics.needed_mb(run) / 1000:.1f}"
        needed[run["model"], run["method"]] = gigabytes
    for model in report.count_parameters(MEMORY):
        assert shown[model] == [needed[model, method] for method in methods]


def test_the_lesson_gives_the_ranks_of_the_saved_run():
    found = numbers(section(LESSON, "11 LoRA rank"))
    trained = []
    for row in RESULTS["rank_sensitivity"]:
        if row["rank"] in (1, 16):
            trained.append(row)
    assert len(trained) == 2
    for row in trained:
        assert f"{100 * row['accuracy']:.1f}" in found


# ---- The studies


SHOWN = [
    "frozen-512",
    "tfidf-logreg",
    "tfidf-nb-svm",
    "default",
    "full-256",
    "recommended",
    "recommended-fast",
    "recommended-fast-16-bit",
    "full-512",
]


@pytest.mark.parametrize("text", [README, section(LESSON, "9 Evaluation")])
@pytest.mark.parametrize("recipe", SHOWN)
def test_the_texts_give_the_row_of_the_accuracy_study(recipe, text):
    row = ACCURACY[recipe]
    assert len(row.runs) == 3
    cells = [words.percent(*row.further), words.number(row.peak_mb)]
    assert cells in [shown[1:] for shown in table_rows(text)]


def test_the_readme_gives_the_accuracies_on_the_longest_texts():
    text = section(README, "Results")
    for recipe in ("default", "recommended", "tfidf-nb-svm"):
        longest = [run["by_length"][-1] for run in ACCURACY[recipe].runs]
        assert words.percent(statistics.mean(longest, "share")) in text


@pytest.mark.parametrize("text", [README, section(LESSON, "9 Evaluation")])
def test_the_texts_give_what_the_four_bits_cost(text):
    four_bits = ACCURACY["recommended-fast"].runs
    sixteen_bits = ACCURACY["recommended-fast-16-bit"].runs
    difference = statistics.paired(four_bits, sixteen_bits, "shipped_further")
    assert words.points(*difference) in text


def test_the_lesson_gives_what_longer_reading_brings_full_fine_tuning():
    difference, _ = ACCURACY["full-256"].over_full
    assert f"{-100 * difference:.1f} points more at 512" in LESSON


def test_the_lesson_gives_the_lead_of_recommended_by_length():
    pairs = statistics.pairs(ACCURACY["recommended"].runs, ACCURACY["default"].runs)
    found = numbers(section(LESSON, "9 Evaluation"))
    leads = []
    for place in range(4):
        ours = [run["by_length"][place] for run, _ in pairs]
        theirs = [run["by_length"][place] for _, run in pairs]
        lead = statistics.mean(ours, "share") - statistics.mean(theirs, "share")
        leads.append(f"{100 * lead:.1f}")
    assert set(leads) <= found


def test_the_lesson_gives_both_scores_of_the_repeated_training():
    found = numbers(section(LESSON, "9 Evaluation"))
    again = next(run for run in ACCURACY["full-512"].runs if run["seed"] == 1)
    rate = again["learning_rate"]
    for run in read("accuracy.json")["runs"]:
        is_one = run["recipe"] in ("full-512", f"search-full-{rate:g}")
        if is_one and run["seed"] == 1:
            assert f"{100 * run['validation']:.1f}" in found


@pytest.mark.parametrize("text", [README, section(LESSON, "9 Evaluation")])
def test_the_texts_give_what_few_labels_are_worth(text):
    groups = report.label_groups(read("labels.json")["runs"])
    for key in ((250, "QLoRA"), (15_945, "TF-IDF")):
        accuracy = statistics.accuracy(groups[key], "test", same_texts=False)
        assert words.percent(*accuracy) in text


@pytest.mark.parametrize(
    ("shown", "method"),
    [
        ("full fine-tuning, 32 x 1", "full, captured, 32 x 1"),
        (
            "full fine-tuning, 16 x 2, checkpointed",
            "full, captured, 16 x 2, checkpointed",
        ),
        ("LoRA on 16 bits, as `fast`", "LoRA 16-bit, captured, as fast"),
        ("LoRA on 16 bits, as `lean`", "LoRA 16-bit, captured, as lean"),
        ("QLoRA, default", "QLoRA default, captured"),
        ("QLoRA, `fast`", "QLoRA fast, captured"),
        ("QLoRA, `lean`", "QLoRA lean, captured"),
    ],
)
def test_the_readme_gives_the_row_of_the_speed_study(shown, method):
    row = SPEED[method]
    cells = [
        shown,
        words.number(row["peak_mb"]),
        words.number(row["samples_per_second"]),
    ]
    assert cells in table_rows(section(README, "Efficiency"))


def test_the_readme_gives_the_ratios_of_the_speed_study():
    found = numbers(section(README, "Efficiency"))
    ratios = statistics.ratios(SPEED)
    assert f"{ratios['fast_over_full_captured']:.2f}" in found
    assert f"{100 * ratios['fast_peak_over_full_captured']:.1f}" in found
    assert f"{ratios['default_captured_over_eager']:.1f}" in found
    assert f"{ratios['fast_over_full_compiled']:.2f}" in found
    compiled_peak = SPEED["full, compiled, 32 x 1"]["peak_mb"]
    peak = SPEED["QLoRA fast, captured"]["peak_mb"] / compiled_peak
    assert f"{100 * peak:.1f}" in found


@pytest.mark.parametrize(
    "words",
    [
        "NF4, double quantization",
        "gradient checkpointing",
        "fp16; paged 8-bit AdamW",
        "`load_in_4bit`, `nf4`",
        "DataCollatorWithPadding",
        "`TaskType.SEQ_CLS`",
        "cosine, 10% warm-up",
        "early stopping",
    ],
)
def test_the_readme_names_the_techniques_and_settings(words):
    assert words in README


def test_the_report_is_that_of_its_files(tmp_path):
    report.write(report.REFERENCE, tmp_path / "REPORT.md", None)
    expected = (report.REFERENCE / "REPORT.md").read_text(encoding="utf-8")
    assert (tmp_path / "REPORT.md").read_text(encoding="utf-8") == expected


def test_the_readme_s_diagram_is_the_flow():
    flow = (ROOT / "Flow" / "workflow.mmd").read_text(encoding="utf-8").rstrip()
    diagram = re.search(r"```mermaid\n(.*?)\n```", README, flags=re.DOTALL)[1]
    assert diagram == flow
