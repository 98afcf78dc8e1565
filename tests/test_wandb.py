"""Section 8: W&B logs where it can, and is never in the way. The offline log is read back from its file."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest

KEY = "c0ffee" * 7  # the form of a key, and no key
TRUTH, GUESSES, NAMES = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1]), ["bad", "good"]


@pytest.fixture(autouse=True)
def own_wandb(monkeypatch, tmp_path):
    """Give W&B an environment, a working folder and a home of its own."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("WANDB_DIR", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield
    if wandb := sys.modules.get("wandb"):
        for end in (wandb.finish, wandb.teardown):
            with suppress(Exception):  # where a test killed W&B's own process
                end()


@pytest.fixture
def start(notebook, monkeypatch):
    """A function that starts W&B in an environment, within 15 seconds, and returns the line."""

    def run(about: dict, **environ: str) -> str:
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        begun = time.monotonic()
        line = notebook.start_wandb("project", about, environ, timeout=2)
        assert time.monotonic() - begun < 15
        assert "\n" not in line and KEY not in line
        return line

    return run


@pytest.fixture
def train(notebook, tiny_config, task, tokenized, tmp_path):
    """A function that trains for two epochs, logging to W&B, and returns the epochs of its validations."""

    def run(*callbacks) -> list[float]:
        few = notebook.DatasetDict({**tokenized, "train": tokenized["train"].select(range(64))})
        config = tiny_config.model_copy(update={"num_train_epochs": 2.0})
        callbacks = [notebook.SafeWandbCallback(), *callbacks]
        trainer = notebook.train_within_memory(config, task, few, tmp_path / "run", callbacks)
        return [row["epoch"] for row in trainer.state.log_history if "eval_loss" in row and row["step"]]

    return run


@pytest.fixture
def unauthorized():
    """The address of a server that accepts no key."""

    class Unauthorized(BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(401)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        do_GET = do_POST

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Unauthorized) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def refused() -> str:
    """An address where nothing listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def log_records(path):
    """Yield the records of a `.wandb` file: a LevelDB log (blocks of 32 KiB, records in chunks) behind 7 bytes."""
    data, position, parts = path.read_bytes(), 7, []
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        left_in_block = 32768 - position % 32768
        if left_in_block < 7:  # too short for a chunk's header: padding
            position += left_in_block
            continue
        length, kind = (
            int.from_bytes(data[position + 4 : position + 6], "little"),
            data[position + 6],
        )
        parts.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last chunk of one
            yield b"".join(parts)
            parts = []


def read_log(folder) -> tuple[dict, list[dict]]:
    """Return configuration and history of the one run below `folder`."""
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # W&B's own process may still be writing
    (path,) = folder.glob("wandb/*run-*-*/run-*.wandb")
    config, history = {}, []
    for data in log_records(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        for item in [*record.run.config.update, *record.config.update]:
            config[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
        if record.HasField("history"):
            items = record.history.item
            history.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return config, history


def assert_secret(folder, capfd) -> None:
    """Check that the key was neither printed nor written."""
    written = [path for path in folder.rglob("*") if path.is_file()]
    assert written and not [path for path in written if KEY.encode() in path.read_bytes()]
    captured = capfd.readouterr()
    assert KEY not in captured.out + captured.err


# Starting


@pytest.mark.parametrize("environ", [{}, {"WANDB_API_KEY": ""}, {"WANDB_API_KEY": KEY, "WANDB_MODE": "disabled"}])
def test_without_a_key_or_disabled_nothing_is_started(start, tmp_path, environ):
    assert start({}, **environ).startswith("W&B: not used") and not list(tmp_path.iterdir())
    assert sys.modules.get("wandb") is None or sys.modules["wandb"].run is None


def test_a_wrong_key_is_said_and_nothing_is_started(start, unauthorized, tmp_path, capfd):
    line = start({}, WANDB_API_KEY=KEY, WANDB_BASE_URL=unauthorized)
    assert "key" in line and line.startswith("W&B: not used")
    assert sys.modules["wandb"].run is None and not [*tmp_path.glob("wandb/*run-*")]
    captured = capfd.readouterr()
    assert KEY not in captured.out + captured.err


def test_a_key_of_the_wrong_form_is_said_too(start, refused):
    line = start({}, WANDB_API_KEY="short", WANDB_BASE_URL=refused)
    assert "key" in line and line.startswith("W&B: not used")


def test_without_a_network_the_log_is_kept_locally(notebook, start, refused, tmp_path, capfd):
    line = start({"seed": 1}, WANDB_API_KEY=KEY, WANDB_BASE_URL=refused)
    assert line.startswith("W&B: logging") and "wandb sync" in line
    notebook.log_test({"accuracy": 0.75}, TRUTH, GUESSES, NAMES)
    config, history = read_log(tmp_path)
    assert config["seed"] == 1 and any(row.get("test/accuracy") == 0.75 for row in history)
    assert_secret(tmp_path, capfd)


def test_whatever_fails_while_starting_is_said_and_not_raised(start, monkeypatch):
    import wandb

    def broken(**_):
        raise OSError("no space left")

    monkeypatch.setattr(wandb, "init", broken)
    line = start({}, WANDB_MODE="offline")
    assert line.startswith("W&B: not used") and "OSError" in line


# Logging


def test_offline_a_run_keeps_configuration_metrics_and_confusion_matrix(notebook, start, train, tmp_path, capfd):
    line = start({"lora_r": 5, "tail_share": 0.25}, WANDB_MODE="offline", WANDB_API_KEY=KEY)
    assert line.startswith("W&B: logging") and train() == [1, 2]
    scores = {"accuracy": 0.75, "f1_macro": 0.5, "n": 4, "confusion_matrix": [[1, 1], [0, 2]]}
    assert "are logged" in notebook.log_test(scores, TRUTH, GUESSES, NAMES)
    assert sys.modules["wandb"].run is None  # it is ended
    config, history = read_log(tmp_path)
    assert config["lora_r"] == 5 and config["tail_share"] == 0.25
    assert sum("train/loss" in row for row in history) == 4  # of each step
    assert sum("eval/accuracy" in row for row in history if row["train/global_step"]) == 2
    (test,) = [row for row in history if "test/accuracy" in row]
    assert test["test/accuracy"] == 0.75 and test["test/f1_macro"] == 0.5
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/test/confusion_matrix*.json")
    cells = {(truth, guess): n for truth, guess, n in json.loads(table.read_text())["data"]}
    assert cells == {("bad", "bad"): 1, ("bad", "good"): 1, ("good", "bad"): 0, ("good", "good"): 2}
    assert_secret(tmp_path, capfd)


def test_when_the_process_of_wandb_dies_training_goes_on_without_it(notebook, start, train, capsys):
    start({}, WANDB_MODE="offline")

    class Kill(notebook.TrainerCallback):
        killed = []

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                command = ["pgrep", "-P", str(os.getpid()), "-f", "wandb-core"]
                self.killed.extend(subprocess.run(command, capture_output=True, text=True).stdout.split())
                for process in self.killed:
                    os.kill(int(process), signal.SIGKILL)

    assert train(Kill()) == [1, 2] and len(Kill.killed) == 1
    assert capsys.readouterr().out.count("W&B: the log ends here") == 1
    assert "not logged" in notebook.log_test({"accuracy": 0.75}, TRUTH, GUESSES, NAMES)


def test_each_event_of_a_broken_log_is_survived(notebook, tiny_config, task, tokenized, tmp_path, monkeypatch, capsys):
    """Whichever of them W&B fails in first."""
    arguments = notebook.training_arguments(tiny_config, tmp_path)
    for event in ("on_train_begin", "on_log", "on_save", "on_train_end"):
        calls = []

        def broken(*args, calls=calls, **kwargs):
            calls.append(args)
            raise BrokenPipeError

        monkeypatch.setattr(notebook.WandbCallback, event, broken)
        callback = notebook.SafeWandbCallback()
        for _ in range(2):
            assert getattr(callback, event)(arguments, None, None, logs={}) is None
        assert len(calls) == 1 and capsys.readouterr().out.count("BrokenPipeError") == 1


def test_without_a_run_the_test_scores_are_logged_nowhere(notebook, monkeypatch):
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    assert notebook.log_test({"accuracy": 0.75}, TRUTH, GUESSES, NAMES) == ""
    assert "wandb" not in sys.modules
