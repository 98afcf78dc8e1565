"""What users brought that ended in a wrong result, a library's message, or loss."""

import itertools
import json
import re
import unicodedata
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import code_cells
from hosts import SETTINGS, WITHOUT_STUDIES, Host
from safetensors.torch import load_file, save_file
from test_data import refusal, write

CLASSES = ["<script>alert(1)</script>", "x" * 80, "电影"]


@pytest.fixture(scope="module")
def odd(tmp_path_factory, tiny_bert):
    """A run on texts without words in `Data`, odd classes, and the home folder."""
    environ = dict(SETTINGS)
    environ.update(WITHOUT_STUDIES)
    environ["QLORA_MODEL_NAME"] = tiny_bert
    environ["QLORA_DATASET_NAME"] = "Data"
    environ["QLORA_LABEL_COLUMN"] = ""
    environ["QLORA_OUTPUT_DIR"] = "~/x"
    folder = tmp_path_factory.mktemp("odd")
    host = Host("odd", "asking.Kernel", folder, environ, env_file={})
    (host.working / "Data").mkdir()
    texts = []
    for signs in itertools.product("😀🎬👎!?", repeat=4):
        texts.append("".join(signs))
    labels = [CLASSES[number % 3] for number in range(150)]
    table = pd.DataFrame({"text": texts[:150], "label": labels})
    table.to_csv(host.working / "Data" / "rows.csv", index=False)
    with host.client.setup_kernel(env=host.environ):
        for places in host.sections.values():
            for place in places:
                host.run(place)
        yield host
    host.working.parent.chmod(0o755)


def test_texts_without_words_have_no_tfidf_baseline_and_go_on(odd):
    assert "No TF-IDF baseline: there are no words" in odd.printed()
    results = odd.results()
    assert results["baselines"]["tfidf_logreg"] is None
    assert results["test_merged"]["n"] == 15


def test_names_of_classes_are_no_html(odd):
    shown = []
    for output in odd.outputs("display_data", "execute_result"):
        shown.append(output.data.get("text/html", ""))
    assert any("&lt;script&gt;" in html for html in shown)
    assert not any("<script>alert" in html for html in shown)


def test_a_tilde_is_the_home_folder(odd):
    assert (odd.folder / "home" / "x" / "merged" / "config.json").exists()
    assert not (odd.working / "~").exists()


def test_data_in_the_folder_of_results_are_read_a_second_time(odd):
    assert (odd.working / "Data" / "calibration.png").exists()
    assert odd.ask("sum(map(len, read_tables('Data')))") == 150


def test_no_warning_is_shown_for_signs_that_a_font_lacks(odd):
    for output in odd.outputs("stream"):
        assert output.name == "stdout", output.text


def test_other_settings_without_the_sections_that_use_them_say_where_to_run(odd):
    cell = next(c for c in odd.nb.cells if "in (tokenized_from" in c.source)
    place = odd.nb.cells.index(cell)
    odd.run(0, "kept = config\nconfig = config.model_copy(update={'lora_r': 3})")
    source = (
        f"try:\n{indented(cell.source)}\nexcept RuntimeError as error: print(error)"
    )
    (said,) = odd.run(place, source)
    odd.run(0, "config = kept")
    assert said.text == "Settings or data changed: run again from section 3 on.\n"


def indented(source):
    return "\n".join(f"    {line}" for line in source.splitlines())


def test_an_adapter_of_other_settings_is_not_scored(odd):
    odd.run(0, "kept = config\nconfig = config.model_copy(update={'seed': 7})")
    for words in ("reloaded = load_adapter", "labelled = "):
        cell = next(c for c in odd.nb.cells if words in c.source)
        source = indented(cell.source)
        source = f"try:\n{source}\nexcept RuntimeError as error: print(error)"
        (said,) = odd.run(odd.nb.cells.index(cell), source)
        assert said.text.startswith("Run all cells: a finished training")
    odd.run(0, "config = kept")


def test_an_adapter_is_not_scored_on_another_split(odd):
    """The new test split has texts that the adapter was trained on."""
    odd.run(0, "kept = splits")
    odd.run(0, "read_again, _ = clean(pick_columns(read_tables(config.dataset_name)))")
    odd.run(0, "splits = split_rows(read_again, config)")
    for words, first in (
        ("reloaded = load_adapter", "Run all cells"),
        ("in (tokenized_from", "Settings or data changed"),
    ):
        cell = next(c for c in odd.nb.cells if words in c.source)
        source = indented(cell.source)
        source = f"try:\n{source}\nexcept RuntimeError as error: print(error)"
        outputs = odd.run(odd.nb.cells.index(cell), source)
        assert outputs[-1].text.startswith(first)
    odd.run(0, "splits = kept")


def test_a_model_that_was_a_classifier_before_is_named(odd):
    """Its own training may have had the texts of our test split."""
    cell = next(c for c in odd.nb.cells if c.source.startswith("cautions = []"))
    place = odd.nb.cells.index(cell)
    said = odd.run(place, cell.source)
    assert not any("classifier before" in output.get("text", "") for output in said)
    odd.run(0, "about_model.architectures = ['BertForSequenceClassification']")
    said = odd.run(place, cell.source)
    assert "The model was a classifier before." in said[0].text
    odd.run(0, "about_model.architectures = ['BertModel']")


def test_a_class_that_is_hardly_recognized_is_named(odd):
    cell = next(c for c in odd.nb.cells if c.source.startswith("cautions = []"))
    place = odd.nb.cells.index(cell)
    odd.run(0, "kept = merged_scores['confusion_matrix']")
    for last_row, is_named in (("[6, 0, 2]", False), ("[7, 0, 1]", True)):
        matrix = f"[[5, 0, 0], [0, 5, 0], {last_row}]"
        odd.run(0, f"merged_scores['confusion_matrix'] = {matrix}")
        said = odd.run(place, cell.source)[0].text
        assert (f"HARDLY recognized: {CLASSES[2]} (1 of 8)." in said) == is_named
    odd.run(0, "merged_scores['confusion_matrix'] = kept")


def test_a_new_adapter_does_not_lie_beside_an_older_merged_model(odd):
    """Else a run that ends between the two would leave the older one's answers."""
    merged = odd.folder / "home" / "x" / "merged" / "model.safetensors"
    for words, is_there in (("calibrated = load_adapter", False), ("merged =", True)):
        cell = next(c for c in odd.nb.cells if f"\n{words}" in f"\n{c.source}")
        odd.run(odd.nb.cells.index(cell), cell.source)
        assert merged.exists() == is_there


def test_what_training_freed_is_loaded_again_or_said(odd):
    for words in ("full_mb = storage(published)", "frozen_predictions = None"):
        cell = next(c for c in odd.nb.cells if words in c.source)
        source = indented(cell.source)
        source = f"try:\n{source}\nexcept RuntimeError as error: print(error)"
        (said,) = odd.run(odd.nb.cells.index(cell), source)
        assert said.text.startswith("Training freed this model: run section 6")
    assert odd.ask("frozen_scores['n']") == 15


def with_sentences(odd, sentences):
    """Return the first cell of section 12, its source with other sentences."""
    cell = next(c for c in odd.nb.cells if "labelled = " in c.source)
    start = cell.source.index("sentences = [")
    end = cell.source.index("]\n", start) + 2
    source = f"{cell.source[:start]}sentences = {sentences}\n{cell.source[end:]}"
    return odd.nb.cells.index(cell), source


@pytest.mark.parametrize("sentences", ["[]", "'a text'", "5", "None"])
def test_what_is_no_list_of_sentences_is_refused(odd, sentences):
    place, source = with_sentences(odd, sentences)
    source = f"try:\n{indented(source)}\nexcept ValueError as error: print(error)"
    (said,) = odd.run(place, source)
    assert "Needed: a list of texts" in said.text


def test_one_sentence_is_enough(odd):
    place, source = with_sentences(odd, "['a text']")
    odd.run(place, source)
    cell = next(c for c in odd.nb.cells if "words = occlude(" in c.source)
    said, table = odd.run(odd.nb.cells.index(cell), cell.source)
    assert "log-odds" in said.text
    assert "text" in table.data["text/html"]


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
        ({"auto_map": {"AutoConfig": "a.B"}, "model_type": "own"}, "code of its own"),
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


def test_plots_of_50_classes_with_long_names_are_drawn():
    """The cells that draw classes have no axis of more than 20 inches."""
    names = [f"class {number} " + "x" * 80 for number in range(50)]
    (cell,) = [c for c in code_cells() if "ConfusionMatrixDisplay." in c.source]
    kept = {}
    space = {
        "np": np,
        "plt": notebook_plt(),
        "class_names": names,
        "short_names": [name[:24] for name in names],
        "test_labels": np.arange(50),
        "predictions": np.arange(50),
        "merged_scores": {"accuracy": 1.0},
        "test_texts": ["a"] * 50,
        "config": pd.Series({"data_dir": "."}),
        "save_figure": lambda figure, name, folder: kept.update({name: figure}),
    }
    exec(cell.source, space)
    figure = kept["confusion_matrix.png"]
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
    assert "a value is no text: b'x'" in refusal(notebook.pick_columns, [table])


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
    shown = []
    space["display"] = lambda figure: shown.append(figure.axes)
    exec(cell.source, space)
    ((upper, lower),) = shown
    errors = [re.findall(r"[\d.]+%", axis.get_title())[0] for axis in (upper, lower)]
    assert float(errors[0][:-1]) < float(errors[1][:-1])
