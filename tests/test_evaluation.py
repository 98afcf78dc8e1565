"""Sections 4, 5 and 9 to 12: tokens, scores with intervals, predictions, what is written down, and what is measured."""

import json
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import example, given
from hypothesis import settings as effort
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score


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
    cut = notebook.cut_middle(ids, max_length, tail_share)
    if length <= max_length:
        assert cut == ids
        return
    tail = round(tail_share * (max_length - 2))
    head = max_length - 2 - tail
    assert cut == ids[: 1 + head] + ids[length - 1 - tail :] and len(cut) == max_length


def test_without_a_tail_texts_are_cut_as_transformers_cuts_them(notebook, tiny_config, task):
    texts = ["", "short", "word " * 5000, "好 x" * 40, "[SEP] <b>"]
    whole = task.tokenizer(texts, truncation=True, max_length=32)
    assert notebook.encode(texts, task.tokenizer, tiny_config) == dict(whole)
    tailed = notebook.encode(texts, task.tokenizer, tiny_config.model_copy(update={"tail_share": 0.5}))
    uncut = task.tokenizer(texts, verbose=False)["input_ids"]
    assert tailed["input_ids"][3] == uncut[3][:16] + uncut[3][-16:] and {*map(len, tailed)} != {0}
    assert all(len(row) <= 32 for rows in tailed.values() for row in rows)


def test_tokenized_splits_keep_labels_and_order_and_no_text(notebook, tiny_config, task):
    split = Dataset.from_dict({"text": ["good film", "bad"], "label": [1, 0]})
    tokens = notebook.tokenize(split, task.tokenizer, tiny_config)
    assert {*tokens.column_names} == {"input_ids", "token_type_ids", "attention_mask", "label"}
    assert tokens["label"][:] == [1, 0]
    assert [task.tokenizer.decode(ids) for ids in tokens["input_ids"]] == ["[CLS] good film [SEP]", "[CLS] bad [SEP]"]


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_scores_are_those_of_scikit_learn(notebook, classes):
    rng = np.random.default_rng(classes)
    labels, guesses = rng.integers(0, classes, 60), rng.integers(0, max(classes - 1, 2), 60)
    found = notebook.score(labels, guesses, classes)
    f1 = {f"f1_{kind}": f1_score(labels, guesses, average=kind, zero_division=0) for kind in ("weighted", "macro")}
    expected = {"accuracy": accuracy_score(labels, guesses)} | f1
    matrix = confusion_matrix(labels, guesses, labels=range(classes))
    assert found["n"] == 60 and found["confusion_matrix"] == matrix.tolist()
    rates = notebook.rates(np.stack([matrix, matrix.T]))
    for name, value in expected.items():
        assert found[name] == pytest.approx(value) == rates[name][0]
        low, high = found[f"{name}_ci95"]
        assert 0 <= low < value < high <= 1
    assert rates["f1_macro"][1] == pytest.approx(f1_score(guesses, labels, average="macro", zero_division=0))
    json.dumps(found)


def test_a_class_that_is_neither_there_nor_answered_does_not_count(notebook):
    labels, guesses = np.array([0, 1, 1, 0]), np.array([0, 1, 0, 0])
    assert notebook.score(labels, guesses, 5)["f1_macro"] == pytest.approx(f1_score(labels, guesses, average="macro"))
    assert notebook.score(labels, labels, 2)["accuracy_ci95"] == [1, 1]


def test_the_seed_decides_the_interval(notebook):
    labels, guesses = np.arange(50) % 2, np.arange(50) % 3 % 2
    first, again, other = (notebook.score(labels, guesses, 2, seed)["f1_macro_ci95"] for seed in (1, 1, 2))
    assert first == again != other


def test_an_interval_is_as_wide_as_that_of_a_normal_share(notebook):
    right = np.arange(1000) % 5 > 0  # 80%
    low, high = notebook.score(np.ones(1000, int), right.astype(int), 2)["accuracy_ci95"]
    assert high - low == pytest.approx(2 * 1.96 * (0.8 * 0.2 / 1000) ** 0.5, rel=0.08)
    assert low + high == pytest.approx(1.6, abs=0.01)


def test_paired_intervals_hold_the_truth_in_about_95_of_100_cases(notebook):
    rng, held = np.random.default_rng(0), []
    for seed in range(600):
        first, second = rng.random(300) < 0.8, rng.random(300) < 0.7
        _, low, high = notebook.paired_difference(first, second, seed)
        held.append(low <= 10 <= high)
    assert 0.93 <= np.mean(held) <= 0.97


def test_a_paired_difference_is_of_points_and_of_the_same_texts(notebook):
    first, second = np.array([True] * 90 + [False] * 10), np.array([True] * 80 + [False] * 20)
    gain, low, high = notebook.paired_difference(first, second)
    assert gain == pytest.approx(10) and 3 < low < 10 < high < 17
    assert notebook.paired_difference(second, first)[0] == pytest.approx(-10)
    assert notebook.paired_difference(first, first) == [0, 0, 0]
    unpaired = notebook.paired_difference(first, second[::-1])
    assert unpaired[0] == pytest.approx(10) and unpaired[2] - unpaired[1] > 1.3 * (high - low)


def test_percent_is_a_share_with_its_interval(notebook):
    scores = {"accuracy": 0.8954, "accuracy_ci95": [0.88, 0.9101], "f1_macro": 1.0, "f1_macro_ci95": [0, 1]}
    assert notebook.percent(scores) == "89.5% [88.0, 91.0]"
    assert notebook.percent(scores, "f1_macro") == "100.0% [0.0, 100.0]"


TEXTS = [f"{'good ' * (n % 7)} film number {n} {'bad ' * (n * 5 % 11)}" for n in range(30)]


@pytest.fixture
def alone(model, task):
    """The logits of each text by itself."""
    tokens = [task.tokenizer(text, return_tensors="pt", truncation=True, max_length=32) for text in TEXTS]
    with torch.no_grad():
        return np.array([model(**each).logits[0].numpy() for each in tokens])


@pytest.mark.parametrize("size", [1, 7])
def test_logits_keep_the_order_of_the_texts_whatever_the_batch(notebook, model, alone, tiny_config, task, size):
    config = tiny_config.model_copy(update={"per_device_eval_batch_size": size})
    found = notebook.predict_logits(model.train(), TEXTS, config, task.tokenizer)
    assert not model.training  # without dropout
    assert found.dtype == np.float32 and np.allclose(found, alone, atol=1e-5) and np.ptp(found, axis=0).min() > 0.02
    assert np.allclose(notebook.predict_logits(model, TEXTS[::-1], config, task.tokenizer)[::-1], alone, atol=1e-5)


def test_a_batch_is_halved_where_memory_runs_out(notebook, model, alone, tiny_config, task, monkeypatch):
    forward, tried = model.forward, []

    def scarce(input_ids, **kwargs):
        tried.append(len(input_ids))
        if len(input_ids) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return forward(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model, "forward", scarce)
    config = tiny_config.model_copy(update={"per_device_eval_batch_size": 16})
    assert np.allclose(notebook.predict_logits(model, TEXTS, config, task.tokenizer), alone, atol=1e-5)
    assert tried == [16, 8, *[4] * 7, 2]


def test_another_error_is_not_taken_for_want_of_memory(notebook, model, tiny_config, task, monkeypatch):
    def fail(**kwargs):
        raise RuntimeError("something else")

    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(RuntimeError, match="something else"):
        notebook.predict_logits(model, TEXTS, tiny_config, task.tokenizer)


def test_a_hub_id_is_public_and_of_a_path_only_the_last_name(notebook, tmp_path, monkeypatch):
    assert notebook.public_name("owner/name-of-a-model") == "owner/name-of-a-model"
    (tmp_path / "secret" / "mine").mkdir(parents=True)
    assert notebook.public_name(str(tmp_path / "secret" / "mine")) == "mine"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "secret")
    assert notebook.public_name("~/secret/mine/") == notebook.public_name("mine/../../secret/mine") == "mine"


def test_results_are_added_to_and_replaced_by_name(notebook, tmp_path):
    path = tmp_path / "new" / "results.json"
    assert notebook.add_results(path, a=1, b=[np.float64(0.5)]) == {"a": 1, "b": [0.5]}
    assert notebook.add_results(path, b=np.int64(2), c="ö") == {"a": 1, "b": 2, "c": "ö"}
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": 1, "b": 2, "c": "ö"}


def test_a_write_that_fails_leaves_the_old_file(notebook, tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    notebook.atomic_write(path, "old")
    with pytest.raises(UnicodeEncodeError):
        notebook.atomic_write(path, "new \ud800")
    assert path.read_text() == "old"
    notebook.atomic_write(path, "nëw")
    assert path.read_text(encoding="utf-8") == "nëw"
    assert not [each for each in tmp_path.iterdir() if each.name not in ("a.json", "a.json.part")]


def results_of(notebook):
    scores = [notebook.score(np.arange(40) % 2, np.arange(40) % n % 2, 2) for n in (2, 3, 5)]
    about = {"model": "owner/base", "dataset": "reviews.csv", "labels": ["bad", "good"], "largest_class": 0.625}
    about |= {"rows": {"train": 1234}}
    return {"provenance": about, "test": scores[0], "test_merged": scores[1], "calibration": {"ece": 0.0321}} | {
        "baselines": {"tfidf_logreg": scores[2]}
    }


@pytest.mark.parametrize("tail_share", [0.0, 0.25])
def test_the_card_has_the_figures_of_the_results_and_no_paths(notebook, tiny_config, tail_share):
    results, config = (results_of(notebook), tiny_config.model_copy(update={"tail_share": tail_share, "lora_r": 13}))
    card = notebook.model_card(results, config)
    front = notebook.re.match(r"---\n(.*?)\n---\n", card, notebook.re.DOTALL)[1]
    assert "base_model: owner/base" in front and "{" not in card
    for part in (results["test"], results["test_merged"], results["baselines"]["tfidf_logreg"]):
        assert f"| {notebook.percent(part)} | {notebook.percent(part, 'f1_weighted')} |" in card
    for figure in ("| 62.5% |", "3.2 points", "rank 13", "bad, good", "32 tokens", "40 test texts", "`reviews.csv`"):
        assert figure in card, figure
    assert tiny_config.model_name not in card and tiny_config.output_dir not in card
    assert ("[:23] + ids[-9:]" in card and "25%" in card) == bool(tail_share)  # as cut_middle: 1 + 0.25 x 30
    if tail_share:
        ids = [*range(50)]
        assert notebook.cut_middle(ids, 32, tail_share) == ids[:23] + ids[-9:]


def test_an_explanation_escapes_html_and_shows_every_word(notebook, model, tiny_config, task):
    model.config.id2label = {0: "<bad>", 1: "<bad>"}
    shown = notebook.explain("<script>x</script> & good", model, tiny_config, task.tokenizer).data
    assert "<script>" not in shown and "&lt;script&gt;x&lt;/script&gt;" in shown and "&amp;" in shown
    assert "<b>&lt;bad&gt;</b>" in shown and shown.count("<span") == 3


def test_an_explanation_takes_no_words_and_shares_out_a_long_text(notebook, model, tiny_config, task):
    assert "%" in notebook.explain(" ", model, tiny_config, task.tokenizer).data
    words = [f"w{n}" for n in range(300)]
    shown = notebook.explain(" ".join(words), model, tiny_config, task.tokenizer).data
    plain = notebook.re.sub("<sub>.*?</sub>|<[^>]*>", "", shown).split(": ")[1]
    assert shown.count("<span") == 64 and plain.split() == words


def test_the_words_that_decide_are_marked(notebook, model, tiny_config, task, monkeypatch):
    def logits(model, texts, *args):
        return np.array([[0.0, 2.0 * ("good" in text) - 1.0 * ("dull" in text) + 3] for text in texts], np.float32)

    monkeypatch.setattr(notebook, "predict_logits", logits)
    shown = notebook.explain("a good dull film", model, tiny_config, task.tokenizer).data
    assert "good<sub>+2.0</sub>" in shown and "dull<sub>-1.0</sub>" in shown and shown.count("<sub>") == 2
    assert '1, 115, 178, 0.50)">good' in shown and '222, 143, 5, 0.25)">dull' in shown
    assert "98.2%" in shown  # the logistic function of 4


def test_without_a_run_nothing_is_logged_and_a_failing_one_is_survived(notebook, monkeypatch):
    labels = np.array([0, 1])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    assert notebook.log_test({"accuracy": 1.0}, labels, labels, ["a", "b"]) == ""
    monkeypatch.setitem(sys.modules, "wandb", type("wandb", (), {"run": None}))
    assert notebook.log_test({"accuracy": 1.0}, labels, labels, ["a", "b"]) == ""
    monkeypatch.setitem(sys.modules, "wandb", type("wandb", (), {"run": object()}))
    assert "AttributeError" in notebook.log_test({"accuracy": 1.0}, labels, labels, ["a", "b"])


def test_without_a_gpu_what_needs_one_is_unmeasured_and_the_rest_has_figures(notebook, tiny_config, task, tokenized):
    config = tiny_config.model_copy(update={"efficiency_steps": 2})
    rows = {}
    for name, (base, adapters, chosen) in notebook.methods(config, False).items():
        small = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
        chosen = chosen.model_copy(update=small)
        rows[name] = notebook.measure_method(base, adapters, chosen, task, tokenized["train"])
    measured = {name for name, row in rows.items() if row["measured"]}
    assert measured == {"full fp32", "QLoRA default", "QLoRA, this run"}
    for name, row in rows.items():
        figures = [value for kind, value in row.items() if kind not in ("measured", "peak_mb")]
        assert row["peak_mb"] is None and all(
            (value or 0) > 0 if name in measured else value is None for value in figures
        )
    full, this = rows["full fp32"], rows["QLoRA, this run"]
    assert (
        full["weights_mb"] * 1e6 == pytest.approx(4 * full["trainable_parameters"])
        and this["weights_mb"] < full["weights_mb"]
    )
    assert this["trainable_parameters"] == notebook.trained_at_rank(config, task, config.lora_r)


def test_the_methods_differ_in_what_their_names_say(notebook):
    config = notebook.Config(per_device_train_batch_size=3, gradient_checkpointing=False, max_length=99)
    table = notebook.methods(config, True)
    assert {name: (base, lora) for name, (base, lora, _) in table.items()} == {
        name: ("4-bit" if "QLoRA" in name else "float16" if "LoRA" in name else "float32", "LoRA" in name)
        for name in table
    }
    settings = {name: chosen for name, (*_, chosen) in table.items()}
    assert all(chosen.cuda_graphs == ("captured" in name) for name, chosen in settings.items() if "this" not in name)
    assert settings.pop("QLoRA, this run") == config and {each.max_length for each in settings.values()} == {99}
    assert {each.per_device_train_batch_size for each in settings.values()} == {16}
    assert [name for name, each in settings.items() if not each.fp16] == ["full fp32"]
    assert settings["QLoRA default"].gradient_checkpointing and not settings["full fp16"].gradient_checkpointing


def test_the_textbook_estimate_is_bytes_times_parameters(notebook):
    estimate = notebook.textbook_estimate(109_483_778, 591_362)
    full, qlora = estimate["full fine-tuning"], estimate["QLoRA"]
    assert [round(full["weights"]), round(full["with gradients and Adam"]), round(qlora["weights"])] == [438, 1752, 55]
    assert qlora["with gradients and Adam"] - qlora["weights"] == pytest.approx(16 * 591_362 / 1e6)
