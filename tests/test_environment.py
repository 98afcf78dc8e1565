"""Section 1: what is installed, and what is left alone."""

import importlib.metadata
import socket
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest


def test_only_the_missing_and_the_too_old_are_unmet(notebook):
    lines = ["numpy>=1", "numpy>=1000", "no-such-package-here>=1", "numpy<1"]
    assert notebook.unmet_requirements(lines) == ["numpy>=1000", "no-such-package-here>=1"]


@pytest.fixture
def pip_calls(monkeypatch):
    calls = []

    def run(command, **_):
        calls.append(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_an_installed_torch_is_pinned_while_others_are_installed(notebook, pip_calls):
    said = notebook.install(["no-such-package-here>=1"])
    assert pip_calls[0][-2:] == ["no-such-package-here>=1", f"torch=={importlib.metadata.version('torch')}"]
    assert "Installed no-such-package-here>=1" in said


def test_a_too_old_torch_is_kept_and_named(notebook, pip_calls):
    said = notebook.install(["torch>=1000"])
    assert not pip_calls and "Kept torch" in said


def test_a_replaced_package_that_was_imported_stops_the_run(notebook, pip_calls):
    with pytest.raises(RuntimeError, match="numpy had been imported.*Restart the kernel"):
        notebook.install(["numpy>=1000"])


def test_an_old_torchao_is_updated_only_where_it_is_installed(notebook, monkeypatch):
    assert notebook.unmet_requirements(["torchao>=0.16"], only_installed=True) == []
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.10.0")
    assert notebook.unmet_requirements(["torchao>=0.16"], only_installed=True) == ["torchao>=0.16"]


def test_a_failed_installation_says_what_to_do(notebook):
    with pytest.raises(RuntimeError, match="Install them by hand") as error:
        notebook.install(["no-such-package-here==0.0.0.0"])
    assert "no-such-package-here" in str(error.value)


def test_any_http_answer_counts_and_silence_does_not(notebook):
    class NotFound(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(404)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), NotFound) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert notebook.hub_answers(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    with socket.create_server(("127.0.0.1", 0)) as stalled:  # accepts, never answers
        start = time.monotonic()
        assert not notebook.hub_answers(f"http://127.0.0.1:{stalled.getsockname()[1]}", timeout=0.5)
        assert time.monotonic() - start < 3
    for endpoint in ("http://no-such-host.invalid", "http://127.0.0.1:1", "no-scheme"):
        assert not notebook.hub_answers(endpoint)


def test_the_environment_table_names_the_device(notebook):
    table = notebook.describe_environment(["torch", "peft"])
    assert table["torch"] == importlib.metadata.version("torch") and table["device"]
