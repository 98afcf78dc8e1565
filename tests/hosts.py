"""Colab and Kaggle, imitated: the notebook alone in a folder, and no network.

The input is read-only, nothing above the folder can be written, and nobody answers a
question. Both run the notebook on the same sentences: Colab each cell once, without
what sections 10 and 11 train; Kaggle each run cell twice in a row.
"""

import ast
import json
import os
import re
import shutil
import sys
import threading
from types import SimpleNamespace

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from notebook_api import NOTEBOOK, is_definition

NOBODY = "http://127.0.0.1:1"  # listens
KEYS = {  # must be found nowhere
    "WANDB_API_KEY": "canary0wandb" * 4,
    "HF_TOKEN": "hf_canary0hub" * 3,
}
SETTINGS = {
    "QLORA_PRESET": "full",
    "QLORA_LABEL_COLUMN": "Verdict",
    "QLORA_MAX_LENGTH": "32",
    "QLORA_NUM_TRAIN_EPOCHS": "1",
    "QLORA_LEARNING_RATE": "1e-2",  # enough to learn something
    "QLORA_LORA_ALPHA": "64",
    "QLORA_PER_DEVICE_TRAIN_BATCH_SIZE": "4",
    "QLORA_GRADIENT_ACCUMULATION_STEPS": "1",
    "QLORA_GRADIENT_CHECKPOINTING": "false",
}
WITHOUT_STUDIES = {"QLORA_EFFICIENCY_STEPS": "0", "QLORA_RANKS": "none"}
TEXTS = "id,review\n07,A quiet film.\n08,\n09,Too long by half.\n"  # to be classified
SHORT_STUDIES = {
    "QLORA_EFFICIENCY_STEPS": "1",
    "QLORA_RANKS": "1",
    "QLORA_RANK_TRAIN_SAMPLES": "32",
}
KAGGLE = {
    "KAGGLE_KERNEL_RUN_TYPE": "Interactive",
    "KAGGLE_URL_BASE": "https://www.kaggle.com",
}

CLASSES = ["pan", "praise", "quote"]
PLOTS = [
    "calibration.png",
    "confusion_matrix.png",
    "dataset_stats.png",
    "efficiency_comparison.png",
    "lora_rank_sensitivity.png",
    "training_curves.png",
]
BEFORE_SECTION_10 = [
    "provenance",
    "test",
    "test_merged",
    "baselines",
    "cautions",
    "training",
    "calibration",
    "reliable",
]
PARTS = [*BEFORE_SECTION_10, "efficiency", "rank_sensitivity", "sections"]

# A kernel in which nobody answers: what is asked is noted, and raises an error.
ASKING = """
import os
from ipykernel.ipkernel import IPythonKernel


class Kernel(IPythonKernel):
    def raw_input(self, prompt=""):
        with open(os.environ["ASKED"], "a") as file:
            print(prompt, file=file)
        raise EOFError("nobody answers")

    getpass = raw_input
"""
# Libraries know Colab by the names of its kernel and shell.
COLAB_KERNEL = """
from asking import Kernel as AskingKernel
from ipykernel.zmqshell import ZMQInteractiveShell
from traitlets import Type


class Shell(ZMQInteractiveShell):
    __module__ = "google.colab._shell"


class Kernel(AskingKernel):
    shell_class = Type(Shell)
"""
# huggingface_hub asks Colab's vault of secrets for a token.
COLAB_SECRETS = """
class SecretNotFoundError(Exception):
    pass


def get(name):
    raise SecretNotFoundError
"""
# Python runs this first. Hosts have processors with AVX512-BF16; on those bitsandbytes
# warns on stderr while it is imported.
SITE = '''
import sys
from importlib.machinery import PathFinder, SourceFileLoader


class Loader(SourceFileLoader):
    """Import a module as on a processor with AVX512-BF16."""

    def exec_module(self, module):
        from bitsandbytes import functional

        before = functional.has_avx512bf16
        functional.has_avx512bf16 = lambda: True
        super().exec_module(module)
        functional.has_avx512bf16 = before  # layers must not use what is not there


class Finder:
    def find_spec(self, name, path, target=None):
        if name != "bitsandbytes.backends.cpu.ops":
            return None
        spec = PathFinder.find_spec(name, path)
        spec.loader = Loader(name, spec.origin)
        return spec


sys.meta_path.insert(0, Finder())
'''
# Root ignores permissions, unless CAP_DAC_OVERRIDE (1) leaves the bounding set (24)
# before a program starts.
OBEYING = """
import ctypes
import os
import sys

if os.geteuid() == 0:
    ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
PACKAGES = {
    "asking.py": ASKING,
    "google/colab/__init__.py": "",
    "google/colab/_kernel.py": COLAB_KERNEL,
    "google/colab/errors.py": "class Error(Exception): pass",
    "google/colab/userdata.py": COLAB_SECRETS,
    "obeying.py": OBEYING,
    "sitecustomize.py": SITE,
}


class Host:
    """The notebook in `folder/host/working`, and a kernel that runs its cells."""

    def __init__(self, name, kernel_class, folder, environ, env_file):
        self.name = name
        self.folder = folder
        self.working = folder / "host" / "working"
        self.working.mkdir(parents=True)
        shutil.copy(NOTEBOOK, self.working)
        if env_file:
            lines = [f"{key}={value}" for key, value in env_file.items()]
            (self.working / ".env").write_text("\n".join(lines))
        self.working.parent.chmod(0o555)
        self.environ = self.clean_environment()
        self.environ.update(environ)
        self.nb = nbformat.read(NOTEBOOK, as_version=4)
        self.client = self.make_client(kernel_class)
        self.sections = self.find_sections()

    def clean_environment(self):
        """Return an environment with a home, and packages that imitate the host."""
        packages = self.folder / "packages"
        for file, source in PACKAGES.items():
            (packages / file).parent.mkdir(parents=True, exist_ok=True)
            (packages / file).write_text(source)
        home = self.folder / "home"
        home.mkdir()
        environ = {}
        for name, value in os.environ.items():
            if not name.startswith(("QLORA_", "WANDB_", "HF_")):
                environ[name] = value
        environ["HOME"] = str(home)
        environ["PYTHONPATH"] = str(packages)
        environ["PIP_NO_INDEX"] = "1"
        environ["HF_ENDPOINT"] = NOBODY
        environ["OMP_NUM_THREADS"] = "1"
        environ["ASKED"] = str(self.folder / "asked.txt")
        return environ

    def make_client(self, kernel_class):
        """Return a client whose kernel obeys permissions."""
        argv = [
            sys.executable,
            str(self.folder / "packages" / "obeying.py"),
            "-m",
            "ipykernel_launcher",
            "-f",
            "{connection_file}",
            f"--IPKernelApp.kernel_class={kernel_class}",
        ]
        manager = AsyncKernelManager()
        manager._kernel_spec = KernelSpec(argv=argv, display_name=self.name)
        where = {"metadata": {"path": str(self.working)}}
        return NotebookClient(
            self.nb,
            km=manager,
            timeout=300,
            resources=where,
            coalesce_streams=True,  # what is printed may come in several messages
        )

    def find_sections(self):
        """Empty all code cells; return the places of those of each section."""
        sections = {}
        section = 0
        for place, cell in enumerate(self.nb.cells):
            heading = re.search(r"^## (\d+) ", cell.source, flags=re.MULTILINE)
            if cell.cell_type == "markdown" and heading:
                section = int(heading[1])
            if cell.cell_type == "code":
                cell.outputs = []
                cell.execution_count = None
                sections.setdefault(section, []).append(place)
        return sections

    def run(self, place, source=""):
        """Run a cell, or other source in its place; return its outputs."""
        own = self.nb.cells[place]
        cell = own
        if source:
            cell = nbformat.v4.new_code_cell(source)
        try:
            self.client.execute_cell(cell, place)
        finally:
            self.nb.cells[place] = own  # with its outputs
        return cell.outputs

    def ask(self, expression):
        """Return the value of an expression."""
        (said,) = self.run(0, f"print(json.dumps({expression}))")
        return json.loads(said.text)

    def does_something(self, place):
        """Tell whether a cell does anything but define."""
        tree = ast.parse(self.nb.cells[place].source)
        return not all(is_definition(node) for node in tree.body)

    def run_all(self):
        """Run each cell once, even where one before it failed."""
        self.client.allow_errors = True
        self.client.execute(env=self.environ)

    def run_each_cell_twice(self):
        """Run all cells, and those of sections 3 to 12 that do something once more.

        What was shown first is kept. `failed` has what was raised the second time,
        `early` the results when section 10 begins.
        """
        self.failed = {}
        for section, places in self.sections.items():
            if section == 10:
                self.early = self.results()
            for place in places:
                self.run(place)
                if 3 <= section <= 12 and self.does_something(place):
                    self.run_again(place)

    def run_again(self, place):
        source = self.nb.cells[place].source
        try:
            self.run(place, source)
        except CellExecutionError as error:
            self.failed[source] = f"{error.ename}: {error.evalue}"

    def outputs(self, *kinds):
        """Return all outputs of these kinds."""
        found = []
        for cell in self.nb.cells:
            for output in cell.get("outputs", []):
                if output.output_type in kinds:
                    found.append(output)
        return found

    def printed(self):
        """Return all that was printed."""
        return "".join(output.text for output in self.outputs("stream"))

    def results(self):
        """Return what results.json holds."""
        path = self.working / "Data" / "results.json"
        return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def reviews(sentences):
    """400 sentences of three classes; one is of those with a quote or a question.

    Some have markup and double blanks.
    """
    rows = sentences.sample(400, random_state=0)
    verdict = rows["label"].replace({"positive": "praise", "negative": "pan"})
    verdict = verdict.mask(rows["text"].str.contains("[?']"), "quote")
    marked_up = rows["text"].str.replace(" ", "<br />  ", n=1)
    rows["Review"] = rows["text"].where(rows.index % 3 > 0, marked_up)
    rows["Verdict"] = verdict
    return rows[["Review", "Verdict"]]


@pytest.fixture(scope="session")
def hosts(tmp_path_factory, tiny_bert, reviews):
    """Both hosts after a run from top to bottom; Kaggle's kernel can be asked."""
    data = tmp_path_factory.mktemp("input")
    reviews.to_csv(data / "reviews.csv", index=False)
    (data / "texts.csv").write_text(TEXTS)
    data.chmod(0o555)
    settings = dict(SETTINGS)
    settings["QLORA_MODEL_NAME"] = tiny_bert
    settings["QLORA_DATASET_NAME"] = str(data / "reviews.csv")
    of_colab = dict(settings)
    of_colab.update(WITHOUT_STUDIES)
    of_colab["QLORA_PREDICT_NAME"] = str(data / "texts.csv")
    of_kaggle = dict(settings)
    of_kaggle.update(SHORT_STUDIES)
    of_kaggle.update(KEYS)
    of_kaggle["WANDB_BASE_URL"] = NOBODY
    colab = Host(
        "colab",
        "google.colab._kernel.Kernel",
        tmp_path_factory.mktemp("colab"),
        environ=of_colab,
        env_file={},
    )
    kaggle = Host(
        "kaggle",
        "asking.Kernel",
        tmp_path_factory.mktemp("kaggle"),
        environ=KAGGLE,
        env_file=of_kaggle,
    )
    beside = threading.Thread(target=colab.run_all)
    beside.start()
    with kaggle.client.setup_kernel(env=kaggle.environ):
        kaggle.run_each_cell_twice()
        beside.join()
        yield SimpleNamespace(colab=colab, kaggle=kaggle)
    for folder in (data, colab.working.parent, kaggle.working.parent):
        folder.chmod(0o755)


@pytest.fixture(scope="session")
def run(hosts, tmp_path_factory):
    """What Kaggle's run wrote, before tests go on with its kernel."""
    kernel = hosts.kaggle
    folder = tmp_path_factory.mktemp("kept") / "run"
    shutil.copytree(kernel.working, folder)
    return SimpleNamespace(
        kernel=kernel,
        folder=folder,
        results=kernel.results(),
        texts=kernel.ask("test_texts"),
        hooks=kernel.ask("str(hub.get_session().event_hooks)"),
    )
