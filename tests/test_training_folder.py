"""Section 8: what tells one training from another."""

import pytest


@pytest.fixture
def config(tiny_config):
    """Batches of 16 texts, without accumulation."""
    changes = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
    return tiny_config.model_copy(update=changes)


def test_other_settings_data_or_weights_get_another_folder(notebook, config, tokenized):
    folder, _ = notebook.training_folder(config, tokenized, "hash")
    fewer = notebook.DatasetDict(tokenized)
    fewer["train"] = tokenized["train"].select(range(150))
    other_seed = config.model_copy(update={"seed": 1})
    other_batch = config.model_copy(update={"per_device_train_batch_size": 4})
    others = [
        notebook.training_folder(other_seed, tokenized, "hash"),
        notebook.training_folder(other_batch, tokenized, "hash"),
        notebook.training_folder(config, fewer, "hash"),
        notebook.training_folder(config, tokenized, "other hash"),
    ]
    folders = {other for other, _ in others}
    assert len(folders) == 4
    assert folder not in folders


def test_what_does_not_decide_a_training_does_not_move_its_folder(
    notebook, config, tokenized
):
    changes = {
        "preset": "fast",
        "data_dir": "elsewhere",
        "wandb_project": "other",
        "push_to_hub": "me/it",
        "ranks": [1],
        "predict_name": "texts.csv",
        "test_dataset_name": "test.csv",
        "rank_train_samples": 32,
        "efficiency_steps": 1,
        "cuda_graphs": not config.cuda_graphs,
        "per_device_eval_batch_size": 3,
        "per_device_train_batch_size": 4,  # x 4 is the batch of 16 x 1
        "gradient_accumulation_steps": 4,
    }
    other_test = notebook.DatasetDict(tokenized)
    other_test["test"] = tokenized["validation"]
    changed = config.model_copy(update=changes)
    folder, _ = notebook.training_folder(config, tokenized, "hash")
    same, _ = notebook.training_folder(changed, other_test, "hash")
    assert same == folder


def test_it_is_named_in_what_a_training_differs(notebook, config, tokenized, tmp_path):
    _, about = notebook.training_folder(config, tokenized, "hash")
    path = tmp_path / "training.json"
    notebook.write_json(path, about)
    assert notebook.differing(path, about) == []
    shorter = config.model_copy(update={"lora_r": 2, "max_length": 16})
    _, other = notebook.training_folder(shorter, tokenized, "hash")
    assert sorted(notebook.differing(path, other)) == ["lora_r", "max_length"]
    fewer = notebook.DatasetDict(tokenized)
    fewer["train"] = tokenized["train"].select(range(150))
    _, other = notebook.training_folder(config, fewer, "other hash")
    assert sorted(notebook.differing(path, other)) == ["data", "weights"]
