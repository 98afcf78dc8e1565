"""The scripts: definitions, offline assets, and the export to ONNX."""

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
from nbformat.v4 import new_code_cell, new_notebook
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer


def write_notebook(path: Path, *sources: str) -> Path:
    """Write a notebook of code cells, and return its path."""
    cells = [new_code_cell(source) for source in sources]
    nbformat.write(new_notebook(cells=cells), path)
    return path


# ---- The notebook's definitions


DEFINITIONS = [
    "import os",
    "def f(): pass",
    "class A: pass",
    "LIMIT = 3",
    "LIMIT |= {1}",
]
OTHERS = [
    "limit = 3",
    "W = 1",  # a matrix, in the lesson
    "A = B = None",
    "LIMIT, rest = 3, 4",
    "os.environ['A'] = 'b'",
    "print(LIMIT)",
    "for LIMIT in range(3): pass",
]


@pytest.mark.parametrize("statement", DEFINITIONS)
def test_a_definition_is_imported(statement):
    (node,) = ast.parse(statement).body
    assert notebook_api.is_definition(node)


@pytest.mark.parametrize("statement", OTHERS)
def test_what_runs_something_is_not_imported(statement):
    (node,) = ast.parse(statement).body
    assert not notebook_api.is_definition(node)


def test_definitions_are_made_without_running_anything_else(tmp_path, monkeypatch):
    path = write_notebook(
        tmp_path / "some.ipynb",
        "LIMIT = 3\nraise SystemExit",
        "print(1 / 0)",
        "def is_over(n):\n    return n > LIMIT",
    )
    monkeypatch.setattr(notebook_api, "NOTEBOOK", path)
    # the module of the real notebook comes back after the test
    monkeypatch.setitem(notebook_api.sys.modules, "notebook_definitions", None)
    module = notebook_api.import_definitions()
    assert module.is_over(4)
    assert not module.is_over(3)


# ---- Offline assets


def test_the_small_model_is_what_the_demo_names(offline_model):
    config = AutoConfig.from_pretrained(offline_model)
    assert config.model_type == "bert"
    assert (config.num_hidden_layers, config.hidden_size) == (6, 384)
    assert config.vocab_size == 30522


def test_the_sentences_have_their_two_classes():
    path = offline_assets.ensure_reviews() / "reviews.csv"
    with path.open(encoding="utf-8", newline="") as file:
        labels = [row["label"] for row in csv.DictReader(file)]
    assert set(labels) == {"negative", "positive"}
    assert (len(labels), labels.count("positive")) == (10_568, 5_242)


def test_a_second_use_downloads_nothing(offline_model, monkeypatch):
    monkeypatch.setattr(offline_assets, "download", pytest.fail)
    assert str(offline_assets.ensure_model()) == offline_model


def split_zip(content: bytes, folder: Path, name: str) -> list[Path]:
    """Write an archive in five parts, each in a wheel of its own."""
    wheels = []
    for number in range(1, 6):
        start = 200 * (number - 1)
        part = content[start : start + 200]
        if number == 5:
            part = content[start:]
        path = folder / f"part_{number:03}.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr(f"input/{name}.zip.{number:03}", part)
        wheels.append(path)
    return wheels


@pytest.fixture
def base_wheels(tmp_path, monkeypatch):
    """Small stand-ins for the wheels of the base-size model, with a cache of their own.

    `download` gives them.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = {"config.json": b"{}", "model.safetensors": b"right " * 100}
    archive = io.BytesIO()
    sums = {}
    with zipfile.ZipFile(archive, "w") as whole:
        whole.writestr("all-mpnet-base-v2/1_Pooling/config.json", "another")
        for name, content in files.items():
            whole.writestr(f"all-mpnet-base-v2/{name}", content)
            sums[name] = hashlib.sha256(content).hexdigest()
    wheels = split_zip(archive.getvalue(), tmp_path, "all-mpnet-base-v2")
    monkeypatch.setattr(offline_assets.BASE, "files", sums)
    monkeypatch.setattr(offline_assets, "download", lambda packages, folder: wheels)
    return wheels


def test_the_parts_of_the_base_size_model_are_joined(base_wheels, capsys):
    folder = offline_assets.ensure_base()
    assert "Apache-2.0" in capsys.readouterr().out  # its licence is said
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["config.json", "model.safetensors"]
    assert (folder / "config.json").read_text() == "{}"


def test_a_damaged_file_is_replaced(base_wheels):
    folder = offline_assets.ensure_base()
    (folder / "config.json").write_text("damaged")
    offline_assets.ensure_base()
    assert (folder / "config.json").read_text() == "{}"


def refused_without_a_trace(reason: str) -> None:
    """Check that the base-size model is refused, and that nothing of it is kept."""
    with pytest.raises(RuntimeError, match=reason):
        offline_assets.ensure_base()
    assert list(offline_assets.cache_dir().iterdir()) == []


def test_a_changed_package_is_refused(base_wheels):
    content = base_wheels[1].read_bytes()
    base_wheels[1].write_bytes(content.replace(b"right", b"wrong"))
    refused_without_a_trace("not the expected files")


def test_swapped_parts_are_refused(base_wheels):
    base_wheels.insert(1, base_wheels.pop(2))
    refused_without_a_trace("not the expected files")


def test_a_missing_part_is_refused(base_wheels):
    base_wheels.pop()
    refused_without_a_trace("not the expected files")


def test_a_whole_package_with_other_content_is_refused(base_wheels):
    offline_assets.BASE.files["config.json"] = "0" * 64
    refused_without_a_trace("sha256 differs")


def test_a_package_that_cannot_be_had_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RuntimeError, match="QLORA_MODEL_NAME"):
        offline_assets.download(["no-such-package-here==0.0.0"], tmp_path)


# ---- Export to ONNX


def test_the_export_says_where_a_classifier_comes_from(tmp_path):
    with pytest.raises(SystemExit, match="outputs/merged"):
        export_onnx.main([str(tmp_path)])


def test_a_model_that_is_no_classifier_is_named(tiny_bert):
    with pytest.raises(SystemExit, match="class BertModel"):
        export_onnx.main([tiny_bert])


def test_the_export_says_which_packages_it_needs(tmp_path, monkeypatch):
    config = '{"architectures": ["BertForSequenceClassification"]}'
    (tmp_path / "config.json").write_text(config)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(SystemExit, match="pip install onnxscript"):
        export_onnx.main([str(tmp_path)])


@pytest.fixture
def classifier(tiny_bert, tmp_path, monkeypatch):
    """The folder of a tiny classifier, where it can be exported."""
    pytest.importorskip("onnxscript", reason="make test installs it")
    from onnx.reference import ReferenceEvaluator

    if not importlib.util.find_spec("onnxruntime"):  # 80 MB: ONNX's own stands in
        stand_in = types.ModuleType("onnxruntime")
        stand_in.InferenceSession = lambda path, providers: ReferenceEvaluator(path)
        monkeypatch.setitem(sys.modules, "onnxruntime", stand_in)
    folder = tmp_path / "classifier"
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_bert, num_hidden_layers=1
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(folder)
    return folder


def test_an_exported_classifier_gives_the_logits_of_the_model(classifier, capsys):
    export_onnx.main([str(classifier)])
    difference = re.search(r"at most (\S+)", capsys.readouterr().out)[1]
    assert float(difference) < 1e-5
    names = {path.name for path in (classifier.parent / "onnx").iterdir()}
    assert {"model.onnx", "config.json", "tokenizer.json"} <= names


def test_an_export_with_other_logits_is_not_kept(classifier, monkeypatch):
    monkeypatch.setattr(export_onnx, "TOLERANCE", -1)  # no difference is as small
    with pytest.raises(SystemExit, match="not kept"):
        export_onnx.main([str(classifier)])
    assert not (classifier.parent / "onnx" / "model.onnx").exists()
