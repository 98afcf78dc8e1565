"""Section 8, the training: its settings, its loss, class weights, and what is saved."""

import ast
import logging
import os
import sys
import types
import warnings
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from conftest import code_cells
from notebook_api import is_definition
from transformers import BertConfig, BertForSequenceClassification

OPTIONAL = {  # checkpointing, its dropout, frozen tensors in 16 bits, CUDA graphs
    "checkpoint_layers",
    "DropoutStates",
    "keep_compute_dtype",
    "capture_graph",
    "CapturedSteps",
}


def small_bert(positions):
    """Return a classifier of one layer that reads `positions` tokens."""
    return BertForSequenceClassification(
        BertConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=positions,
        )
    )


@pytest.fixture
def skewed(tokenized):
    """75 texts of the first class and 15 of the second, mixed."""
    labels = np.array(tokenized["train"]["label"])
    first = np.flatnonzero(labels == 0)[:75]
    second = np.flatnonzero(labels == 1)[:15]
    rows = np.random.default_rng(0).permutation([*first, *second])
    return tokenized["train"].select(rows)


def test_the_trainer_gets_the_settings(notebook, tmp_path):
    values = {
        "num_train_epochs": 4.5,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 3,
        "per_device_eval_batch_size": 5,
        "train_sampling_strategy": "group_by_length",
        "learning_rate": 3e-4,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.02,
        "optim": "adamw_torch",
        "seed": 7,
        "fp16": False,
    }
    arguments = notebook.training_arguments(notebook.Config(**values), tmp_path)
    brief = notebook.brief_arguments(notebook.Config(**values), tmp_path)
    for name, value in values.items():
        assert getattr(arguments, name) == value, name
        assert getattr(brief, name) == value, name
    assert arguments.output_dir == str(tmp_path)


def test_fp16_reaches_the_trainer(notebook, tmp_path):
    assert notebook.training_arguments(notebook.Config(fp16=True), tmp_path).fp16


def test_nothing_is_uploaded_or_checkpointed_twice(notebook, tmp_path):
    """The notebook uploads, logs and checkpoints by itself."""
    config = notebook.Config(gradient_checkpointing=True, push_to_hub="me/mine")
    arguments = notebook.training_arguments(config, tmp_path)
    assert not arguments.push_to_hub
    assert not arguments.report_to
    assert not arguments.gradient_checkpointing


@pytest.mark.parametrize(("ratio", "steps"), [(0.1, 20), (0.25, 50), (0.0, 0)])
def test_the_warm_up_is_a_share_of_the_steps(notebook, tmp_path, ratio, steps):
    config = notebook.Config(warmup_ratio=ratio)
    arguments = notebook.training_arguments(config, tmp_path)
    assert arguments.get_warmup_steps(200) == steps


def test_a_brief_training_leaves_nothing_behind(
    notebook, tiny_config, names, head, tokenizer, tokenized, tmp_path
):
    arguments = notebook.brief_arguments(tiny_config, tmp_path / "brief")
    arguments.max_steps = 1
    trainer = notebook.make_trainer(
        notebook.build_qlora(tiny_config, names, head),
        tiny_config,
        arguments,
        tokenizer,
        tokenized["train"],
    )
    trainer.train()
    assert not list(tmp_path.glob("brief/*"))
    assert [row for row in trainer.state.log_history if "loss" in row] == []


VISIBLE_GPUS = [
    ({}, "0"),
    ({"CUDA_VISIBLE_DEVICES": "0,1"}, "0"),
    ({"CUDA_VISIBLE_DEVICES": "3,1"}, "3"),
    ({"CUDA_VISIBLE_DEVICES": ""}, ""),
    ({"CUDA_VISIBLE_DEVICES": "0,1", "LOCAL_RANK": "1"}, "0,1"),  # one of several
]


@pytest.mark.parametrize(("environ", "visible"), VISIBLE_GPUS)
def test_a_process_by_itself_sees_one_gpu(tmp_path, monkeypatch, environ, visible):
    """Kaggle has two: Trainer would take both by DataParallel, which 4 bits break."""
    (cell,) = [cell for cell in code_cells() if "first_gpu =" in cell.source]
    monkeypatch.setattr(os, "environ", environ.copy())
    monkeypatch.setattr(logging.Logger, "addFilter", MagicMock())
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        exec(cell.source, {})
    assert os.environ["CUDA_VISIBLE_DEVICES"] == visible


PADDING = [
    (False, 32, 128, None),
    (True, 32, 128, 64),
    (True, 64, 64, 64),
    (True, 90, 100, None),  # 128 would be more than it reads
    (True, 100, 128, 64),
]


@pytest.mark.parametrize(("on_gpu", "length", "positions", "multiple"), PADDING)
def test_batches_are_padded_for_graphs_within_the_models_positions(
    notebook, tiny_config, monkeypatch, on_gpu, length, positions, multiple
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    config = tiny_config.model_copy(update={"max_length": length})
    assert notebook.padding_multiple(config, small_bert(positions)) == multiple


def test_one_process_captures_its_steps(notebook, tiny_config, monkeypatch):
    steps = MagicMock()
    monkeypatch.setattr(notebook, "CapturedSteps", steps)
    trainer = MagicMock()
    trainer.args.world_size = 1
    config = tiny_config.model_copy(update={"cuda_graphs": True})
    notebook.prepare_steps(trainer, config)
    steps.assert_called_once_with(trainer, True)
    assert trainer.training_step is steps.return_value


def test_several_processes_take_trainers_own_steps(notebook, tiny_config, monkeypatch):
    """Ours go around DistributedDataParallel: each process would train by itself."""
    steps = MagicMock()
    monkeypatch.setattr(notebook, "CapturedSteps", steps)
    trainer = MagicMock()
    trainer.args.world_size = 2
    config = tiny_config.model_copy(update={"cuda_graphs": True})
    notebook.prepare_steps(trainer, config)
    steps.assert_not_called()


def first_step(notebook, config, names, head, tokenizer, rows):
    """Return the gradients and the loss of the first optimizer step."""
    gradients = {}

    class Keep(notebook.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and parameter.grad.abs().max() > 0:
                    gradients[name] = parameter.grad.clone()

    arguments = notebook.brief_arguments(config, config.output_dir)
    arguments.max_steps = 1
    arguments.max_grad_norm = 0.0
    trainer = notebook.make_trainer(
        notebook.build_qlora(config, names, head),
        config,
        arguments,
        tokenizer,
        rows,
        callbacks=[Keep()],
    )
    return gradients, trainer.train().training_loss


@pytest.mark.parametrize("class_weights", ["none", "balanced"])
def test_32_x_1_and_16_x_2_have_the_same_gradients(
    notebook, tiny_config, names, head, tokenizer, skewed, class_weights
):
    results = []
    for micro_batch, accumulation in ((32, 1), (16, 2)):
        parts = {
            "per_device_train_batch_size": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "class_weights": class_weights,
        }
        config = tiny_config.model_copy(update=parts)
        results.append(first_step(notebook, config, names, head, tokenizer, skewed))
    (gradients, loss), (other_gradients, other_loss) = results
    assert loss == pytest.approx(np.log(2), abs=0.1)
    assert other_loss == pytest.approx(loss, abs=1e-4)
    assert len(gradients) == 2 * 2 + 2  # each lora_B, and the head; A's B is still 0
    for name, gradient in gradients.items():
        other = other_gradients[name]
        assert torch.allclose(gradient, other, rtol=1e-3, atol=1e-6), name


def test_balanced_classes_weigh_the_same_in_all_and_texts_1_on_average(notebook):
    labels = np.array([0] * 75 + [1] * 15)
    weights = notebook.balanced_weights(labels, 2, "cpu")
    assert weights[1] / weights[0] == pytest.approx(75 / 15)
    assert weights[labels].mean() == pytest.approx(1)


def test_the_validation_loss_has_the_class_weights(
    notebook, tiny_config, tokenizer, skewed, tmp_path
):
    config = tiny_config.model_copy(update={"class_weights": "balanced"})
    trainer = notebook.make_trainer(
        small_bert(64),
        config,
        notebook.brief_arguments(config, tmp_path),
        tokenizer,
        skewed,
        skewed,
    )
    scores = trainer.evaluate()
    logits = torch.from_numpy(trainer.predict(skewed).predictions)
    labels = torch.tensor(skewed["label"])
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    weighted = (trainer.class_weights[labels] * losses).mean().item()
    assert scores["eval_loss"] == pytest.approx(weighted, abs=1e-5)
    assert abs(losses.mean().item() - weighted) > 1e-4  # it is another without


def labels_of(counts):
    return np.repeat(np.arange(len(counts)), counts)


@pytest.mark.parametrize(
    ("n_texts", "epochs"), [(32, 300), (960, 10), (970, 10), (3200, 3), (16000, 3)]
)
def test_few_texts_get_more_epochs(notebook, n_texts, epochs):
    """Each is one step of 32; 970 texts make 31."""
    labels = labels_of([n_texts // 2] * 2)
    config = notebook.fit_to_data(notebook.Config(), {}, labels)
    assert config.num_train_epochs == epochs
    assert notebook.fit_to_data(config, {}, labels) == config


def test_epochs_that_were_set_stay(notebook):
    config = notebook.Config(num_train_epochs=2)
    for source in ("num_train_epochs", "QLORA_NUM_TRAIN_EPOCHS", "preset demo"):
        fitted = notebook.fit_to_data(
            config, {"num_train_epochs": source}, labels_of([16, 16])
        )
        assert fitted == config


@pytest.mark.parametrize(
    ("counts", "weights", "best"),
    [
        ([300, 100], "none", "accuracy"),
        ([301, 100], "none", "f1_macro"),
        ([200, 301, 100], "none", "f1_macro"),
        ([100, 100], "balanced", "f1_macro"),
    ],
)
def test_macro_f1_chooses_the_epoch_where_classes_are_unequal(
    notebook, counts, weights, best, capsys
):
    config = notebook.Config(class_weights=weights)
    config = notebook.fit_to_data(config, {}, labels_of(counts))
    assert config.metric_for_best_model == best
    assert ("macro F1 selects" in capsys.readouterr().out) == (best == "f1_macro")


def test_a_measure_that_was_set_stays(notebook):
    sources = {"metric_for_best_model": "metric_for_best_model"}
    config = notebook.fit_to_data(notebook.Config(), sources, labels_of([900, 100]))
    assert config.metric_for_best_model == "accuracy"


def test_tfidf_weighs_the_classes_as_training_does(notebook):
    texts = ["film"] * 33
    labels = [0] * 30 + [1] * 3
    train = {"text": texts, "label": labels}
    plain = notebook.fit_tfidf(train)
    weighed = notebook.fit_tfidf(train, "balanced")
    assert plain.predict_proba(["film"])[0, 1] < 0.2
    assert weighed.predict_proba(["film"])[0, 1] == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("best", ["accuracy", "f1_macro"])
def test_the_best_epoch_is_that_of_the_score_that_counts(notebook, tmp_path, best):
    config = notebook.Config(metric_for_best_model=best)
    arguments = notebook.training_arguments(config, tmp_path)
    assert arguments.metric_for_best_model == best
    assert arguments.load_best_model_at_end


@pytest.fixture(scope="module")
def plain():
    """The notebook's definitions without those of its optional folded cells."""
    module = types.ModuleType("plain_notebook")
    sys.modules[module.__name__] = module  # pydantic looks names up there
    left_out = set()
    for cell in code_cells():
        tree = ast.parse(cell.source)
        defined = {getattr(statement, "name", None) for statement in tree.body}
        if defined & OPTIONAL:
            assert "plumbing" in cell.metadata["tags"]
            left_out |= defined & OPTIONAL
            continue
        tree.body = [statement for statement in tree.body if is_definition(statement)]
        exec(compile(tree, "<plain cell>", "exec"), module.__dict__)
    assert left_out == OPTIONAL
    return module


def test_the_lesson_trains_saves_and_merges_without_the_optional_cells(
    plain, tiny_config, names, head, tokenizer, tokenized, tmp_path
):
    """As it is read, with the folded cells of sections 7 and 8 skipped."""
    assert not tiny_config.cuda_graphs
    assert not tiny_config.gradient_checkpointing
    assert tiny_config.frozen_dtype == "float32"
    trainer = plain.train_qlora(
        tiny_config, names, head, tokenizer, tokenized, tmp_path
    )
    trainer.save_model(tmp_path / "adapter")
    texts = ["a quiet film", "two hours of my life"]
    logits = []
    for model in (
        trainer.model,
        plain.load_adapter(tmp_path / "adapter", tiny_config, names, head),
        plain.merge_adapter(tmp_path / "adapter", tiny_config, names, head),
    ):
        logits.append(plain.predict_logits(model, texts, tiny_config, tokenizer))
    assert trainer.state.global_step == 15  # 160 texts, 16 x 2 a step, 3 epochs
    assert np.array_equal(logits[0], logits[1])
    assert np.abs(logits[0] - logits[2]).max() < 1e-4
