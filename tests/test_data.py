"""Sections 3 to 5: reading, cleaning, splitting, tokens, baseline and scores."""

import time

import numpy as np
import pandas as pd
import pytest
import scipy
from datasets import ClassLabel, Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st


def write_csv(folder, **columns):
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(columns).to_csv(folder / "reviews.csv", index=False)
    return str(folder)


@pytest.mark.parametrize(
    ("text_name", "label_name", "labels"),
    [("review", "sentiment", [1, 0]), ("text", "label", ["positive", "negative"]), ("text", "sentiment", ["Pos", " NEG "]), ("review", "label", [1.0, 0.0])],
)
def test_both_namings_and_all_label_forms_are_read(notebook, tmp_path, text_name, label_name, labels):
    folder = write_csv(tmp_path, **{text_name: ["good", "bad"], label_name: labels, "other": [1, 2]})
    cleaned, _ = notebook.clean_reviews(notebook.load_reviews(folder))
    assert cleaned.to_dict("list") == {"text": ["good", "bad"], "label": [1, 0], "split": ["train", "train"]}


def test_all_splits_of_a_parquet_folder_are_pooled(notebook, tmp_path):
    for index, split in enumerate(("train", "validation", "test")):
        Dataset.from_dict({"review": [f"{split} {row}" for row in range(index + 2)], "sentiment": [row % 2 for row in range(index + 2)]}).to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    assert len(notebook.load_reviews(str(tmp_path))) == 2 + 3 + 4


def test_class_names_decide_not_their_order(notebook, tmp_path):
    rows = Dataset.from_dict({"text": ["awful", "superb"], "label": [1, 0]}).cast_column("label", ClassLabel(names=["pos", "neg"]))
    rows.to_parquet(tmp_path / "train.parquet")
    cleaned, _ = notebook.clean_reviews(notebook.load_reviews(str(tmp_path)))
    assert cleaned.set_index("text")["label"].to_dict() == {"awful": 0, "superb": 1}


def test_cleaning_drops_what_it_says_and_counts_it(notebook):
    raw = pd.DataFrame({"text": ["One.<br /><br />Two.", "One. Two.", "same", "same", "", "  <br> ", None, "fine"], "label": [1, 1, 0, 1, 0, 1, 0, 0]})
    cleaned, counts = notebook.clean_reviews(raw)
    assert cleaned.to_dict("list") == {"text": ["One. Two.", "fine"], "label": [1, 0]}
    assert counts == {"read": 8, "with line-break tags": 2, "empty, dropped": 3, "repeated, dropped": 1, "with both labels, dropped": 2, "left": 2}


@pytest.mark.parametrize("labels", [[0, 1, 2], [0, 0, 0], [1, 0, None], ["good", "bad", "good"], [-1, -1, -1], [0.5, 1, 0]])
def test_labels_that_are_not_two_classes_are_refused(notebook, labels):
    with pytest.raises(ValueError, match="two classes.*Found: "):
        notebook.clean_reviews(pd.DataFrame({"text": ["a", "b", "c"], "label": labels}))


def test_texts_that_are_no_strings_are_refused(notebook):
    with pytest.raises(ValueError, match="2 values that are not text, such as 3"):
        notebook.clean_reviews(pd.DataFrame({"text": ["a", 3, 4], "label": [0, 1, 0]}))


def test_missing_columns_name_those_found(notebook, tmp_path):
    with pytest.raises(ValueError, match="no text column: it has body, label"):
        notebook.load_reviews(write_csv(tmp_path / "a", body=["x"], label=[1]))
    with pytest.raises(ValueError, match="no label column: it has text, stars"):
        notebook.load_reviews(write_csv(tmp_path / "b", text=["x"], stars=[1]))


def test_a_missing_or_unreadable_folder_is_said(notebook, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        notebook.load_reviews(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="cannot be read as a data set"):
        notebook.load_reviews(str(tmp_path))
    (tmp_path / "reviews.parquet").write_bytes(b"PAR1 this is not Parquet")
    with pytest.raises(ValueError, match="cannot be read as a data set"):
        notebook.load_reviews(str(tmp_path))


def test_what_is_not_in_the_cache_fails_offline_with_what_to_do(notebook, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    start = time.monotonic()
    with pytest.raises(ConnectionError, match="QLORA_DATASET_NAME=path/to/folder"):
        notebook.load_reviews("dipanjanS/imdb_sentiment_finetune_dataset20k")
    with pytest.raises(ConnectionError, match="QLORA_MODEL_NAME=path/to/folder"):
        notebook.inspect_model("no-such-user/no-such-model")
    assert time.monotonic() - start < 10


def test_splits_have_the_asked_sizes_and_strata_and_share_no_text(notebook, sentences):
    splits = notebook.split_reviews(sentences, 0.1, 0.1, seed=42)
    sizes = {name: len(split) for name, split in splits.items()}
    assert sum(sizes.values()) == len(sentences)
    for name, share in (("train", 0.8), ("validation", 0.1), ("test", 0.1)):
        assert sizes[name] == pytest.approx(share * len(sentences), abs=2)
        assert np.mean(splits[name]["label"]) == pytest.approx(sentences["label"].mean(), abs=0.002)
    texts = {name: set(split["text"]) for name, split in splits.items()}
    assert len(texts["train"] | texts["validation"] | texts["test"]) == len(sentences)


def test_the_seed_decides_the_split_and_a_smaller_train_changes_nothing_else(notebook, sentences):
    first, again, other = (notebook.split_reviews(sentences, 0.1, 0.1, seed=seed) for seed in (1, 1, 2))
    assert first["test"]["text"] == again["test"]["text"] != other["test"]["text"]
    small = notebook.sample_train(first, 500, seed=1)
    assert len(small["train"]) == 500 and small["test"]["text"] == first["test"]["text"] and set(small["train"]["text"]) <= set(first["train"]["text"])


@pytest.mark.parametrize("rows", [0, 2, 9])
def test_too_few_rows_for_a_stratified_split_are_refused(notebook, rows):
    reviews = pd.DataFrame({"text": [str(row) for row in range(2 * rows)], "label": [0, 1] * rows})
    with pytest.raises(ValueError, match="at least 10 of each"):
        notebook.split_reviews(reviews, 0.1, 0.1, seed=42)


def test_a_tiny_training_share_is_refused_too(notebook):
    reviews = pd.DataFrame({"text": [str(row) for row in range(40)], "label": [0, 1] * 20})
    with pytest.raises(ValueError, match="at least 50 of each"):
        notebook.split_reviews(reviews, 0.49, 0.49, seed=42)


@pytest.mark.parametrize("wanted", [2, 7, 150, 158, 159, 160, 999])
def test_any_number_of_training_rows_can_be_asked_for(notebook, wanted):
    reviews = pd.DataFrame({"text": [str(row) for row in range(200)], "label": [0, 1] * 100})
    train = notebook.sample_train(notebook.split_reviews(reviews, 0.1, 0.1, seed=42), wanted, seed=42)["train"]
    assert min(wanted, 160) - 1 <= len(train) <= min(wanted, 160) and abs(np.mean(train["label"]) - 0.5) <= 1 / len(train)


def test_the_gain_is_the_difference_of_the_accuracies_with_a_paired_interval(notebook):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 1000)
    others = np.where(rng.random(1000) < 0.8, labels, 1 - labels)
    better = np.where(rng.random(1000) < 0.2, labels, others)  # corrects a fifth of the mistakes
    gain, (low, high) = notebook.accuracy_gain(labels, better, others, seed=0)
    assert gain == pytest.approx(100 * (np.mean(better == labels) - np.mean(others == labels))) and 0 < low < gain < high
    independent = 196 * np.sqrt(2 * 0.8 * 0.2 / 1000)
    assert (high - low) / 2 < independent  # pairs tell more than two separate intervals


def test_the_fast_f1_is_scikit_learns(notebook):
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, 2, (2, 20, 30))
    expected = [notebook.f1_score(truth, guess, average="weighted") for truth, guess in zip(labels, predictions, strict=True)]
    assert notebook.weighted_f1(labels, predictions) == pytest.approx(expected)


def test_twenty_rows_are_just_enough(notebook):
    reviews = pd.DataFrame({"text": [str(row) for row in range(20)], "label": [0, 1] * 10})
    splits = notebook.split_reviews(reviews, 0.1, 0.1, seed=42)
    assert {name: sorted(set(split["label"])) for name, split in splits.items()} == {"train": [0, 1], "validation": [0, 1], "test": [0, 1]}


def test_tokens_are_cut_at_the_limit_and_counted_uncut(notebook, offline_model):
    tokenizer = notebook.AutoTokenizer.from_pretrained(offline_model)
    splits = DatasetDict(train=Dataset.from_dict({"text": ["word " * 600, "short"], "label": [0, 1]}))
    counts = {"train": notebook.count_tokens(list(splits["train"]["text"]), tokenizer)}
    assert counts["train"].tolist() == [602, 3]
    tokenized = notebook.tokenize_reviews(splits, tokenizer, 256)["train"]
    assert [len(ids) for ids in tokenized["input_ids"]] == [256, 3] and tokenized["label"] == [0, 1]
    table = notebook.describe_truncation(counts, 256).loc["train"]
    assert table["cut"] == 1 and table["tokens lost, median of those cut"] == 346 and table["share of all tokens lost"] == pytest.approx(346 / 605)
    batch = notebook.DataCollatorWithPadding(tokenizer)([tokenized[0], tokenized[1]])
    assert batch["input_ids"].shape == (2, 256) and batch["attention_mask"].sum().item() == 259


def test_metrics_equal_scikit_learns_and_the_interval_holds_them(notebook):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 400)
    predictions = np.where(rng.random(400) < 0.8, labels, 1 - labels)
    scores = notebook.score(labels, predictions, seed=1)
    assert scores["accuracy"] == notebook.accuracy_score(labels, predictions)
    assert scores["f1_weighted"] == notebook.f1_score(labels, predictions, average="weighted")
    low, high = scores["accuracy_ci95"]
    normal = 1.96 * np.sqrt(scores["accuracy"] * (1 - scores["accuracy"]) / 400)
    assert low < scores["accuracy"] < high and (high - low) / 2 == pytest.approx(normal, rel=0.15)
    assert notebook.score(labels, predictions, seed=1) == scores


def write_splits(folder, **splits):
    """Write the texts of each split, of alternating labels, as the Hub's data set has them."""
    for name, texts in splits.items():
        labels = [row % 2 for row in range(len(texts))]
        Dataset.from_dict({"review": texts, "sentiment": labels}).to_parquet(folder / f"{name}-00000-of-00001.parquet")
    return str(folder)


def test_the_published_splits_are_kept_and_the_test_split_loses_nothing(notebook, tmp_path):
    folder = write_splits(tmp_path, train=["a", "b", "c", "d", "again", "e"], validation=["f", "g", "h", "i"], test=["again", "j", "k", "l"])
    config = notebook.resolve_config({"QLORA_DATASET_NAME": folder, "QLORA_LAYOUT": "published"}, cuda=False)[0]
    splits, counts = notebook.prepare_splits(config)
    assert {name: list(split["text"]) for name, split in splits.items()} == {"train": ["a", "b", "c", "d", "e"], "validation": ["f", "g", "h", "i"], "test": ["again", "j", "k", "l"]}
    assert counts["repeated, dropped"] == 1 and splits["test"].features == splits["train"].features


@pytest.mark.parametrize("names", [("train", "validation", "test"), ("test", "validation", "train"), ("validation", "test", "extra", "train")])
def test_the_published_test_split_keeps_its_texts_in_whatever_order_the_splits_come(notebook, monkeypatch, names):
    """"film 0" is in all splits, "film 1" in training and validation."""
    texts = {"train": ["film 0", "film 1", "a", "b"], "validation": ["film 0", "film 1", "c", "d"], "test": ["film 0", "e"], "extra": ["film 0", "film 1", "e"]}
    labels = {"film 0": 0, "film 1": 1, "a": 0, "b": 1, "c": 0, "d": 1, "e": 1}
    reviews = notebook.pd.DataFrame([(text, labels[text], name) for name in names for text in texts[name]], columns=["text", "label", "split"])
    monkeypatch.setattr(notebook, "load_reviews", lambda *_: reviews)
    splits, _ = notebook.prepare_splits(notebook.Config(layout="published"))
    assert {name: list(split["text"]) for name, split in splits.items()} == {"train": ["a", "b"], "validation": ["film 1", "c", "d"], "test": ["film 0", "e"]}


@pytest.mark.parametrize("splits", [{"train": ["a", "b"], "test": ["c", "d"]}, {"train": ["a", "b"], "validation": ["c"], "test": ["d", "e"]}])
def test_a_layout_that_was_not_published_is_refused(notebook, tmp_path, splits):
    config = notebook.resolve_config({"QLORA_DATASET_NAME": write_splits(tmp_path, **splits), "QLORA_LAYOUT": "published"}, cuda=False)[0]
    with pytest.raises(ValueError, match="train, validation, test.*Found: .*QLORA_LAYOUT=pooled"):
        notebook.prepare_splits(config)


@given(length=st.integers(2, 600), max_length=st.integers(3, 300), tail_share=st.floats(0, 1))
def test_the_middle_is_cut_and_both_ends_stay(notebook, length, max_length, tail_share):
    row = list(range(length))
    kept = notebook.cut_middle(row, max_length, tail_share)
    assert len(kept) == min(length, max_length) and kept[0] == 0 and kept[-1] == length - 1
    gaps = [(left, right) for left, right in zip(kept, kept[1:]) if right != left + 1]
    assert len(gaps) == (length > max_length)  # one hole, and only where it is too long
    for left, _ in gaps:
        tail = max_length - 1 - left  # the tokens behind the hole, [SEP] among them
        assert tail - 1 == pytest.approx(tail_share * (max_length - 2), abs=0.5)


def test_without_a_tail_a_text_is_cut_as_the_tokenizer_cuts_it(notebook, offline_model):
    tokenizer = notebook.AutoTokenizer.from_pretrained(offline_model)
    texts = ["word " * 50, "short", ""]
    assert notebook.encode(texts, tokenizer, 20) == dict(tokenizer(texts, truncation=True, max_length=20))


@pytest.mark.parametrize("fit", ["fit_tfidf_baseline", "fit_tfidf_nb_baseline"])
def test_the_baselines_learn_from_words(notebook, sentences, fit):
    splits = notebook.sample_train(notebook.split_reviews(sentences, 0.1, 0.1, seed=42), 2000, seed=42)
    baseline = getattr(notebook, fit)(splits["train"], seed=42)
    assert 0.68 < baseline.score(splits["test"]["text"], splits["test"]["label"]) < 0.80


def test_the_log_count_ratio_is_that_of_wang_and_manning(notebook):
    """Shares of 3/5 and 1/5 of the first word, and so on, worked out by hand, with one added to every count."""
    counts = scipy.sparse.csr_matrix([[2.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0, 1.0, 0.0]])
    weighed = notebook.LogCountRatio(alpha=1.0).fit(counts, [1, 0, 0])
    expected = np.log([(3 / 5) / (1 / 6), (1 / 5) / (3 / 6), (1 / 5) / (2 / 6)])
    assert weighed.ratio_ == pytest.approx(expected)
    assert weighed.transform(counts).toarray() == pytest.approx(counts.toarray() * expected)
