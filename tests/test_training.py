"""Section 8, the training itself: its settings, the scale of the loss, class weights, early stopping, optimizers."""

from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments


@pytest.fixture
def first_step(notebook, tiny_config, task, tmp_path):
    """A function that makes one step on texts and returns the loss, the gradients and the weights after it.

    With plain SGD an update is the gradient itself; Adam's first step would hide a factor.
    """

    def run(train, micro: int, accumulation: int, **changes) -> tuple[float, dict, dict]:
        parts = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulation}
        config = tiny_config.model_copy(update=parts | {"optim": "sgd", "learning_rate": 1.0} | changes)
        once = notebook.QUIET | {"max_steps": 1, "warmup_steps": 0, "max_grad_norm": 0.0}
        once |= {"logging_strategy": "steps", "logging_steps": 1}
        arguments = notebook.training_arguments(config, tmp_path / "once", **once)
        gradients = {}

        class Keep(notebook.TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
                gradients.update({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})

        model = notebook.build_qlora(config, task)
        trainer = notebook.make_trainer(model, config, arguments, task.tokenizer, train, callbacks=[Keep()])
        trainer.train()
        weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        return trainer.state.log_history[0]["loss"], gradients, weights

    return run


@pytest.fixture
def skewed(tokenized):
    """75 texts of the first class and 15 of the second."""
    labels = np.array(tokenized["train"]["label"])
    rows = np.concatenate([np.flatnonzero(labels == 0)[:75], np.flatnonzero(labels == 1)[:15]])
    assert len(rows) == 90
    return tokenized["train"].select(np.random.default_rng(0).permutation(rows))


def small_bert(positions: int) -> BertForSequenceClassification:
    shape = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    return BertForSequenceClassification(BertConfig(max_position_embeddings=positions, **shape))


# Settings


def test_the_trainer_gets_the_configurations_values(notebook, tmp_path):
    values = {
        "num_train_epochs": 4.5,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 3,
    }
    values |= {
        "learning_rate": 3e-4,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.02,
        "optim": "adamw_torch",
    }
    values |= {
        "train_sampling_strategy": "group_by_length",
        "per_device_eval_batch_size": 5,
        "seed": 7,
    }
    arguments = notebook.training_arguments(notebook.Config(fp16=False, **values), tmp_path / "run")
    assert {name: getattr(arguments, name) for name in values} == values
    assert arguments.output_dir == str(tmp_path / "run")
    assert notebook.training_arguments(notebook.Config(fp16=True), tmp_path, use_cpu=False).fp16


def test_the_trainer_neither_reports_nor_uploads_nor_checkpoints_activations_by_itself(notebook, tmp_path):
    config = notebook.Config(fp16=False, gradient_checkpointing=True, push_to_hub="me/mine", optim="adamw_torch")
    arguments = notebook.training_arguments(config, tmp_path)
    assert not arguments.report_to and not arguments.push_to_hub and not arguments.gradient_checkpointing


def test_changes_win_over_the_configuration(notebook, tiny_config, tmp_path):
    arguments = notebook.training_arguments(tiny_config, tmp_path, learning_rate=0.5, logging_steps=3)
    assert arguments.learning_rate == 0.5 and arguments.logging_steps == 3


def test_a_warm_up_below_one_is_a_share_of_the_steps(notebook, tiny_config, tmp_path):
    for share, steps in ((0.1, 20), (0.25, 50), (0.0, 0)):
        config = tiny_config.model_copy(update={"warmup_ratio": share})
        assert notebook.training_arguments(config, tmp_path).get_warmup_steps(200) == steps


def test_two_gpus_in_one_process_never_lead_to_data_parallel(notebook, tiny_config, tmp_path, monkeypatch):
    """As in Kaggle, where two GPUs are seen; there are none here, so their number is played."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert TrainingArguments(output_dir=str(tmp_path)).n_gpu == 2  # what Trainer takes by itself
    arguments = notebook.training_arguments(tiny_config, tmp_path, use_cpu=False)
    assert arguments.n_gpu == 1 and arguments.train_batch_size == tiny_config.per_device_train_batch_size


@pytest.mark.parametrize(
    ("device", "graphs", "max_length", "positions", "padded"),
    [
        ("cpu", False, 32, 128, None),
        ("cpu", True, 32, 128, None),
        ("cuda", True, 32, 128, 64),
        ("cuda", True, 64, 64, 64),
        ("cuda", True, 90, 100, None),
        ("cuda", True, 100, 128, 64),
    ],
)
def test_batches_are_padded_to_64_for_graphs_and_only_within_the_models_positions(
    notebook, tiny_config, task, skewed, monkeypatch, device, graphs, max_length, positions, padded
):
    """The device is played, and the Trainer only notes what it gets."""
    made = MagicMock()
    monkeypatch.setattr(notebook, "GraphTrainer", made)
    config = tiny_config.model_copy(update={"cuda_graphs": graphs, "max_length": max_length})
    arguments = SimpleNamespace(device=torch.device(device), world_size=1)
    notebook.make_trainer(small_bert(positions), config, arguments, task.tokenizer, skewed)
    assert made.call_args.kwargs["data_collator"].pad_to_multiple_of == padded
    assert made.call_args.kwargs["graphs"] == (device == "cuda")  # else nothing is captured


# The loss


@pytest.mark.parametrize("class_weights", ["none", "balanced"])
def test_32_x_1_and_16_x_2_log_the_same_loss_and_make_the_same_first_update(first_step, skewed, class_weights):
    loss, gradients, weights = first_step(skewed, 32, 1, class_weights=class_weights)
    other_loss, other_gradients, other_weights = first_step(skewed, 16, 2, class_weights=class_weights)
    assert other_loss == pytest.approx(loss, abs=1e-4)
    moved = [name for name, gradient in gradients.items() if gradient.abs().max() > 0]
    assert len(moved) == 2 * 2 + 2  # lora_B of query and value in both layers, and the head; A has none while B is 0
    for name in moved:
        assert torch.allclose(gradients[name], other_gradients[name], rtol=1e-3, atol=1e-6), name
        assert torch.allclose(weights[name], other_weights[name], rtol=1e-3, atol=1e-6), name


def test_an_untrained_model_loses_the_logarithm_of_two(first_step, tokenized):
    loss, _, _ = first_step(tokenized["train"], 16, 2)
    assert loss == pytest.approx(np.log(2), abs=0.1)


def test_left_to_itself_trainer_would_double_the_loss(notebook, first_step, tokenized, monkeypatch):
    """The trap is still there; when this fails, the remedy can go."""

    class Plain(notebook.Trainer):
        def __init__(self, *args, graphs, **kwargs):
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(notebook, "GraphTrainer", Plain)
    loss, _, _ = first_step(tokenized["train"], 16, 2)
    assert loss == pytest.approx(2 * np.log(2), abs=0.2)


# Class weights


def test_class_weights_have_mean_one_over_the_texts(notebook, tiny_config, task, skewed, tmp_path):
    arguments = notebook.training_arguments(tiny_config, tmp_path, **notebook.QUIET)
    weights = {}
    for kind in ("none", "balanced"):
        config = tiny_config.model_copy(update={"class_weights": kind})
        made = notebook.make_trainer(small_bert(64), config, arguments, task.tokenizer, skewed)
        weights[kind] = made.class_weights
    assert weights["none"] is None
    assert weights["balanced"][skewed["label"]].mean() == pytest.approx(1)
    assert weights["balanced"][1] / weights["balanced"][0] == pytest.approx(75 / 15)


def test_with_class_weights_a_rare_class_pulls_as_much_as_a_frequent_one(first_step, skewed):
    """All 90 texts are one batch. The bias of the head moves to the larger class, or with weights to neither."""
    bias = {}
    for kind in ("none", "balanced"):
        _, gradients, _ = first_step(skewed, 90, 1, class_weights=kind)
        (bias[kind],) = [gradient for name, gradient in gradients.items() if name.endswith("default.bias")]
    assert bias["none"][1] > 0.2 and abs(bias["balanced"][1]) < 0.05


def test_the_weighted_loss_comes_with_the_outputs_that_validation_needs(notebook, tiny_config, task, skewed, tmp_path):
    config = tiny_config.model_copy(update={"class_weights": "balanced"})
    arguments = notebook.training_arguments(config, tmp_path, **notebook.QUIET)
    made = notebook.make_trainer(small_bert(64), config, arguments, task.tokenizer, skewed, eval_dataset=skewed)
    scores, logits = made.evaluate(), torch.from_numpy(made.predict(skewed).predictions)
    losses = torch.nn.functional.cross_entropy(logits, torch.tensor(skewed["label"]), reduction="none")
    expected = (made.class_weights[skewed["label"]] * losses).mean()
    assert abs(losses.mean() - expected) > 1e-4  # without weights it is another
    assert scores["eval_loss"] == pytest.approx(expected.item(), abs=1e-5) and "eval_accuracy" in scores


# A whole training


def test_early_stopping_ends_the_training_and_the_best_adapter_is_kept(
    notebook, tiny_config, task, tokenized, tmp_path, monkeypatch
):
    """The accuracies are played: before training, then after each epoch. The second is the best."""
    accuracies = iter([0.2, 0.5, 0.9, 0.6, 0.9, 1.0])
    monkeypatch.setattr(notebook, "compute_metrics", lambda _: {"accuracy": next(accuracies)})
    config = tiny_config.model_copy(update={"num_train_epochs": 9.0})
    trainer = notebook.train_within_memory(config, task, tokenized, tmp_path / "run")
    assert trainer.state.epoch == 4 and trainer.state.best_global_step == 10  # patience 2; as good is not better
    kept = peft.get_peft_model_state_dict(trainer.model)
    best, last = (load_file(tmp_path / "run" / f"checkpoint-{n}" / "adapter_model.safetensors") for n in (10, 20))
    assert all(torch.equal(kept[name], best[name]) for name in best)
    assert not all(torch.equal(kept[name], last[name]) for name in last)


def test_the_log_holds_what_training_cost(notebook, tiny_config, task, tokenized, tmp_path):
    trainer = notebook.train_within_memory(tiny_config, task, tokenized, tmp_path / "run")
    scored = [row for row in trainer.state.log_history if "eval_loss" in row and row["step"]]
    assert [row["steps_all"] for row in scored] == [
        10,
        20,
        30,
    ]  # 5 steps of 2 micro-batches an epoch
    seconds = [row["train_seconds"] for row in scored]
    assert 0 < seconds[0] < seconds[1] < seconds[2] < 60
    assert {row["steps_captured"] for row in scored} == {row["peak_mb"] for row in scored} == {0}
    assert trainer.state.total_flos == 0 and trainer.floating_point_ops({}) == 0


def test_the_log_begins_with_the_validation_before_training(notebook, tiny_config, task, tokenized, tmp_path):
    trainer = notebook.train_within_memory(tiny_config, task, tokenized, tmp_path / "run")
    scored = [row for row in trainer.state.log_history if "eval_loss" in row]
    assert [row["step"] for row in scored] == [0, 5, 10, 15]
    assert scored[0]["eval_loss"] == pytest.approx(np.log(2), abs=0.1)


def test_gradients_stay_where_they_are_between_steps(notebook, tiny_config, task, tokenized, tmp_path):
    """A graph writes to fixed addresses, also when only some of the steps are captured."""
    places = []

    class Note(notebook.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            trained = [each for each in model.parameters() if each.requires_grad]
            places.append([each.grad.data_ptr() for each in trained])  # there, after they were set to zero
            assert not any(each.grad.any() for each in trained)

    arguments = notebook.training_arguments(tiny_config, tmp_path, **notebook.QUIET | {"max_steps": 3})
    model = notebook.build_qlora(tiny_config, task)
    notebook.make_trainer(model, tiny_config, arguments, task.tokenizer, tokenized["train"], callbacks=[Note()]).train()
    assert len(places) == 3 and places[0] == places[1] == places[2]


def test_8_bit_adam_trains_on_a_cpu(notebook, tiny_config, task, tokenized, tmp_path):
    """At rank 64 the adapters are large enough to be averaged in 8 bits."""
    changes = {
        "optim": "adamw_8bit",
        "lora_r": 64,
        "lora_alpha": 64,
        "learning_rate": 2e-2,
        "num_train_epochs": 12.0,
    }
    config = tiny_config.model_copy(update=changes)
    quiet = notebook.QUIET | {"logging_strategy": "epoch"}
    arguments = notebook.training_arguments(config, tmp_path, **quiet)
    few = tokenized["train"].select(range(64))
    trainer = notebook.make_trainer(notebook.build_qlora(config, task), config, arguments, task.tokenizer, few)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    states = trainer.optimizer.optimizer.state.values()
    assert torch.uint8 in {state["state1"].dtype for state in states}
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize(("now", "peak"), [(300e6, 700.0), (900e6, 900.0)])
def test_peak_seconds_and_steps_of_before_the_interruption_count_on(notebook, monkeypatch, now, peak):
    """Without a GPU: PyTorch's counter and the clock are played."""
    clock = iter([100.0, 107.0])
    monkeypatch.setattr(notebook.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: now)
    before = {
        "eval_loss": 1.0,
        "train_seconds": 20.0,
        "steps_all": 50,
        "steps_captured": 40,
        "peak_mb": 700.0,
    }
    state = SimpleNamespace(log_history=[before, {"loss": 1.0}])
    record = notebook.TrainingRecord(SimpleNamespace(steps={"all": 6, "captured": 3}), {})
    record.on_train_begin(None, state, None)
    state.log_history.append({"eval_loss": 0.5})
    record.on_log(None, state, None, logs=state.log_history[-1])
    cost = {"train_seconds": 27.0, "steps_all": 56, "steps_captured": 43, "peak_mb": peak}
    assert state.log_history[-1] == {"eval_loss": 0.5} | cost
