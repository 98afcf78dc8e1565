"""Sections 6, 7, 10 to 13: what is quantized, what is trained, what it weighs, and what survives saving and merging."""

import dataclasses

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoConfig, BertConfig, BertForSequenceClassification


def batch(rows=4, length=12, seed=0):
    torch.manual_seed(seed)
    return {"input_ids": torch.randint(1000, 20000, (rows, length)), "attention_mask": torch.ones(rows, length, dtype=torch.long)}


def test_building_leaves_the_list_of_heads_alone(notebook, tiny_config):
    heads = ["classifier"]
    notebook.build_qlora(tiny_config, heads)
    assert heads == ["classifier"]


def test_bert_base_trains_591362_parameters(notebook, tmp_path):
    BertConfig().save_pretrained(tmp_path)
    config, _ = notebook.resolve_config({"QLORA_MODEL_NAME": str(tmp_path)}, cuda=True)
    model, head = notebook.inspect_model(str(tmp_path))
    total = sum(parameter.numel() for parameter in model.parameters())
    trainable = notebook.trainable_at_rank(str(tmp_path), config, head, config.lora_r)
    assert (trainable, total) == (591_362, 109_483_778) and trainable / (total + trainable) == pytest.approx(0.0054, abs=5e-5)


@pytest.mark.parametrize("rank", [1, 8, 64])
def test_trainable_parameters_grow_with_the_rank(notebook, tiny_config, rank):
    assert notebook.trainable_at_rank(tiny_config.model_name, tiny_config, ["classifier"], rank) == 2 * 2 * rank * (64 + 64) + 64 * 2 + 2


def test_another_rank_keeps_the_scale(notebook, tiny_config):
    for rank in (1, 4, 64):
        lora = notebook.lora_config(tiny_config, ["classifier"], rank)
        assert lora.lora_alpha / lora.r == tiny_config.lora_alpha / tiny_config.lora_r


def test_the_quantization_is_nf4_with_double_quantization(notebook):
    config, _ = notebook.resolve_config({}, cuda=True)
    settings = notebook.quantization_config(config, ["classifier"])
    assert (settings.load_in_4bit, settings.bnb_4bit_quant_type, settings.bnb_4bit_use_double_quant, settings.bnb_4bit_compute_dtype) == (True, "nf4", True, torch.float16)
    assert settings.llm_int8_skip_modules == ["classifier"]


def test_every_linear_layer_of_the_encoder_is_4_bit_and_the_head_is_not(qlora_model):
    base = qlora_model.get_base_model()
    kinds = {name: type(module) for name, module in base.named_modules() if isinstance(module, torch.nn.Linear) and "lora_" not in name}
    for name, kind in kinds.items():
        assert (kind is Linear4bit) == ("classifier" not in name), name
    assert sum(kind is Linear4bit for kind in kinds.values()) == 2 * 6 + 1  # six a layer, and the pooler


def test_the_storage_table_adds_up_to_the_tensors(notebook, qlora_model, tiny_bert):
    table = notebook.storage_table(qlora_model, ["classifier"])
    parts = table.drop(index="all")
    assert parts["parameters"].sum() == table.loc["all", "parameters"] and parts["MB"].sum() == pytest.approx(table.loc["all", "MB"])
    plain, _ = notebook.inspect_model(tiny_bert)
    count = sum(parameter.numel() for parameter in plain.parameters())
    assert table.loc["all", "parameters"] == count + table.loc["LoRA adapters", "parameters"] + table.loc["head, untrained copy", "parameters"]
    assert table.loc["all", "trainable"] == sum(parameter.numel() for parameter in qlora_model.parameters() if parameter.requires_grad)
    four_bit = table.loc["linear layers, 4-bit"]
    assert four_bit["MB"] * 1e6 == four_bit["parameters"] / 2  # half a byte each
    # One float32 scale per 64 weights is 0.5 bits a weight; quantized once more it is 8/64 bits plus tables of fixed size.
    constants = table.loc["quantization constants", "MB"] * 1e6
    layers = 13
    assert four_bit["parameters"] / 64 < constants < four_bit["parameters"] / 64 + layers * (16 * 4 + 256 * 4 + 4 + 8 * 4)


def test_full_precision_weighs_four_bytes_a_parameter(notebook, tiny_config):
    model = notebook.load_classifier(tiny_config.model_name, 0)
    table = notebook.storage_table(model, ["classifier"])
    assert table.loc["all", "MB"] * 1e6 == 4 * table.loc["all", "parameters"] and table.loc["all", "bits a parameter"] == 32


def test_nf4_rounds_normal_weights_to_sixteen_levels_a_block():
    torch.manual_seed(0)
    weight = torch.randn(64, 64)
    packed, state = quantize_4bit(weight, quant_type="nf4", blocksize=64)
    back = dequantize_4bit(packed, state)
    assert all(len(block.unique()) <= 16 for block in back)
    assert 0.05 < (back - weight).norm() / weight.norm() < 0.12


def test_a_checkpoint_of_another_architecture_is_refused(notebook, tmp_path, tiny_bert):
    AutoConfig.from_pretrained(tiny_bert).save_pretrained(tmp_path)
    from safetensors.torch import save_file

    save_file({"unrelated.weight": torch.zeros(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks .* weights of its encoder"):
        notebook.load_classifier(str(tmp_path), 0)


def test_a_folder_with_weights_that_could_hold_code_is_refused(notebook, tmp_path, tiny_bert):
    AutoConfig.from_pretrained(tiny_bert).save_pretrained(tmp_path)
    torch.save({"embeddings.word_embeddings.weight": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="has no model.safetensors.*other formats can hold code"):
        notebook.load_classifier(str(tmp_path), 0)


def test_an_adapter_names_the_revision_of_its_base(notebook, tiny_config):
    config = dataclasses.replace(tiny_config, model_revision="older")
    assert notebook.lora_config(config, ["classifier"]).revision == "older"


def test_a_reloaded_adapter_gives_bit_equal_logits(notebook, qlora_model, tiny_config, tmp_path):
    torch.manual_seed(1)
    for parameter in qlora_model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.05)
    qlora_model.save_pretrained(tmp_path / "adapter")
    reloaded = notebook.load_adapter(tmp_path / "adapter", tiny_config, ["classifier"])
    with torch.no_grad():
        before, after = qlora_model.eval()(**batch()).logits, reloaded(**batch()).logits
    assert torch.equal(before, after)


def test_merged_gives_the_predictions_of_the_adapter_on_the_same_base(notebook, qlora_model, tmp_path):
    torch.manual_seed(1)
    for parameter in qlora_model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.2)
    qlora_model.save_pretrained(tmp_path / "adapter")
    adapted = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", dtype=torch.float32).eval()
    with torch.no_grad():
        before = adapted(**batch(64)).logits
        bias = before.median(dim=0).values  # centred, both labels are predicted, or equal predictions would prove little
        merged = adapted.merge_and_unload().eval()
        after = merged(**batch(64)).logits
    assert isinstance(merged, BertForSequenceClassification) and len((before - bias).argmax(-1).unique()) == 2
    assert torch.equal((before - bias).argmax(-1), (after - bias).argmax(-1)) and torch.allclose(before, after, atol=1e-4)


def test_predict_logits_does_not_depend_on_the_batch(notebook, tiny_config, offline_model, sentences):
    tokenizer = notebook.AutoTokenizer.from_pretrained(offline_model)
    model = notebook.load_classifier(tiny_config.model_name, 0)
    texts = list(sentences["text"][:10])
    assert np.allclose(notebook.predict_logits(model, tokenizer, texts, 32, batch_size=3), notebook.predict_logits(model, tokenizer, texts, 32), atol=1e-5)


def test_without_a_gpu_only_float32_and_qlora_are_measured(notebook, tiny_config, offline_model, sentences, monkeypatch):
    import dataclasses

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = dataclasses.replace(tiny_config, efficiency_steps=2)
    tokenizer = notebook.AutoTokenizer.from_pretrained(offline_model)
    train = notebook.tokenize_reviews(notebook.split_reviews(sentences.sample(400, random_state=0), 0.1, 0.1, 0), tokenizer, 32)["train"]
    rows = {name: notebook.measure_method(method, config, ["classifier"], tokenizer, train) for name, method in notebook.efficiency_methods().iterrows()}
    assert {name: row["measured"] for name, row in rows.items()} == {"full_fp32": True, "full_fp16": False, "full_fp16_checkpointing": False, "lora_fp16": False, "qlora_plain": True, "qlora_lean": False, "qlora_fast": False}
    assert all(row["peak_mb"] is None for row in rows.values()) and rows["lora_fp16"]["weights_mb"] is None
    assert rows["full_fp32"]["trainable_parameters"] * 4 == pytest.approx(rows["full_fp32"]["weights_mb"] * 1e6)
    assert rows["qlora_plain"]["weights_mb"] < rows["full_fp32"]["weights_mb"] and rows["qlora_plain"]["samples_per_second"] > 0


def test_the_textbook_estimate_is_bytes_times_parameters(notebook):
    estimate = notebook.textbook_estimate(frozen=109_482_240, adapters=589_824, head=1_538)
    assert estimate["full fine-tuning"]["weights"] == pytest.approx(437.9, abs=0.05) and estimate["full fine-tuning"]["with gradients and Adam"] == pytest.approx(1751.7, abs=0.05)
    assert estimate["QLoRA"]["weights"] == pytest.approx(57.1, abs=0.05)


def test_families_name_their_layers_and_heads(notebook):
    assert notebook.describe_family("distilbert") == {"linear layers": "k_lin, lin1, lin2, out_lin, q_lin, v_lin", "new head": "pre_classifier, classifier"}
