"""The reference measurements on a GPU: they keep what the notebook and the README say, and the fast execution is as accurate as the plain one."""

import json
import re

import measure
import nbformat
import numpy as np
import plot_overview
import pytest
from collect_reference import collect
from conftest import NOTEBOOK, ROOT
from scipy.stats import ttest_ind

REFERENCE = ROOT / "Data" / "reference"
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHAPES, SMALL = "h200-bert-base-shapes", "h200-all-minilm"


def read(path: str) -> dict:
    return json.loads((REFERENCE / path).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def speed():
    return read(f"{SHAPES}/speed.json")


@pytest.fixture(scope="module")
def memory():
    return read(f"{SHAPES}/memory.json") | {"largest_batch": read(f"{SHAPES}/batches.json")["largest_batch"]}


@pytest.fixture(scope="module")
def earlier():
    """The speed of an earlier revision, on another GPU."""
    return read("h100-bert-base-shapes/speed.json")


@pytest.fixture(scope="module")
def accuracies():
    return {name: read(f"h100-all-minilm/accuracy-{name}-1-2-3.json") for name in ("fast", "plain")}


@pytest.fixture(scope="module")
def notebook_text():
    """All prose of the notebook."""
    return "\n".join(cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "markdown")


def by_method(speed):
    return {row["method"]: row for row in speed["efficiency"]}


def points(pair, digits=1, sign=""):
    """Return an interval as the texts write it."""
    return "[" + ", ".join(f"{value:{sign}.{digits}f}" for value in pair) + "]"


def test_results_json_is_collected_from_the_measurements():
    assert read("results.json") == collect()


def test_fast_and_lean_are_as_fast_and_small_as_promised(speed, earlier):
    """On the earlier machine fast was more than 3 times as fast as full fine-tuning in steps of 32; on the later one it is not, and the texts say so."""
    for measured in (speed, earlier):
        methods = by_method(measured)
        fast, lean, plain, full = (methods[name] for name in ("qlora_fast", "qlora_lean", "qlora_plain", "full_fp16"))
        assert fast["samples_per_second"] >= 10 * plain["samples_per_second"]
        assert fast["samples_per_second"] >= 3 * full["samples_per_second"]
        assert fast["peak_mb"] < full["peak_mb"]
        assert lean["samples_per_second"] >= 4 * plain["samples_per_second"] and lean["peak_mb"] <= plain["peak_mb"]
    ratios = [by_method(measured)["qlora_fast"]["samples_per_second"] / measured["full_fp16_32x1"]["samples_per_second"] for measured in (earlier, speed)]
    assert ratios[0] >= 3 > ratios[1]
    assert f"{ratios[0]:.1f} times as fast as full fine-tuning in steps of 32 there, and {ratios[1]:.1f} times here" in README


def test_lean_is_as_small_as_promised(speed, memory):
    base = {row["part"]: row["MB"] for row in memory["lean_base"]}
    assert base["all"] == pytest.approx(sum(base.values()) - base["all"]) and base["all"] <= 60
    assert by_method(speed)["qlora_lean"]["peak_mb"] <= 450


def test_embeddings_of_4_bits_cost_at_most_0_3_points():
    """The mean over three seeds does; the interval is wider, and the texts give it."""
    difference = read(f"{SMALL}/embeddings.json")["four_bit_against_16_bit"]["test"]
    assert len(difference["seeds"]) == 3 and abs(difference["gain"]) <= 0.3


def test_no_part_of_the_memory_is_negative_and_all_are_of_one_peak(speed, memory, notebook):
    for row in speed["efficiency"] + memory["ingredient_methods"]:
        assert all(row[f"{part}_mb"] >= 0 for part in notebook.memory_parts())
    again = {row["method"]: row["peak_mb"] for row in memory["ingredient_methods"]}
    for name, row in by_method(speed).items():
        assert again.get(name, row["peak_mb"]) == pytest.approx(row["peak_mb"], rel=1e-3)  # two runs of one method


def test_what_the_allocator_holds_after_a_step_is_what_is_counted(memory):
    rest = memory["at_rest"]
    assert rest["allocated_mb"] == pytest.approx(rest["counted_mb"] + rest["workspaces_mb"], rel=0.02)


def test_a_larger_cap_lets_larger_batches_in(memory):
    for name in {row["method"] for row in memory["largest_batch"]}:
        batches = [row["batch"] for row in memory["largest_batch"] if row["method"] == name]
        assert len(batches) == 3 and batches == sorted(batches) and batches[0] > 0


def test_the_ratios_are_those_of_the_figures(speed):
    speeds = {name: row["samples_per_second"] for name, row in by_method(speed).items()}
    assert speed["ratios"]["fast_over_plain"] == pytest.approx(speeds["qlora_fast"] / speeds["qlora_plain"])
    assert speed["ratios"]["fast_share_of_floor"] == pytest.approx(speeds["qlora_fast"] / speed["floor"]["qlora_samples_per_second"])
    seconds = speed["floor"]["qlora_tflop_a_step"] / speed["floor"]["matrix_tflops"]
    assert speed["floor"]["qlora_samples_per_second"] == pytest.approx(32 / seconds)


def test_the_ladder_of_the_reference_is_the_notebook_s(speed, notebook):
    assert [row["rung"] for row in speed["ladder"]] == list(notebook.ladder_rungs(notebook.Config()))
    assert [row["method"] for row in speed["efficiency"]] == list(notebook.efficiency_methods().index)


def test_fast_is_as_accurate_as_plain(accuracies):
    """Same seeds, model, data and learning rate: the 95 % interval of the difference of the means holds 0, and is narrow enough to say something."""
    fast, plain = accuracies["fast"], accuracies["plain"]
    for name in ("model", "dataset", "learning_rate", "num_train_epochs", "max_length"):
        assert fast[name] == plain[name], name
    scores = {name: [run["accuracy"] for run in runs["runs"]] for name, runs in accuracies.items()}
    assert [run["seed"] for run in fast["runs"]] == [run["seed"] for run in plain["runs"]] == [1, 2, 3]
    interval = ttest_ind(scores["fast"], scores["plain"], equal_var=False).confidence_interval(0.95)
    assert interval.low <= 0 <= interval.high and interval.high - interval.low < 0.02


def test_three_fast_epochs_take_at_most_75_seconds(accuracies):
    assert all(run["epochs"] == 3 and run["seconds"] <= 75 for run in accuracies["fast"]["runs"])


def test_the_readme_s_table_of_speed_is_the_reference(speed, earlier):
    floors = {name: speed["floor"][f"{name}_samples_per_second"] for name in ("qlora", "full")}
    rows = {"full fine-tuning, fp16 autocast, 16 x 2": ("full_fp16", "full"), "full fine-tuning, fp16 autocast, 32 x 1": ("full_fp16_32x1", "full")}
    rows |= {f"QLoRA, {name}": (f"qlora_{name}", "qlora") for name in ("plain", "lean", "fast")}
    for name, (method, floor) in rows.items():
        now, before = (by_method(each).get(method) or each[method] for each in (speed, earlier))
        share = now["samples_per_second"] / floors[floor]
        assert f"| {name} | {now['samples_per_second']:,.0f} | {before['samples_per_second']:,.0f} | {now['peak_mb']:,.0f} | {share * 100:.0f} % |" in README, name


def test_the_notebook_s_table_of_speed_is_the_reference(speed, earlier, notebook_text):
    assert f"{speed['steps']} steps a rung" in notebook_text
    for row in speed["ladder"]:
        assert f"| {row['rung']} | {row['samples_per_second']:,.0f} | {row['peak_mb']:,.0f} |" in notebook_text
    methods = by_method(speed)
    for row in (methods["full_fp16"], speed["full_fp16_32x1"], methods["qlora_fast"], *speed["tried"]):
        assert re.search(rf"\b{row['samples_per_second']:,.0f}\b", notebook_text) and f"{row['peak_mb']:,.0f}" in notebook_text
    for row in (*map(by_method(earlier).get, ("qlora_plain", "full_fp16", "qlora_fast")), earlier["full_fp16_32x1"]):
        assert re.search(rf"\b{row['samples_per_second']:,.0f}\b", notebook_text)


def memory_rows(speed, memory, notebook) -> list[str]:
    """Return the rows of the tables of section 10 that README and notebook share."""
    rows = []
    for row in speed["efficiency"]:
        parts = " | ".join(f"{row[f'{part}_mb']:,.0f}" for part in notebook.memory_parts())
        rows.append(f"| {row['method'].replace('_', ' ')} | {row['trainable_parameters']:,} | {parts} | {row['peak_mb']:,.0f} | {row['samples_per_second']:,.0f} |")
    for row in memory["ingredients"]:
        alone, last = ("–" if row[name] is None else f"{row[name]:,.0f}" for name in ("alone_mb", "last_mb"))
        rows.append(f"| {row['ingredient']} | {alone} | {last} |")
    for name in dict.fromkeys(row["method"] for row in memory["growth"]):
        peaks = {(row["batch"], row["length"]): row["peak_mb"] for row in memory["growth"] if row["method"] == name}
        peaks = [peaks[batch, 256] for batch in (1, 4, 16, 64)] + [peaks[16, length] for length in (64, 128, 256, 512)]
        largest = [str(row["batch"]) for row in memory["largest_batch"] if row["method"] == name]
        rows.append(f"| {name.replace('_', ' ')} | {' | '.join(f'{peak:,.0f}' for peak in peaks)} | {' | '.join(largest)} |")
    return rows


def test_the_tables_of_memory_are_the_reference(speed, memory, notebook, notebook_text):
    for row in memory_rows(speed, memory, notebook):
        assert row in notebook_text and row in README, row


def test_the_walk_from_full_fine_tuning_to_qlora_is_the_reference_s(memory, notebook_text):
    rows = {row["method"]: row for row in memory["ingredient_methods"]}
    peaks = [rows[name]["peak_mb"] for name in ("full_fp16", "full_fp16_checkpointing", "qlora_without_4bit", "qlora_plain")]
    checkpointing, adapters, four_bit = (before - after for before, after in zip(peaks, peaks[1:]))
    assert f"checkpointing saves {checkpointing:,.0f} MB" in notebook_text and f"the last {four_bit:.0f}." in notebook_text
    assert f"{adapters:,.0f} more, down to {peaks[2]:.0f} MB" in notebook_text
    before, after = rows["qlora_without_4bit"], rows["qlora_plain"]
    weights = before["weights_mb"] - after["weights_mb"]
    assert f"from {before['weights_mb']:.0f} to {after['weights_mb']:.0f} MB, by {weights:.0f}" in notebook_text
    grown = [rows[with_4bit]["activations_mb"] - rows[without]["activations_mb"] for with_4bit, without in (("qlora_plain", "qlora_without_4bit"), ("lora_4bit_base", "lora_fp32_base"))]
    assert "grow by {:.0f} MB with checkpointing, and by {:.0f} without".format(*grown) in notebook_text


def test_what_is_said_of_growth_is_the_reference_s(memory, notebook_text):
    peaks = {(row["method"], row["batch"]): row["peak_mb"] for row in memory["growth"] if row["length"] == 256}
    cost = {name: (peaks[name, 64] - peaks[name, 16]) / 48 for name, _ in peaks}
    full, checkpointing, lean, fast = (cost[name] for name in ("full_fp16", "full_fp16_checkpointing", "qlora_lean", "qlora_fast"))
    assert f"each adds {full:.0f} MB to full fine-tuning, {checkpointing:.0f} with checkpointing, {fast:.0f} to fast and {lean:.0f} to lean" in notebook_text
    largest = {(row["method"], row["cap_gb"]): row["batch"] for row in memory["largest_batch"]}
    small, large = (largest["qlora_lean", cap] / largest["full_fp16_checkpointing", cap] for cap in (4, 16))
    assert f"{small:.1f} times the reviews of full fine-tuning with checkpointing, into 16 GB only {large:.1f} times" in notebook_text.replace("\n", " ")
    assert peaks["qlora_fast", 16] < peaks["full_fp16_checkpointing", 16] and peaks["qlora_fast", 64] > peaks["full_fp16_checkpointing", 64]


def test_the_tables_of_ranks_are_the_reference(notebook_text):
    ranks = read(f"{SMALL}/ranks-0.0002.json")
    for row in [*({"modules": "query, value"} | row for row in ranks["rank_sensitivity"]), *ranks["adapted_modules"]]:
        accuracy = f"{row['accuracy'] * 100:.1f} {points([100 * bound for bound in row['accuracy_ci95']])}"
        line = f"| {row['modules']} | {row['rank']} | {row['trainable_parameters']:,} | {accuracy} | {row['gain']:+.2f} {points(row['gain_ci95'], 2, '+')} |"
        assert line in notebook_text and line in README, line
        assert len(row["seeds"]) == 3


def test_the_texts_tell_what_4_bit_embeddings_cost(speed, memory, notebook_text):
    measured = read(f"{SMALL}/embeddings.json")
    means = {name: sum(run["accuracy"] for run in runs) / len(runs) * 100 for name, runs in measured["runs"].items()}
    base = {row["part"]: row["MB"] for row in memory["lean_base"]}["all"]
    difference = measured["four_bit_against_16_bit"]["test"]
    for text in (README, notebook_text):
        assert f"{means['4-bit']:.1f} against {means['16-bit']:.1f} %" in text and f"{base:.1f} MB" in text
        assert f"{difference['gain']:+.2f} points" in text and "from {:+.2f} to {:+.2f}".format(*difference["gain_ci95"]) in text
        assert f"**{by_method(speed)['qlora_lean']['peak_mb']:,.0f} MB**" in text
    peaks = {(row["execution"], row["four_bit_embeddings"]): row["peak_mb"] for row in memory["embedding_peaks"]}
    assert f"from {peaks['plain', False]:.0f} to {peaks['lean', False]:.0f} MB" in notebook_text
    assert ", ".join(f"{run['accuracy'] * 100:.1f}" for run in measured["runs"]["4-bit"]) + " %" in notebook_text


def test_the_texts_tell_the_accuracies_of_the_reference(accuracies, notebook_text):
    for text in (README, notebook_text):
        for runs in accuracies.values():
            assert ", ".join(f"{run['accuracy'] * 100:.1f}" for run in runs["runs"]) + " %" in text
            seconds = [run["seconds"] for run in runs["runs"]]
            assert f"{min(seconds):.0f} to {max(seconds):.0f} s" in text


# Recipes


@pytest.fixture(scope="module")
def recipes():
    """Every recipe that was tested, by name."""
    return {row["recipe"]: row for row in read("results.json")["recipes"]}


def percents(row: dict) -> str:
    """Return the accuracy of ``row`` with its interval, as the tables have it."""
    return f"{row['accuracy'] * 100:.1f} {points([100 * bound for bound in row['accuracy_ci95']])}"


def gain(row: dict) -> str:
    """Return a difference in points with its interval, as the tables have it."""
    return f"{row['gain']:+.1f} {points(row['gain_ci95'], 1, '+')}"


def p_values(row: dict) -> str:
    return ", ".join(f"{test['p_value']:.2g}" for test in row["mcnemar"])


@pytest.fixture(scope="module")
def comparisons():
    """The paired comparisons of recipes."""
    return {(row["recipe"], row["against"]): row for row in read("results.json")["comparisons"]}


def test_the_tables_of_rivals_are_the_reference(recipes, comparisons, notebook_text):
    full = read("h100-all-minilm/recipes.json")["full_finetuning"]
    rivals = {full: "full fine-tuning at 5e-5"} | {name: f"bag of words, `{name}`" for name in ("tfidf_logreg", "tfidf_nb_svm")}
    for name, label in rivals.items():
        row, beside = recipes["full_finetuning" if name == full else name], comparisons["recommended", name]
        assert f"| {label} | {percents(row)} | {gain(beside)} | {p_values(beside)} |" in notebook_text, label
        label = "full fine-tuning, with a search of its own" if name == full else label
        assert f"| {label} | {percents(row)} | {gain(beside)} |" in README, label
        published = recipes[f"{name}, published splits"]
        assert f"| {label if name != full else rivals[full]} | {percents(published)} |" in notebook_text
    for name in ("mission", "recommended"):
        assert f"| {name} | {percents(recipes[f'{name}, published splits'])} |" in notebook_text
    assert f"recommended {percents(recipes['recommended, published splits'])}, full fine-tuning {percents(recipes[f'{full}, published splits'])}, `tfidf_nb_svm` {percents(recipes['tfidf_nb_svm, published splits'])}" in README
    assert f"| QLoRA, the mission's recipe (the default) | {percents(recipes['mission'])} | {gain(comparisons['recommended', 'mission'])} |" in README
    assert f"| QLoRA, recommended (`QLORA_RECIPE=recommended`) | {percents(recipes['recommended'])} | |" in README
    assert all(len(recipes[name]["seeds"]) == 3 for name in ("mission", "recommended", "full_finetuning"))


def test_the_accuracies_of_recipes_are_those_of_their_logits():
    """Recomputed from what each model said of each review, and from the labels."""
    measured = read("h100-all-minilm/recipes.json")
    with np.load(REFERENCE / "h100-all-minilm" / "recipes-logits.npz") as arrays:
        for row in measured["recipes"]:
            labels = arrays[f"labels/{row['settings']['layout']}/test"]
            right = [(arrays[f"{row['recipe']}/{seed}/test"].argmax(-1) == labels).mean() for seed in row["seeds"]]
            assert right == pytest.approx(row["accuracies"]) and np.mean(right) == pytest.approx(row["accuracy"])
        for row in read("cpu-imdb20k/baselines.json")["recipes"]:
            name = row["recipe"].partition(",")[0]
            layout = row["settings"]["layout"]
            assert ((arrays[f"{layout}/{name}/test"] > 0) == arrays[f"labels/{layout}/test"]).mean() == pytest.approx(row["accuracy"], abs=0.002)  # fitted on another machine


def test_the_summary_in_one_minute_is_the_reference(speed, recipes, notebook_text):
    row, text = by_method(speed), notebook_text.split("**In one minute**")[1].split("## 1 Environment")[0]
    weights = {name: f"{row[name]['weights_mb']:.0f} MB" for name in ("qlora_plain", "qlora_lean")}
    assert f"{weights['qlora_plain']} instead of {row['full_fp16']['weights_mb']:.0f}" in text and f"{weights['qlora_lean']} with care" in text
    assert f"{row['qlora_plain']['peak_mb']:.0f} MB (`plain`) or {row['qlora_lean']['peak_mb']:.0f} MB (`lean`) instead of {row['full_fp16']['peak_mb']:,.0f}" in text
    assert f"{row['qlora_plain']['samples_per_second']:.0f} reviews/s against {row['full_fp16']['samples_per_second']:.0f}" in text
    assert f"{row['qlora_lean']['samples_per_second']:.0f} (`lean`) and {row['qlora_fast']['samples_per_second']:,.0f} (`fast`)" in text
    assert f"{row['qlora_plain']['trainable_parameters']:,} parameters" in text
    assert f"{percents(recipes['recommended'])} and {percents(recipes['full_finetuning'])} %" in text
    assert f"default recipe: {percents(recipes['mission'])}" in text and f"reached {percents(recipes['tfidf_nb_svm'])}" in text


def test_the_texts_say_what_the_comparisons_allow(recipes, comparisons):
    """Level with full fine-tuning and with the strongest bag of words, and no more: both intervals hold zero."""
    for name in (read("h100-all-minilm/recipes.json")["full_finetuning"], "tfidf_nb_svm"):
        low, high = comparisons["recommended", name]["gain_ci95"]
        assert low < 0 < high and all(test["p_value"] > 0.05 for test in comparisons["recommended", name]["mcnemar"])
    steps = [variant.name for variant in measure.road()]
    above = {name for name, before in zip(steps[1:], steps) if comparisons[name, before]["gain_ci95"][0] > 0}
    assert above == {"half of the tokens from the end", "adapters on all linear layers"}  # "two steps have intervals that leave zero out"
    for rival in ("full_finetuning 5e-05, 512 tokens", "tfidf_nb_svm"):
        low, high = comparisons["recommended, 512 tokens", rival]["gain_ci95"]
        assert low < 0 < high


def test_the_table_of_lengths_and_the_ensemble_are_the_reference(notebook_text):
    measured = read("results.json")
    full = read("h100-all-minilm/recipes.json")["full_finetuning"]
    for rows in zip(*(measured["accuracy_by_length"][name] for name in ("recommended", full, "recommended, 512 tokens", "tfidf_nb_svm"))):
        first, last = rows[0]["from_tokens"], rows[0]["to_tokens"]
        span = f"{first} to {last}" if last else f"{first} and more"
        assert f"| {span} | {rows[0]['n']} | {' | '.join(map(percents, rows))} |" in notebook_text
    both = measured["ensemble"]
    assert f"**{percents(both)} %**" in notebook_text and f"together | {percents(both)} | |" in README
    text = " ".join(notebook_text.split())
    assert f"{gain(both['against recommended'])} points above the recipe alone and {gain(both['against tfidf_nb_svm'])} above" in text
    assert f"expected calibration error {measured['calibration']['ece'] * 100:.1f} points" in README
    last, before = measured["calibration"]["bins"][-1], measured["calibration"]["bins"][-2]
    assert f"Where it claims {last['confidence']:.1%}, {last['accuracy']:.1%} are right".replace("%", " %") in text
    assert f"it claims {before['confidence']:.1%}, only {before['accuracy']:.1%}".replace("%", " %") in text


def test_the_mistakes_that_were_read_are_those_of_the_table(recipes, notebook_text):
    found = read("h100-all-minilm/mistakes.json")
    assert len(found["reviews"]) == found["read"] == 50 == sum(found["causes"].values())
    assert round(1994 * (1 - recipes["recommended"]["accuracies"][0])) == found["mistakes"]
    for cause, count in found["causes"].items():
        assert f"| {cause} | {count} |" in notebook_text and sum(row["cause"] == cause for row in found["reviews"]) == count
    sure = sum(row["probability"] > 0.9 for row in found["reviews"])
    assert f"{sure} of the fifty were answered with more than 90 % confidence, {sum(row['wrong_seeds'] == 3 for row in found['reviews'])} were wrong with every seed" in " ".join(notebook_text.split())
    cut = [row for row in found["reviews"] if "is cut" in row["cause"]]
    assert len(cut) == 5 and not any(row["wrong_tfidf_nb_svm"] for row in cut)


def test_full_fine_tuning_is_that_of_the_validation_split(recipes, notebook_text):
    """Of two learning rates and three truncations."""
    measured = read("h100-all-minilm/recipes.json")
    tried = {row["recipe"]: row["validation_accuracy"] for row in measured["recipes"] if row["recipe"].startswith("full_finetuning") and row["settings"]["layout"] == "pooled" and row["settings"]["max_length"] == 256}
    assert len(tried) == 4 and measured["full_finetuning"] == max(tried, key=tried.get)
    assert {row["settings"]["tail_share"] for row in measured["recipes"] if row["recipe"] in tried} == {0, 0.25, 0.5}
    rates = [tried[f"full_finetuning {rate}"] for rate in ("5e-05", "3e-05")]
    assert f"ahead of 3e-5 by {100 * (rates[0] - rates[1]):.2f} points" in notebook_text
    shares = [100 * tried[f"full_finetuning 5e-05{cut}"] for cut in ("", ", tail 0.25", ", tail 0")]
    assert "({:.1f}; a quarter {:.1f}, none {:.1f})".format(*shares) in notebook_text


def test_single_changes_and_512_tokens_are_the_reference_s(recipes, comparisons, notebook_text):
    fused = "recommended, 32-bit fused AdamW"
    for name, against, label in [
        (fused, "recommended", "AdamW in 32 bits, fused"),
        (f"{fused}, 16-bit base", fused, "and the base in 16 bits instead of 4"),
        (f"{fused}, rank-stabilised at 3e-4", fused, "rank-stabilised scaling, at 3e-4"),
        (f"{fused}, LoRA+ 4 at 4e-4", fused, "LoRA+ with a ratio of 4, at 4e-4"),
        ("mission, 512 tokens", "mission", "mission"),
        ("recommended, 512 tokens", "recommended", "recommended"),
        ("full_finetuning 5e-05, 512 tokens", "full_finetuning 5e-05", "full fine-tuning at 5e-5"),
    ]:
        assert f"| {label} | {percents(recipes[name])} | {gain(comparisons[name, against])} |" in notebook_text, label
        assert len(recipes[name]["seeds"]) == 3
    long = "recommended, 512 tokens"
    against = gain(comparisons[long, "full_finetuning 5e-05, 512 tokens"]), gain(comparisons[long, "tfidf_nb_svm"])
    assert "is {} points from full fine-tuning and {} above `tfidf_nb_svm`".format(*against) in notebook_text
    lengths = [percents(recipes[f"{name}, 512 tokens"]) for name in ("recommended", "full_finetuning 5e-05", "mission")]
    assert "With 512 tokens, nothing else changed: recommended {}, full fine-tuning {}, the mission's recipe {};".format(*lengths) in README
    four_bit = comparisons[f"{fused}, 16-bit base", fused]
    costs = gain(comparisons[fused, "recommended"]), gain(four_bit)
    assert "{} points with AdamW in 32 bits instead, and {} with a base in 16 bits beside that".format(*costs) in README
    assert f"may cost up to {four_bit['gain_ci95'][1]:.1f} points, the other {comparisons[fused, 'recommended']['gain_ci95'][1]:.1f}" in notebook_text
    assert f"{-four_bit['gain']:.1f} points lower {points(four_bit['gain_ci95'], 1, '+')}" in notebook_text  # in one minute
    low, high = four_bit["gain_ci95"]
    words = "its accuracy comes out {:.1f} points *below* that with 4 bits, from {:.1f} below to {:.1f} above"
    assert words.format(-four_bit["gain"], -low, high) in notebook_text  # section 6
    seconds = {name: [f"{each:.0f}" for each in sorted(recipes[name]["seconds"])] for name in (fused, "recommended")}
    assert f"takes {seconds[fused][0]} s a run where the 8-bit one took {seconds['recommended'][0]} to {seconds['recommended'][-1]}" in notebook_text


def test_the_scaling_is_the_reference_s(notebook_text):
    measured = read("results.json")
    rows = {(row["model"], row["execution"], row["gpus"], row["effective_batch"]): row for row in measured["scaling"]}
    names = {"all-MiniLM-L6-v2": "all-MiniLM-L6-v2", "bert-base shapes, random weights": "bert-base shapes"}
    for model, execution, gpus, batch in rows:
        one, two = rows[model, execution, 1, batch], rows[model, execution, 2, batch]
        speeds = f"{one['samples_per_second']:,.0f} | {two['samples_per_second']:,.0f} | {two['samples_per_second'] / one['samples_per_second']:.2f}"
        assert f"| {names[model]} | {execution} | {batch} | {speeds} | {one['peak_mb']:,.0f}, {two['peak_mb']:,.0f} |" in notebook_text
        assert rows[model, execution, gpus, batch]["recorded"] == (execution == "fast")
    text = " ".join(notebook_text.split())
    for gpus, words in ((1, "on one GPU"), (2, "on two")):
        runs = rows["all-MiniLM-L6-v2", "fast", gpus, 32]["runs"]
        assert ", ".join(f"{run['accuracy'] * 100:.1f}" for run in runs) in text and [run["seed"] for run in runs] == [1, 2, 3]
    difference = measured["accuracy_difference"]["2 against 1"]
    assert f"{difference['gain']:+.2f} points {points(difference['gain_ci95'], 2, '+')}" in text
    twos = [row for row in measured["scaling"] if row["gpus"] == 2]
    kernels = [row["nccl_kernels_ms"] for row in twos if row["execution"] == "fast"]
    assert f"NCCL's kernels active for {min(kernels):.1f} to {max(kernels):.1f} ms of a step" in text
    assert f"kernels active for {rows['all-MiniLM-L6-v2', 'fast', 2, 32]['all_kernels_ms']:.1f} ms: the rest is the loop" in text
    assert all(row["communication_share"] > 0.04 for row in twos if row["execution"] == "plain")  # "with one sign in all four rows"
    message = [row["all_reduce_ms"] for row in twos]
    shares = [100 * row["all_reduce_ms"] / row["step_ms"] for row in twos if row["execution"] == "fast"]
    assert f"takes {min(message):.2f} to {max(message):.2f} ms: {min(shares):.1f} to {max(shares):.1f} % of a step in `fast`" in text
    for execution, words in (("fast", "differed by {:.0f} to {:+.0f} % of a step in `fast`"), ("plain", "by {:.0f} to {:.0f} % in `plain`")):
        shares = [100 * row["communication_share"] for row in twos if row["execution"] == execution]
        assert words.format(min(shares), max(shares)) in text


def test_the_road_is_that_of_the_search_and_of_the_test_split(notebook, notebook_text, recipes, comparisons):
    runs = {(run["variant"], run["seed"]): run["validation"] for run in read("h100-all-minilm/search.json")["runs"]}
    assert {name for name, _ in runs} == {variant.name for variant in measure.searched()}

    def accuracy(variant: measure.Variant) -> float:
        (same,) = [each.name for each in measure.searched() if measure.variant_config(notebook.Config(), each, 1) == measure.variant_config(notebook.Config(), variant, 1) and not each.full and not each.loraplus]
        return runs[same, 1]

    rows = ["mission: query and value, 2e-4, first 256 tokens, 3 epochs", "+ learning rate 1e-3", "+ half of the tokens from the end of the review", "+ adapters on all linear layers", "+ pooler trained", "+ 5 epochs: the recommended recipe"]
    before = None
    for label, variant in zip(rows, measure.road(), strict=True):
        step = comparisons.get((variant.name, before))
        cells = [gain(step), p_values(step)] if step else [" ", " "]
        line = f"| {label} | {100 * recipes[variant.name]['validation_accuracy']:.1f} | {percents(recipes[variant.name])} | {cells[0]} | {cells[1]} |"
        assert line.replace("|   |   |", "|  |  |") in notebook_text, line
        before = variant.name
    steps = ", ".join(f"{100 * accuracy(variant):.1f}" for variant in measure.road()[-3:])
    assert f"1.0 point in the search ({steps})" in " ".join(notebook_text.split()) and f"{100 * (accuracy(measure.road()[-1]) - accuracy(measure.road()[-3])):.1f}" == "1.0"
    full, recommended = (100 * recipes[name]["validation_accuracy"] for name in ("full_finetuning", "recommended"))
    assert f"ahead by {full - recommended:.1f} points, {full:.1f} to {recommended:.1f};" in " ".join(notebook_text.split())
    assert accuracy(measure.road()[-1]) == max(value for (name, _), value in runs.items() if not name.startswith("full"))  # chosen on the validation split


def test_the_short_trainings_that_failed_are_told(notebook, notebook_text):
    run, defaults = read("h100-all-minilm/short.json"), notebook.Config()
    scores = {}
    for row in run["trainings"]:
        scores.setdefault((row["batch"], row["epochs"]), {})[row["modules"], row["rank"]] = row["accuracy"]
    assert (run["learning_rate"], run["train_reviews"]) == (defaults.rank_learning_rate, defaults.rank_train_samples) == (1e-3, 2000)
    failed = {size: sum(score < 0.55 for three in rows.values() for score in three) for size, rows in scores.items()}
    assert failed == {(8, 1.0): 5, (defaults.rank_batch_size, defaults.rank_epochs): 0} and all(sum(map(len, rows.values())) == 15 for rows in scores.values())
    assert max(scores[8, 1.0]["all linear layers", 16]) < 0.55
    words = "in steps of 8 reviews for one epoch, 5 of 15 trainings on these reviews (five choices, three seeds) ended at 50 %, among them all three with adapters on all linear layers; in steps of 32 for two epochs none did"
    assert words in notebook_text


def test_what_is_said_of_the_saved_run_is_in_its_results(notebook_text):
    run = read("h100-all-minilm/results.json")
    speed = {row["method"]: f"{row['samples_per_second']:.0f}" for row in run["efficiency"]}
    assert f"fp16 *slows* full fine-tuning, from {speed['full_fp32']} to {speed['full_fp16']} reviews/s" in notebook_text
    saved = " ".join(output.get("text", "") for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code" for output in cell.outputs)
    for line in ("1.1 points BELOW tfidf_logreg, interval -2.5 to +0.4", "3.3 points BELOW tfidf_nb_svm, interval -4.7 to -1.8", "against QLoRA alone: +3.6 points", "against tfidf_nb_svm alone: +0.3 points, -0.6 to +1.2"):
        assert line in saved
    assert "QLoRA is 1.1 points below the first bag of words, which these reviews cannot tell from zero, and 3.3 below the second" in notebook_text
    assert "3.6 points better than QLoRA alone; that they are better than the second bag of words alone is not shown (+0.3 points, -0.6 to +1.2)" in notebook_text
    bins, lengths = run["calibration"]["bins"], run["accuracy_by_length"]
    assert f"off by {100 * run['calibration']['ece']:.1f} points on average" in notebook_text
    assert f"{bins[-1]['n']:,} of its {run['test']['n']:,} answers claim more than 95 %, and of those {100 * bins[-1]['accuracy']:.1f} % are right" in notebook_text
    assert all(each["accuracy"] < each["confidence"] for each in bins if 0.75 < each["confidence"] < 0.9)
    assert f"shortest quarter of the reviews {100 * lengths[0]['accuracy']:.1f} % are right, of the longest, of which at most 256 tokens were read, {100 * lengths[-1]['accuracy']:.1f} %" in notebook_text
    memory = {row["method"]: {key: round(value) for key, value in row.items() if key.endswith("_mb")} for row in run["efficiency"]}
    plain, full = memory["qlora_plain"], memory["full_fp16"]
    words = f"plain QLoRA peaks at {plain['peak_mb']} MB, a third of the {full['peak_mb']} of full fine-tuning in fp16: {plain['activations_mb']} are activations, {plain['workspaces_mb']} workspaces, and {plain['weights_mb']} weights"
    assert words in notebook_text
    (four_bits,) = [row for row in run["ingredients"] if row["ingredient"] == "4-bit weights"]
    assert f"added last {four_bits['last_mb']:.0f} MB, and added to LoRA they *cost* {-four_bits['alone_mb']:.0f}" in notebook_text
    assert f"one clean run of the full profile on an H100, which took {run['provenance']['wall_seconds']:.0f} s" in notebook_text


def test_what_bought_nothing_is_told_with_its_figures(notebook_text):
    runs = {run["variant"]: f"{100 * run['validation']:.1f}" for run in read("h100-all-minilm/search.json")["runs"] if run["seed"] == 1}
    text = " ".join(notebook_text.split())
    assert f"(three epochs at 5e-4 with all of the above: {runs['all linear, pooler, 0.0005']})" in text
    assert f"Rank-stabilised scaling {runs['5e-4, rank-stabilised']}, LoRA+ with a ratio of 4 or 16 at 2e-4 {runs['LoRA+ 4, 2e-4']} and {runs['LoRA+ 16, 2e-4']}" in text
    assert "rank 8, 32 and 64 {}, {} and {}".format(*(runs[f"5e-4, rank {rank}"] for rank in (8, 32, 64))) in text
    assert "dropout of 0, 0.05 and 0.2 {}, {} and {}".format(*(runs[f"5e-4, dropout {share}"] for share in (0, 0.05, 0.2))) in text
    assert f"a weight decay of 0.1 {runs['5e-4, weight decay 0.1']}, a linear schedule {runs['5e-4, linear']}, a constant one {runs['5e-4, constant_with_warmup']}. At 2e-3 training falls apart: {runs['all linear, pooler, 0.002']}" in text
    assert "a share of 0.25, 0.75 or 1 came out lower than 0.5, within the noise: {}, {} and {} beside {}".format(*(runs[name] for name in ("1e-3, tail 0.25", "1e-3, tail 0.75", "1e-3, tail 1", "all linear, pooler, 0.001"))) in text
    assert f"a rank of 4 at 1e-3 for five epochs, one seed, came to {runs['5 epochs, rank 4, 0.001']} %" in text


def test_the_speed_of_inference_is_the_reference_s(notebook_text):
    speeds = {(row["model"], row["device"]): row["samples_per_second"] for row in read("results.json")["inference"]}
    words = "{:,.0f} reviews/s with the recommended recipe's adapters on 4-bit weights, {:,.0f} merged in fp16, {:,.0f} merged in fp32, and {:,.0f} merged in fp32 on its CPU"
    order = [("adapter on 4-bit", "cuda"), ("merged, fp16", "cuda"), ("merged, fp32", "cuda"), ("merged, fp32", "cpu")]
    assert words.format(*(speeds[each] for each in order)) in " ".join(notebook_text.split())


def test_the_first_figure_of_the_readme_is_the_reference_s():
    table = plot_overview.rows()
    run = {row["method"]: row for row in read("h100-all-minilm/results.json")["efficiency"]}
    for place, method in enumerate(["full_fp16", "qlora_plain", "qlora_lean", "qlora_fast"]):
        assert (table[place]["peak_mb"], table[place]["samples_per_second"], table[place]["apart"]) == (run[method]["peak_mb"], run[method]["samples_per_second"], False)
    assert table[4]["apart"] and table[5]["apart"] and all(row["peak_mb"] is None and row["seconds"] > 0 for row in table[6:])
    shown = {row["name"]: f"{row['accuracy']:.1f} [{row['interval'][0]:.1f}, {row['interval'][1]:.1f}]" for row in table if row["interval"]}
    for name, line in (("QLoRA, recommended, fast", "recommended (`QLORA_RECIPE"), ("QLoRA, fast", "QLoRA, the mission"), ("full fine-tuning, fp16", "full fine-tuning, with a search"), ("bag of words, tfidf_nb_svm", "bag of words, `tfidf_nb_svm`")):
        assert any(line in row and shown[name] in row for row in README.splitlines()), name
    figure = plot_overview.draw(table)
    drawn = {text.get_text() for axis in figure.axes for text in axis.texts}
    assert {f"{row['accuracy']:.1f}" for row in table if row["accuracy"] > 0} <= drawn and {f"{run['qlora_fast']['samples_per_second']:,.0f}", "20 s in all, on a CPU"} <= drawn
    lean, full = run["qlora_lean"], run["full_fp16"]
    assert f"down to {lean['peak_mb'] / full['peak_mb']:.0%} of full fine-tuning's, {table[5]['peak_mb'] / full['peak_mb']:.0%} with the recommended" in figure.get_suptitle()


def test_the_times_of_full_fine_tuning_carried_out_fast_are_told(recipes, notebook_text):
    alone = {name: row["seconds"] for name, row in recipes.items() if row.get("workers") == 1}
    full = [second for name in ("full_finetuning 5e-05, tail 0", "full_finetuning 5e-05, tail 0.25") for second in alone[name]]
    fused, eight_bit = alone["recommended, 32-bit fused AdamW"], alone["recommended"]
    times = [f"{value:.0f}" for three in (full, fused, eight_bit) for value in (min(three), max(three))]
    assert "one took {} to {} s (up to five epochs, early stopping), and the recommended recipe, five epochs, {} to {} with the same fused AdamW and {} to {} with its 8-bit one".format(*times) in notebook_text
    assert f"`fast` as well, it took {times[0]} to {times[1]} s a training, and the recommended recipe {times[2]} to {times[5]}" in notebook_text
    assert "{} to {} s a training, the recommended recipe {} to {} with the same optimizer and {} to {} with its own".format(*times) in README
