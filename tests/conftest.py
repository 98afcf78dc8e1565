"""The notebook's definitions, a tiny BERT and real sentences, for all tests."""

import sys
import types
from pathlib import Path

import nbformat
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "QLoRA_BERT_TextClassification.ipynb"
sys.path.insert(0, str(ROOT / "scripts"))

import offline_assets  # noqa: E402
from hosts import hosts, reviews  # noqa: E402, F401 (fixtures)
from notebook_api import import_definitions  # noqa: E402


def code_cells() -> list[nbformat.NotebookNode]:
    """Return the notebook's code cells."""
    return [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]


@pytest.fixture(scope="session")
def notebook() -> types.ModuleType:
    """The notebook's definitions."""
    module = import_definitions()
    module.gc.freeze()  # as the notebook does: Trainer collects garbage at the end of each training
    return module


@pytest.fixture(scope="session")
def offline_model() -> str:
    """The folder of the small pretrained BERT."""
    return str(offline_assets.ensure_model())


@pytest.fixture(scope="session")
def sentences(notebook):
    """The real sentences as a cleaned table of `text` and `label`."""
    (table,) = notebook.read_tables(str(offline_assets.ensure_reviews()))
    return notebook.clean(notebook.pick_columns([table]))[0]


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory, offline_model) -> str:
    """A folder with a BERT of 2 layers x 64, random weights, the real vocabulary and no dropout."""
    folder = tmp_path_factory.mktemp("tiny-bert")
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    BertModel(BertConfig(max_position_embeddings=128, **shape, **still)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(offline_model).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def tiny_config(notebook, tiny_bert, tmp_path):
    """A configuration for the tiny BERT on a CPU that writes below the test's own folder."""
    settings = {"preset": "full", "model_name": tiny_bert, "max_length": 32, "lora_dropout": 0, "optim": "adamw_torch"}
    settings |= {"lora_r": 4, "lora_alpha": 8, "learning_rate": 1e-3, "gradient_checkpointing": False}
    settings |= {"output_dir": str(tmp_path / "outputs"), "data_dir": str(tmp_path / "Data")}
    return notebook.resolve_config(settings, {}, cuda=False)[0]


@pytest.fixture(scope="session")
def task(notebook, offline_model):
    """The tokenizer, two classes and the head of a BERT."""
    return notebook.Task(AutoTokenizer.from_pretrained(offline_model), ["negative", "positive"], ["classifier"])


@pytest.fixture
def tokenized(notebook, tiny_config, task, sentences):
    """Tokens of 160 sentences for training, 20 for validation and 20 for the test."""
    splits = notebook.split_rows(sentences.sample(200, random_state=0), tiny_config)
    tokens = {name: notebook.tokenize(split, task.tokenizer, tiny_config) for name, split in splits.items()}
    return notebook.DatasetDict(tokens)
