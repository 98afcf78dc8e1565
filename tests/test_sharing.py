"""Section 12: the evidence for an answer and its text box, the adapter folder as a Hub repository, its upload to a Hub played on this machine, and ONNX."""

import ast
import base64
import dataclasses
import hashlib
import json
import re
import subprocess
import sys
import threading
from functools import partial
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import code_cells
from huggingface_hub import HfApi, ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

# Evidence


class BagOfTokens(torch.nn.Module):
    """A classifier whose margin is the sum of its tokens' weights, so that the evidence of a word is known."""

    device = torch.device("cpu")

    def __init__(self, tokenizer):
        super().__init__()
        self.weight = torch.randn(len(tokenizer), generator=torch.Generator().manual_seed(0))
        self.weight[[tokenizer.mask_token_id, tokenizer.pad_token_id]] = 0
        self.rows = 0

    def forward(self, input_ids, attention_mask, **_):
        self.rows += len(input_ids)
        margin = (self.weight[input_ids] * attention_mask).sum(-1)
        return SimpleNamespace(logits=torch.stack([-margin / 2, margin / 2], dim=-1))


class Page(HTMLParser):
    """What a browser would make of HTML: its tags, and its text."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.said = [], ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.said += data


@pytest.fixture(scope="module")
def tokenizer(notebook, tiny_bert):
    return notebook.load_tokenizer(tiny_bert)


@pytest.fixture(scope="module")
def bag(tokenizer):
    return BagOfTokens(tokenizer)


def test_the_evidence_of_a_word_is_what_its_tokens_add(notebook, bag, tokenizer):
    text = "  An unfathomably good film,\tdon't miss it: 5/5! "
    evidence = notebook.word_evidence(bag, tokenizer, text, 64)
    assert evidence.words["word"].tolist() == text.split()
    wanted = [bag.weight[tokenizer(word, add_special_tokens=False)["input_ids"]].sum().item() for word in text.split()]
    np.testing.assert_allclose(evidence.words["evidence"], wanted, atol=1e-5)
    assert evidence.margin == pytest.approx(sum(wanted) + bag.weight[[101, 102]].sum().item(), abs=1e-5)  # [CLS] and [SEP]


@pytest.mark.parametrize(("tail_share", "first", "last"), [(0.0, 8, 0), (0.5, 4, 4)])
def test_what_is_cut_is_not_read(notebook, bag, tokenizer, tail_share, first, last):
    words = [f"{letter}" for letter in "abcdefghijklmnopqrst"]
    evidence = notebook.word_evidence(bag, tokenizer, " ".join(words), 10, tail_share).words
    assert evidence["evidence"].notna().tolist() == [index < first or index >= 20 - last for index in range(20)]


def test_words_on_both_sides_of_a_cut_are_not_hidden_together(notebook, bag, tokenizer):
    evidence = notebook.word_evidence(bag, tokenizer, " ".join("abcdefghijklmnopqrst"), 9, 0.5, n_groups=3)
    pieces = evidence.pieces()
    assert sum(value for _, value in pieces if not np.isnan(value)) == pytest.approx(evidence.margin - bag.weight[[101, 102]].sum().item(), abs=1e-4)
    assert len({words for words, _ in pieces}) == len(pieces) and sum(np.isnan(value) for _, value in pieces) == 1


def test_of_many_words_neighbours_are_hidden_together_and_nothing_grows_without_end(notebook, bag, tokenizer):
    bag.rows = 0
    evidence = notebook.word_evidence(bag, tokenizer, "a good film " * 1700, 256)
    assert bag.rows == 65
    pieces = evidence.pieces()
    assert len(pieces) == 65 and sum(value for _, value in pieces[:-1]) == pytest.approx(evidence.margin - bag.weight[[101, 102]].sum().item(), abs=1e-3)
    assert {len(words.split()) for words, _ in pieces[:-1]} == {3, 4} and np.isnan(pieces[-1][1])
    page = evidence._repr_html_()
    assert len(page) < 20_000 and Page(page).said.endswith("[4,846 not read]") and len(repr(evidence)) < 1000


@pytest.mark.parametrize("text", ["", " \n", "\x00\x01\x02", "\ud800", "good \udfff film"])
def test_without_a_word_there_is_one_error(notebook, bag, tokenizer, text):
    with pytest.raises(ValueError, match="no word to read|cannot be encoded") as error:
        notebook.word_evidence(bag, tokenizer, text, 64)
    assert "Allowed: " in str(error.value)


ODD = st.sampled_from(["<b>bold</b>", "</div>", "<script>alert(1)</script>", "&amp;", '"><img src=x>', "😀", "漢字", "e\u0301", "\u202e", "$x^2$", "\x1b[31m", "<!--", "good", "film"])


@settings(max_examples=60, deadline=None)
@given(st.lists(ODD | st.text(max_size=8), max_size=12).map(" ".join))
def test_any_text_is_shown_as_it_is_or_refused(notebook, bag, tokenizer, text):
    try:
        evidence = notebook.word_evidence(bag, tokenizer, text, 24)
    except ValueError:
        return
    assert evidence.words["word"].tolist() == re.findall(r"\S+", text) and np.isfinite(evidence.margin)
    page = Page(evidence._repr_html_().replace("\r", ""))
    assert set(page.tags) <= {"div", "b", "br", "bdi", "sub", "i"}
    for words, value in evidence.pieces():
        assert np.isnan(value) or words in page.said


def test_the_sign_is_told_by_more_than_colour(notebook):
    for evidence, sign in ((1.5, "+1.50"), (-1.5, "-1.50")):
        assert Page(notebook.word_html("word", evidence, 1.5)).said == "word\u2060" + sign  # no line breaks between them
    assert Page(notebook.word_html("word", 0.1, 1.5)).said == "word"


def test_the_text_box_answers_and_refuses(notebook, bag, tokenizer):
    box = notebook.ReviewBox(partial(notebook.word_evidence, bag, tokenizer, max_length=64))
    box.review.value = "A <i>good</i> film"
    box.button.click()
    assert box.result.value == notebook.word_evidence(bag, tokenizer, "A <i>good</i> film", 64)._repr_html_()
    box.review.value = ""
    box.button.click()
    assert box.result.value.startswith("There is no word to read")


def test_outside_a_notebook_the_answer_is_text(notebook, bag, tokenizer, capsys):
    evidence = notebook.word_evidence(bag, tokenizer, "A good film", 64)
    notebook.display(evidence, notebook.ReviewBox(len))
    said = capsys.readouterr().out
    assert re.match(r"(positive|negative), probability 0\.\d\d, margin [+-]\d+\.\d\d: '\w+' [+-]", said) and "text box" in said and "<" not in said


# The repository


@pytest.fixture
def results():
    return {
        "provenance": {"rows": {"train": 2500, "validation": 1057, "test": 1057}, "device": "CPU, 2 cores", "processes": 2, "versions": dict.fromkeys(("python", "torch", "transformers", "peft", "bitsandbytes"), "1.2.3")},
        "test": {"n": 1057, "accuracy": 0.8061, "accuracy_ci95": [0.7833, 0.8297], "f1_weighted": 0.8059, "f1_weighted_ci95": [0.7832, 0.8298], "confusion_matrix": [[425, 107], [98, 427]]},
        "baselines": {"tfidf_logreg": {"accuracy": 0.7370, "accuracy_ci95": [0.7124, 0.7646]}},
        "training": {"epochs": 3.0, "best_epoch": 2.0},
        "calibration": {"ece": 0.0234},
    }


@pytest.fixture
def adapter(notebook, qlora_model, tokenizer, tmp_path):
    """The folder of an adapter that has learned something."""
    torch.manual_seed(1)
    for parameter in qlora_model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.2)
    qlora_model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_card_holds_the_figures_and_valid_metadata(notebook, results, tmp_path):
    config = notebook.Config(push_to_hub="someone/reviews-qlora", tail_share=0.5, max_length=200)
    notebook.model_card(results, config).save(tmp_path / "README.md")
    card = ModelCard.load(tmp_path / "README.md")
    data = card.data.to_dict()
    assert data["base_model"] == config.model_name and data["datasets"] == [config.dataset_name] and "license" not in data
    assert (data["library_name"], data["pipeline_tag"], card.data.model_name) == ("peft", "text-classification", "reviews-qlora")
    scores = {each.metric_name: (each.metric_type, each.metric_value, each.dataset_type) for each in card.data.eval_results}
    assert scores == {"accuracy": ("accuracy", 0.8061, config.dataset_name), "weighted F1": ("f1", 0.8059, config.dataset_name)}
    assert card.data.eval_results[0].dataset_args == {"layout": "pooled", "test_share": 0.1, "seed": 42}
    for said in ("| this adapter, 4-bit base | 80.6 % [78.3, 83.0] | 80.6 % [78.3, 83.0] |", "| tfidf_logreg | 73.7 % [71.2, 76.5] |  |", "| negative | 425 | 107 |", "| positive | 98 | 427 |", "1,057 test reviews", "2,500 for training"):
        assert said in card.text
    for said in ("off by 2.3 points", "more than 200 tokens, only the beginning and the end", "no other language", "rank 16, alpha 32, dropout 0.1", "query, value", "3; epoch 2 is kept", "peft 1.2.3", "someone/reviews-qlora", "| reviews a step | 64 |", "(The program above keeps the beginning.)", "200, of a longer text 50% from its end"):
        assert said in card.text
    assert "local folder" not in card.text and "/Users" not in card.text


def test_the_folder_is_complete_names_no_path_and_still_loads(notebook, adapter, results, tiny_config, tmp_path):
    config = dataclasses.replace(tiny_config, dataset_name=str(tmp_path))
    name = tiny_config.model_name.rpartition("/")[2]
    before = notebook.load_adapter(adapter, config, ["classifier"]).state_dict()
    assert tiny_config.model_name in (adapter / "adapter_config.json").read_text()  # as PEFT writes it
    for _ in range(2):
        notebook.complete_repository(adapter, notebook.model_card(results, config))
    files = {path.name: path.read_bytes() for path in adapter.iterdir()}
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(files)
    for file, content in files.items():
        assert str(tmp_path).encode() not in content and tiny_config.model_name.encode() not in content, file
        assert not re.search(rb"/(root|home|work|tmp|Users)/", content), file
    card = ModelCard.load(adapter / "README.md")
    assert card.data.base_model == json.loads(files["adapter_config.json"])["base_model_name_or_path"] == name
    assert card.data.datasets is None and card.data.eval_results[0].dataset_type == tmp_path.name
    assert f"`{name}` is the name of a local folder: put the base model's Hub id in its place" in card.text
    after = notebook.load_adapter(adapter, config, ["classifier"]).state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_the_card_s_program_runs_and_answers_as_the_adapter_does(notebook, adapter, results, tiny_config, tmp_path):
    notebook.complete_repository(adapter, notebook.model_card(results, tiny_config))
    (program,) = re.findall(r"```python\n(.+?)```", (adapter / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    program = program.replace(f'"{base}"', repr(tiny_config.model_name)).replace('"path/to/this/folder"', repr(str(adapter)))
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    (answer,) = ast.literal_eval(done.stdout.splitlines()[-1])
    model = notebook.PeftModel.from_pretrained(notebook.load_classifier(tiny_config.model_name, 0), adapter)
    text = re.search(r'classify\("(.+?)"', program)[1]
    sure = notebook.probabilities(notebook.predict_logits(model, notebook.load_tokenizer(str(adapter)), [text], tiny_config.max_length))[0]
    assert answer["label"] == ["negative", "positive"][sure.argmax()] and answer["score"] == pytest.approx(sure.max(), abs=1e-4)


def test_where_it_is_shared_does_not_decide_how_it_is_trained(notebook):
    rows = notebook.Dataset.from_dict({"input_ids": [[1]], "label": [0]})
    tokenized = notebook.DatasetDict(train=rows, validation=rows)
    assert notebook.settings_of_training(notebook.Config(push_to_hub="a/b"), tokenized) == notebook.settings_of_training(notebook.Config(), tokenized)


# The upload


URL = "https://huggingface.co/someone/adapter"


class Handler(BaseHTTPRequestHandler):
    """Takes what huggingface_hub creates and commits, from whoever has the token."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])) if "Content-Length" in self.headers else b"".join(self.chunks())
        if self.headers.get("Authorization") != "Bearer hf_right":
            self.answer(401, {"error": "Invalid username or password."})
        elif self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            self.answer(409 if self.server.exists else 200, {"url": URL, "id": "someone/adapter"})
        elif self.path == "/api/validate-yaml":
            self.answer(200, {"warnings": [], "errors": []})
        elif self.path.endswith("/preupload/main"):
            files = [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in json.loads(body)["files"]]
            self.answer(200, {"files": files})
        else:
            lines = [json.loads(line) for line in body.splitlines()]
            self.server.files |= {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"}
            self.answer(200, {"success": True, "commitOid": "0" * 40, "commitUrl": f"{URL}/commit/{'0' * 40}"})

    def do_GET(self):
        self.answer(401, {"error": "Invalid username or password."})

    def chunks(self):
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()

    def answer(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Keep the requests out of the output."""


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.exists = {}, False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize("exists", [False, True])
def test_the_folder_is_uploaded_as_it_is(notebook, adapter, hub, monkeypatch, exists):
    hub.exists = exists
    monkeypatch.setattr(notebook, "HfApi", partial(HfApi, f"http://127.0.0.1:{hub.server_port}", token="hf_right"))
    before = digests(adapter)
    line = notebook.upload(adapter, "someone/adapter")
    assert line.startswith(f"{adapter} is uploaded to http") and line.endswith("/someone/adapter.")
    assert (hub.created.get("visibility") == "private" or hub.created["private"]) and (hub.created["organization"], hub.created["name"]) == ("someone", "adapter")
    assert {name: hashlib.sha256(content).hexdigest() for name, content in hub.files.items()} == before == digests(adapter)


@pytest.mark.parametrize(("fault", "said"), [("token", "401"), ("network", "Connect"), ("name", "HFValidationError")])
def test_a_failed_upload_is_one_line_and_loses_nothing(notebook, adapter, hub, monkeypatch, fault, said):
    port = 1 if fault == "network" else hub.server_port
    monkeypatch.setattr(notebook, "HfApi", partial(HfApi, f"http://127.0.0.1:{port}", token="hf_wrong" if fault == "token" else "hf_right"))
    before, repo = digests(adapter), "someone/--" if fault == "name" else "someone/adapter"
    line = notebook.upload(adapter, repo)
    assert line.startswith("Not uploaded (") and said in line and f"hf upload {repo} {adapter}" in line and "\n" not in line
    assert "hf_wrong" not in line and not hub.files and digests(adapter) == before


def test_nothing_is_uploaded_unless_it_is_asked_for(notebook):
    assert notebook.Config().push_to_hub == "" and all("push_to_hub" not in notebook.profile_values(profile) for profile in ("full", "demo"))
    (cell,) = [cell.source for cell in code_cells() if re.search(r"^ *(print\()?upload\(", cell.source, flags=re.MULTILINE)]
    assert re.search(r"^if config\.push_to_hub:\n    print\(upload\(", cell, flags=re.MULTILINE)


# ONNX


def test_the_onnx_file_answers_as_the_merged_model_does(notebook, adapter, tiny_config, tokenizer, sentences, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    merged = notebook.PeftModel.from_pretrained(notebook.load_classifier(tiny_config.model_name, 0), adapter).merge_and_unload()
    path = notebook.export_onnx(merged, tokenizer, tmp_path / "model.onnx")
    assert [each.name for each in tmp_path.glob("model*")] == ["model.onnx"]  # weights and all in one file
    texts = ["Dull.", *sentences["text"][:99]]
    for batch_size in (1, 64):
        expected, got = (notebook.predict_logits(model, tokenizer, texts, tiny_config.max_length, batch_size=batch_size) for model in (merged, notebook.OnnxClassifier(path)))
        np.testing.assert_allclose(got, expected, atol=1e-4)
    assert np.ptp(expected[:, 1] - expected[:, 0]) > 0.1  # the answers differ from text to text
