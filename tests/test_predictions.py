"""Section 12: a file of texts is classified, and its rows stay as they came."""

import ast
import csv
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pandas as pd
import pytest
from conftest import ROOT
from test_data import refusal, write
from transformers import AutoModelForSequenceClassification, AutoTokenizer


@pytest.fixture
def classify():
    """A classifier that answers by the first letter; it keeps what it was asked."""

    def answer(texts, truncation, batch_size):
        assert truncation
        answer.asked.extend(texts)
        return [{"label": text[0], "score": 0.5 + 0.001 * len(text)} for text in texts]

    answer.asked = []
    answer.model = SimpleNamespace(config=SimpleNamespace(reliable_confidence=0.54))
    return answer


def classified(notebook, name, classify, text_column=""):
    """Return the rows of the CSV that is written."""
    path = name.parent / "predictions.csv"
    notebook.classify_file(str(name), path, classify, text_column)
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_rows_keep_their_order_and_columns(notebook, classify, tmp_path):
    texts = ["b" * 40, "a", "c" * 300, "b b"]
    lines = ["id,text,note"]
    for number, text in enumerate(texts):
        lines.append(f'00{number},{text},"x, ""y"""')
    write(tmp_path / "texts.csv", "\n".join(lines) + "\n")
    rows = classified(notebook, tmp_path / "texts.csv", classify)
    assert [row["id"] for row in rows] == ["000", "001", "002", "003"]
    assert [row["text"] for row in rows] == texts
    assert [row["note"] for row in rows] == ['x, "y"'] * 4
    assert [row["label"] for row in rows] == ["b", "a", "c", "b"]
    assert float(rows[2]["confidence"]) == pytest.approx(0.8)
    by_length = sorted(texts, key=len, reverse=True)
    assert classify.asked == by_length  # like lengths share a batch


def test_a_row_without_a_text_gets_no_label(notebook, classify, tmp_path):
    write(tmp_path / "texts.csv", "id,text\n1,good\n2,\n3, \n4,<br />\n")
    rows = classified(notebook, tmp_path / "texts.csv", classify)
    assert [row["label"] for row in rows] == ["g", "", "", ""]
    assert [row["confidence"] for row in rows[1:]] == ["", "", ""]
    assert classify.asked == ["good"]


def test_each_file_of_a_folder_has_its_own_column(notebook, classify, tmp_path):
    write(tmp_path / "in" / "a.csv", "text,x\na,1\n")
    write(tmp_path / "in" / "b.csv", "Review,x\nb,2\n")
    rows = classified(notebook, tmp_path / "in", classify)
    assert [row["label"] for row in rows] == ["a", "b"]
    write(tmp_path / "in" / "c.csv", "body,x\nb,2\n")
    path = tmp_path / "predictions.csv"
    said = refusal(notebook.classify_file, str(tmp_path / "in"), path, classify)
    assert "0 columns of c.csv" in said


@pytest.mark.parametrize("text", ["a\rb", "a\r\nb", 'a "b", c', "a\ud83d"])
def test_whatever_is_in_a_row_it_stays_one_row(notebook, classify, tmp_path, text):
    records = [{"text": "x", "note": text}, {"text": "y", "note": "z"}]
    write(tmp_path / "texts.json", json.dumps(records))
    rows = classified(notebook, tmp_path / "texts.json", classify)
    assert [row["label"] for row in rows] == ["x", "y"]
    assert rows[0]["note"] == text.replace("\ud83d", "\\ud83d")


@pytest.mark.parametrize("values", [list(range(1500)), ["x", "y"]])
def test_lists_of_parquet_are_written_whole(notebook, classify, tmp_path, values):
    pd.DataFrame({"text": ["a"], "v": [values]}).to_parquet(tmp_path / "t.parquet")
    (row,) = classified(notebook, tmp_path / "t.parquet", classify)
    assert ast.literal_eval(row["v"]) == values


def test_the_column_of_training_or_the_usual_one_is_read(notebook, classify, tmp_path):
    write(tmp_path / "texts.csv", "text\na\n")
    (row,) = classified(notebook, tmp_path / "texts.csv", classify, "comment")
    assert row["label"] == "a"


def test_integers_of_parquet_stay_integers(notebook, classify, tmp_path):
    ids = pd.array([1234567890123456789, None], "Int64")
    table = pd.DataFrame({"text": ["a", "b"], "id": ids})
    (tmp_path / "in").mkdir()
    table.to_parquet(tmp_path / "in" / "a.parquet")
    write(tmp_path / "in" / "b.csv", "text\nc\n")
    rows = classified(notebook, tmp_path / "in", classify)
    assert [row["id"] for row in rows] == ["1234567890123456789", "", ""]


def test_without_any_text_no_row_gets_a_label(notebook, classify, tmp_path):
    write(tmp_path / "texts.csv", "id,text\n1,\n")
    assert classified(notebook, tmp_path / "texts.csv", classify) == [
        {"id": "1", "text": "", "label": "", "confidence": "", "reliable": ""}
    ]


def test_a_model_reads_texts_as_they_came_as_in_training(notebook, classify, tmp_path):
    write(tmp_path / "texts.csv", 'text\n"A<br />b\n c"\n')
    rows = classified(notebook, tmp_path / "texts.csv", classify)
    assert classify.asked == ["A<br />b\n c"]
    assert rows[0]["text"] == "A<br />b\n c"


def test_answers_to_rely_on_are_marked(notebook, classify, tmp_path, capsys):
    write(tmp_path / "texts.csv", f'text\n{"a" * 40}\n""\n{"b" * 39}\n')
    rows = classified(notebook, tmp_path / "texts.csv", classify)
    assert [row["reliable"] for row in rows] == ["True", "", "False"]
    capsys.readouterr()
    classify.model.config.reliable_confidence = None
    rows = classified(notebook, tmp_path / "texts.csv", classify)
    assert [row["reliable"] for row in rows] == ["", "", ""]
    assert "reliable is empty: training found no threshold" in capsys.readouterr().out


def test_columns_of_the_same_names_are_kept(notebook, classify, tmp_path):
    write(tmp_path / "texts.csv", "text,label,predicted_label\na,0,1\n")
    (row,) = classified(notebook, tmp_path / "texts.csv", classify)
    assert (row["label"], row["predicted_label"]) == ("0", "1")
    assert row["predicted_predicted_label"] == "a"


def test_values_of_json_stay_as_they_are(notebook, classify, tmp_path):
    records = [{"text": "a", "id": 5}, {"text": "b", "n": 7}, {"text": None, "id": "x"}]
    write(tmp_path / "texts.json", json.dumps(records))
    rows = classified(notebook, tmp_path / "texts.json", classify)
    assert [row["id"] for row in rows] == ["5", "", "x"]
    assert [row["n"] for row in rows] == ["", "7", ""]
    assert [row["label"] for row in rows] == ["a", "b", ""]


def test_the_files_of_a_folder_are_classified_together(notebook, classify, tmp_path):
    write(tmp_path / "in" / "a.csv", "text,x\na,1\n")
    write(tmp_path / "in" / "b.csv", "text,y\nb,2\n")
    rows = classified(notebook, tmp_path / "in", classify)
    assert [row["label"] for row in rows] == ["a", "b"]
    assert [row["y"] for row in rows] == ["", "2"]


def test_a_missing_column_is_named_with_its_setting(notebook, classify, tmp_path):
    write(tmp_path / "texts.csv", "body\na\n")
    path = tmp_path / "predictions.csv"
    arguments = (str(tmp_path / "texts.csv"), path, classify)
    assert "settings['text_column']" in refusal(notebook.classify_file, *arguments)
    (row,) = classified(notebook, tmp_path / "texts.csv", classify, "BODY")
    assert row["label"] == "a"


def run_script(*arguments, text_column="", output_dir=""):
    """Run the script where the environment has these settings."""
    command = [sys.executable, str(ROOT / "scripts" / "classify.py"), *arguments]
    environ = os.environ.copy()
    environ["QLORA_TEXT_COLUMN"] = text_column
    environ["QLORA_OUTPUT_DIR"] = output_dir
    return subprocess.run(command, capture_output=True, text=True, env=environ)


@pytest.fixture(scope="module")
def merged(tiny_bert, tmp_path_factory):
    """The folder of a tiny classifier, `merged`, in a folder of its own."""
    folder = tmp_path_factory.mktemp("outputs") / "merged"
    labels = {0: "pan", 1: "praise"}
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_bert, id2label=labels, label2id={"pan": 0, "praise": 1}
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_bert, model_max_length=32).save_pretrained(
        folder
    )
    return folder


def test_a_file_is_classified_without_the_notebook(merged, tmp_path):
    path = write(tmp_path / "texts.csv", f"id,body\n07,good\n08,\n09,{'bad ' * 500}\n")
    done = run_script(str(path), "--model", str(merged), "--text-column", "body")
    assert done.stderr == ""
    assert "3 rows, 2 of them with a text" in done.stdout
    with (merged.parent / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == ["07", "08", "09"]
    assert {rows[0]["label"], rows[2]["label"]} <= {"pan", "praise"}
    assert rows[1]["label"] == ""


def test_the_column_of_the_settings_is_read_where_there_is_one(merged, tmp_path):
    path = write(tmp_path / "texts.csv", "text,body\na,b\n")
    arguments = (str(path), "--model", str(merged))
    assert "column body" in run_script(*arguments, text_column="body").stdout
    assert "column text" in run_script(*arguments, text_column="another").stdout
    arguments += ("--text-column", "text")
    assert "column text" in run_script(*arguments, text_column="body").stdout


def test_the_classifier_of_the_settings_is_taken_and_named(merged, tmp_path):
    path = write(tmp_path / "texts.csv", "text\na\n")
    done = run_script(str(path), output_dir=str(merged.parent))
    assert f"classifier in {merged} knows the classes pan, praise." in done.stdout
    assert (merged.parent / "predictions.csv").exists()


def test_a_file_without_any_text_is_no_error(merged, tmp_path):
    path = write(tmp_path / "texts.csv", "id,text\n1,\n")
    done = run_script(str(path), "--model", str(merged))
    assert done.stderr == ""
    assert "1 rows, 0 of them with a text" in done.stdout


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "no such file"), ("body\na\n", "--text-column"), ("text,x\na\n", "line 2")],
)
def test_what_cannot_be_classified_ends_in_a_sentence(merged, tmp_path, content, said):
    path = tmp_path / "texts.csv"
    if content:
        write(path, content)
    done = run_script(str(path), "--model", str(merged))
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_place_that_cannot_be_written_is_refused_before(merged, tmp_path):
    path = write(tmp_path / "texts.csv", "text\na\n")
    for output in (tmp_path, path):
        done = run_script(str(path), "--model", str(merged), "--output", str(output))
        assert "is a folder, or the input itself" in done.stderr
    assert path.read_text() == "text\na\n"
    new = tmp_path / "new" / "answers.csv"
    assert run_script(str(path), "--model", str(merged), "--output", str(new)).stdout
    assert new.exists()


def test_answers_are_not_written_under_the_name_of_another_format(merged, tmp_path):
    path = write(tmp_path / "texts.csv", "text\na\n")
    output = tmp_path / "answers.csv.gz"
    done = run_script(str(path), "--model", str(merged), "--output", str(output))
    assert "must end in .csv" in done.stderr
    assert not output.exists()


def test_what_is_read_is_not_written_over(merged, tmp_path):
    path = write(tmp_path / "in" / "a.csv", "text\na\n")
    output = tmp_path / "in" / "b.csv"
    done = run_script(str(path.parent), "--model", str(merged), "--output", str(output))
    assert "the input itself" in done.stderr
    assert not output.exists()


def test_a_column_that_is_not_there_is_refused(merged, tmp_path):
    path = write(tmp_path / "texts.csv", "text,body\na,b\n")
    done = run_script(str(path), "--model", str(merged), "--text-column", "bdoy")
    assert "0 columns of texts.csv are called bdoy, of text, body" in done.stderr


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer.json", None, "no tokenizer"),
        ("model.safetensors", b"{", "cannot be used"),
        ("config.json", b"{", "no model"),
        ("config.json", b"[]", "no model"),
    ],
)
def test_a_damaged_model_ends_in_a_sentence(merged, tmp_path, name, content, said):
    path = write(tmp_path / "texts.csv", "text\na\n")
    model = tmp_path / "merged"
    shutil.copytree(merged, model)
    if content is None:
        for file in [*model.glob("tokenizer*"), *model.glob("vocab*")]:
            file.unlink()
    else:
        (model / name).write_bytes(content)
    done = run_script(str(path), "--model", str(model))
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_trained_model_the_script_says_how_to_get_one(tmp_path):
    path = write(tmp_path / "texts.csv", "text\na\n")
    done = run_script(str(path), "--model", str(tmp_path / "merged"))
    assert "Run the notebook" in done.stderr
