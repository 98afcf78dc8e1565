"""Model and data from the Hub: the defaults load, and what goes wrong ends in time."""

import json
import shutil

import pandas as pd
import pytest
from fake_hub import Fault, Hub, read_apart
from safetensors.torch import load_file, save_file

LIMIT = 60  # seconds for a reading, beside others on two processors
CODED = ["model/pickled", "model/foreign", "model/coded", "dataset/coded"]
MODEL = {"tokens": ["a", "film"], "head": ["classifier"], "word": 1.0}
OLDER_MODEL = {"tokens": ["a", "film"], "head": ["classifier"], "word": 2.0}
DATASET = {"rows": [8, 32, 40], "labels": ["negative", "positive"]}
OLDER_DATASET = {"rows": [8, 20, 32], "labels": ["negative", "positive"]}
WORDS = "embeddings.word_embeddings.weight"
LASTING = {
    "model/unknown": Fault("404"),
    "model/gated": Fault("401"),
    "model/down": Fault("503"),
    "model/dropping": Fault("drop"),
    "model/silent": Fault("stall"),
    "model/stalled": Fault("stall", "GET .*safetensors"),
    "model/shortened": Fault("shorten", "GET .*safetensors"),
    "dataset/unknown": Fault("404"),
    "dataset/gated": Fault("401"),
    "dataset/down": Fault("503"),
    "dataset/dropping": Fault("drop"),
    "dataset/silent": Fault("stall"),
    "dataset/stalled": Fault("stall", "GET .*parquet"),
    "dataset/shortened": Fault("shorten", "GET .*parquet"),
}
PASSING = {
    "model/busy": Fault("429", "HEAD .*config.json", times=1),
    "model/hiccup": Fault("503", "GET .*revision", times=1),
    "model/interrupted": Fault("drop", "GET .*safetensors", times=1),
    "dataset/busy": Fault("429", "HEAD .*train", times=1),
    "dataset/hiccup": Fault("503", "HEAD .*train", times=1),
    "dataset/interrupted": Fault("drop", "GET .*train", times=1),
}


def write_model(folder, tiny_bert, word):
    """Write the tiny BERT with one number for all of its words."""
    shutil.copytree(tiny_bert, folder)
    weights = load_file(folder / "model.safetensors")
    weights[WORDS].fill_(word)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def write_dataset(folder, sizes):
    """Write splits of so many rows as Parquet files."""
    folder.mkdir(parents=True)
    for split, size in sizes.items():
        rows = pd.DataFrame({"review": [f"{split} film {row}" for row in range(size)]})
        rows["sentiment"] = rows.index % 2
        rows.to_parquet(folder / f"{split}-00000-of-00001.parquet", index=False)


def add_code(folder, model_type):
    """Add a program to a repository, and ask for it in the model's configuration."""
    folder.mkdir(exist_ok=True)
    program = "import os\nopen(os.environ['HF_HOME'] + '/ran', 'w')"
    (folder / "coded.py").write_text(program)
    path = folder / "config.json"
    if path.exists():
        about = json.loads(path.read_text())
        about["model_type"] = model_type
        about["auto_map"] = {"AutoConfig": "coded.Config", "AutoModel": "coded.Model"}
        path.write_text(json.dumps(about))


@pytest.fixture(scope="module")
def folders(notebook, tiny_bert, tmp_path_factory):
    """The folders that the Hub serves, each with a folder for each state."""
    place = tmp_path_factory.mktemp("hub")
    write_model(place / "model" / "main", tiny_bert, word=1.0)
    write_model(place / "model" / "older", tiny_bert, word=2.0)
    rows = {"train": 32, "validation": 8, "test": 40}
    write_dataset(place / "dataset" / "main", rows)
    older_rows = dict(rows)
    older_rows["test"] = 20
    write_dataset(place / "dataset" / "older", older_rows)
    shutil.copytree(tiny_bert, place / "pickled" / "main")
    weights = place / "pickled" / "main" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    shutil.copytree(tiny_bert, place / "foreign" / "main")
    add_code(place / "foreign" / "main", "foreign")
    shutil.copytree(tiny_bert, place / "coded" / "main")
    add_code(place / "coded" / "main", "bert")
    write_dataset(place / "program" / "main", {"train": 4})
    add_code(place / "program" / "main", None)  # a data set's bears its name
    folders = {
        notebook.Config().model_name: place / "model",
        notebook.Config().dataset_name: place / "dataset",
        "dataset/coded": place / "program",
    }
    for name in ("model", "dataset"):
        folders[name] = place / name
    for name in ("pickled", "foreign", "coded"):
        folders[f"model/{name}"] = place / name
    return folders


@pytest.fixture(scope="module")
def hub(folders):
    """The Hub while it answers."""
    faults = dict(LASTING)
    faults.update(PASSING)
    hub = Hub(folders, faults)
    yield hub
    hub.stop()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The folder with the cache of all readers."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def defaults(notebook):
    """The default model and data set, as arguments of `read`, in two states."""
    config = notebook.Config()
    return {
        "model": ("model", config.model_name, "main"),
        "older model": ("model", config.model_name, "older"),
        "dataset": ("dataset", config.dataset_name, "main"),
        "older dataset": ("dataset", config.dataset_name, "older"),
    }


@pytest.fixture(scope="module")
def ends(hub, home, defaults):
    """How each reading ended while the Hub answered."""
    readings = dict(defaults)
    for name in [*LASTING, *PASSING, *CODED]:
        readings[name] = (name.split("/")[0], name, "main")
    readings["no model"] = ("model", "model/fine", "gone")
    readings["no dataset"] = ("dataset", "dataset/fine", "gone")
    return read_apart(readings, hub, home)


@pytest.fixture(scope="module")
def later_ends(ends, hub, home, defaults):
    """How the same readings of the defaults ended when nobody answered any more."""
    hub.stop()
    return read_apart(defaults, hub, home)


def test_the_default_model_and_data_set_load(ends):
    assert ends["model"]["found"] == MODEL
    assert ends["dataset"]["found"] == DATASET


def test_another_revision_is_read_where_it_is_named(ends):
    assert ends["older model"]["found"] == OLDER_MODEL
    assert ends["older dataset"]["found"] == OLDER_DATASET


@pytest.mark.parametrize(
    ("kind", "revision"), [("model", " (gone) "), ("dataset", " its revision gone.")]
)
def test_a_revision_that_does_not_exist_is_named(ends, kind, revision):
    said = ends[f"no {kind}"]["said"]
    assert f"'{kind}/fine'" in said
    assert revision in said


@pytest.mark.parametrize("name", ["model", "older model", "dataset", "older dataset"])
def test_without_a_connection_the_cache_is_enough(ends, later_ends, name):
    assert later_ends[name]["found"] == ends[name]["found"]


@pytest.mark.parametrize("repo", LASTING)
def test_a_fault_that_lasts_ends_in_time_and_says_what_to_do(ends, hub, repo):
    end = ends[repo]
    assert hub.met[repo] > 0
    assert end["error"] in ("ValueError", "FileNotFoundError")
    assert f"'{repo}'" in end["said"]
    assert "Check name and network, or name a local" in end["said"]
    assert end["seconds"] < LIMIT


@pytest.mark.parametrize("repo", PASSING)
def test_a_fault_that_passes_is_survived(ends, hub, repo):
    assert hub.met[repo] > 0
    assert ends[repo]["error"] is None


def test_weights_that_can_hold_code_are_not_even_downloaded(ends, hub):
    assert ends["model/pickled"]["error"] == "ValueError"
    assert "safetensors" in ends["model/pickled"]["said"]
    assert "pytorch_model.bin" not in hub.asked


def test_code_of_a_repository_is_not_run_and_nobody_is_asked(ends, home):
    assert ends["model/coded"]["error"] is None  # transformers knows such a model
    assert ends["model/foreign"]["error"] == "ValueError"
    assert not (home / "ran").exists()
    assert not (home / "asked").exists()
