"""Sections 4, 5 and 9 to 12: tokens, scores with intervals, predictions, what is written down."""

import json
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import example, given
from hypothesis import settings as effort
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

TEXTS = [f"{'good ' * (n % 7)} film number {n} {'bad ' * (n * 5 % 11)}" for n in range(30)]


@pytest.fixture
def model(notebook, tiny_config):
    """A random classifier whose answers differ enough to be told apart."""
    found = notebook.load_classifier(tiny_config, ["bad", "good"])[0].eval()
    found.classifier.weight.data *= 100
    return found


@effort(max_examples=200, deadline=None)
@given(st.integers(2, 40), st.integers(3, 40), st.floats(0, 1))
@example(10, 9, 1.0)
def test_a_text_is_cut_from_its_middle(notebook, length, max_length, tail_share):
    ids = [*range(length)]
    tail = round(tail_share * (max_length - 2))
    cut = ids[: max_length - 1 - tail] + ids[length - 1 - tail :]
    assert notebook.cut_middle(ids, max_length, tail_share) == (ids if length <= max_length else cut)
    assert length <= max_length or len(cut) == max_length


def test_without_a_tail_texts_are_cut_as_transformers_cuts_them_and_keep_their_labels(notebook, tiny_config, task):
    texts = ["", "short", "word " * 5000, "好 x" * 40, "[SEP] <b>"]
    whole = task.tokenizer(texts, truncation=True, max_length=32)
    uncut = task.tokenizer(texts, verbose=False)["input_ids"]
    assert notebook.encode(texts, task.tokenizer, tiny_config) == (dict(whole), [*map(len, uncut)])
    tailed, _ = notebook.encode(texts, task.tokenizer, tiny_config.model_copy(update={"tail_share": 0.5}))
    assert tailed["input_ids"][3] == uncut[3][:16] + uncut[3][-16:]
    assert all(0 < len(row) <= 32 for rows in tailed.values() for row in rows)
    split = Dataset.from_dict({"text": texts, "label": [3, 1, 4, 1, 5]})
    tokens = notebook.tokenize(split, task.tokenizer, tiny_config)
    assert tokens[:] == dict(whole) | {"label": [3, 1, 4, 1, 5], "length": [*map(len, uncut)]}  # and no text


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_scores_are_those_of_scikit_learn(notebook, classes):
    rng = np.random.default_rng(classes)
    labels, guesses = rng.integers(0, classes, 60), rng.integers(0, max(classes - 1, 2), 60)
    f1 = {f"f1_{kind}": f1_score(labels, guesses, average=kind, zero_division=0) for kind in ("weighted", "macro")}
    matrix = confusion_matrix(labels, guesses, labels=range(classes))
    found, rates = notebook.score(labels, guesses, classes), notebook.rates(np.stack([matrix, matrix.T]))
    assert found["n"] == 60 and json.loads(json.dumps(found))["confusion_matrix"] == matrix.tolist()
    for name, value in ({"accuracy": accuracy_score(labels, guesses)} | f1).items():
        low, high = found[f"{name}_ci95"]
        assert found[name] == pytest.approx(value) == rates[name][0] and 0 <= low < value < high <= 1
    assert rates["f1_macro"][1] == pytest.approx(f1_score(guesses, labels, average="macro", zero_division=0))
    assert notebook.Scores().compute(predictions=[2, 2], references=[2, 2])["f1_macro"] == 1
    unused = notebook.score(labels, guesses, classes + 3)  # classes that are neither there nor answered do not count
    assert unused["f1_macro"] == pytest.approx(f1["f1_macro"])


def test_intervals_have_the_width_of_a_share_and_the_seed_decides_them(notebook):
    truth, right = np.ones(1000, int), (np.arange(1000) % 5 > 0).astype(int)  # 80%
    first, again, other = (notebook.score(truth, right, 2, seed) for seed in (1, 1, 2))
    low, high = first["accuracy_ci95"]
    assert high - low == pytest.approx(2 * 1.96 * (0.8 * 0.2 / 1000) ** 0.5, rel=0.08)
    assert low + high == pytest.approx(1.6, abs=0.01) and first == again != other
    low, high = notebook.score(np.arange(52) % 2, np.arange(52) % 2, 2)["accuracy_ci95"]
    scores = {"accuracy": 0.8954, "accuracy_ci95": [0.88, 0.9101], "f1_macro": 1.0, "f1_macro_ci95": [0, 1]}
    shown = [notebook.percent(scores), notebook.percent(scores, "f1_macro")]
    assert shown == ["89.5% [88.0, 91.0]", "100.0% [0.0, 100.0]"] and 0.9 < low < 0.99 < high <= 1  # 52 of 52


def test_paired_differences_are_of_points_and_hold_the_truth_in_about_95_of_100_cases(notebook):
    first, second = np.array([True] * 90 + [False] * 10), np.array([True] * 80 + [False] * 20)
    gain, low, high = notebook.paired_difference(first, second)
    assert gain == pytest.approx(10) and 3 < low < 10 < high < 17
    assert notebook.paired_difference(second, first)[0] == pytest.approx(-10)
    assert notebook.paired_difference(first, first) == [0, *(pytest.approx(end, abs=0.9) for end in (-1, 1))]
    rng, held = np.random.default_rng(0), []
    for seed in range(600):
        _, low, high = notebook.paired_difference(rng.random(300) < 0.8, rng.random(300) < 0.7, seed)
        held.append(low <= 10 <= high)
    assert 0.93 <= np.mean(held) <= 0.97


def test_logits_keep_their_order_where_batches_are_halved(notebook, model, tiny_config, task, monkeypatch):
    tokens = [task.tokenizer(text, return_tensors="pt", truncation=True, max_length=32) for text in TEXTS]
    with torch.no_grad():
        alone = np.array([model(**each).logits[0].numpy() for each in tokens])
    forward, tried = model.train().forward, []  # as the training leaves it

    def scarce(input_ids, **kwargs):
        tried.append(len(input_ids))
        if len(input_ids) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return forward(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model, "forward", scarce)
    config = tiny_config.model_copy(update={"per_device_eval_batch_size": 16})
    found = notebook.predict_logits(model, TEXTS, config, task.tokenizer)
    assert tried == [16, 8, *[4] * 7, 2] and not model.training  # without dropout
    assert found.dtype == np.float32 and np.allclose(found, alone, atol=1e-5) and np.ptp(found, axis=0).min() > 0.02
    monkeypatch.setattr(model, "forward", MagicMock(side_effect=RuntimeError("something else")))
    with pytest.raises(RuntimeError, match="something else"):
        notebook.predict_logits(model, TEXTS, tiny_config, task.tokenizer)


def test_an_explanation_shows_every_word_and_what_decides(notebook, model, tiny_config, task, monkeypatch):
    def logits(model, texts, *args):
        return np.array([[0.0, 2.0 * ("good" in text) - 1.0 * ("dull" in text) + 3] for text in texts], np.float32)

    def explain(text):
        return notebook.explain(text, model, tiny_config, task.tokenizer).data

    model.config.id2label = {0: "<bad>", 1: "<bad>"}
    shown = explain("<script>x</script> & good")
    assert "<script>" not in shown and "&lt;script&gt;x&lt;/script&gt;" in shown and "&amp;" in shown
    assert "<b>&lt;bad&gt;</b>" in shown and shown.count("<span") == 3 and "%" in explain(" ")
    words = [f"w{n}" for n in range(300)]
    shown = explain(" ".join(words))
    assert notebook.re.sub("<sub>.*?</sub>|<[^>]*>", "", shown).split(": ")[1].split() == words
    assert shown.count("<span") <= 64  # neighbours share a question
    monkeypatch.setattr(notebook, "predict_logits", logits)
    shown = explain("a good dull film")
    assert "good<sub>+2.0</sub>" in shown and "dull<sub>-1.0</sub>" in shown and shown.count("<sub>") == 2
    assert "98.2%" in shown  # the logistic function of 4


def test_results_are_added_to_by_name_and_a_write_that_fails_leaves_the_old_file(notebook, tmp_path):
    path = tmp_path / "new" / "results.json"
    notebook.add_results(path, a=1, b=[np.float64(0.5)])
    assert notebook.add_results(path, b=np.int64(2), c="ö") == {"a": 1, "b": 2, "c": "ö"}
    with pytest.raises(UnicodeEncodeError):
        notebook.atomic_write(path, "half \ud800")
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": 1, "b": 2, "c": "ö"}


@pytest.mark.parametrize("tail_share", [0.0, 0.25])
def test_the_card_has_the_figures_of_the_results_and_no_paths(notebook, tiny_config, tail_share):
    scores = [notebook.score(np.arange(40) % 2, np.arange(40) % n % 2, 2) for n in (2, 3, 5)]
    results = dict(zip(("test", "test_merged"), scores)) | {"calibration": {"ece": 0.0321}}
    about = {"model": "owner/base", "dataset": "reviews.csv", "labels": ["bad", "good"], "largest_class": 0.625}
    results |= {"baselines": {"tfidf_logreg": scores[2]}, "provenance": about}
    config = tiny_config.model_copy(update={"tail_share": tail_share, "lora_r": 13})
    card = notebook.model_card(results, config, ["classifier", "pooler"])
    assert "base_model: owner/base" in card.split("---")[1] and "{" not in card
    figures = [f"| {notebook.percent(each)} | {notebook.percent(each, 'f1_weighted')} |" for each in scores]
    figures += ["62.5%", "3.2 points", "rank 13", "bad, good", "32 tokens", "40 test texts", "`reviews.csv`"]
    assert [figure for figure in figures if figure not in card] == []
    assert tiny_config.model_name not in card and tiny_config.output_dir not in card
    ids, keeps = [*range(50)], "in training 25% of what is kept was the end"
    start, end = notebook.re.search(r"ids\[:(\d+)\] \+ ids\[-(\d+):\]", card).groups()  # cuts as training did
    assert notebook.cut_middle(ids, 32, tail_share) == ids[: int(start)] + ids[-int(end) :]
    assert (keeps in card) == bool(tail_share)
