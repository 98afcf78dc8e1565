"""Section 9 and the recipes: McNemar's test, calibration, accuracy by length, the ensemble, and what the recommended recipe changes."""

import dataclasses
import json
from types import SimpleNamespace

import measure
import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom


def logits_of(confidence: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Return logits whose softmax is ``confidence`` for ``predictions``."""
    margin = np.log(confidence / (1 - confidence)) * np.where(predictions == 1, 1, -1)
    return np.stack([np.zeros_like(margin), margin], axis=-1)


# McNemar's test


def test_mcnemar_counts_what_only_one_gets_right(notebook):
    labels = np.array([1, 1, 1, 1, 0, 0, 0, 0])
    first = np.array([1, 1, 1, 0, 0, 0, 0, 1])
    second = np.array([1, 0, 0, 0, 0, 0, 1, 0])
    test = notebook.mcnemar(labels, first, second)
    assert (test["only_first"], test["only_second"]) == (3, 1)
    assert test["p_value"] == pytest.approx(2 * binom.cdf(1, 4, 0.5))  # both tails of a fair coin


def test_mcnemar_of_equal_predictions_finds_no_difference(notebook):
    labels = np.array([0, 1, 1])
    assert notebook.mcnemar(labels, labels, labels) == {"only_first": 0, "only_second": 0, "p_value": 1.0}


# Calibration


def test_a_calibrated_classifier_has_no_error_and_a_boastful_one_has_its_surplus(notebook):
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.5, 1, 200_000)
    labels = rng.integers(0, 2, len(confidence))
    predictions = np.where(rng.random(len(confidence)) < confidence, labels, 1 - labels)
    assert notebook.calibration(labels, logits_of(confidence, predictions))["ece"] < 0.01
    at_most = np.minimum(confidence, 0.9)
    predictions = np.where(rng.random(len(confidence)) < at_most - 0.1, labels, 1 - labels)
    assert notebook.calibration(labels, logits_of(at_most, predictions))["ece"] == pytest.approx(0.1, abs=0.01)


@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9), st.booleans()), min_size=1, max_size=50))
def test_every_review_is_in_one_bin(notebook, rows):
    logits, labels = np.array([row[:2] for row in rows]), np.array([int(row[2]) for row in rows])
    measured = notebook.calibration(labels, logits)
    assert sum(each["n"] for each in measured["bins"]) == len(rows) and 0 <= measured["ece"] <= 1
    right = sum(each["n"] * each["accuracy"] for each in measured["bins"])
    assert right == pytest.approx(np.sum(logits.argmax(-1) == labels))


# Length and ensemble


def test_accuracy_by_length_divides_the_reviews(notebook):
    right = np.array([[True, True, False, False, True], [True, False, False, True, True]])
    counts = np.array([10, 20, 21, 300, 20])
    rows = notebook.accuracy_by_length(right, counts, [20, 256])
    assert [(row["from_tokens"], row["to_tokens"], row["n"]) for row in rows] == [(1, 20, 3), (21, 256, 1), (257, None, 1)]
    assert [row["accuracy"] for row in rows] == pytest.approx([5 / 6, 0, 0.5])


def test_the_ensemble_trusts_whom_the_validation_split_trusts(notebook):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 1000)
    signs = 2 * labels - 1
    noise = rng.standard_normal((2, 1000))
    margins = signs + noise[0]  # as good as it is independent of the logits
    logits = np.stack([np.zeros(1000), 3 * (signs + noise[1])], axis=-1)
    half = labels[:500], logits[:500], margins[:500]
    stack = notebook.fit_ensemble(*half)
    assert stack.coef_[0, 1] == pytest.approx(3 * stack.coef_[0, 0], rel=0.2)  # trusted alike, on scales one to three
    accuracy = [np.mean(guess == labels[500:]) for guess in (stack.predict(notebook.score_pairs(logits[500:], margins[500:])), logits[500:].argmax(-1), margins[500:] > 0)]
    assert accuracy[0] > max(accuracy[1:]) + 0.03


# The recommended recipe


def test_the_recommended_recipe_wins_over_the_profile_and_the_user_over_both(notebook):
    for cuda in (False, True):
        config, sources = notebook.resolve_config({"QLORA_RECIPE": "recommended", "QLORA_NUM_TRAIN_EPOCHS": "2"}, cuda=cuda)
        assert (config.tail_share, config.target_modules, config.train_pooler, config.learning_rate) == (0.5, ["all-linear"], True, 1e-3)
        assert config.num_train_epochs == 2 and sources["num_train_epochs"] == "QLORA_NUM_TRAIN_EPOCHS" and sources["tail_share"] == "recommended recipe"
        assert notebook.carried_out(config).optim == "adamw_8bit"  # 8 bits in every execution


def test_the_road_leads_from_the_defaults_to_the_recommended_recipe(notebook):
    mission, *_, recommended = measure.road()
    assert mission.changes == notebook.recipe_values("mission") == {}
    assert recommended.changes | {"optim": "adamw_8bit"} == notebook.recipe_values("recommended")
    for before, after in zip(measure.road(), measure.road()[1:]):
        assert len(after.changes) == len(before.changes) + 1


def test_no_two_variants_are_the_same(notebook):
    for variants in (measure.all_variants(), measure.searched()):
        assert len({each.name for each in variants}) == len(variants)
        settings = [(str(dataclasses.asdict(measure.variant_config(notebook.Config(), each, 1))), each.full, each.loraplus, each.four_bit) for each in variants]
        assert len(set(settings)) == len(variants)


def test_the_pooler_is_trained_whole_and_every_other_linear_layer_has_adapters(notebook, tiny_config):
    config = dataclasses.replace(tiny_config, target_modules=["all-linear"], train_pooler=True)
    architecture, _ = notebook.inspect_model(config.model_name)
    head = notebook.trained_whole(architecture, config.train_pooler)
    notebook.check_model(architecture, config.target_modules, config.max_length)
    model = notebook.build_qlora(config, head)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad and "lora_" not in name}
    assert trained == {f"base_model.model.{name}" for name in ("bert.pooler.modules_to_save.default.dense.weight", "bert.pooler.modules_to_save.default.dense.bias", "classifier.modules_to_save.default.weight", "classifier.modules_to_save.default.bias")}
    adapted = [name for name, module in model.named_modules() if isinstance(module, Linear4bit) and hasattr(model.get_submodule(name.rpartition(".")[0]), "lora_A")]
    assert len(adapted) == 2 * 6 and not [name for name in adapted if "pooler" in name]


def test_a_trained_pooler_is_saved_and_comes_back(notebook, tiny_config, tmp_path):
    config = dataclasses.replace(tiny_config, target_modules=["all-linear"], train_pooler=True)
    model = notebook.build_qlora(config, ["classifier", "pooler"])
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.05)
    model.save_pretrained(tmp_path)
    reloaded = notebook.load_adapter(tmp_path, config, ["classifier", "pooler"])
    ids = torch.randint(1000, 20000, (4, 12))
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=ids).logits, reloaded(input_ids=ids).logits)


def test_an_encoder_without_a_pooler_trains_its_head_alone(notebook):
    with torch.device("meta"):
        distilbert = notebook.AutoModelForSequenceClassification.from_config(notebook.AutoConfig.for_model("distilbert"))
    assert notebook.trained_whole(distilbert, train_pooler=True) == notebook.new_head(distilbert) == ["pre_classifier", "classifier"]


def test_all_linear_stands_alone(notebook, tiny_config):
    architecture, _ = notebook.inspect_model(tiny_config.model_name)
    with pytest.raises(ValueError, match="'all-linear' matches no linear layer.*or all-linear, alone"):
        notebook.check_model(architecture, ["all-linear", "query"], 32)


# Prediction


def test_where_a_batch_does_not_fit_half_of_it_is_predicted(notebook):
    """The stand-in takes three texts at once, and says how many it got."""
    sizes = []

    class Small(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids, limit=3):
            if len(input_ids) > limit:
                raise torch.OutOfMemoryError
            sizes.append(len(input_ids))
            return SimpleNamespace(logits=torch.stack([input_ids[:, 0], -input_ids[:, 0]], dim=-1))

    tokenizer = SimpleNamespace(pad=lambda batch, return_tensors: Padded(batch))
    ids = [[index] * (index % 4 + 1) for index in range(10)]
    logits = notebook.predict_encoded(Small(), tokenizer, {"input_ids": ids}, batch_size=8)
    assert logits[:, 0].tolist() == list(range(10)) and sizes == [2] * 5
    Small.forward.__defaults__ = (0,)
    with pytest.raises(MemoryError, match="Not even one review fits.*QLORA_MAX_LENGTH"):
        notebook.predict_encoded(Small(), tokenizer, {"input_ids": ids}, batch_size=8)


class Padded(dict):
    """A batch padded with zeros, as a tokenizer returns it."""

    def __init__(self, batch):
        longest = max(map(len, batch["input_ids"]))
        super().__init__(input_ids=torch.tensor([row + [0] * (longest - len(row)) for row in batch["input_ids"]]).float())

    def to(self, device):
        return self


# What scripts/measure.py makes of tested recipes


def test_the_recommended_recipe_is_looked_at_closely(notebook):
    """On made-up logits of every recipe: right shapes, the right rival, and comparisons that are differences of accuracies."""
    rng = np.random.default_rng(0)
    labels = {"validation": rng.integers(0, 2, 200), "test": rng.integers(0, 2, 300)}
    done = {}
    for strength, variant in enumerate([*measure.road(), *measure.rivals()], 1):
        logits = [{name: np.stack([np.zeros(len(truth)), (2 * truth - 1) * strength / 5 + rng.standard_normal(len(truth))], axis=-1) for name, truth in labels.items()} for _ in (1, 2)]
        done[variant.name] = [{"seed": seed, "logits": each} for seed, each in enumerate(logits, 1)]
    margins = {f"{name}/{split}": 2 * truth - 1 + rng.standard_normal(len(truth)) for name in ("tfidf_logreg", "tfidf_nb_svm") for split, truth in labels.items()}
    found = measure.analyse(done, margins, labels, rng.integers(10, 700, 300))
    assert found["full_finetuning"] == "full_finetuning 3e-05"  # the last has the better validation accuracy
    right = {name: np.mean([run["logits"]["test"].argmax(-1) == labels["test"] for run in runs]) for name, runs in done.items()}
    for row in found["comparisons"]:
        if row["against"] in right:
            assert row["gain"] == pytest.approx(100 * (right[row["recipe"]] - right[row["against"]]))
        assert row["gain_ci95"][0] <= row["gain"] <= row["gain_ci95"][1] and len(row["mcnemar"]) == 2
    assert [(row["recipe"], row["against"]) for row in found["comparisons"]][-4:] == [("recommended", name) for name in ("mission", "full_finetuning 3e-05", "tfidf_logreg", "tfidf_nb_svm")]
    assert found["ensemble"]["accuracy"] >= right["recommended"] and len(found["calibration"]["ece_seeds"]) == 2
    assert all(sum(row["n"] for row in rows) == 300 for rows in found["accuracy_by_length"].values())


# What scripts/measure.py makes of interrupted runs


def finished(out, seeds=(1, 2), changes=None):
    """Write what ``recipes`` leaves of its first variant, and return what it finds there again."""
    config = measure.notebook.Config()
    first = measure.all_variants()[0]
    row = {"recipe": first.name, "seeds": list(seeds), "seconds": [3.0] * len(seeds), "workers": 1}
    row["settings"] = measure.settings_of(config, first) | (changes or {})
    (out / "recipes.json").write_text(json.dumps({"recipes": [row], "inference": [{"model": "merged, fp16"}]}))
    logits = {f"{first.name}/{seed}/{split}": np.full((4, 2), seed) for seed in seeds for split in ("validation", "test")}
    np.savez_compressed(out / "recipes-logits.npz", **logits)
    return measure.finished_runs(config, [2, 1], out)


def test_finished_recipes_are_not_trained_again(tmp_path):
    done, speeds = finished(tmp_path)
    assert list(done) == ["recommended"] and speeds == [{"model": "merged, fp16"}]
    assert [(run["seed"], run["seconds"], run["logits"]["test"][0, 0]) for run in done["recommended"]] == [(1, 3.0, 1), (2, 3.0, 2)]


def test_recipes_of_other_seeds_or_settings_are_trained_again(tmp_path):
    assert measure.finished_runs(measure.notebook.Config(), [1, 2], tmp_path) == ({}, [])
    assert not finished(tmp_path, seeds=(1, 2, 3))[0] and not finished(tmp_path, changes={"learning_rate": 5e-4})[0]
