"""What users brought that ended in a wrong result, a library's message, or loss."""

import json
import re
import unicodedata
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import code_cells
from safetensors.torch import load_file, save_file
from test_data import refusal, write


@pytest.mark.parametrize("words", ["reloaded = load_adapter", "labelled = "])
def test_sections_9_and_12_alone_say_what_to_run(words):
    (cell,) = [cell for cell in code_cells() if words in cell.source]
    source = cell.source
    with pytest.raises(RuntimeError, match="Run all cells: a finished training"):
        exec(source, {"PeftModel": None, "torch": torch})


def test_labels_that_look_alike_are_one_and_it_is_said(notebook, capsys):
    texts = [f"text {number}" for number in range(8)]
    accents = ["café", unicodedata.normalize("NFD", "café")]
    labels = [*accents, "café", "not  spam", "not\u00a0spam", "Not spam", "US", "us"]
    table = pd.DataFrame({"text": texts, "label": labels})
    rows, _ = notebook.clean(notebook.pick_columns([table]))
    assert rows["label"].nunique() == 3
    said = capsys.readouterr().out
    assert said.count("Read as one label") == 3
    assert "not spam, Not spam" in said


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["250", "250.0", "3", "3"], {"250", "3"}),
        (["250", "250.0", "x", "x"], {"250", "250.0", "x"}),
        (["007", "7", "007", "7"], {"007", "7"}),
    ],
)
def test_numbers_are_one_label_only_where_all_labels_are_numbers(
    notebook, capsys, labels, classes
):
    table = pd.DataFrame({"text": list("abcd"), "label": labels})
    rows = notebook.pick_columns([table])
    assert set(rows["label"]) == classes
    merged = len(classes) < len(set(labels))
    assert ("are read as one" in capsys.readouterr().out) == merged


@pytest.mark.parametrize("text", ["A  b<BR>c", "a B C", "ａ b c", "a\u00a0b\nc"])
def test_a_copy_in_other_case_spacing_markup_or_form_is_one(notebook, text):
    table = pd.DataFrame({"text": ["a b c", text, "d"], "label": ["x", "x", "y"]})
    rows, _ = notebook.clean(notebook.pick_columns([table]))
    assert list(rows["text"]) == ["a b c", "d"]


def test_a_model_that_this_run_would_write_over_is_refused(notebook, tiny_config):
    merged = f"{tiny_config.output_dir}/merged"
    source = notebook.model_source(tiny_config.model_name)
    notebook.AutoConfig.from_pretrained(source).save_pretrained(merged)
    config = tiny_config.model_copy(update={"model_name": merged})
    said = refusal(notebook.open_checkpoint, config)
    assert "Set another output_dir" in said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quantization_config": {"load_in_4bit": True}}, "is quantized"),
        ({"auto_map": {"AutoConfig": "a.B"}, "model_type": "own"}, "custom code"),
    ],
)
def test_what_a_configuration_asks_for_is_refused_in_a_sentence(
    notebook, tiny_config, tmp_path, tokenizer, changes, said
):
    source = notebook.model_source(tiny_config.model_name)
    about = notebook.AutoConfig.from_pretrained(source).to_dict()
    about.update(changes)
    tokenizer.save_pretrained(tmp_path / "model")
    write(tmp_path / "model" / "config.json", json.dumps(about))
    config = tiny_config.model_copy(update={"model_name": str(tmp_path / "model")})
    assert said in refusal(notebook.open_checkpoint, config)


def test_a_weight_that_is_no_number_is_refused_by_name(
    notebook, tiny_config, tmp_path, names
):
    path = notebook.Path(tiny_config.model_name) / "model.safetensors"
    weights = load_file(path)
    name = "encoder.layer.1.output.dense.weight"
    weights[name][3, 3] = float("nan")
    folder = tmp_path / "model"
    notebook.shutil.copytree(tiny_config.model_name, folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = tiny_config.model_copy(update={"model_name": str(folder)})
    assert name in refusal(notebook.load_published, config, names)


def test_a_loss_that_is_not_finite_ends_at_once_with_advice(
    notebook, tiny_config, names, head, tokenizer, tokenized, tmp_path
):
    config = tiny_config.model_copy(update={"learning_rate": 1e30})
    with pytest.raises(ValueError, match="Lower learning_rate"):
        notebook.train_qlora(
            config,
            names,
            head,
            tokenizer,
            tokenized,
            tmp_path,
            [notebook.Clock(), notebook.Watch()],
        )


def test_words_stand_under_the_classes_that_a_baseline_knows(notebook):
    train = {
        "text": ["good film", "bad film", "dull film"] * 3,
        "label": ["a", "c", "d"] * 3,
    }
    words = notebook.telling_words(notebook.fit_tfidf(train))
    assert words["a"][0] in ("good", "good film")
    assert words["d"][0] in ("dull", "dull film")


def test_one_weight_speaks_for_two_classes(notebook):
    train = {"text": ["good film", "bad film"] * 3, "label": ["a", "b"] * 3}
    words = notebook.telling_words(notebook.fit_tfidf(train))
    assert words["a"][0] in ("good", "good film")
    assert words["b"][0] in ("bad", "bad film")


def test_plots_of_50_classes_with_long_names_are_drawn(tmp_path):
    """The cells that draw classes have no axis of more than 20 inches."""
    names = [f"class {number} " + "x" * 80 for number in range(50)]
    (cell,) = [c for c in code_cells() if "ConfusionMatrixDisplay." in c.source]
    space = {
        "np": np,
        "plt": notebook_plt(),
        "class_names": names,
        "short_names": [name[:24] for name in names],
        "test_labels": np.arange(50),
        "predictions": np.arange(50),
        "merged_scores": {"accuracy": 1.0},
        "test_texts": ["a"] * 50,
        "n_classes": 50,
        "data_dir": tmp_path,
        "begin": lambda step, after: None,
    }
    exec(cell.source, space)
    figure = space["figure"]
    assert max(figure.get_size_inches()) < 20
    figure.canvas.draw()
    labels = figure.axes[0].get_yticklabels()
    heights = [label.get_window_extent().height for label in labels]
    places = [label.get_window_extent().y0 for label in labels]
    assert min(np.abs(np.diff(places))) > 0.6 * max(heights)


def notebook_plt():
    import matplotlib.pyplot as plt

    return plt


def test_no_file_of_a_folder_is_left_out_without_a_word(notebook, tmp_path):
    write(tmp_path / "data" / "a.csv", "text,label\na,x\nb,y\n")
    write(tmp_path / "data" / "results.json", '[{"text": "c", "label": "x"}]')
    write(tmp_path / "data" / "Licence.txt", "free")
    assert len(notebook.read_tables(str(tmp_path / "data"))) == 2
    (tmp_path / "data" / "b.csv").symlink_to(tmp_path / "nowhere.csv")
    assert "b.csv cannot be read" in refusal(
        notebook.read_tables, str(tmp_path / "data")
    )
    (tmp_path / "data" / "b.csv").unlink()
    (tmp_path / "more").mkdir()
    (tmp_path / "data" / "more").symlink_to(tmp_path / "more")
    assert "more" in refusal(notebook.read_tables, str(tmp_path / "data"))


def test_signs_of_no_width_make_no_other_class_text_or_copy(notebook):
    texts = ["a b", "a\u200b b", "\u200b", "c", "d"]
    labels = ["x", "x\ufeff", "x", "y", "\u2060"]
    table = pd.DataFrame({"text": texts, "label": labels})
    rows, counts = notebook.clean(notebook.pick_columns([table]))
    assert list(rows["text"]) == ["a b", "c"]
    assert set(rows["label"]) == {"x", "y"}
    assert counts["with a text"] == 4


def test_labels_of_bytes_are_refused(notebook):
    table = pd.DataFrame({"text": ["a", "b"], "label": [b"x", b"y"]})
    assert "a value is not text: b'x'" in refusal(notebook.pick_columns, [table])


def test_results_are_not_written_into_the_data(notebook, tmp_path):
    settings = {"dataset_name": str(tmp_path), "output_dir": str(tmp_path / "out")}
    with pytest.raises(ValueError, match="set another one"):
        notebook.resolve_config(settings, {}, cuda=False)


@pytest.mark.parametrize("settings", [None, {"dataset_name", "my.csv"}, ["seed"]])
def test_settings_that_are_no_dictionary_are_refused_in_a_sentence(notebook, settings):
    with pytest.raises(ValueError, match="with a colon"):
        notebook.resolve_config(settings, {}, cuda=False)


def test_a_tokenizer_that_cannot_pad_is_refused(
    notebook, tiny_config, tmp_path, tokenizer
):
    folder = tmp_path / "model"
    notebook.shutil.copytree(tiny_config.model_name, folder)
    about = json.loads((folder / "tokenizer_config.json").read_text())
    about["pad_token"] = None
    about["tokenizer_class"] = "PreTrainedTokenizerFast"
    write(folder / "tokenizer_config.json", json.dumps(about))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    config = tiny_config.model_copy(update={"model_name": str(folder)})
    assert "has no pad_token" in refusal(notebook.open_checkpoint, config)


@pytest.mark.parametrize("columns", [64, 50])
def test_the_picture_of_the_levels_takes_a_pruned_matrix(columns, notebook):
    """Blocks of zeros have no scale, and 64 need not divide the weights."""
    (cell,) = [cell for cell in code_cells() if "Draw the levels" in cell.source]
    layer = torch.nn.Linear(columns, 64)
    with torch.no_grad():
        layer.weight.normal_()
        layer.weight[2:6] = 0
    space = dict(vars(notebook))
    space["published"] = SimpleNamespace(base_model=torch.nn.Sequential(layer))
    space["levels"] = notebook.nf4_levels()
    exec(cell.source, space)
    upper, lower = space["axes"]
    errors = [re.findall(r"[\d.]+%", axis.get_title())[0] for axis in (upper, lower)]
    assert float(errors[0][:-1]) < float(errors[1][:-1])


@pytest.mark.parametrize("name", ["adapter", "merged"])
def test_a_folder_that_no_run_has_written_is_not_replaced(notebook, tmp_path, name):
    config = notebook.Config(output_dir=str(tmp_path), data_dir=str(tmp_path / "no"))
    notebook.refuse_to_replace(config)
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=f"{name} is not from a run. Set another"):
        notebook.refuse_to_replace(config)
    notebook.write_json(tmp_path / "training.json", {})
    notebook.refuse_to_replace(config)


def test_results_that_no_run_has_written_are_not_replaced(notebook, tmp_path):
    config = notebook.Config(output_dir=str(tmp_path / "no"), data_dir=str(tmp_path))
    notebook.write_json(tmp_path / "results.json", {"provenance": {}})
    notebook.refuse_to_replace(config)
    notebook.write_json(tmp_path / "results.json", [{"text": "good", "label": "a"}])
    with pytest.raises(ValueError, match="results.json is not from a run. Set another"):
        notebook.refuse_to_replace(config)


def test_an_empty_line_is_a_row_where_there_is_one_column(notebook, tmp_path, capsys):
    path = write(tmp_path / "a.csv", "comment\nA good film\n\nA bad film\n")
    table, texts = notebook.read_texts(path, "comment")
    assert texts.tolist() == ["A good film", "", "A bad film"]
    assert len(table) == 3


def test_commas_end_no_text_where_there_is_one_column(notebook, tmp_path):
    """As Excel saves it in countries where the separator is a semicolon."""
    csv = 'Nachricht\nHallo, es kostet 125,06 €; warum?\n"zwei\nZeilen"\n'
    path = write(tmp_path / "a.csv", csv)
    _, texts = notebook.read_texts(path, "nachricht")
    assert texts.tolist() == ["Hallo, es kostet 125,06 €; warum?", "zwei\nZeilen"]


def test_a_setting_of_the_environment_may_be_written_in_any_case(notebook):
    values, sources = notebook.read_settings({}, {"Qlora_Seed": "7", "seed": "8"})
    assert values == {"seed": "7"}
    assert sources == {"seed": "Qlora_Seed"}


def test_a_misspelt_part_of_a_layer_s_name_is_refused(notebook, tiny_bert):
    kind = notebook.AutoModelForSequenceClassification
    model = kind.from_pretrained(tiny_bert)
    for target in ("typo.value", "alue"):
        with pytest.raises(ValueError, match=f"no layer is called {target}"):
            notebook.adapted_layers(model, ["query", target])
    whole = ["query", "self.value"]
    assert notebook.adapted_layers(model, whole) == whole


@pytest.mark.parametrize("field", ["dataset_name", "test_dataset_name", "predict_name"])
def test_a_folder_to_be_read_does_not_hold_what_is_written(
    notebook, tmp_path, monkeypatch, field
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"output_dir is inside {field}=."):
        notebook.resolve_config({field: str(tmp_path)}, {}, cuda=True)
