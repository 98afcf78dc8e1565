"""Section 2: who wins where a setting is given twice, what is refused, and how."""

import pytest


def resolve(notebook, settings, environ, cuda=True):
    config, _ = notebook.resolve_config(settings, environ, cuda)
    return config


def refusal(notebook, settings, environ):
    """Return what the refusal says."""
    with pytest.raises(ValueError) as error:
        notebook.resolve_config(settings, environ, cuda=True)
    return str(error.value)


def test_the_defaults_are_the_usual_recipe(notebook):
    config = notebook.Config()
    assert config.model_name == "bert-base-uncased"
    assert config.max_length == 256
    assert config.bnb_4bit_use_double_quant
    assert config.lora_r == 16
    assert config.lora_alpha == 32
    assert config.lora_dropout == 0.1
    assert config.target_modules == ["query", "value"]
    assert config.per_device_train_batch_size == 16
    assert config.gradient_accumulation_steps == 2
    assert config.num_train_epochs == 3
    assert config.learning_rate == 2e-4
    assert config.lr_scheduler_type == "cosine"
    assert config.warmup_ratio == 0.1
    assert config.weight_decay == 0.01
    assert config.optim == "paged_adamw_8bit"
    assert config.fp16
    assert config.gradient_checkpointing
    assert config.early_stopping_patience == 2
    assert config.max_train_samples is None
    assert config.seed == 42


def test_with_a_gpu_the_defaults_are_taken_as_they_are(notebook):
    assert notebook.resolve_config({}, {}, cuda=True) == (notebook.Config(), {})


def test_a_preset_sets_its_fields(notebook):
    config = resolve(notebook, {"preset": "recommended"}, {})
    assert config.target_modules == ["all-linear"]
    assert config.learning_rate == 5e-4
    assert config.max_length == 512
    assert config.frozen_dtype == "compute"


@pytest.mark.parametrize("preset", ["demo, recommended", ["Demo", "Recommended"]])
def test_of_several_presets_the_last_wins(notebook, preset):
    config = resolve(notebook, {"preset": preset}, {})
    assert config.learning_rate == 5e-4
    assert config.gradient_accumulation_steps == 1  # which only demo sets


def test_presets_in_the_other_order_give_the_other_value(notebook):
    config = resolve(notebook, {"preset": "recommended,demo"}, {})
    assert config.learning_rate == 1e-3


def test_the_environment_can_name_the_preset(notebook):
    config = resolve(notebook, {}, {"QLORA_PRESET": "lean"})
    assert config.frozen_dtype == "compute"
    assert config.gradient_checkpointing


def test_a_preset_of_the_settings_takes_the_place_of_the_environment_s(notebook):
    config = resolve(notebook, {"preset": "full"}, {"QLORA_PRESET": "lean"})
    assert config.frozen_dtype == "float32"


def test_the_environment_wins_over_a_preset(notebook):
    environ = {"QLORA_LEARNING_RATE": "0.1"}
    config = resolve(notebook, {"preset": "recommended"}, environ)
    assert config.learning_rate == 0.1


def test_settings_win_over_the_environment(notebook):
    environ = {"QLORA_LEARNING_RATE": "0.1"}
    config = resolve(notebook, {"learning_rate": 0.3}, environ)
    assert config.learning_rate == 0.3


def test_other_names_of_the_environment_are_not_read(notebook):
    config = resolve(notebook, {}, {"SEED": "5", "QLORA": "6", "seed": "7"})
    assert config == notebook.Config()


def test_a_blank_value_is_not_set(notebook):
    environ = {"QLORA_LORA_R": " ", "QLORA_SEED": "7"}
    config = resolve(notebook, {"seed": "\t", "lora_r": ""}, environ)
    assert config.seed == 7
    assert config.lora_r == 16


def test_text_of_the_environment_becomes_lists_and_bools(notebook):
    environ = {
        "QLORA_RANKS": "2, 8",
        "QLORA_TARGET_MODULES": "q_lin , v_lin",
        "QLORA_FP16": "false",
    }
    config = resolve(notebook, {}, environ)
    assert config.ranks == [2, 8]
    assert config.target_modules == ["q_lin", "v_lin"]
    assert not config.fp16


def test_none_or_brackets_empty_the_ranks(notebook):
    assert resolve(notebook, {}, {"QLORA_RANKS": "none"}).ranks == []
    assert resolve(notebook, {}, {"QLORA_RANKS": "[]"}).ranks == []
    assert resolve(notebook, {"ranks": []}, {}).ranks == []


def test_none_lifts_the_demo_s_cap(notebook):
    environ = {"QLORA_MAX_TRAIN_SAMPLES": " None "}
    config = resolve(notebook, {}, environ, cuda=False)
    assert config.max_train_samples is None


def test_none_of_the_class_weights_is_a_word(notebook):
    config = resolve(notebook, {}, {"QLORA_CLASS_WEIGHTS": "none"})
    assert config.class_weights == "none"


def test_without_a_gpu_the_demo_runs_in_float32(notebook):
    config = resolve(notebook, {}, {}, cuda=False)
    assert config.preset == "demo"
    assert config.max_length == 64
    assert config.max_train_samples == 2500
    assert config.bnb_4bit_compute_dtype == "float32"
    assert config.optim == "adamw_8bit"
    assert not config.fp16
    assert not config.cuda_graphs


def test_without_a_gpu_other_presets_and_settings_win_over_the_demo(notebook):
    settings = {"preset": "recommended", "max_length": 9}
    config = resolve(notebook, settings, {}, cuda=False)
    assert config.preset == "demo,recommended"
    assert config.learning_rate == 5e-4
    assert config.max_length == 9


def test_the_preset_full_keeps_the_demo_away(notebook):
    config = resolve(notebook, {"preset": "lean,full"}, {}, cuda=False)
    assert config.preset == "lean,full"
    assert config.max_length == 256


def test_an_optimizer_that_needs_no_gpu_stays(notebook):
    config = resolve(notebook, {"optim": "adamw_torch"}, {}, cuda=False)
    assert config.optim == "adamw_torch"


def test_own_data_are_not_cut_by_the_demo(notebook):
    config = resolve(notebook, {"dataset_name": "my.csv"}, {}, cuda=False)
    assert config.max_train_samples is None
    assert config.validation_share == 0.1


def test_own_data_keep_their_own_cap(notebook):
    settings = {"dataset_name": "my.csv", "max_train_samples": 40}
    config = resolve(notebook, settings, {}, cuda=False)
    assert config.max_train_samples == 40


def test_a_blank_name_of_a_data_set_leaves_the_demo_s(notebook):
    config = resolve(notebook, {}, {"QLORA_DATASET_NAME": " "}, cuda=False)
    assert config.dataset_name == "cornell-movie-review-data/rotten_tomatoes"
    assert config.max_train_samples == 2500


def test_frozen_parts_in_float16_need_loss_scaling(notebook):
    settings = {"frozen_dtype": "compute", "fp16": False}
    said = refusal(notebook, settings, {})
    assert "frozen_dtype" in said and "fp16" in said


def test_frozen_parts_in_bfloat16_need_no_loss_scaling(notebook):
    settings = {
        "frozen_dtype": "compute",
        "fp16": False,
        "bnb_4bit_compute_dtype": "bfloat16",
    }
    assert not resolve(notebook, settings, {}).fp16


def test_without_a_gpu_frozen_parts_in_the_compute_dtype_are_float32(notebook):
    settings = {"frozen_dtype": "compute", "fp16": False}
    config = resolve(notebook, settings, {}, cuda=False)
    assert config.bnb_4bit_compute_dtype == "float32"


def test_each_setting_is_shown_with_where_it_comes_from(notebook):
    settings = {"preset": "recommended", "learning_rate": 0.3}
    environ = {"QLORA_SEED": "7", "QLORA_LEARNING_RATE": "0.1"}
    _, sources = notebook.resolve_config(settings, environ, cuda=True)
    assert sources["learning_rate"] == "learning_rate"
    assert sources["seed"] == "QLORA_SEED"
    assert sources["target_modules"] == "preset recommended"
    assert "lora_r" not in sources


def test_what_the_device_changed_is_shown(notebook):
    settings = {"dataset_name": "my.csv", "optim": "adamw_torch"}
    _, sources = notebook.resolve_config(settings, {}, cuda=False)
    assert sources["fp16"] == "no CUDA GPU"
    assert sources["optim"] == "optim"
    assert "max_train_samples" not in sources  # the demo's, which was not taken


@pytest.mark.parametrize("name", ["lernrate", "", 3, "lr"])
def test_an_unknown_setting_is_refused_with_all_that_are_allowed(notebook, name):
    said = refusal(notebook, {name: 1}, {})
    assert said.startswith(f"{name} is not a setting")
    for field in notebook.Config.model_fields:
        assert field in said.split("Allowed")[1]


@pytest.mark.parametrize("name", ["lernrate", "learning_rat", "lr"])
def test_the_nearest_setting_is_named(notebook, name):
    said = refusal(notebook, {name: 1}, {})
    assert "learning_rate" in said.split("Allowed")[0]


def test_an_unknown_name_of_the_environment_is_refused_as_written(notebook):
    said = refusal(notebook, {}, {"QLORA_LEARN_RATE": "1"})
    assert said.startswith("QLORA_LEARN_RATE is not a setting")
    assert "learning_rate" in said.split("Allowed")[0]


def test_an_unknown_preset_is_refused_with_all_that_are_allowed(notebook):
    said = refusal(notebook, {"preset": "fast,quick"}, {})
    assert "'quick'" in said
    for name in notebook.PRESETS:
        assert name in said.split("Allowed")[1]


BAD = [
    ("seed", "-1"),
    ("seed", "x"),
    ("seed", "4294967296"),
    ("lora_r", "0"),
    ("lora_r", "1.5"),
    ("max_length", "2"),
    ("lora_dropout", "1"),
    ("lora_dropout", "-0.1"),
    ("validation_share", "0"),
    ("validation_share", "1"),
    ("learning_rate", "0"),
    ("learning_rate", "inf"),
    ("learning_rate", "nan"),
    ("optim", "adam"),
    ("fp16", "maybe"),
    ("max_train_samples", "1"),
    ("max_train_samples", "many"),
    ("ranks", "0"),
    ("push_to_hub", "no-owner"),
    ("push_to_hub", "a/b/c"),
    ("optim", "paged_lion_8bit"),
    ("lr_scheduler_type", "cosine_with_min_lr"),  # which needs more than a name
    ("bnb_4bit_compute_dtype", "int8"),
    ("class_weights", "heavy"),
    ("train_sampling_strategy", "sorted"),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_value_is_refused_as_the_user_wrote_it(notebook, name, value):
    said = refusal(notebook, {name: value}, {})
    assert said.startswith(f"{name}={value!r}: ")
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_value_of_the_environment_is_refused_so_too(notebook, name, value):
    variable = f"QLORA_{name.upper()}"
    said = refusal(notebook, {}, {variable: value})
    assert said.startswith(f"{variable}={value!r}: ")
    assert len(said.splitlines()) == 1


def test_the_bad_one_of_several_values_is_named(notebook):
    assert refusal(notebook, {}, {"QLORA_RANKS": "2,x"}).startswith("QLORA_RANKS='x'")


def test_an_empty_list_of_target_modules_is_refused(notebook):
    assert refusal(notebook, {"target_modules": []}, {}).startswith("target_modules=")


def test_every_bad_value_is_named_at_once(notebook):
    said = refusal(notebook, {"seed": "x"}, {"QLORA_LORA_R": "0"})
    names = [line.split("=")[0] for line in said.splitlines()]
    assert sorted(names) == ["QLORA_LORA_R", "seed"]


@pytest.mark.parametrize(("validation", "test"), [(0.5, 0.5), (0.9, 0.2)])
def test_shares_that_leave_nothing_to_train_on_are_refused(notebook, validation, test):
    settings = {"validation_share": validation, "test_share": test}
    said = refusal(notebook, settings, {})
    assert "validation_share" in said and "test_share" in said


KEY = "hf_CanaryCanaryCanary"


def test_no_key_shows_where_a_key_is_given_as_a_setting(notebook):
    assert KEY not in refusal(notebook, {}, {"QLORA_HF_TOKEN": KEY})
    assert KEY not in refusal(notebook, {"wandb_api_key": KEY}, {})


def test_no_key_of_the_environment_shows_in_a_refusal_of_settings(notebook):
    environ = {"HF_TOKEN": KEY, "WANDB_API_KEY": KEY}
    assert KEY not in refusal(notebook, {"seed": "x"}, environ)
    assert KEY not in refusal(notebook, {"preset": "x"}, environ)


@pytest.fixture
def offline_with_keys(notebook, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", KEY)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(notebook.hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("offline_with_keys")
def test_no_key_shows_where_the_hub_has_no_such_data_set(notebook):
    with pytest.raises(FileNotFoundError, match="(?s)nobody/nothing.*network") as error:
        notebook.read_tables("nobody/nothing")
    assert KEY not in str(error.value)
    assert KEY not in repr(error.value.__context__)


@pytest.mark.usefixtures("offline_with_keys")
def test_no_key_shows_where_the_hub_has_no_such_model(notebook):
    config = notebook.Config(model_name="nobody/nothing")
    with pytest.raises(ValueError, match="(?s)nobody/nothing.*network") as error:
        notebook.open_checkpoint(config)
    assert KEY not in str(error.value)
    assert KEY not in repr(error.value.__context__)


def test_the_demo_s_epochs_cap_and_shares_belong_to_its_own_data(notebook):
    demo, _ = notebook.resolve_config({}, {}, cuda=False)
    own, sources = notebook.resolve_config({"dataset_name": "my.csv"}, {}, cuda=False)
    assert demo.num_train_epochs == 2
    assert demo.max_train_samples == 2500
    assert own.num_train_epochs == notebook.Config().num_train_epochs
    assert own.max_train_samples is None
    assert own.learning_rate == demo.learning_rate
    assert "num_train_epochs" not in sources


def test_a_file_to_classify_that_does_not_exist_is_refused_at_once(notebook, tmp_path):
    path = tmp_path / "texts.csv"
    said = refusal(notebook, {"predict_name": str(path)}, {})
    assert "there is no such file" in said
    path.write_text("text\ngood\n")
    assert resolve(notebook, {"predict_name": str(path)}, {}).predict_name == str(path)


@pytest.mark.parametrize("field", ["dataset_name", "test_dataset_name", "predict_name"])
@pytest.mark.parametrize(
    "name",
    [
        "Data/results.json",
        "outputs/predictions.csv",
        "outputs/../outputs/test_predictions.csv",
        "outputs/adapter/mine.csv",
        "outputs/merged",
    ],
)
def test_a_file_that_a_run_writes_is_not_its_input(
    notebook, field, name, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Data").mkdir()
    (tmp_path / "outputs" / "adapter").mkdir(parents=True)
    (tmp_path / name).resolve().write_text("text,label\na,b\n")
    assert refusal(notebook, {field: name}, {}).startswith(f"{field}: a run overwrites")


def test_the_demo_leaves_another_preset_s_epochs(notebook, monkeypatch):
    monkeypatch.setitem(notebook.PRESETS, "long", {"num_train_epochs": 4})
    settings = {"dataset_name": "my.csv", "preset": "long"}
    config, sources = notebook.resolve_config(settings, {}, cuda=False)
    assert config.num_train_epochs == 4
    assert sources["num_train_epochs"] == "preset long"
