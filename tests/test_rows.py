"""Section 3: columns, labels, cleaning and splits of any table."""

import io
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from test_data import FOUND, TWO, gather, pairs, refusal, write


def rows_of(counts):
    """Return as many rows of each label as `counts` says, each with its own text."""
    texts = []
    labels = []
    for label, count in counts.items():
        for number in range(count):
            texts.append(f"text {number} of {label}")
            labels.append(label)
    return frame(texts, labels)


def frame(texts, labels):
    return pd.DataFrame({"text": texts, "label": labels}, dtype=object)


def table_of(csv):
    return pd.read_csv(io.StringIO(csv))


@pytest.mark.parametrize("text", ["text", " TEXT ", "Review"])
@pytest.mark.parametrize("label", ["label", "LABEL", "Sentiment"])
def test_columns_are_found_whatever_their_case(notebook, text, label):
    table = table_of(f"id,{text},{label}\n1,good,pos\n2,bad,neg\n")
    assert pairs(notebook.pick_columns([table])) == FOUND


def test_settings_name_the_columns_whatever_their_case(notebook):
    table = table_of("text,Body,Class\nno,good,pos\nno,bad,neg\n")
    rows = notebook.pick_columns([table], "body", "CLASS")
    assert pairs(rows) == FOUND


def test_of_columns_that_differ_in_case_the_one_that_was_named_is_read(notebook):
    table = table_of("text,Text,label\nno,good,pos\nno,bad,neg\n")
    rows = notebook.pick_columns([table], "Text")
    assert pairs(rows) == FOUND


def test_a_missing_column_is_refused_with_the_columns_and_the_setting(notebook):
    table = table_of("text,Class\ngood,pos\n")
    said = refusal(notebook.pick_columns, [table])
    assert "0 columns of the data set are called label or sentiment" in said
    assert "text, Class" in said
    assert "settings['label_column']" in said


def test_two_columns_for_the_text_are_refused_with_the_setting(notebook):
    table = table_of("text,review,label\ngood,bad,pos\n")
    said = refusal(notebook.pick_columns, [table])
    assert "2 columns of the data set are called text or review" in said
    assert "settings['text_column']" in said
    assert "QLORA_TEXT_COLUMN" in said


def test_two_columns_of_the_name_that_was_set_are_refused(notebook, tmp_path):
    write(tmp_path / "a.csv", "text,text,label\na,b,0\nc,d,1\n")
    said = refusal(gather, notebook, tmp_path, "text")
    assert "2 columns of a.csv are called text" in said


def test_of_many_files_the_one_without_a_label_column_is_named(notebook, tmp_path):
    write(tmp_path / "a.csv", TWO)
    write(tmp_path / "b.csv", "id,text\n1,good\n")
    write(tmp_path / "c.csv", TWO)
    said = refusal(gather, notebook, tmp_path)
    assert "0 columns of b.csv are called label or sentiment" in said


def test_labels_of_any_type_become_text(notebook):
    labels = ["spam", " a ", True, 1, 2.0, 2.5, np.int8(3), "-1.00", "1.50"]
    expected = ["spam", "a", "True", "1", "2", "2.5", "3", "-1.00", "1.50"]
    texts = ["a"] * len(labels)
    rows = notebook.pick_columns([frame(texts, labels)])
    assert list(rows["label"]) == expected


@pytest.mark.parametrize("nothing", [None, float("nan"), pd.NA])
def test_no_label_stays_none(notebook, nothing):
    rows = notebook.pick_columns([frame(["a"], [nothing])])
    assert list(rows["label"]) == [""]


@pytest.mark.parametrize("value", [["x"], {"a": 1}, np.array([1]), "\ud800"], ids=repr)
def test_a_label_that_is_no_text_or_number_is_refused(notebook, value):
    table = frame(["a"], [value])
    said = refusal(notebook.pick_columns, [table])
    assert repr(value) in said


@pytest.mark.parametrize("value", [5, ["a"], b"a", "\ud800"], ids=repr)
def test_a_text_that_is_none_is_refused_with_its_file(notebook, value):
    table = frame(["a", None, value], [0, 1, 0])
    table.attrs["file"] = "b.json"
    said = refusal(notebook.pick_columns, [table])
    assert said.startswith("b.json: ")
    assert repr(value) in said


def test_the_numbers_of_a_column_sentiment_get_their_names(notebook):
    table = table_of("text,sentiment\na,0\nb,1\nc,\n")
    rows = notebook.pick_columns([table])
    assert list(rows["label"]) == ["negative", "positive", ""]


def test_other_numbers_of_a_column_sentiment_stay_in_all_files(notebook):
    first = table_of("text,sentiment\na,0\nb,1\n")
    second = table_of("text,sentiment\nc,1\nd,2\n")
    rows = notebook.pick_columns([first, second])
    assert list(rows["label"]) == ["0", "1", "1", "2"]


def test_labels_unlike_those_of_the_other_files_are_pointed_out(notebook, capsys):
    first = table_of("text,label\na,0\nb,1\n")
    same = table_of("text,label\nc,1\n")
    words = table_of("text,label\nd,pos\ne,neg\n")
    unlabelled = table_of("text,label\nf,-1\n")
    notebook.pick_columns([first, same, words, unlabelled])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "['neg', 'pos'] are not among ['0', '1']" in lines[0]
    assert "['-1'] are not among" in lines[1]


def test_cleaning_drops_by_rule_and_counts(notebook):
    texts = ["a<BR />b", "a b", " A\tb\n", "", "<br>", "c", "c", "d ", "e", "e"]
    labels = ["x", "X", "x", "x", "y", "x", "y", "y", "", "y"]
    rows, counts = notebook.clean(frame(texts, labels))
    assert pairs(rows) == [("a<BR />b", "x"), ("d ", "y"), ("e", "y")]
    assert counts == {
        "read": 10,
        "containing line breaks": 0,
        "with a text": 8,
        "and a label": 7,
        "and no other label for the same text": 5,
        "and no copy": 3,
    }


@pytest.mark.parametrize("n_classes", [0, 1, 51])
def test_cleaning_needs_2_to_50_classes(notebook, n_classes):
    counts = dict.fromkeys(range(n_classes), 1)
    rows = notebook.pick_columns([rows_of(counts)])
    said = refusal(notebook.clean, rows)
    assert said.startswith(f"{n_classes} different labels")
    assert "2 to 50" in said


@pytest.fixture
def splits(notebook):
    """The splits of 990 rows of one class and 30 of another."""
    return notebook.split_rows(rows_of({"10": 990, "9": 30}), notebook.Config())


def test_the_splits_share_out_all_rows(splits):
    texts = set()
    for split in splits.values():
        texts.update(split["text"])
    assert len(texts) == 1020
    assert len(splits["train"]) == 816
    assert len(splits["validation"]) == 102
    assert len(splits["test"]) == 102


def test_each_split_has_each_label_in_proportion(splits):
    assert Counter(splits["train"]["label"]) == {0: 24, 1: 792}
    assert Counter(splits["validation"]["label"]) == {0: 3, 1: 99}
    assert Counter(splits["test"]["label"]) == {0: 3, 1: 99}


def test_classes_that_are_numbers_are_in_the_order_of_numbers(splits):
    assert splits["train"].features["label"].names == ["9", "10"]


def test_another_seed_draws_another_split(notebook):
    rows = rows_of({"0": 500, "1": 500})
    first = notebook.split_rows(rows, notebook.Config())
    second = notebook.split_rows(rows, notebook.Config(seed=1))
    assert set(first["test"]["text"]) != set(second["test"]["text"])


def test_own_rows_without_a_gpu_are_all_trained_on(notebook):
    settings = {"dataset_name": "my.csv"}
    config, _ = notebook.resolve_config(settings, {}, cuda=False)
    splits = notebook.split_rows(rows_of({"0": 6000, "1": 3000}), config)
    assert len(splits["train"]) == 7200
    assert len(splits["validation"]) == 900


def test_a_cap_on_the_training_rows_keeps_the_shares_and_the_test(notebook):
    config = notebook.Config(max_train_samples=30)
    splits = notebook.split_rows(rows_of({"0": 6000, "1": 3000}), config)
    assert Counter(splits["train"]["label"]) == {0: 20, 1: 10}
    assert len(splits["test"]) == 900


def test_a_class_that_a_cap_would_lose_is_refused_with_counts(notebook):
    config = notebook.Config(max_train_samples=40)
    rows = rows_of({"0": 990, "1": 10})
    said = refusal(notebook.split_rows, rows, config)
    assert "max_train_samples" in said
    assert "'0': 990, '1': 10" in said


def test_a_class_too_small_for_three_splits_is_refused(notebook):
    config = notebook.Config()
    rows = rows_of({"0": 99, "1": 2})
    said = refusal(notebook.split_rows, rows, config)
    assert "rarest class" in said


def own_test(notebook, tmp_path, csv, name="test.csv", tables=()):
    """Read a test split from a file; the other rows have the classes 0 and spam."""
    path = str(write(tmp_path / "test.csv", csv))
    if name != "test.csv":
        path = name
    config = notebook.Config(test_dataset_name=path)
    rows = frame(["a", "B c", "c", "d"], ["0", "0", "spam", "spam"])
    rows["key"] = notebook.text_keys(rows["text"])
    test_rows, left = notebook.read_test(config, list(tables), rows)
    return pairs(test_rows), list(left["text"])


def test_an_own_test_split_is_kept_as_it_is_and_its_texts_are_not_trained_on(
    notebook, tmp_path, capsys
):
    csv = "text,label\nb<br />c,0\nb c,0\nb c,SPAM\n,0\nd,\n"
    rows, left = own_test(notebook, tmp_path, csv)
    assert rows == [("b<br />c", "0"), ("b c", "0"), ("b c", "spam")]
    assert left == ["a", "c", "d"]
    assert "dropped: 2." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("csv", "reason"),
    [
        ("text,label\nx,ham\n", "unknown: ['ham']; known: ['0', 'spam']"),
        ("text,label\n,0\nx,\n", "test_dataset_name: 0 rows with text and label"),
        ("text,label\na,0\nb c,0\n", "1 different labels (spam)"),
        ("text,label\na,0\nb c,0\nc,0\nd,0\n", "0 different labels"),
    ],
)
def test_a_test_split_of_other_classes_none_or_all_is_refused(
    notebook, tmp_path, csv, reason
):
    assert reason in refusal(own_test, notebook, tmp_path, csv)


def test_a_published_split_can_be_the_test_split(notebook, tmp_path, monkeypatch):
    train = frame(["a"], ["0"])
    train.attrs["split"] = "train"
    test = frame(["e"], ["0"])
    test.attrs["split"] = "test"
    monkeypatch.chdir(tmp_path)
    for name, text in (("test", "e"), ("test.csv", "f")):
        rows, _ = own_test(notebook, tmp_path, "text,label\nf,0\n", name, [train, test])
        assert rows == [(text, "0")]


def test_with_an_own_test_split_the_other_rows_train_and_validate(notebook):
    test_rows = frame(["x", "x", "y"], ["0", "0", "0"])  # a class may be missing
    rows = rows_of({"0": 90, "1": 10})
    splits = notebook.split_rows(rows, notebook.Config(), test_rows)
    assert list(splits["test"]["text"]) == ["x", "x", "y"]
    assert splits["test"].features["label"].names == ["0", "1"]
    assert len(splits["train"]) == 90
    assert len(splits["validation"]) == 10
    assert {*splits["train"]["text"], *splits["validation"]["text"]} == {*rows["text"]}
