"""What the studies share: the notebook's definitions, models and texts, and one JSON file for each study.

A study writes its file after every run, and skips the runs that the file has: started again, it goes on.
"""

import argparse
import base64
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "Data" / "reference"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
sys.path.insert(0, str(ROOT / "scripts"))


@functools.cache
def notebook() -> types.ModuleType:
    """Return the notebook's definitions, with its warnings and progress bars silenced."""
    from notebook_api import import_definitions

    module = import_definitions()
    module.transformers.utils.logging.set_verbosity_error()
    module.transformers.utils.logging.disable_progress_bar()
    module.datasets.disable_progress_bars()
    module.gc.freeze()  # what was imported lives on: no need to look at it in each collection
    module.warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*deprecated")
    module.sns.set_theme(style="whitegrid", palette="colorblind")
    return module


def parser(study: str, doc: str) -> argparse.ArgumentParser:
    """Return a parser with what all studies take."""
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{study}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--out", type=Path, default=ROOT / "outputs" / "benchmarks", help="folder of the JSON file")
    made.add_argument("--fresh", action="store_true", help="measure all anew, whatever the file holds")
    made.add_argument("--tiny", action="store_true", help="a tiny model: shows that the code runs, no more")
    return made


class Study:
    """The JSON file of a study: `provenance`, `settings`, `runs`, and what is computed from them.

    Raises SystemExit: the file was made with other settings, code or device; its runs would not be comparable.
    """

    def __init__(self, study: str, arguments: argparse.Namespace, settings: dict, file: str = ""):
        self.path, self.runs = arguments.out / f"{file or study}.json", []
        self.results = {"provenance": provenance(study), "settings": settings, "runs": self.runs}
        if arguments.fresh or not self.path.exists():
            return
        before = json.loads(self.path.read_text(encoding="utf-8"))
        same = json.loads(json.dumps(settings)) == before["settings"]
        for part in ("device", "versions", "commit"):
            same &= before["provenance"][part] == self.results["provenance"][part]
        if not same:
            raise SystemExit(f"{self.path} is of other settings, code or device. Allowed: --fresh, or another --out.")
        self.results, self.runs = before, before["runs"]

    def add(self, key: dict, measure: Callable[[], dict]) -> dict:
        """Return the run with `key`; where there is none yet, measure it, and write it to the file."""
        for run in self.runs:
            if key.items() <= run.items():
                return run
        self.runs.append(key | measure())
        print({name: value for name, value in self.runs[-1].items() if not name.endswith("right")}, flush=True)
        self.write()
        return self.runs[-1]

    def write(self, **parts) -> None:
        """Write the file, with `parts` added."""
        self.results |= parts
        notebook().atomic_write(self.path, json.dumps(self.results, indent=1, default=float) + "\n")


def provenance(study: str) -> dict:
    """Return where, when and with what a study runs. Without a repository, `GIT_COMMIT` names the commit."""
    import torch

    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return {
        "command": " ".join([f"python -m benchmarks.{study}", *map(public, sys.argv[1:])]),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in PACKAGES},
        "commit": os.environ.get("GIT_COMMIT") or (found if re.fullmatch("[0-9a-f]{40}", found) else None),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def public(argument: str) -> str:
    """Return an argument as it is, and of a path its last name, by the notebook's rule."""
    return notebook().public_name(argument)


def random_model(shape: dict) -> str:
    """Write a BERT with random weights (`shape` empty: bert-base) and 30,522 made-up words; return its folder."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = Path(tempfile.mkdtemp(prefix="bert-")) / "bert-base, random weights"
    torch.manual_seed(0)
    BertModel(BertConfig(**shape)).save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{number}" for number in range(5, 30_522))]
    BertTokenizer({word: number for number, word in enumerate(words)}).save_pretrained(folder)
    return str(folder)


def model_folder(name: str, tiny: bool) -> str:
    """Return the folder of a model: `random` (bert-base with random weights), `base` and `small` (the offline assets,
    see scripts/offline_assets.py), or a Hub id or path as it is; with `tiny`, a tiny random one in its place."""
    import offline_assets

    assets = {"base": offline_assets.ensure_base, "small": offline_assets.ensure_model}
    if tiny or name == "random":
        return random_model(TINY if tiny else {})
    return str(assets[name]()) if name in assets else name


@dataclass
class Task:
    """What the notebook's functions take beside the configuration: classes, new modules, tokenizer."""

    names: list[str]
    head: list[str]
    tokenizer: object


def settle(**settings) -> tuple:
    """Return the configuration of `settings` (presets included) on this device, and the task of its model: two classes.

    Files of a training go to a temporary folder.
    """
    nb = notebook()
    presets = ",".join(filter(None, ["full", settings.pop("preset", "")]))
    settings = {"output_dir": tempfile.mkdtemp(prefix="study-"), **settings, "preset": presets}
    config, sources = nb.resolve_config(settings, {}, nb.torch.cuda.is_available())
    tokenizer, about = nb.open_checkpoint(config)
    config = nb.fit_to_model(config, sources, about)
    names = ["negative", "positive"]
    model, report = nb.load_classifier(config, names)
    return config, Task(names, nb.new_modules(model, report), tokenizer)


def drop_graphs(trainer) -> None:
    """Free the CUDA graphs of a training, if it has any."""
    if isinstance(trainer.training_step, notebook().CapturedSteps):
        trainer.training_step.graphs.clear()


def base_here(base: str) -> str:
    """Return the dtype of a base on this device: without a GPU there is no fp16 autocast, and 16 bits become 32."""
    return "float32" if base == "float16" and not notebook().torch.cuda.is_available() else base


def build(base: str, adapters: bool, config, names: list[str], head: list[str]):
    """Return a model, ready to be trained: with adapters, or as a whole. `base` is "4-bit" (always with adapters), or
    the dtype of its weights, "float32" or "float16" (see `base_here`)."""
    nb = notebook()
    if base == "4-bit":
        return nb.build_qlora(config, names, head)
    model, _ = nb.load_classifier(config, names, dtype=getattr(nb.torch, base_here(base)))
    if config.gradient_checkpointing:
        nb.checkpoint_layers(model)
    if adapters:
        nb.finish_base(model, head)
        model = nb.get_peft_model(model, nb.lora_config(config, head))
    if adapters and config.frozen_dtype == "compute":
        nb.keep_compute_dtype(model)
    for parameter in model.parameters():
        if parameter.requires_grad:  # gradients in fp16 could not be unscaled
            parameter.data = parameter.data.float()
    return model


def random_texts(count: int, length: int):
    """Return `count` tokenized texts of `length` random tokens, half of them of each class."""
    nb = notebook()
    ids = nb.np.random.default_rng(0).integers(1000, 30_000, (count, length)).tolist()
    columns = {"input_ids": ids, "attention_mask": [[1] * length] * count, "label": [i % 2 for i in range(count)]}
    columns["length"] = [length] * count
    return nb.Dataset.from_dict(columns)


def load_texts(dataset: str, config, tiny: bool):
    """Return the splits of a data set by the notebook's reader and by `config`; with `tiny`, 200 made-up sentences."""
    nb = notebook()
    if tiny:
        words = [("good", "bad")[number % 2] for number in range(200)]
        rows = nb.pd.DataFrame({"text": [f"{word} film {i}" for i, word in enumerate(words)], "label": words})
        return nb.split_rows(rows, config)
    rows, _ = nb.clean(nb.pick_columns(nb.read_tables(dataset), config.text_column, config.label_column))
    return nb.split_rows(rows, config)


def markdown(frame) -> str:
    """Return a table as Markdown, its index as the first column."""
    table = frame.reset_index().astype(str)
    lines = [table.columns, ["---"] * table.shape[1], *table.to_numpy()]
    return "\n".join(f"|{'|'.join(map(str, line))}|" for line in lines)


def pack(right) -> dict:
    """Return bools as text for JSON, eight in a byte: which texts were answered right."""
    bits = notebook().np.packbits(right).tobytes()
    return {"n": len(right), "base64": base64.b64encode(bits).decode()}


def unpack(packed: dict):
    """Return the bools of `pack`, shape `(n,)`."""
    np = notebook().np
    bits = np.frombuffer(base64.b64decode(packed["base64"]), np.uint8)
    return np.unpackbits(bits, count=packed["n"]).astype(bool)
