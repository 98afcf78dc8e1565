"""The section of the report on the accuracy of the recipes."""

from dataclasses import dataclass

from benchmarks import figures, statistics
from benchmarks.words import MODELS, join, number, percent, points, source, table

TITLES = {
    "default": "QLoRA default, random batches",
    "default-like-lengths": "QLoRA default, batches of similar length",
    "recommended": "QLoRA recommended",
    "recommended-fast": "QLoRA recommended, fast",
    "recommended-fast-16-bit": "LoRA on 16 bits, as recommended, fast",
    "full-512": "full fine-tuning, 512 tokens",
    "full-256": "full fine-tuning, 256 tokens",
    "frozen-512": "frozen base, 512 tokens",
    "frozen-256": "frozen base, 256 tokens",
    "tfidf-nb-svm": "TF-IDF, naive Bayes weights, SVM",
    "tfidf-logreg": "TF-IDF, logistic regression",
}
OVERVIEW = {
    "tfidf-nb-svm": "TF-IDF, linear SVM",
    "full-512": "full fine-tuning",
    "default": "QLoRA default",
    "recommended": "QLoRA recommended",
    "recommended-fast": "QLoRA recommended, fast",
}
SEARCHED = {
    "full": "full fine-tuning, 512 tokens",
    "recommended": "QLoRA recommended, fast",
}
COLUMNS = [
    "recipe",
    "seeds",
    "validation",
    "test",
    "further reviews",
    "further reviews, adapter",
    "minus full, points",
    "seconds",
    "peak, MB",
]
LENGTHS = ["1 to 128", "129 to 256", "257 to 512", "over 512"]  # accuracy.LENGTHS
HOW_MEASURED = """Each seed draws its own split into training, validation and test
texts. The further reviews are the same for all seeds, and no row uses them for a
choice. "Test" and "further reviews" score the model that ships; for QLoRA, the merged
model. "Adapter" scores the adapter on its 4-bit base. "Minus full" is the
difference from full fine-tuning at 512 tokens in points, on the same seeds and reviews.
Intervals cover the choice of texts, and only a part of the choice of seeds, since there
are three. Seconds are per training, with no other work on the GPU.
Full fine-tuning uses steps of 32 texts of similar length without checkpointing, as
`recommended, fast` does; its rate was searched at 512 tokens."""
CAVEATS = """Any random split of IMDb has reviews of the same film on both sides, and
the further reviews cover these films, too. Scores are higher than on unseen films.
The best results in the literature for encoders of this size are 95.3% to 95.8% on
IMDb's own halves, which have different films, with 25,000 whole texts to train on. The
scores here are only roughly comparable."""


@dataclass
class Row:
    """A recipe over its seeds. Accuracies are a mean and its interval, or Nones."""

    title: str
    runs: list
    validation: float | None
    test: tuple
    further: tuple
    adapter: tuple
    over_full: tuple
    seconds: float | None
    peak_mb: float | None


def of_recipe(runs, recipe):
    """Return the runs of a recipe that have answered the further reviews."""
    found = []
    for run in runs:
        if run["recipe"] == recipe and "shipped_further" in run:
            found.append(run)
    return found


def summarize(runs):
    """Return a row for each recipe that has run, by its name."""
    full = of_recipe(runs, "full-512")
    rows = {}
    for recipe, title in TITLES.items():
        its_runs = of_recipe(runs, recipe)
        if not its_runs:
            continue
        over_full = (None, None)
        if recipe != "full-512":
            over_full = statistics.paired(its_runs, full, "shipped_further")
        rows[recipe] = Row(
            title=title,
            runs=its_runs,
            validation=statistics.mean(its_runs, "validation"),
            test=statistics.accuracy(its_runs, "shipped_test", same_texts=False),
            further=statistics.accuracy(its_runs, "shipped_further", same_texts=True),
            adapter=statistics.accuracy(its_runs, "adapter_further", same_texts=True),
            over_full=over_full,
            seconds=statistics.mean(its_runs, "seconds"),
            peak_mb=statistics.mean(its_runs, "peak_mb"),
        )
    return rows


def recommended_sentence(rows):
    """Say what the preset `recommended` reaches, and how far full fine-tuning is."""
    if "recommended" not in rows:
        return ""
    row = rows["recommended"]
    sentence = f"`recommended` answers {percent(*row.further)} of the further reviews"
    sentence += " right."
    difference, interval = row.over_full
    if interval is None:
        return sentence
    gain = points(difference, interval)
    sentence += f" That is {gain} points over full fine-tuning, on the same seeds."
    low, high = interval
    if low <= 0 <= high:
        sentence += " The interval includes zero."
    return sentence


def like_lengths_sentence(runs):
    """Say what batches of like length change against batches at random."""
    grouped = of_recipe(runs, "default-like-lengths")
    random = of_recipe(runs, "default")
    both = statistics.pairs(grouped, random)
    if not both:
        return ""
    grouped = [run for run, other in both]
    random = [other for run, other in both]
    validation = statistics.mean(grouped, "validation")
    validation -= statistics.mean(random, "validation")
    further = statistics.paired(grouped, random, "shipped_further")
    return (
        "Batches of similar length instead of random ones change the default by"
        f" {100 * validation:+.2f} points on validation, and by"
        f" {points(*further)} points on the further reviews (common seeds:"
        f" {len(both)})."
    )


def four_bits_sentence(runs):
    """Say what rounding the base to 4 bits changes, all else equal."""
    four_bits = of_recipe(runs, "recommended-fast")
    sixteen_bits = of_recipe(runs, "recommended-fast-16-bit")
    difference, interval = statistics.paired(four_bits, sixteen_bits, "shipped_further")
    if interval is None:
        return ""
    return (
        "The 4 bits alone: `recommended,fast` minus the same LoRA on a 16-bit"
        f" base is {points(difference, interval)} points on the further reviews."
    )


def recipe_table(rows):
    """Return the table of the recipes."""
    lines = []
    for row in rows.values():
        cells = [
            row.title,
            str(len(row.runs)),
            percent(row.validation),
            percent(*row.test),
            percent(*row.further),
            percent(*row.adapter),
            points(*row.over_full),
            number(row.seconds),
            number(row.peak_mb),
        ]
        lines.append(cells)
    return table(COLUMNS, lines)


def search_table(runs):
    """Return the table of the searches for a learning rate."""
    found = []
    for run in runs:
        if run["recipe"].startswith("search-"):
            _, method, _ = run["recipe"].split("-", 2)
            found.append((method, run["learning_rate"], run["validation"]))
    if not found:
        return ""
    lines = []
    for method, rate, validation in sorted(found):
        lines.append([SEARCHED[method], f"{rate:g}", f"{validation:.2%}"])
    lead = "Learning rates, by validation accuracy on the split of seed 1:"
    return lead + "\n\n" + table(["search", "rate", "validation"], lines)


def repetition_sentence(runs):
    """Say what a training of the search came to when it was repeated for the table."""
    for again in of_recipe(runs, "full-512"):
        for first in runs:
            is_search = first["recipe"].startswith("search-full")
            if is_search and first["learning_rate"] == again["learning_rate"]:
                apart = 100 * abs(again["validation"] - first["validation"])
                return (
                    f"The training at {first['learning_rate']:g} was repeated for the"
                    f" table above, and came to {again['validation']:.2%},"
                    f" {apart:.2f} points away. Rates whose scores differ by less"
                    " cannot be ranked."
                )
    return ""


def length_table(rows):
    """Return the table of the further reviews by their length."""
    columns = ["recipe"]
    groups = next(iter(rows.values())).runs[0]["by_length"]
    for tokens, group in zip(LENGTHS, groups):
        columns.append(f"{tokens} ({group['texts']:,})")
    lines = []
    for row in rows.values():
        cells = [row.title]
        for place in range(len(LENGTHS)):
            groups = [run["by_length"][place] for run in row.runs]
            cells.append(percent(statistics.mean(groups, "share")))
        lines.append(cells)
    lead = (
        "Accuracy by length in tokens (number of further reviews), mean of the seeds:"
    )
    return lead + "\n\n" + table(columns, lines)


def draw(rows, folder):
    """Draw the section's figure, and README's overview."""
    figures.draw_accuracy(list(rows.values()), folder / "accuracy.png")
    shown = []
    names = []
    for recipe, name in OVERVIEW.items():
        if recipe in rows:
            shown.append(rows[recipe])
            names.append(name)
    if "full-512" in rows:
        figures.draw_overview(shown, names, folder / "overview.png")


def section(file, folder):
    """Return the section on accuracy; draw its figures if there is a folder."""
    runs = file["runs"]
    rows = summarize(runs)
    settings = file["about"]["settings"]
    model = MODELS.get(settings["model"], settings["model"])
    parts = [
        "## How accurate are the recipes?",
        recommended_sentence(rows),
        four_bits_sentence(runs),
        like_lengths_sentence(runs),
        f"Model: {model}. Texts: {settings['dataset']}. Further reviews:"
        f" {settings['further']}.",
    ]
    if rows:
        parts += [recipe_table(rows), HOW_MEASURED]
    parts.append(search_table(runs))
    parts.append(repetition_sentence(runs))
    if rows:
        parts += [length_table(rows), CAVEATS, "![accuracy.png](accuracy.png)"]
        if folder:
            draw(rows, folder)
    parts.append(source(file))
    return join(parts)
