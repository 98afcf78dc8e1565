"""Sections 2, 6, 7 and 9: which models are taken, what is 4-bit, what is trained, what survives saving and merging."""

import importlib.util
import shutil

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
import transformers
from test_families import SHAPE, make_family
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel

THIN = {"target_modules": "all-linear", "frozen_dtype": "compute"}  # by `adapted`, not by PEFT's own forward


@pytest.fixture(scope="module")
def family(tmp_path_factory, offline_model):
    """A function that saves a model, or a tiny one of a family, with a tokenizer of 30,522 tokens; it returns where."""
    tokenizer, folders = AutoTokenizer.from_pretrained(offline_model), {}

    def run(model):
        if model not in folders:
            folders[model] = tmp_path_factory.mktemp("model")
            (make_family(model) if isinstance(model, str) else model).save_pretrained(folders[model])
            tokenizer.save_pretrained(folders[model])
        return folders[model]

    return run


@pytest.fixture
def configure(notebook, tmp_path):
    """A function that returns the settings for a model in a folder, on a CPU."""
    settings = {"preset": "full", "max_length": 32, "lora_r": 4, "lora_alpha": 8, "output_dir": str(tmp_path)}
    resolve = notebook.resolve_config
    return lambda folder, **changes: resolve(settings | {"model_name": str(folder)} | changes, {}, cuda=False)[0]


@pytest.fixture
def refusal(notebook, configure):
    """A function that returns what the refusal of a model says."""

    def run(folder, **changes):
        with pytest.raises(ValueError) as error:
            notebook.check_model(configure(folder, **changes))
        return str(error.value)

    return run


def randomize(model, std=0.05):
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=std)
    return model


def test_an_own_choice_of_layers_is_kept_or_refused_with_the_known_ones(notebook, family, configure, refusal):
    for targets in (["all-linear"], ["dense"], ["attention.self.key"]):
        assert notebook.check_model(configure(family("bert"), target_modules=targets))[3].target_modules == targets
    said = refusal(family("bert"), target_modules="q_lin,query")
    assert "q_lin" in said and all(name in said.split("Allowed")[1] for name in ("query", "key", "dense", "all-linear"))


def test_a_model_without_what_is_needed_is_refused_with_what_is_missing(family, refusal, tmp_path):
    whole, partial = family("bert"), tmp_path / "partial"
    shutil.copytree(whole, partial)
    for path in partial.glob("tokenizer*"):
        path.unlink()
    assert "no tokenizer" in refusal(partial) and str(partial) in refusal(partial)
    (partial / "model.safetensors").rename(partial / "pytorch_model.bin")
    assert "model.safetensors" in refusal(partial) and "code" in refusal(partial)
    assert "config.json" in refusal(whole / "config.json")  # a file is no model
    (tmp_path / "adapter").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json"):
        (tmp_path / "adapter" / name).touch()
    assert "is an adapter. Name its base model, or outputs/merged" in refusal(tmp_path / "adapter")
    for path in family("deberta-v2").glob("tokenizer*"):
        path.rename(path.with_name("spm.model"))
    if not importlib.util.find_spec("sentencepiece"):
        assert "pip install sentencepiece" in refusal(family("deberta-v2"))


@pytest.mark.parametrize("rows", [1000, 30521, 61046])
def test_a_tokenizer_of_another_vocabulary_is_refused_with_both_sizes(family, refusal, rows):
    said = refusal(family(BertModel(BertConfig(**SHAPE | {"vocab_size": rows}))))
    assert "30,522" in said and f"{rows:,}" in said


@pytest.mark.parametrize(("name", "positions"), [("bert", 130), ("roberta", 128), ("mpnet", 128)])
def test_texts_longer_than_the_positions_are_refused(notebook, family, configure, refusal, name, positions):
    folder = family(name)
    said = refusal(folder, max_length=positions + 1)
    assert f"max_length={positions + 1}" in said and str(positions) in said
    config = notebook.check_model(configure(folder, max_length=positions))[3]
    model, _ = notebook.load_classifier(config, ["a", "b"])
    assert notebook.max_positions(model) == positions
    assert model(torch.full((1, positions), 1000)).logits.isfinite().all()


def test_a_checkpoint_without_weights_of_its_encoder_is_refused(family, refusal):
    folder = family(BertModel(BertConfig(**SHAPE)))
    BertConfig(**SHAPE | {"num_hidden_layers": 3}).save_pretrained(folder)
    assert "lacks 16 weights" in refusal(folder) and "encoder.layer.2" in refusal(folder)


DAMAGE = [("config.json", "{"), ("config.json", '{"model_type": "new"}'), ("tokenizer.json", "{")]
DAMAGE += [("model.safetensors", "version https://git-lfs.github.com/spec/v1")]


@pytest.mark.parametrize(("file", "content"), DAMAGE)
def test_a_damaged_model_is_refused_by_name(notebook, family, configure, tmp_path, file, content):
    shutil.copytree(family("bert"), tmp_path / "damaged")
    (tmp_path / "damaged" / file).write_text(content)
    with pytest.raises(ValueError, match="damaged") as error:
        notebook.check_model(configure(tmp_path / "damaged"))
    assert "<code cell" in str(error.traceback[-1].path)


def test_a_masked_language_model_gets_a_head_and_a_pooler_that_are_trained(notebook, family, configure):
    tokenizer, head, _, config = notebook.check_model(configure(family(BertForMaskedLM(BertConfig(**SHAPE)))))
    assert head == ["classifier", "pooler"]
    model = notebook.build_qlora(config, notebook.Task(tokenizer, ["a", "b"], head))
    trained = notebook.storage(model).loc["all", "trained"]
    assert trained == 2 * 2 * 4 * (64 + 64) + 64 * 2 + 2 + 64 * 64 + 64
    assert type(model.get_submodule("base_model.model.bert.pooler.modules_to_save.default.dense")) is torch.nn.Linear


@pytest.mark.parametrize("labels", [2, 3])
def test_a_classifier_as_the_base_gets_a_head_for_the_new_classes(notebook, family, configure, labels):
    folder = family(BertForSequenceClassification(BertConfig(**SHAPE, num_labels=3, problem_type="regression")))
    config = configure(folder)
    assert notebook.check_model(config)[1] == ["classifier"]
    model, _ = notebook.load_classifier(config, ["x", "y", "z"][:labels])
    assert model.classifier.weight.shape == (labels, 64) and model.config.problem_type == "single_label_classification"
    assert model.config.id2label == {0: "x", 1: "y", 2: "z"} if labels == 3 else {0: "x", 1: "y"}


def test_the_seed_decides_the_head(notebook, family, configure):
    configs = [configure(family("bert"), seed=seed) for seed in (1, 1, 2)]
    heads = [notebook.load_classifier(config, ["a", "b"])[0].classifier.weight for config in configs]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_the_levels_are_those_of_bitsandbytes_and_the_nearest_is_taken(notebook):
    code = bnb.functional.get_4bit_type("nf4", device="cpu").double().numpy()
    assert np.abs(notebook.nf4_levels() - code).max() < 1e-6
    numbers, scales = notebook.to_nearest(np.array([[0.2, -2.0, 0.9], [0.5, 1.0, 0.0]]), np.array([-1.0, 0, 0.5, 1]))
    assert numbers.tolist() == [[1, 0, 2], [2, 3, 1]] and scales.tolist() == [[2.0], [1.0]]


@pytest.fixture
def bert(notebook, family, configure):
    """A function that returns settings and task for the tiny BERT."""

    def run(**changes):
        tokenizer, head, _, config = notebook.check_model(configure(family("bert"), **changes))
        return config, notebook.Task(tokenizer, ["a", "b"], head)

    return run


def test_the_head_stays_out_of_the_4_bits(notebook, bert):
    config, task = bert(bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False)
    settings = notebook.quantization_config(config, task.head)
    assert (settings.load_in_4bit, settings.bnb_4bit_quant_type) == (True, "fp4")
    assert (settings.bnb_4bit_use_double_quant, settings.bnb_4bit_compute_dtype) == (False, torch.float32)
    base = notebook.load_base(config, task)
    linear = {name: type(part) for name, part in base.named_modules() if isinstance(part, torch.nn.Linear)}
    assert linear.pop("classifier") is torch.nn.Linear and base.classifier.weight.dtype == torch.float32
    assert {*linear.values()} == {bnb.nn.Linear4bit} and len(linear) == 2 * 6 + 1  # six a layer, and the pooler


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_embeddings_in_4_bits_answer_with_the_rounded_vectors(notebook, bert, quant_type):
    config, task = bert(quantize_embeddings=True, bnb_4bit_quant_type=quant_type)
    table = notebook.load_base(config, task).get_input_embeddings()
    plain = notebook.load_base(*bert()).get_input_embeddings().weight
    packed, state = bnb.functional.quantize_4bit(plain.data, quant_type=quant_type, compress_statistics=False)
    ids = torch.tensor([[0, 7, 30521]])
    assert torch.equal(table(ids), bnb.functional.dequantize_4bit(packed, state)[ids])
    assert table.weight.dtype == torch.uint8 and table.weight.numel() == plain.numel() / 2


def test_storage_counts_each_parameter_and_the_constants(notebook, bert):
    config, task = bert(quantize_embeddings=True)
    plain = notebook.load_classifier(config, task.names)[0]
    whole, small = notebook.storage(plain), notebook.storage(notebook.load_base(config, task))
    assert whole.loc["all", "parameters"] == small.loc["all", "parameters"] == plain.num_parameters()
    assert whole.loc["all", "MB"] * 1e6 == pytest.approx(4 * whole.loc["all", "parameters"])
    for table in (whole, small):
        assert table.drop("all").sum().tolist() == pytest.approx(table.loc["all"].tolist())
    matrices = 2 * (4 * 64 * 64 + 2 * 64 * 128) + 64 * 64
    assert small.loc["matrices, 4-bit", "parameters"] == matrices
    constants = matrices / 64 + 13 * 4 * (16 + 256 + 1 + 1)  # 8 bits a block; tables and a scale or two in 32
    assert small.loc["matrices, 4-bit", "MB"] * 1e6 == pytest.approx(matrices / 2 + constants, abs=1)
    words = 30522 * 64
    assert small.loc["embeddings, 4-bit", "MB"] * 1e6 == pytest.approx(words / 2 + 4 * words / 64 + 64)


def test_another_rank_keeps_the_scale_and_the_head_gets_no_adapter(notebook, bert):
    config, task = bert(target_modules="all-linear", lora_r=4, lora_alpha=12)
    for rank in (1, 4, 64):
        lora = notebook.lora_config(config, task.head, rank)
        assert lora.lora_alpha / lora.r == 3 and lora.r == rank
    names = [name for name, _ in notebook.build_qlora(config, task, 2).named_parameters()]
    assert [name for name in names if "lora_A" in name and "pooler" in name]
    assert not [name for name in names if "lora_" in name and "classifier" in name]


@pytest.mark.parametrize(("name", "rank"), [("bert", 1), ("bert", 64), ("distilbert", 4)])
def test_the_formula_gives_the_trained_parameters(notebook, family, configure, name, rank):
    tokenizer, head, _, config = notebook.check_model(configure(family(name)))
    task = notebook.Task(tokenizer, ["a", "b", "c"], head)
    formula = 2 * 2 * rank * (64 + 64) + 64 * 3 + 3 + (64 * 64 + 64) * ("pre_classifier" in head)
    assert notebook.storage(notebook.build_qlora(config, task, rank)).loc["all", "trained"] == formula
    assert notebook.trained_at_rank(config, task, rank) == formula


@pytest.mark.parametrize("name", ["bert", "albert", "mpnet"])
def test_recomputed_layers_give_the_same_gradients(notebook, family, configure, monkeypatch, name):
    ids = torch.randint(1000, 20000, (4, 12), generator=torch.Generator().manual_seed(0))
    gradients, calls, checkpoint = [], [], torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda *a, **k: calls.append(1) or checkpoint(*a, **k))
    for recomputes in (False, True):
        config = configure(family(name), gradient_checkpointing=recomputes, lora_dropout=0.1)
        tokenizer, head, _, config = notebook.check_model(config)
        model = randomize(notebook.build_qlora(config, notebook.Task(tokenizer, ["a", "b"], head))).train()
        torch.manual_seed(2)  # of the dropout
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.tensor([0, 1, 0, 1])).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        assert len(calls) == 2 * recomputes  # layers
    for parameter, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0 and torch.equal(gradient, gradients[1][parameter]), parameter


@pytest.mark.parametrize("changes", [{}, {"quantize_embeddings": True}, THIN])
def test_the_adapter_is_the_same_from_disk_and_merged(notebook, bert, tmp_path, changes):
    config, task = bert(**changes)
    model, texts = randomize(notebook.build_qlora(config, task), 0.2), [f"a film of {n} minutes" for n in range(20)]
    model.save_pretrained(tmp_path / "adapter")
    merged = notebook.merge_adapter(tmp_path / "adapter", config, task)
    merged.save_pretrained(tmp_path / "merged")
    alone = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    models = [model, notebook.load_adapter(tmp_path / "adapter", config, task), merged, alone]
    logits = [notebook.predict_logits(each, texts, config, task.tokenizer) for each in models]
    assert np.array_equal(logits[0], logits[1]) and np.array_equal(logits[2], logits[3])
    assert np.abs(logits[0] - logits[2]).max() < 1e-4 and np.ptp(logits[0], axis=0).min() > 1e-2
    assert {p.dtype for p in alone.parameters()} == {torch.float32} and "lora" not in str(alone)
