"""Sections 4, 5, 8, 9 and 12: tokens, scores, confidence, predictions, results."""

import json
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from datasets import Dataset
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

TEXTS = []
for number in range(30):
    praise = ["good"] * (number % 7)
    blame = ["bad"] * (number * 5 % 11)
    TEXTS.append(" ".join([*praise, f"film number {number}", *blame]))


@pytest.fixture
def model(notebook, tiny_config, names):
    """A random classifier whose answers differ enough to be told apart."""
    model, _ = notebook.load_classifier(tiny_config, names)
    model.classifier.weight.data *= 100
    return model.eval()


def test_texts_are_cut_as_transformers_cuts_them_and_keep_their_labels(
    notebook, tokenizer
):
    texts = ["", "short", "word " * 5000, "好 x" * 40, "[SEP] <b>"]
    split = Dataset.from_dict({"text": texts, "label": [3, 1, 4, 1, 5]})
    tokens = notebook.tokenize(split, tokenizer, 32)
    cut = tokenizer(texts, truncation=True, max_length=32)
    assert tokens["input_ids"][:] == cut["input_ids"]
    assert tokens["attention_mask"][:] == cut["attention_mask"]
    assert tokens["label"][:] == [3, 1, 4, 1, 5]
    assert "text" not in tokens.column_names


def test_a_texts_length_is_that_of_what_is_read(notebook, tokenizer):
    split = Dataset.from_dict({"text": ["word " * 5000, "word"]})
    assert notebook.tokenize(split, tokenizer, 32)["length"][:] == [32, 3]


@pytest.fixture(params=[2, 3, 7])
def answers(request):
    """The number of classes, and labels and predictions of 60 texts."""
    n_classes = request.param
    random = np.random.default_rng(n_classes)
    labels = random.integers(0, n_classes, 60)
    predictions = random.integers(0, max(n_classes - 1, 2), 60)
    return n_classes, labels, predictions


def f1(labels, predictions, kind):
    return f1_score(labels, predictions, average=kind, zero_division=0)


def test_scores_are_those_of_scikit_learn(notebook, answers):
    n_classes, labels, predictions = answers
    found = notebook.score(labels, predictions, n_classes)
    matrix = confusion_matrix(labels, predictions, labels=range(n_classes))
    assert found["n"] == 60
    assert json.loads(json.dumps(found))["confusion_matrix"] == matrix.tolist()
    expected = {
        "accuracy": accuracy_score(labels, predictions),
        "f1_weighted": f1(labels, predictions, "weighted"),
        "f1_macro": f1(labels, predictions, "macro"),
    }
    for name, value in expected.items():
        low, high = found[f"{name}_ci95"]
        assert found[name] == pytest.approx(value)
        assert 0 <= low < value < high <= 1


def test_many_matrices_are_scored_at_once(notebook, answers):
    n_classes, labels, predictions = answers
    matrix = confusion_matrix(labels, predictions, labels=range(n_classes))
    scores = notebook.scores_of(np.stack([matrix, matrix.T]))
    assert scores["f1_macro"][0] == pytest.approx(f1(labels, predictions, "macro"))
    assert scores["f1_macro"][1] == pytest.approx(f1(predictions, labels, "macro"))


def test_classes_that_are_neither_there_nor_answered_do_not_count(notebook, answers):
    n_classes, labels, predictions = answers
    scores = notebook.score(labels, predictions, n_classes + 3)
    assert scores["f1_macro"] == pytest.approx(f1(labels, predictions, "macro"))


def test_a_class_that_a_test_split_lacks_does_not_widen_the_interval(notebook, answers):
    n_classes, labels, predictions = answers
    found = notebook.score(labels, predictions, n_classes)
    more = notebook.score(labels, predictions, n_classes + 3)
    for name in ("accuracy_ci95", "f1_macro_ci95"):
        assert more[name] == found[name]
    assert notebook.score(labels * 0, labels * 0, 3)["f1_macro"] == 1


def test_one_class_alone_is_scored(notebook):
    scores = notebook.Scores().compute(predictions=[2, 2], references=[2, 2])
    assert scores == {"accuracy": 1, "f1_weighted": 1, "f1_macro": 1}


def test_an_interval_has_the_width_of_a_share(notebook):
    labels = np.ones(1000, dtype=int)
    predictions = np.minimum(np.arange(1000) % 5, 1)  # 80% are right
    low, high = notebook.score(labels, predictions, 2)["accuracy_ci95"]
    deviation = (0.8 * 0.2 / 1000) ** 0.5
    assert high - low == pytest.approx(2 * 1.96 * deviation, rel=0.08)
    assert (low + high) / 2 == pytest.approx(0.8, abs=0.005)


def test_52_right_of_52_are_no_certainty(notebook):
    labels = np.arange(52) % 2
    low, high = notebook.score(labels, labels, 2)["accuracy_ci95"]
    assert 0.9 < low < 0.99 < high <= 1


def test_the_seed_decides_the_interval(notebook):
    labels = np.arange(200) % 2
    predictions = np.arange(200) % 3 % 2
    first, again, other = (
        notebook.score(labels, predictions, 2, seed)["accuracy_ci95"]
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_a_score_is_written_with_its_interval(notebook):
    scores = {
        "accuracy": 0.8954,
        "accuracy_ci95": [0.88, 0.9101],
        "f1_macro": 1.0,
        "f1_macro_ci95": [0, 1],
    }
    assert notebook.percent(scores) == "89.5% [88.0, 91.0]"
    assert notebook.percent(scores, "f1_macro") == "100.0% [0.0, 100.0]"


def paired_answers(n_right, n_texts=100):
    """Return answers to texts of class 1, of which the first `n_right` are right."""
    answers = np.zeros(n_texts, dtype=int)
    answers[:n_right] = 1
    return answers


def test_a_paired_difference_is_in_points_of_the_first(notebook):
    labels = paired_answers(100)
    better = paired_answers(90)
    worse = paired_answers(80)
    gain, low, high = notebook.paired_difference(labels, better, worse)
    assert gain == pytest.approx(10)
    assert 3 < low < 10 < high < 17
    loss, _, _ = notebook.paired_difference(labels, worse, better)
    assert loss == pytest.approx(-10)


def test_equal_answers_differ_by_nothing(notebook):
    labels = paired_answers(50)
    answers = paired_answers(40)
    for name in ("accuracy", "f1_macro"):
        found = notebook.paired_difference(labels, answers, answers, name)
        assert found == (0, 0, 0)


@pytest.mark.parametrize("name", ["accuracy", "f1_macro"])
@pytest.mark.parametrize("rare", [0.5, 0.15])
def test_a_paired_interval_holds_the_truth_in_about_95_of_100_cases(
    notebook, name, rare
):
    """The truth is the difference on 200,000 texts."""
    random = np.random.default_rng(0)

    def draw(n_texts):
        labels = (random.random(n_texts) < rare).astype(int)
        first = np.where(random.random(n_texts) < 0.8, labels, 1 - labels)
        second = np.where(random.random(n_texts) < 0.7, labels, 1 - labels)
        return labels, first, second

    labels, first, second = draw(200_000)
    scores = notebook.score(labels, first, 2), notebook.score(labels, second, 2)
    truth = 100 * (scores[0][name] - scores[1][name])
    held = []
    for seed in range(200):
        _, low, high = notebook.paired_difference(*draw(300), name, seed)
        held.append(low <= truth <= high)
    assert 0.91 <= np.mean(held) <= 0.99


def test_a_rare_class_that_a_draw_lacks_does_not_favour_the_model_that_misses_it(
    notebook,
):
    """Else the other one's false answers of this class would count in that draw."""
    labels = np.repeat([0, 1], [77, 3])
    misses_it = np.zeros(80, dtype=int)
    finds_it = labels.copy()
    finds_it[0] = 1
    gain, _, high = notebook.paired_difference(labels, misses_it, finds_it, "f1_macro")
    assert gain < -30
    assert high < 1  # point: of the false answer itself, in a draw without the class


def test_one_answer_for_all_can_win_by_accuracy_and_lose_by_macro_f1(notebook):
    labels = np.repeat([0, 1, 2], [160, 20, 20])
    one_answer = np.zeros(200, dtype=int)
    fair = labels.copy()
    fair[:50] = 1
    accuracy, _, _ = notebook.paired_difference(labels, one_answer, fair)
    macro, low, high = notebook.paired_difference(labels, one_answer, fair, "f1_macro")
    assert accuracy == pytest.approx(100 * (160 - 150) / 200)
    expected = f1(labels, one_answer, "macro") - f1(labels, fair, "macro")
    assert macro == pytest.approx(100 * expected)
    assert low < macro < high < 0


def test_logits_are_in_the_order_of_the_texts(notebook, model, tiny_config, tokenizer):
    expected = []
    for text in TEXTS:
        tokens = tokenizer(text, return_tensors="pt", truncation=True, max_length=32)
        with torch.no_grad():
            expected.append(model(**tokens).logits[0].numpy())
    found = notebook.predict_logits(model, TEXTS, tiny_config, tokenizer)
    assert found.dtype == np.float32
    assert np.allclose(found, expected, atol=1e-5)
    assert np.ptp(found, axis=0).min() > 0.02


def test_a_model_in_training_mode_answers_without_dropout(
    notebook, model, tiny_config, tokenizer
):
    notebook.predict_logits(model.train(), TEXTS, tiny_config, tokenizer)
    assert not model.training


def test_a_batch_that_does_not_fit_is_made_smaller(
    notebook, model, tiny_config, tokenizer, monkeypatch
):
    expected = notebook.predict_logits(model, TEXTS, tiny_config, tokenizer)
    forward = model.forward
    tried = []

    def scarce(input_ids, **kwargs):
        tried.append(len(input_ids))
        if len(input_ids) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return forward(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model, "forward", scarce)
    found = notebook.predict_logits(model, TEXTS, tiny_config, tokenizer)
    assert np.allclose(found, expected, atol=1e-5)
    assert tried[0] == 30
    assert 1 < tried[-2] <= 4


def test_another_error_of_a_prediction_is_not_taken_for_want_of_memory(
    notebook, model, tiny_config, tokenizer, monkeypatch
):
    fault = RuntimeError("something else")
    monkeypatch.setattr(model, "forward", MagicMock(side_effect=fault))
    with pytest.raises(RuntimeError, match="something else"):
        notebook.predict_logits(model, TEXTS, tiny_config, tokenizer)


def test_each_word_is_masked_in_turn(notebook, model, tiny_config, tokenizer):
    words = [f"w{number}" for number in range(100)]
    _, _, table = notebook.occlude(" ".join(words), model, tiny_config, tokenizer)
    assert list(table["word"]) == words
    assert np.isfinite(table["evidence"]).all()


def test_a_blank_text_is_explained(notebook, model, tiny_config, tokenizer):
    _, log_odds, table = notebook.occlude(" ", model, tiny_config, tokenizer)
    assert np.isfinite(log_odds)
    assert len(table) == 1


def test_an_explanation_has_the_log_odds_of_what_decides(
    notebook, model, tiny_config, tokenizer, monkeypatch
):
    def logits(model, texts, *arguments):
        rows = []
        for text in texts:
            evidence = 3.0
            if "good" in text:
                evidence += 2
            if "dull" in text:
                evidence -= 1
            rows.append([0, evidence])
        return np.array(rows, dtype=np.float32)

    monkeypatch.setattr(notebook, "predict_logits", logits)
    text = "a good dull film"
    answer, log_odds, table = notebook.occlude(text, model, tiny_config, tokenizer)
    assert answer == 1
    assert log_odds == pytest.approx(4)
    assert table["evidence"].round(3).tolist() == [0, 2, -1, 0]


def test_results_are_written_with_numbers_of_numpy(notebook, tmp_path):
    path = tmp_path / "new" / "results.json"
    notebook.write_json(path, {"a": 1, "b": [np.float64(0.5)], "c": np.int64(2)})
    assert notebook.read_json_file(path) == {"a": 1, "b": [0.5], "c": 2}


def test_a_write_that_fails_leaves_the_old_file(notebook, tmp_path):
    path = tmp_path / "results.json"
    notebook.atomic_write(path, "old")
    with pytest.raises(UnicodeEncodeError):
        notebook.atomic_write(path, "half \ud800")
    assert path.read_text() == "old"


def overconfident(notebook, temperature, n_texts=4000):
    """Return logits that are `temperature` times too large, and their labels."""
    random = np.random.default_rng(0)
    logits = random.normal(0, 1.5, (n_texts, 3))
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = [random.choice(3, p=row) for row in shares]
    return (temperature * logits).astype(np.float32), np.array(labels)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_the_temperature_is_found(notebook, temperature):
    logits, labels = overconfident(notebook, temperature)
    assert notebook.fit_temperature(logits, labels) == pytest.approx(
        temperature, rel=0.07
    )


@pytest.mark.parametrize(("factor", "bound"), [(100, 5), (0.01, 0.2)])
def test_the_temperature_is_bounded(notebook, factor, bound):
    logits, labels = overconfident(notebook, factor)
    assert notebook.fit_temperature(logits, labels) == pytest.approx(bound, abs=0.01)


def test_calibration_weighs_bins_by_their_texts_and_survives_ties(notebook):
    """80% of the texts at 1.0, all right; the others from 0.5 to 1, half right."""
    confidences = np.concatenate([np.ones(800), np.linspace(0.5, 0.99, 200)])
    is_right = np.concatenate([np.ones(800), np.arange(200) % 2]).astype(bool)
    error, bins = notebook.calibration(confidences, is_right)
    assert bins["texts"].sum() == 1000
    assert error == pytest.approx(0.2 * (0.745 - 0.5), abs=0.001)
    assert bins["texts"].tolist()[-1] == 800
    error, bins = notebook.calibration(np.full(10, 0.7), np.arange(10) < 7)
    assert error == pytest.approx(0)
    assert len(bins) == 1


def test_the_lowest_confidence_to_rely_on(notebook):
    """Wrong are one of the 100 highest, 3 of the next 100, and half of the others."""
    confidences = np.linspace(1, 0.5, 500)
    is_right = np.ones(500, dtype=bool)
    is_right[[50, 110, 120, 130]] = False
    is_right[200::2] = False
    threshold = notebook.reliable_confidence(confidences, is_right, 0.98)
    n_kept = np.sum(confidences >= threshold)
    assert is_right[confidences >= threshold].mean() >= 0.98
    assert n_kept == 200  # 4 of 200 are wrong
    for more in range(1, 50):
        assert is_right[: n_kept + more].mean() < 0.98
    assert f"{threshold:.4f}" == str(threshold)


@pytest.mark.parametrize(("n_texts", "exists"), [(49, False), (50, True), (5000, True)])
def test_too_few_right_answers_give_no_confidence_to_rely_on(notebook, n_texts, exists):
    confidences = np.full(n_texts, 0.99999, dtype=np.float32)
    is_right = np.ones(n_texts, dtype=bool)
    threshold = notebook.reliable_confidence(confidences, is_right, 0.98)
    assert (threshold == 0.9999) == exists
    is_right[::10] = False
    assert notebook.reliable_confidence(confidences, is_right, 0.98) is None


def test_calibrated_confidence_shows_about_a_point_of_error_on_2000_texts(notebook):
    random = np.random.default_rng(0)
    errors = []
    for _ in range(100):
        confidences = 1 - 0.5 * random.beta(0.4, 2, 2000)
        is_right = random.random(2000) < confidences
        errors.append(notebook.calibration(confidences, is_right)[0])
    assert 0.008 < np.mean(errors) < 0.014


@pytest.mark.parametrize(("min_precision", "n_texts"), [(0.9, 10), (0.8, 5)])
def test_as_many_answers_as_show_one_mistake_are_enough(
    notebook, min_precision, n_texts
):
    is_right = np.ones(n_texts, dtype=bool)
    confidences = np.full(n_texts, 0.9)
    assert notebook.reliable_confidence(confidences, is_right, min_precision) == 0.9
    fewer = is_right[1:]
    assert notebook.reliable_confidence(confidences[1:], fewer, min_precision) is None


def test_a_share_has_an_interval(notebook):
    share, (low, high) = notebook.share_of(np.arange(100) < 98)
    assert share == 0.98
    assert 0.92 < low < 0.98 < high < 1
    assert json.loads(json.dumps([share, low, high])) == [share, low, high]
