"""Section 8: the loss on one scale, the first update, early stopping, and no DataParallel."""

import dataclasses

import numpy as np
import pytest
import torch


@pytest.fixture
def tokenized(notebook, offline_model, sentences):
    tokenizer = notebook.AutoTokenizer.from_pretrained(offline_model)
    return tokenizer, notebook.tokenize_reviews(notebook.split_reviews(sentences.sample(400, random_state=0), 0.1, 0.1, 0), tokenizer, 32)


def train_one_step(notebook, config, tokenized, batch, accumulation, folder, **changes):
    tokenizer, splits = tokenized
    config = dataclasses.replace(config, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
    base = notebook.load_classifier(config.model_name, config.seed, notebook.quantization_config(config, ["classifier"]))
    model = notebook.add_adapters(base, config, ["classifier"])
    changes = {"max_steps": 1, "logging_steps": 1, "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "warmup_steps": 0, "max_grad_norm": 0.0, "disable_tqdm": True} | changes
    trainer = notebook.make_trainer(model, notebook.training_arguments(config, str(folder), **changes), tokenizer, splits["train"])
    gradients = {}

    class KeepGradients(notebook.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            gradients.update({name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None})

    trainer.add_callback(KeepGradients())
    trainer.train()
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    return trainer.state.log_history[0]["loss"], gradients, weights


def test_32_x_1_and_16_x_2_log_the_same_loss_and_make_the_same_first_update(notebook, tiny_config, tokenized, tmp_path):
    plain = {"optim": "sgd", "learning_rate": 1.0}  # its update is the gradient itself; Adam's first step would hide a factor
    loss_1, gradients_1, weights_1 = train_one_step(notebook, tiny_config, tokenized, 32, 1, tmp_path, **plain)
    loss_2, gradients_2, weights_2 = train_one_step(notebook, tiny_config, tokenized, 16, 2, tmp_path, **plain)
    assert loss_1 == pytest.approx(np.log(2), abs=0.1) and loss_2 == pytest.approx(loss_1, abs=1e-4)
    moved = [name for name in gradients_1 if gradients_1[name].abs().max() > 0]
    assert len(moved) >= 2 * 2 + 2  # lora_B of query and value in both layers, and the head; lora_A has no gradient while B is zero
    for name in moved:
        assert torch.allclose(gradients_1[name], gradients_2[name], rtol=1e-3, atol=1e-6), name
        assert torch.allclose(weights_1[name], weights_2[name], rtol=1e-3, atol=1e-6), name


def test_left_to_itself_trainer_would_double_the_loss(notebook, tiny_config, tokenized, tmp_path, monkeypatch):
    """The trap that ``make_trainer`` avoids is still there; when this fails, the work-around can go."""
    make_trainer = notebook.make_trainer

    def unaware(*arguments, **keywords):
        trainer = make_trainer(*arguments, **keywords)
        trainer.model_accepts_loss_kwargs = True
        return trainer

    monkeypatch.setattr(notebook, "make_trainer", unaware)
    loss, _, _ = train_one_step(notebook, tiny_config, tokenized, 16, 2, tmp_path)
    assert loss == pytest.approx(2 * np.log(2), abs=0.2)


def test_the_trainer_gets_the_recipe_s_settings(notebook, monkeypatch):
    config, _ = notebook.resolve_config({"QLORA_EXECUTION": "plain"}, cuda=True)
    seen = {}
    monkeypatch.setattr(notebook, "TrainingArguments", lambda **values: seen.update(values) or type("Arguments", (), {"n_gpu": 2, "_n_gpu": 2})())
    arguments = notebook.training_arguments(config, "outputs")
    assert arguments._n_gpu == 1  # never DataParallel
    expected = {"num_train_epochs": 3, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 2, "learning_rate": 2e-4, "lr_scheduler_type": "cosine", "warmup_steps": 0.1, "weight_decay": 0.01}
    expected |= {"optim": "paged_adamw_8bit", "fp16": True, "gradient_checkpointing": True, "eval_strategy": "epoch", "metric_for_best_model": "accuracy", "load_best_model_at_end": True, "seed": 42}
    assert {name: seen[name] for name in expected} == expected


def test_two_gpus_never_lead_to_data_parallel(notebook, tiny_config, qlora_model, tokenized, tmp_path, monkeypatch):
    """As in Kaggle, where two GPUs are seen; there are none here, so their number is played."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    wrapped = []

    def wrap(self, module, **_):
        torch.nn.Module.__init__(self)
        wrapped.append(module)

    monkeypatch.setattr(torch.nn.DataParallel, "__init__", wrap)
    options = {"use_cpu": False, "max_steps": 1, "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "disable_tqdm": True}
    arguments = notebook.training_arguments(tiny_config, str(tmp_path), **options)
    assert arguments.n_gpu == 1 and arguments.train_batch_size == tiny_config.per_device_train_batch_size
    full = notebook.load_classifier(tiny_config.model_name, 0)
    for model in (qlora_model, full):
        notebook.make_trainer(model, arguments, tokenized[0], tokenized[1]["train"]).train()
    assert not wrapped
    arguments._n_gpu = 2  # what Trainer would find and take by itself
    notebook.make_trainer(full, arguments, tokenized[0], tokenized[1]["train"])._wrap_model(full)
    assert wrapped == [full]


def test_a_warm_up_below_one_is_a_share_of_the_steps(notebook, tiny_config):
    arguments = notebook.training_arguments(tiny_config, "outputs")
    assert arguments.get_warmup_steps(200) == 20


def test_training_stops_early_and_keeps_the_best(notebook, tiny_config, qlora_model, tokenized, tmp_path):
    """With a learning rate of nearly nothing the accuracy never rises after the first epoch: patience 2 ends the run at epoch 3 of 10."""
    tokenizer, splits = tokenized
    config = dataclasses.replace(tiny_config, num_train_epochs=10, learning_rate=1e-12)
    trainer = notebook.make_trainer(
        qlora_model, notebook.training_arguments(config, str(tmp_path), disable_tqdm=True), tokenizer, splits["train"].select(range(64)), splits["validation"], [notebook.EarlyStoppingCallback(config.early_stopping_patience)]
    )
    trainer.train()
    history = notebook.training_history(trainer.state.log_history)
    assert trainer.state.epoch == 3 and trainer.state.best_global_step == 2
    assert history["eval_accuracy"].notna().sum() == 3 and history["step"].is_unique


def test_8_bit_adam_trains_on_a_cpu(notebook, tiny_config, tokenized, tmp_path):
    config = dataclasses.replace(tiny_config, optim="adamw_8bit", learning_rate=1e-2)
    _, gradients, _ = train_one_step(notebook, config, tokenized, 8, 1, tmp_path)
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
