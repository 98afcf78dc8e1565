"""What the studies share: the notebook's definitions, models, texts, and their files.

A study adds each run to its JSON file at once. Started again, it skips the runs that
the file has. Several processes can add to one file.
"""

import argparse
import base64
import fcntl
import functools
import json
import os
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "Data" / "reference"
PACKAGES = ["torch", "transformers", "peft", "bitsandbytes", "accelerate"]
SCRATCH = tempfile.TemporaryDirectory(prefix="study-")  # gone when the process ends
sys.path.insert(0, str(ROOT / "scripts"))

import run_notebook  # noqa: E402


@functools.cache
def notebook():
    """Return the notebook's definitions as a module that prints less."""
    from notebook_api import import_definitions

    module = import_definitions()
    module.transformers.utils.logging.set_verbosity_error()
    module.transformers.utils.logging.disable_progress_bar()
    module.datasets.disable_progress_bars()
    module.warnings.filterwarnings("ignore", message=".*gradient_checkpointing")
    return module


# ---- Files


def parser(study, doc):
    """Return a parser of the arguments that all studies take."""
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{study}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = ROOT / "outputs" / "benchmarks"
    made.add_argument("--out", type=Path, default=default, help="folder of the file")
    made.add_argument("--tiny", action="store_true", help="a tiny model: does it run?")
    return made


def device_name():
    """Return the name of the GPU, or of what there is instead."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {os.cpu_count()} cores"


class Study:
    """The JSON file of a study: `about` it, and its `runs`, each with its commit.

    Raises SystemExit: the file is of another device, other versions or settings.
    """

    def __init__(self, name, folder, settings):
        self.path = folder / f"{name}.json"
        self.about = {
            "study": name,
            "device": device_name(),
            "versions": {package: version(package) for package in PACKAGES},
            "settings": settings,
        }
        folder.mkdir(parents=True, exist_ok=True)
        with self.locked():
            if not self.path.exists():
                self.write([])
        found = self.read()["about"]
        if any(found[name] != value for name, value in self.about.items()):
            raise SystemExit(
                f"{self.path} is of another device, other versions or settings."
                " Name another folder with --out, or remove the file."
            )
        self.about = found  # with a note, if there is one

    def read(self):
        """Return what the file holds."""
        return json.loads(self.path.read_text(encoding="utf-8"))

    def write(self, runs):
        """Write the file, whole or not at all."""
        notebook().write_json(self.path, {"about": self.about, "runs": runs})

    @contextmanager
    def locked(self):
        """Keep other processes from writing."""
        with open(self.path.with_suffix(".lock"), "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def find(self, key):
        """Return the run that has all of `key`, or None."""
        for run in self.read()["runs"]:
            if all(run.get(name) == value for name, value in key.items()):
                return run
        return None

    def add(self, key, measure, *arguments):
        """Return the run of `key`; where there is none, measure and write it."""
        run = self.find(key)
        if run:
            return run
        started = time.perf_counter()
        run = dict(key)
        run.update(measure(*arguments))
        run["commit"] = run_notebook.git_commit()
        run["seconds_in_all"] = time.perf_counter() - started
        with self.locked():
            if self.find(key) is None:  # no other process was faster
                self.write([*self.read()["runs"], run])
        print(f"{key}: {run['seconds_in_all']:.0f} s", flush=True)
        return run


def pack(is_right):
    """Return bools as text for JSON, eight in a byte: which answers are right."""
    bits = np.packbits(is_right).tobytes()
    return {"n": len(is_right), "base64": base64.b64encode(bits).decode()}


def unpack(packed):
    """Return the bools of `pack`, of shape `(n,)`."""
    bits = np.frombuffer(base64.b64decode(packed["base64"]), np.uint8)
    return np.unpackbits(bits, count=packed["n"]).astype(bool)


# ---- Models


TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
}


def random_model(shape, family="bert"):
    """Write a model with random weights in fp16, made on the GPU; return its folder.

    `shape` is what the family's configuration has otherwise than by default. The
    tokenizer has as many made-up words as the model has embeddings.
    """
    transformers = notebook().transformers
    folder = Path(tempfile.mkdtemp(dir=SCRATCH.name))
    config = transformers.AutoConfig.for_model(family, **shape)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = transformers.AutoModel.from_config(config, dtype=torch.float16)
    model.save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += [f"word{number}" for number in range(5, config.vocab_size)]
    vocabulary = {word: number for number, word in enumerate(words)}
    transformers.BertTokenizer(vocabulary).save_pretrained(folder)
    return str(folder)


def model_folder(name, tiny):
    """Return the folder of a model.

    `random`: bert-base's shape with random weights; `base`: the real encoder that
    scripts/offline_assets.py fetches; or a Hub id or a path, as it is.
    """
    import offline_assets

    if tiny:
        return random_model(TINY)
    if name == "random":
        return random_model({})
    if name == "base":
        return str(offline_assets.ensure_base())
    return name


@dataclass
class Task:
    """What the notebook's functions take: configuration, classes, head, tokenizer."""

    config: object
    names: list[str]
    head: list[str]
    tokenizer: object


@functools.cache
def find_head(model_name):
    """Return the modules of a model that are new, and so fully trained."""
    nb = notebook()
    model, report = nb.load_classifier(nb.Config(model_name=model_name), ["0", "1"])
    return nb.new_modules(model, report)


def settle(model_name, settings):
    """Return the task of a model with `settings` (presets included): two classes."""
    nb = notebook()
    given = {
        "model_name": model_name,
        "output_dir": tempfile.mkdtemp(dir=SCRATCH.name),
    }
    given.update(settings)
    given["preset"] = f"full,{settings.get('preset', '')}".strip(",")
    config, sources = nb.resolve_config(given, {}, torch.cuda.is_available())
    tokenizer, about_model = nb.open_checkpoint(config)
    config = nb.fit_to_model(config, sources, about_model)
    return Task(config, ["negative", "positive"], find_head(model_name), tokenizer)


def full_settings(**changes):
    """Return settings of full fine-tuning at its fastest, with changes."""
    settings = {
        "frozen_dtype": "float32",
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 32,
        "gradient_accumulation_steps": 1,
        "optim": "adamw_torch_fused",
        "train_sampling_strategy": "group_by_length",
    }
    settings.update(changes)
    return settings


def build_full(config, names, head):
    """Load the model to be trained as a whole."""
    nb = notebook()
    model = nb.build_full(config, names, head)
    if config.gradient_checkpointing:
        nb.checkpoint_layers(model)
    return model


def build_lora(config, names, head):
    """Load LoRA adapters on a base that is in 16 bits where QLoRA has 4."""
    nb = notebook()
    dtype = getattr(torch, config.bnb_4bit_compute_dtype)
    model, _ = nb.load_classifier(config, names, dtype=dtype)
    nb.finish_base(model, head)
    if config.gradient_checkpointing:
        nb.checkpoint_layers(model)
    nb.set_seed(config.seed)
    model = nb.get_peft_model(model, nb.lora_config(config, head))
    nb.keep_compute_dtype(model)
    return model


def build_qlora(config, names, head):
    """Load the notebook's model: adapters on the 4-bit base."""
    return notebook().build_qlora(config, names, head)


# ---- Texts


def random_texts(count, length):
    """Return `count` tokenized texts of `length` random tokens, in two classes."""
    ids = np.random.default_rng(0).integers(1000, 30_000, (count, length))
    columns = {
        "input_ids": ids.tolist(),
        "attention_mask": np.ones_like(ids).tolist(),
        "label": [number % 2 for number in range(count)],
        "length": [length] * count,
    }
    return notebook().Dataset.from_dict(columns)


def read_rows(dataset, tiny):
    """Return texts and labels by the notebook's reader; tiny: 200 made-up sentences."""
    nb = notebook()
    if not tiny:
        return nb.pick_columns(nb.read_tables(dataset))
    words = ["good", "bad"] * 100
    texts = [f"{word} film {number}" for number, word in enumerate(words)]
    return nb.pd.DataFrame({"text": texts, "label": words})


def read_splits(dataset, seed, tiny):
    """Return `train`, `validation` and `test`, as the notebook draws them."""
    nb = notebook()
    rows, _ = nb.clean(read_rows(dataset, tiny))
    return nb.split_rows(rows, nb.Config(seed=seed))
