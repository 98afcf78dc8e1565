"""Section 8: W&B logs where it can, and is never in the way. The offline log is read back from its file."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer

import pytest

KEY = "c0ffee" * 7  # the form of a key, and no key


@pytest.fixture(autouse=True)
def clean_wandb(monkeypatch, tmp_path):
    """Give W&B an environment, a working folder and a home of its own."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield
    import wandb

    for end in (wandb.finish, wandb.teardown):
        with suppress(ConnectionError):  # where a test killed W&B's own process
            end()


def log_records(path):
    """Yield the records of a ``.wandb`` file: a LevelDB log (blocks of 32 KiB, records split into chunks) after a header of 7 bytes."""
    data, position, parts = path.read_bytes(), 7, []
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        left_in_block = 32768 - position % 32768
        if left_in_block < 7:  # too short for a chunk's header: padding
            position += left_in_block
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        parts.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last chunk of one
            yield b"".join(parts)
            parts = []


def read_log(folder):
    """Return configuration, history and files of the one run below ``folder``."""
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # W&B's own process may still be writing
    (path,) = folder.glob("wandb/*run-*-*/run-*.wandb")
    config, history, files = {}, [], []
    for data in log_records(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        for item in [*record.run.config.update, *record.config.update]:
            config[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
        if record.HasField("history"):
            history.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item})
        files += [file.path for file in record.files.files]
    return config, history, files


def test_without_a_key_nothing_is_started(notebook):
    assert notebook.start_wandb("project", {}, {}) == (False, "W&B: not logging (no WANDB_API_KEY in the environment or in .env).")


def test_offline_mode_keeps_configuration_metrics_and_confusion_matrix(notebook, tmp_path, monkeypatch, tiny_config, qlora_model, offline_model, sentences):
    monkeypatch.setenv("WANDB_MODE", "offline")
    started, line = notebook.start_wandb("project", {"lora_r": 16, "learning_rate": 2e-4}, {"WANDB_MODE": "offline"})
    assert started and "locally" in line
    tokenizer = notebook.AutoTokenizer.from_pretrained(offline_model)
    splits = notebook.tokenize_reviews(notebook.split_reviews(sentences.sample(300, random_state=0), 0.1, 0.1, 0), tokenizer, 32)
    arguments = notebook.training_arguments(tiny_config, str(tmp_path / "out"), report_to="wandb", num_train_epochs=2, disable_tqdm=True)
    notebook.make_trainer(qlora_model, arguments, tokenizer, splits["train"].select(range(64)), splits["validation"]).train()
    figure = notebook.save_figure(notebook.plot_confusion([[5, 1], [2, 4]], 0.75), str(tmp_path), "confusion_matrix.png")
    assert figure is not None
    import wandb

    assert wandb.run.settings.init_timeout <= 15 and wandb.run.settings.finish_timeout <= 15
    line = notebook.log_test_to_wandb({"accuracy": 0.75, "f1_weighted": 0.74}, str(tmp_path / "confusion_matrix.png"))
    assert "closed" in line
    config, history, files = read_log(tmp_path)
    assert config["lora_r"] == 16 and config["learning_rate"] == pytest.approx(2e-4)
    keys = set().union(*history)
    assert {"train/loss", "eval/loss", "eval/accuracy", "test/accuracy"} <= keys
    assert sum("eval/accuracy" in row for row in history) == 2  # one point of the curve an epoch
    assert next(row["test/accuracy"] for row in history if "test/accuracy" in row) == 0.75
    assert any("confusion_matrix" in path for path in files)


def test_a_log_that_fails_at_the_end_is_said_and_no_more(notebook, tmp_path):
    assert "wandb sync" in notebook.log_test_to_wandb({"accuracy": 0.5, "f1_weighted": 0.5}, str(tmp_path / "no-such.png"))


def test_a_wrong_key_is_said_and_training_goes_on(notebook, monkeypatch):
    class Unauthorized(BaseHTTPRequestHandler):
        def do_POST(self):
            body = b'{"data": null}'
            self.send_response(401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Unauthorized) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environ = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}"}
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        start = time.monotonic()
        started, line = notebook.start_wandb("project", {}, environ)
        server.shutdown()
    assert not started and "key was not accepted" in line and KEY not in line
    assert time.monotonic() - start < 15


def test_a_malformed_key_is_said(notebook, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "short")
    started, line = notebook.start_wandb("project", {}, {"WANDB_API_KEY": "short"})
    assert not started and "key was not accepted" in line


def test_without_a_network_the_log_is_kept_locally_in_time(notebook, tmp_path, monkeypatch, capfd):
    environ = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://no-such-host.invalid"}
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    start = time.monotonic()
    started, line = notebook.start_wandb("project", {"seed": 1}, environ)
    assert time.monotonic() - start < 15
    assert started and "wandb sync" in line
    import wandb

    wandb.finish()
    assert read_log(tmp_path)[0]["seed"] == 1
    captured = capfd.readouterr()
    assert KEY not in captured.out + captured.err


class Server(ThreadingHTTPServer):
    """A W&B server that takes a key and a run, until it is gone: then it answers on no connection, old or new."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.asked, self.gone, self.asked_when_gone = [], threading.Event(), 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def vanish(self):
        self.gone.set()


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.gone.is_set():
            self.server.asked_when_gone += 1
            self.close_connection = True
            return
        operation = re.search(rb"(?:query|mutation)\s+(\w+)", body) if self.path == "/graphql" else None
        self.server.asked.append(operation[1].decode() if operation else self.path.rpartition("/")[2])
        user = {"id": "1", "name": "me", "username": "me", "entity": "me", "email": "me@example.org", "admin": False, "flags": "{}", "deletedAt": None, "apiKeys": {"edges": []}, "teams": {"edges": []}}
        run = {"id": "1", "name": "run", "displayName": "run", "config": "{}", "historyLineCount": 0, "project": {"name": "project", "entity": {"name": "me"}}}
        named = (json.loads(body).get("variables") or {}).get("files", []) if operation else []
        files = [{"name": name, "uploadUrl": f"http://127.0.0.1:{self.server.server_port}/upload"} for name in named]
        uploads = {"runID": "1", "uploadHeaders": [], "files": files}
        reply = json.dumps({"data": {"viewer": user, "upsertBucket": {"bucket": run, "inserted": True}, "createRunFiles": uploads}} if operation else {}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    do_GET = do_POST = do_PUT = answer

    def log_message(self, *_):
        pass


def test_a_network_lost_while_training_costs_no_metric_and_little_time(notebook, tmp_path, monkeypatch, capfd, tiny_config, qlora_model, offline_model, sentences):
    server = Server()
    environ = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}"}
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    started, line = notebook.start_wandb("project", {"lora_r": 5}, environ, timeout=2)
    assert started and line == "W&B: logging to the project project." and "UpsertBucket" in server.asked
    lost = []

    class Lose(notebook.TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            if state.epoch == 1:
                server.vanish()
                lost.append(time.monotonic())

    tokenizer = notebook.AutoTokenizer.from_pretrained(offline_model)
    splits = notebook.tokenize_reviews(notebook.split_reviews(sentences.sample(80, random_state=0), 0.1, 0.1, 0), tokenizer, 32)
    config = dataclasses.replace(tiny_config, num_train_epochs=4.0, early_stopping_patience=9)
    trainer = notebook.make_main_trainer(config, qlora_model, tmp_path / "checkpoints", tokenizer, splits, to_wandb=True)
    trainer.add_callback(Lose)
    trainer.train()
    assert trainer.state.epoch == 4
    notebook.save_figure(notebook.plot_confusion([[5, 1], [2, 4]], 0.75), str(tmp_path), "confusion_matrix.png")
    start = time.monotonic()
    line = notebook.log_test_to_wandb({"accuracy": 0.75, "f1_weighted": 0.74}, str(tmp_path / "confusion_matrix.png"))
    assert time.monotonic() - start < 20 and start - lost[0] < 60 and server.asked_when_gone
    assert line.endswith("at the end; the log is in wandb/, for `wandb sync`.")
    server.shutdown()
    config, history, _ = read_log(tmp_path)
    assert config["lora_r"] == 5 and sum("eval/accuracy" in row for row in history) == 4
    assert next(row["test/accuracy"] for row in history if "test/accuracy" in row) == 0.75
    captured = capfd.readouterr()
    assert KEY not in captured.out + captured.err


def test_when_the_process_of_w_and_b_dies_training_goes_on_without_it(notebook, tmp_path, monkeypatch, capsys, tiny_config, qlora_model, offline_model, sentences):
    monkeypatch.setenv("WANDB_MODE", "offline")
    started, _ = notebook.start_wandb("project", {}, {"WANDB_MODE": "offline"})
    killed = []

    class Kill(notebook.TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            if state.epoch == 1:
                own = subprocess.run(["pgrep", "-P", str(os.getpid()), "-f", "wandb-core"], capture_output=True, text=True).stdout.split()
                for process in own:
                    os.kill(int(process), signal.SIGKILL)
                killed.extend(own)

    tokenizer = notebook.AutoTokenizer.from_pretrained(offline_model)
    splits = notebook.tokenize_reviews(notebook.split_reviews(sentences.sample(80, random_state=0), 0.1, 0.1, 0), tokenizer, 32)
    config = dataclasses.replace(tiny_config, num_train_epochs=3.0, early_stopping_patience=9)
    trainer = notebook.make_main_trainer(config, qlora_model, tmp_path / "checkpoints", tokenizer, splits, to_wandb=True)
    trainer.add_callback(Kill)
    trainer.train()
    assert started and killed and trainer.state.epoch == 3
    assert sum("eval_accuracy" in line for line in trainer.state.log_history) == 3
    assert capsys.readouterr().out.count("W&B: the log ends here") == 1
    assert "at the end" in notebook.log_test_to_wandb({"accuracy": 0.5, "f1_weighted": 0.5}, str(tmp_path / "no-such.png"))
