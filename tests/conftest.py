"""The notebook's definitions, a tiny BERT and real sentences, for all tests."""

import sys
import types
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "QLoRA_BERT_TextClassification.ipynb"
sys.path.insert(0, str(ROOT / "scripts"))

from import_notebook import import_definitions  # noqa: E402


def code_cells() -> list[nbformat.NotebookNode]:
    """Return the notebook's code cells."""
    return [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]


@pytest.fixture(scope="session")
def notebook() -> types.ModuleType:
    """The notebook's definitions."""
    return import_definitions()


@pytest.fixture(scope="session")
def offline_model() -> str:
    """The folder of the small pretrained BERT."""
    import offline_assets

    return str(offline_assets.ensure_model())


@pytest.fixture(scope="session")
def sentences(notebook):
    """The real sentences as a cleaned table of ``text`` and ``label``."""
    import offline_assets

    reviews, _ = notebook.clean_reviews(notebook.load_reviews(str(offline_assets.ensure_reviews())))
    return reviews


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory, offline_model) -> str:
    """A folder with a BERT of 2 layers x 64 and random weights, with the real vocabulary; dropout off, so that runs can be compared."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = tmp_path_factory.mktemp("tiny-bert")
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "max_position_embeddings": 128}
    BertModel(BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **shape)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(offline_model).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def small_data(notebook, offline_model, sentences):
    """A tokenizer, and tokens of 160 sentences for training and 20 for validation."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(offline_model)
    splits = notebook.split_reviews(sentences.sample(200, random_state=0), 0.1, 0.1, 0)
    return tokenizer, notebook.tokenize_reviews(splits, tokenizer, 32)


@pytest.fixture
def tiny_config(notebook, tiny_bert, tmp_path):
    """A configuration for the tiny BERT on a CPU that writes below the test's own folder."""
    environ = {"QLORA_PROFILE": "full", "QLORA_MODEL_NAME": tiny_bert, "QLORA_MAX_LENGTH": "32", "QLORA_LORA_DROPOUT": "0", "QLORA_LORA_R": "4", "QLORA_LORA_ALPHA": "8"}
    environ |= {"QLORA_OUTPUT_DIR": str(tmp_path / "outputs"), "QLORA_DATA_DIR": str(tmp_path / "Data"), "QLORA_OPTIM": "adamw_torch"}
    return notebook.resolve_config(environ, cuda=False)[0]


@pytest.fixture
def qlora_model(notebook, tiny_config):
    """The tiny BERT in 4 bits with adapters, ready to train."""
    base = notebook.load_classifier(tiny_config.model_name, tiny_config.seed, notebook.quantization_config(tiny_config, ["classifier"]))
    return notebook.add_adapters(base, tiny_config, ["classifier"])
