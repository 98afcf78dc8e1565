"""The notebook's form: plain code of a bounded size, sections, and one clean run."""

import ast
import io
import json
import re
import tokenize
from collections import Counter

import nbformat
import pytest
from conftest import NOTEBOOK, ROOT, code_cells
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

SECTIONS = [
    "1 Setup",
    "2 Settings",
    "3 Data",
    "4 Tokens",
    "5 A baseline to beat",
    "6 The 4-bit base",
    "7 LoRA",
    "8 Training",
    "9 Evaluation",
    "10 Efficiency",
    "11 LoRA rank",
    "12 Using it",
    "13 Further",
]
LIMITS = {
    "tokens": 19_500,
    "tokens per line": 9.2,
    "comprehensions per 100 lines": 4,
    "conditional expressions per 100 lines": 2.5,
    "lines over 88 columns": 0,
    "open lines before training": 600,
    "code cells": 95,
    "cells over 45 lines": 2,
    "lines of the longest cell": 65,
    "words": 4_600,
}
ANCHORS = [section.replace(" ", "-") for section in SECTIONS]
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@pytest.fixture(scope="module")
def saved():
    return nbformat.read(NOTEBOOK, as_version=4)


def markdown(saved) -> str:
    """Return all text between the code cells."""
    cells = [cell.source for cell in saved.cells if cell.cell_type == "markdown"]
    return "\n".join(cells)


def by_section(saved):
    """Return the code cells of each section, by its number."""
    cells = {}
    section = 0
    for cell in saved.cells:
        heading = re.search(r"^## (\d+) ", cell.source, re.MULTILINE)
        if cell.cell_type == "code":
            cells.setdefault(section, []).append(cell)
        elif heading:
            section = int(heading[1])
    return cells


def is_folded(cell) -> bool:
    return "jupyter" in cell.metadata


def docstring_lines(source) -> set[int]:
    """Return the numbers of the lines that are docstrings."""
    numbers = set()
    for node in ast.walk(ast.parse(source)):
        is_documented = isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module))
        if is_documented and ast.get_docstring(node):
            docstring = node.body[0]
            numbers.update(range(docstring.lineno, docstring.end_lineno + 1))
    return numbers


def code_lines(source) -> list[str]:
    """Return the lines that are neither blank nor comments nor docstrings."""
    docstrings = docstring_lines(source)
    lines = []
    for number, line in enumerate(source.split("\n"), 1):
        text = line.strip()
        if text and not text.startswith("#") and number not in docstrings:
            lines.append(line)
    return lines


def count_tokens(source) -> int:
    """Count names, operators, numbers and strings, docstrings aside."""
    docstrings = docstring_lines(source)
    count = 0
    inside = 0  # from Python 3.12 on an f-string is many tokens; here it is one
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = tokenize.tok_name[token.type]
        if kind == "FSTRING_END":
            inside -= 1
        counts = kind in ("NAME", "OP", "NUMBER", "STRING", "FSTRING_START")
        if counts and not inside and token.start[0] not in docstrings:
            count += 1
        if kind == "FSTRING_START":
            inside += 1
    return count


def calls(cell) -> Counter:
    """Count what a cell calls, by the last name; any class of Trainer is "Trainer"."""
    found = Counter()
    for node in ast.walk(ast.parse(cell.source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).split(".")[-1]
            found[re.sub(r"^\w*Trainer$", "Trainer", name)] += 1
    return found


def open_lines_before_training(saved) -> int:
    """Count the open lines up to the end of the cell of section 8 that trains."""
    count = 0
    for section, cells in by_section(saved).items():
        for cell in cells:
            if is_folded(cell):
                continue
            count += len(code_lines(cell.source))
            if section == 8 and "train" in calls(cell):
                return count
    raise AssertionError("section 8 trains nothing in an open cell")


@pytest.fixture(scope="module")
def figures(saved):
    """The figures that LIMITS limits."""
    n = Counter()
    longest = 0
    for cell in code_cells():
        n["code cells"] += 1
        n["code lines"] += len(code_lines(cell.source))
        n["tokens"] += count_tokens(cell.source)
        lines = cell.source.split("\n")
        longest = max(longest, len(lines))
        if len(lines) > 45:
            n["long cells"] += 1
        for line in lines:
            if len(line) > 88:
                n["long lines"] += 1
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, COMPREHENSIONS):
                n["comprehensions"] += 1
            if isinstance(node, ast.IfExp):
                n["conditionals"] += 1
    per_100 = 100 / n["code lines"]
    return {
        "tokens": n["tokens"],
        "tokens per line": n["tokens"] / n["code lines"],
        "comprehensions per 100 lines": n["comprehensions"] * per_100,
        "conditional expressions per 100 lines": n["conditionals"] * per_100,
        "lines over 88 columns": n["long lines"],
        "open lines before training": open_lines_before_training(saved),
        "code cells": n["code cells"],
        "cells over 45 lines": n["long cells"],
        "lines of the longest cell": longest,
        "words": len(markdown(saved).split()),
    }


@pytest.mark.parametrize("figure", LIMITS)
def test_it_is_plain_enough_to_be_read_to_the_end(figures, figure):
    assert figures[figure] <= LIMITS[figure]


@pytest.mark.parametrize(
    ("section", "name"),
    [
        (6, "BitsAndBytesConfig"),
        (6, "from_pretrained"),
        (7, "prepare_model_for_kbit_training"),
        (7, "LoraConfig"),
        (7, "get_peft_model"),
        (8, "TrainingArguments"),
        (8, "Trainer"),
        (8, "train"),
        (9, "merge_and_unload"),
        (12, "pipeline"),
    ],
)
def test_the_lesson_s_own_calls_are_in_sight(saved, section, name):
    called = Counter()
    for cell in by_section(saved)[section]:
        if not is_folded(cell):
            called += calls(cell)
    assert name in called


def test_every_definition_says_what_it_does():
    silent = []
    n_definitions = 0
    for cell in code_cells():
        for node in ast.parse(cell.source).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                n_definitions += 1
                if not ast.get_docstring(node):
                    silent.append(node.name)
    assert n_definitions > 50
    assert silent == []


def test_it_is_a_valid_notebook(saved):
    nbformat.validate(saved)


def test_the_sections_are_those_of_the_design(saved):
    headings = re.findall(r"^## (.+)$", markdown(saved), re.MULTILINE)
    assert headings == SECTIONS


def test_the_contents_lead_to_every_section(saved):
    links = re.findall(r"\[(\d+ [^\]]+)\]\(#([^)]+)\)", saved.cells[0].source)
    assert links == list(zip(SECTIONS, ANCHORS))


def test_no_link_within_the_notebook_is_broken(saved):
    anchors = re.findall(r"\]\(#([^)]+)\)", markdown(saved))
    assert set(anchors) <= set(ANCHORS)


def test_the_workflow_shows_every_section():
    workflow = (ROOT / "Flow" / "workflow.mmd").read_text(encoding="utf-8")
    stations = set(re.findall(r'"(\d+ [^":]+)', workflow))
    assert stations == set(SECTIONS)


def test_plumbing_is_folded_everywhere_and_nothing_else_is():
    folds = {
        "jupyter": {"source_hidden": True},
        "cellView": "form",  # Colab
        "_kg_hide-input": True,  # Kaggle
        "tags": ["plumbing"],
    }
    for cell in code_cells():
        first = cell.source.split("\n")[0]
        if first.startswith("# @title "):
            assert cell.metadata.items() >= folds.items(), first
        else:
            assert cell.metadata.keys() & folds.keys() <= {"tags"}, first
            assert "plumbing" not in cell.metadata.get("tags", []), first


def test_the_reader_s_settings_are_empty_when_it_is_shipped():
    (cell,) = [c for c in code_cells() if "parameters" in c.metadata.get("tags", [])]
    assert ast.unparse(ast.parse(cell.source)) == "settings = {}"


def test_settings_of_papermill_come_before_they_are_read():
    node = load_notebook_node(str(NOTEBOOK))
    cells = parameterize_notebook(node, {"settings": {"seed": 7}}).cells
    text = "\n".join(cell.source for cell in cells)
    own = text.index("\nsettings = {}")
    injected = text.index('\nsettings = {"seed": 7}')
    read = text.index("resolve_config(settings, os.environ")
    assert own < injected < read


def test_the_first_cell_installs_what_requirements_txt_names(notebook):
    needed = []
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").split("\n"):
        if line and not line.startswith(("#", "wandb>", "ipywidgets>")):  # optional
            needed.append(line)
    assert sorted(notebook.REQUIREMENTS) == sorted(needed)


@pytest.fixture
def outputs():
    """The saved outputs. A notebook that was not executed yet has none to be tested."""
    found = [output for cell in code_cells() for output in cell.outputs]
    if not found:
        pytest.skip("The notebook has no saved outputs: execute it, and save it.")
    return found


@pytest.fixture
def shown(outputs) -> str:
    """All saved outputs except pictures, as JSON."""
    texts = []
    for output in outputs:
        for kind, content in output.get("data", output).items():
            if not kind.startswith("image/"):
                texts.append(json.dumps(content))
    return "\n".join(texts)


@pytest.mark.usefixtures("outputs")
def test_the_saved_run_went_from_top_to_bottom():
    counts = [cell.execution_count for cell in code_cells()]
    assert counts == list(range(1, len(counts) + 1))


def test_the_saved_run_is_without_errors_and_warnings(outputs, shown):
    for output in outputs:
        assert output.output_type != "error"
        assert output.get("name") != "stderr"
    assert "Warning" not in shown


@pytest.mark.usefixtures("outputs")
def test_every_figure_of_the_saved_run_is_in_it():
    cells = [c for c in code_cells() if 'figure.savefig(data_dir / "' in c.source]
    assert len(cells) == 6
    for cell in cells:
        assert any("image/png" in output.get("data", {}) for output in cell.outputs)


@pytest.mark.usefixtures("outputs")
def test_the_text_names_the_figures_of_the_saved_run(saved):
    placeholders = re.findall(r"@@\w+@@", markdown(saved))
    assert placeholders == []


def test_it_is_small_enough_to_be_shown_by_github():
    assert NOTEBOOK.stat().st_size < 4e6


@pytest.mark.usefixtures("outputs")
def test_nothing_local_or_private_is_saved_in_it(saved, shown):
    text = shown + "".join(cell.source for cell in saved.cells)
    assert not re.search(r"/(root|home|work|tmp|Users|mnt|opt)/", text)
    assert not re.search(r"hf_[A-Za-z0-9]{20,}|\b[0-9a-f]{40}\b", text)
