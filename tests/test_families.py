"""Each family of encoders, as a tiny random model, from its tokenizer to its merger."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from notebook_api import import_definitions
from transformers import AutoConfig, AutoModel, AutoTokenizer

nb = import_definitions()
NAMES = ["bad", "good"]
SHAPE = {
    "vocab_size": 30522,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 130,
}
TOKENS = {
    "bos_token_id": 101,
    "cls_token_id": 101,
    "eos_token_id": 102,
    "sep_token_id": 102,
    "pad_token_id": 0,
}
RELATIVE_POSITIONS = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
}
REMBERT_SIZES = {"input_embedding_size": 64, "output_embedding_size": 64}
FAMILIES = {  # query and value, new modules, what the configuration has besides SHAPE
    "bert": ("query value", "classifier", {}),
    "roberta": ("query value", "classifier", {}),
    "xlm-roberta": ("query value", "classifier", {}),
    "camembert": ("query value", "classifier", {}),
    "ernie": ("query value", "classifier", {}),
    "electra": ("query value", "classifier", {"embedding_size": 64}),
    "albert": ("query value", "classifier", {"embedding_size": 64}),
    "convbert": ("query value", "classifier", {"embedding_size": 64}),
    "roformer": ("query value", "classifier", {"embedding_size": 64}),
    "rembert": ("query value", "classifier", REMBERT_SIZES),
    "flaubert": ("q_lin v_lin", "sequence_summary", {}),
    "xlm": ("q_lin v_lin", "sequence_summary", {}),
    "distilbert": ("q_lin v_lin", "pre_classifier classifier", {}),
    "mpnet": ("q v", "classifier", {}),
    "deberta-v2": ("query_proj value_proj", "pooler classifier", RELATIVE_POSITIONS),
    "eurobert": ("q_proj v_proj", "dense classifier", TOKENS),
    "nomic_bert": ("q_proj v_proj", "classifier pooler", {"head_dim": 32}),
    "modernbert": ("Wqkv", "head classifier", TOKENS),
}
KNOWN = [name for name in FAMILIES if name in transformers.CONFIG_MAPPING]
TEXTS = []
for minutes in range(0, 8, 2):
    TEXTS.append(f"a film of {minutes} bad minutes")
    TEXTS.append(f"a film of {minutes} good minutes and of many, many more")


def make_family(name):
    """Return a tiny random model of a family."""
    torch.manual_seed(0)
    options = dict(SHAPE, **FAMILIES[name][2])
    return AutoModel.from_config(AutoConfig.for_model(name, **options))


def open_family(name, folder, tokenizer_folder, texts=TEXTS, cuda=False, **changes):
    """Save a tiny model of a family in `folder`, and open it as the notebook does."""
    make_family(name).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    settings = {
        "preset": "full",
        "model_name": str(folder),
        "output_dir": str(folder),
        "max_length": 32,
        "warmup_ratio": 0,
        "lora_r": 4,
        "lora_alpha": 8,
        "learning_rate": 1e-3,
    }
    settings.update(changes)
    config, sources = nb.resolve_config(settings, {}, cuda)
    tokenizer, about = nb.open_checkpoint(config)
    config = nb.fit_to_model(config, sources, about)
    _, head = nb.load_published(config, NAMES)
    labels = [0, 1] * (len(texts) // 2)
    split = nb.Dataset.from_dict({"text": texts, "label": labels})
    rows = nb.tokenize(split, tokenizer, config.max_length)
    return SimpleNamespace(
        name=name,
        config=config,
        tokenizer=tokenizer,
        about=about,
        head=head,
        rows=rows,
    )


def make_trainer(opened, config, max_steps=-1):
    """Return a Trainer of an opened family's QLoRA model."""
    arguments = nb.brief_arguments(config, config.output_dir)
    arguments.max_steps = max_steps
    model = nb.build_qlora(config, NAMES, opened.head)
    return nb.make_trainer(model, config, arguments, opened.tokenizer, opened.rows)


def trained_parameters(model):
    """Return the trained parameters by name."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module", params=KNOWN)
def family(request, tmp_path_factory, offline_model):
    """A family after one training step; `recomputed` counts checkpointed layers."""
    folder = tmp_path_factory.mktemp("family")
    opened = open_family(request.param, folder, offline_model)
    checkpoint = torch.utils.checkpoint.checkpoint
    opened.recomputed = 0

    def counted(*arguments, **options):
        opened.recomputed += 1
        return checkpoint(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.utils.checkpoint, "checkpoint", counted)
        opened.trainer = make_trainer(opened, opened.config, max_steps=1)
        opened.trainer.train()
    opened.model = opened.trainer.accelerator.unwrap_model(
        opened.trainer.model, keep_fp32_wrapper=False
    )
    return opened


def test_query_and_value_and_the_new_modules_are_found(family):
    targets, head, _ = FAMILIES[family.name]
    assert family.config.target_modules == targets.split()
    assert family.head == head.split()


def test_each_adapter_learns(family):
    adapted = []
    for name, module in family.model.named_modules():
        if name.endswith(".lora_B"):
            adapted.append(name)
            assert module["default"].weight.abs().sum() > 0, name
    layers = {name.removesuffix(".lora_B").split(".")[-1] for name in adapted}
    assert layers == set(family.config.target_modules)


def test_only_adapters_and_new_modules_are_trained(family):
    for name in trained_parameters(family.model):
        module = name.split(".modules_to_save")[0].split(".")[-1]
        assert "lora_" in name or module in family.head


def test_its_layers_are_recomputed(family):
    assert family.recomputed >= 2


def test_its_logits_can_be_divided_by_a_temperature(family):
    settings = (TEXTS, family.config, family.tokenizer)
    before = nb.predict_logits(family.model, *settings)
    nb.divide_logits(family.model, 2)
    after = nb.predict_logits(family.model, *settings)
    nb.divide_logits(family.model, 0.5)
    assert np.abs(after - before / 2).max() < 1e-6
    assert np.array_equal(before, nb.predict_logits(family.model, *settings))


@pytest.mark.parametrize("frozen_dtype", ["float32", "compute"])
def test_its_frozen_states_are_averaged_over_the_tokens_of_a_text(family, frozen_dtype):
    changes = {"frozen_dtype": frozen_dtype, "bnb_4bit_compute_dtype": "bfloat16"}
    config = family.config.model_copy(update=changes)
    base = nb.load_base(config, NAMES, family.head)
    states = nb.mean_states(base, TEXTS, config, family.tokenizer)
    assert states.shape == (len(TEXTS), 64)
    if family.name == "convbert":  # its convolutions read padding, too
        return
    for text, row in zip(TEXTS, states):
        tokens = family.tokenizer(text, return_tensors="pt").to(base.device)
        with torch.inference_mode():
            alone = base.base_model(**tokens).last_hidden_state[0].float()
        atol = 1e-4 if frozen_dtype == "float32" else 0.1
        assert np.allclose(alone.mean(dim=0).numpy(), row, atol=atol)


def test_it_answers_the_same_reloaded_and_merged(family, tmp_path):
    family.model.save_pretrained(tmp_path)
    reloaded = nb.load_adapter(tmp_path, family.config, NAMES, family.head)
    merged = nb.merge_adapter(tmp_path, family.config, NAMES, family.head)
    settings = (TEXTS, family.config, family.tokenizer)
    logits = nb.predict_logits(family.model, *settings)
    assert np.array_equal(logits, nb.predict_logits(reloaded, *settings))
    assert np.abs(logits - nb.predict_logits(merged, *settings)).max() < 1e-5


@pytest.mark.parametrize("targets", ["query and value", "all-linear"])
def test_its_loss_is_finite_under_autocast(family, targets):
    """In fp16 DeBERTa's mask once overflowed; a CPU's autocast shows it too."""
    trainer = family.trainer
    if targets == "all-linear":
        everything = family.config.model_copy(update={"target_modules": [targets]})
        trainer = make_trainer(family, everything)
    model = trainer.model.train()
    batch = family.tokenizer(TEXTS[:2], return_tensors="pt", padding=True)
    batch["labels"] = torch.tensor([0, 1])
    batch.to(model.device)
    with torch.autocast(model.device.type, torch.float16, cache_enabled=False):
        loss = model(**batch).loss
    loss.backward()
    assert loss.isfinite()


GPU_CASES = [(name, "query,value") for name in KNOWN]
GPU_CASES += [(name, "all-linear") for name in ("bert", "deberta-v2", "mpnet")]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("preset", ["", "fast", "lean"])
@pytest.mark.parametrize(("name", "targets"), GPU_CASES)
def test_on_a_gpu_a_family_is_captured_or_eager_with_one_line(
    tmp_path, offline_model, capsys, name, targets, preset
):
    opened = open_family(
        name,
        tmp_path,
        offline_model,
        texts=TEXTS * 32,
        cuda=True,
        preset=preset,
        target_modules=targets,
        max_length=64,
        num_train_epochs=2,
    )
    trainer = make_trainer(opened, opened.config)
    loss = trainer.train().training_loss
    share = nb.captured_share(trainer)
    said = capsys.readouterr().out.count("No CUDA graphs")
    assert np.isfinite(loss)
    assert (share > 0 and said == 0) or (share == 0 and said == 1)
    print(f"{name} {preset} {targets}: {share:.0%} captured")


UNFIT = [*sorted(nb.UNFIT), "canine", "gpt2", "llama", "t5", "xlnet"]


@pytest.fixture
def model_folder(tmp_path, offline_model):
    """A function that makes a folder with a tokenizer and no weights."""

    def make(**about):
        AutoTokenizer.from_pretrained(offline_model).save_pretrained(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps(about))
        return nb.Config(model_name=str(tmp_path))

    return make


@pytest.mark.parametrize("name", UNFIT)
def test_what_cannot_work_is_refused_by_name_before_weights_are_read(
    model_folder, name
):
    with pytest.raises(ValueError, match=f"is a {name} model. Allowed: encoders"):
        nb.open_checkpoint(model_folder(model_type=name))


def test_a_decoder_of_an_encoders_family_is_refused(model_folder):
    with pytest.raises(ValueError, match="is a bert model. Allowed: encoders"):
        nb.open_checkpoint(model_folder(model_type="bert", is_decoder=True))
