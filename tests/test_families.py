"""Each family of encoders, as a tiny random model: query and value found, one step trained, saved, reloaded, merged."""

import gc
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from notebook_api import import_definitions
from transformers import AutoConfig, AutoModel

nb = import_definitions()
SHAPE = {"vocab_size": 30522, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SHAPE |= {"intermediate_size": 128, "max_position_embeddings": 130}
IDS = {"bos_token_id": 101, "cls_token_id": 101, "eos_token_id": 102, "sep_token_id": 102, "pad_token_id": 0}
RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
FUNNEL = {"architectures": ["FunnelModel"], "block_sizes": [1, 1]}
FUNNEL |= {"d_model": 64, "n_head": 2, "d_head": 32, "d_inner": 128}
USUAL = ("query value", "classifier")
FAMILIES = {name: (*USUAL, {}) for name in ("bert", "roberta", "xlm-roberta", "camembert", "ernie")}
FAMILIES |= {name: (*USUAL, {"embedding_size": 64}) for name in ("electra", "albert", "convbert", "roformer")}
FAMILIES |= {name: ("q_lin v_lin", "sequence_summary", {}) for name in ("flaubert", "xlm")}
FAMILIES |= {  # query and value, head, what the configuration has besides the shape
    "rembert": (*USUAL, {"input_embedding_size": 64, "output_embedding_size": 64}),
    "mpnet": ("q v", "classifier", {}),
    "distilbert": ("q_lin v_lin", "pre_classifier classifier", {}),
    "deberta-v2": ("query_proj value_proj", "pooler classifier", RELATIVE),
    "eurobert": ("q_proj v_proj", "dense classifier", IDS),
    "nomic_bert": ("q_proj v_proj", "classifier pooler", {"head_dim": 32}),
    "modernbert": ("Wqkv", "head classifier", IDS),
    "funnel": ("q_head v_head", "classifier", FUNNEL),
}
KNOWN = [name for name in FAMILIES if name in transformers.CONFIG_MAPPING]  # of this version of transformers
TEXTS = [f"a film of {n} {'good' if n % 2 else 'bad'} minutes{' and more' * n}" for n in range(8)]
ALL_LINEAR = [(name, "all-linear") for name in ("bert", "deberta-v2", "mpnet")]
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def make_family(name):
    """Return a tiny random model of a family."""
    torch.manual_seed(0)
    shape = {"vocab_size": 30522} if name == "funnel" else SHAPE
    return AutoModel.from_config(AutoConfig.for_model(name, **shape | FAMILIES[name][2]))


@pytest.fixture
def prepare(tmp_path, offline_model):
    """A function that returns settings and task for a tiny model of a family, and tokens of texts."""
    gc.freeze()  # the Trainer collects garbage: not in what was imported

    def run(name, texts=TEXTS, cuda=False, **changes):
        make_family(name).save_pretrained(tmp_path / "model")
        transformers.AutoTokenizer.from_pretrained(offline_model).save_pretrained(tmp_path / "model")
        settings = {"preset": "full", "model_name": str(tmp_path / "model"), "max_length": 32, "warmup_ratio": 0}
        settings |= {"lora_r": 4, "lora_alpha": 8, "learning_rate": 1e-3, "output_dir": str(tmp_path)} | changes
        tokenizer, head, _, config = nb.check_model(nb.resolve_config(settings, {}, cuda)[0])
        rows = nb.Dataset.from_dict(nb.encode(texts, tokenizer, config)[0] | {"label": [0, 1] * (len(texts) // 2)})
        return config, nb.Task(tokenizer, ["bad", "good"], head), rows

    return run


def make_trainer(config, task, rows, **changes):
    arguments = nb.training_arguments(config, Path(config.output_dir) / "run", **nb.QUIET | changes)
    return nb.make_trainer(nb.build_qlora(config, task), config, arguments, task.tokenizer, rows)


@pytest.mark.parametrize("name", KNOWN)
def test_a_family_learns_and_is_the_same_saved_reloaded_and_merged(tmp_path, prepare, monkeypatch, name):
    calls, checkpoint = [], torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda *a, **k: calls.append(1) or checkpoint(*a, **k))
    config, task, rows = prepare(name)
    assert (" ".join(config.target_modules), " ".join(task.head)) == FAMILIES[name][:2]
    trainer = make_trainer(config, task, rows, max_steps=1)
    trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    learned = {n.split(".lora_B")[0] for n, p in trained.items() if "lora_B" in n and p.abs().sum() > 0}
    assert learned == {n.removesuffix(".lora_A") for n, _ in model.named_modules() if n.endswith(".lora_A")}
    assert {n.split(".")[-1] for n in learned} == {*config.target_modules} and len(calls) >= 2  # layers recomputed
    assert all("lora_" in n or n.split(".modules_to_save")[0].split(".")[-1] in task.head for n in trained)

    model.save_pretrained(tmp_path / "adapter")
    others = [load(tmp_path / "adapter", config, task) for load in (nb.load_adapter, nb.merge_adapter)]
    logits = [nb.predict_logits(each, TEXTS, config, task.tokenizer) for each in (model, *others)]
    assert np.array_equal(logits[0], logits[1]) and np.abs(logits[0] - logits[2]).max() < 1e-5

    everything = config.model_copy(update={"target_modules": ["all-linear"]})  # section 11's choices
    counts = [nb.trained_at_rank(each, task, r) for each, r in ((config, 1), (config, 4), (everything, 4))]
    assert 0 < counts[0] < counts[1] == nb.storage(model).loc["all", "trained"] < counts[2]
    for each in (trainer, make_trainer(everything, task, rows)):  # a GPU's autocast: DeBERTa's mask overflowed
        with torch.autocast(each.model.device.type, torch.float16, cache_enabled=False):
            inputs = task.tokenizer(TEXTS[:2], return_tensors="pt", padding=True) | {"labels": torch.tensor([0, 1])}
            loss = each.model.train()(**{name: tensor.to(each.model.device) for name, tensor in inputs.items()}).loss
        loss.backward()
        assert loss.isfinite()


@on_gpu
@pytest.mark.parametrize("preset", ["", "fast", "lean"])
@pytest.mark.parametrize(("name", "targets"), [(name, "query,value") for name in KNOWN] + ALL_LINEAR)
def test_on_a_gpu_a_family_is_captured_or_eager_with_one_line(prepare, capsys, name, preset, targets):
    changes = {"preset": preset, "target_modules": targets, "num_train_epochs": 2, "max_length": 64}
    config, task, rows = prepare(name, TEXTS * 32, cuda=True, **changes)
    trainer = make_trainer(config, task, rows)
    loss = trainer.train().training_loss
    said = [line for line in capsys.readouterr().out.splitlines() if "No CUDA graphs" in line]
    assert np.isfinite(loss) and bool(trainer.steps["captured"]) != bool(said) and len(said) < 2
    print(f"{name} {preset or 'default'} {targets}: {dict(trainer.steps)} {said}")


OTHERS = [{"model_type": name} for name in [*sorted(nb.UNFIT), "canine", "gpt2", "llama", "t5", "xlnet"]]


@pytest.mark.parametrize("about", [*OTHERS, {"model_type": "bert", "is_decoder": True}], ids=lambda e: e["model_type"])
def test_what_cannot_work_is_refused_by_name_before_its_weights_are_read(tmp_path, about):
    for file, content in {"config.json": json.dumps(about), "model.safetensors": "", "tokenizer.json": "{}"}.items():
        (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=f"is a {about['model_type']} model. Allowed: encoders"):
        nb.open_checkpoint(nb.Config(model_name=str(tmp_path)))
