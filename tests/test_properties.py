"""Section 3: any folder that a user names gives its table, or a sentence on it."""

import csv
import gzip
import hashlib
import io
import json
import re
import unicodedata

import pandas as pd
from hypothesis import HealthCheck, assume, given
from hypothesis import settings as effort
from hypothesis import strategies as st
from test_data import answer, gather

FORMATS = {
    "csv,": "csv",
    "csv;": "CSV",
    "csv|": "csv",
    "csv\t": "tsv",
    "json": "json",
    "jsonl": "jsonl",
    "columns": "json",
    "parquet": "parquet",
}
NO_UTF = ["latin-1", "cp1252"]
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", *NO_UTF]
NAMES = [
    "train",
    "reviews",
    "reviews_test",
    "my data.v2",
    "ünï",
    "a-00-of-02",
    "README_2",
]
COLUMNS = [
    ("text", "label"),
    ("Review", "LABEL"),
    ("TEXT ", "label"),
    ("Körper", "Art"),  # named by settings
]
CLASSES = [
    ["spam", "Ham"],
    ["a b", "c,d", "é;"],
    [True, False],
    [1.0, 2.0],
    list(range(-4, 8)),
    list(range(50)),
]
WORDS = st.text(st.sampled_from("abc é好👩.!?'<>&-"), max_size=12)
ANYTHING = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
SEPARATORS = st.text(st.sampled_from('",;|\t\n\r \x00\x85\u2028<br/>='), max_size=12)
SPECIAL = st.sampled_from(["", "nan", "word " * 20_000, "x" * 10**6])
TEXTS = st.lists(WORDS | ANYTHING | SEPARATORS | SPECIAL, min_size=1, max_size=8)
FILES = st.tuples(
    st.sampled_from(list(FORMATS)),
    st.sampled_from(ENCODINGS),
    st.booleans(),  # gzipped
)
FOLDERS = st.dictionaries(st.sampled_from(NAMES), FILES, min_size=1, max_size=3)
EFFORT = effort(
    max_examples=300, deadline=None, suppress_health_check=list(HealthCheck)
)


def as_csv(table, separator):
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=separator)
    writer.writerow(table)
    writer.writerows(zip(*table.values()))
    return out.getvalue()


def as_json(table, kind):
    if kind == "columns":
        return json.dumps(table, ensure_ascii=False)
    records = []
    for row in zip(*table.values()):
        records.append(dict(zip(table, row)))
    if kind == "json":
        return json.dumps(records, ensure_ascii=False)
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    return "\n".join(lines)


def written(table, kind, encoding):
    """Return the bytes of a table in a format of FORMATS."""
    if kind == "parquet":
        out = io.BytesIO()
        pd.DataFrame(table).to_parquet(out)
        return out.getvalue()
    if kind.startswith("csv"):
        return as_csv(table, kind[3:]).encode(encoding)
    return as_json(table, kind).encode(encoding)


def only_latin(kind, encoding, raw):
    """Tell whether the bytes are text in an encoding that is not read."""
    if kind == "parquet" or encoding not in NO_UTF or raw.isascii():
        return False
    assume("\ufffd" in raw.decode("utf-8", "replace"))  # not UTF-8 by chance
    return True


def write_folder(folder, files, texts, classes, columns):
    """Share out texts among files; return their rows, and whether one is Latin-1."""
    text_column, label_column = columns
    rows = []
    latin = False
    for number, (name, (kind, encoding, gzipped)) in enumerate(sorted(files.items())):
        numbers = list(range(number, len(texts), len(files)))
        if not numbers:
            continue  # a file without rows has no columns
        table = {"id": numbers, label_column: [], text_column: []}
        for place in numbers:
            text = texts[place].encode(encoding, "replace").decode(encoding)
            label = classes[place % len(classes)]
            table[text_column].append(text)
            table[label_column].append(label)
            rows.append((text, label))
        raw = written(table, kind, encoding)
        latin = latin or only_latin(kind, encoding, raw)
        path = folder / f"{name}.{FORMATS[kind]}"
        if gzipped:
            path = path.with_name(f"{path.name}.gz")
            raw = gzip.compress(raw, 1)
        path.write_bytes(raw)
    return rows, latin


def to_keep(rows):
    """Return the keys of texts with one label each, and that."""
    labels = {}
    for text, label in rows:
        text = re.sub(r"(?i)<br\s*/?>", " ", text)
        text = re.sub("[\u00ad\u200b\u200e\u200f\u2060\ufeff]", "", text)
        text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
        text = text and hashlib.sha256(text.encode()).hexdigest()
        label = re.sub(r"\.0$", "", str(label))
        labels.setdefault(text, set()).add(label)
    kept = set()
    for text, found in labels.items():
        if text and len(found) == 1:
            kept.add((text, *found))
    return kept


@EFFORT
@given(
    files=FOLDERS,
    texts=TEXTS,
    classes=st.sampled_from(CLASSES),
    columns=st.sampled_from(COLUMNS),
)
def test_any_folder_is_read_whole_or_refused(
    notebook, tmp_path_factory, files, texts, classes, columns
):
    folder = tmp_path_factory.mktemp("folder")
    rows, latin = write_folder(folder, files, texts, classes, columns)
    kept = to_keep(rows)
    settings = ("", "")
    if "Art" in columns:
        settings = columns
    found, said = answer(gather, notebook, folder, *settings)
    if latin:
        assert re.search(r"\S cannot be read: line \d+ is not UTF-8", said)
    elif len({label for _, label in kept}) < 2:
        assert "different labels" in said
    else:
        table, counts = found
        assert sorted(zip(table["key"], table["label"])) == sorted(kept)
        came = {text.lstrip(" ") for text, _ in rows}  # a CSV has none after a comma
        assert {text.lstrip(" ") for text in table["text"]} <= came
        assert counts["read"] == len(texts)


NOISE = st.text('tex,label"\n\r;\t\0 ', max_size=30)
ROWS = NOISE.map(lambda rows: f"text,label\n{rows}".encode())


@effort(EFFORT, max_examples=200)
@given(
    raw=st.binary(max_size=30) | ROWS,
    end=st.sampled_from(["csv", "tsv", "json", "jsonl", "parquet", "csv.gz"]),
)
def test_any_bytes_are_read_or_refused_by_name(notebook, tmp_path_factory, raw, end):
    path = tmp_path_factory.mktemp("folder") / f"a.{end}"
    path.write_bytes(raw)
    table, said = answer(notebook.read_tables, str(path))
    if not table:
        assert said.startswith(f"a.{end} cannot be read: ")


SPELLINGS = st.sampled_from(
    ["yes", "Yes", "YES ", "y\u0065s", "no", "No", "ｎｏ", "café", "cafe\u0301", "Café"]
    + ["1", "1.0", "01", "2", "2.00", "-1", "-1.0", "1e0", "n\u00a0o", "n  o"]
)


def number_or_word(label, only_numbers):
    """Return what a label is compared by, as the notebook promises."""
    key = unicodedata.normalize("NFKC", " ".join(label.split())).casefold()
    if only_numbers:
        key = re.sub(r"\.0+$", "", key)
    return key


@EFFORT
@given(labels=st.lists(SPELLINGS, min_size=2, max_size=12))
def test_labels_are_one_exactly_where_they_look_alike(notebook, capsys, labels):
    capsys.readouterr()
    texts = [f"text {number}" for number in range(len(labels))]
    table = pd.DataFrame({"text": texts, "label": labels}, dtype=object)
    only_numbers = all(re.fullmatch(r"-?\d+(\.\d+)?", text.strip()) for text in labels)
    keys = [number_or_word(label, only_numbers) for label in labels]
    found, said = answer(lambda: notebook.clean(notebook.pick_columns([table])))
    if len(set(keys)) < 2:
        assert "different labels" in said
        return
    rows, _ = found
    classes = dict(zip(keys, rows["label"]))
    assert list(rows["label"]) == [classes[key] for key in keys]
    assert len(set(classes.values())) == len(classes)
    printed = capsys.readouterr().out
    spelled = {" ".join(label.split()) for label in labels}
    assert ("as one" in printed) == (len(spelled) > len(classes))


CHANGES = {
    "seed": [1, 2],
    "learning_rate": [1e-4, 2e-4],
    "max_length": [32, 64],
    "frozen_dtype": ["float32", "compute"],
    "class_weights": ["none", "balanced"],
    "per_device_train_batch_size": [16, 32],
    "gradient_accumulation_steps": [1, 2],
}
FREE = {
    "min_precision": [0.9, 0.98],
    "cuda_graphs": [True, False],
    "efficiency_steps": [0, 5],
    "ranks": [[], [1]],
    "predict_name": ["", "x.csv"],
    "per_device_eval_batch_size": [8, 64],
}


def drawn(choices):
    return st.fixed_dictionaries(
        {name: st.sampled_from(values) for name, values in choices.items()}
    )


@effort(EFFORT, max_examples=100)
@given(first=drawn(CHANGES), second=drawn(CHANGES), free=drawn(FREE))
def test_a_run_goes_on_exactly_where_what_decides_a_training_is_the_same(
    notebook, tokenized, first, second, free
):
    """Batches of one effective size are one training: memory may have run out."""
    freely_changed = dict(second)
    freely_changed.update(free)
    names = []
    for settings in (first, freely_changed):
        config = notebook.Config(**settings)
        folder, _ = notebook.training_folder(config, tokenized, "weights")
        names.append(folder.name)
    for settings in (first, second):
        micro_batch = settings.pop("per_device_train_batch_size")
        settings["batch"] = micro_batch * settings.pop("gradient_accumulation_steps")
    assert (names[0] == names[1]) == (first == second)


def test_other_data_or_weights_are_another_training(notebook, tiny_config, tokenized):
    folder, _ = notebook.training_folder(tiny_config, tokenized, "weights")
    other, _ = notebook.training_folder(tiny_config, tokenized, "other weights")
    assert folder != other
    swapped = notebook.DatasetDict(
        train=tokenized["train"].select(range(159, -1, -1)),
        validation=tokenized["validation"],
    )
    assert notebook.training_folder(tiny_config, swapped, "weights")[0] != folder
