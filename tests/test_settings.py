"""Sections 1 and 2: who wins where a setting is given twice, what is refused, and what an error says."""

import http.server
import inspect
import socket
import threading
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

RECIPE = {"model_name": "bert-base-uncased", "max_length": 256, "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.1}
RECIPE |= {"target_modules": ["query", "value"], "num_train_epochs": 3, "learning_rate": 2e-4, "warmup_ratio": 0.1}
RECIPE |= {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine"}
RECIPE |= {"weight_decay": 0.01, "optim": "paged_adamw_8bit", "fp16": True, "gradient_checkpointing": True, "seed": 42}
RECIPE |= {"early_stopping_patience": 2, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def resolve(notebook, settings=None, cuda=True, **environ):
    return notebook.resolve_config(settings or {}, environ, cuda)


def refusal(notebook, settings=None, **kwargs):
    """Return what the refusal says."""
    with pytest.raises(ValueError) as error:
        resolve(notebook, settings, **kwargs)
    return str(error.value)


def test_the_defaults_are_the_usual_recipe_and_come_from_nowhere(notebook):
    config, sources = resolve(notebook)
    assert {name: getattr(config, name) for name in RECIPE} == RECIPE
    assert config == notebook.Config() and sources == {}


def test_presets_win_over_defaults_from_left_to_right(notebook, monkeypatch):
    monkeypatch.setitem(notebook.PRESETS, "first", {"seed": 1, "lora_r": 2})
    monkeypatch.setitem(notebook.PRESETS, "second", {"seed": 3, "lora_alpha": 4})
    config, sources = resolve(notebook, {"preset": "first, second"})
    assert (config.seed, config.lora_r, config.lora_alpha) == (3, 2, 4)
    assert sources["seed"] == "preset second" and sources["lora_r"] == "preset first"
    assert resolve(notebook, {"preset": "second,first"})[0].seed == 1


def test_the_environment_wins_over_presets_and_the_settings_over_both(notebook):
    environ = {"QLORA_LEARNING_RATE": "0.1", "QLORA_TAIL_SHARE": "0.2", "SEED": "5", "QLORA": "6"}
    config, sources = resolve(notebook, {"preset": "recommended", "learning_rate": 0.3}, **environ)
    assert (config.learning_rate, config.tail_share, config.seed) == (0.3, 0.2, 42)
    assert config.target_modules == ["all-linear"] and sources["target_modules"] == "preset recommended"
    assert sources["learning_rate"] == "learning_rate" and sources["tail_share"] == "QLORA_TAIL_SHARE"


def test_a_preset_can_be_named_in_the_environment(notebook):
    assert resolve(notebook, QLORA_PRESET="lean")[0].quantize_embeddings
    assert not resolve(notebook, {"preset": "fast"}, QLORA_PRESET="lean")[0].quantize_embeddings


@pytest.mark.parametrize(
    ("preset", "is_demo"), [("", True), ("recommended", True), ("full", False), ("lean,full", False)]
)
def test_without_a_gpu_demo_is_laid_under_all_but_full(notebook, preset, is_demo):
    config, _ = resolve(notebook, {"preset": preset}, cuda=False)
    assert (config.max_length == notebook.PRESETS["demo"]["max_length"]) == is_demo
    assert config.preset.split(",")[0] == ("demo" if is_demo else preset.split(",")[0])


def test_other_presets_and_settings_win_over_demo(notebook):
    config, _ = resolve(notebook, {"preset": "recommended", "max_length": 99}, cuda=False)
    assert config.learning_rate == notebook.PRESETS["recommended"]["learning_rate"] != 1e-3
    assert config.max_length == 99 and config.gradient_checkpointing is False


def test_with_a_gpu_there_is_no_demo_unless_it_is_named(notebook):
    assert resolve(notebook)[0].max_train_samples is None
    assert resolve(notebook, {"preset": "demo"})[0].max_train_samples == notebook.PRESETS["demo"]["max_train_samples"]


@pytest.mark.parametrize("settings", [{"max_train_samples": "none"}, {"max_train_samples": None}])
def test_none_lifts_the_demo_cap(notebook, settings):
    assert resolve(notebook, settings, cuda=False)[0].max_train_samples is None
    assert resolve(notebook, cuda=False, QLORA_MAX_TRAIN_SAMPLES=" None ")[0].max_train_samples is None


def test_the_demo_cap_falls_away_for_an_own_data_set_unless_it_was_set(notebook):
    config, sources = resolve(notebook, {"dataset_name": "my.csv"}, cuda=False)
    assert config.max_train_samples is None and "max_train_samples" not in sources
    assert resolve(notebook, cuda=False, QLORA_DATASET_NAME="my.csv")[0].max_train_samples is None
    assert resolve(notebook, cuda=False, QLORA_DATASET_NAME=" ")[0].max_train_samples == 2500
    own = resolve(notebook, {"dataset_name": "my.csv"}, cuda=False, QLORA_MAX_TRAIN_SAMPLES="40")[0]
    assert own.max_train_samples == 40


def test_class_weights_none_is_a_word_and_no_lifted_limit(notebook):
    assert resolve(notebook, QLORA_CLASS_WEIGHTS="none")[0].class_weights == "none"


@pytest.mark.parametrize("blank", ["", "  ", "\t"])
def test_blank_is_not_set(notebook, blank):
    assert resolve(notebook, {"seed": blank}, QLORA_LORA_R=blank) == resolve(notebook)
    assert resolve(notebook, {"seed": blank}, QLORA_SEED="7")[0].seed == 7


def test_text_becomes_the_type_of_the_field(notebook):
    environ = {"QLORA_RANKS": "2, 8", "QLORA_TARGET_MODULES": "q_lin , v_lin", "QLORA_FP16": "false"}
    config, _ = resolve(notebook, QLORA_LR_SCHEDULER_TYPE="linear", QLORA_OPTIM="adamw_torch", **environ)
    assert config.ranks == [2, 8] and config.target_modules == ["q_lin", "v_lin"] and config.fp16 is False
    assert (config.lr_scheduler_type, config.optim) == ("linear", "adamw_torch")
    assert type(config.lr_scheduler_type) is type(config.optim) is str


UNKNOWN = [({"lernrate": 1}, {}, "lernrate"), ({}, {"QLORA_LEARN_RATE": "1"}, "QLORA_LEARN_RATE")]
UNKNOWN += [({"": 1}, {}, ""), ({3: 1}, {}, "3")]


@pytest.mark.parametrize(("settings", "environ", "written"), UNKNOWN)
def test_an_unknown_name_is_refused_with_the_nearest_and_all(notebook, settings, environ, written):
    said = refusal(notebook, settings, **environ)
    assert said.startswith(written) and all(name in said.split("Allowed")[1] for name in notebook.Config.model_fields)
    if "r" in written:
        assert "Nearest: learning_rate" in said


@pytest.mark.parametrize("cuda", [True, False])
def test_an_unknown_preset_is_refused_with_the_allowed(notebook, cuda):
    said = refusal(notebook, {"preset": "fast,quick"}, cuda=cuda)
    assert "'quick'" in said and all(name in said.split("Allowed")[1] for name in notebook.PRESETS)


BAD = {"seed": ["-1", "x", "4294967296"], "lora_r": ["0", "1.5"], "max_length": ["2"], "lora_dropout": ["1", "-0.1"]}
BAD |= {"validation_share": ["0", "1"], "learning_rate": ["0", "inf", "nan"], "optim": ["adam"], "fp16": ["maybe"]}
BAD |= {"max_train_samples": ["1", "many"], "ranks": ["0", "2,x"], "push_to_hub": ["no-owner", "a/b/c"]}
BAD |= {"tail_share": ["1.1"], "bnb_4bit_quant_type": ["int4"], "bnb_4bit_compute_dtype": ["int8"]}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_a_bad_value_is_refused_under_the_name_that_the_user_wrote(notebook, name, value):
    said, written = refusal(notebook, **{f"QLORA_{name.upper()}": value}), value.split(",")[-1]
    assert said.startswith(f"QLORA_{name.upper()}=") and repr(written) in said and len(said.splitlines()) == 1
    assert refusal(notebook, {name: value}).startswith(f"{name}=")


def test_every_bad_value_is_named_at_once(notebook):
    lines = refusal(notebook, {"seed": "x"}, QLORA_LORA_R="0").splitlines()
    assert sorted(line.split("=")[0] for line in lines) == ["QLORA_LORA_R", "seed"]


@pytest.mark.parametrize(("validation", "test", "is_refused"), [(0.5, 0.5, True), (0.9, 0.2, True), (0.5, 0.4, False)])
def test_the_shares_leave_something_to_train_on(notebook, validation, test, is_refused):
    settings = {"validation_share": validation, "test_share": test}
    if is_refused:
        said = refusal(notebook, settings)
        assert "validation_share" in said and "test_share" in said
    else:
        assert resolve(notebook, settings)[0].test_share == test


def test_without_a_gpu_what_needs_one_is_changed_and_said(notebook):
    config, sources = resolve(notebook, {"preset": "full", "fp16": True}, cuda=False)
    changed = {"bnb_4bit_compute_dtype": "float32", "fp16": False, "cuda_graphs": False, "optim": "adamw_8bit"}
    assert {name: getattr(config, name) for name in changed} == changed
    assert {name: sources[name] for name in changed} == dict.fromkeys(changed, "no CUDA GPU")


def test_without_a_gpu_what_needs_none_stays_with_its_source(notebook):
    config, sources = resolve(notebook, {"preset": "full", "optim": "adamw_torch", "fp16": False}, cuda=False)
    assert config.optim == "adamw_torch" and sources["optim"] == "optim" and sources["fp16"] == "fp16"


@pytest.mark.parametrize(
    "changes", [{"frozen_dtype": "float32"}, {"fp16": True}, {"bnb_4bit_compute_dtype": "bfloat16"}]
)
def test_frozen_float16_needs_loss_scaling(notebook, changes):
    settings = {"frozen_dtype": "compute", "fp16": False}
    said = refusal(notebook, settings)
    assert "frozen_dtype" in said and "fp16=True" in said
    config, _ = resolve(notebook, settings | changes)
    assert {name: getattr(config, name) for name in changes} == changes
    assert resolve(notebook, settings, cuda=False)[0].fp16 is False  # there it computes in float32


@effort(max_examples=200, deadline=None)
@given(micro=st.integers(1, 64), steps=st.integers(1, 16), processes=st.integers(1, 16))
def test_the_processes_keep_the_effective_batch_or_say_that_they_cannot(notebook, micro, steps, processes):
    config = notebook.Config(per_device_train_batch_size=micro, gradient_accumulation_steps=steps)
    if micro * steps % processes:
        with pytest.raises(ValueError, match=f"{processes} processes .*{micro} x {steps}"):
            notebook.share_batch(config, processes)
        return
    share = notebook.share_batch(config, processes)
    parts = share.per_device_train_batch_size, share.gradient_accumulation_steps
    assert parts[0] * parts[1] * processes == micro * steps and parts[0] <= micro and parts[1] <= steps
    untouched = {"per_device_train_batch_size", "gradient_accumulation_steps"}
    assert share.model_dump(exclude=untouched) == config.model_dump(exclude=untouched)


def test_accumulation_is_divided_before_the_micro_batch(notebook):
    config = notebook.share_batch(notebook.Config(), 2)
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (16, 1)
    config = notebook.share_batch(notebook.Config(), 4)
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (8, 1)


FLOORS = {"numpy>=1.0": False, "numpy>=999": True, "numpy>=1.0,<1.1": False, "no-such-package-x>=1": True}


@pytest.mark.parametrize(("line", "is_unmet"), FLOORS.items())
def test_a_requirement_is_unmet_where_it_is_missing_or_below_its_floor(notebook, line, is_unmet):
    assert notebook.is_unmet(line) is is_unmet


def test_torchao_may_be_missing_but_not_old(notebook, monkeypatch):
    metadata = notebook.importlib.metadata

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert not notebook.is_unmet("torchao>=0.16") and notebook.is_unmet("numpy>=1")
    for version, is_unmet in {"0.15": True, "0.16": False, "0.17.0rc1": False}.items():
        monkeypatch.setattr(metadata, "version", lambda name, version=version: version)
        assert notebook.is_unmet("torchao>=0.16") is is_unmet


@contextmanager
def server(status):
    """A web server on this machine that answers everything with `status`; yields its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{running.server_port}"
        finally:
            running.shutdown()


@pytest.mark.parametrize("status", [200, 401, 404, 503])
def test_the_hub_answers_where_anything_does_even_an_error(notebook, status):
    with server(status) as address:
        assert notebook.hub_answers(address, timeout=5)


def test_silence_refusal_and_nonsense_are_no_answer(notebook):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert not notebook.hub_answers(address, timeout=0.2)
    assert not notebook.hub_answers(address, timeout=5)  # closed: refused
    assert not notebook.hub_answers("no address", timeout=5)
    assert 0 < inspect.signature(notebook.hub_answers).parameters["timeout"].default <= 10


def test_no_key_of_the_environment_shows_in_an_error(notebook, monkeypatch):
    canary = "hf_CanaryCanaryCanary"
    keys = {"HF_TOKEN": canary, "WANDB_API_KEY": canary, "QLORA_HF_TOKEN": canary}
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(notebook.hub.constants, "HF_HUB_OFFLINE", True)
    said = [refusal(notebook, **keys), refusal(notebook, {"seed": "x"}, HF_TOKEN=canary, WANDB_API_KEY=canary)]
    said += [refusal(notebook, {"preset": "x"}, HF_TOKEN=canary), refusal(notebook, {"wandb_api_key": canary})]
    with pytest.raises(FileNotFoundError) as error:
        notebook.find_source("nobody/nothing-of-this-name", "model", "main")
    assert not [text for text in [*said, str(error.value), repr(error.value.__cause__)] if canary in text]
    assert "model_name='nobody/nothing-of-this-name'" in str(error.value) and "network" in str(error.value)
