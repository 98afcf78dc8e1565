"""A run on odd data, in a kernel that can be asked: nothing silent, nothing lost."""

import itertools

import pandas as pd
import pytest
from hosts import SETTINGS, WITHOUT_STUDIES, Host

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
        host.run(0, "all_steps = list(finished_steps)")
        yield host
    host.working.parent.chmod(0o755)


@pytest.fixture(autouse=True)
def all_steps_are_finished(odd):
    """What each test begins with."""
    odd.run(0, "finished_steps = list(all_steps)")


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


def indented(source):
    return "\n".join(f"    {line}" for line in source.splitlines())


def test_a_model_that_was_a_classifier_before_is_named(odd):
    """Its own training may have had the texts of our test split."""
    cell = next(c for c in odd.nb.cells if "cautions = []" in c.source)
    place = odd.nb.cells.index(cell)
    said = odd.run(place, cell.source)
    assert not any("classifier before" in output.get("text", "") for output in said)
    odd.run(0, "about_model.architectures = ['BertForSequenceClassification']")
    said = odd.run(place, cell.source)
    assert "The model was a classifier before." in said[0].text
    odd.run(0, "about_model.architectures = ['BertModel']")


def test_a_class_that_is_hardly_recognized_is_named(odd):
    cell = next(c for c in odd.nb.cells if "cautions = []" in c.source)
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
    for words, is_there in (("save_adapter(trained_model", False), ("merged =", True)):
        cell = next(c for c in odd.nb.cells if f"\n{words}" in f"\n{c.source}")
        odd.run(odd.nb.cells.index(cell), cell.source)
        assert merged.exists() == is_there


def test_what_training_freed_is_loaded_again_or_said(odd):
    for words in ("base_storage = storage(base)", "train_states = mean_states"):
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


def refusal_of(odd, words):
    """Run the cell that has these words, and return the RuntimeError's text."""
    cell = next(c for c in odd.nb.cells if words in c.source)
    source = indented(cell.source)
    source = f"try:\n{source}\nexcept RuntimeError as error: print(error)"
    (said,) = odd.run(odd.nb.cells.index(cell), source)
    return said.text


def test_the_adapter_of_another_run_in_this_folder_is_not_scored_or_used(odd):
    odd.run(0, "write_json(shipped_settings, dict(about_shipped, seed=7))")
    assert "is not from this run" in refusal_of(odd, "labelled = ")
    assert "is not from this run" in refusal_of(odd, "reloaded = load_adapter")
    odd.run(0, "write_json(shipped_settings, about_shipped)")


def test_answers_of_another_classifier_do_not_stay(odd):
    """Those of the same one do: its cells can be run again."""
    outputs = odd.folder / "home" / "x"
    cell = next(c for c in odd.nb.cells if "save_adapter(trained_model" in c.source)
    changes = (", seed=7", ", labels=['a']", ", min_precision=0.5")
    for change, stays in (("", True), *((change, False) for change in changes)):
        (outputs / "predictions.csv").write_text("text,label\n")
        odd.run(0, f"write_json(shipped_settings, dict(about_shipped{change}))")
        odd.run(odd.nb.cells.index(cell), cell.source)
        assert (outputs / "predictions.csv").exists() == stays
    assert not (outputs / "test_predictions.csv").exists()
    cell = next(c for c in odd.nb.cells if "reloaded = load_adapter" in c.source)
    odd.run(odd.nb.cells.index(cell), cell.source)  # the merged model again


def test_a_file_is_classified_by_what_ships(odd):
    """Not by a pipeline of an earlier training."""
    (odd.working / "new.csv").write_text("text\n😀\n\n👎👎\n")
    change = "config.model_copy(update={'predict_name': 'new.csv'})"
    odd.run(0, f"kept = config\nconfig = {change}\nclassify = None")
    cell = next(c for c in odd.nb.cells if "def classify_file" in c.source)
    odd.run(odd.nb.cells.index(cell), cell.source)
    odd.run(0, "config = kept")
    written = pd.read_csv(odd.folder / "home" / "x" / "predictions.csv")
    assert written["label"].isin(CLASSES).tolist() == [True, False, True]


def test_epochs_are_fitted_to_the_settings_anew(odd):
    """Not to those that were fitted to other data."""
    odd.run(0, "kept = config\nconfig = config.model_copy(update={'lora_r': 3})")
    cell = next(c for c in odd.nb.cells if "config = fit_to_data(" in c.source)
    odd.run(odd.nb.cells.index(cell), cell.source)
    assert odd.ask("config.lora_r") == 16
    odd.run(0, "config = kept")


def test_another_run_in_this_folder_is_not_scored_classified_with_or_described(odd):
    odd.run(0, "kept = config")
    odd.run(0, "config = config.model_copy(update={'predict_name': 'new.csv'})")
    odd.run(0, "write_json(shipped_settings, dict(about_shipped, seed=7))")
    for words in (
        "probabilities = classify_apart",
        "test_answers = pd.DataFrame",
        "provenance = {",
        "efficiency = []",
        "adapter_size =",
        "def classify_file",
        "card = model",
    ):
        assert "is not from this run" in refusal_of(odd, words)
        odd.run(0, "finished_steps = list(all_steps)")
    odd.run(0, "shipped_settings.unlink()")
    assert "is not from this run" in refusal_of(odd, "reloaded = load_adapter")
    odd.run(0, "write_json(shipped_settings, about_shipped)\nconfig = kept")


# a cell of each step, in the notebook's order, and the step that it needs
STEPS = {
    "tables = read_tables(config": "2 settings",
    "tokenized = tokenize(": "3 data",
    "some_texts = list(": "4 tokens",
    "baseline_train = splits": "4 tokens",
    "published, head = load_published": "5 baseline",
    "train_states = mean_states": "6 base",
    "qlora_model = build_qlora(": "6 frozen base",
    "about_training = training_folder(": "7 adapters",
    "within_memory(\n        train_qlora": "8 check",
    "history = pd.DataFrame(training": "8 training",
    "trained_model = load_adapter": "8 training",
    "save_adapter(trained_model": "8 temperature",
    "reloaded = load_adapter": "8 adapter",
    "probabilities = classify_apart": "9 merged",
    "cautions = []": "9 scores",
    "ConfusionMatrixDisplay.from_predictions": "9 scores",
    "calibration_error, bins = calibration(": "9 cautions",
    "is_reliable = None": "9 calibration",
    "test_answers = pd.DataFrame": "9 reliable",
    "provenance = {": "9 answers",
    "methods = [(": "9 results",
    "efficiency = []": "10 methods",
    "rank_scores = {}": "9 results",
    "adapter_size =": "11 ranks",
    "labelled = ": "9 merged",
    "def classify_file": "9 merged",
    "words = occlude(": "9 merged",
    "card = model": "9 results",
}


@pytest.mark.parametrize(("words", "after"), STEPS.items())
def test_a_cell_whose_input_is_missing_is_refused(odd, words, after):
    """As after other settings or data, an interrupt, or a skipped cell."""
    odd.run(0, "kept = config")
    odd.run(0, "config = config.model_copy(update={'predict_name': 'new.csv'})")
    odd.run(0, "base = qlora_model = 0  # training has freed them")
    odd.run(0, f"finished_steps.remove({after!r})")
    said = refusal_of(odd, words)
    odd.run(0, "base = qlora_model = None\nconfig = kept")
    assert said.startswith("Run all cells: a finished training is not repeated")
    assert f"Step '{after}'" in said


def test_other_settings_end_all_that_was_made(odd):
    """Also where they are refused: nothing is made of the ones before."""
    cell = next(c for c in odd.nb.cells if "asked, sources = resolve" in c.source)
    odd.run(0, "kept = asked, config, data_dir, output_dir")
    for refused in (False, True):
        odd.run(0, "finished_steps = list(all_steps)")
        odd.run(0, f"settings = {{'seed': -{refused:d}}}")
        source = f"try:\n{indented(cell.source)}\nexcept ValueError: pass"
        odd.run(odd.nb.cells.index(cell), source)
        assert odd.ask("finished_steps") == ([] if refused else ["2 settings"])
        assert "Step '8 adapter'" in refusal_of(odd, "reloaded = load_adapter")
    odd.run(0, "settings = {}\nasked, config, data_dir, output_dir = kept")


def test_a_step_that_runs_again_ends_all_later_ones(odd):
    """Answers, scores and results are then of what it made before."""
    cell = next(c for c in odd.nb.cells if "save_adapter(trained_model" in c.source)
    odd.run(odd.nb.cells.index(cell), cell.source)
    assert odd.ask("finished_steps")[-1] == "8 adapter"
    cell = next(c for c in odd.nb.cells if "reloaded = load_adapter" in c.source)
    odd.run(odd.nb.cells.index(cell), cell.source)
    assert odd.ask("finished_steps")[-1] == "9 merged"


def test_a_step_that_fails_is_not_finished(odd):
    odd.run(0, "real = paired_difference")
    odd.run(0, "def paired_difference(*_): raise RuntimeError('interrupted')")
    odd.run(0, "real_scores = frozen_predictions\nfrozen_predictions = test_labels")
    assert refusal_of(odd, "cautions = []") == "interrupted\n"
    odd.run(0, "paired_difference = real\nfrozen_predictions = real_scores")
    assert "Step '9 cautions'" in refusal_of(odd, "bins = calibration(")


def test_adapters_that_were_not_counted_are_not_finished(odd):
    """Else section 11 would count those of other settings."""
    odd.run(0, "real = storage\ndef storage(_): raise RuntimeError('interrupted')")
    assert refusal_of(odd, "qlora_model = build_qlora(") == "interrupted\n"
    odd.run(0, "storage = real\nqlora_model = None")
    assert "Step '7 adapters'" in refusal_of(odd, "about_training = training_folder(")


def test_other_sentences_leave_what_was_scored(odd):
    """Also where the first ones were classified before the scoring."""
    odd.run(0, "finished_steps = finished_steps[: finished_steps.index('9 scores')]")
    place, source = with_sentences(odd, "['a text']")
    odd.run(place, source)
    odd.run(0, "finished_steps += all_steps[all_steps.index('9 scores') :]")
    odd.run(place, source)
    assert "9 results" in odd.ask("finished_steps")


def test_a_half_saved_classifier_gives_no_answers(odd):
    """Its tokenizer is saved first: a model without one would answer at random."""
    cell = next(c for c in odd.nb.cells if "reloaded = load_adapter" in c.source)
    half = cell.source.replace("merged.save_pretrained(", "raise RuntimeError(")
    assert half != cell.source
    odd.run(0, "shutil.rmtree(merged_dir)")
    source = f"try:\n{indented(half)}\nexcept RuntimeError as error: print(error)"
    odd.run(odd.nb.cells.index(cell), source)
    assert "Step '9 merged'" in refusal_of(odd, "probabilities = classify_apart")
    odd.run(0, "finished_steps = list(all_steps)")
    assert "gave no answers" in refusal_of(odd, "probabilities = classify_apart")
    odd.run(odd.nb.cells.index(cell), cell.source)
