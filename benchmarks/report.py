"""Write REPORT.md and its figures from the JSON files of the studies.

python -m benchmarks.report
"""

import argparse
import json
from pathlib import Path

from benchmarks import accuracy_report, figures, speed_report, statistics
from benchmarks.common import REFERENCE
from benchmarks.words import (
    MODELS,
    gigabytes,
    join,
    number,
    percent,
    source,
    table,
)

INTRO = """# Results over many runs

The notebook measures one run. This page has the studies that need many. It is written
by `python -m benchmarks.report` from the JSON files beside it. Each file names its
device, versions and settings, and each run its commit. Speeds are comparable only
within one file. MB are 10^6 bytes; intervals are 95%."""


# ---- Labels


def label_groups(runs):
    """Return the runs of each `(texts, method)`, the smallest size first."""
    groups = {}
    for run in runs:
        if "test" in run:
            groups.setdefault((run["texts"], run["method"]), []).append(run)
    return {key: groups[key] for key in sorted(groups)}


def qlora_sentence(means):
    """Say what QLoRA reaches with the fewest and with the most labels."""
    sizes = [size for size, method in means if method == "QLoRA"]
    if not sizes:
        return ""
    fewest = min(sizes)
    most = max(sizes)
    return (
        f"QLoRA reaches {percent(means[fewest, 'QLoRA'])} with {fewest:,} labels, and"
        f" {percent(means[most, 'QLoRA'])} with {most:,}."
    )


def crossing_sentence(means, other, name):
    """Say from how many labels on the mean of QLoRA is above that of another method."""
    sizes = []
    for size, method in means:
        if method == other and (size, "QLoRA") in means:
            sizes.append(size)
    if not sizes:
        return ""
    size = statistics.crossing(means, "QLoRA", other)
    if size is None:
        return f"With the most labels its mean is not above that of {name}."
    if size == min(sizes):
        return f"Its mean is above that of {name} at every size measured."
    return f"Its mean is above that of {name} from {size:,} labels on."


def fewer_labels_sentence(means, other, name):
    """Say with how many labels QLoRA is above another method with all of them."""
    sizes = [size for size, method in means if method == other]
    if not sizes:
        return ""
    most = max(sizes)
    for size, method in means:
        is_less = method == "QLoRA" and size < most
        if is_less and means[size, method] > means[most, other]:
            return (
                f"With {size:,} labels it is above {name} with {most:,}"
                f" ({percent(means[most, other])})."
            )
    return ""


def label_table(groups, estimates):
    """Return the table of sizes and methods."""
    methods = sorted({method for size, method in groups})
    lines = []
    for size in sorted({size for size, method in groups}):
        counts = set()
        accuracies = []
        for method in methods:
            if (size, method) in groups:
                counts.add(len(groups[size, method]))
                accuracies.append(percent(*estimates[size, method]))
            else:
                accuracies.append("")
        seeds = " to ".join(str(count) for count in sorted({min(counts), max(counts)}))
        lines.append([f"{size:,}", seeds, *accuracies])
    return table(["labels", "seeds", *methods], lines)


def labels(file, folder):
    """Return the section on the number of labels; draw its figure."""
    groups = label_groups(file["runs"])
    estimates = {}
    means = {}
    for key, runs in groups.items():
        estimates[key] = statistics.accuracy(runs, "test", same_texts=False)
        means[key] = estimates[key][0]
    sentences = [
        qlora_sentence(means),
        crossing_sentence(means, "frozen base", "the frozen base"),
        crossing_sentence(means, "TF-IDF", "TF-IDF"),
        fewer_labels_sentence(means, "frozen base", "the frozen base"),
        fewer_labels_sentence(means, "TF-IDF", "TF-IDF"),
    ]
    settings = file["about"]["settings"]
    model = MODELS.get(settings["model"], settings["model"])
    about = (
        f"Model: {model}. Texts: {settings['dataset']}. QLoRA has the presets"
        f" `{settings['preset']}`, and more epochs where labels are few; it is scored"
        " as the adapter on its 4-bit base. All methods have the same labels: QLoRA"
        " trains on eight ninths of them, and chooses its best epoch by the rest. All"
        " are scored on the whole test split. This base was trained to compare"
        " sentences by averages of its states: a plain BERT may need more labels."
    )
    parts = ["## How many labels do I need?", " ".join(filter(None, sentences)), about]
    if groups:
        parts += [label_table(groups, estimates), "![labels.png](labels.png)"]
        if folder:
            figures.draw_labels(estimates, folder / "labels.png")
    parts.append(source(file))
    return join(parts)


# ---- Memory


def count_parameters(runs):
    """Return the number of parameters of each model: what full fine-tuning trains."""
    parameters = {}
    for run in runs:
        is_full = run["method"].startswith("full fine-tuning")
        if is_full and run.get("trainable_parameters"):
            parameters.setdefault(run["model"], run["trainable_parameters"])
    return parameters


def memory_sentence(model, runs, parameters):
    """Say what a model needs by three methods, and what 4 bits save by themselves."""
    needed = {}
    peaks = {}
    for run in runs:
        if run["model"] == model:
            needed[run["method"]] = statistics.needed_mb(run)
            peaks[run["method"]] = run.get("peak_mb")
    full = needed.get("full fine-tuning")
    lora = needed.get("LoRA, 16-bit base, checkpointed")
    lean = needed.get("QLoRA, lean")
    name = f"**{model}**"
    if model in parameters:
        name += f" ({parameters[model] / 1e6:,.0f} million parameters)"
    sentence = (
        f"{name}: full fine-tuning {gigabytes(full)}, LoRA on 16 bits"
        f" {gigabytes(lora)}, QLoRA `lean` {gigabytes(lean)}."
    )
    lora_peak = peaks.get("LoRA, 16-bit base, checkpointed")
    lean_peak = peaks.get("QLoRA, lean")
    if lora_peak and lean_peak:
        change = lean_peak - lora_peak
        sentence += " The 4 bits alone change PyTorch's peak by"
        sentence += f" {change:+,.0f} MB ({change / lora_peak:+.0%})."
    return sentence


def memory_table(runs):
    """Return the table of models and methods."""
    lines = []
    for run in runs:
        needed = statistics.needed_mb(run)
        cells = [
            run["model"],
            run["method"],
            number(run.get("weights_mb")),
            number(run.get("peak_mb")) or "not measured",
            number(needed) or "not measured",
            number(run.get("samples_per_second")),
            statistics.smallest_card(needed),
        ]
        lines.append(cells)
    columns = ["model", "method", "weights, MB", "PyTorch's peak, MB"]
    columns += ["with CUDA's own, MB", "texts/s", "would fit"]
    return table(columns, lines)


def memory(file, folder):
    """Return the section on memory by the size of the model; draw its figure."""
    runs = file["runs"]
    settings = file["about"]["settings"]
    parameters = count_parameters(runs)
    models = list(dict.fromkeys(run["model"] for run in runs))
    sentences = []
    for model in models:
        sentences.append("- " + memory_sentence(model, runs, parameters))
    lead = (
        "The models have random weights in the shapes of real encoders. A step takes"
        f" 16 x 2 texts of {settings['length']} tokens. The memory needed is PyTorch's"
        " peak, including loading, plus CUDA's own. LoRA on 16 bits and QLoRA `lean`"
        " differ only in the bits of the base. The cards have 8, 16, 24 and 80 GB."
    )
    parts = ["## Where is QLoRA needed?", "\n".join(sentences), lead]
    if runs:
        parts.append(memory_table(runs))
    measured = [run for run in runs if statistics.needed_mb(run)]
    measured = [run for run in measured if run["model"] in parameters]
    if measured:
        parts.append("![memory.png](memory.png)")
        if folder:
            figures.draw_memory(measured, parameters, folder / "memory.png")
    parts.append(source(file))
    return join(parts)


# ---- Load


SECTIONS = ["3 Data", "4 Tokens", "5 A baseline to beat", "6 The 4-bit base"]


def load(file, folder):
    """Return the section on how many rows fit."""
    lines = []
    for run in file["runs"]:
        seconds = run["seconds"]
        cells = [f"{run['rows']:,}", number(run["file_mb"])]
        for section in SECTIONS:
            cells.append(number(seconds.get(section)))
        cells.append(number(sum(seconds.values())))
        cells.append(number(run["peak_gb"], 1))
        lines.append(cells)
    columns = ["rows", "file, MB"]
    columns += [f"{section}, s" for section in SECTIONS]
    columns += ["to the start of training, s", "peak, GB"]
    lead = "The notebook was run up to training with a tiny model, 128 tokens and a CSV"
    lead += " of 150 made-up words per row. The peak is that of the notebook's process."
    parts = ["## How many rows fit?", lead]
    if lines:
        parts.append(table(columns, lines))
    parts.append(source(file))
    return join(parts)


STUDIES = {
    "accuracy": accuracy_report.section,
    "labels": labels,
    "memory": memory,
    "speed": speed_report.section,
    "load": load,
}


def write(read, text, folder):
    """Write the report of the JSON files in `read` to `text`, its figures to `folder`.

    Without a folder no figures are drawn; the text is the same.
    """
    parts = [INTRO]
    for study, section in STUDIES.items():
        path = read / f"{study}.json"
        if path.exists():
            file = json.loads(path.read_text(encoding="utf-8"))
            parts.append(section(file, folder))
    text.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def main():
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__.splitlines()[0]
    )
    made.add_argument("--read", type=Path, default=REFERENCE, help="the JSON files")
    made.add_argument(
        "--out", type=Path, default=REFERENCE, help="folder of REPORT.md and figures"
    )
    arguments = made.parse_args()
    write(arguments.read, arguments.out / "REPORT.md", arguments.out)


if __name__ == "__main__":
    main()
