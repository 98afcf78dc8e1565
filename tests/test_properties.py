"""Whatever folder a user names: the right table comes out of it, or a sentence that says which file and which line."""

import csv
import gzip
import io
import json
import re

import numpy as np
import pandas as pd
from hypothesis import HealthCheck, assume, given
from hypothesis import settings as effort
from hypothesis import strategies as st
from test_data import answer, gather, pairs

FORMATS = {"csv,": "csv", "csv;": "CSV", "csv|": "csv", "csv\t": "tsv", "json": "json", "jsonl": "jsonl"}
FORMATS |= {"columns": "json", "parquet": "parquet"}
ENCODINGS = st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1", "cp1252"])
NAMES = st.sampled_from(["train", "reviews", "reviews_test", "my data.v2", "ünï", "a-00-of-02", "README_2"])
FILES = st.tuples(st.sampled_from([*FORMATS]), ENCODINGS, st.booleans())  # and whether gzipped
FOLDERS = st.dictionaries(NAMES, FILES, min_size=1, max_size=3)
COLUMNS = st.tuples(st.sampled_from(["text", "Review", "TEXT "]), st.sampled_from(["label", "LABEL"]))
COLUMNS |= st.just(("Körper", "Art"))  # named by settings
CLASSES = [["spam", "Ham"], [0, 1, 2], [1.0, 2.0], [True, False], ["a b", "c,d", "é;"], [*range(-4, 8)], [*range(50)]]
TAME = st.text(st.sampled_from("abc é好👩.!?'<>&-"), min_size=1, max_size=12) | st.just("word " * 20_000)
WILD = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\t"), max_size=20)
WILD |= st.text(st.sampled_from('",;|\n\r \x00\x85\u2028<br/>='), max_size=12)
WILD |= st.sampled_from(["", "nan", "x" * 10**6])
TEXTS = st.tuples(st.just("read"), st.lists(TAME, min_size=1, max_size=12))
TEXTS |= st.tuples(st.just("read or refused"), st.lists(WILD, min_size=1, max_size=8))
quick = effort(max_examples=500, deadline=None, suppress_health_check=[*HealthCheck])


def written(kind, encoding, texts, labels, text_name, label_name):
    """Return the bytes of a table in a format: `csv` and a separator, `json`, `jsonl`, `columns` or `parquet`."""
    table = {"id": [*range(len(texts))], label_name: labels, text_name: texts}
    rows = [dict(zip(table, row)) for row in zip(*table.values())]
    if kind == "parquet":
        out = io.BytesIO()
        pd.DataFrame(table).to_parquet(out)
        return out.getvalue()
    if kind[:3] == "csv":
        out = io.StringIO(newline="")
        csv.writer(out, delimiter=kind[3:]).writerows([[*table], *zip(*table.values())])
        return out.getvalue().encode(encoding)
    plain = json.JSONEncoder(ensure_ascii=False).encode
    form = "\n".join(map(plain, rows)) if kind == "jsonl" else plain(table if kind == "columns" else rows)
    return form.encode(encoding)


@quick
@given(FOLDERS, st.sampled_from(CLASSES), TEXTS, COLUMNS)
def test_any_folder_is_read_or_refused_by_file_and_line(notebook, tmp_path_factory, files, classes, texts, columns):
    folder, (promise, texts) = tmp_path_factory.mktemp("folder"), (texts[0], [*texts[1]])
    files = [*files.items()][: len(texts)]  # a row in each file, or it has no columns
    shares, expected, foreign = np.array_split(np.arange(len(texts)), len(files)), {}, []
    for (name, (kind, encoding, gzipped)), share in zip(sorted(files), shares):
        labels = [classes[i % len(classes)] for i in share]
        path = folder / f"{name}.{FORMATS[kind]}{'.gz' * gzipped}"
        for i in share:  # without what the encoding does not have
            texts[i] = texts[i].encode(encoding, "replace").decode(encoding)
        raw = written(kind, encoding, [texts[i] for i in share], labels, *columns)
        if kind != "parquet" and encoding in ("latin-1", "cp1252") and not raw.isascii():
            assume("\ufffd" in raw.decode("utf-8", "replace"))  # not UTF-8 by chance
            foreign.append(path.name)
        path.write_bytes(gzip.compress(raw, 1) if gzipped else raw)
        for i, label in zip(share, labels):
            text = " ".join(re.sub(r"<br\s*/?>", " ", texts[i]).split())
            expected.setdefault(text, set()).add(re.sub(r"\.0$", "", str(label)))
    found, said = answer(gather, notebook, folder, *(columns if "Art" in columns else ("", "")))
    kept = {(text, *labels) for text, labels in expected.items() if text and len(labels) == 1}
    few = len({label for _, label in kept}) < 2
    if found:
        assert not foreign and not few
        assert {*pairs(found[0])} == kept and len(found[0]) == len(kept) and found[1]["read"] == len(texts)
    else:
        assert foreign or few or promise == "read or refused", said
        cause = re.search(r"(\S.*) cannot be read: (line \d+ .*|it is empty.*)", said)
        assert cause or re.search(r"columns of .* are called", said) or (few and "different labels" in said), said


ROWS = st.text('tex,label"\n\r;\t\0 ', max_size=30).map(lambda rows: f"text,label\n{rows}".encode())


@effort(quick, max_examples=200)
@given(st.binary(max_size=30) | ROWS, st.sampled_from(["a.csv", "a.tsv", "a.json", "a.jsonl", "a.parquet", "a.csv.gz"]))
def test_any_bytes_are_read_or_refused_by_name(notebook, tmp_path_factory, raw, name):
    path = tmp_path_factory.mktemp("folder") / name
    path.write_bytes(raw)
    _, said = answer(notebook.read_tables, str(path))
    assert not said or said.startswith(f"{name} cannot be read: ")
