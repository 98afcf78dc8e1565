"""Section 3: any file or folder gives the right table, or a sentence on its fault."""

import gzip
import json
import traceback

import datasets
import pytest
from datasets import ClassLabel, Dataset, Features, Value


def gather(notebook, path, text_column="", label_column=""):
    """Do what section 3's cells do with a path."""
    tables = notebook.read_tables(str(path))
    return notebook.clean(notebook.pick_columns(tables, text_column, label_column))


def answer(function, *args):
    """Return a result, or a refusal by a cell of the notebook. Other errors fail."""
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
    assert said, "it was not refused"
    return said


def pairs(rows):
    return list(zip(rows["text"], rows["label"]))


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        content = content.encode()
    path.write_bytes(content)
    return path


TWO = "text,label\ngood,pos\nbad,neg\n"
FOUND = [("good", "pos"), ("bad", "neg")]
RECORDS = [{"text": "good", "label": "pos"}, {"label": "neg", "text": "bad", "id": [1]}]
LINES = "\n".join(json.dumps(record) for record in RECORDS)
COLUMNS = {"text": ["good", "bad"], "label": ["pos", "neg"]}
INDEXED = {"text": {"0": "good", "1": "bad"}, "label": {"0": "pos", "1": "neg"}}
FORMS = {
    "comma": ("a.csv", TWO),
    "semicolon": ("a.csv", TWO.replace(",", ";")),
    "tab": ("a.csv", TWO.replace(",", "\t")),
    "bar": ("a.csv", TWO.replace(",", "|")),
    "Windows": ("a.csv", TWO.replace("\n", "\r\n")),
    "old Mac": ("a.csv", TWO.replace("\n", "\r")),
    "empty lines": ("a.csv", TWO.replace("\n", "\n\n")),
    "UTF-8 with a mark": ("a.csv", TWO.encode("utf-8-sig")),
    "UTF-16": ("a.csv", TWO.encode("utf-16")),
    "a name with capitals": ("My Reviews.CSV", TWO),
    "gzipped": ("a.csv.GZ", gzip.compress(TWO.encode())),
    "TSV": ("a.tsv", TWO.replace(",", "\t")),
    "JSON records": ("a.json", json.dumps(RECORDS)),
    "JSON columns": ("a.json", json.dumps(COLUMNS)),
    "JSON columns of pandas": ("a.json", json.dumps(INDEXED)),
    "JSON records in an object": ("a.json", json.dumps({"data": RECORDS})),
    "JSON lines": ("a.json", LINES),
    "JSON lines with empty ones": ("a.ndjson", f"\n{LINES}\r\n\n"),
}


@pytest.mark.parametrize(("name", "content"), FORMS.values(), ids=FORMS)
def test_a_file_is_read_whatever_its_form(notebook, tmp_path, name, content):
    rows, _ = gather(notebook, write(tmp_path / name, content))
    assert pairs(rows) == FOUND


def test_quoted_separators_and_quotes_stay_in_a_text(notebook, tmp_path):
    path = write(tmp_path / "a.csv", 'label,text\nx,"a, b; c"\ny,"b ""c"""\n')
    rows, _ = gather(notebook, path)
    assert pairs(rows) == [("a, b; c", "x"), ('b "c"', "y")]


def test_legal_texts_over_several_lines_are_read_and_counted(notebook, tmp_path):
    path = write(
        tmp_path / "a.csv",
        'label,text\n0,"Cast:\nLead,1\nThe rest is fine."\nyes,"Like it?\nno, never"\n'
        "no,one line\n",
    )
    rows, counts = gather(notebook, path)
    assert pairs(rows)[:2] == [
        ("Cast:\nLead,1\nThe rest is fine.", "0"),
        ("Like it?\nno, never", "yes"),
    ]
    assert counts["containing line breaks"] == 2


def test_quotes_of_a_tsv_that_do_not_fit_stay_in_its_texts(notebook, tmp_path, capsys):
    path = write(tmp_path / "a.tsv", 'text\tlabel\n"A" it is\t1\n"b, so b\t0\n')
    rows, _ = gather(notebook, path)
    assert pairs(rows) == [('"A" it is', "1"), ('"b, so b', "0")]
    assert capsys.readouterr().out.startswith("LOOK: line 2")


def test_quotes_of_a_tsv_that_join_its_lines_are_named(notebook, tmp_path, capsys):
    lines = ["text\tlabel", '"great film\t1', "bad film\t0", 'really bad"\t1', "x\t0"]
    path = write(tmp_path / "a.tsv", "\n".join(lines))
    gather(notebook, path)
    printed = capsys.readouterr().out
    assert "LOOK: quotes join lines of this TSV" in printed


TYPED = "text,label\nnan,NA\n007,1e3\nschön,None\nyes,010\n"
AS_WRITTEN = [("nan", "NA"), ("007", "1e3"), ("schön", "None"), ("yes", "010")]


def test_no_word_of_a_csv_becomes_a_number_or_nothing(notebook, tmp_path):
    rows, _ = gather(notebook, write(tmp_path / "a.csv", TYPED))
    assert pairs(rows) == AS_WRITTEN


def test_a_card_beside_a_file_does_not_change_what_is_read(notebook, tmp_path):
    write(tmp_path / "a.csv", TYPED)
    card = "---\nconfigs:\n- config_name: default\n  data_files: a.csv\n---\n"
    write(tmp_path / "README.md", card)
    rows, _ = gather(notebook, tmp_path)
    assert pairs(rows) == AS_WRITTEN


CSV_FAULTS = {
    "a field too many": (f"{TWO}a,b,0\n", "line 4 has 3 fields"),
    "two too many": (f"{TWO}a, b, c,0\n", "line 4 has 4 fields"),
    "too many in each row": ("text,label\na, b,0\n", "line 2 has 3 fields"),
    "a stray quote": ('text,label\n"a,1\nb,0\n"c,1\n', "line 4"),
    "Latin-1": ("text,label\né,0\n".encode("latin-1"), "line 2 is not UTF-8"),
    "empty": ("", "it is empty"),
    "an empty line": ("\n", "it is empty"),
}


@pytest.mark.parametrize(("content", "reason"), CSV_FAULTS.values(), ids=CSV_FAULTS)
def test_a_faulty_csv_is_refused_by_line(notebook, tmp_path, content, reason):
    write(tmp_path / "a.csv", content)
    said = refusal(notebook.read_tables, str(tmp_path))
    assert said.startswith(f"a.csv cannot be read: {reason}")


JSON_FAULTS = {
    "no record": ('[{"text": "a"}, 5]', "record 2 has no named fields"),
    "no record in a line": (f"{LINES}\n7", "record 3 has no named fields"),
    "no JSON in a line": (f"{LINES}\nfoo\n{LINES}", "line 3 is not JSON"),
    "no end": ("[", "it is not JSON"),
    "no UTF-8": (b"\xff", "line 1 is not UTF-8"),
    "nothing": ("null", ""),
    "a number": ("5", ""),
    "a word": ('"abc"', ""),
    "nested too deep": ("[" * 100_000, ""),
    "unequal columns": ('{"text": ["a", "b"], "label": ["x"]}', ""),
}


@pytest.mark.parametrize(("content", "reason"), JSON_FAULTS.values(), ids=JSON_FAULTS)
def test_faulty_json_is_refused_by_line_or_record(notebook, tmp_path, content, reason):
    write(tmp_path / "a.json", content)
    said = refusal(notebook.read_tables, str(tmp_path))
    assert said.startswith(f"a.json cannot be read: {reason}")


def test_of_json_over_many_lines_the_faulty_line_is_named(notebook, tmp_path):
    write(tmp_path / "a.json", '[\n{"text": "a"},\n]')
    assert "line 3" in refusal(notebook.read_tables, str(tmp_path))


BROKEN = {
    "a.csv.gz": b"junk",
    "half.csv.gz": gzip.compress(TWO.encode())[:-9],
    "a.parquet": b"PAR1" * 9,
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_by_name(notebook, tmp_path, name):
    write(tmp_path / name, BROKEN[name])
    said = refusal(notebook.read_tables, str(tmp_path))
    assert said.startswith(f"{name} cannot be read: ")


NO_ROWS = [("a.csv", content) for content in ("\0", "text", "text,label", " ")]
NO_ROWS += [("a.json", content) for content in ("[]", "{}", "[{}]", '["a"]', " ")]


@pytest.mark.parametrize(("name", "content"), NO_ROWS)
def test_a_file_without_rows_or_columns_is_refused(notebook, tmp_path, name, content):
    refusal(gather, notebook, write(tmp_path / name, content))


def test_every_file_of_a_folder_is_read_but_cards_and_hidden_ones(notebook, tmp_path):
    write(tmp_path / "reviews.csv", "text,label\na,pos\nb,neg\n")
    write(tmp_path / "reviews_test.csv", "text,label\nc,neg\n")
    write(tmp_path / "README_reviews.csv", "text,label\nd,pos\n")
    write(tmp_path / "deep" / "more.jsonl", '{"text": "e", "label": "pos"}\n')
    for name in ("README.md", "LICENSE", ".DS_Store", ".git/HEAD"):
        write(tmp_path / name, "anything")
    rows, _ = gather(notebook, tmp_path)
    assert sorted(rows["text"]) == ["a", "b", "c", "d", "e"]


def test_what_would_be_left_out_is_named_with_what_is_allowed(notebook, tmp_path):
    write(tmp_path / "a.csv", TWO)
    for number in range(99):
        write(tmp_path / f"{number}.txt", TWO)
    said = refusal(notebook.read_tables, str(tmp_path))
    assert "1.txt" in said and "a.csv" not in said
    assert "Parquet" in said.split("Allowed")[1]
    assert len(said) < 500


def test_an_empty_folder_is_refused(notebook, tmp_path):
    assert "no files" in refusal(notebook.read_tables, str(tmp_path))


def test_a_path_that_does_not_exist_is_refused_by_name(notebook, tmp_path, monkeypatch):
    monkeypatch.setattr(notebook.hub.constants, "HF_HUB_OFFLINE", True)
    said = refusal(notebook.read_tables, str(tmp_path / "other.csv"))
    assert "other.csv" in said and "is not a local file or folder" in said


@pytest.fixture
def hub_folder(notebook, tmp_path, monkeypatch):
    """A repository as on the Hub, whose card names three splits; one has no labels."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    names = ClassLabel(names=["neg", "pos"])
    features = Features({"text": Value("string"), "label": names})
    labels = {"train": [0, 1], "test": [1], "unsupervised": [-1, -1]}
    folder = tmp_path / "hub"
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n"
    for split, numbers in labels.items():
        texts = [f"{split} {place}" for place in range(len(numbers))]
        rows = Dataset.from_dict({"text": texts, "label": numbers}, features)
        rows.to_parquet(folder / f"{split}.parquet")
        card += f"  - split: {split}\n    path: {split}.parquet\n"
    write(folder / "README.md", f"{card}---\n")

    def snapshot_download(name, repo_type, revision):
        assert (name, repo_type, revision) == ("owner/name", "dataset", "main")
        return str(folder)

    monkeypatch.setattr(notebook.hub, "snapshot_download", snapshot_download)
    return folder


POOLED = [("test 0", "pos"), ("train 0", "neg"), ("train 1", "pos")]


def test_published_splits_are_pooled_without_unlabelled_rows(notebook, hub_folder):
    tables = notebook.read_published("owner/name", "main")
    rows, counts = notebook.clean(notebook.pick_columns(tables))
    assert sorted(pairs(rows)) == POOLED
    assert counts["with a text"] - counts["and a label"] == 2


def test_downloaded_parquet_files_give_the_same_rows(notebook, hub_folder):
    rows, counts = gather(notebook, hub_folder)
    assert sorted(pairs(rows)) == POOLED
    assert counts["with a text"] - counts["and a label"] == 2


def test_a_published_set_of_several_kinds_is_refused_with_them(notebook, hub_folder):
    card = "---\nconfigs:\n"
    for name in ("first", "second"):
        card += f"- config_name: {name}\n  data_files: train.parquet\n"
    write(hub_folder / "README.md", f"{card}---\n")
    said = refusal(notebook.read_published, "owner/name", "main")
    assert "'first', 'second'" in said


@pytest.mark.parametrize("name", ["NA", "n/a", "NULL", "None", "nan", "#N/A", "\\N"])
def test_a_label_that_means_missing_elsewhere_is_named(
    notebook, tmp_path, capsys, name
):
    path = write(tmp_path / "a.csv", f"text,label\na,x\nb,y\nc,{name}\n")
    rows, _ = gather(notebook, path)
    assert rows["label"].nunique() == 3
    assert f"LOOK: {name}: read as a class" in capsys.readouterr().out


def test_labels_that_are_one_number_are_named(notebook, tmp_path, capsys):
    write(tmp_path / "d" / "a.csv", "text,label\na,1.5\nb,2.0\n")
    write(tmp_path / "d" / "b.csv", "text,label\nc,1.50\nd,2.00\n")
    gather(notebook, tmp_path / "d")
    assert "some of 1.5, 2, 1.50 are equal as numbers" in capsys.readouterr().out


def test_usual_labels_are_not_doubted(notebook, tmp_path, capsys):
    path = write(tmp_path / "a.csv", "text,label\na,1.0\nb,2\nc,nano\nd,no\n")
    gather(notebook, path)
    assert "LOOK" not in capsys.readouterr().out


def test_the_number_of_a_record_without_fields_is_said(notebook, tmp_path):
    records = json.dumps([{"text": "a", "label": "b"}, "c"])
    path = write(tmp_path / "a.json", records)
    assert "record 2 has no named fields" in refusal(notebook.read_tables, str(path))
