"""The notebook's form: its size, sections, folded cells, definitions that can be lifted, and one clean saved run."""

import ast
import builtins
import json
import re
import statistics
import symtable

import nbformat
import pytest
from conftest import NOTEBOOK, ROOT, code_cells
from notebook_api import is_definition

CODE_CELLS, CODE_LINES, WORDS, COLUMNS = 95, 1_700, 5_500, 100
CELL_LINES, LONG_CELL_LINES, LONG_CELLS = 45, 65, ("class Config(", "class GraphTrainer(")
MEDIAN_CELL_LINES = 12
DATA_BEFORE, TRAINING_BEFORE = 400, 900  # code lines: data was shown, section 8 begins
SECTIONS = {  # budgets of code cells and code lines
    "1 Setup": (5, 100),
    "2 Settings": (6, 180),
    "3 Data": (8, 190),
    "4 Tokens": (5, 60),
    "5 A baseline to beat": (5, 80),
    "6 The 4-bit base": (10, 150),
    "7 LoRA": (6, 80),
    "8 Training": (14, 330),
    "9 Evaluation": (10, 160),
    "10 Efficiency": (8, 160),
    "11 LoRA rank": (4, 80),
    "12 Using it": (7, 90),
    "13 Further": (3, 40),
}


@pytest.fixture(scope="module")
def saved():
    return nbformat.read(NOTEBOOK, as_version=4)


def markdown(saved) -> list[str]:
    return [cell.source for cell in saved.cells if cell.cell_type == "markdown"]


def headings(saved) -> list[str]:
    return re.findall(r"^## (.+)$", "\n".join(markdown(saved)), flags=re.MULTILINE)


def run_nodes(cell):
    """Yield what a cell does: all of it but its definitions."""
    for node in ast.parse(cell.source).body:
        if not is_definition(node):
            yield from ast.walk(node)


def last_line(does) -> int:
    """Return the number, among all code lines, of the last line of the one cell that `does` something."""
    found, lines = [], 0
    for cell in code_cells():
        lines += len(cell.source.splitlines())
        found += [lines] * any(does(node) for node in run_nodes(cell))
    (only,) = found
    return only


def begins(saved, section: str) -> int:
    """Return how many code lines stand before a section."""
    headings = [f"## {section}" in cell.source.splitlines() for cell in saved.cells]
    before = saved.cells[: headings.index(True)]
    return sum(len(cell.source.splitlines()) for cell in before if cell.cell_type == "code")


def reads_tables(node: ast.AST) -> bool:
    return isinstance(node, ast.Assign) and any(isinstance(to, ast.Name) and to.id == "tables" for to in node.targets)


def trains(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and getattr(node.func, "id", "") == "train_within_memory"


def templates(source: str) -> list[str]:
    """Return a cell's strings of more than one line, docstrings aside, and what HTML and Markdown are called with."""
    nodes = list(ast.walk(ast.parse(source)))
    documented = [
        node for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node)
    ]
    shown = [
        node for node in nodes if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("HTML", "Markdown")
    ]
    skipped = {node.body[0].value for node in documented}
    texts = [node for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    inside = {each for call in shown for each in ast.walk(call)}
    return [node.value for node in texts if node not in skipped and ("\n" in node.value or node in inside)]


def test_it_is_small_enough_to_be_read_to_the_end(saved):
    lengths = {cell.id: len(cell.source.splitlines()) for cell in code_cells()}
    lines = [line for cell in code_cells() for line in cell.source.splitlines()]
    long = {cell.id for cell in code_cells() if any(name in cell.source for name in LONG_CELLS)}
    texts = markdown(saved) + [text for cell in code_cells() for text in templates(cell.source)]
    rows = [  # what, how much, budget
        ("code cells", len(lengths), CODE_CELLS),
        ("code lines", len(lines), CODE_LINES),
        ("columns of a code line", max(map(len, lines)), COLUMNS),
        ("words", sum(len(text.split()) for text in texts), WORDS),
        ("lines of a cell", max(length for cell, length in lengths.items() if cell not in long), CELL_LINES),
        ("lines of Config and GraphTrainer", max(lengths[cell] for cell in long), LONG_CELL_LINES),
        ("cells that may be longer", len(long), len(LONG_CELLS)),
        ("lines of the median cell", statistics.median(lengths.values()), MEDIAN_CELL_LINES),
        ("code line at which data was seen", last_line(reads_tables), DATA_BEFORE - 1),
        ("code line at which section 8 begins", begins(saved, "8 Training"), TRAINING_BEFORE - 1),
    ]
    print(f"the cell that trains ends at code line {last_line(trains):,}, definitions and folded cells included")
    print(
        *(f"{what:<36}{size:>7,g} of {budget:,}{'  OVER' * (size > budget)}" for what, size, budget in rows), sep="\n"
    )
    assert [what for what, size, budget in rows if size > budget] == []


def test_the_sections_sizes_are_printed_beside_their_budgets(saved):
    sizes, section = dict.fromkeys(SECTIONS, (0, 0)), None
    for cell in saved.cells:
        if cell.cell_type == "markdown":
            section = ([section] + re.findall(r"^## (.+)$", cell.source, flags=re.MULTILINE))[-1]
        else:
            sizes[section] = sizes[section][0] + 1, sizes[section][1] + len(cell.source.splitlines())
    for name, (cells, lines) in sizes.items():
        print(f"{name:<24}{cells:>3} of {SECTIONS[name][0]:>2} cells {lines:>5} of {SECTIONS[name][1]:>3} lines")
    assert sum(cells for cells, _ in sizes.values()) == len(code_cells()) and all(cells for cells, _ in sizes.values())


def test_the_sections_are_those_of_the_design(saved):
    nbformat.validate(saved)
    assert headings(saved) == list(SECTIONS)


def test_the_sections_are_the_stations_of_the_workflow(saved):
    stations = re.findall(r'"(\d+ [^":]+)', (ROOT / "Flow" / "workflow.mmd").read_text(encoding="utf-8"))
    assert sorted({*stations}, key=lambda station: int(station.split()[0])) == headings(saved)


def test_the_contents_list_jumps_to_every_section(saved):
    links = re.findall(r"\[(\d+ [^\]]+)\]\(#([^)]+)\)", saved.cells[0].source)
    assert links == [(section, section.replace(" ", "-")) for section in SECTIONS]
    anchors = {target for text in markdown(saved) for target in re.findall(r"\]\(#([^)]+)\)", text)}
    assert anchors == {section.replace(" ", "-") for section in SECTIONS}


def test_plumbing_and_nothing_else_is_titled_and_folded():
    folds = {"jupyter": {"source_hidden": True}, "cellView": "form", "_kg_hide-input": True}
    plumbing = [cell for cell in code_cells() if "plumbing" in cell.metadata.get("tags", [])]
    assert plumbing
    for cell in code_cells():
        first = cell.source.splitlines()[0]
        found = {name: cell.metadata[name] for name in folds if name in cell.metadata}
        assert found == (folds if cell in plumbing else {}), first
        assert bool(re.match(r"# ?@title \w", first)) == (cell in plumbing), first


def test_the_reader_s_settings_have_a_cell_of_their_own():
    (cell,) = [cell for cell in code_cells() if "parameters" in cell.metadata.get("tags", [])]
    (node,) = ast.parse(cell.source).body
    assert ast.unparse(node) == "settings = {}"


def test_what_the_first_cell_installs_is_requirements_txt(notebook):
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    listed = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    assert set(notebook.REQUIREMENTS) == set(listed)
    assert len(notebook.REQUIREMENTS) == len(set(notebook.REQUIREMENTS))


def global_names(table: symtable.SymbolTable):
    for symbol in table.get_symbols():
        read = symbol.is_referenced() and not symbol.is_assigned() and not symbol.is_imported()
        if symbol.is_global() or (table.get_type() == "module" and read):
            yield symbol.get_name()
    for child in table.get_children():
        yield from global_names(child)


def test_definitions_read_no_global_but_imports_constants_and_definitions(notebook):
    allowed, read = {*dir(builtins), *vars(notebook)}, set()
    for cell in code_cells():
        tree = ast.parse(cell.source)
        tree.body = [node for node in tree.body if is_definition(node)]
        read |= {*global_names(symtable.symtable(ast.unparse(tree), "cell", "exec"))}
    assert len(read) > 100 and read - allowed == set()


def test_every_definition_says_what_it_does():
    found = [node for cell in code_cells() for node in ast.parse(cell.source).body]
    found = [node for node in found if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert found and [node.name for node in found if not ast.get_docstring(node)] == []


# What is saved in it


@pytest.fixture
def outputs(saved):
    """The saved outputs; a notebook that was not executed yet has none, and nothing to be tested here."""
    found = [output for cell in saved.cells if cell.cell_type == "code" for output in cell.outputs]
    if not found:
        pytest.skip("The notebook has no saved outputs: execute it, and save it.")
    return found


def texts(outputs) -> str:
    """Return all saved outputs except pictures, as JSON."""
    kinds = [(output.get("data") or output).items() for output in outputs]
    return json.dumps([{name: value for name, value in kind if not name.startswith("image/")} for kind in kinds])


def test_the_saved_outputs_are_of_one_clean_run(saved, outputs):
    cells = [cell for cell in saved.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"] == []
    assert "Warning" not in texts(outputs)
    assert NOTEBOOK.stat().st_size < 4e6


def test_nothing_local_or_private_is_saved_in_it(saved, outputs):
    text = texts(outputs) + "".join(cell.source for cell in saved.cells)
    assert not re.search(r"/(root|home|work|tmp|Users|mnt|opt)/", text)
    assert not re.search(r"hf_[A-Za-z0-9]{20,}|\b[0-9a-f]{40}\b", text)


def test_every_figure_is_saved_in_it(saved, outputs):
    drawn = [
        cell for cell in saved.cells if cell.cell_type == "code" and re.search(r"^save_figure\(", cell.source, re.M)
    ]
    assert len(drawn) == 6
    for cell in drawn:
        assert any("image/png" in output.get("data", {}) for output in cell.outputs), cell.source.splitlines()[-1]


def test_no_placeholder_is_left_in_the_saved_run(saved, outputs):
    assert re.findall(r"@@\w+@@", "\n".join(markdown(saved))) == []
