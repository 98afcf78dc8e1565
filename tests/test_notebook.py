"""The notebook's form: its size, sections, folded cells, definitions that can be lifted, and one clean saved run."""

import ast
import json
import re
import statistics

import nbformat
import pytest
from conftest import NOTEBOOK, ROOT, code_cells
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

SECTIONS = ["1 Setup", "2 Settings", "3 Data", "4 Tokens", "5 A baseline to beat", "6 The 4-bit base", "7 LoRA"]
SECTIONS += ["8 Training", "9 Evaluation", "10 Efficiency", "11 LoRA rank", "12 Using it", "13 Further"]
LONG_CELLS = ("class Config(", "class GraphTrainer(")
BUDGETS = {"code cells": 95, "columns of a code line": 100, "words": 5_500, "lines of a cell": 45}
BUDGETS |= {"lines of Config and GraphTrainer": 65, "lines of the median cell": 12}


@pytest.fixture(scope="module")
def saved():
    return nbformat.read(NOTEBOOK, as_version=4)


def markdown(saved) -> list[str]:
    return [cell.source for cell in saved.cells if cell.cell_type == "markdown"]


def long_texts(source: str) -> list[str]:
    """Return a cell's strings of more than one line, docstrings aside."""
    nodes = list(ast.walk(ast.parse(source)))
    documented = {ast.get_docstring(n, clean=False) for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [text for text in texts if "\n" in text and text not in documented]


def test_it_is_small_enough_to_be_read_to_the_end(saved):
    cells = [cell.source for cell in code_cells()]
    lines = [line for source in cells for line in source.splitlines()]
    lengths = {source: len(source.splitlines()) for source in cells}
    long = [source for source in cells if any(name in source for name in LONG_CELLS)]
    texts = markdown(saved) + [text for source in cells for text in long_texts(source)]
    sizes = [len(cells), max(map(len, lines)), sum(len(text.split()) for text in texts)]
    sizes += [max(lengths[source] for source in cells if source not in long), max(lengths[source] for source in long)]
    sizes += [statistics.median(lengths.values())]
    assert len(long) == len(LONG_CELLS)
    assert {what: (size, most) for (what, most), size in zip(BUDGETS.items(), sizes, strict=True) if size > most} == {}


def test_the_sections_are_those_of_the_design_the_contents_and_the_workflow(saved):
    nbformat.validate(saved)
    stations = re.findall(r'"(\d+ [^":]+)', (ROOT / "Flow" / "workflow.mmd").read_text(encoding="utf-8"))
    links = re.findall(r"\[(\d+ [^\]]+)\]\(#([^)]+)\)", saved.cells[0].source)
    anchors = {target for text in markdown(saved) for target in re.findall(r"\]\(#([^)]+)\)", text)}
    headings = re.findall(r"^## (.+)$", "\n".join(markdown(saved)), flags=re.MULTILINE)
    assert headings == SECTIONS == sorted({*stations}, key=lambda station: int(station.split()[0]))
    assert links == [(each, each.replace(" ", "-")) for each in SECTIONS] and anchors == {*dict(links).values()}


def test_plumbing_and_nothing_else_is_titled_and_folded():
    folds = {"jupyter": {"source_hidden": True}, "cellView": "form", "_kg_hide-input": True}
    plumbing = [cell for cell in code_cells() if "plumbing" in cell.metadata.get("tags", [])]
    assert plumbing
    for cell in code_cells():
        first = cell.source.splitlines()[0]
        found = {name: cell.metadata[name] for name in folds if name in cell.metadata}
        assert found == (folds if cell in plumbing else {}), first
        assert bool(re.match(r"# ?@title \w", first)) == (cell in plumbing), first


def test_the_reader_s_settings_have_a_cell_of_their_own_behind_which_papermill_puts_others(saved):
    (place,) = [place for place, cell in enumerate(saved.cells) if "parameters" in cell.metadata.get("tags", [])]
    assert ast.unparse(ast.parse(saved.cells[place].source)) == "settings = {}"
    cells = parameterize_notebook(load_notebook_node(str(NOTEBOOK)), {"settings": {"seed": 7}}).cells
    assert 'settings = {"seed": 7}' in cells[place + 1].source and len(cells) == len(saved.cells) + 1
    assert not any("resolve_config(settings" in cell.source for cell in cells[:place])


def test_the_first_cell_installs_requirements_txt_but_for_wandb_which_is_optional(notebook):
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    listed = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    needed = [line for line in listed if not line.startswith("wandb>")]
    assert sorted(notebook.REQUIREMENTS) == sorted(needed) and len(needed) == len(listed) - 1


def test_every_definition_says_what_it_does():
    found = [node for cell in code_cells() for node in ast.parse(cell.source).body]
    found = [node for node in found if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert found and [node.name for node in found if not ast.get_docstring(node)] == []


@pytest.fixture
def outputs():
    """The saved outputs; a notebook that was not executed yet has none, and nothing to be tested here."""
    found = [output for cell in code_cells() for output in cell.outputs]
    return found or pytest.skip("The notebook has no saved outputs: execute it, and save it.")


@pytest.fixture
def shown(outputs) -> str:
    """All saved outputs except pictures, as JSON."""
    kinds = [(output.get("data") or output).items() for output in outputs]
    return json.dumps([{name: value for name, value in kind if not name.startswith("image/")} for kind in kinds])


def test_the_saved_outputs_are_of_one_clean_run_with_every_figure(saved, outputs, shown):
    assert [cell.execution_count for cell in code_cells()] == list(range(1, len(code_cells()) + 1))
    assert [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"] == []
    assert "Warning" not in shown and NOTEBOOK.stat().st_size < 4e6
    assert re.findall(r"@@\w+@@", "\n".join(markdown(saved))) == []  # no placeholder of a figure is left
    drawn = [cell for cell in code_cells() if re.search(r"^save_figure\(", cell.source, re.M)]
    assert len(drawn) == 6 and all(any("image/png" in each.get("data", {}) for each in c.outputs) for c in drawn)


def test_nothing_local_or_private_is_saved_in_it(saved, shown):
    text = shown + "".join(cell.source for cell in saved.cells)
    assert not re.search(r"/(root|home|work|tmp|Users|mnt|opt)/", text)
    assert not re.search(r"hf_[A-Za-z0-9]{20,}|\b[0-9a-f]{40}\b", text)
