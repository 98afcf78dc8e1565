"""Sections 6, 10 and 11: the accounting of memory, whose parts are the tensors that exist, and what is concluded from it."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.fixture
def tokenizer(notebook, offline_model):
    return notebook.AutoTokenizer.from_pretrained(offline_model)


def lean(config, **changes):
    return dataclasses.replace(config, quantize_embeddings=True, **changes)


# 4-bit embeddings


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dimension", [64, 384])
def test_a_4_bit_embedding_looks_up_its_dequantized_rows(notebook, dtype, dimension):
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(1000, dimension).to(dtype)
    quantized = notebook.quantize_embedding(embedding)
    ids = torch.randint(0, 1000, (3, 7))
    rows = dequantize_4bit(quantized.weight.data, quantized.weight.quant_state)
    found = quantized(ids)
    assert found.dtype == dtype and torch.equal(found, rows[ids])
    assert 0.05 < (found - embedding(ids)).norm() / embedding(ids).norm() < 0.12


def test_only_the_word_embeddings_become_4_bit_and_only_where_asked(notebook, tiny_config):
    for config, expected in ((tiny_config, False), (lean(tiny_config), True)):
        model = notebook.load_base(config, ["classifier"])
        kinds = {name.rpartition(".")[2]: type(each) for name, each in model.named_modules() if isinstance(each, torch.nn.Embedding)}
        assert issubclass(kinds["word_embeddings"], notebook.bitsandbytes.nn.Embedding4bit) == expected
        assert kinds["position_embeddings"] is kinds["token_type_embeddings"] is torch.nn.Embedding


def test_embeddings_of_broken_blocks_stay_as_they_are(notebook, tiny_config, tmp_path):
    shape = {"hidden_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128}
    notebook.transformers.BertModel(notebook.transformers.BertConfig(**shape)).save_pretrained(tmp_path)
    base = notebook.load_base(lean(tiny_config, model_name=str(tmp_path)), ["classifier"])
    assert type(base.get_input_embeddings()) is torch.nn.Embedding


def test_the_embedding_counts_where_it_should(notebook, tiny_config):
    with_it, without = (notebook.storage_table(notebook.load_base(config, ["classifier"]), ["classifier"]) for config in (lean(tiny_config), tiny_config))
    words = without.loc["embeddings", "parameters"] - with_it.loc["embeddings", "parameters"]
    assert with_it.loc["embeddings, 4-bit", "parameters"] == words == 30522 * 64
    assert with_it.loc["embeddings, 4-bit", "MB"] * 1e6 == words / 2  # half a byte each
    constants = (with_it.loc["quantization constants", "MB"] - without.loc["quantization constants", "MB"]) * 1e6
    assert constants == pytest.approx(4 * words / 64 + 16 * 4)  # a float32 scale for each 64, and the 16 levels
    assert with_it.loc["all", "parameters"] == without.loc["all", "parameters"]
    assert without.loc["all", "MB"] - with_it.loc["all", "MB"] == pytest.approx((4 * words - words / 2 - constants) / 1e6)


def test_the_base_of_bert_base_weighs_at_most_60_mb_in_lean_execution(notebook, tmp_path):
    """Built and quantized here, on the CPU, with random weights; 16-bit norms and biases, as on a GPU."""
    torch.manual_seed(0)
    notebook.transformers.BertModel(notebook.transformers.BertConfig()).save_pretrained(tmp_path)
    config = dataclasses.replace(notebook.Config(), model_name=str(tmp_path), execution="lean")
    base = notebook.load_base(notebook.carried_out(config), ["classifier"])
    table = notebook.storage_table(base, ["classifier"])
    assert table.loc["all", "parameters"] == 109_483_778 and table.loc["all", "MB"] <= 60
    reference = json.loads((ROOT / "Data" / "reference" / "h200-bert-base-shapes" / "memory.json").read_text(encoding="utf-8"))
    measured = {row["part"]: row["MB"] for row in reference["lean_base"]}
    assert measured == pytest.approx(table["MB"].to_dict())


def test_adapters_on_a_4_bit_embedding_are_saved_and_come_back_to_the_last_bit(notebook, tiny_config, tmp_path):
    config = lean(tiny_config)
    model = notebook.build_qlora(config, ["classifier"])
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.05)
    model.save_pretrained(tmp_path / "adapter")
    reloaded = notebook.load_adapter(tmp_path / "adapter", config, ["classifier"])
    ids = torch.randint(1000, 20000, (4, 12))
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=ids).logits, reloaded(input_ids=ids).logits)


# The parts of a run's memory


def test_shared_storage_counts_once(notebook):
    first, second = torch.zeros(100), torch.zeros(10, dtype=torch.uint8)
    assert notebook.tensor_bytes([first, first[:5], first.view(10, 10), second, None, 3]) == 400 + 10


def counted(notebook, config, tokenizer, method):
    changes = {"max_length": 16, "efficiency_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    config = notebook.method_config(method, dataclasses.replace(config, **changes))
    model = notebook.build_method(method, config, ["classifier"])
    return model, notebook.time_steps(model, config, tokenizer, notebook.random_texts(8, 16, len(tokenizer)))


def test_gradients_and_optimizer_state_are_the_tensors_that_exist(notebook, tiny_config, tokenizer):
    methods = notebook.efficiency_methods()
    model, measured = counted(notebook, tiny_config, tokenizer, methods.loc["full_fp32"])
    count = sum(parameter.numel() for parameter in model.parameters())
    assert measured["gradients_mb"] * 1e6 == 4 * count
    assert measured["optimizer_mb"] * 1e6 == pytest.approx(8 * count, rel=1e-3)  # two averages, and a count of steps for each tensor
    assert measured["peak_mb"] is measured["workspaces_mb"] is measured["update_mb"] is None or torch.cuda.is_available()


def test_only_what_is_trained_has_gradients_and_state(notebook, tiny_config, tokenizer):
    model, measured = counted(notebook, tiny_config, tokenizer, notebook.efficiency_methods().loc["qlora_plain"])
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert measured["gradients_mb"] * 1e6 == 4 * trained
    assert measured["optimizer_mb"] * 1e6 == pytest.approx(8 * trained, rel=2e-2)


def test_8_bit_state_is_two_bytes_a_parameter_and_its_constants(notebook, tiny_config, tokenizer):
    """Embeddings, and tensors below 4,096 values, keep 32-bit averages."""
    method = notebook.ingredient_methods().loc["full_fp16_adam_8bit"].copy()
    method["fp16"] = torch.cuda.is_available()
    model, measured = counted(notebook, tiny_config, tokenizer, method)
    embeddings = {id(each.weight) for each in model.modules() if isinstance(each, torch.nn.Embedding)}
    small = [each for each in model.parameters() if each.numel() >= 4096 and id(each) not in embeddings]
    eight_bit = sum(each.numel() for each in small)
    others = sum(each.numel() for each in model.parameters()) - eight_bit
    scales = sum(2 * 4 * -(-each.numel() // 256) for each in small)
    assert measured["optimizer_mb"] * 1e6 == pytest.approx(2 * eight_bit + scales + 8 * others + 2 * 256 * 4, rel=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", ["full_fp16", "qlora_plain", "qlora_lean", "qlora_fast"])
def test_the_parts_add_up_to_the_peak_on_a_gpu(notebook, tiny_config, tokenizer, name):
    config = dataclasses.replace(tiny_config, bnb_4bit_compute_dtype="float16", fp16=True, efficiency_steps=1)
    train = notebook.random_texts(256, 32, len(tokenizer))
    row = notebook.measure_method(notebook.efficiency_methods().loc[name], config, ["classifier"], tokenizer, train)
    assert row["peak_mb"] == pytest.approx(sum(row[f"{part}_mb"] for part in notebook.memory_parts()))
    assert all(row[f"{part}_mb"] > 0 for part in notebook.memory_parts() if part != "update") and row["update_mb"] >= 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_cap_holds_and_is_lifted(notebook):
    total = torch.cuda.get_device_properties(0).total_memory
    with pytest.raises(torch.OutOfMemoryError), notebook.memory_cap(1.0):
        torch.empty(1_500_000_000, dtype=torch.uint8, device="cuda")
    assert torch.empty(min(1_500_000_000, total // 2), dtype=torch.uint8, device="cuda").is_cuda


# What is concluded from it


def test_an_ingredient_saves_the_difference_of_two_peaks(notebook):
    peaks = {
        "full_fp16": 100.0,
        "full_fp16_checkpointing": 40.0,
        "lora_fp32_base": 70.0,
        "lora_4bit_base": 60.0,
        "qlora_without_checkpointing": 50.0,
        "qlora_plain": 20.0,
    }
    rows = {row["ingredient"]: row for row in notebook.ingredient_savings([{"method": name, "peak_mb": peak} for name, peak in peaks.items()])}
    assert (rows["gradient checkpointing"]["alone_mb"], rows["gradient checkpointing"]["last_mb"]) == (60, 30)
    assert (rows["adapters (LoRA)"]["alone_mb"], rows["adapters (LoRA)"]["last_mb"]) == (30, None)
    assert (rows["4-bit weights"]["alone_mb"], rows["4-bit weights"]["last_mb"]) == (10, None)
    assert rows["8-bit optimizer"]["alone_mb"] is None


def test_an_ingredient_s_two_methods_differ_in_it_alone(notebook):
    methods = pd.concat([notebook.efficiency_methods(), notebook.ingredient_methods()])
    methods.loc["qlora_plain", ["optim", "fp16", "gradient_checkpointing"]] = ["adamw_8bit", True, True]  # as on a GPU, unpaged
    changed = {"gradient checkpointing": ["gradient_checkpointing"], "adapters (LoRA)": ["adapters"], "4-bit weights": ["base"], "8-bit optimizer": ["optim"]}
    for ingredient, pairs in notebook.ingredient_pairs().items():
        for before, after in filter(None, pairs):
            different = methods.columns[methods.loc[before].astype(str) != methods.loc[after].astype(str)]
            assert list(different) == changed[ingredient], (before, after)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 500), st.integers(1, 600))
def test_the_largest_batch_fits_and_a_sixteenth_more_does_not(notebook, limit, guess):
    tried = []

    def fits(batch):
        tried.append(batch)
        return batch <= limit

    found = notebook.largest_batch(fits, guess)
    assert 0 <= found <= limit < found + max(1, guess // 16)
    assert len(tried) == len(set(tried))


def test_growth_is_measured_point_by_point(notebook, tiny_config, tokenizer, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = dataclasses.replace(tiny_config, efficiency_steps=1, growth_batches=[1, 2], growth_lengths=[8, 32, 4096], per_device_train_batch_size=2)
    rows = notebook.measure_growth(config, ["classifier"], tokenizer, positions=128)
    assert [(row["method"], row["batch"], row["length"]) for row in rows] == [
        (name, *point) for name in ("full_fp32", "qlora_plain") for point in ((1, 32), (2, 8), (2, 32))
    ]
    assert all(row["samples_per_second"] > 0 and row["peak_mb"] is None for row in rows)


def test_the_length_grows_at_a_batch_that_growth_measures_anyway(notebook, tiny_config):
    sizes = {"growth_batches": [1, 4, 16]}
    assert notebook.growth_batch(dataclasses.replace(tiny_config, per_device_train_batch_size=32, **sizes)) == 16
    assert notebook.growth_batch(dataclasses.replace(tiny_config, per_device_train_batch_size=4, **sizes)) == 4


def test_without_peaks_the_message_of_growth_is_how_much_longer_the_longest_texts_take(notebook):
    rows = pd.DataFrame([{"method": "qlora_plain", "batch": 16, "length": length, "peak_mb": None, "samples_per_second": 640 / length} for length in (16, 64)])
    assert notebook.growth_claim(rows[:0], rows) == "A text of 64 tokens for one of 16: qlora plain takes 4.0 times as long"


def test_a_batch_that_does_not_fit_is_a_gap_and_no_error(notebook, tiny_config, tokenizer, monkeypatch):
    def out_of_memory(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(notebook, "time_steps", out_of_memory)
    assert notebook.measure_batch("qlora_plain", 2, 8, tiny_config, ["classifier"], tokenizer) == {"peak_mb": None, "samples_per_second": None}


def test_a_cap_above_the_gpu_is_left_out_and_one_point_of_growth_is_enough(notebook, tiny_config, tokenizer, monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("Device", (), {"total_memory": 3e9}))
    monkeypatch.setattr(notebook, "measure_batch", lambda name, batch, *arguments: {"samples_per_second": 1.0 if batch <= 30 else None})
    growth = [{"method": "qlora_lean", "batch": 4, "length": tiny_config.max_length, "peak_mb": 400.0, "samples_per_second": 1.0}]
    config = dataclasses.replace(tiny_config, memory_caps_gb=[2.0, 16.0])
    assert notebook.measure_caps(growth, config, ["classifier"], tokenizer) == [{"method": "qlora_lean", "cap_gb": 2.0, "batch": 30}]


def test_what_needs_a_gpu_is_told_from_either_form_of_a_row(notebook):
    methods = notebook.ingredient_methods()
    assert all(notebook.needs_gpu(methods.loc[name]) for name in methods.index) and all(notebook.needs_gpu(row) for _, row in methods.iterrows())
    assert [name for name, row in notebook.efficiency_methods().iterrows() if not notebook.needs_gpu(row)] == ["full_fp32", "qlora_plain"]


def test_the_search_begins_where_the_measured_growth_points(notebook, tiny_config, tokenizer, monkeypatch):
    """A model of 100 MB and 10 MB a text, under 1 and 2 GB."""
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share: caps.append(share))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("Device", (), {"total_memory": 4e9}))
    caps, tried = [], []

    def measure(name, batch, *arguments):
        tried.append(batch)
        return {"samples_per_second": 1.0 if 100 + 10 * batch <= 4000 * caps[-1] else None}

    monkeypatch.setattr(notebook, "measure_batch", measure)
    growth = [
        {"method": "qlora_lean", "batch": batch, "length": tiny_config.max_length, "peak_mb": 100.0 + 10 * batch, "samples_per_second": 1.0}
        for batch in (1, 4, 16)
    ]
    rows = notebook.measure_caps(growth, dataclasses.replace(tiny_config, memory_caps_gb=[1.0, 2.0]), ["classifier"], tokenizer)
    assert [(row["method"], row["cap_gb"]) for row in rows] == [("qlora_lean", 1.0), ("qlora_lean", 2.0)]
    assert 85 <= rows[0]["batch"] <= 90 and 179 <= rows[1]["batch"] <= 190 and len(tried) <= 8 and caps[1::2] == [1.0, 1.0]


# Seeds and reviews


def test_the_interval_over_seeds_and_reviews_covers_and_is_wider_than_over_reviews_alone(notebook):
    """Right answers with a probability that depends on the seed and on the review: the interval holds the true mean about 95 times in 100."""
    rng = np.random.default_rng(0)
    covered, widths = 0, []
    for _ in range(200):
        chance = np.clip(0.85 + 0.03 * rng.standard_normal((6, 1)) + 0.1 * rng.standard_normal((1, 300)), 0, 1)
        right = rng.random((6, 300)) < chance
        _, (low, high) = notebook.mean_over_seeds(right, n_resamples=400)
        expected = 0.838  # the mean of the clipped chances, by simulation
        covered += low <= expected <= high
        _, (single_low, single_high) = notebook.mean_over_seeds(right.mean(axis=0, keepdims=True), n_resamples=400)
        widths.append((high - low) / (single_high - single_low))
    assert 0.90 <= covered / 200 <= 1 and np.mean(widths) > 1.05


def test_what_two_runs_share_drops_out_of_their_difference(notebook):
    rng = np.random.default_rng(0)
    reference = rng.random((3, 500)) < 0.9
    better = reference.copy()
    better[:, :20] = True
    summary = notebook.summarize_seeds(better, reference)
    assert summary["gain"] == pytest.approx(100 * (better.mean() - reference.mean())) and summary["gain_ci95"][0] >= 0
    assert summary["seeds"] == pytest.approx(list(better.mean(axis=1)))
    same = notebook.summarize_seeds(reference, reference)
    assert same["gain"] == 0 and same["gain_ci95"] == [0, 0]


def row_of(rank, accuracy=None, interval=None):
    return {"rank": rank, "trainable_parameters": 10 * rank, "accuracy": accuracy, "accuracy_ci95": None, "seeds": None, "gain": None, "gain_ci95": interval}


@pytest.mark.parametrize(
    ("intervals", "modules", "lines"),
    [
        ({1: [-2, -1], 4: [-1, 1], 16: [0, 0]}, {}, ["worse: rank 1", "no clear difference: rank 4"]),
        ({1: [-1, 1], 16: [0, 0], 64: [-1, 0.5]}, {}, ["no clear difference: rank 1, rank 64"]),
        ({1: [-2, -1], 16: [0, 0]}, {"all of attention": [-3, -1]}, ["worse: rank 1, all of attention"]),
        ({1: [-1, 1], 16: [0, 0]}, {"all of attention": [-1, 1], "all linear layers": [0.5, 1]}, ["better: all linear layers", "no clear difference: rank 1, all of attention"]),
    ],
)
def test_the_claim_about_ranks_follows_the_intervals(notebook, intervals, modules, lines):
    rows = [row_of(rank, 0.9, interval) for rank, interval in intervals.items()] + [row_of(128)]
    others = [{"modules": "query, value"} | row_of(16, 0.9, [0, 0])] + [{"modules": name} | row_of(16, 0.9, interval) for name, interval in modules.items()]
    assert notebook.rank_claim(rows, others, 16).splitlines() == ["Against query, value at rank 16", *lines]


def test_the_marks_of_an_axis_hold_the_range(notebook):
    assert notebook.marks_between(12.5, 27.5, (1, 1.5, 2, 3, 4, 5, 7)) == [10, 15, 20, 30]
    assert notebook.marks_between(3, 2000, (1, 2, 5)) == [2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000]


def test_the_modules_that_may_carry_adapters(notebook, tiny_config):
    model, _ = notebook.inspect_model(tiny_config.model_name)
    query_value, attention, linear = notebook.module_choices(model, tiny_config).values()
    assert list(notebook.module_choices(model, dataclasses.replace(tiny_config, target_modules=["all-linear"]))) == ["all-linear", "all of attention"]
    assert query_value == ["query", "value"] and len(attention) == 2 * 4 and len(linear) == 2 * 6
    assert set(attention) < set(linear) and not any("pooler" in name or "classifier" in name for name in linear)
    for family, count in (("distilbert", 6 * 4), ("modernbert", 22 * 2), ("deberta-v2", 24 * 4)):
        with torch.device("meta"):
            other = notebook.AutoModelForSequenceClassification.from_config(notebook.AutoConfig.for_model(family))
        assert len(notebook.module_choices(other, tiny_config)["all of attention"]) == count, family


def test_ranks_that_were_not_trained_are_counted_and_null(notebook, tiny_config):
    model, head = notebook.inspect_model(tiny_config.model_name)
    choices = notebook.module_choices(model, tiny_config)
    rng = np.random.default_rng(0)
    names = list(choices)
    right = {(names[0], 4): rng.random((2, 50)) < 0.8, (names[0], 1): rng.random((2, 50)) < 0.8}
    right |= {(name, 4): rng.random((2, 50)) < 0.8 for name in names[1:]}
    ranks, modules = notebook.rank_results(right, choices, tiny_config, head)
    assert [row["rank"] for row in ranks if row["accuracy"] is not None] == [1, 4] and [row["rank"] for row in ranks] == [1, 2, 4, 8, 16, 32, 64]
    assert all(row["trainable_parameters"] == 2 * 2 * row["rank"] * 128 + 130 for row in ranks)
    assert [row["modules"] for row in modules] == names and modules[0]["gain"] == 0
    assert modules[0]["trainable_parameters"] < modules[1]["trainable_parameters"] < modules[2]["trainable_parameters"]
