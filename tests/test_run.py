"""The runs of hosts.py: what is shown, and what is written where."""

import json
import re
import subprocess
import sys
import zipfile

import pytest
from conftest import NOTEBOOK
from hosts import CLASSES, PARTS, PLOTS


@pytest.fixture(params=["colab", "kaggle"])
def host(request, hosts):
    return getattr(hosts, request.param)


def test_every_cell_runs(host):
    failed = [f"{error.ename}: {error.evalue}" for error in host.outputs("error")]
    assert failed == []
    for cell in host.nb.cells:
        assert cell.cell_type == "markdown" or cell.execution_count


def test_no_warning_is_shown(host):
    for output in host.outputs("stream"):
        assert output.name == "stdout", output.text
        assert "Warning" not in output.text


def test_nothing_is_installed_where_all_is_there(host):
    """There is no package index, which pip would say."""
    first = host.sections[1][0]
    assert host.nb.cells[first].outputs == []


def test_tables_and_the_progress_of_training_are_shown(host):
    shown = []
    for output in host.outputs("display_data", "execute_result"):
        shown.append(output.data.get("text/html", ""))
    assert sum("<table" in html for html in shown) >= 10
    assert any("<progress" in html and "Validation Loss" in html for html in shown)


def test_nobody_is_asked_for_a_key(host):
    assert not (host.folder / "asked.txt").exists()


def test_without_a_key_or_a_network_a_line_says_that_wandb_is_not_used(host):
    reason = {"colab": "no WANDB_API_KEY", "kaggle": "network"}[host.name]
    lines = host.printed().splitlines()
    (line,) = [line for line in lines if line.startswith("W&B")]
    assert "not used" in line
    assert reason in line


def test_nothing_is_written_above_the_working_folder(host):
    """The folder above obeys its permissions, for root too: else this cannot fail."""
    opens = f"open({str(host.working.parent / 'x')!r}, 'w')"
    obeying = str(host.folder / "packages" / "obeying.py")
    probe = [sys.executable, obeying, "-c", opens]
    tried = subprocess.run(probe, capture_output=True, text=True)
    assert "Permission denied" in tried.stderr
    assert [path.name for path in host.working.parent.iterdir()] == ["working"]


def test_in_the_working_folder_only_data_and_outputs_are_written(host):
    written = {path.name for path in host.working.iterdir()}
    assert written - {".env", "wandb"} == {"Data", "outputs", NOTEBOOK.name}


def test_every_artefact_is_there(run):
    data = {path.name for path in (run.folder / "Data").iterdir()}
    assert data == {"results.json", *PLOTS}
    for name in PLOTS:
        assert (run.folder / "Data" / name).read_bytes().startswith(b"\x89PNG")
    merged = {path.name for path in (run.folder / "outputs" / "merged").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= merged
    adapter = {path.name for path in (run.folder / "outputs" / "adapter").iterdir()}
    assert {"README.md", "adapter_config.json", "tokenizer.json"} <= adapter
    assert "adapter_model.safetensors" in adapter


def test_every_plot_is_shown(run):
    shown = run.kernel.outputs("display_data", "execute_result")
    drawn = [output for output in shown if "image/png" in output.data]
    assert len(drawn) == len(PLOTS) + 2  # NF4, LoRA: shown, not written


def test_without_its_studies_all_else_is_complete(hosts):
    data = {path.name for path in (hosts.colab.working / "Data").iterdir()}
    assert data == {"results.json", *PLOTS} - {"efficiency_comparison.png"}
    results = hosts.colab.results()
    assert sorted(results) == sorted(PARTS)
    assert results["provenance"]["wall_seconds"] > 0  # written last
    assert results["efficiency"] == []
    for row in results["rank_sensitivity"]:
        assert row["adapter_parameters"] > 0
        assert row["accuracy"] is None
    assert (hosts.colab.working / "outputs" / "adapter" / "README.md").exists()


def test_without_its_studies_one_line_says_so_in_each_section(hosts):
    said = {10: "", 11: ""}
    for section in said:
        for place in hosts.colab.sections[section]:
            for output in hosts.colab.nb.cells[place].outputs:
                said[section] += output.get("text", "")
    assert said[10].endswith("efficiency_steps=0: nothing is measured.\n")
    assert said[11] == "ranks is empty: none was trained.\n"


def test_no_request_to_the_hub_waits_for_ever(run):
    assert "limit_wait" in run.hooks


def test_the_splits_are_those_of_the_data(run, reviews):
    about = run.results["provenance"]
    assert about["labels"] == CLASSES
    total = sum(about["rows"].values())
    assert total <= len(reviews)
    assert about["rows"]["test"] == pytest.approx(0.1 * total, abs=1)


def contents(path):
    """Return the bytes in a file, and those in its parts if it is an archive."""
    found = [path.read_bytes()]
    if zipfile.is_zipfile(path):  # as PyTorch writes
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                found.append(archive.read(name))
    return found


def test_no_file_holds_a_key(run):
    assert "canary0" in (run.folder / ".env").read_text()
    files = [*run.folder.rglob("*"), *(run.kernel.folder / "home").rglob("*")]
    files = [path for path in files if path.is_file() and path.name != ".env"]
    kinds = {path.suffix for path in files}
    assert {".json", ".pt", ".safetensors", ".md"} <= kinds
    for path in files:
        for content in contents(path):
            assert b"canary0" not in content.lower(), path


def test_no_output_holds_a_key(run):
    assert "canary0" not in json.dumps(run.kernel.nb).lower()


def test_what_is_taken_away_names_no_path_of_this_machine(run):
    taken = list((run.folder / "outputs" / "adapter").iterdir())
    taken.extend((run.folder / "outputs" / "merged").iterdir())
    taken.append(run.folder / "Data" / "results.json")
    for path in taken:
        found = re.search(
            rb"[\"'` ]~?/(root|home|work|tmp|Users|var)/", path.read_bytes()
        )
        assert found is None, path.name
