"""`make run`: progress and tables in the terminal, the summary, interruptions."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import notebook_api
import offline_assets
import pandas as pd
import pytest
import run_notebook
from conftest import ROOT
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output


def write_notebook(path: Path, *sources: str) -> Path:
    """Write a notebook of code cells, and return its path."""
    cells = [new_code_cell(source) for source in sources]
    nbformat.write(new_notebook(cells=cells), path)
    return path


def test_paths_are_written_without_the_user_s_name(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run_notebook.shown_path(tmp_path / "cache" / "model") == "~/cache/model"
    assert run_notebook.shown_path(run_notebook.ROOT / "Data" / "x") == "Data/x"
    assert run_notebook.shown_path(Path("/elsewhere/x")) == "/elsewhere/x"


@pytest.fixture
def assets(monkeypatch, tmp_path):
    """A list of the offline assets that were asked for: `model`, `reviews`."""
    asked = []

    def ensure_model():
        asked.append("model")
        return tmp_path / "model"

    def ensure_reviews():
        asked.append("reviews")
        return tmp_path / "reviews"

    monkeypatch.setattr(offline_assets, "ensure_model", ensure_model)
    monkeypatch.setattr(offline_assets, "ensure_reviews", ensure_reviews)
    return asked


def test_without_the_hub_the_offline_assets_stand_in(assets, tmp_path):
    environ = {}
    run_notebook.use_offline_assets({}, environ)
    assert assets == ["model", "reviews"]
    model = Path(environ["QLORA_MODEL_NAME"]).expanduser()
    reviews = Path(environ["QLORA_DATASET_NAME"]).expanduser()
    assert (model, reviews) == (tmp_path / "model", tmp_path / "reviews")


def test_the_stand_in_is_trained_by_the_demo_s_settings(assets, notebook):
    environ = {}
    run_notebook.use_offline_assets({}, environ)
    config, _ = notebook.resolve_config({}, environ, cuda=True)
    demo = notebook.PRESETS["demo"]
    assert config.preset == "demo"
    assert config.max_train_samples == demo["max_train_samples"]
    assert config.validation_share == demo["validation_share"]
    assert config.num_train_epochs == demo["num_train_epochs"]


def test_nothing_waits_for_a_hub_that_does_not_answer(assets):
    environ = {}
    run_notebook.use_offline_assets({}, environ)
    assert environ["HF_HUB_OFFLINE"] == "1"


def test_own_data_in_the_environment_are_used_whole(assets):
    environ = {"QLORA_DATASET_NAME": "my.csv", "QLORA_MODEL_NAME": "my/model"}
    run_notebook.use_offline_assets({}, environ)
    assert assets == []
    assert "QLORA_MAX_TRAIN_SAMPLES" not in environ
    assert environ["QLORA_DATASET_NAME"] == "my.csv"


def test_own_data_in_the_notebook_are_used_whole(assets):
    environ = {}
    own = {"dataset_name": "my.csv", "model_name": "my/model"}
    run_notebook.use_offline_assets(own, environ)
    assert assets == []
    assert list(environ) == ["HF_HUB_OFFLINE"]


def test_a_blank_name_counts_as_not_set(assets):
    run_notebook.use_offline_assets({"dataset_name": ""}, {"QLORA_MODEL_NAME": ""})
    assert assets == ["model", "reviews"]


def test_another_cap_for_the_stand_in_stays(assets):
    environ = {"QLORA_MAX_TRAIN_SAMPLES": "64"}
    run_notebook.use_offline_assets({}, environ)
    assert environ["QLORA_MAX_TRAIN_SAMPLES"] == "64"


def settings_cell(source: str) -> nbformat.NotebookNode:
    """Return a notebook whose cell for settings has this source."""
    cell = new_code_cell(source, metadata={"tags": ["parameters"]})
    return new_notebook(cells=[new_code_cell("settings = 1"), cell])


def test_settings_of_the_notebook_s_cell_are_found():
    source = "settings = {}\n# a comment\nsettings = {'seed': 7}  # mine"
    assert run_notebook.own_settings(settings_cell(source)) == {"seed": 7}


@pytest.mark.parametrize(
    "source",
    [
        "settings = read()",
        "settings = {",
        "settings = 5",
        "settings = {'seed': mine}",
        "settings = {}\nsettings['seed'] = 7",
        "settings = {}\nsettings.update(seed=7)",
    ],
)
def test_settings_that_are_not_literal_are_refused(source):
    """Else the offline assets or the folders would be those of other settings."""
    with pytest.raises(SystemExit, match="Needed: settings = "):
        run_notebook.own_settings(settings_cell(source))


@pytest.mark.parametrize("source", ["", "# none"])
def test_there_may_be_no_settings(source):
    assert run_notebook.own_settings(settings_cell(source)) == {}


def test_settings_of_the_environment_may_be_written_in_any_case(monkeypatch, tmp_path):
    """The notebook reads them so; `make run` must find the same folders."""
    monkeypatch.chdir(tmp_path)
    environ = {"Qlora_Output_Dir": " mine ", "QLORA_SEED": "7", "HOME": "here"}
    monkeypatch.setattr(notebook_api.os, "environ", environ)
    notebook_api.read_environment()
    assert environ == {"QLORA_OUTPUT_DIR": "mine", "QLORA_SEED": "7", "HOME": "here"}
    assert run_notebook.chosen("output_dir", {}, environ) == "mine"


def test_the_notebook_s_cell_wins_over_the_environment():
    own = {"output_dir": "mine"}
    environ = {"QLORA_OUTPUT_DIR": "theirs", "QLORA_DATA_DIR": "theirs"}
    assert run_notebook.chosen("output_dir", own, environ) == "mine"
    assert run_notebook.chosen("data_dir", own, environ) == "theirs"


def test_a_run_shows_its_progress_and_keeps_its_outputs(tmp_path, capsys):
    cells = [
        new_markdown_cell("## 1 First\n\nText."),
        new_code_cell("# @title Say so\nprint('said ' + 'so')"),
        new_markdown_cell("## 2 Second"),
        new_code_cell("1 + 1"),
    ]
    path = tmp_path / "fine.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    executed = tmp_path / "new" / "executed.ipynb"
    seconds = run_notebook.execute(path, executed, tmp_path)
    assert list(seconds) == ["1 First", "2 Second"]
    assert min(seconds.values()) > 0
    printed = capsys.readouterr().out
    for line in ("== 1 First", "[ 1/2] Say so", "said so", "== 2 Second"):
        assert line in printed.splitlines()
    outputs = nbformat.read(executed, as_version=4).cells[1].outputs
    assert outputs[0].text == "said so\n"


def test_a_run_that_fails_says_why_and_keeps_what_came_before(tmp_path):
    path = write_notebook(tmp_path / "fails.ipynb", "print('said so')", "1 / 0")
    executed = tmp_path / "failed.ipynb"
    with pytest.raises(SystemExit, match="ZeroDivisionError: division by zero"):
        run_notebook.execute(path, executed, tmp_path)
    outputs = nbformat.read(executed, as_version=4).cells[0].outputs
    assert outputs[0].text == "said so\n"


def test_a_process_that_is_killed_is_reported_in_a_sentence(tmp_path):
    path = write_notebook(tmp_path / "dies.ipynb", "import os\nos._exit(1)")
    with pytest.raises(SystemExit, match="killed, .* goes on from its last"):
        run_notebook.execute(path, tmp_path / "dead.ipynb", tmp_path)


def test_the_summary_gives_the_scores_of_the_run(notebook, tmp_path):
    printed = "LOOK: nan: read as a class.\n3,000 rows\n9% are not read (max_length)."
    printed += "\n0% are not read (max_length)."
    cell = new_code_cell("1", outputs=[new_output("stream", text=printed)])
    executed = tmp_path / "executed.ipynb"
    nbformat.write(new_notebook(cells=[new_markdown_cell("# A"), cell]), executed)
    path = ROOT / "Data" / "reference" / "results.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    results["cautions"] = ["NEVER answered: good."]
    results["reliable"] = {"words": "A third can be relied on."}
    results["baselines"]["frozen_logreg"] = None
    text = run_notebook.summary(results, "Data", "outputs", executed)
    assert (
        "\nA third can be relied on.\nNEVER answered: good.\n"
        "LOOK: nan: read as a class.\n9% are not read (max_length).\n"
    ) in text
    assert "3,000 rows" not in text
    assert "0% are" not in text
    rows = {line[:24].strip(): line[24:] for line in text.splitlines()}
    tfidf = results["baselines"]["tfidf_logreg"]
    assert rows["adapter"].startswith(notebook.percent(results["test"]))
    assert rows["merged model"].startswith(notebook.percent(results["test_merged"]))
    assert rows["tfidf_logreg"].startswith(notebook.percent(tfidf))
    assert rows["training"].startswith(f"{results['training']['seconds']:.0f} s")
    assert rows["results and plots"] == "Data/"


@pytest.mark.parametrize("styled", [False, True])
def test_a_table_is_shown_as_text(styled):
    table = pd.DataFrame({"n": [1, 20], "text": ["a < b", "word " * 30]}, ["x", "y"])
    markup = table.style.format(escape="html").to_html() if styled else table.to_html()
    lines = run_notebook.table_text(markup).splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["n", "text"],
        ["x", "1"],
        ["y", "20"],
    ]
    assert lines[1].endswith("a < b")
    assert lines[2].endswith(" ...")
    assert len({line.index(word) for line, word in zip(lines, ("n", "1", "20"))}) == 1


def stopped_notebook(folder):
    """Write a notebook of one cell that takes a minute, and a program that runs it."""
    cell = nbformat.v4.new_code_cell("import time\nprint('begun')\ntime.sleep(60)")
    notebook = nbformat.v4.new_notebook(cells=[cell])
    nbformat.write(notebook, folder / "a.ipynb")
    return (
        f"import sys; sys.path.insert(0, {str(ROOT / 'scripts')!r})\n"
        "import run_notebook\nfrom pathlib import Path\n"
        f"folder = Path({str(folder)!r})\n"
        "run_notebook.execute(folder / 'a.ipynb', folder / 'b.ipynb', folder)"
    )


def test_a_run_that_is_stopped_says_in_one_line_how_to_go_on(tmp_path):
    """Ctrl-C goes to all processes of the terminal."""
    process = subprocess.Popen(
        [sys.executable, "-c", stopped_notebook(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    shown = ""
    while "begun" not in shown:
        line = process.stdout.readline()
        assert line, shown
        shown += line
    os.killpg(process.pid, signal.SIGINT)
    rest, _ = process.communicate(timeout=30)
    assert rest.strip().splitlines() == [run_notebook.STOPPED.strip()]
    assert process.returncode == 1
    assert (tmp_path / "b.ipynb").exists()


def test_the_commit_and_seconds_are_added_to_the_results(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_COMMIT", "1234567")
    path = tmp_path / "results.json"
    path.write_text('{"provenance": {}, "sections": null}')
    run_notebook.add_sections(path, {"1 Setup": 1.26})
    assert json.loads(path.read_text()) == {
        "provenance": {"git_commit": "1234567"},
        "sections": {"1 Setup": 1.3},
    }


def test_the_commit_of_a_repository_is_known(monkeypatch):
    monkeypatch.delenv("GIT_COMMIT", raising=False)
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert run_notebook.git_commit() == (done.stdout.strip() or None)


@pytest.mark.parametrize(
    ("own", "environ", "expected"),
    [
        ({}, {"QLORA_DATA_DIR": " ~/d "}, "~/d"),
        ({"data_dir": "x"}, {"QLORA_DATA_DIR": "y"}, "x"),
        ({"data_dir": " "}, {"QLORA_DATA_DIR": " "}, ""),
    ],
)
def test_blank_settings_do_not_count_and_others_are_stripped(own, environ, expected):
    assert run_notebook.chosen("data_dir", own, environ) == expected
