"""The Hugging Face Hub, played by a server: defaults load from it, then from the cache alone; faults end in time."""

import hashlib
import json
import os
import re
import shutil
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
from conftest import ROOT
from safetensors.torch import load_file

COMMITS = {"main": "01234567" * 5, "older": "89abcdef" * 5}
API = re.compile(r"/api/(?P<kind>models|datasets)/(?P<repo>.+?)(/(?P<what>revision|tree)/(?P<revision>[^/]+).*)?")
FILE = re.compile(r"/(?P<kind>datasets/)?(?P<repo>.+?)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
FAULTY = re.compile(r"(model|dataset)/(?P<fault>\w+)-(?P<times>once|always)-(?P<step>info|head|get|all)")
HEADERS = {"404": {"X-Error-Code": "RepoNotFound"}, "429": {"Retry-After": "1"}}
LOADS, SAYS, BOUND, STALL = None, "FileNotFoundError", 45, 10  # seconds
CASES = {  # a fault of the Hub, so many times in that step of a download: how reading may end
    **dict.fromkeys([f"{kind}/{fault}-always-all" for kind in ("model", "dataset") for fault in (404, 401)], {SAYS}),
    **dict.fromkeys(["model/503-always-all", "model/dropped-always-all"], {SAYS}),
    **dict.fromkeys(["model/stalled-always-get", "dataset/stalled-always-info"], {SAYS}),
    **dict.fromkeys(["model/shorter-always-get", "dataset/shorter-always-get"], {SAYS}),
    **dict.fromkeys(["model/stalled-once-info", "dataset/429-once-info"], {LOADS, SAYS}),
    **{"dataset/503-once-get": {LOADS, SAYS}, "model/429-once-head": {LOADS}},
}
OTHERS = ["", "@older", "model/fine@gone", "dataset/fine@gone"]  # two defaults, and what is not there
OTHERS += ["model/pickled", "model/foreign", "model/coded", "dataset/coded"]
DRIVER = f"""
import json, multiprocessing, os, socket, sys, time
sys.path.insert(0, {str(ROOT / "scripts")!r})
from notebook_api import import_definitions
nb = import_definitions()

def load_defaults(revision):
    revisions = {{f"QLORA_{{kind}}_REVISION": revision for kind in ("MODEL", "DATASET")}}
    config = nb.resolve_config({{"preset": "full", "max_length": 64}}, revisions, cuda=False)[0]
    tokenizer, head, _, config = nb.check_model(config)
    tables = nb.read_tables(config.dataset_name, config.dataset_revision)
    base = nb.load_base(config, nb.Task(tokenizer, ["a", "b"], head))
    labels = {{*nb.clean(nb.pick_columns(tables))[0]["label"]}}
    return {{"head": head, "tokens": tokenizer.tokenize("a film"), "rows": sorted(map(len, tables)),
            "word": base.get_input_embeddings().weight[2000].tolist(), "labels": sorted(labels),
            "commit": nb.find_source(config.model_name, "model", revision or "main").name}}

def no_answer(*asked):
    open(os.environ["HF_HOME"] + "/asked", "w").write(str(asked))
    raise EOFError

def meet(asked):
    nb.transformers.dynamic_module_utils.input = no_answer
    nb.torch.set_num_threads(1)
    name, _, revision = asked.partition("@")
    if name == "cached":
        nb.hub.constants.HF_HUB_OFFLINE, socket.socket.connect = True, no_answer
    if name in ("", "cached"):
        return load_defaults(revision)
    start, end = time.monotonic(), {{"error": None, "text": ""}}
    try:
        if name.startswith("dataset"):
            nb.read_tables(name, revision or "main")
        else:
            nb.check_model(nb.Config(model_name=name, model_revision=revision or "main", max_length=8))
    except Exception as error:
        end = {{"error": type(error).__name__, "text": str(error)}}
    return end | {{"seconds": time.monotonic() - start}}

ends = {{}}
for asked in (sys.argv[1:], ["cached"]):
    with multiprocessing.get_context("fork").Pool(len(asked)) as pool:
        ends |= dict(zip(asked, pool.map(meet, asked, chunksize=1)))
print(json.dumps(ends))
"""


def entry(path: Path) -> dict:
    """Return what the Hub says of a file."""
    oid = hashlib.sha1(path.read_bytes()).hexdigest()
    return {"type": "file", "path": path.name, "rfilename": path.name, "size": path.stat().st_size, "oid": oid}


class Handler(BaseHTTPRequestHandler):
    """Answers what huggingface_hub asks, with the fault that a repository's name says."""

    protocol_version = "HTTP/1.1"

    def answer(self):
        path, hub = urlsplit(self.path).path, self.server
        asked = (API.fullmatch(path) or FILE.fullmatch(path)).groupdict()
        file, revision, repo = asked.get("file"), asked["revision"] or "main", asked["repo"]
        revision = next((name for name in COMMITS if revision in (name, COMMITS[name])), None)
        commit = COMMITS.get(revision)
        folder = hub.folders.get(repo) or hub.folders[(asked["kind"] or "models").strip("/"), revision or "main"]
        hub.seen |= {repo, file}
        fault = self.fault(repo, self.command.lower() if file else "info", file)
        if fault == "stalled":
            hub.stopped.wait(STALL)
        if fault == "dropped":
            self.close_connection = True
        elif fault and fault.isdigit():
            self.send(int(fault), b"{}", **HEADERS.get(fault, {}))
        elif revision is None:
            self.send(404, b"{}", **{"X-Error-Code": "RevisionNotFound"})
        elif file and not (folder / file).is_file():
            self.send(404, b"{}", **{"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        elif file:
            body, tag = (folder / file).read_bytes(), entry(folder / file)["oid"]
            body = body[:-1] if fault == "shorter" else body
            self.send(200, body, **{"X-Repo-Commit": commit, "ETag": f'"{tag}"'})
        else:
            entries = [entry(path) for path in sorted(folder.iterdir())]
            info = entries if asked["what"] == "tree" else {"id": repo, "sha": commit, "siblings": entries}
            self.send(200, json.dumps(info).encode())

    do_GET = do_HEAD = answer

    def fault(self, repo, step, file):
        wanted = FAULTY.fullmatch(repo)
        if not wanted or wanted["step"] not in (step, "all"):
            return None
        with self.server.lock:
            self.server.faults.update([repo, (repo, file)])
            is_due = wanted["times"] == "always" or self.server.faults[repo, file] == 1
        return wanted["fault"] if is_due else None

    def send(self, status, body, **headers):
        self.send_response(status)
        for header in ({"Content-Type": "application/json", "Content-Length": str(len(body))} | headers).items():
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    def log_message(self, *_):
        pass


class Hub(ThreadingHTTPServer):
    """The server, in a thread of its own; remembers what it was asked for, and which faults were met."""

    daemon_threads, request_queue_size = True, 128

    def __init__(self, folders):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folders, self.seen, self.faults = folders, set(), Counter()
        self.lock, self.stopped = threading.Lock(), threading.Event()
        self.address = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def stop(self):
        self.stopped.set(), self.shutdown(), self.server_close()

    def handle_error(self, *_):
        pass  # clients hang up


@pytest.fixture(scope="module")
def folders(tiny_bert, tmp_path_factory):
    """The tiny BERT, three splits and an older state of them, and repositories that hold code."""
    place = tmp_path_factory.mktemp("hub")
    for name, kind in {"foreign": "foreign", "coded": "bert"}.items():
        folder = shutil.copytree(tiny_bert, place / "model" / name)
        about = {"model_type": kind, "auto_map": {"AutoConfig": "coded.Config", "AutoModel": "coded.Model"}}
        (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | about))
    folder = shutil.copytree(tiny_bert, place / "model" / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    for state, sizes in {"main": (32, 8, 40), "older": (32, 8, 20), "coded": (4,)}.items():
        (place / "dataset" / state).mkdir(parents=True)
        for split, rows in zip(("train", "validation", "test"), sizes):
            table = pd.DataFrame({"review": [f"{split} film {row}" for row in range(rows)], "sentiment": range(rows)})
            file = place / "dataset" / state / f"{split}-00000-of-00001.parquet"
            table.assign(sentiment=table["sentiment"] % 2).to_parquet(file, index=False)
    for folder in ("model/foreign", "model/coded", "dataset/coded"):  # a data set's program bears its name
        (place / folder / "coded.py").write_text("import os\nopen(os.environ['HF_HOME'] + '/ran', 'w')")
    named = {str(each.relative_to(place)): each for each in place.glob("*/*")}
    states = {("models", state): Path(tiny_bert) for state in COMMITS}
    return named | states | {("datasets", state): place / "dataset" / state for state in COMMITS}


@pytest.fixture(scope="module")
def met(folders, tmp_path_factory):
    """A hub, the home of a process whose readers met everything at once, and how each reading ended."""
    hub, home = Hub(folders), tmp_path_factory.mktemp("home")
    private = ("HF_", "HUGGING_FACE_", "QLORA_", "TRANSFORMERS_")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(private)}
    environ |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "CUDA_VISIBLE_DEVICES": ""}
    environ |= {"HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1"}  # a run waits for 5 s: test_run.py
    environ |= {"HF_HUB_DISABLE_XET": "1", "DISABLE_SAFETENSORS_CONVERSION": "1"}
    command = [sys.executable, "-c", DRIVER, *CASES, *OTHERS]
    done = subprocess.run(command, env=environ, cwd=home, capture_output=True, text=True, timeout=300)
    hub.stop()
    assert done.returncode == 0, done.stderr[-3000:]
    return hub, home, json.loads(done.stdout.splitlines()[-1])


def test_the_defaults_load_from_the_hub_then_from_the_cache_alone_and_other_revisions_where_named(met, tiny_bert):
    hub, _, ends = met
    assert {"bert-base-uncased", "dipanjanS/imdb_sentiment_finetune_dataset20k"} <= hub.seen
    expected = {"head": ["classifier"], "tokens": ["a", "film"], "rows": [8, 32, 40], "commit": COMMITS["main"]}
    assert ends[""].items() >= (expected | {"labels": ["negative", "positive"]}).items()
    words = load_file(Path(tiny_bert) / "model.safetensors")["embeddings.word_embeddings.weight"]
    assert ends[""]["word"] == pytest.approx(words[2000].tolist())
    assert ends["cached"] == ends[""]
    assert (ends["@older"]["commit"], ends["@older"]["rows"]) == (COMMITS["older"], [8, 20, 32])
    for missing in ("model/fine@gone", "dataset/fine@gone"):
        assert ends[missing]["error"] == SAYS and all(each in ends[missing]["text"] for each in missing.split("@"))


@pytest.mark.parametrize("repo", CASES)
def test_a_fault_of_the_hub_ends_in_time_in_success_or_in_what_to_do(met, repo):
    hub, _, ends = met
    assert hub.faults[repo], "the fault was not met"
    assert ends[repo]["error"] in CASES[repo] and ends[repo]["seconds"] < BOUND, ends[repo]
    said = (repo, f"{repo.split('/')[0]}_name", "local")
    assert ends[repo]["error"] is None or all(each in ends[repo]["text"] for each in said)


def test_what_could_hold_code_is_neither_downloaded_nor_run_and_nobody_is_asked(met):
    """A model that needs its own code is refused; one that transformers knows is loaded without."""
    hub, home, ends = met
    assert ends["model/pickled"]["error"] == "ValueError" and "safetensors" in ends["model/pickled"]["text"]
    assert "model/pickled" in hub.seen and "pytorch_model.bin" not in hub.seen
    assert [ends[f"model/{name}"]["error"] for name in ("foreign", "coded")] == ["ValueError", None]
    assert ends["dataset/coded"]["error"] in (None, "ValueError")
    assert not (home / "ran").exists() and not (home / "asked").exists()


def test_the_hub_answers_where_anything_does_and_is_not_waited_for(notebook, folders):
    hub, start = Hub(folders), time.monotonic()
    for repo, answers in {"model/fine": True, "model/404-always-all": True, "model/stalled-always-info": False}.items():
        assert notebook.hub_answers(f"{hub.address}/api/models/{repo}", timeout=0.5) == answers
    hub.stop()
    for address in (hub.address, "no address"):
        assert not notebook.hub_answers(address, timeout=0.5)
    assert time.monotonic() - start < 5
