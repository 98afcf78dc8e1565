"""What only a CUDA GPU shows: captured steps, their dropout, memory that runs out."""

import functools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from notebook_api import import_definitions
from tokenizers import Tokenizer, models
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
from transformers.trainer_utils import SaveStrategy

nb = import_definitions()
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA GPU"
)
NAMES = ["no", "yes"]
HEAD = ["classifier"]
PRESETS = ["", "fast", "lean", "recommended"]


def make_bert(folder, dropout=0.0, hidden_size=128, intermediate_size=256, layers=2):
    """Save a BERT with random weights, and a tokenizer that can pad, in `folder`."""
    torch.manual_seed(0)
    about = BertConfig(
        vocab_size=1000,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=intermediate_size,
        max_position_embeddings=128,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    BertModel(about).save_pretrained(folder)
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "[UNK]")),
        pad_token="[PAD]",
    )
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(folder)
    return str(folder)


def random_texts(count, shortest=8):
    """Return texts of up to 120 random tokens, the first of which gives the label."""
    random = np.random.default_rng(0)
    ids = []
    for _ in range(count):
        length = random.integers(shortest, 121)
        ids.append(random.integers(4, 1000, length).tolist())
    return nb.Dataset.from_dict(
        {
            "input_ids": ids,
            "attention_mask": [[1] * len(text) for text in ids],
            "label": [int(text[0] >= 500) for text in ids],
            "length": [len(text) for text in ids],
        }
    )


def make_config(bert, folder, **changes):
    """Return settings for a GPU; dropout is off unless `changes` say otherwise."""
    settings = {
        "model_name": bert,
        "output_dir": str(folder),
        "max_length": 128,
        "lora_dropout": 0,
        "learning_rate": 1e-3,
    }
    settings.update(changes)
    config, _ = nb.resolve_config(settings, {}, cuda=True)
    return config


def load_tokenizer(config):
    return PreTrainedTokenizerFast.from_pretrained(config.model_name)


def make_trainer(config, rows):
    """Return a Trainer that does nothing but train."""
    arguments = nb.brief_arguments(config, Path(config.output_dir) / "run")
    model = nb.build_qlora(config, NAMES, HEAD)
    return nb.make_trainer(model, config, arguments, load_tokenizer(config), rows)


def train_with_losses(config, rows):
    """Train; return the Trainer and the loss of each micro-batch."""
    trainer = make_trainer(config, rows)
    step = trainer.training_step
    losses = []

    def training_step(*arguments):
        loss = step(*arguments)
        losses.append(loss)
        return loss

    trainer.training_step = training_step
    trainer.train()
    trainer.training_step = step  # which has counted
    return trainer, torch.stack(losses).double().cpu()


def trained_vector(model):
    """Return all trained parameters in one vector."""
    parameters = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameters.append(parameter.detach().flatten().double().cpu())
    return torch.cat(parameters)


@pytest.mark.parametrize("preset", PRESETS)
def test_captured_steps_equal_eager_ones_to_the_last_digit(tmp_path, preset):
    bert = make_bert(tmp_path / "bert")
    rows = random_texts(1200)
    config = make_config(bert, tmp_path, preset=preset, num_train_epochs=2)
    captured, losses = train_with_losses(config, rows)
    config = config.model_copy(update={"cuda_graphs": False})
    eager, eager_losses = train_with_losses(config, rows)
    assert nb.captured_share(captured) > 0.8
    assert nb.captured_share(eager) == 0
    assert len(losses) >= 64
    assert torch.equal(losses, eager_losses)
    assert torch.equal(trained_vector(captured.model), trained_vector(eager.model))


@pytest.mark.parametrize("preset", PRESETS)
def test_captured_steps_drop_what_eager_ones_drop(tmp_path, preset):
    bert = make_bert(tmp_path / "bert", dropout=0.3)
    rows = random_texts(640)
    config = make_config(
        bert, tmp_path, preset=preset, lora_dropout=0.3, num_train_epochs=1
    )
    captured, losses = train_with_losses(config, rows)
    config = config.model_copy(update={"cuda_graphs": False})
    eager, eager_losses = train_with_losses(config, rows)
    assert nb.captured_share(captured) > 0.7
    assert nb.captured_share(eager) == 0
    assert (losses - eager_losses).abs().max() < 1e-5


def test_each_replay_has_its_own_loss(tmp_path):
    config = make_config(make_bert(tmp_path / "bert"), tmp_path, num_train_epochs=1)
    trainer, losses = train_with_losses(config, random_texts(640))
    assert nb.captured_share(trainer) > 0.8
    assert len(set(losses.tolist())) > 0.9 * len(losses)


def first_state_alone(layer, dropout):
    """Let a layer draw its dropout from the first of the two states of each call."""
    forward = layer.forward

    @functools.wraps(forward)
    def run(*arguments, **options):
        first, _ = dropout()
        with first:
            return forward(*arguments, **options)

    layer.forward = run


def adapter_gradients(config, kind):
    """Return the adapters' gradients of layers that are "kept" or "recomputed".

    "spoiled": recomputed with dropout of another seed.
    """
    model = nb.build_qlora(config, NAMES, HEAD).train()
    if kind == "kept":
        dropout = nb.DropoutStates()
        for layer in model.base_model.model.bert.encoder.layer:
            first_state_alone(layer, dropout)
    else:
        dropout = model.dropout_states
    adapters = []
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            adapters.append(parameter)
        if "lora_B" in name:
            parameter.data.fill_(0.01)
    ids = torch.arange(4, 84, device="cuda").reshape(2, 40)
    labels = torch.tensor([0, 1], device="cuda")
    for _ in range(2):  # the second time, all pairs of states exist
        model.zero_grad()
        torch.manual_seed(0)
        dropout.start(7)
        if kind == "spoiled":
            for _, second in dropout.pairs:
                second.manual_seed(1)
        model(input_ids=ids, labels=labels).loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in adapters])


def test_a_recomputed_layer_drops_the_same_values(tmp_path):
    bert = make_bert(tmp_path / "bert", dropout=0.3)
    config = make_config(bert, tmp_path, preset="lean")
    without = config.model_copy(update={"gradient_checkpointing": False})
    kept = adapter_gradients(without, "kept")
    recomputed = adapter_gradients(config, "recomputed")
    spoiled = adapter_gradients(config, "spoiled")
    assert (recomputed - kept).norm() < 1e-3 * kept.norm()
    assert (spoiled - kept).norm() > 1e-2 * kept.norm()


def train_and_resume(config, rows):
    """Train 20 steps; then again from step 10 on. Return both Trainers."""
    whole = make_trainer(config, rows)
    whole.args.save_strategy = SaveStrategy.EPOCH
    whole.train()
    resumed = make_trainer(config, rows)
    checkpoint = Path(config.output_dir) / "run" / "checkpoint-10"
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert whole.state.global_step == resumed.state.global_step == 20
    return whole, resumed


def test_a_resumed_training_ends_as_an_uninterrupted_one(tmp_path, capsys):
    bert = make_bert(tmp_path / "bert", dropout=0.3)
    config = make_config(bert, tmp_path, lora_dropout=0.3, num_train_epochs=2)
    whole, resumed = train_and_resume(config, random_texts(320))
    difference = trained_vector(resumed.model) - trained_vector(whole.model)
    assert difference.abs().max() < 1e-6
    assert nb.captured_share(whole) > 0.8
    assert nb.captured_share(resumed) > 0.8
    assert "No CUDA graphs" not in capsys.readouterr().out


def test_where_capturing_fails_training_goes_on_and_can_be_resumed(
    tmp_path, capsys, monkeypatch
):
    capture_graph = nb.capture_graph

    def capture_a_wait(step, *arguments):
        def waiting_step(inputs):
            loss = step(inputs)
            return loss + torch.ones(1, device="cuda").item()  # no graph can hold it

        return capture_graph(waiting_step, *arguments)

    monkeypatch.setattr(nb, "capture_graph", capture_a_wait)
    bert = make_bert(tmp_path / "bert", dropout=0.3)
    config = make_config(bert, tmp_path, lora_dropout=0.3, num_train_epochs=2)
    whole, resumed = train_and_resume(config, random_texts(320))
    difference = trained_vector(resumed.model) - trained_vector(whole.model)
    assert difference.abs().max() < 1e-6
    assert nb.captured_share(whole) == 0
    assert nb.captured_share(resumed) == 0
    assert capsys.readouterr().out.count("No CUDA graphs") == 2  # once each


@pytest.mark.parametrize("preset", ["", "fast"])
def test_steps_with_class_weights_are_captured(tmp_path, preset):
    bert = make_bert(tmp_path / "bert")
    config = make_config(bert, tmp_path, preset=preset, class_weights="balanced")
    trainer = make_trainer(config, random_texts(1600))
    trainer.train()
    assert nb.captured_share(trainer) > 0.8


@pytest.mark.parametrize("preset", PRESETS)
def test_a_run_is_captured_scored_and_merged(tmp_path, preset):
    bert = make_bert(tmp_path / "bert")
    config = make_config(bert, tmp_path, preset=preset, num_train_epochs=3)
    tokenized = nb.DatasetDict(train=random_texts(3200), validation=random_texts(64))
    clock = nb.Clock()
    tokenizer = load_tokenizer(config)
    folder = tmp_path / "run"
    trainer = nb.train_qlora(config, NAMES, HEAD, tokenizer, tokenized, folder, [clock])
    summary = nb.training_summary(trainer, 3200)
    assert summary["captured_share"] >= 0.95
    assert summary["peak_mb"] > 1
    assert len([row for row in summary["history"] if "eval_accuracy" in row]) == 4

    nb.keep_finished(trainer, summary, "base", folder / "finished")
    adapter = folder / "finished" / "adapter"
    reloaded = nb.load_adapter(adapter, config, NAMES, HEAD)
    merged = nb.merge_adapter(adapter, config, NAMES, HEAD)
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.float32}
    ids = torch.arange(4, 84, device="cuda").reshape(2, 40)
    with torch.inference_mode():
        trained_logits = trainer.model.eval()(input_ids=ids).logits.float()
        reloaded_logits = reloaded.eval()(input_ids=ids).logits.float()
        merged_logits = merged(input_ids=ids).logits.float()
    assert torch.allclose(trained_logits, reloaded_logits, atol=1e-3)
    assert torch.allclose(reloaded_logits, merged_logits, atol=3e-2, rtol=1e-2)


def test_every_method_of_section_10_is_measured(tmp_path):
    bert = make_bert(tmp_path / "bert")
    config = make_config(bert, tmp_path, preset="fast", efficiency_steps=3)
    full = config.model_copy(
        update={
            "frozen_dtype": "float32",
            "gradient_checkpointing": False,
            "optim": "adamw_torch_fused",
        }
    )
    eager = config.model_copy(update={"cuda_graphs": False})
    methods = [
        ("full fine-tuning", nb.build_full, full),
        ("QLoRA, eager", nb.build_qlora, eager),
        ("QLoRA", nb.build_qlora, config),
    ]
    tokenizer = load_tokenizer(config)
    texts = random_texts(64)
    rows = {}
    for name, build, settings in methods:
        row = nb.measure_method(name, build, settings, NAMES, HEAD, tokenizer, texts)
        assert row["measured"], name
        assert row["peak_mb"] > row["weights_mb"] > 0
        assert row["samples_per_second"] > 0
        rows[row["method"]] = row
    assert list(rows) == ["full fine-tuning", "QLoRA, eager", "QLoRA"]
    n_full = rows["full fine-tuning"]["trainable_parameters"]
    assert n_full > 10 * rows["QLoRA"]["trainable_parameters"]


def train_apart(bert, folder, preset, micro_batch, memory):
    """Train 10 steps of 32 texts in a process that gets `memory` bytes (None: all)."""
    multiprocessing.set_start_method("fork", force=True)  # of the loader's workers
    config = make_config(
        bert,
        folder,
        preset=preset,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=32 // micro_batch,
        per_device_eval_batch_size=4,
        gradient_checkpointing=False,
        num_train_epochs=2,
    )
    if memory:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(memory / total)
    tokenized = nb.DatasetDict(
        train=random_texts(160, shortest=70), validation=random_texts(16)
    )
    tokenizer = load_tokenizer(config)
    trainer = nb.within_memory(
        nb.train_qlora, config, NAMES, HEAD, tokenizer, tokenized, Path(folder) / "run"
    )
    return {
        "micro_batch": trainer.args.per_device_train_batch_size,
        "accumulation": trainer.args.gradient_accumulation_steps,
        "steps": trainer.state.global_step,
        "reserved": torch.cuda.max_memory_reserved(),
        "trained": trained_vector(trainer.model).numpy(),
    }


@pytest.mark.parametrize("preset", ["", "fast"])
def test_on_a_full_gpu_the_micro_batch_shrinks_and_the_training_stays(tmp_path, preset):
    """The allocator gets more than 16 texts need, and less than 32 do."""
    bert = make_bert(
        tmp_path / "bert", hidden_size=256, intermediate_size=1024, layers=8
    )
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, context, max_tasks_per_child=1) as pool:

        def start(name, micro_batch, memory=None):
            folder = str(tmp_path / name)
            return pool.submit(train_apart, bert, folder, preset, micro_batch, memory)

        half_run = start("half", 16)
        whole_run = start("whole", 32)
        half = half_run.result()
        whole = whole_run.result()
        between = (half["reserved"] + whole["reserved"]) / 2
        shrunk = start("shrunk", 32, between).result()
    assert whole["reserved"] > 1.2 * half["reserved"]
    assert whole["micro_batch"] == 32
    assert shrunk["micro_batch"] < 32
    assert shrunk["micro_batch"] * shrunk["accumulation"] == 32
    assert shrunk["steps"] == whole["steps"] == 10
    assert np.abs(shrunk["trained"] - whole["trained"]).max() < 0.02
