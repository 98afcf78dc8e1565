"""The notebook in Colab's and in Kaggle's conditions, imitated: alone in a folder, nothing writable above it, read-only input, nobody who answers."""

import asyncio
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch
from conftest import NOTEBOOK, code_cells
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

HOSTS = ("colab", "kaggle")
# Colab's kernel and shell bear its name, by which libraries know it, and its vault of secrets is asked for HF_TOKEN.
PACKAGES = {
    "google/colab/__init__.py": "",
    "google/colab/errors.py": "class Error(Exception): pass",
    "google/colab/userdata.py": "class SecretNotFoundError(Exception): pass\nclass NotebookAccessError(Exception): pass\ndef get(name): raise SecretNotFoundError(name)",
    "google/colab/_kernel.py": """
from asking import Kernel as Asking
from ipykernel.zmqshell import ZMQInteractiveShell
from traitlets import Type
class Shell(ZMQInteractiveShell): __module__ = "google.colab._shell"
class Kernel(Asking): shell_class = Type(Shell)
""",
    # Root ignores permissions unless CAP_DAC_OVERRIDE is taken out of the bounding set (PR_CAPBSET_DROP) before the next program starts.
    "obeying.py": """
import ctypes, os, sys
if os.geteuid() == 0:
    ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)
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
SETTINGS = {"PROFILE": "demo", "MAX_LENGTH": 32, "NUM_TRAIN_EPOCHS": 1, "EFFICIENCY_STEPS": 1, "RANKS": 1, "RANK_TRAIN_SAMPLES": 16, "GROWTH_BATCHES": 1, "GROWTH_LENGTHS": 16}


def start_notebook(host: str, folder: Path, input_folder: Path, model: str) -> tuple[NotebookClient, dict[str, str]]:
    """Return a client for the notebook alone in ``folder/working``, and the environment of its kernel."""
    for name, source in PACKAGES.items():
        (folder / "packages" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "packages" / name).write_text(source)
    working = folder / "host" / "working"
    working.mkdir(parents=True)
    shutil.copy(NOTEBOOK, working)
    working.parent.chmod(0o555)
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("QLORA_", "WANDB_", "HF_"))}
    environ |= {f"QLORA_{name}": str(value) for name, value in SETTINGS.items()} | {"QLORA_MODEL_NAME": model, "QLORA_DATASET_NAME": str(input_folder)}
    environ |= {"HOME": str(folder / "home"), "PYTHONPATH": str(folder / "packages"), "ASKED": str(folder / "asked.txt")}
    environ |= {"HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", "OMP_NUM_THREADS": "1"}
    if host == "kaggle":  # with a key, and Kaggle's internet off
        environ |= {"KAGGLE_KERNEL_RUN_TYPE": "Interactive", "KAGGLE_URL_BASE": "https://www.kaggle.com", "WANDB_API_KEY": "c0ffee" * 7, "WANDB_BASE_URL": "http://127.0.0.1:1"}
    kernel = "google.colab._kernel.Kernel" if host == "colab" else "asking.Kernel"
    manager = AsyncKernelManager()
    argv = [sys.executable, str(folder / "packages" / "obeying.py"), "-m", "ipykernel_launcher", "-f", "{connection_file}", f"--IPKernelApp.kernel_class={kernel}"]
    manager._kernel_spec = KernelSpec(argv=argv, display_name=host, language="python")
    nb = nbformat.read(working / NOTEBOOK.name, as_version=4)
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return NotebookClient(nb, km=manager, timeout=120, allow_errors=True, resources={"metadata": {"path": str(working)}}), environ


@pytest.fixture(scope="module")
def hosted(tmp_path_factory, tiny_bert, sentences):
    """Both runs, side by side: each with its folder and its notebook."""
    input_folder = tmp_path_factory.mktemp("input")
    sentences.sample(200, random_state=0).to_csv(input_folder / "reviews.csv", index=False)
    input_folder.chmod(0o555)
    runs = {host: SimpleNamespace(folder=tmp_path_factory.mktemp(host)) for host in HOSTS}

    async def execute() -> None:
        clients = [start_notebook(host, run.folder, input_folder, tiny_bert) for host, run in runs.items()]
        for run, (client, _) in zip(runs.values(), clients):
            run.nb = client.nb
        await asyncio.gather(*(client.async_execute(env=environ) for client, environ in clients))

    asyncio.run(execute())
    yield runs
    for folder in (input_folder, *(run.folder / "host" for run in runs.values())):
        folder.chmod(0o755)


def outputs(run, kind: str) -> list:
    return [output for cell in run.nb.cells if cell.cell_type == "code" for output in cell.outputs if output.output_type == kind]


@pytest.fixture(params=HOSTS)
def run(request, hosted):
    return hosted[request.param]


def test_every_cell_runs_and_nothing_is_installed(run):
    assert [f"{error.ename}: {error.evalue}" for error in outputs(run, "error")] == []
    cells = [cell for cell in run.nb.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    streams = outputs(run, "stream")
    assert [output.text for output in streams if output.name == "stderr"] == []
    assert any("requirements are met." in output.text for output in streams)


def test_nobody_is_asked_for_a_key(run):
    """Neither is a widget: the only one is the text box for a review."""
    assert not (run.folder / "asked.txt").exists()
    line, *_ = [line for output in outputs(run, "stream") for line in output.text.splitlines() if line.startswith("W&B: ")]
    assert line.startswith("W&B: logging locally" if run.folder.name.startswith("kaggle") else "W&B: not logging (no WANDB_API_KEY")


def test_everything_is_written_below_the_working_folder(run):
    """The folder above obeys its permissions, for root too: else this could not fail."""
    probe = [sys.executable, run.folder / "packages" / "obeying.py", "-c", f"open({str(run.folder / 'host' / 'probe')!r}, 'w')"]
    assert "Permission denied" in subprocess.run(probe, capture_output=True, text=True).stderr
    working = run.folder / "host" / "working"
    assert [path.name for path in (run.folder / "host").iterdir()] == ["working"]
    wandb = ["wandb"] if run.folder.name.startswith("kaggle") else []
    assert sorted(path.name for path in working.iterdir()) == ["Data", NOTEBOOK.name, "outputs", *wandb]
    results = json.loads((working / "Data" / "results.json").read_text(encoding="utf-8"))
    assert results["provenance"]["git_commit"] is None  # no repository around it
    assert len(list((working / "Data").glob("*.png"))) == 9


def test_progress_tables_and_the_text_box_are_shown(run):
    shown = [str(output.data) for output in outputs(run, "display_data") + outputs(run, "execute_result")]
    assert any("<progress" in data and "Validation Loss" in data for data in shown)  # Trainer's, as HTML
    assert sum("<table id=" in data for data in shown) >= 10
    assert sum("application/vnd.jupyter.widget-view+json" in data for data in shown) == 1


def make_wheel(folder: Path, name: str, version: str, requires: list[str]) -> None:
    """Write a wheel that holds nothing but its metadata."""
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n" + "".join(f"Requires-Dist: {line}\n" for line in requires)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", metadata)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", f"{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")


@pytest.fixture(scope="module")
def preinstalled(tmp_path_factory):
    """Return a function that takes requirements, runs section 1's installation in an environment of its own with the real pip, which finds
    newer versions of everything in a local folder, and returns what was said and name -> version of all that is installed."""
    folder = tmp_path_factory.mktemp("preinstalled")
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))} | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    for name, version, *requires in [("torch", "1.0"), ("torch", "2.0"), ("untouched", "1.0"), ("untouched", "2.0"), ("outdated", "1.0"), ("outdated", "2.0", "torch", "untouched"), ("missing", "1.0", "torch"), ("missing", "1.5", "torch>=2.0")]:
        make_wheel(folder, name, version, requires)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "torch==1.0", "untouched==1.0", "outdated==1.0"], env=environ, check=True)
    (site,) = (folder / "venv").glob("lib/*/site-packages")
    packaging = importlib.metadata.distribution("packaging")
    for path in packaging.files:
        if ".." not in path.parts and "__pycache__" not in path.parts:
            (site / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path.locate(), site / path)
    definitions = "\n".join(cell.source for cell in code_cells()[:3])
    listed = "import json; print(json.dumps([said, {dist.name: dist.version for dist in importlib.metadata.distributions()}]))"

    def install(*requirements: str) -> tuple[str, dict[str, str]]:
        program = f"{definitions}\nunmet = unmet_requirements({list(requirements)})\nsaid = install(unmet) if unmet else 'met'\n{listed}"
        done = subprocess.run([python, "-c", program], env=environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return tuple(json.loads(done.stdout.splitlines()[-1]))

    return install


def test_only_what_is_missing_or_too_old_is_installed(preinstalled):
    """Newer versions of all are to be had, and the newest of what is missing would bring another torch."""
    said, before = preinstalled("torch>=1.0,<3", "untouched>=1.0", "outdated>=1.0")
    assert said == "met" and before.items() >= {"torch": "1.0", "untouched": "1.0", "outdated": "1.0"}.items() and "missing" not in before
    said, after = preinstalled("torch>=2.0", "untouched>=1.0,<2", "outdated>=2.0", "missing>=1.0,<2")
    assert after == before | {"outdated": "2.0", "missing": "1.0"}
    assert said.startswith("Kept torch==1.0, older than torch>=2.0") and said.endswith("Installed outdated>=2.0, missing>=1.0,<2.")


def test_of_two_gpus_the_unused_one_is_said(notebook, monkeypatch):
    properties = SimpleNamespace(name="Tesla T4", total_memory=16e9, major=7, minor=5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert "Tesla T4, 16 GB" in notebook.describe_environment([])["device"] and "(1 of 2 GPUs is used" in notebook.describe_environment([])["device"]
    assert "GPUs is used" not in notebook.describe_environment([], processes=2)["device"]
