"""The notebook's definitions, a tiny BERT and real sentences, for all tests."""

import gc
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
from hosts import hosts, reviews, run  # noqa: E402, F401 (fixtures)
from notebook_api import import_definitions  # noqa: E402


def code_cells() -> list[nbformat.NotebookNode]:
    """Return the notebook's code cells."""
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    return [cell for cell in cells if cell.cell_type == "code"]


@pytest.fixture(scope="session")
def notebook() -> types.ModuleType:
    """The notebook's definitions."""
    module = import_definitions()
    gc.freeze()  # Trainer collects garbage after each training: the imports are none
    return module


@pytest.fixture(scope="session")
def offline_model() -> str:
    """The folder of the small pretrained BERT."""
    return str(offline_assets.ensure_model())


@pytest.fixture(scope="session")
def sentences(notebook):
    """The real sentences as a cleaned table of `text` and `label`."""
    tables = notebook.read_tables(str(offline_assets.ensure_reviews()))
    rows, _ = notebook.clean(notebook.pick_columns(tables))
    return rows


@pytest.fixture(scope="session")
def tokenizer(offline_model):
    """The tokenizer of the small pretrained BERT, which the tiny one has too."""
    return AutoTokenizer.from_pretrained(offline_model)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory, tokenizer) -> str:
    """A folder with a BERT of 2 layers x 64, random weights and no dropout."""
    folder = tmp_path_factory.mktemp("tiny-bert")
    torch.manual_seed(0)
    shape = BertConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertModel(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def tiny_config(notebook, tiny_bert, tmp_path):
    """A configuration for the tiny BERT on a CPU; it writes below the test's folder."""
    settings = {
        "preset": "full",
        "model_name": tiny_bert,
        "max_length": 32,
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0,
        "learning_rate": 1e-3,
        "optim": "adamw_torch",
        "gradient_checkpointing": False,
        "output_dir": str(tmp_path / "outputs"),
        "data_dir": str(tmp_path / "Data"),
    }
    config, _ = notebook.resolve_config(settings, {}, cuda=False)
    return config


@pytest.fixture(scope="session")
def names() -> list[str]:
    """The classes of the real sentences."""
    return ["negative", "positive"]


@pytest.fixture(scope="session")
def head() -> list[str]:
    """The new modules of a BERT with a pooler."""
    return ["classifier"]


@pytest.fixture
def tokenized(notebook, tiny_config, tokenizer, sentences):
    """Tokens of 160 sentences for training, 20 for validation and 20 for the test."""
    rows = sentences.sample(200, random_state=0)
    tokens = notebook.DatasetDict()
    for name, split in notebook.split_rows(rows, tiny_config).items():
        tokens[name] = notebook.tokenize(split, tokenizer, tiny_config.max_length)
    return tokens
