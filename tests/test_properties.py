"""Whatever a user feeds the notebook ends in a right answer or in a documented error, never in a traceback from inside a library."""

import csv
import json
import re
import tempfile
import traceback
from collections import Counter
from decimal import Decimal
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from hypothesis import example, given, settings
from hypothesis import strategies as st

cheap = settings(max_examples=1000, deadline=None)
slow = settings(max_examples=60, deadline=None)  # an example takes 20 to 100 ms: it writes and reads files, fits, maps or runs a model

WORDS = ["a good film", "bad, bad, bad", "A  good\tfilm", "a good<br />film", "<br><br/>", "<p>good &amp; bad</p><script>a()</script>", "!", "?!", "I", "nan", "0"]
BLANKS = ["", " ", "\t\r\n", "\x85", "\u2028\u2029", "\xa0\u3000", "\x1c\x1f"]
SIGNS = ["\x00", "good\x00film", "\x07\x1b[31m", "\u200b", "\ufeff", "\ufffd", "סרט טוב", "\u202eفيلم جيد\u202c", "好电影", "👩‍👩‍👧‍👦🏳️‍🌈", "e" + "\u0301" * 50]
ENORMOUS = ["x" * 100_000, "word " * 20_000, "🎬" * 100_000, "<br />" * 16_000]
SENTENCES = st.sampled_from(WORDS + BLANKS + SIGNS) | st.text(max_size=20)
READABLE = st.sampled_from((WORDS + BLANKS + SIGNS) * 3 + ENORMOUS) | st.text(max_size=20)
MISSING = st.sampled_from([None, float("nan"), np.float32("nan"), pd.NA, pd.NaT])
SURROGATES = st.builds("{}{}".format, SENTENCES, st.characters(categories=["Cs"]))
KEYS = st.text(max_size=3)
NESTED = st.recursive(st.none() | st.integers() | KEYS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=2), max_leaves=4)
OTHERS = [True, 0, -1.5, float("inf"), 10**400, Decimal("0.5"), b"bytes", (1, 2), [[1, [2]], 3], [None], {"a": 1}, {1, 2}, np.array([1, 2]), np.bool_(False), 1j, object]
STRANGE = SURROGATES | st.sampled_from(OTHERS) | st.binary(max_size=5) | st.floats(allow_nan=False) | st.lists(NESTED, max_size=3)

NEGATIVE = [0, 0.0, "0", "0.0", "negative", " NEG\n", "Negative", np.int8(0), np.float32(0), np.str_("neg"), Decimal(0)]
POSITIVE = [1, 1.0, "1", "1.0", "POSITIVE", "pos", "\tPos", np.uint64(1), np.float16(1), Decimal(1)]
NO_LABELS = [True, False, np.bool_(True), 2, -1, 0.5, float("inf"), 10**400, "", "good", "true", "x" * 100_000, b"1", [0], [], {"a": 1}, (1,), np.array([1]), "\ud800", float("nan"), None, pd.NA, pd.NaT]
LABELS = st.sampled_from([(form, 0) for form in NEGATIVE] + [(form, 1) for form in POSITIVE])


def answer(function, *args, **kwargs):
    """Return what ``function`` returns and None, or None and the message of the documented error: a ValueError of the notebook's own, not too long to read."""
    try:
        return function(*args, **kwargs), None
    except ValueError as error:
        frames = traceback.extract_tb(error.__traceback__)
        assert frames[-1].filename.startswith("<code cell"), f"raised in {frames[-1].filename}"
        message = str(error)
        assert re.search("Allowed|Needed|needs|must be|Name the column", message) and len(message) < 1200 and message.encode("utf-8")
        return None, message


def is_text(value) -> bool:
    return isinstance(value, str) and value.encode("utf-8", "ignore").decode() == value


def cleaned_by_hand(texts, labels, keep):
    """Return text and label of the rows that stay, in their order, and the counts, worked out without pandas."""
    plain = [" ".join(re.sub(r"<br\s*/?>", " ", text).split()) if isinstance(text, str) else "" for text in texts]
    seen, places = {}, {}
    for place, (text, label) in enumerate(zip(plain, labels, strict=True)):
        if text:
            seen.setdefault(text, []).append(label)
            places[text] = place if keep == "last" else places.get(text, place)
    kept = [(text, seen[text][0]) for text in sorted(places, key=places.get) if len(set(seen[text])) == 1]
    counts = {"empty, dropped": plain.count(""), "repeated, dropped": sum(len(seen[text]) - 1 for text, _ in kept), "left": len(kept), "read": len(texts)}
    return kept, counts | {"with both labels, dropped": len(texts) - plain.count("") - sum(len(seen[text]) for text, _ in kept)}


def check_cleaned(cleaned, counts):
    """Check what holds of every cleaned table."""
    texts = list(cleaned["text"])
    assert all(is_text(text) and text and text == " ".join(text.split()) for text in texts) and len(set(texts)) == len(texts)
    assert set(cleaned["label"]) <= {0, 1} and cleaned["label"].dtype == int and list(cleaned.index) == list(range(len(cleaned)))
    assert counts["read"] == len(cleaned) + counts["empty, dropped"] + counts["repeated, dropped"] + counts["with both labels, dropped"] and counts["left"] == len(cleaned)


WELL, STRANGE_TEXT, STRANGE_LABEL = (READABLE | MISSING, LABELS), (READABLE | STRANGE, LABELS), (READABLE, LABELS | st.sampled_from([(form, None) for form in NO_LABELS]))
TABLES = st.one_of(st.lists(st.tuples(*columns), max_size=12) for columns in (WELL, STRANGE_TEXT, STRANGE_LABEL))


@cheap
@given(table=TABLES, keep=st.sampled_from(["first", "last"]), data=st.data())
def test_cleaning_is_right_or_says_what_is_not_text_or_no_label(notebook, table, keep, data):
    texts, labels = [text for text, _ in table], [label for _, (_, label) in table]
    text_column, forms = pd.Series(texts, dtype=object), pd.Series([form for _, (form, _) in table], dtype=object)
    readable = all(is_text(text) or (pd.api.types.is_scalar(text) and pd.isna(text)) for text in texts)
    if readable:
        dtype = data.draw(st.sampled_from([object, "string", "category", "inferred"]))
        text_column = text_column.infer_objects() if dtype == "inferred" else text_column.astype(dtype)
    cleaned, message = answer(notebook.clean_reviews, pd.DataFrame({"text": text_column, "label": forms, "other": range(len(table))}), keep)
    if not readable:
        assert "that are not text, such as" in message
    elif set(labels) != {0, 1}:
        assert "two classes" in message and "Found: " in message
    else:
        check_cleaned(*cleaned)
        kept, counts = cleaned_by_hand(texts, labels, keep)
        assert list(zip(cleaned[0]["text"], cleaned[0]["label"], strict=True)) == kept and counts.items() <= cleaned[1].items()


@pytest.mark.parametrize("dtype", ["float64", "Float32", "Int64", "boolean", "datetime64[ns]", "timedelta64[s]", "category", "complex128", object])
def test_a_column_of_another_type_is_no_text_and_a_blank_one_empty_text_and_no_label(notebook, dtype):
    assert "2 values that are not text" in answer(notebook.clean_reviews, pd.DataFrame({"text": pd.Series([0, 1]).astype(dtype), "label": [0, 1]}))[1]
    blank = pd.Series([None, None], dtype=dtype)
    assert notebook.clean_reviews(pd.DataFrame({"text": blank, "label": [0, 1]}))[1]["empty, dropped"] == 2
    assert "two classes" in answer(notebook.clean_reviews, pd.DataFrame({"text": ["a", "b"], "label": blank}))[1]


@pytest.fixture(scope="module")
def new_folder(tmp_path_factory):
    """A function that makes a folder; what ``datasets`` caches stays out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield lambda: Path(tempfile.mkdtemp(dir=tmp_path_factory.getbasetemp()))


def write(folder, kind, texts, labels, label_type=None):
    """Write a table as CSV, JSON lines or Parquet, the latter with ``label_type``."""
    if kind == "csv":
        pd.DataFrame({"text": pd.Series(texts, dtype=object), "label": labels}).to_csv(folder / "train.csv", index=False, quoting=csv.QUOTE_ALL)
    elif kind == "json":
        (folder / "train.jsonl").write_text("\n".join(json.dumps({"text": text, "label": label}) for text, label in zip(texts, labels, strict=True)))
    else:
        features = Features({"text": Value("string"), "label": label_type or Value("int64")})
        Dataset.from_dict({"text": texts, "label": labels}, features).to_parquet(folder / "train.parquet")


@slow
@given(kind=st.sampled_from(["csv", "json", "parquet"]), table=st.lists(st.tuples(READABLE.map("t{}".format), st.integers(0, 1)), min_size=1, max_size=10))
def test_every_file_format_gives_back_the_texts_it_was_given(notebook, new_folder, kind, table):
    texts, labels = map(list, zip(*table, strict=True))  # "t" before each: in CSV, "0" is a number and "nan" is missing
    folder = new_folder()
    write(folder, kind, texts, labels)
    reviews = notebook.load_reviews(str(folder))
    assert reviews["text"].tolist() == texts and reviews["label"].tolist() == labels and set(reviews["split"]) == {"train"}


CONTENTS = st.binary(max_size=30) | st.text(max_size=30).map(str.encode).map(b"text,label\n".__add__)
JSON_TABLES = st.lists(st.tuples(NESTED, NESTED), max_size=5) | st.lists(st.tuples(READABLE | st.none(), st.sampled_from([0, 1, "pos", "NEG"])), max_size=8)


@slow
@example(kind="json", content=b"", table=[])
@given(kind=st.sampled_from(["raw.csv", "raw.json", "raw.parquet", "json"]), content=CONTENTS, table=JSON_TABLES)
def test_any_file_is_read_and_cleaned_or_refused(notebook, new_folder, kind, content, table):
    folder = new_folder()
    if kind == "json":
        write(folder, kind, *(map(list, zip(*table, strict=True)) if table else ([], [])))
    elif not (kind == "raw.json" and content.strip() == b"null"):  # which crashes datasets itself (5.2.0)
        (folder / kind).write_bytes(content)
    reviews, _ = answer(notebook.load_reviews, str(folder))
    if reviews is not None:
        assert list(reviews.columns) == ["text", "label", "split"] and len(reviews)
        cleaned, _ = answer(notebook.clean_reviews, reviews)
        assert cleaned is None or check_cleaned(*cleaned) is None


@slow
@given(names=st.permutations(["neg", "pos"]) | st.sampled_from([["0", "1"], ["bad", "good"]]), labels=st.lists(st.sampled_from([0, 1] * 9 + [-1, None]), min_size=1, max_size=10))
def test_named_classes_are_read_by_name_and_unlabelled_rows_are_said(notebook, new_folder, names, labels):
    folder = new_folder()
    write(folder, "parquet", [str(row) for row in range(len(labels))], labels, ClassLabel(names=names))
    cleaned, message = answer(notebook.clean_reviews, notebook.load_reviews(str(folder)))
    if set(labels) == {0, 1} and "bad" not in names:
        meaning = {"neg": 0, "pos": 1, "0": 0, "1": 1}
        assert list(cleaned[0]["label"]) == [meaning[names[label]] for label in labels]
    else:
        assert "two classes" in message


BITS, PUBLISHED = st.integers(0, 1), st.sampled_from(["train", "validation", "test"])
SHARES = st.tuples(st.floats(0.01, 0.6), st.floats(0.01, 0.6)).filter(lambda shares: sum(shares) < 0.99)


@settings(max_examples=100, deadline=None)  # 20 ms an example: a data set is split twice and sampled
@given(counts=st.tuples(st.integers(0, 60), st.integers(0, 60)), held_out=SHARES, seed=st.integers(0, 2**32 - 1), wanted=st.none() | st.integers(2, 100))
def test_splits_share_out_all_rows_with_both_labels_or_say_how_many_are_needed(notebook, counts, held_out, seed, wanted):
    reviews = pd.DataFrame({"text": [str(row) for row in range(sum(counts))], "label": np.repeat([0, 1], counts)})
    splits, message = answer(notebook.split_reviews, reviews, *held_out, seed)
    if min(counts) * min(*held_out, 1 - sum(held_out)) < 1 - 1e-9:
        assert f"rarer label has {min(counts)} reviews" in message
        return
    assert Counter(text for split in splits.values() for text in split["text"]) == Counter(reviews["text"])
    assert all(set(split["label"]) == {0, 1} for split in splits.values())
    sample = notebook.sample_train(splits, wanted, seed)
    before, after = Counter(splits["train"]["label"]), Counter(sample["train"]["label"])
    share = min(1, (wanted or np.inf) / len(splits["train"]))
    assert len(sample["train"]) <= min(wanted or np.inf, len(splits["train"])) and set(sample["train"]["text"]) <= set(splits["train"]["text"])
    assert len(set(sample["train"]["text"])) == len(sample["train"]) and all(abs(after[label] - share * before[label]) <= 1 for label in (0, 1)) and sample["test"] is splits["test"]


@settings(max_examples=200, deadline=None)  # 10 ms an example: three data sets are written
@given(table=st.lists(st.tuples(PUBLISHED, BITS), min_size=12, max_size=30) | st.lists(st.tuples(PUBLISHED | st.sampled_from(["unsupervised", "Train", ""]), BITS), max_size=20))
def test_published_splits_are_those_of_the_table_or_their_lack_is_said(notebook, table):
    reviews = pd.DataFrame(table, columns=["split", "label"]).assign(text=[str(row) for row in range(len(table))])
    splits, message = answer(notebook.published_splits, reviews)
    wanted = {name: [(str(row), label) for row, (split, label) in enumerate(table) if split == name] for name in ("train", "validation", "test")}
    if all(len({label for _, label in part}) == 2 for part in wanted.values()):
        assert {name: list(zip(split["text"], split["label"], strict=True)) for name, split in splits.items()} == wanted
    else:
        assert "Found: " in message and "Found: ." not in message


@pytest.fixture(scope="module")
def tokenizer(notebook, offline_model):
    return notebook.AutoTokenizer.from_pretrained(offline_model)


@cheap
@given(texts=st.lists(READABLE, max_size=6) | st.lists(SENTENCES | STRANGE | MISSING, max_size=4) | SENTENCES, max_length=st.integers(3, 300), tail_share=st.floats(0, 1))
def test_every_text_becomes_ids_between_cls_and_sep_within_the_limit(notebook, tokenizer, texts, max_length, tail_share):
    encoded, message = answer(notebook.encode, texts, tokenizer, max_length, tail_share)
    if isinstance(texts, str) or not all(map(is_text, texts)):
        assert "cannot be encoded, such as" in message
        return
    assert list(encoded) == ["input_ids", "token_type_ids", "attention_mask"] and {len(column) for column in encoded.values()} == {len(texts)}
    for ids, types, mask in zip(*encoded.values(), strict=True):
        assert 2 <= len(ids) <= max_length and (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id) and 0 <= min(ids) <= max(ids) < len(tokenizer)
        assert set(types) == {0} and set(mask) == {1} and len(types) == len(mask) == len(ids)


@slow
@given(table=st.lists(st.tuples(READABLE, st.integers(0, 1)), min_size=1, max_size=5), max_length=st.integers(3, 64))
def test_tokenized_splits_are_the_encoded_texts_with_their_labels(notebook, tokenizer, table, max_length):
    reviews = pd.DataFrame(table, columns=["text", "label"])
    tokenized = notebook.tokenize_reviews(DatasetDict(train=notebook.labelled(reviews)), tokenizer, max_length, 0.5)["train"]
    assert tokenized.to_dict() == {"label": list(reviews["label"])} | notebook.encode(list(reviews["text"]), tokenizer, max_length, 0.5)


@pytest.fixture(scope="module")
def classifier(notebook, tiny_bert):
    return notebook.AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=2)


@slow
@given(texts=st.lists(READABLE, max_size=6) | st.lists(SENTENCES | STRANGE, max_size=3), batch_size=st.integers(1, 4), max_length=st.integers(3, 128))
def test_predictions_are_finite_and_in_the_order_of_the_texts(notebook, classifier, tokenizer, texts, batch_size, max_length):
    logits, message = answer(notebook.predict_logits, classifier, tokenizer, texts, max_length, batch_size=batch_size)
    if not all(map(is_text, texts)):
        assert "cannot be encoded, such as" in message
        return
    assert logits.shape == (len(texts), 2) and logits.dtype == np.float32 and np.isfinite(logits).all()
    assert np.allclose(notebook.predict_logits(classifier, tokenizer, texts[::-1], max_length)[::-1], logits, atol=1e-4)


@pytest.mark.parametrize(("fit", "word"), [("fit_tfidf_baseline", r"\b\w\w+\b"), ("fit_tfidf_nb_baseline", r"\b\w+\b|[!?]")])
@slow
@given(table=st.lists(st.tuples(READABLE, st.integers(0, 1)), min_size=1, max_size=10), unseen=st.lists(READABLE, min_size=1, max_size=5))
def test_a_baseline_predicts_any_text_or_says_what_it_cannot_learn_from(notebook, fit, word, table, unseen):
    train = notebook.labelled(pd.DataFrame(table, columns=["text", "label"]))
    model, message = answer(getattr(notebook, fit), train, seed=42)
    if set(train["label"]) == {0, 1} and any(re.search(word, text.lower()) for text in train["text"]):
        assert set(model.predict(unseen)) <= {0, 1} and np.isfinite(model.decision_function(unseen)).all()
    else:
        assert "No bag of words can be fitted" in message


NO_BITS = st.sampled_from([2, -1, 0.5, None, float("nan"), "1", "pos", b"1", 10**400, np.int8(1), True])
PAIRS = st.lists(st.tuples(BITS, BITS), min_size=1, max_size=12).map(lambda pairs: tuple(map(list, zip(*pairs, strict=True))))


@settings(max_examples=200, deadline=None)  # 15 ms an example: evaluate writes each to disk
@given(pair=PAIRS | st.tuples(st.lists(BITS, max_size=5), st.lists(BITS | NO_BITS, max_size=5)))
def test_scores_are_those_of_the_predictions_or_the_values_are_refused(notebook, pair):
    labels, predictions = pair
    scores, message = answer(notebook.score, labels, predictions, seed=0, n_resamples=20)
    if len(labels) == len(predictions) >= 2 and set(map(type, predictions)) <= {int, bool, np.int8} and set(predictions) <= {0, 1}:
        assert scores["n"] == len(labels) and scores["accuracy"] == pytest.approx(np.mean(np.equal(labels, predictions)))
        for name in ("accuracy", "f1_weighted"):
            low, high = scores[f"{name}_ci95"]
            assert 0 <= low <= high <= 1 and 0 <= scores[name] <= 1
    else:
        assert "cannot be scored" in message
