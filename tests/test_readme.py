"""The README: its commands, its tree, its links and pictures, its graph and its figures are those of the project."""

import dataclasses
import json
import re
import subprocess

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return [text for name, text in re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE) if name == language]


def test_its_make_commands_are_targets():
    commands = re.findall(r"^(?:QLORA_\S+ )*make (\w+)$", "\n".join(blocks("bash")), flags=re.MULTILINE)
    assert {"run", "test"} <= set(commands)
    for target in set(commands):
        assert subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True).returncode == 0, target


def test_ci_calls_the_readme_s_test_command():
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def test_its_links_and_pictures_exist():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("http")]
    assert len(links) > 10
    for link in links:
        assert (ROOT / link).exists(), link


def test_its_tree_is_the_repository_s():
    (tree,) = [block for block in blocks("") if "requirements.txt" in block]
    named = {line.split()[0].rstrip("/") for line in tree.splitlines()}
    for name in named:
        assert (ROOT / name).exists(), name
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    top = {path.split("/")[0] for path in tracked} - {"README.md", ".gitignore", ".ci"}
    assert top == {name.split("/")[0] for name in named}


def test_its_graph_is_the_workflow_s():
    assert blocks("mermaid") == [(ROOT / "Flow" / "workflow.mmd").read_text(encoding="utf-8")]


def test_every_node_of_the_graph_is_named_once_and_every_arrow_has_two_ends():
    lines = (ROOT / "Flow" / "workflow.mmd").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "flowchart TD"
    node = r'\w+(?:\["[^"]+"\]|\[\("[^"]+"\)\])?'
    for line in lines[1:]:
        assert re.fullmatch(rf"    {node} --> {node}", line), line
    names = re.findall(r'(\w+)(?:\["|\[\(")', "\n".join(lines))
    assert len(names) == len(set(names)) and set(re.findall(r"(\w+)(?=[\[ ]|$)", re.sub(r'\[.*?\]', "", "\n".join(lines[1:])))) - set(names) <= {""}


def test_its_settings_are_fields(notebook):
    fields = {field.name.upper() for field in dataclasses.fields(notebook.Config)}
    text = README + (ROOT / ".env.example").read_text(encoding="utf-8")
    used = set(re.findall(r"QLORA_([A-Z0-9_]+)=", text))
    assert used and used <= fields


@pytest.mark.parametrize("path", ["Data/reference/demo/results.json", "Data/reference/h100-all-minilm/results.json"])
def test_its_accuracies_are_those_of_the_reference_runs(path):
    results = json.loads((ROOT / path).read_text(encoding="utf-8"))
    (row,) = [line for line in README.splitlines() if line.startswith("|") and path in line]
    for scores in (results["test"], results["baselines"]["tfidf_logreg"]):
        low, high = scores["accuracy_ci95"]
        assert f"{scores['accuracy'] * 100:.1f} % [{low * 100:.1f}, {high * 100:.1f}]" in row
    assert f"{results['provenance']['wall_seconds']:.0f} s" in row


def test_its_ways_of_launching_are_the_notebook_s():
    (cell,) = [cell["source"] for cell in json.loads((ROOT / "QLoRA_BERT_TextClassification.ipynb").read_text(encoding="utf-8"))["cells"] if "**More GPUs.**" in "".join(cell["source"])]
    shown = re.findall(r"^```(?:python|bash)\n(.*?)^```$", "".join(cell), flags=re.DOTALL | re.MULTILINE)
    assert len(shown) == 3
    for block in shown:
        assert any(block in each for each in blocks("python") + blocks("bash")), block


def test_the_reference_runs_hold_no_machine_paths():
    for path in (ROOT / "Data" / "reference").rglob("*.json"):
        assert not re.search(r'"/(?!/)', path.read_text(encoding="utf-8")), path
