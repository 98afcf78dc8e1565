"""The Hugging Face Hub, played by a server, and a program that reads from it.

Run as a program, this file reads repositories as the notebook does, each in a process
of its own. Standard input has them in JSON: name -> arguments of `read`.
"""

import hashlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
COMMITS = {"main": "0" * 40, "older": "1" * 40}
STATES = {commit: state for state, commit in COMMITS.items()}
PATH = re.compile(
    r"/(?:api/)?(?:models/|datasets/)?(?P<repo>.+?)"
    r"/(?P<question>revision|tree|resolve)/(?P<revision>\w+)/?(?P<name>.*)"
)
ERRORS = {"401": "GatedRepo", "404": "RepoNotFound"}  # as the Hub calls them


@dataclass
class Fault:
    """What the Hub does instead of answering: a status, drop, stall or shorten."""

    kind: str
    requests: str = ""  # a pattern: which ones, as "GET /path"
    times: int = 1_000_000


class Handler(BaseHTTPRequestHandler):
    """Answers what huggingface_hub asks, with the faults of the repository."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = self.path.split("?")[0]
        asked = PATH.fullmatch(path)
        if asked is None:  # about something else than a repository
            self.send("404")
            return
        self.server.asked.update([asked["repo"], asked["name"]])
        fault = self.server.next_fault(asked["repo"], f"{self.command} {path}")
        if fault == "stall":
            self.server.stopped.wait()
        if fault == "drop":
            self.close_connection = True
        elif fault.isdigit():
            self.send(fault, headers={"X-Error-Code": ERRORS.get(fault, "")})
        else:
            self.answer(asked, shorten=fault == "shorten")

    do_HEAD = do_GET

    def answer(self, asked, shorten):
        folder, commit = self.server.find(asked["repo"], asked["revision"])
        headers = {"X-Repo-Commit": commit}
        if folder is None:
            self.send("404", headers={"X-Error-Code": "RevisionNotFound"})
        elif asked["question"] == "resolve" and (folder / asked["name"]).is_file():
            content = (folder / asked["name"]).read_bytes()
            headers["ETag"] = hashlib.sha1(content).hexdigest()
            if shorten:
                content = content[:-1]
            self.send("200", content, headers)
        elif asked["name"]:
            headers["X-Error-Code"] = "EntryNotFound"
            self.send("404", headers=headers)
        else:
            entries = [describe(path) for path in sorted(folder.iterdir())]
            about = {"id": asked["repo"], "sha": commit, "siblings": entries}
            if asked["question"] == "tree":
                about = entries
            self.send("200", json.dumps(about).encode(), headers)

    def send(self, status, content=b"{}", headers=None):
        self.send_response(int(status))
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Retry-After", "1")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


def describe(path):
    """Return what the Hub says of a file in a repository."""
    return {
        "type": "file",
        "path": path.name,
        "rfilename": path.name,
        "size": path.stat().st_size,
        "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
    }


class Hub(ThreadingHTTPServer):
    """The server; it remembers what it was asked for, and which faults were met."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folders, faults):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folders = folders  # of a repository, or of all with that first name
        self.faults = faults  # of a repository
        self.asked = set()
        self.met = Counter()
        self.lock = threading.Lock()
        self.stopped = threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def find(self, repo, revision):
        """Return the folder of a repository at a revision, and its commit, or None."""
        state = STATES.get(revision, revision)
        if state not in COMMITS:
            return None, ""
        folder = self.folders.get(repo) or self.folders[repo.split("/")[0]]
        return folder / state, COMMITS[state]

    def next_fault(self, repo, request):
        """Return the kind of the fault that a request meets, "" for none."""
        fault = self.faults.get(repo)
        if fault is None or not re.search(fault.requests, request):
            return ""
        with self.lock:
            self.met[repo] += 1
            is_due = self.met[repo] <= fault.times
        return fault.kind if is_due else ""

    def stop(self):
        self.stopped.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, *_):
        pass  # clients hang up


def read_apart(readings, hub, home):
    """Read repositories in processes of a program; return how each reading ended."""
    environ = {}
    for name, value in os.environ.items():
        if not name.startswith(("HF_", "HUGGING_FACE_", "QLORA_", "TRANSFORMERS_")):
            environ[name] = value
    environ["HF_ENDPOINT"] = f"http://127.0.0.1:{hub.server_port}"
    environ["HF_HOME"] = str(home)
    environ["HF_HUB_ETAG_TIMEOUT"] = "1"
    environ["HF_HUB_DOWNLOAD_TIMEOUT"] = "1"
    environ["HF_HUB_DISABLE_XET"] = "1"
    environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
    environ["NO_PROXY"] = "127.0.0.1"
    environ["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(readings),
        env=environ,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def nobody_answers(*asked):
    """Take the place of `input`, and note that somebody was asked."""
    Path(os.environ["HF_HOME"], "asked").touch()
    raise EOFError


def read(notebook, kind, name, revision):
    """Read a model or a data set as the notebook does; return what it holds."""
    if kind == "dataset":
        tables = notebook.read_tables(name, revision)
        rows, _ = notebook.clean(notebook.pick_columns(tables))
        sizes = sorted(len(table) for table in tables)
        return {"rows": sizes, "labels": sorted(set(rows["label"]))}
    config = notebook.Config(model_name=name, model_revision=revision, max_length=8)
    tokenizer, _ = notebook.open_checkpoint(config)
    model, head = notebook.load_published(config, ["a", "b"])
    word = model.get_input_embeddings().weight[2000, 0].item()
    return {"tokens": tokenizer.tokenize("a film"), "head": head, "word": word}


def try_to_read(reading):
    """Read a repository; return what it holds, or the error, and the seconds."""
    start = time.monotonic()
    notebook = sys.modules["notebook_definitions"]
    notebook.torch.set_num_threads(1)
    session = notebook.hub.get_session()
    session.event_hooks["request"].append(notebook.limit_wait)  # as section 1 does
    end = {"error": None, "said": ""}
    try:
        end["found"] = read(notebook, *reading)
    except Exception as error:
        end["error"] = type(error).__name__
        end["said"] = str(error)
    end["seconds"] = time.monotonic() - start
    return end


def main():
    sys.path.insert(0, str(SCRIPTS))
    from notebook_api import import_definitions

    notebook = import_definitions()
    time.sleep = lambda seconds: None  # the library waits between its attempts
    notebook.transformers.dynamic_module_utils.input = nobody_answers
    readings = json.load(sys.stdin)
    with multiprocessing.get_context("fork").Pool(len(readings)) as pool:
        ends = pool.map(try_to_read, readings.values(), chunksize=1)
    print(json.dumps(dict(zip(readings, ends))))


if __name__ == "__main__":
    main()
