"""The notebook's form: cells that define or run, lifted definitions, one clean run, nothing private or local in it."""

import ast
import builtins
import json
import re
import symtable

import nbformat
import pytest
from conftest import NOTEBOOK, ROOT, code_cells
from import_notebook import is_definition

SECTIONS = [
    "1 Environment",
    "2 Configuration",
    "3 Data",
    "4 Tokenization",
    "5 A baseline to beat",
    "6 The 4-bit base model",
    "7 LoRA adapters",
    "8 Training",
    "9 Evaluation",
    "10 Efficiency",
    "11 LoRA rank",
    "12 Using the adapter",
    "13 Going further",
]


@pytest.fixture(scope="module")
def committed():
    return nbformat.read(NOTEBOOK, as_version=4)


def outputs_text(nb) -> str:
    """Return all saved outputs except pictures, as JSON text."""
    kept = [{key: value for key, value in (output.get("data") or output).items() if not key.startswith("image/")} for cell in nb.cells if cell.cell_type == "code" for output in cell.outputs]
    return json.dumps(kept)


def test_it_is_a_valid_notebook(committed):
    nbformat.validate(committed)
    assert NOTEBOOK.stat().st_size < 4e6


def test_the_sections_are_the_stations_of_the_workflow(committed):
    headings = [heading for cell in committed.cells if cell.cell_type == "markdown" for heading in re.findall(r"^## (.+)$", cell.source, flags=re.MULTILINE)]
    stations = re.findall(r'\["(\d+ [^"]+)"\]', (ROOT / "Flow" / "workflow.mmd").read_text(encoding="utf-8"))
    assert headings == SECTIONS and sorted(stations, key=lambda station: int(station.split()[0])) == SECTIONS


def test_the_contents_list_jumps_to_every_section(committed):
    links = re.findall(r"\[([^\]]+)\]\(#([^)]+)\)", committed.cells[0].source)
    assert links[: len(SECTIONS)] == [(section, section.replace(" ", "-")) for section in SECTIONS]
    within = [heading.replace(" ", "-") for cell in committed.cells if cell.cell_type == "markdown" for heading in re.findall(r"^### (.+)$", cell.source, flags=re.MULTILINE)]
    assert len(links) > len(SECTIONS) and {target for _, target in links[len(SECTIONS) :]} <= set(within)


def test_the_first_cell_s_list_is_requirements_txt(committed):
    (cell,) = [cell.source for cell in committed.cells if cell.cell_type == "code" and "REQUIREMENTS = " in cell.source]
    lines = [line for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert re.search(r'REQUIREMENTS = """\n(.+?)\n"""', cell, flags=re.DOTALL).group(1).splitlines() == lines


def test_a_cell_either_defines_or_runs():
    for index, cell in enumerate(code_cells()):
        nodes = ast.parse(cell.source).body
        kinds = {is_definition(node) for node in nodes}
        assert len(kinds) == 1, f"code cell {index + 1} both defines and runs"
        assert len(cell.source.splitlines()) <= 60, f"code cell {index + 1} is over 60 lines"


def global_names(table: symtable.SymbolTable):
    for symbol in table.get_symbols():
        if symbol.is_global() or (table.get_type() == "module" and symbol.is_referenced() and not symbol.is_assigned()):
            yield symbol.get_name()
    for child in table.get_children():
        yield from global_names(child)


def test_definitions_read_no_global_but_imports_and_definitions(notebook):
    allowed = set(dir(builtins)) | set(vars(notebook))
    for index, cell in enumerate(code_cells()):
        tree = ast.parse(cell.source)
        if all(is_definition(node) for node in tree.body):
            assert set(global_names(symtable.symtable(cell.source, "cell", "exec"))) <= allowed, f"code cell {index + 1}"


def test_every_definition_says_what_it_returns():
    for cell in code_cells():
        for node in ast.parse(cell.source).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                assert ast.get_docstring(node), node.name


def test_the_saved_outputs_are_of_one_clean_run(committed):
    cells = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert "Warning" not in outputs_text(committed)


def test_nothing_local_or_private_is_in_it(committed):
    text = outputs_text(committed) + "".join(cell.source for cell in committed.cells)
    assert not re.search(r"/(root|home|work|tmp|Users|mnt|opt)/", text)
    assert not re.search(r"hf_[A-Za-z0-9]{20,}|[0-9a-f]{40}", re.sub(r'"git_commit": "[0-9a-f]{40}"', "", text))


def test_every_executed_figure_is_saved_in_it(committed):
    pictures = [output for cell in committed.cells if cell.cell_type == "code" for output in cell.outputs if "image/png" in (output.get("data") or {})]
    assert len(pictures) == 10  # on a GPU; the ladder's is missing without one
