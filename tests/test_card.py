"""Section 12: the model card."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from hypothesis import assume, example, given
from hypothesis import strategies as st


def make_results(notebook, **about):
    """Return the results of a made-up run of 40 test texts, as the card reads them."""
    labels = np.arange(40) % 2
    scores = []
    for period in (2, 3, 5, 7):
        predictions = np.arange(40) % period % 2
        scores.append(notebook.score(labels, predictions, 2))
    provenance = {
        "model": "owner/base",
        "dataset": "reviews.csv",
        "labels": ["bad", "good"],
        "largest_class": 0.625,
    }
    provenance.update(about)
    return {
        "test": scores[0],
        "test_merged": scores[1],
        "baselines": {"tfidf_logreg": scores[2], "frozen_logreg": scores[3]},
        "calibration": {"ece": 0.0321},
        "reliable": {"threshold": 0.9312, "words": "A third can be relied on."},
        "cautions": ["NEVER answered: bad.", "What can help: more texts."],
        "provenance": provenance,
    }


@pytest.fixture
def card(notebook, tiny_config):
    """The model card of a made-up run, and the results that it was given."""
    results = make_results(notebook)
    config = tiny_config.model_copy(update={"lora_r": 13})
    return notebook.model_card(results, config, ["classifier", "pooler"]), results


def test_the_card_has_the_scores(notebook, card):
    text, results = card
    baselines = results["baselines"].values()
    for scores in (results["test"], results["test_merged"], *baselines):
        accuracy = notebook.percent(scores)
        weighted = notebook.percent(scores, "f1_weighted")
        assert f"| {accuracy} | {weighted} |" in text


def test_the_card_says_what_the_adapter_is_and_where_it_was_tested(card):
    text, _ = card
    for figure in ("62.5%", "3.2 points", "rank 13", "32 tokens", "40 test texts"):
        assert figure in text
    assert "bad, good" in text
    assert "A third can be relied on." in text
    assert "NEVER answered: bad. What can help: more texts." in text
    assert "`reviews.csv`" in text
    assert 'answer["score"] >= 0.9312' in text
    assert "{{" not in text  # each place is filled in


def test_a_card_without_a_baseline_or_a_threshold_is_whole(notebook, tiny_config):
    results = make_results(notebook)
    results["baselines"]["frozen_logreg"] = None
    results["reliable"] = {"threshold": None, "words": "None is known."}
    text = notebook.model_card(results, tiny_config, ["classifier"])
    assert "frozen" not in text
    assert 'score"] >=' not in text
    assert "None is known." in text


def test_the_card_names_no_path_of_the_machine(card, tiny_config):
    text, _ = card
    assert tiny_config.model_name not in text
    assert tiny_config.output_dir not in text


@given(
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20),
    st.lists(st.text(max_size=20), min_size=2, max_size=3),
)
@example("a\"b\\'", ["x", "y"])
@example("no", ["it's: {{ a }}", "---", "#1 {% x"])
@example("'owner/base: 1.0", ["null", '"\n', "{a}"])
def test_a_cards_metadata_can_be_read_whatever_is_called_how(notebook, name, labels):
    assume(not name.startswith("~") and not Path(name).exists())  # a local model
    results = make_results(notebook, model=name, dataset=name, labels=labels)
    config = notebook.Config(model_name=name)
    text = notebook.model_card(results, config, ["classifier"])
    data = ModelCard(text).data
    assert data.base_model == name
    assert data.library_name == "peft"
    (result,) = data.eval_results
    assert result.dataset_name == name
    assert result.metric_value == results["test"]["accuracy"]
    for code in re.findall("^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        ast.parse(code)


def test_a_local_base_is_no_id_of_the_hub(notebook, tiny_config):
    results = make_results(notebook, model="tiny-bert0")
    text = notebook.model_card(results, tiny_config, ["classifier"])
    assert ModelCard(text).data.base_model is None
    assert "path/to/tiny-bert0" in text
