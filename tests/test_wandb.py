"""Section 8: W&B logs where it can, and is never in the way."""

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

import numpy as np
import pytest
import wandb
from transformers import TrainerCallback

KEY = "c0ffee" * 7  # the form of a key, and no key
NOBODY = "http://127.0.0.1:1"  # listens
SCORES = {"accuracy": 0.75, "f1_weighted": 0.625, "f1_macro": 0.5}
LABELS = np.array([0, 0, 1, 1])
ANSWERS = np.array([0, 1, 1, 1])


@pytest.fixture(autouse=True)
def own_wandb(monkeypatch, tmp_path):
    """Give W&B an environment, a working folder and a home of its own."""
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield
    with suppress(Exception):  # where a test killed W&B's own process
        wandb.finish()
    with suppress(Exception):
        wandb.teardown()


@pytest.fixture
def start(notebook, monkeypatch):
    """A function that starts W&B with such an environment; whether it logs."""

    def run(**environ):
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        return notebook.start_wandb("a project", {"lora_r": 5}, os.environ)

    return run


@pytest.fixture
def train(notebook, tiny_config, names, head, tokenizer, tokenized, tmp_path):
    """A function that trains for two epochs of two steps, and logs to W&B."""

    def run(*callbacks):
        few = notebook.DatasetDict(tokenized)
        few["train"] = tokenized["train"].select(range(64))
        config = tiny_config.model_copy(update={"num_train_epochs": 2.0})
        return notebook.train_qlora(
            config,
            names,
            head,
            tokenizer,
            few,
            tmp_path / "training",
            [notebook.WandbCallback(), *callbacks],
        )

    return run


class RefuseKeys(BaseHTTPRequestHandler):
    """Answer as a server does that accepts no key."""

    def do_POST(self):
        self.send_error(401)

    do_GET = do_POST

    def log_message(self, *_):
        pass


@pytest.fixture
def refusing_server():
    """The address of a server that accepts no key."""
    with HTTPServer(("127.0.0.1", 0), RefuseKeys) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def one_line(capfd):
    """Return the line that was printed; assert that it is one, without the key."""
    captured = capfd.readouterr()
    assert captured.out.count("\n") == 1
    assert captured.err == ""
    assert KEY not in captured.out
    return captured.out


def test_without_a_key_it_is_not_used(start, capfd, tmp_path):
    assert not start(WANDB_API_KEY="")
    assert "WANDB_API_KEY" in one_line(capfd)
    assert not (tmp_path / "wandb").exists()


def test_where_it_is_disabled_it_is_not_used(start, capfd, tmp_path):
    assert not start(WANDB_API_KEY=KEY, WANDB_MODE="disabled")
    assert "WANDB_MODE" in one_line(capfd)
    assert not (tmp_path / "wandb").exists()


@pytest.mark.parametrize("key", [KEY, "short"])
def test_with_a_wrong_key_a_line_says_so_in_time(start, capfd, refusing_server, key):
    begun = time.monotonic()
    assert not start(WANDB_API_KEY=key, WANDB_BASE_URL=refusing_server)
    assert time.monotonic() - begun < 30
    assert "key" in one_line(capfd)


def test_without_a_network_a_line_says_so_in_time(start, capfd):
    begun = time.monotonic()
    assert not start(WANDB_API_KEY=KEY, WANDB_BASE_URL=NOBODY)
    assert time.monotonic() - begun < 30
    assert "network" in one_line(capfd)


def test_without_the_package_a_line_says_so(start, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert not start(WANDB_API_KEY=KEY)
    assert "not used (ModuleNotFoundError)" in one_line(capfd)


def test_a_key_is_written_nowhere(start, refusing_server, tmp_path):
    start(WANDB_API_KEY=KEY, WANDB_BASE_URL=refusing_server)
    wandb.teardown()
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), path


@pytest.fixture
def offline_run(notebook, start, train, names, tmp_path):
    """The folder of a run without a network that logged all there is to log."""
    assert start(WANDB_MODE="offline")
    train()
    notebook.log_test(SCORES, LABELS, ANSWERS, names)
    wandb.teardown()  # W&B's own process may still be writing
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    return folder


def logged_text(folder, name):
    """Return the different numbers that were logged under a name, as bytes."""
    (path,) = folder.glob("run-*.wandb")  # its entries are names and values in JSON
    pattern = re.escape(name.encode()) + rb"\W{1,4}?([0-9.]+)"
    return set(re.findall(pattern, path.read_bytes()))


def logged(folder, name):
    """Return the same as numbers."""
    return {round(float(number), 6) for number in logged_text(folder, name)}


def test_settings_losses_and_scores_are_logged_offline(offline_run):
    assert logged(offline_run, "lora_r") == {5}
    assert len(logged(offline_run, "train/loss")) == 4  # of each step
    assert len(logged(offline_run, "eval/loss")) == 3  # before, and each epoch
    for name, value in SCORES.items():
        expected = str(value).encode()
        found = logged_text(offline_run, f"test/{name}")
        # the byte behind a value may be a digit by chance
        assert {text[: len(expected)] for text in found} == {expected}
        assert max(len(text) for text in found) <= len(expected) + 1


def test_the_confusion_matrix_is_logged_offline(offline_run):
    tables = "files/media/table/test/confusion_matrix*.json"
    (path,) = offline_run.glob(tables)
    counts = {}
    for actual, predicted, count in json.loads(path.read_text())["data"]:
        counts[actual, predicted] = count
    assert counts == {
        ("negative", "negative"): 1,
        ("negative", "positive"): 1,
        ("positive", "negative"): 0,
        ("positive", "positive"): 2,
    }


def test_no_local_path_of_model_or_data_is_logged(offline_run, tiny_config):
    for path in offline_run.rglob("*.wandb"):
        assert tiny_config.model_name.encode() not in path.read_bytes()


class KillWandb(TrainerCallback):
    """Kill W&B's own process after the first step."""

    killed = 0

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            command = ["pgrep", "-P", str(os.getpid()), "-f", "wandb-core"]
            found = subprocess.run(command, capture_output=True, text=True)
            for process in found.stdout.split():
                os.kill(int(process), signal.SIGKILL)
                self.killed += 1


def test_when_its_process_dies_training_goes_on_and_it_is_said_once(
    notebook, start, train, names, capfd
):
    assert start(WANDB_MODE="offline")
    kill = KillWandb()
    trainer = train(kill)
    assert kill.killed == 1
    assert trainer.state.global_step == 4
    assert capfd.readouterr().out.count("W&B: logging stopped") == 1
    notebook.log_test(SCORES, LABELS, ANSWERS, names)
    assert "were not logged" in capfd.readouterr().out
