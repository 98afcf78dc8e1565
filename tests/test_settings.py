"""Sections 1 and 2: what is installed, who wins where a setting is given twice, what is refused, what errors say."""

import importlib.metadata
import re
import sys
from types import SimpleNamespace

import pytest
from conftest import code_cells
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

RECIPE = {"model_name": "bert-base-uncased", "max_length": 256, "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.1}
RECIPE |= {"target_modules": ["query", "value"], "num_train_epochs": 3, "learning_rate": 2e-4, "warmup_ratio": 0.1}
RECIPE |= {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine"}
RECIPE |= {"weight_decay": 0.01, "optim": "paged_adamw_8bit", "fp16": True, "gradient_checkpointing": True, "seed": 42}
RECIPE |= {"early_stopping_patience": 2, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
ON_CPU = {"bnb_4bit_compute_dtype": "float32", "fp16": False, "cuda_graphs": False, "optim": "adamw_8bit"}
ENVIRON = {"QLORA_LEARNING_RATE": "0.1", "QLORA_TAIL_SHARE": "0.2", "SEED": "5", "QLORA": "6"}
LISTS = {"QLORA_RANKS": "2, 8", "QLORA_TARGET_MODULES": "q_lin , v_lin", "QLORA_FP16": "false"}
HALF = {"frozen_dtype": "compute", "fp16": False}
CASES = {  # settings, environment, whether there is a GPU, and what comes of it
    "the defaults are the usual recipe": ({}, {}, True, RECIPE | {"max_train_samples": None}),
    "later presets win": ({"preset": "demo, recommended"}, {}, True, {"learning_rate": 5e-4, "max_length": 64}),
    "and so": ({"preset": ["Recommended", "demo"]}, {}, True, {"learning_rate": 1e-3, "tail_share": 0.5}),
    "a preset of the environment": ({}, {"QLORA_PRESET": "lean"}, True, {"quantize_embeddings": True}),
    "or not": ({"preset": "fast"}, {"QLORA_PRESET": "lean"}, True, {"quantize_embeddings": False}),
    "the environment wins over presets": ({"preset": "recommended"}, ENVIRON, True, {"tail_share": 0.2, "seed": 42}),
    "settings win over both": ({"preset": "recommended", "learning_rate": 0.3}, ENVIRON, True, {"learning_rate": 0.3}),
    "blank is not set": ({"seed": "\t", "lora_r": ""}, {"QLORA_LORA_R": " ", "QLORA_SEED": "7"}, True, {"seed": 7}),
    "text becomes lists": ({}, LISTS, True, {"ranks": [2, 8], "target_modules": ["q_lin", "v_lin"], "fp16": False}),
    "frozen in float16 with scaling": (HALF | {"fp16": True}, {}, True, {"frozen_dtype": "compute", "fp16": True}),
    "in bfloat16": (HALF | {"bnb_4bit_compute_dtype": "bfloat16"}, {}, True, {"fp16": False}),
    "without a GPU in float32": (HALF, {}, False, {"bnb_4bit_compute_dtype": "float32", "fp16": False}),
    "none can be a word": ({"max_train_samples": 9}, {"QLORA_CLASS_WEIGHTS": "none"}, True, {"class_weights": "none"}),
    "without a GPU": ({}, {}, False, ON_CPU | {"preset": "demo", "max_length": 64, "max_train_samples": 2500}),
    "over demo": ({"preset": "recommended", "max_length": 9}, {}, False, {"learning_rate": 5e-4, "max_length": 9}),
    "no demo": ({"preset": "lean,full"}, {}, False, ON_CPU | {"preset": "lean,full", "max_length": 256}),
    "what needs no GPU stays": ({"optim": "adamw_torch"}, {}, False, ON_CPU | {"optim": "adamw_torch"}),
    "none lifts the cap": ({"max_train_samples": "none"}, {}, False, {"max_train_samples": None}),
    "and in the environment": ({}, {"QLORA_MAX_TRAIN_SAMPLES": " None "}, False, {"max_train_samples": None}),
    "own data are not cut": ({"dataset_name": "my.csv"}, {}, False, {"max_train_samples": None}),
    "blank is no data set": ({}, {"QLORA_DATASET_NAME": " "}, False, {"max_train_samples": 2500}),
    "an own cap stays": ({"dataset_name": "a.csv", "max_train_samples": 40}, {}, False, {"max_train_samples": 40}),
}
BAD = {"seed": ["-1", "x", "4294967296"], "lora_r": ["0", "1.5"], "max_length": ["2"], "lora_dropout": ["1", "-0.1"]}
BAD |= {"validation_share": ["0", "1"], "learning_rate": ["0", "inf", "nan"], "optim": ["adam"], "fp16": ["maybe"]}
BAD |= {"max_train_samples": ["1", "many"], "ranks": ["0", "2,x"], "push_to_hub": ["no-owner", "a/b/c"]}
BAD |= {"tail_share": ["1.1"], "bnb_4bit_quant_type": ["int4"], "bnb_4bit_compute_dtype": ["int8"]}


def resolve(notebook, settings=None, cuda=True, **environ):
    return notebook.resolve_config(settings or {}, environ, cuda)


def refusal(notebook, settings=None, **kwargs):
    """Return what the refusal says."""
    with pytest.raises(ValueError) as error:
        resolve(notebook, settings, **kwargs)
    return str(error.value)


@pytest.mark.parametrize(("settings", "environ", "cuda", "expected"), CASES.values(), ids=CASES)
def test_who_wins(notebook, settings, environ, cuda, expected):
    config, _ = resolve(notebook, settings, cuda, **environ)
    assert {name: getattr(config, name) for name in expected} == expected


def test_each_setting_is_shown_with_where_it_comes_from(notebook):
    assert resolve(notebook) == (notebook.Config(), {})
    _, sources = resolve(notebook, {"preset": "recommended", "learning_rate": 0.3}, **ENVIRON)
    expected = {"learning_rate": "learning_rate", "tail_share": "QLORA_TAIL_SHARE"}
    assert sources.items() >= (expected | {"target_modules": "preset recommended"}).items()
    _, sources = resolve(notebook, {"preset": "full", "dataset_name": "my.csv", "optim": "adamw_torch"}, cuda=False)
    assert sources["fp16"] == "no CUDA GPU" and sources["optim"] == "optim" and "max_train_samples" not in sources


UNKNOWN = [({"lernrate": 1}, {}, "lernrate"), ({}, {"QLORA_LEARN_RATE": "1"}, "QLORA_LEARN_RATE")]
UNKNOWN += [({"": 1}, {}, ""), ({3: 1}, {}, "3"), ({"lr": 1}, {}, "lr")]


@pytest.mark.parametrize(("settings", "environ", "written"), UNKNOWN)
def test_an_unknown_name_is_refused_with_the_nearest_and_all(notebook, settings, environ, written):
    said = refusal(notebook, settings, **environ)
    assert said.startswith(written) and all(name in said for name in notebook.Config.model_fields)
    assert "r" not in written or "preset" not in said.split("learning_rate")[0]  # it stands before the list of all
    said = refusal(notebook, {"preset": "fast,quick"}, cuda=bool(written))
    assert "'quick'" in said and all(name in said for name in notebook.PRESETS)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_a_bad_value_is_refused_under_the_name_that_the_user_wrote(notebook, name, value):
    said, written = refusal(notebook, **{f"QLORA_{name.upper()}": value}), value.split(",")[-1]
    assert said.startswith(f"QLORA_{name.upper()}=") and repr(written) in said and len(said.splitlines()) == 1
    assert refusal(notebook, {name: value}).startswith(f"{name}=")


def test_every_bad_value_and_bad_pair_of_values_is_named(notebook):
    lines = refusal(notebook, {"seed": "x"}, QLORA_LORA_R="0").splitlines()
    assert sorted(line.split("=")[0] for line in lines) == ["QLORA_LORA_R", "seed"]
    shares = [{"validation_share": 0.5, "test_share": 0.5}, {"validation_share": 0.9, "test_share": 0.2}]
    for settings in [*shares, HALF]:  # nothing left to train on; loss scaling is needed
        assert all(name in refusal(notebook, settings) for name in settings)
    assert resolve(notebook, {"validation_share": 0.5, "test_share": 0.4})[0].test_share == 0.4


@effort(max_examples=200, deadline=None)
@given(micro=st.integers(1, 64), steps=st.integers(1, 16), processes=st.integers(1, 16))
def test_the_processes_keep_the_effective_batch_or_say_that_they_cannot(notebook, micro, steps, processes):
    config = notebook.Config(per_device_train_batch_size=micro, gradient_accumulation_steps=steps)
    if micro * steps % processes:
        with pytest.raises(ValueError, match=f"{processes} processes"):
            notebook.share_batch(config, processes)
        return
    share = notebook.share_batch(config, processes)
    parts = share.per_device_train_batch_size, share.gradient_accumulation_steps
    assert parts[0] * parts[1] * processes == micro * steps and parts[0] <= micro and parts[1] <= steps
    assert parts[0] == micro or steps % processes  # accumulation is divided first
    shared = {"per_device_train_batch_size", "gradient_accumulation_steps"}
    assert share.model_dump(exclude=shared) == config.model_dump(exclude=shared)


def test_no_key_of_the_environment_shows_in_an_error(notebook, monkeypatch):
    keys = dict.fromkeys(["HF_TOKEN", "WANDB_API_KEY", "QLORA_HF_TOKEN"], "hf_CanaryCanaryCanary")
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(notebook.hub.constants, "HF_HUB_OFFLINE", True)
    own = {"HF_TOKEN": keys["HF_TOKEN"], "WANDB_API_KEY": keys["HF_TOKEN"]}
    said = [refusal(notebook, **keys), *(refusal(notebook, {name: "x"}, **own) for name in ("seed", "preset"))]
    with pytest.raises(FileNotFoundError, match="model_name='nobody/nothing-of-this-name'.*network") as error:
        notebook.find_source("nobody/nothing-of-this-name", "model", "main")
    said += [refusal(notebook, {"wandb_api_key": keys["HF_TOKEN"]}), str(error.value), repr(error.value.__cause__)]
    assert not [text for text in said if "Canary" in text]


@pytest.fixture
def install(monkeypatch):
    """A function that runs the first cell with other requirements where some packages are installed, in version 1.0,
    and returns what pip was told. pip installs version 2.0 of anything.
    """

    def install(requirements: str, *loaded: str, **versions: str) -> list[str]:
        told, installed = [], dict.fromkeys(["torch", "untouched", "outdated"], "1.0") | versions

        def version(name: str) -> str:
            if name not in installed:
                raise importlib.metadata.PackageNotFoundError(name)
            return installed[name]

        def run_line_magic(name: str, line: str) -> None:
            told.extend(re.findall(r"'(.+?)'", line))
            installed.update({re.split("[>=]", each)[0]: "2.0" for each in told})

        monkeypatch.setattr(importlib.metadata, "version", version)
        monkeypatch.delitem(sys.modules, "torch", raising=False)
        for name in loaded:
            monkeypatch.setitem(sys.modules, name, SimpleNamespace(__spec__=name))
        cell = re.sub(r'(REQUIREMENTS = """).*?(""")', rf"\1{requirements}\2", code_cells()[0].source, flags=re.DOTALL)
        exec(cell, {"get_ipython": lambda: SimpleNamespace(run_line_magic=run_line_magic)})
        return told

    return install


def test_only_what_is_missing_or_too_old_is_installed_and_torch_is_kept(install):
    assert install("torch>=1.0,<3 untouched>=0.5,<1.0 outdated>=1.0") == []  # torchao may be missing
    told = install("torch>=2.0 untouched>=1.0,<2 outdated>=2.0 missing>=1.0,<3", "torch")  # which needs no restart
    assert told == ["outdated>=2.0", "missing>=1.0,<3", "torch==1.0"]
    assert install("torch>=1.0", torchao="0.15") == ["torchao>=0.16", "torch==1.0"]
    assert install("torch>=1.0", torchao="0.17.0rc1") == []


NAMED = [("outdated>=3.0", (), ""), ("outdated>=2.0", ("outdated",), ""), ("missing>=1", (), "0")]


@pytest.mark.parametrize(("wanted", "loaded", "rank"), NAMED)
def test_what_pip_cannot_do_and_what_needs_a_restart_is_named(install, monkeypatch, wanted, loaded, rank):
    """A version that pip does not have, an update of what is loaded, and several processes that would all install."""
    monkeypatch.setenv("LOCAL_RANK", rank) if rank else None
    with pytest.raises(RuntimeError, match=wanted.split(">")[0]):
        install(wanted, *loaded)
