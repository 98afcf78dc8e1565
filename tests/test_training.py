"""Section 8, the training itself: its settings, the scale of the loss, class weights."""

from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

SHAPE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture
def skewed(tokenized):
    """75 texts of the first class and 15 of the second, mixed."""
    first, second = (np.flatnonzero(np.equal(tokenized["train"]["label"], label)) for label in (0, 1))
    rows = np.random.default_rng(0).permutation([*first[:75], *second[:15]])
    return tokenized["train"].select(rows)


def small_bert(positions: int) -> BertForSequenceClassification:
    return BertForSequenceClassification(BertConfig(max_position_embeddings=positions, **SHAPE))


def test_the_trainer_gets_the_configurations_values_and_changes_win(notebook, tmp_path):
    values = {"num_train_epochs": 4.5, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 3, "seed": 7}
    values |= {"learning_rate": 3e-4, "lr_scheduler_type": "linear", "weight_decay": 0.02, "optim": "adamw_torch"}
    values |= {"train_sampling_strategy": "group_by_length", "per_device_eval_batch_size": 5, "fp16": False}
    config = notebook.Config(gradient_checkpointing=True, push_to_hub="me/mine", **values)
    arguments = notebook.training_arguments(config, tmp_path / "run", logging_steps=3)
    assert {name: getattr(arguments, name) for name in values} == values
    assert arguments.output_dir == str(tmp_path / "run") and arguments.logging_steps == 3
    assert not arguments.report_to and not arguments.push_to_hub and not arguments.gradient_checkpointing
    assert notebook.training_arguments(notebook.Config(fp16=True), tmp_path, use_cpu=False).fp16
    for share, steps in ((0.1, 20), (0.25, 50), (0.0, 0)):  # a warm-up below one is a share of the steps
        config = config.model_copy(update={"warmup_ratio": share})
        assert notebook.training_arguments(config, tmp_path).get_warmup_steps(200) == steps


def test_two_gpus_in_one_process_never_lead_to_data_parallel(notebook, tiny_config, tmp_path, monkeypatch):
    """As in Kaggle, where two GPUs are seen; there are none here, so their number is played."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert TrainingArguments(output_dir=str(tmp_path)).n_gpu == 2  # what Trainer takes by itself
    arguments = notebook.training_arguments(tiny_config, tmp_path, use_cpu=False)
    assert arguments.n_gpu == 1 and arguments.train_batch_size == tiny_config.per_device_train_batch_size


PADDED = [("cpu", 32, 128, None), ("cuda", 32, 128, 64), ("cuda", 64, 64, 64), ("cuda", 90, 100, None)]


@pytest.mark.parametrize(("device", "length", "positions", "padded"), [*PADDED, ("cuda", 100, 128, 64)])
def test_batches_are_padded_for_graphs_within_the_models_positions(
    notebook, tiny_config, task, skewed, monkeypatch, device, length, positions, padded
):
    """The device is played, and the Trainer only notes what it gets."""
    monkeypatch.setattr(notebook, "GraphTrainer", MagicMock())
    config = tiny_config.model_copy(update={"cuda_graphs": True, "max_length": length})
    arguments = SimpleNamespace(device=torch.device(device), world_size=1)
    notebook.make_trainer(small_bert(positions), config, arguments, task.tokenizer, skewed)
    made = notebook.GraphTrainer.call_args.kwargs
    assert made["data_collator"].pad_to_multiple_of == padded
    assert made["graphs"] == (device == "cuda")  # else nothing is captured


@pytest.mark.parametrize("class_weights", ["none", "balanced"])
def test_32_x_1_and_16_x_2_have_the_same_gradients(notebook, tiny_config, task, skewed, tmp_path, class_weights):
    steps = []

    class Keep(notebook.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            steps.append({name: each.grad.clone() for name, each in model.named_parameters() if each.requires_grad})

        def on_log(self, args, state, control, logs=None, **kwargs):
            steps.append(logs["loss"]) if "loss" in logs else None

    once = notebook.QUIET | {"max_steps": 1, "max_grad_norm": 0.0, "logging_strategy": "epoch"}
    for micro, accumulation in ((32, 1), (16, 2)):
        parts = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulation}
        config = tiny_config.model_copy(update=parts | {"class_weights": class_weights})
        arguments = notebook.training_arguments(config, tmp_path, **once)
        model = notebook.build_qlora(config, task)
        notebook.make_trainer(model, config, arguments, task.tokenizer, skewed, callbacks=[Keep()]).train()
    gradients, loss, other_gradients, other_loss = steps
    assert other_loss == pytest.approx(loss, abs=1e-4) and loss == pytest.approx(np.log(2), abs=0.1)
    moved = [name for name, gradient in gradients.items() if gradient.abs().max() > 0]
    assert len(moved) == 2 * 2 + 2  # lora_B of query and value in both layers, and the head; A has none while B is 0
    for name in moved:
        assert torch.allclose(gradients[name], other_gradients[name], rtol=1e-3, atol=1e-6), name


def test_rare_classes_can_count_for_more(notebook, tiny_config, task, skewed, tmp_path):
    config = tiny_config.model_copy(update={"class_weights": "balanced"})
    arguments = notebook.training_arguments(config, tmp_path, **notebook.QUIET)
    made = notebook.make_trainer(small_bert(64), config, arguments, task.tokenizer, skewed, eval_dataset=skewed)
    weights = made.class_weights[skewed["label"]]
    assert (weights.mean(), made.class_weights[1] / made.class_weights[0]) == pytest.approx((1, 75 / 15))
    scores, logits = made.evaluate(), torch.from_numpy(made.predict(skewed).predictions)
    losses = torch.nn.functional.cross_entropy(logits, torch.tensor(skewed["label"]), reduction="none")
    expected = (weights * losses).mean()
    assert abs(losses.mean() - expected) > 1e-4  # without weights it is another
    assert scores["eval_loss"] == pytest.approx(expected.item(), abs=1e-5)
    assert f"eval_{arguments.metric_for_best_model}" == "eval_f1_macro" in scores  # it counts them alike
