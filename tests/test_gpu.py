"""What only a CUDA GPU shows: captured steps compute what eager ones do, dropout included; and memory that runs out."""

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

nb = import_definitions()
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
SHAPE = {"vocab_size": 1000, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
SHAPE |= {"intermediate_size": 256, "max_position_embeddings": 128}
PRESETS = ["", "fast", "lean"]


def make_bert(folder: Path, dropout: float = 0.0, **changes) -> str:
    """Write a BERT with random weights, and a tokenizer that can pad, to `folder`."""
    torch.manual_seed(0)
    drops = dict.fromkeys(["hidden_dropout_prob", "attention_probs_dropout_prob"], dropout)
    BertModel(BertConfig(**SHAPE | drops | changes)).save_pretrained(folder)
    words = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3}
    tokens = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "[UNK]")), pad_token="[PAD]")
    tokens.model_input_names = ["input_ids", "attention_mask"]
    tokens.save_pretrained(folder)
    return str(folder)


def task_of(bert: str) -> nb.Task:
    return nb.Task(PreTrainedTokenizerFast.from_pretrained(bert), ["no", "yes"], ["classifier"])


def rows_of(n: int, shortest: int = 8) -> nb.Dataset:
    """Return `n` texts of random tokens, up to 120 of them; the label can be read off the first one."""
    rng = np.random.default_rng(0)
    ids = [rng.integers(4, 1000, rng.integers(shortest, 121)).tolist() for _ in range(n)]
    masks, labels = [[1] * len(each) for each in ids], [int(each[0] >= 500) for each in ids]
    return nb.Dataset.from_dict({"input_ids": ids, "attention_mask": masks, "label": labels})


def config_for(bert: str, folder: Path, preset: str = "", **changes) -> nb.Config:
    settings = {"preset": preset, "model_name": bert, "max_length": 128, "lora_dropout": 0, "learning_rate": 1e-3}
    return nb.resolve_config(settings | {"output_dir": str(folder)} | changes, {}, cuda=True)[0]


def train(config, rows, **changes):
    """Train on `rows`; return the Trainer and the loss of each micro-batch."""
    arguments = nb.training_arguments(config, Path(config.output_dir) / "run", **nb.QUIET | changes)
    task, losses = task_of(config.model_name), []
    trainer = nb.make_trainer(nb.build_qlora(config, task), config, arguments, task.tokenizer, rows)
    step = trainer.training_step
    trainer.training_step = lambda *args: losses.append(step(*args)) or losses[-1]
    trainer.train()
    return trainer, torch.stack(losses).double().cpu()


def adapter(trainer) -> torch.Tensor:
    """Return all trained parameters in one vector."""
    return torch.cat([p.detach().flatten().double().cpu() for p in trainer.model.parameters() if p.requires_grad])


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_captured_losses_equal_the_eager_ones_to_the_last_digit_with_dropout_almost(tmp_path, preset, dropout):
    """So in a graph, too, a checkpointed layer drops the same values both times it runs."""
    texts, epochs = (640, 1) if dropout else (1200, 2)
    bert, rows, results = make_bert(tmp_path / "bert", dropout), rows_of(texts), []
    for graphs in (True, False):
        config = config_for(bert, tmp_path, preset, cuda_graphs=graphs, num_train_epochs=epochs)
        trainer, losses = train(config, rows)
        results.append((losses, adapter(trainer), trainer.steps))
    (captured, after, steps), (eager, after_eager, steps_eager) = results
    assert (captured - eager).abs().max() < 1e-5 and steps["captured"] and not steps_eager["captured"]
    assert len({*captured.tolist()}) > 0.9 * len(captured)
    if not dropout:
        assert len(captured) >= 64 and torch.equal(captured, eager) and torch.equal(after, after_eager)
        assert steps["captured"] > 0.8 * steps["all"] == 0.8 * len(captured)


def test_a_recomputed_layer_drops_the_same_values(tmp_path):
    bert, gradients = make_bert(tmp_path / "bert", dropout=0.3), {}
    ids, labels = torch.arange(4, 84, device="cuda").reshape(2, 40), torch.tensor([0, 1], device="cuda")

    def within(dropout, forward, *args, **kwargs):  # the first of the states that each call is given
        with dropout()[0]:
            return forward(*args, **kwargs)

    for kind in ("kept", "recomputed", "recomputed otherwise"):
        config = config_for(bert, tmp_path, "lean", gradient_checkpointing=kind != "kept")
        model = nb.build_qlora(config, task_of(bert)).train()
        adapters = {name: each for name, each in model.named_parameters() if "lora_" in name}
        for name in [name for name in adapters if "lora_B" in name]:
            adapters[name].data.fill_(0.01)
        dropout = getattr(model, "dropout_states", None) or nb.DropoutStates()
        for layer in model.base_model.model.bert.encoder.layer if kind == "kept" else ():
            layer.forward = functools.partial(within, dropout, layer.forward)
        for _ in range(2):  # the second time all pairs of states exist
            model.zero_grad()
            torch.manual_seed(0)
            dropout.start(7)
            for pair in dropout.pairs if kind == "recomputed otherwise" else ():
                pair[1].manual_seed(1)
            model(input_ids=ids, labels=labels).loss.backward()
        gradients[kind] = torch.cat([each.grad.flatten() for each in adapters.values()])
    size = gradients["kept"].norm()
    assert (gradients["recomputed"] - gradients["kept"]).norm() < 1e-3 * size
    assert (gradients["recomputed otherwise"] - gradients["kept"]).norm() > 1e-2 * size


@pytest.mark.parametrize("broken", [False, True])
def test_resumed_it_ends_as_if_it_had_not_been_interrupted(tmp_path, capsys, broken, monkeypatch):
    """Dropout on, checkpointed; also where the capture fails, in the whole training and in the resumed one."""
    capture = nb.capture_graph

    def fail_within(step, *args):  # it waits for the GPU in its middle, which no graph can hold
        return capture(lambda inputs: step(inputs) + torch.ones(1, device="cuda").item(), *args)

    monkeypatch.setattr(nb, "capture_graph", fail_within if broken else capture)
    bert, rows, options = make_bert(tmp_path / "bert", dropout=0.3), rows_of(320), {"save_strategy": "epoch"}
    config, task = config_for(bert, tmp_path, num_train_epochs=2), task_of(bert)
    whole, _ = train(config, rows, **options)
    assert broken == ("No CUDA graphs" in capsys.readouterr().out) and broken != bool(whole.steps["captured"])
    arguments = nb.training_arguments(config, tmp_path / "run", **nb.QUIET | options)
    resumed = nb.make_trainer(nb.build_qlora(config, task), config, arguments, task.tokenizer, rows)
    resumed.train(str(tmp_path / "run" / "checkpoint-10"))
    assert (adapter(resumed) - adapter(whole)).abs().max() < 1e-6 and resumed.state.global_step == 20


@pytest.mark.parametrize("preset", ["", "fast"])
def test_steps_with_class_weights_are_captured(tmp_path, preset):
    config = config_for(make_bert(tmp_path / "bert"), tmp_path, preset, class_weights="balanced")
    trainer, _ = train(config, rows_of(1600))
    assert trainer.steps["captured"] > 0.8 * trainer.steps["all"]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_run_is_captured_scored_and_merged(tmp_path, preset):
    bert = make_bert(tmp_path / "bert")
    config, task = config_for(bert, tmp_path, preset, num_train_epochs=3), task_of(bert)
    tokenized = nb.DatasetDict(train=rows_of(3200), validation=rows_of(64))
    trainer = nb.train_within_memory(config, task, tokenized, tmp_path / "run")
    cost = [row for row in trainer.state.log_history if "train_seconds" in row][-1]
    assert cost["steps_captured"] >= 0.95 * cost["steps_all"] and cost["peak_mb"] > 1
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    model.save_pretrained(tmp_path / "adapter")
    merged = nb.merge_adapter(tmp_path / "adapter", config, task)
    assert not any(isinstance(each, torch.nn.Embedding) and each.weight.dtype.itemsize < 4 for each in merged.modules())
    ids = {"input_ids": torch.arange(4, 84, device="cuda").reshape(2, 40)}
    with torch.inference_mode():
        answers = [each.eval()(**ids).logits.float() for each in (model, merged)]
    assert torch.allclose(*answers, atol=3e-2)


def test_every_method_of_section_10_is_measured(tmp_path):
    bert = make_bert(tmp_path / "bert")
    config = config_for(bert, tmp_path, "fast", efficiency_steps=3)
    rows = {n: nb.measure_method(*m, task_of(bert), rows_of(64)) for n, m in nb.methods(config, True).items()}
    assert len(rows) == 7 and all(row["measured"] and row["peak_mb"] > row["weights_mb"] > 0 for row in rows.values())
    assert rows["full fp16"]["trainable_parameters"] > 10 * rows["QLoRA default"]["trainable_parameters"]


def train_apart(bert: str, folder: str, preset: str, micro: int, cap: float | None) -> dict:
    """Train 10 steps of 32 texts, `micro` at a time, under a cap on the allocator, in a process of its own."""
    multiprocessing.set_start_method("fork", force=True)  # or the loaders' workers would import everything anew
    batch = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": 32 // micro}
    batch |= {"per_device_eval_batch_size": 4, "gradient_checkpointing": False, "num_train_epochs": 2}
    config, task = config_for(bert, Path(folder), preset, **batch), task_of(bert)
    if cap:
        torch.cuda.set_per_process_memory_fraction(cap / torch.cuda.get_device_properties(0).total_memory)
    tokenized = nb.DatasetDict(train=rows_of(160, shortest=70), validation=rows_of(16))
    trainer = nb.train_within_memory(config, task, tokenized, Path(folder) / "run")
    found = {"used": (trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps)}
    found |= {"reserved": torch.cuda.max_memory_reserved(), "steps": trainer.state.global_step}
    return found | {"after": adapter(trainer).numpy()}


@pytest.mark.parametrize("preset", ["", "fast"])
def test_on_a_gpu_that_is_full_the_micro_batch_shrinks(tmp_path, preset):
    """The allocator gets what 16 texts need and 32 do not: as many steps, about the same adapter."""
    bert = make_bert(tmp_path / "bert", hidden_size=256, num_hidden_layers=8, intermediate_size=1024)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:

        def start(micro, cap=None):
            return pool.submit(train_apart, bert, str(tmp_path / f"{micro}-{cap}"), preset, micro, cap)

        half, whole = (run.result() for run in [start(16), start(32)])
        full = start(32, (half["reserved"] + whole["reserved"]) / 2).result()
    assert whole["reserved"] > 1.2 * half["reserved"] and whole["used"] == (32, 1)
    assert full["used"][0] < 32 and full["used"][0] * full["used"][1] == 32 and full["steps"] == whole["steps"] == 10
    assert np.abs(full["after"] - whole["after"]).max() < 0.02
