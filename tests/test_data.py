"""Sections 3 and 4: whatever a user's data look like, the right table comes out, or the notebook says what is wrong."""

import gzip
import json
import re
import traceback
from collections import Counter

import datasets
import numpy as np
import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, Features, Value


def gather(notebook, path, text_column="", label_column=""):
    """Do what section 3's cells do with a path."""
    tables = notebook.read_tables(str(path))
    return notebook.clean(notebook.pick_columns(tables, text_column, label_column))


def answer(function, *args):
    """Return what `function` returns, or the refusal of a notebook cell; anything else fails."""
    try:
        return function(*args), None
    except (ValueError, FileNotFoundError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1].filename
        assert last.startswith("<code cell"), f"{error!r} comes from {last}"
        assert str(error).encode()
        return None, str(error)


def refusal(function, *args):
    """Return what the refusal says."""
    _, said = answer(function, *args)
    return said or pytest.fail("it was not refused")


def pairs(rows):
    return [*zip(rows["text"], rows["label"])]


def frame(texts, labels, text="text", label="label"):
    return pd.DataFrame({text: pd.Series(texts, dtype=object), label: pd.Series(labels, dtype=object)})


def table_of(counts):
    labels = np.repeat([*counts], [*counts.values()])
    return frame([f"t{i}" for i in range(len(labels))], labels)


TWO = "text,label\ngood,pos\nbad,neg\n"
FOUND = [("good", "pos"), ("bad", "neg")]
RECORDS = [{"text": "good", "label": "pos"}, {"label": "neg", "text": "bad", "id": [1]}]
LINES = "\n".join(map(json.dumps, RECORDS))
COLUMNS = {"text": ["good", "bad"], "label": ["pos", "neg"]}
INDEXED = {name: {"0": first, "1": second} for name, (first, second) in COLUMNS.items()}
READ = [("a.csv", TWO.replace(",", separator), FOUND) for separator in ",;\t|"]
READ += [("a.csv", TWO.replace("\n", end), FOUND) for end in ("\r\n", "\r", "\n\n")]
READ += [("a.csv", TWO.encode(encoding), FOUND) for encoding in ("utf-8-sig", "utf-16")]
READ += [("My Reviews.CSV", TWO, FOUND), ("a.csv.GZ", gzip.compress(TWO.encode()), FOUND)]
READ += [("a.csv", 'label,text\nx, "a, b; c"\ny,"a\nb ""c"""\n', [("a, b; c", "x"), ('a b "c"', "y")])]
READ += [("a.csv", 'text,label\n"3,2,1: a\nGreat, b",2\nGreat,1\n', [("3,2,1: a Great, b", "2"), ("Great", "1")])]
READ += [("a.tsv", 'text\tlabel\n"A" it is\t1\n"b, so b\t0\n', [('"A" it is', "1"), ('"b, so b', "0")])]
READ += [("a.csv", "text,label\nnan,NA\n007,1e3\nschön,None\n", [("nan", "NA"), ("007", "1e3"), ("schön", "None")])]
READ += [("a.json", json.dumps(form), FOUND) for form in (RECORDS, COLUMNS, INDEXED, {"data": RECORDS})]
READ += [("a.json", LINES, FOUND), ("a.ndjson", f"\n{LINES}\r\n\n", FOUND)]


@pytest.mark.parametrize(("name", "content", "expected"), READ)
def test_a_file_is_read_whatever_its_form(notebook, tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert pairs(gather(notebook, tmp_path / name)[0]) == expected


REFUSED = [("a.csv", f"{TWO}a,b,0\n", ["line 4", "3 fields"]), ("a.csv", f"{TWO}a, b, c,0\n", ["4 fields"])]
REFUSED += [("a.csv", "text,label\nthe plot was dull, the end was bad,0\n" * 2, ["line 2", "3 fields"])]
REFUSED += [("a.csv", 'text,label\n"good,1\nbad,0\n"fine,1\n', ["line"])]
SWALLOWED = ['text,label\n"x, y",1\nc,1\n"a,1\nb",0\n', 'label,text\n1,"x, y"\n0,c\n1,"a\n0,b"\n']
SWALLOWED += ['text,label,note\n"x, y",1,\nc,1,\n"a,1,\nb",0,odd\n', 'text,label\nc,1\nd,1\n"a,1\nb",0\n']
REFUSED += [("a.csv", content, ["line 5", "quote"]) for content in SWALLOWED]
REFUSED += [("a.csv", "text,label\ngood,1\ncafé,0\n".encode("latin-1"), ["line 3", "UTF-8"])]
REFUSED += [("a.json", '[{"text": "a"}, 5]', ["record 2"]), ("a.json", f"{LINES}\n7", ["record 3"])]
REFUSED += [("a.json", f"{LINES}\nfoo\n{LINES}", ["line 3"])]
REFUSED += [("a.json", raw, []) for raw in ("[", b"\xff")] + [("a.csv", raw, []) for raw in ("", "\n")]
FOREIGN = [("a.json", raw) for raw in ("null", "5", "true", '"abc"', "[" * 100_000, '{"a": {"b": 1}}')]
FOREIGN += [("a.json", raw) for raw in ('{"text": ["a", "b"], "label": ["x"]}', '[{"text": "\\ud83d", "label": 1}]')]
FOREIGN += [("a.csv.gz", "junk"), ("a.csv.gz", gzip.compress(TWO.encode())[:-9]), ("a.parquet", "PAR1" * 9)]
REFUSED += [(*each, []) for each in FOREIGN]


@pytest.mark.parametrize(("name", "content", "words"), REFUSED, ids=lambda each: repr(each)[:40])
def test_a_faulty_file_is_refused_by_name_and_place(notebook, tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    said = refusal(notebook.read_tables, str(tmp_path))
    assert not [word for word in [name, *words] if word not in said], said


def test_a_file_without_rows_or_columns_is_refused(notebook, tmp_path):
    for index, content in enumerate(["\0", "text", "text,label", "id,text\n1,a", "[]", "{}", "[{}]", '["a"]', " "]):
        path = tmp_path / f"{index}.{'csv' if index < 4 else 'json'}"
        path.write_text(content)
        refusal(gather, notebook, path)


def test_every_file_of_a_folder_is_read_but_licences_and_hidden_files(notebook, tmp_path, capsys):
    (tmp_path / "reviews.csv").write_text("text,label\n" + "".join(f"text {i},{i % 2}\n" for i in range(200)))
    (tmp_path / "reviews_test.csv").write_text(TWO)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "more.jsonl").write_text('{"text": "x", "label": -1}\n')
    for name in ("README.md", "LICENSE", ".DS_Store"):
        (tmp_path / name).write_text("text")
    (tmp_path / "README_reviews.csv").write_text("text,label\nread me,1\n")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text("ref")
    rows, _ = gather(notebook, tmp_path)
    assert len(rows) == 204 and set(rows["label"]) == {"0", "1", "-1", "pos", "neg"}
    assert re.fullmatch("(LOOK: (more|reviews_test).*('-1'|'pos').* are none of .*\n){2}", capsys.readouterr().out)


def test_what_would_be_left_out_is_named_with_what_is_allowed(notebook, tmp_path, monkeypatch):
    for name in ["a.csv", "notes.docx", *(f"{i}.txt" for i in range(999))]:
        (tmp_path / name).write_text(TWO)
    said = refusal(notebook.read_tables, str(tmp_path))
    assert "1.txt" in said and "a.csv" not in said and "Parquet" in said.split("Allowed")[1] and len(said) < 500
    (tmp_path / "empty").mkdir()
    assert "no files" in refusal(notebook.read_tables, str(tmp_path / "empty"))
    monkeypatch.setattr(notebook.hub.constants, "HF_HUB_OFFLINE", True)
    said = refusal(notebook.read_tables, str(tmp_path / "other.csv"))
    assert "other.csv" in said and "dataset_name" in said


def test_published_splits_are_pooled_and_unlabelled_rows_are_counted(notebook, tmp_path, monkeypatch):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    parts, card = {"train": [0, 1], "test": [1], "unsupervised": [-1, -1]}, ""
    for name, labels in parts.items():
        rows = {"text": [f"{name} {i}" for i in range(len(labels))], "label": labels}
        Dataset.from_dict(rows, features).to_parquet(tmp_path / "hub" / f"{name}.parquet")
        card += f"\n  - split: {name}\n    path: {name}.parquet"
    (tmp_path / "hub" / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:{card}\n---\n")
    monkeypatch.setattr(notebook, "find_source", lambda *args: tmp_path / "hub")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows, counts = gather(notebook, "owner/name")
    assert sorted(pairs(rows)) == [("test 0", "pos"), ("train 0", "neg"), ("train 1", "pos")]
    assert counts["without a label, dropped"] == 2
    other = card.replace("train", "dev").replace("dev.parquet", "train.parquet")
    card = f"- config_name: a\n  data_files:{card}\n- config_name: b\n  data_files:{other}"
    (tmp_path / "hub" / "README.md").write_text(f"---\nconfigs:\n{card}\n---\n")
    assert "'a', 'b'" in refusal(notebook.read_tables, "owner/name")


def test_columns_are_found_whatever_their_case_or_named_by_a_setting(notebook):
    for text, label in [("Review", "Sentiment"), (" TEXT ", "LABEL")]:
        table = frame(["good", "bad"], ["pos", "neg"], text, label).assign(id=1)
        assert pairs(notebook.pick_columns([table])) == FOUND
    table = pd.DataFrame({"text": ["no", "no"], "Body": ["good", "bad"], "Class": [1, 2]})
    assert pairs(notebook.pick_columns([table], "body", "CLASS")) == [("good", "1"), ("bad", "2")]
    said = refusal(notebook.pick_columns, [table])
    assert "label or sentiment" in said and "Class" in said and "settings['label_column']" in said
    said = refusal(notebook.pick_columns, [table.assign(review="x")], "", "Class")
    assert "2 columns" in said and "settings['text_column']" in said and "QLORA_TEXT_COLUMN" in said
    both = table.assign(Text=["good", "bad"])
    assert pairs(notebook.pick_columns([both], "Text", "Class")) == [("good", "1"), ("bad", "2")]


def test_of_many_files_the_one_that_does_not_fit_is_named(notebook, tmp_path):
    cases = {"test.csv": ("id,text\n1,good\n", "0 columns of test.csv are called label or sentiment")}
    cases |= {"5.json": ('[{"text": 5, "label": 1}]', "5.json: 1 values are no text, such as 5")}
    for name, (content, said) in cases.items():
        for file, text in {"a.csv": TWO, name: content, "z.csv": TWO}.items():
            (tmp_path / file).write_text(text)
        assert said in refusal(gather, notebook, tmp_path)
        (tmp_path / name).unlink()


def test_labels_of_any_type_become_text(notebook):
    labels = ["spam", 1, 1.0, 2.5, True, " a ", None, float("nan"), np.int8(3), pd.NA, "-1.00", "1.50"]
    expected = ["spam", "1", "1", "2.5", "True", "a", "", "", "3", "", "-1", "1.50"]
    assert list(notebook.pick_columns([frame(["a"] * 12, labels)])["label"]) == expected


def test_a_label_of_several_values_and_a_text_that_is_none_are_refused(notebook):
    for value in (["x"], {"a": 1}, np.array([1]), "\ud800"):
        assert repr(value)[:9] in refusal(notebook.pick_columns, [frame(["a"], [value])])
    for value in (5, ["a"], b"a", "\ud800"):
        said = refusal(notebook.pick_columns, [frame(["a", None, value], [0, 1, 0])])
        assert "1 values" in said and repr(value) in said
    empty = pd.DataFrame({"text": [], "label": pd.Series([], dtype=float)})
    assert "0 different labels" in refusal(lambda: notebook.clean(notebook.pick_columns([empty])))


def test_sentiment_0_and_1_are_negative_and_positive_in_all_files_or_in_none(notebook):
    table = frame(["a", "b", "c"], [0, 1, None], label="sentiment")
    assert list(notebook.pick_columns([table])["label"]) == ["negative", "positive", ""]
    both = [table, table.assign(sentiment=[0, 1, 2])]
    assert list(notebook.pick_columns(both)["label"]) == ["0", "1", "", "0", "1", "2"]


def test_cleaning_drops_by_rule_and_counts(notebook):
    texts = ["a<br />b", "a b", " a\tb", "", None, "c", "c", "d", "e", "e"]
    rows, counts = notebook.clean(frame(texts, ["x", "X", "x", "x", "y", "x", "y", "y", "", "y"]))
    assert pairs(rows) == [("a b", "x"), ("d", "y"), ("e", "y")]
    dropped = {"without a text": 2, "without a label": 1, "with two labels": 2, "repeated": 2}
    expected = {f"{rule}, dropped": count for rule, count in dropped.items()}
    assert counts == {"read": 10, "with markup": 1} | expected | {"left": 3}


def test_cleaning_needs_2_to_50_classes(notebook):
    for n in (0, 1, 51):
        said = refusal(notebook.clean, table_of({f"class {i}": 1 for i in range(n)}))
        assert f"{n} different labels" in said and "2 to 50" in said


def test_the_splits_share_out_all_rows_with_each_label_in_proportion(notebook):
    config = notebook.Config()
    splits = notebook.split_rows(table_of({"10": 990, "9": 30}), config)
    texts = {name: split["text"][:] for name, split in splits.items()}
    assert {name: len(part) for name, part in texts.items()} == {"train": 816, "validation": 102, "test": 102}
    assert len({text for part in texts.values() for text in part}) == 1020
    assert [Counter(splits[name]["label"])[0] for name in ("train", "validation", "test")] == [24, 3, 3]
    other = notebook.split_rows(table_of({"10": 990, "9": 30}), config.model_copy(update={"seed": 1}))
    assert set(other["test"]["text"]) != set(texts["test"]) and other["test"].features["label"].names == ["9", "10"]


def test_own_rows_without_a_gpu_are_all_trained_on_and_a_cap_keeps_the_shares(notebook):
    own, _ = notebook.resolve_config({"dataset_name": "my.csv"}, {}, cuda=False)
    demo, sources = notebook.resolve_config({}, {}, cuda=False)
    assert {*notebook.DEMO_ROWS.items()} <= {*demo.model_dump(exclude={"target_modules", "ranks"}).items()}
    assert own.validation_share == 0.1 and {*notebook.DEMO_ROWS} <= {*sources}
    rows = table_of({"0": 6000, "1": 3000})
    assert len(notebook.split_rows(rows, own)["train"]) == 7200
    capped = notebook.split_rows(rows, own.model_copy(update={"max_train_samples": 30}))
    assert Counter(capped["train"]["label"]) == {0: 20, 1: 10} and len(capped["test"]) == 900


def test_a_class_that_cannot_be_in_every_split_is_refused_with_counts_and_settings(notebook):
    said = refusal(notebook.split_rows, table_of({"0": 990, "1": 10}), notebook.Config(max_train_samples=40))
    assert "max_train_samples" in said and "990" in said and "10" in said
    assert "rarest class" in refusal(notebook.split_rows, table_of({"0": 99, "1": 2}), notebook.Config())
