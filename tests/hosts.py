"""Colab and Kaggle, imitated: the notebook alone in a folder, nothing writable above it, read-only input, nobody who
answers. Both run it on the same real sentences and with the same settings, in Kaggle's case each cell twice in a row.
"""

import ast
import json
import os
import re
import shutil
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from notebook_api import NOTEBOOK, is_definition

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
    # Their processors have AVX512-BF16: bitsandbytes then warns on stderr while it is imported. Python runs this first.
    "sitecustomize.py": """
import importlib.util, sys
class ImportsWithAvx:
    def find_spec(self, name, path, target=None):
        if name != "bitsandbytes.backends.cpu.ops": return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module
        def exec_module(module):
            functional = sys.modules["bitsandbytes.functional"]
            answer, functional.has_avx512bf16 = functional.has_avx512bf16, lambda: True
            load(module)
            functional.has_avx512bf16 = answer  # 4-bit layers must not use what this processor lacks
        spec.loader.exec_module = exec_module
        return spec
sys.meta_path.insert(0, ImportsWithAvx())
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
NOBODY = "http://127.0.0.1:1"
KAGGLE = {"KAGGLE_KERNEL_RUN_TYPE": "Interactive", "KAGGLE_URL_BASE": "https://www.kaggle.com"}
CANARIES = {"WANDB_API_KEY": "canary0wandb" * 4, "HF_TOKEN": "hf_canary0hub" * 3}  # must be found nowhere
SETTINGS = {"preset": "full", "label_column": "Verdict", "max_length": 32, "num_train_epochs": 1}
SETTINGS |= {"efficiency_steps": 1, "ranks": 1, "rank_train_samples": 32, "rank_epochs": 1}
SETTINGS |= {"learning_rate": 1e-2, "lora_alpha": 64, "gradient_checkpointing": False}  # enough to learn something
SETTINGS |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}


class Host:
    """The notebook in `folder/host/working`, and a kernel that runs its cells when told to."""

    def __init__(self, name: str, folder: Path, **settings):
        self.name, self.folder, self.working = name, folder, folder / "host" / "working"
        for file, source in PACKAGES.items():
            (folder / "packages" / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / "packages" / file).write_text(source)
        self.working.mkdir(parents=True)
        (folder / "home").mkdir()
        shutil.copy(NOTEBOOK, self.working)
        environ = {each: v for each, v in os.environ.items() if not each.startswith(("QLORA_", "WANDB_", "HF_"))}
        environ |= {"HOME": str(folder / "home"), "PYTHONPATH": str(folder / "packages"), "PIP_NO_INDEX": "1"}
        environ |= {"ASKED": str(folder / "asked.txt"), "HF_ENDPOINT": NOBODY, "OMP_NUM_THREADS": "1"}
        settings = {f"QLORA_{name.upper()}": str(value) for name, value in (SETTINGS | settings).items()}
        if name == "kaggle":  # with keys, and Kaggle's internet off
            lines = settings | CANARIES | {"WANDB_BASE_URL": NOBODY}
            (self.working / ".env").write_text("".join(f"{name}={value}\n" for name, value in lines.items()))
        self.environ = environ | (settings if name == "colab" else KAGGLE)
        self.working.parent.chmod(0o555)
        kernel = "google.colab._kernel.Kernel" if name == "colab" else "asking.Kernel"
        argv = [sys.executable, f"{folder}/packages/obeying.py", "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        manager, self.nb = AsyncKernelManager(), nbformat.read(NOTEBOOK, as_version=4)
        argv += [f"--IPKernelApp.kernel_class={kernel}"]
        manager._kernel_spec = KernelSpec(argv=argv, display_name=name, language="python")
        where = {"metadata": {"path": str(self.working)}}
        self.client = NotebookClient(self.nb, km=manager, timeout=300, allow_errors=name == "colab", resources=where)
        self.sections, section = {}, 0  # the code cells of each
        for index, cell in enumerate(self.nb.cells):
            section = int(([section] + re.findall(r"^## (\d+) ", cell.source, flags=re.MULTILINE))[-1])
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
                self.sections.setdefault(section, []).append(index)

    def run(self, index: int, source: str = "") -> list:
        """Run a cell, or other source in its place, and return its outputs."""
        own = self.nb.cells[index]
        cell = nbformat.v4.new_code_cell(source) if source else own
        try:
            self.client.execute_cell(cell, index)
        finally:
            self.nb.cells[index] = own  # with its outputs
        return cell.outputs

    def ask(self, expression: str):
        """Return what an expression has for a value."""
        (said,) = self.run(0, f"print(json.dumps({expression}, default=float))")
        return json.loads(said.text)

    def runs(self, index: int) -> bool:
        """Tell whether a cell does anything but define."""
        return not all(map(is_definition, ast.parse(self.nb.cells[index].source).body))

    def outputs(self, *kinds: str) -> list:
        return [each for cell in self.nb.cells for each in cell.get("outputs", []) if each.output_type in kinds]

    def results(self) -> dict:
        return json.loads((self.working / "Data" / "results.json").read_text(encoding="utf-8"))

    def run_each_cell_twice(self) -> None:
        """Run all cells, and those of sections 3 to 12 that do something once more; keep what was shown first."""
        self.failed, self.early = {}, {}
        for section, index in [(section, index) for section, indices in self.sections.items() for index in indices]:
            self.early = self.early or (self.results() if section == 10 else {})
            self.run(index)
            source = self.nb.cells[index].source
            try:
                self.run(index, source) if 3 <= section <= 12 and self.runs(index) else None
            except CellExecutionError as error:
                self.failed[source] = f"{error.ename}: {error.evalue}"


@pytest.fixture(scope="module")
def reviews(sentences):
    """400 sentences of three classes: those with a quote or a question are neither praise nor pan."""
    rows = sentences.sample(400, random_state=0)
    verdict = rows["label"].replace({"positive": "praise", "negative": "pan"})
    verdict = verdict.mask(rows["text"].str.contains("[?']"), "quote")
    return rows.assign(Review=rows["text"], Verdict=verdict)[["Review", "Verdict"]]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory, tiny_bert, reviews):
    """Both hosts after a run from top to bottom, side by side; Kaggle's kernel can be asked."""
    data = tmp_path_factory.mktemp("input")
    reviews.to_csv(data / "reviews.csv", index=False)
    data.chmod(0o555)
    settings = {"model_name": tiny_bert, "dataset_name": data / "reviews.csv"}
    colab, kaggle = (Host(name, tmp_path_factory.mktemp(name), **settings) for name in ("colab", "kaggle"))
    beside = threading.Thread(target=lambda: colab.client.execute(env=colab.environ))
    beside.start()
    with kaggle.client.setup_kernel(env=kaggle.environ):
        kaggle.run_each_cell_twice()
        beside.join()
        yield SimpleNamespace(colab=colab, kaggle=kaggle)
    for folder in (data, colab.working.parent, kaggle.working.parent):
        folder.chmod(0o755)
