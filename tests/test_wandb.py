"""Section 8: W&B logs where it can, and is never in the way. The offline log is read back from its file."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import wandb

KEY = "c0ffee" * 7  # the form of a key, and no key
NOBODY = "http://127.0.0.1:1"  # listens
SCORES = {"accuracy": 0.75, "f1_macro": 0.5, "n": 4, "confusion_matrix": [[1, 1], [0, 2]]}
ANSWERS = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1]), ["bad", "good"]


@pytest.fixture(autouse=True)
def own_wandb(monkeypatch, tmp_path):
    """Give W&B an environment, a working folder and a home of its own."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("WANDB_DIR", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield
    for end in (wandb.finish, wandb.teardown):
        with suppress(Exception):  # where a test killed W&B's own process
            end()


@pytest.fixture
def start(notebook, monkeypatch, tmp_path, capfd):
    """A function that starts W&B in time and returns whether it logs, and the line; the key is written nowhere."""
    lines = []

    def run(about: dict, **environ: str) -> tuple[bool, str]:
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        begun = time.monotonic()
        lines.append(notebook.start_wandb("project", about, environ, timeout=2))
        assert time.monotonic() - begun < 15 and "\n" not in lines[-1]
        return wandb.run is not None, lines[-1]

    yield run
    captured = capfd.readouterr()
    assert KEY not in captured.out + captured.err + "".join(lines)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


@pytest.fixture
def train(notebook, tiny_config, task, tokenized, tmp_path):
    """A function that trains for two epochs of two steps, logging to W&B, and returns the epochs of its validations."""

    def run(*callbacks) -> list[float]:
        few = notebook.DatasetDict({**tokenized, "train": tokenized["train"].select(range(64))})
        config, logs = tiny_config.model_copy(update={"num_train_epochs": 2.0}), notebook.SafeWandbCallback()
        trainer = notebook.train_within_memory(config, task, few, tmp_path / "run", [logs, *callbacks])
        return [row["epoch"] for row in trainer.state.log_history if "eval_loss" in row and row["step"]]

    return run


class Unauthorized(BaseHTTPRequestHandler):
    def do_POST(self):
        self.send_error(401)

    do_GET = do_POST


@pytest.fixture
def unauthorized():
    """The address of a server that accepts no key."""
    with HTTPServer(("127.0.0.1", 0), Unauthorized) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


UNUSED = [({}, ""), ({"WANDB_API_KEY": ""}, ""), ({"WANDB_API_KEY": KEY, "WANDB_MODE": "disabled"}, "disabled")]
UNUSED += [({"WANDB_API_KEY": KEY}, "key"), ({"WANDB_API_KEY": "short"}, "key"), ({"WANDB_MODE": "offline"}, "OSError")]


@pytest.mark.parametrize(("environ", "word"), UNUSED)
def test_without_an_accepted_key_nothing_is_started(start, unauthorized, tmp_path, monkeypatch, environ, word):
    monkeypatch.setattr(wandb, "init", MagicMock(side_effect=OSError("no space left")))
    logs, line = start({}, WANDB_BASE_URL=unauthorized, **environ)
    assert not logs and word in line and not [*tmp_path.glob("wandb/*run-*")]
    assert wandb.init.called == (word == "OSError")


def test_without_the_package_one_line_says_so(notebook, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    line = notebook.start_wandb("project", {}, {"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"})
    assert "not used" in line and "ModuleNotFoundError" in line


def test_without_a_network_settings_and_scores_are_kept_without_paths(notebook, tiny_config, start, train, tmp_path):
    logs, line = start({"lora_r": 5, "tail_share": 0.25}, WANDB_API_KEY=KEY, WANDB_BASE_URL=NOBODY)
    assert logs and "wandb sync" in line and train() == [1, 2]
    assert "not" not in notebook.log_test(SCORES, *ANSWERS) and wandb.run is None  # it is ended
    wandb.teardown()  # W&B's own process may still be writing
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    log = path.read_bytes()  # of names and values in JSON
    assert re.search(rb"lora_r.{1,4}5", log, re.S) and re.search(rb"tail_share.{1,4}0\.25", log, re.S)
    assert re.search(rb"test/accuracy.{1,4}0\.75", log, re.S) and re.search(rb"test/f1_macro.{1,4}0\.5", log, re.S)
    assert len(re.findall(rb"train/loss.{1,4}[0-9]", log, re.S)) >= 4  # of each step
    assert len(re.findall(rb"eval/accuracy.{1,4}[0-9]", log, re.S)) >= 2
    assert b"train/global_step" in log and tiny_config.model_name.encode() not in log  # nor what the model knows of it
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/test/confusion_matrix*.json")
    cells = {(truth, guess): n for truth, guess, n in json.loads(table.read_text())["data"]}
    assert cells == {("bad", "bad"): 1, ("bad", "good"): 1, ("good", "bad"): 0, ("good", "good"): 2}


def test_when_the_process_of_wandb_dies_training_goes_on_without_it(notebook, start, train, capfd):
    assert start({}, WANDB_MODE="offline")[0]

    class Kill(notebook.TrainerCallback):
        killed = []

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                command = ["pgrep", "-P", str(os.getpid()), "-f", "wandb-core"]
                self.killed.extend(subprocess.run(command, capture_output=True, text=True).stdout.split())
                for process in self.killed:
                    os.kill(int(process), signal.SIGKILL)

    assert train(Kill()) == [1, 2] and len(Kill.killed) == 1
    assert capfd.readouterr().out.count("W&B: ") == 1  # it is said once
    assert "not logged" in notebook.log_test(SCORES, *ANSWERS)


def test_a_broken_log_is_survived_and_from_then_on_left_alone(notebook, monkeypatch, capsys):
    broken, callback = MagicMock(side_effect=BrokenPipeError), notebook.SafeWandbCallback()
    monkeypatch.setattr(wandb, "log", broken)
    for step in (1, 2):
        assert callback.on_log(None, SimpleNamespace(global_step=step), None, logs={"loss": 0.5}) is None
    assert broken.call_count == 1 and capsys.readouterr().out.count("BrokenPipeError") == 1
