"""README's recipes: each is understood, and most of them, put together, run."""

import ast
import re

import pandas as pd
import pytest
from conftest import ROOT
from hosts import SETTINGS, Host


def read_recipes():
    """Return what each row of README's table of recipes sets."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.split("### Recipes")[1].split("\n#")[0]
    recipes = []
    for literal in re.findall(r"(?m)^\|.*?`(\{.*?\})`", table):
        recipes.append(ast.literal_eval(literal))
    return recipes


RECIPES = read_recipes()
LABELS = ["5", "1"] * 45 + ["3"] * 10  # one is rare
TOGETHER = [  # what can be had in one run
    "text_column",
    "label_column",
    "dataset_name",
    "test_dataset_name",
    "predict_name",
    "class_weights",
    "output_dir",
    "data_dir",
    "efficiency_steps",
    "ranks",
]


def test_the_readme_has_recipes():
    assert len(RECIPES) >= 10


@pytest.mark.parametrize("cuda", [True, False])
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_recipe_is_understood(recipe, cuda, notebook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "new.csv").write_text("text\nA quiet film.\n")
    config, _ = notebook.resolve_config(recipe, {}, cuda)
    for field in set(recipe) - {"preset"}:
        assert getattr(config, field) == recipe[field]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_bert):
    """A run of many recipes together, on a file with the columns of the first."""
    settings = {"model_name": tiny_bert}
    for recipe in RECIPES:
        for field in TOGETHER:
            if field in recipe:
                settings[field] = recipe[field]
    folder = tmp_path_factory.mktemp("recipes")
    for field in ("output_dir", "data_dir"):
        settings[field] = settings[field].replace("/content", str(folder / "content"))
    environ = dict(SETTINGS)
    del environ["QLORA_LABEL_COLUMN"]
    host = Host("recipes", "asking.Kernel", folder, environ, env_file={})
    texts = [
        f"This is text {number}, of {label}." for number, label in enumerate(LABELS)
    ]
    label = settings["label_column"]
    table = pd.DataFrame({"comment": texts, label: LABELS})
    table.to_csv(host.working / settings["dataset_name"], index=False)
    test = table[table[label] == LABELS[0]][:8]  # fewer are left to train on
    test = pd.concat([test, table[table[label] != LABELS[0]][:4]])
    test.to_csv(host.working / settings["test_dataset_name"], index=False)
    table[["comment"]].to_csv(host.working / settings["predict_name"], index=False)
    for cell in host.nb.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source = f"settings = {settings!r}"
    with host.client.setup_kernel(env=host.environ):
        for places in host.sections.values():
            for place in places:
                host.run(place)
        yield host, settings
    host.working.parent.chmod(0o755)


def test_recipes_can_be_put_together(run):
    host, settings = run
    outputs = host.folder / "content" / "drive" / "MyDrive" / "outputs"
    predictions = pd.read_csv(outputs / "predictions.csv")
    assert len(predictions) == len(LABELS)
    assert predictions["confidence"].notna().all()
    assert (outputs / "merged" / "model.safetensors").exists()
    assert (outputs.parent / "Data" / "results.json").exists()
    assert host.ask("len(splits['test'])") == 12
    assert host.ask("largest_class") == 4 / 12  # of what training would suggest
