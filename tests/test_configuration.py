"""Section 2: the defaults, profiles, overrides and their errors."""

import dataclasses

import pytest
from transformers import BertConfig, GPT2Config, T5Config

MISSION = {
    "model_name": "bert-base-uncased",
    "dataset_name": "dipanjanS/imdb_sentiment_finetune_dataset20k",
    "train_share": 0.8,
    "validation_share": 0.1,
    "test_share": 0.1,
    "max_length": 256,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "float16",
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.1,
    "target_modules": ["query", "value"],
    "num_train_epochs": 3,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 2,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "weight_decay": 0.01,
    "optim": "paged_adamw_8bit",
    "fp16": True,
    "gradient_checkpointing": True,
    "early_stopping_patience": 2,
    "seed": 42,
}


def test_the_full_profile_is_the_tutorial_s_recipe(notebook):
    config, sources = notebook.resolve_config({}, cuda=True)
    assert config.profile == "full" and {name: getattr(config, name) for name in MISSION} == MISSION
    assert set(sources) == {"profile", "execution"}


def test_without_a_gpu_the_profile_is_demo_in_float32(notebook):
    config, sources = notebook.resolve_config({}, cuda=False)
    assert config.profile == "demo" and config.model_name == "sentence-transformers/all-MiniLM-L6-v2" and config.dataset_name == "cornell-movie-review-data/rotten_tomatoes"
    assert (config.bnb_4bit_compute_dtype, config.fp16, config.optim) == ("float32", False, "adamw_8bit")
    assert sources["fp16"] == "no CUDA GPU" and sources["learning_rate"] == "demo profile"


def test_a_field_that_the_user_sets_wins_over_the_profile(notebook):
    config, sources = notebook.resolve_config({"QLORA_LEARNING_RATE": "3e-4", "QLORA_TARGET_MODULES": "query, key ,value", "QLORA_GRADIENT_CHECKPOINTING": "true", "QLORA_MAX_TRAIN_SAMPLES": "50"}, cuda=False)
    assert config.learning_rate == 3e-4 and config.target_modules == ["query", "key", "value"] and config.gradient_checkpointing is True and config.max_train_samples == 50
    assert sources["learning_rate"] == "QLORA_LEARNING_RATE"


def test_an_asked_for_optimizer_stays_where_it_can(notebook):
    for asked, used, source in [("adamw_torch", "adamw_torch", "QLORA_OPTIM"), ("paged_adamw_32bit", "paged_adamw_32bit", "QLORA_OPTIM"), ("paged_lion_8bit", "lion_8bit", "no CUDA GPU")]:
        config, sources = notebook.resolve_config({"QLORA_OPTIM": asked}, cuda=False)
        assert (config.optim, sources["optim"]) == (used, source)


def test_auto_is_what_it_would_be_unset(notebook):
    assert notebook.resolve_config({"QLORA_PROFILE": "auto"}, cuda=False) == notebook.resolve_config({}, cuda=False)


def test_blank_variables_and_those_of_others_are_ignored(notebook):
    assert notebook.read_overrides({"QLORA_SEED": "  ", "PATH": "x", "WANDB_API_KEY": "y"}) == {}


def test_every_field_can_be_set_from_the_environment(notebook):
    """Each default, written as text, is read back as the same typed value."""
    for field in dataclasses.fields(notebook.Config):
        default = getattr(notebook.Config(), field.name)
        value = {"quantize_embeddings": True, "max_train_samples": 7, "memory_caps_gb": [4.0, 8.5], "push_to_hub": "someone/an-adapter.2"}.get(field.name, default)
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        read = notebook.read_overrides({f"QLORA_{field.name.upper()}": text})[field.name]
        assert read == value and type(read) is type(value), field.name


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("QLORA_LERNING_RATE", "1", "Did you mean QLORA_LEARNING_RATE"),
        ("QLORA_NONSENSE_XYZ", "1", "sets no field of Config"),
        ("QLORA_LORA_R", "many", "does not fit the field lora_r"),
        ("QLORA_SEED", "1.5", "does not fit the field seed"),
        ("QLORA_FP16", "perhaps", "does not fit the field fp16"),
        ("QLORA_PROFILE", "fast!", "does not fit the field profile"),
        ("QLORA_RANKS", "1,two", "does not fit the field ranks"),
        ("QLORA_LORA_R", "0", "1 or more"),
        ("QLORA_LORA_R", "-3", "1 or more"),
        ("QLORA_TRAIN_SHARE", "0.7", "add up to 0.9"),
        ("QLORA_TEST_SHARE", "0", "between 0 and 1"),
        ("QLORA_LEARNING_RATE", "-1e-3", "above 0"),
        ("QLORA_LEARNING_RATE", "nan", "above 0"),
        ("QLORA_LEARNING_RATE", "inf", "above 0"),
        ("QLORA_LORA_DROPOUT", "1", "below 1"),
        ("QLORA_MAX_LENGTH", "2", "3 or more"),
        ("QLORA_MAX_TRAIN_SAMPLES", "1", "2 or more"),
        ("QLORA_OPTIM", "sgd_of_dreams", "paged_adamw_8bit"),
        ("QLORA_LR_SCHEDULER_TYPE", "spiral", "cosine"),
        ("QLORA_SEED", "-1", "0 to 4294967295"),
        ("QLORA_RANKS", "0,4", "1 or more"),
        ("QLORA_PUSH_TO_HUB", "adapter", "owner/name"),
        ("QLORA_PUSH_TO_HUB", "some/where/else", "owner/name"),
    ],
)
def test_a_bad_setting_names_the_field_the_value_and_what_is_allowed(notebook, variable, value, expected):
    with pytest.raises(ValueError, match=expected) as error:
        notebook.resolve_config({variable: value}, cuda=False)
    message = str(error.value)
    assert variable in message
    assert variable == "QLORA_TRAIN_SHARE" or value in message or value.replace(",", ", ") in message or str(float(value)) in message
    assert "Allowed: " in message or "which takes " in message


def test_a_missing_model_folder_is_said_at_once(notebook):
    for name in ("./nowhere", "/nowhere/at/all", "~/nowhere-at-all", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            notebook.inspect_model(name)


def test_a_file_is_no_folder(notebook, tmp_path):
    (tmp_path / "reviews.csv").write_text("text,label\n")
    with pytest.raises(FileNotFoundError, match="is a file"):
        notebook.local_or_hub(str(tmp_path / "reviews.csv"))


def test_a_folder_without_a_model_is_said(notebook, tmp_path):
    with pytest.raises(ValueError, match="does not know the model|readable config.json"):
        notebook.inspect_model(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "no-such-architecture"}')
    with pytest.raises(ValueError, match="does not know the model.*no-such-architecture"):
        notebook.inspect_model(str(tmp_path))


@pytest.mark.parametrize("config", [GPT2Config(n_layer=1), T5Config(num_layers=1), BertConfig(is_decoder=True, num_hidden_layers=1)], ids=["gpt2", "t5", "bert-decoder"])
def test_a_model_that_is_no_encoder_is_refused(notebook, tmp_path, config):
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not an encoder"):
        notebook.inspect_model(str(tmp_path))


def test_targets_that_match_nothing_name_the_candidates(notebook, tiny_bert):
    model, _ = notebook.inspect_model(tiny_bert)
    with pytest.raises(ValueError, match="'q_proj' matches no linear layer.*Candidates: dense, key, query, value"):
        notebook.check_model(model, ["query", "q_proj"], 32)


def test_more_tokens_than_positions_are_refused(notebook, tiny_bert):
    model, _ = notebook.inspect_model(tiny_bert)
    notebook.check_model(model, ["query"], 128)
    with pytest.raises(ValueError, match="max_length=129 is more than the 128 positions"):
        notebook.check_model(model, ["query"], 129)


@pytest.mark.parametrize(("family", "head", "target"), [("bert", ["classifier"], "query"), ("distilbert", ["pre_classifier", "classifier"], "q_lin"), ("roberta", ["classifier"], "value"), ("modernbert", ["head", "classifier"], "Wqkv")])
def test_the_new_head_is_found_in_other_families(notebook, tmp_path, family, head, target):
    from transformers import AutoConfig

    AutoConfig.for_model(family).save_pretrained(tmp_path)
    model, found = notebook.inspect_model(str(tmp_path))
    assert found == head
    notebook.check_model(model, [target], 256)


def test_roberta_has_two_positions_fewer_than_embeddings(notebook, tmp_path):
    from transformers import RobertaConfig

    RobertaConfig(max_position_embeddings=514, num_hidden_layers=1).save_pretrained(tmp_path)
    model, _ = notebook.inspect_model(str(tmp_path))
    notebook.check_model(model, ["query"], 512)
    with pytest.raises(ValueError, match="more than the 512 positions"):
        notebook.check_model(model, ["query"], 513)
