"""Draw README's first figure, accuracy, memory and speed method by method, from the measurements in Data/reference/.

    python scripts/plot_overview.py

All rows are of all-MiniLM-L6-v2 on 20,000 IMDb reviews of at most 256 tokens. Nothing is measured here.
"""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

REFERENCE = Path(__file__).resolve().parent.parent / "Data" / "reference"


def read(path: str) -> dict:
    """Return the measurements in ``path``, below Data/reference/."""
    return json.loads((REFERENCE / path).read_text(encoding="utf-8"))


def rows() -> list[dict]:
    """Return the rows of the figure, top to bottom.

    Returns:
        For each, ``name``; ``accuracy`` on the test split (%; NaN where it was not measured), the mean of three seeds for a BERT, with ``interval`` (95 %, %; None where
        the file has none for the mean) or else ``seeds`` (% each); ``peak_mb`` and ``samples_per_second`` of training, or ``seconds`` of
        training on a CPU (None each where not applicable); and ``apart``: whether memory and speed come from another run than the others'.
    """
    run = {row["method"]: row for row in read("h100-all-minilm/results.json")["efficiency"]}
    other = {(row["recipe"], row["method"]): row for row in read("h100-all-minilm/overview.json")["efficiency"]}
    recipes = read("h100-all-minilm/recipes.json")
    trained = {row["recipe"]: row for row in recipes["recipes"]}
    plain = [each["accuracy"] for each in read("h100-all-minilm/accuracy-plain-1-2-3.json")["runs"]]
    lean = read("h200-all-minilm/embeddings.json")["four_bit_against_16_bit"]["test"]
    words = {row["recipe"]: row for row in read("cpu-imdb20k/baselines.json")["recipes"]}
    known = [
        ("full fine-tuning, fp16", trained[recipes["full_finetuning"]], run["full_fp16"]),
        ("QLoRA, plain", {"accuracy": np.mean(plain), "seeds": plain}, run["qlora_plain"]),
        ("QLoRA, lean", lean, run["qlora_lean"]),
        ("QLoRA, fast", trained["mission"], run["qlora_fast"]),
        ("QLoRA, recommended, fast", trained["recommended"], other["recommended", "qlora_fast"]),
        ("QLoRA, recommended, lean", None, other["recommended", "qlora_lean"]),
        ("bag of words, tfidf_logreg", words["tfidf_logreg"], None),
        ("bag of words, tfidf_nb_svm", words["tfidf_nb_svm"], None),
    ]
    table = []
    for name, scores, cost in known:
        scores = scores or {"accuracy": float("nan"), "seeds": []}
        interval = [100 * each for each in scores["accuracy_ci95"]] if "accuracy_ci95" in scores else None
        row = {"name": name, "accuracy": 100 * float(scores["accuracy"]), "interval": interval, "apart": cost is not None and "recipe" in cost}
        row |= {"seeds": [] if interval else [100 * each for each in scores["seeds"]], "seconds": None if cost else scores["seconds"][0]}
        table.append(row | {key: cost and cost[key] for key in ("peak_mb", "samples_per_second")})
    return table


def claim(table: list[dict]) -> str:
    """Return the message of the figure."""
    full, plain, lean, fast, recommended, recommended_lean, *_, words = table
    return (
        f"QLoRA saves memory: down to {lean['peak_mb'] / full['peak_mb']:.0%} of full fine-tuning's, {recommended_lean['peak_mb'] / full['peak_mb']:.0%} with the recommended recipe. Slow as usually written (plain), it need not be.\n"
        f"With the recommended recipe (trained fast) it is as accurate: {recommended['accuracy']:.1f} %, full fine-tuning {full['accuracy']:.1f}. So is a bag of words: {words['accuracy']:.1f}."
    )


def draw(table: list[dict]) -> Figure:
    """Draw ``rows``: accuracy with its interval and seeds, peak memory, and speed."""
    colors = ["#0173b2" if "full" in row["name"] else "0.55" if "bag" in row["name"] else "#de8f05" for row in table]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 4.8), sharey=True, width_ratios=(1.25, 1, 1), layout="constrained")
    places = np.arange(len(table))
    for place, row, color in zip(places, table, colors):
        if np.isnan(row["accuracy"]):
            left.annotate("not measured", (90, place), ha="center", va="center", color="0.35", fontsize=10)
            continue
        low, high = row["interval"] or (row["accuracy"], row["accuracy"])
        left.plot([low, high], [place, place], color=color, lw=2.5, solid_capstyle="butt")
        left.plot(row["seeds"], [place] * len(row["seeds"]), ".", color="0.3", ms=5, zorder=3)
        left.plot(row["accuracy"], place, "o", color=color, ms=8)
        left.annotate(f"{row['accuracy']:.1f}", (row["accuracy"], place), (0, 8), textcoords="offset points", ha="center", fontsize=10)
    for axis, key in ((middle, "peak_mb"), (right, "samples_per_second")):
        for place, row, color in zip(places, table, colors):
            if row[key] is None:
                note = "none" if key == "peak_mb" else f"{row['seconds']:.0f} s in all, on a CPU"
                axis.annotate(note, (0, place), (4, 0), textcoords="offset points", va="center", color="0.35", fontsize=10)
                continue
            style = {"facecolor": "none", "hatch": "///"} if row["apart"] and key == "samples_per_second" else {"facecolor": color}
            axis.barh(place, row[key], height=0.55, edgecolor=color, **style)
            axis.annotate(f"{row[key]:,.0f}", (row[key], place), (5, 0), textcoords="offset points", va="center")
        axis.set_xlim(0, 1.25 * max(row[key] or 0 for row in table))
        axis.locator_params(axis="x", nbins=4)
    left.set(title="Test accuracy, %", yticks=places, yticklabels=[row["name"] for row in table], xlim=(87.4, 94.6))
    left.grid(axis="x", color="0.9")
    left.invert_yaxis()
    middle.set_title("Peak of training on the GPU, MB")
    right.set_title("Training speed, reviews/s")
    figure.suptitle(claim(table), fontsize=12)
    return figure


if __name__ == "__main__":
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    draw(rows()).savefig(REFERENCE / "overview.png", dpi=150)
