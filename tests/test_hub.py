"""The Hugging Face Hub, played by a server on this machine: the default model and data load from it and then from the cache, and each of its faults ends in time."""

import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pandas as pd
import pytest
import torch
from conftest import code_cells

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
MODEL, DATA = "bert-base-uncased", "dipanjanS/imdb_sentiment_finetune_dataset20k"
COMMITS = {"main": "0123456789abcdef0123456789abcdef01234567", "older": "89abcdef0123456789abcdef0123456789abcdef"}
API = re.compile(r"/api/(?P<kind>models|datasets)/(?P<repo>.+?)(/(?P<what>revision|tree)/(?P<revision>[^/]+)(/(?P<folder>.+))?)?")
FILE = re.compile(r"/(?P<kind>datasets/)?(?P<repo>.+?)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
FAULTY = re.compile(r"(?P<reader>config|weights|reviews)/(?P<fault>\w+)-(?P<times>once|twice|always)-(?P<step>info|tree|head|get|all)")
ERROR_HEADERS = {"401": {"X-Error-Message": "Invalid credentials in Authorization header"}, "404": {"X-Error-Code": "RepoNotFound"}, "429": {"Retry-After": "1"}}
TIMES = {"once": 1, "twice": 2, "always": math.inf}
PATIENCE = 1  # seconds that the client is told to wait for an answer
STALL = 20  # seconds until a stalled answer comes, more than a read that stalls once or twice may take

DRIVER = f"""
import json, multiprocessing, os, sys, time
sys.path.insert(0, {str(SCRIPTS)!r})
from import_notebook import import_definitions
notebook = import_definitions()
notebook.limit_hub_waits(seconds=5)

def load_defaults():
    config = notebook.resolve_config({{"QLORA_PROFILE": "full"}} | dict(os.environ), cuda=False)[0]
    _, heads = notebook.inspect_model(config.model_name, config.model_revision)
    tokenizer = notebook.load_tokenizer(config.model_name, config.model_revision)
    base = notebook.load_base(config, heads)
    splits, counts = notebook.prepare_splits(config)
    return {{"fp16": config.fp16, "heads": heads, "tokens": tokenizer.tokenize("a film"),
             "linear4bit": sum(isinstance(module, notebook.bitsandbytes.nn.Linear4bit) for module in base.modules()),
             "embedding": base.get_input_embeddings().weight[2000].tolist(), "read": counts["read"], "rows": {{name: len(split) for name, split in splits.items()}}}}

def meet(repo):
    notebook.torch.set_num_threads(1)
    name, _, revision = repo.partition("@")
    readers = {{"config": notebook.inspect_model, "tokenizer": notebook.load_tokenizer, "weights": lambda name, revision: notebook.load_classifier(name, 0, revision=revision), "reviews": notebook.load_reviews}}
    start, error = time.monotonic(), None
    try:
        readers[repo.split("/")[0]](name, revision or "main")
    except Exception as caught:
        error = caught
    return {{"error": error and f"{{type(error).__module__}}.{{type(error).__name__}}", "text": str(error), "seconds": time.monotonic() - start}}

repos = sys.argv[1:]
if repos:
    with multiprocessing.get_context("fork").Pool(len(repos)) as pool:
        print(json.dumps(dict(zip(repos, pool.map(meet, repos, chunksize=1)))))
else:
    print(json.dumps(load_defaults()))
"""


class Handler(BaseHTTPRequestHandler):
    """Answers what huggingface_hub asks. The repository ``reader/fault-times-step`` has a fault so many times in that step: info, tree, or the head or body of a file."""

    protocol_version = "HTTP/1.1"

    def answer(self):
        path = urlsplit(self.path).path
        asked = (API.fullmatch(path) or FILE.fullmatch(path)).groupdict()
        file, revision = asked.get("file"), asked["revision"] or "main"
        revision = next((name for name in COMMITS if revision in (name, COMMITS[name])), None)
        folder = self.server.folders.get(asked["repo"].rpartition("/")[2]) or self.server.folders[(asked["kind"] or "models").strip("/"), revision or "main"]
        step = self.command.lower() if file else "tree" if asked["what"] == "tree" else "info"
        self.server.asked.add(asked["repo"])
        self.server.revisions.add(revision)
        self.server.sent |= {file} if step == "get" else set()
        fault = self.fault(asked["repo"], step, file)
        if fault == "stalled":
            self.server.stopped.wait(STALL)
        if fault == "dropped":
            self.close_connection = True
        elif fault and fault.isdigit():
            self.send(int(fault), b"{}", ERROR_HEADERS.get(fault, {}))
        elif revision is None:
            self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif asked.get("folder") or (file and not (folder / file).is_file()):
            self.send(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMITS[revision]})
        elif file:
            self.send_file(folder / file, COMMITS[revision], fault)
        else:
            entries = [self.entry(path) for path in sorted(folder.iterdir())]
            info = {"id": asked["repo"], "sha": COMMITS[revision], "siblings": [{"rfilename": entry["path"]} for entry in entries]}
            self.send(200, json.dumps(entries if step == "tree" else info).encode())

    do_GET = do_HEAD = answer

    def fault(self, repo, step, file):
        wanted = FAULTY.fullmatch(repo)
        if not wanted or wanted["step"] not in (step, "all") or (wanted["reader"] == "weights" and file != "model.safetensors"):
            return None
        with self.server.lock:
            self.server.faults[repo] += 1
            self.server.faults[repo, file] += 1
            return wanted["fault"] if self.server.faults[repo, file] <= TIMES[wanted["times"]] else None

    def entry(self, path):
        body = path.read_bytes()
        entry = {"type": "file", "path": path.name, "size": len(body), "oid": hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()}
        large = {"lfs": {"oid": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 134}}
        return entry | (large if path.suffix in (".safetensors", ".parquet") else {})

    def send_file(self, path, commit, fault):
        body, entry = path.read_bytes(), self.entry(path)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{entry["oid"]}"', "Accept-Ranges": "bytes"}
        if "lfs" in entry:
            headers |= {"X-Linked-Size": str(len(body)), "X-Linked-ETag": f'"{entry["lfs"]["oid"]}"'}
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        if start:
            headers |= {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
        body = body[start:-1] if fault == "shorter" else body[start:]
        self.send(206 if start else 200, body, headers, sent=len(body) // 2 if fault == "truncated" else None)

    def send(self, status, body, headers=None, sent=None):
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:sent])
            self.close_connection |= sent is not None

    def log_message(self, *_):
        """Keep the requests out of the output."""


class Hub(ThreadingHTTPServer):
    """The server, in a thread of its own; remembers which repositories it was asked for, and which of their faults were met."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folders):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folders, self.asked, self.revisions, self.sent, self.faults = folders, set(), set(), set(), Counter()
        self.lock, self.stopped = threading.Lock(), threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def stop(self):
        self.stopped.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, *_):
        """Say nothing of clients that hang up."""


class Reader:
    """A process that reads from ``hub`` through the notebook's definitions: ``repos``, all at once, or the defaults if there are none."""

    def __init__(self, hub, home, *repos, **variables):
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_FACE_", "QLORA_", "TRANSFORMERS_"))}
        environ |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "CUDA_VISIBLE_DEVICES": "", "DISABLE_SAFETENSORS_CONVERSION": "1"}
        environ |= {"HF_HUB_ETAG_TIMEOUT": str(PATIENCE), "HF_HUB_DOWNLOAD_TIMEOUT": str(PATIENCE)} | variables
        self.said, self.complaints = home / "stdout.txt", home / "stderr.txt"
        with self.said.open("w") as said, self.complaints.open("w") as complaints:
            self.process = subprocess.Popen([sys.executable, "-c", DRIVER, *repos], env=environ, cwd=home, stdout=said, stderr=complaints, start_new_session=True)

    def result(self, timeout):
        try:
            assert self.process.wait(timeout) == 0, self.complaints.read_text()[-3000:]
        finally:
            self.stop()
        return json.loads(self.said.read_text().splitlines()[-1])

    def stop(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


LOADS, SAYS = {None}, {"builtins.ConnectionError"}
CASES = [  # repository, how it may end, within how many seconds
    ("config/401-always-all", SAYS, 15),  # an expired token in the environment
    ("config/404-always-all", SAYS, 15),
    ("config/429-once-head", LOADS, 15),
    ("config/503-always-all", SAYS, 45),
    ("config/stalled-once-head", LOADS, 15),
    ("config/stalled-twice-head", LOADS | SAYS, 15),
    ("config/stalled-once-info", LOADS | SAYS, 15),
    ("config/stalled-always-get", SAYS, 30),
    ("config/shorter-always-get", SAYS, 15),
    ("weights/429-once-get", LOADS, 15),
    ("weights/503-once-head", LOADS, 15),
    ("weights/503-always-head", SAYS, 45),
    ("weights/503-once-get", LOADS | SAYS, 15),
    ("weights/stalled-always-get", SAYS, 30),
    ("weights/truncated-once-get", LOADS, 15),
    ("weights/shorter-always-get", SAYS, 15),
    ("weights/dropped-once-head", LOADS | SAYS, 15),
    ("reviews/401-always-all", SAYS, 15),
    ("reviews/404-always-all", SAYS, 15),
    ("reviews/429-once-info", LOADS | SAYS, 15),
    ("reviews/429-once-tree", LOADS, 15),
    ("reviews/503-always-all", SAYS, 15),
    ("reviews/503-always-tree", SAYS, 45),
    ("reviews/503-once-info", LOADS | SAYS, 15),
    ("reviews/503-once-get", LOADS | SAYS, 15),
    ("reviews/stalled-once-info", LOADS | SAYS, 15),
    ("reviews/stalled-once-head", LOADS, 15),
    ("reviews/stalled-always-get", SAYS, 30),
    ("reviews/truncated-once-get", LOADS, 15),
    ("reviews/shorter-always-get", SAYS, 15),
    ("reviews/dropped-once-info", LOADS | SAYS, 15),
]


OTHERS = ["config/fine@gone", "tokenizer/fine@gone", "weights/fine@gone", "reviews/fine@gone", "weights/pickled", "config/foreign", "config/coded", "tokenizer/coded", "weights/coded"]


def write_reviews(folder, splits):
    for split, rows in splits.items():
        table = pd.DataFrame({"review": [f"{split} film {row}" for row in range(rows)], "sentiment": [row % 2 for row in range(rows)]})
        table.to_parquet(folder / f"{split}-00000-of-00001.parquet", index=False)
    return folder


@pytest.fixture(scope="module")
def folders(tiny_bert, tmp_path_factory):
    """What the hub's models and data sets hold: the tiny BERT and three splits, another state of both in the revision "older", and models of which something is to be refused."""
    from safetensors.torch import load_file, save_file

    model = Path(tiny_bert)
    older, pickled, foreign, coded = (Path(shutil.copytree(model, tmp_path_factory.mktemp("model") / name)) for name in ("older", "pickled", "foreign", "coded"))
    weights = load_file(model / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, older / "model.safetensors", {"format": "pt"})
    torch.save(weights, pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    config, tokenizer = (json.loads((model / name).read_text()) for name in ("config.json", "tokenizer_config.json"))
    for folder, kind in ((foreign, "foreign"), (coded, "bert")):
        (folder / "code.py").write_text("import os, pathlib\npathlib.Path(os.environ['HF_HOME'], 'executed').touch()\nfrom transformers import BertConfig as Config, BertForSequenceClassification as Model, BertTokenizerFast as Tokenizer\n")
        (folder / "config.json").write_text(json.dumps(config | {"model_type": kind, "auto_map": {"AutoConfig": "code.Config", "AutoModelForSequenceClassification": "code.Model"}}))
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"auto_map": {"AutoTokenizer": [None, "code.Tokenizer"]}}))
    data, data_before = (write_reviews(tmp_path_factory.mktemp("reviews"), {"train": 32, "validation": 8, "test": rows}) for rows in (40, 20))
    return {("models", "main"): model, ("models", "older"): older, ("datasets", "main"): data, ("datasets", "older"): data_before, "pickled": pickled, "foreign": foreign, "coded": coded}


@pytest.fixture(scope="module", autouse=True)
def faulty_reads(folders, tmp_path_factory):
    """A hub and a reader that meets all faults at once, and waits for them while the other tests run."""
    hub = Hub(folders)
    reader = Reader(hub, tmp_path_factory.mktemp("faults"), *(case[0] for case in CASES), *OTHERS)
    yield hub, reader
    reader.stop()
    hub.stop()


@pytest.fixture(scope="module")
def outcomes(faulty_reads):
    return faulty_reads[1].result(timeout=120)


def test_the_defaults_load_from_the_hub_and_then_from_the_cache_alone(folders, tmp_path):
    from safetensors.torch import load_file

    hub = Hub(folders)
    start = time.monotonic()
    loaded = Reader(hub, tmp_path).result(timeout=60)
    assert time.monotonic() - start < 45 and hub.asked == {MODEL, DATA}
    hub.stop()
    start = time.monotonic()
    assert Reader(hub, tmp_path, HF_HUB_OFFLINE="1").result(timeout=60) == loaded
    assert time.monotonic() - start < 45
    embedding = load_file(folders["models", "main"] / "model.safetensors")["embeddings.word_embeddings.weight"][2000]
    assert loaded.pop("embedding") == pytest.approx(embedding.tolist())
    assert loaded == {"fp16": False, "heads": ["classifier"], "tokens": ["a", "film"], "linear4bit": 2 * 6 + 1, "read": 80, "rows": {"train": 64, "validation": 8, "test": 8}}


@pytest.mark.parametrize(("repo", "ends", "bound"), [pytest.param(*case, id=case[0]) for case in CASES])
def test_a_fault_of_the_hub_ends_in_time_in_success_or_in_what_to_do(faulty_reads, outcomes, repo, ends, bound):
    outcome = outcomes[repo]
    if not faulty_reads[0].faults[repo]:
        pytest.fail("The fault was not met.")
    assert outcome["seconds"] < bound
    assert outcome["error"] in ends, outcome["text"]
    if outcome["error"]:
        kind = "DATASET" if repo.startswith("reviews") else "MODEL"
        assert repr(repo) in outcome["text"] and f"QLORA_{kind}_NAME=path/to/folder" in outcome["text"]


def test_another_revision_is_read_where_it_is_asked_for(folders, tmp_path):
    from safetensors.torch import load_file

    hub = Hub(folders)
    loaded = Reader(hub, tmp_path, QLORA_MODEL_REVISION="older", QLORA_DATASET_REVISION=COMMITS["older"]).result(timeout=60)
    hub.stop()
    assert hub.asked == {MODEL, DATA} and hub.revisions == {"older"}
    embedding = load_file(folders["models", "older"] / "model.safetensors")["embeddings.word_embeddings.weight"][2000]
    assert loaded["embedding"] == pytest.approx(embedding.tolist()) and loaded["read"] == 60


@pytest.mark.parametrize("repo", [repo for repo in OTHERS if repo.endswith("@gone")])
def test_a_revision_that_does_not_exist_is_named(outcomes, repo):
    outcome = outcomes[repo]
    kind = "DATASET" if repo.startswith("reviews") else "MODEL"
    assert outcome["error"] == "builtins.ConnectionError" and outcome["seconds"] < 15
    assert f"{repo.removesuffix('@gone')!r} (revision 'gone')" in outcome["text"] and f"QLORA_{kind}_REVISION" in outcome["text"]


def test_weights_that_could_hold_code_are_not_even_downloaded(faulty_reads, outcomes):
    outcome = outcomes["weights/pickled"]
    assert outcome["error"] == "builtins.ConnectionError" and "read from a file model.safetensors only" in outcome["text"] and outcome["seconds"] < 15
    assert "weights/pickled" in faulty_reads[0].asked and "pytorch_model.bin" not in faulty_reads[0].sent


def test_code_of_a_repository_is_not_executed(faulty_reads, outcomes):
    """A model that needs its own code is refused; one that transformers knows is loaded without."""
    hub, reader = faulty_reads
    assert outcomes["config/foreign"]["error"] == "builtins.ValueError" and "'config/foreign'" in outcomes["config/foreign"]["text"]
    assert [outcomes[f"{part}/coded"]["error"] for part in ("config", "tokenizer", "weights")] == [None, None, None]
    assert "code.py" not in hub.sent and not (reader.said.parent / "executed").exists()


def test_nothing_turns_remote_code_on_or_other_formats():
    source = "\n".join(cell.source for cell in code_cells())
    assert set(re.findall(r"trust_remote_code=(\w+)", source)) == {"False"}
    for call in re.findall(r"Auto(?:Config|Tokenizer|ModelForSequenceClassification)\.from_pretrained\(.*?\)", source, flags=re.DOTALL):
        assert "trust_remote_code=False" in call or "{data.base_model}" in call or "(adapter)" in call, call  # the model card's program
    assert 'os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"' in source and "torch.load(" not in source
