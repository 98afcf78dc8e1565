"""The notebook in Colab's and in Kaggle's conditions, imitated: alone in a folder, nothing writable above it, read-only
input, nobody who answers.
"""

import asyncio
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import nbformat
import pytest
from conftest import NOTEBOOK, code_cells
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

HOSTS = ("colab", "kaggle")
# Colab's kernel and shell bear its name, by which libraries know it, and its vault of secrets is asked for HF_TOKEN.
PACKAGES = {
    "google/colab/__init__.py": "",
    "google/colab/errors.py": "class Error(Exception): pass",
    "google/colab/userdata.py": "class SecretNotFoundError(Exception): pass\ndef get(name): raise SecretNotFoundError",
    "google/colab/_kernel.py": """
from asking import Kernel as Asking
from ipykernel.zmqshell import ZMQInteractiveShell
from traitlets import Type
class Shell(ZMQInteractiveShell): __module__ = "google.colab._shell"
class Kernel(Asking): shell_class = Type(Shell)
""",
    # Root ignores permissions unless CAP_DAC_OVERRIDE leaves the bounding set before a program starts.
    "obeying.py": """
import ctypes, os, sys
os.geteuid() or ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
""",
    "asking.py": """
import os
from ipykernel.ipkernel import IPythonKernel
class Kernel(IPythonKernel):
    def raw_input(self, prompt=""):
        with open(os.environ["ASKED"], "a") as file: print(prompt, file=file)
        raise EOFError("nobody answers")
    getpass = raw_input
""",
}
SETTINGS = {"PRESET": "", "MAX_LENGTH": 32, "NUM_TRAIN_EPOCHS": 1, "EFFICIENCY_STEPS": 1, "RANKS": 1}
SETTINGS |= {"RANK_TRAIN_SAMPLES": 16, "RANK_EPOCHS": 1}


def start_notebook(host: str, folder, input_folder, model: str) -> tuple[NotebookClient, dict[str, str]]:
    """Return a client for the notebook alone in `folder/host/working`, and the environment of its kernel."""
    for name, source in PACKAGES.items():
        (folder / "packages" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "packages" / name).write_text(source)
    working = folder / "host" / "working"
    working.mkdir(parents=True)
    (folder / "home").mkdir()
    shutil.copy(NOTEBOOK, working)
    working.parent.chmod(0o555)
    environ = {name: v for name, v in os.environ.items() if not name.startswith(("QLORA_", "WANDB_", "HF_"))}
    settings = SETTINGS | {"MODEL_NAME": model, "DATASET_NAME": input_folder}
    environ |= {f"QLORA_{name}": str(value) for name, value in settings.items()} | {"ASKED": str(folder / "asked.txt")}
    environ |= {"HOME": str(folder / "home"), "PYTHONPATH": str(folder / "packages"), "PIP_NO_INDEX": "1"}
    environ |= {"HF_ENDPOINT": "http://127.0.0.1:1", "OMP_NUM_THREADS": "1"}
    if host == "kaggle":  # with a key, and Kaggle's internet off
        environ |= {"KAGGLE_KERNEL_RUN_TYPE": "Interactive", "KAGGLE_URL_BASE": "https://www.kaggle.com"}
        environ |= {"WANDB_API_KEY": "c0ffee" * 7, "WANDB_BASE_URL": "http://127.0.0.1:1"}
    kernel = "google.colab._kernel.Kernel" if host == "colab" else "asking.Kernel"
    program = [sys.executable, f"{folder}/packages/obeying.py", "-m", "ipykernel_launcher"]
    argv = [*program, "-f", "{connection_file}", f"--IPKernelApp.kernel_class={kernel}"]
    manager, nb = AsyncKernelManager(), nbformat.read(working / NOTEBOOK.name, as_version=4)
    manager._kernel_spec = KernelSpec(argv=argv, display_name=host, language="python")
    for cell in nb.cells:
        cell.update({"outputs": [], "execution_count": None} if cell.cell_type == "code" else {})
    where = {"metadata": {"path": str(working)}}
    return NotebookClient(nb, km=manager, timeout=120, allow_errors=True, resources=where), environ


@pytest.fixture(scope="module")
def hosted(tmp_path_factory, tiny_bert, sentences):
    """Both runs, side by side: each with its folder and its notebook."""
    input_folder = tmp_path_factory.mktemp("input")
    sentences.sample(200, random_state=0).to_csv(input_folder / "reviews.csv", index=False)
    input_folder.chmod(0o555)
    runs = {host: SimpleNamespace(host=host, folder=tmp_path_factory.mktemp(host)) for host in HOSTS}

    async def execute() -> None:
        clients = [start_notebook(host, run.folder, input_folder, tiny_bert) for host, run in runs.items()]
        for run, (client, _) in zip(runs.values(), clients):
            run.nb = client.nb
        await asyncio.gather(*(client.async_execute(env=environ) for client, environ in clients))

    asyncio.run(execute())
    yield runs
    for folder in (input_folder, *(run.folder / "host" for run in runs.values())):
        folder.chmod(0o755)


@pytest.fixture(params=HOSTS)
def run(request, hosted):
    return hosted[request.param]


def outputs(run, kind: str) -> list:
    return [each for cell in run.nb.cells for each in cell.get("outputs", []) if each.output_type == kind]


def test_every_cell_runs_and_nothing_is_installed(run):
    assert [f"{error.ename}: {error.evalue}" for error in outputs(run, "error")] == []
    cells = [cell for cell in run.nb.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert [output.text for output in outputs(run, "stream") if output.name == "stderr"] == []
    assert cells[0].outputs == []  # pip would say that there is no index


def test_nobody_is_asked_for_a_key(run):
    assert not (run.folder / "asked.txt").exists()
    lines = [line for output in outputs(run, "stream") for line in output.text.splitlines()]
    said = next(line for line in lines if line.startswith("W&B: "))
    assert ("wandb sync" if run.host == "kaggle" else "WANDB_API_KEY") in said


def test_everything_is_written_below_the_working_folder(run):
    """The folder above obeys its permissions, for root too: else this could not fail."""
    opens = f"open({str(run.folder / 'host' / 'x')!r}, 'w')"
    probe = [sys.executable, run.folder / "packages" / "obeying.py", "-c", opens]
    assert "Permission denied" in subprocess.run(probe, capture_output=True, text=True).stderr
    working = run.folder / "host" / "working"
    assert [path.name for path in (run.folder / "host").iterdir()] == ["working"]
    wandb = ["wandb"] if run.host == "kaggle" else []
    assert sorted(path.name for path in working.iterdir()) == ["Data", NOTEBOOK.name, "outputs", *wandb]
    results = json.loads((working / "Data" / "results.json").read_text(encoding="utf-8"))
    assert results["provenance"]["git_commit"] is None  # no repository around it
    assert len(list((working / "Data").glob("*.png"))) == 6


def test_progress_tables_and_the_text_box_are_shown(run):
    shown = [str(output.data) for output in outputs(run, "display_data") + outputs(run, "execute_result")]
    assert any("<progress" in data and "Validation Loss" in data for data in shown)  # Trainer's, as HTML
    assert sum("<table" in data for data in shown) >= 10
    assert sum("application/vnd.jupyter.widget-view+json" in data for data in shown) == 1


# The cell that installs


@pytest.fixture
def install(monkeypatch):
    """A function that runs the first cell with other requirements where torch and two more packages are installed, in
    version 1.0, and returns what pip was told. pip installs version 2.0 of anything.
    """

    def install(requirements: str, *loaded: str) -> str:
        told, installed = [], {"torch": "1.0", "untouched": "1.0", "outdated": "1.0"}

        def version(name: str) -> str:
            if name not in installed:
                raise importlib.metadata.PackageNotFoundError(name)
            return installed[name]

        def run_line_magic(name: str, line: str) -> None:
            told.append(line)
            installed.update(dict.fromkeys(re.findall(r"'(\w+)>", line), "2.0"))

        monkeypatch.setattr(importlib.metadata, "version", version)
        monkeypatch.delitem(sys.modules, "torch", raising=False)
        for name in loaded:
            monkeypatch.setitem(sys.modules, name, SimpleNamespace(__spec__=name))
        cell = re.sub(r'(REQUIREMENTS = """).*?(""")', rf"\1{requirements}\2", code_cells()[0].source, flags=re.DOTALL)
        exec(cell, {"get_ipython": lambda: SimpleNamespace(run_line_magic=run_line_magic)})
        return " ".join(told)

    return install


def test_only_what_is_missing_or_too_old_is_installed_and_torch_is_kept(install):
    assert install("torch>=1.0,<3 untouched>=1.0 outdated>=1.0") == ""
    said = install("torch>=2.0 untouched>=1.0,<2 outdated>=2.0 missing>=1.0,<3")
    assert re.findall(r"'(.+?)'", said) == ["outdated>=2.0", "missing>=1.0,<3", "torch==1.0"]


def test_a_torch_that_is_loaded_and_kept_needs_no_restart(install):
    assert "missing>=1.0" in install("missing>=1.0", "torch")


@pytest.mark.parametrize(
    ("wanted", "loaded", "rank"),
    [("outdated>=3.0", (), ""), ("outdated>=2.0", ("outdated",), ""), ("missing>=1", (), "0")],
)
def test_what_pip_cannot_do_and_what_needs_a_restart_is_named(install, monkeypatch, wanted, loaded, rank):
    """A version that pip does not have, an update of what is loaded, and several processes that would all install."""
    monkeypatch.setenv("LOCAL_RANK", rank) if rank else None
    with pytest.raises(RuntimeError, match=wanted.split(">")[0]):
        install(wanted, *loaded)
