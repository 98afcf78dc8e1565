"""The runs of hosts.py: hosted conditions, artefacts, numbers that agree, cells run twice, faults, no key anywhere."""

import ast
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import NOTEBOOK
from nbclient.exceptions import CellExecutionError
from sklearn.metrics import confusion_matrix

PLOTS = ["dataset_stats", "confusion_matrix", "training_curves", "efficiency_comparison", "lora_rank_sensitivity"]
PLOTS = sorted(f"{name}.png" for name in [*PLOTS, "calibration"])
TIMED = ("seconds", "_second", "runtime", "_time", "started", "sections", "train_loss")  # ends of names of what differs


@pytest.fixture(scope="module")
def run(hosts, tmp_path_factory):
    """What the run wrote, and answers of its kernel at its end, before the tests go on with it."""
    kernel = hosts.kaggle
    folder = shutil.copytree(kernel.working, tmp_path_factory.mktemp("kept") / "run")
    both = "predict_logits({}, test_texts, config, tokenizer)"
    gap = f"np.abs({both.format('in_memory')} - {both.format('load_adapter(adapter_dir, config, task)')}).max()"
    waits = "[hub.constants.HF_HUB_ETAG_TIMEOUT, hub.constants.HF_HUB_DOWNLOAD_TIMEOUT, hub.constants.HF_HUB_OFFLINE]"
    asked = {"gap": kernel.ask(gap), "waits": kernel.ask(waits), "texts": kernel.ask("test_texts")}
    return SimpleNamespace(kernel=kernel, folder=folder, results=kernel.results(), **asked)


@pytest.fixture(params=["colab", "kaggle"])
def host(request, hosts):
    return getattr(hosts, request.param)


def test_every_cell_runs_nothing_is_installed_and_progress_tables_and_the_text_box_are_shown(host):
    assert [f"{error.ename}: {error.evalue}" for error in host.outputs("error")] == []
    cells = [cell for cell in host.nb.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells if cell.source)
    assert [output.text for output in host.outputs("stream") if output.name == "stderr"] == []
    assert not any("Warning" in output.text for output in host.outputs("stream"))
    assert cells[0].outputs == []  # pip would say that there is no index
    shown = [str(output.data) for output in host.outputs("display_data", "execute_result")]
    assert any("<progress" in data and "Validation Loss" in data for data in shown)  # Trainer's, as HTML
    assert sum("<table" in data for data in shown) >= 10
    assert sum("application/vnd.jupyter.widget-view+json" in data for data in shown) == 1


def test_nobody_is_asked_for_a_key(host):
    assert not (host.folder / "asked.txt").exists()
    said = "".join(output.text for output in host.outputs("stream"))
    assert ("wandb sync" if host.name == "kaggle" else "WANDB_API_KEY") in said


def test_everything_is_written_below_the_working_folder(host):
    """The folder above obeys its permissions, for root too: else this could not fail."""
    opens = f"open({str(host.working.parent / 'x')!r}, 'w')"
    probe = [sys.executable, host.folder / "packages" / "obeying.py", "-c", opens]
    assert "Permission denied" in subprocess.run(probe, capture_output=True, text=True).stderr
    assert [path.name for path in host.working.parent.iterdir()] == ["working"]
    own = [".env", "wandb"] if host.name == "kaggle" else []
    assert {path.name for path in host.working.iterdir()} == {"Data", NOTEBOOK.name, "outputs", *own}
    assert host.results()["provenance"]["git_commit"] is None  # no repository around it


def untimed(value):
    """Return what was measured or decided, without times."""
    if isinstance(value, dict):
        return {name: untimed(each) for name, each in value.items() if not name.endswith(TIMED)}
    return [untimed(each) for each in value] if isinstance(value, list) else value


def test_every_artefact_is_there_and_none_is_elsewhere(run):
    data, outputs = run.folder / "Data", run.folder / "outputs"
    assert sorted(path.name for path in data.iterdir()) == sorted([*PLOTS, "results.json"])
    assert all((data / name).read_bytes().startswith(b"\x89PNG") for name in PLOTS)
    model = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    adapter = {"README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}
    assert model <= {path.name for path in (outputs / "merged").iterdir()}
    assert adapter <= {path.name for path in (outputs / "adapter").iterdir()}
    drawn = [output for output in run.kernel.outputs("display_data", "execute_result") if "image/png" in output.data]
    assert len(drawn) == len(PLOTS)
    assert run.waits == [5, 5, True]  # the Hub was not waited for


def test_the_test_scores_agree_with_each_other(run, reviews):
    results, rows = run.results, run.results["provenance"]["rows"]
    names = results["provenance"]["labels"]
    assert names == ["pan", "praise", "quote"] and sum(rows.values()) <= len(reviews) == 400
    assert rows["test"] == pytest.approx(0.1 * sum(rows.values()), abs=1)
    for scores in (results["test"], results["test_merged"]):
        matrix = np.array(scores["confusion_matrix"])
        assert matrix.shape == (3, 3) and matrix.sum() == scores["n"] == rows["test"]
        assert scores["accuracy"] == pytest.approx(matrix.trace() / matrix.sum())
        assert results["provenance"]["largest_class"] == pytest.approx(matrix.sum(1).max() / matrix.sum())
    for scores in (results["test"], results["test_merged"], *results["baselines"].values()):
        low, high = scores["accuracy_ci95"]
        assert 0 <= low <= scores["accuracy"] <= high <= 1 and low < high
    calibrated = [each["accuracy"] for each in results["calibration"]["bins"]]
    assert np.mean(calibrated) == pytest.approx(results["test"]["accuracy"], abs=0.05)  # bins of about equal size


def test_results_have_the_shape_of_the_design_and_the_training_s_numbers_agree_with_its_history(run):
    parts = {"provenance", "test", "test_merged", "baselines", "training", "calibration", "efficiency"}
    assert set(run.results) == parts | {"rank_sensitivity", "sections"}
    about, training = run.results["provenance"], run.results["training"]
    assert {"config", "model", "dataset", "device", "versions", "seed", "git_commit", "started"} <= set(about)
    assert {"best_epoch", "peak_mb", "captured_share"} <= set(training)
    scored = [row for row in training["history"] if row.get("eval_loss") is not None]
    assert [row["epoch"] for row in scored] == [0, 1] and training["epochs"] == training["best_epoch"] == 1
    assert scored[0]["eval_loss"] == pytest.approx(np.log(3), abs=0.3)  # of a random head
    assert training["samples_per_second"] == pytest.approx(about["rows"]["train"] / training["seconds"])
    assert about["wall_seconds"] > training["seconds"] > 0


def test_ranks_and_methods_have_figures_where_they_were_trained(run):
    ranks = {(row["modules"], row["rank"]): row["accuracy"] for row in run.results["rank_sensitivity"]}
    assert [rank for modules, rank in ranks if modules != "all-linear"] == [1, 2, 4, 8, 16, 32, 64]
    assert [rank for (_, rank), accuracy in ranks.items() if accuracy is not None] == [1, 16, 16]
    methods = {row["method"]: row for row in run.results["efficiency"]}
    measured = [name for name, row in methods.items() if row["measured"]]
    assert measured == ["full fp32", "QLoRA default", "QLoRA, this run"]  # without a GPU
    for row in methods.values():
        figures = [row[kind] or 0 for kind in ("trainable_parameters", "weights_mb", "samples_per_second")]
        assert row["peak_mb"] is None and [figure > 0 for figure in figures] == [row["measured"]] * 3
    full, ours = methods["full fp32"], methods["QLoRA, this run"]
    assert ours["trainable_parameters"] == 16 * 2 * 2 * (64 + 64) + 64 * 3 + 3 < full["trainable_parameters"]
    assert full["weights_mb"] == pytest.approx(4e-6 * full["trainable_parameters"])
    assert full["weights_mb"] > ours["weights_mb"]


def test_the_merged_model_without_bitsandbytes_and_the_card_s_code_answer_as_scored(run, notebook, tiny_bert, reviews):
    card = (run.folder / "outputs" / "adapter" / "README.md").read_text()
    loads, asks = "\n".join(re.findall("(?m)^    (.*)", card)).split('text = "A text."\n')
    coded = loads.replace("path/to/this/folder", str(run.folder / "outputs" / "adapter")).replace("path/to/", "")
    coded += "\nimport json, sys\nfor text in json.load(sys.stdin):\n " + asks.replace("\n", "\n ")
    merged = "import sys; sys.modules['bitsandbytes'] = None\n" + notebook.ANSWER
    verdicts, names = dict(reviews.to_numpy().tolist()), ["pan", "praise", "quote"]
    for program, scores in {coded: "test", merged: "test_merged"}.items():
        command = [sys.executable, "-c", program, str(run.folder / "outputs" / "merged"), "cpu"]
        options = {"cwd": Path(tiny_bert).parent, "check": True, "capture_output": True, "text": True}
        answers = re.findall("|".join(names), subprocess.run(command, input=json.dumps(run.texts), **options).stdout)
        matrix = confusion_matrix([verdicts[text] for text in run.texts], answers, labels=names)
        assert matrix.tolist() == run.results[scores]["confusion_matrix"]
    assert run.gap == 0 and len(set(answers)) > 1  # else the same answer to all would do


def test_no_file_holds_a_key(run):
    found = [*run.folder.rglob("*"), *(run.kernel.folder / "home").rglob("*")]
    files = [path for path in found if path.is_file() and path.name != ".env"]
    assert "canary0" in (run.folder / ".env").read_text() and "canary0" not in json.dumps(run.kernel.nb).lower()
    assert {".wandb", ".json", ".pt", ".safetensors", ".md", ".log"} <= {path.suffix for path in files}
    for path in files:
        contents = [path.read_bytes()]
        if zipfile.is_zipfile(path):  # as PyTorch writes
            with zipfile.ZipFile(path) as archive:
                contents += [archive.read(name) for name in archive.namelist()]
        assert not any(b"canary0" in content.lower() for content in contents), path


def test_what_is_taken_away_names_no_path_of_this_machine(run):
    taken = [*(run.folder / "outputs" / "adapter").iterdir(), *(run.folder / "outputs" / "merged").iterdir()]
    for path in [*taken, run.folder / "Data" / "results.json"]:
        assert not re.search(rb"[\"'` ]~?/(root|home|work|tmp|Users|var)/", path.read_bytes()), path.name


def test_results_are_written_before_section_10_and_stay(run):
    early, results = run.kernel.early, run.results
    assert set(early) == set(results) and early["efficiency"] == early["rank_sensitivity"] == []
    kept = set(results) - {"efficiency", "rank_sensitivity", "sections"}
    assert {name: untimed(early[name]) for name in kept} == {name: untimed(results[name]) for name in kept}


def test_run_cells_executed_twice_in_a_row_give_the_results_of_a_run_that_executes_them_once(run, hosts):
    once, twice = untimed(hosts.colab.results()), untimed(run.results)
    assert run.kernel.failed == {}
    assert set(once) == set(twice) and [name for name in once if once[name] != twice[name]] == []


@pytest.mark.parametrize("section", [10, 11, 12])
def test_a_section_that_fails_loses_nothing_of_those_before(run, section):
    """Its first run cell raises where its last statement was."""

    def models() -> dict:
        return {path: path.read_bytes() for path in run.kernel.working.glob("outputs/*/*") if path.is_file()}

    index, before, files = next(filter(run.kernel.runs, run.kernel.sections[section])), run.kernel.results(), models()
    tree = ast.parse(run.kernel.nb.cells[index].source)
    tree.body[-1:] = ast.parse("raise RuntimeError('injected')").body
    with pytest.raises(CellExecutionError, match="injected"):
        run.kernel.run(index, ast.unparse(tree))
    after = run.kernel.results() | {"rank_sensitivity": before["rank_sensitivity"]}  # section 11 had written its own
    assert after == before and models() == files and len(files) >= 8


def test_each_section_can_be_run_again_after_a_finished_run(run):
    for section in range(12, 3, -1):
        for index in run.kernel.sections[section]:
            run.kernel.run(index)
    again = untimed(run.kernel.results())
    assert {name: again[name] for name in ("test", "test_merged", "training")} == {
        name: untimed(run.results)[name] for name in ("test", "test_merged", "training")
    }
