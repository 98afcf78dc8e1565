"""Write REPORT.md and its figures from the JSON files of the studies.

python -m benchmarks.report
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

from benchmarks.common import REFERENCE, markdown

COLORS = {"full": "C7", "LoRA": "C2", "QLoRA": "C0", "TF-IDF": "C1"}
INTRO = """# What many runs showed

The notebook measures one run. This page holds what needs many: written by `python -m benchmarks.report` from the JSON
files beside it, each of which has device, versions, commit and settings. Speeds are comparable within one file only.
MB are 10^6 bytes; intervals are 95%.

All rows are of the presets of November 2026: `recommended` then read 256 tokens, half of a cut text from its end, with
frozen tensors in 32 bits (now 512 tokens, 16 bits), and `lean` had its word embeddings in 4 bits (now 16).
"""


def color(method: str) -> str:
    """Return the color of a method, the same in all figures."""
    return next((each for name, each in COLORS.items() if method.startswith(name)), "C0")


def percent(value: float | None, interval: list | None = None) -> str:
    """Return a share as in "89.5% [88.0, 91.0]"."""
    ends = f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else ""
    return "" if value is None else f"{value:.1%}{ends}"


def number(value: float | None, digits: int = 0) -> str:
    return "" if value is None or value != value else f"{value:,.{digits}f}"


def source(results: dict, file: str, figure: str = "") -> str:
    """Return the lines below a section: the figure, and where its numbers are from."""
    about = results["provenance"]
    versions = ", ".join(f"{name} {v}" for name, v in about["versions"].items() if name in ("torch", "transformers"))
    image = f"![{figure}]({figure})\n\n" if figure else ""
    commit = (about["commit"] or "unknown")[:7]
    machine = f"{about['device']}, {versions}, commit {commit}. {about.get('note', '')}".rstrip()
    return f"{image}Source: [{file}]({file}), by `{about['command']}`; {machine}"


def save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=150, bbox_inches="tight", facecolor="white")
    plt.close(figure)


def gap(pair: list | None) -> str:
    """Return a difference in points as in "+1.3 [+0.7, +1.9]"."""
    return f"{pair[0]:+.1f} [{pair[1][0]:+.1f}, {pair[1][1]:+.1f}]" if pair else ""


def accuracy(results: dict, file: str, folder: Path | None) -> str:
    """Return the section on accuracy over seeds."""
    rows = {row["name"]: row for row in results["rows"]}
    names = {"recommended": "recommended", "full fine-tuning": "full_finetuning", "default": "default"}
    names |= {"TF-IDF": "tfidf_nb_svm"}
    final = {name: rows[row] for name, row in names.items() if rows.get(row, {}).get("final")}
    lead = ", ".join(f"{name} {percent(row['final'], row['final_ci95'])}" for name, row in final.items())
    if {"recommended", "full fine-tuning", "TF-IDF"} <= final.keys():
        gaps = [gap(final["recommended"][f"final_over_{other}"]) for other in ("full_finetuning", "tfidf_nb_svm")]
        lead = f"On further reviews, which no choice used: {lead}. The recommended recipe is {gaps[0]} points"
        lead += f" from full fine-tuning, {gaps[1]} from TF-IDF."
    table = pd.DataFrame(
        {
            "recipe": row["name"],
            "seeds": len(row["seeds"]),
            "validation": percent(row["validation"]),
            "test": percent(row["test"], row["test_ci95"]),
            "over default, points": gap(row.get("test_over_default")),
            "over recommended, fast": gap(
                row.get("test_over_recommended, fast") if ", fast, " in row["name"] else None
            ),
            "further reviews": percent(row.get("final"), row.get("final_ci95")),
            "seconds": number(row.get("seconds")),
            "peak, MB": number(row.get("peak_mb")),
        }
        for row in results["rows"]
    )
    table = markdown(table.loc[:, (table != "").any()].set_index("recipe"))
    if "by_length" in results:
        lengths = pd.DataFrame(results["by_length"]).set_index(["tokens", "texts"]).map(percent)
        table += "\n\nThe further reviews by their length:\n\n" + markdown(lengths.reset_index("texts"))
    figure = f"{Path(file).stem}.png"
    if folder:
        shown = [row for row in reversed(results["rows"]) if row["test"]]
        drawn, axis = plt.subplots(figsize=(9, 0.8 + 0.3 * len(shown)), layout="constrained")
        for place, row in enumerate(shown):
            value, (low, high) = 100 * row["test"], 100 * pd.Series(row["test_ci95"])
            name = {"tfidf": "TF-IDF", "full_": "full"}.get(row["name"][:5], "QLoRA")
            axis.errorbar(value, place, xerr=[[value - low], [high - value]], fmt="o", color=color(name), capsize=3)
        axis.set_yticks(range(len(shown)), [row["name"] for row in shown])
        axis.set(xlabel="test accuracy, %, with 95% intervals", title=f"Accuracy of {results['settings']['model']}")
        save(drawn, folder / figure)
    model, data = results["settings"]["model"], results["settings"]["dataset"]
    lead = f"{lead} Texts: {data}. {results.get('note', '')}".strip()
    return f"## How accurate are the recipes with {model}?\n\n{lead}\n\n{table}\n\n{source(results, file, figure)}\n"


def speed(results: dict, file: str, folder: Path | None) -> str:
    """Return the section on the speed of a step."""
    parts, length = ["## How fast is a training step, every method treated alike?"], results["settings"]["length"]
    for model, found in results["models"].items():
        ratio, floor = found["ratios"], found["floors"]
        name = f"### {model}"
        times = {key: number(value, 2) for key, value in ratio.items()}
        words = [
            f"Captured, the default recipe is {times['default_captured_over_eager']} times as fast as eager.",
            f"`fast` is {times['fast_over_full_captured']} times as fast as captured full fine-tuning and holds",
            f"{percent(ratio['fast_peak_over_full_captured'])} of its peak. `lean` is",
            f"{times['lean_over_full_captured_checkpointed']} times as fast as full fine-tuning, captured and",
            f"checkpointed, and holds {number(ratio['lean_peak_mb'])} MB. `fast` is at",
            f"{percent(ratio['fast_share_of_floor'])} of its arithmetic floor.",
        ]
        rows = found["methods"]
        table = pd.DataFrame(
            {
                "method": row["method"],
                "texts/s": number(row["samples_per_second"]) or f"failed: {row.get('error', 'memory')[:60]}",
                "peak, MB": number(row.get("peak_mb")),
                "weights, MB": number(row.get("weights_mb")),
                "seconds before the timed steps": number(row.get("startup_seconds"), 1),
            }
            for row in rows
        ).set_index("method")
        limits = (
            f"Limits of a step of 32 x {length} tokens: {number(floor['tflop_per_step'], 2)} TFLOP at"
            f" {number(floor['matrix_tflops'])} TFLOP/s, so {number(floor['arithmetic_samples_per_second'])} texts/s;"
            f" {number(floor['moved_gb_per_step'], 1)} GB kept and read at {number(floor['bandwidth_gb_s'])} GB/s, so"
            f" {number(floor['bytes_samples_per_second'])} texts/s."
        )
        groups = sorted(found["kernels"].items(), key=lambda each: -each[1])
        where = "GPU milliseconds of a step of `fast`: " + ", ".join(f"{n} {number(v, 1)}" for n, v in groups) + "."
        parts += [name, " ".join(words), markdown(table), limits, where if groups else ""]
    figure = "speed.png"
    if folder:
        drawn, axes = plt.subplots(1, len(results["models"]), figsize=(11, 6.5), sharey=True, layout="constrained")
        for axis, (model, found) in zip(drawn.axes, results["models"].items()):
            rows = [row for row in found["methods"] if row["samples_per_second"]][::-1]
            names = [row["method"] for row in rows]
            bars = axis.barh(names, [row["samples_per_second"] for row in rows], color=[*map(color, names)])
            axis.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=9)
            axis.set(title=model, xlabel="texts per second", xmargin=0.15)
            axis.grid(False)
        save(drawn, folder / figure)
    return "\n\n".join([*filter(None, parts), source(results, file, figure)]) + "\n"


def memory(results: dict, file: str, folder: Path | None) -> str:
    """Return the section on memory."""
    steps = pd.DataFrame(results["components"]).set_index("component").astype(float)
    first, last = steps["peak_mb"].iloc[0], steps["peak_mb"].iloc[-1]
    most = steps["saved_mb"].idxmax() if steps["saved_mb"].notna().any() else ""
    lead = f"From {number(first)} to {number(last)} MB, step by step; `{most}` saves most."
    table = markdown(steps.map(number).rename(columns={"peak_mb": "peak, MB", "saved_mb": "saved, MB"}))
    runs = pd.DataFrame([run for run in results["runs"] if "largest_batch" in run])
    fits = ""
    if len(runs):
        grid = runs.pivot(index="largest_batch", columns="gpu_gb", values="batch").rename_axis("largest micro-batch")
        fits = markdown(grid.loc[[*dict.fromkeys(runs["largest_batch"])]].rename(columns="{:g} GB".format))
        outside = number(results["outside_the_allocator_mb"])
        fits += f"\n\nOf each GPU's memory, {outside} MB are CUDA's own, beside the allocator; batches in steps of 8."
    growth, length = pd.DataFrame([run for run in results["runs"] if "growth" in run]), results["settings"]["length"]
    figure = "memory.png"
    if folder:
        drawn, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
        for axis, column, fixed in ((axes[0], "batch", ("length", length)), (axes[1], "length", ("batch", 16))):
            for name, group in growth[growth[fixed[0]] == fixed[1]].groupby("growth", sort=False):
                group = group.sort_values(column)
                style = {"QLoRA default": "o-", "QLoRA fast": "s--", "QLoRA lean": "^:"}.get(name, "D-")
                axis.plot(group[column], group["peak_mb"].astype(float) / 1e3, style, color=color(name), label=name)
            axis.set(
                xlabel={"batch": f"texts of {length} tokens", "length": "tokens of 16 texts"}[column], ylim=(0, None)
            )
        axes[0].set(ylabel="peak, GB", title="Memory grows with the batch")
        axes[1].set(title="and with the length")
        axes[0].legend(frameon=False)
        save(drawn, folder / figure)
    parts = ["## What saves memory?", lead, table, "## What fits?" if fits else "", fits, source(results, file, figure)]
    return "\n\n".join(filter(None, parts)) + "\n"


def ranks(results: dict, file: str, folder: Path | None) -> str:
    """Return the section on the LoRA rank."""
    frame = pd.DataFrame(results["summary"])
    best = frame.loc[frame["accuracy"].idxmax()]
    one = frame.iloc[0]
    lead = (
        f"{one['modules']} at rank {one['rank']}: {percent(one['accuracy'], one['accuracy_ci95'])}; the best,"
        f" {best['modules']} at rank {best['rank']}: {percent(best['accuracy'], best['accuracy_ci95'])}."
        f" Validation accuracy, trained on {results['settings']['rows']:,} texts with {results['settings']['model']}."
    )
    shown = frame.assign(
        accuracy=[percent(row["accuracy"], row["accuracy_ci95"]) for row in results["summary"]],
        seeds=[", ".join(map(percent, seeds)) for seeds in frame["seeds"]],
        parameters=frame["parameters"].map("{:,}".format),
    ).drop(columns="accuracy_ci95")
    figure = "ranks.png"
    if folder:
        drawn, axis = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
        for style, (modules, group) in zip(("o-", "s--", "^:"), frame.groupby("modules", sort=False)):
            ends = 100 * pd.DataFrame([*group["accuracy_ci95"]]).to_numpy().T
            errors = abs(ends - 100 * group["accuracy"].to_numpy())
            axis.errorbar(group["parameters"], 100 * group["accuracy"], errors, fmt=style, capsize=3, label=modules)
        axis.set(xscale="log", xlabel="trained parameters", ylabel="validation accuracy, %")
        axis.set(title=f"{results['settings']['model']}, {results['settings']['rows']:,} texts, mean of the seeds")
        axis.legend(frameon=False, loc="lower right")
        save(drawn, folder / figure)
    heading = "## How much does the rank matter?"
    return "\n\n".join([heading, lead, markdown(shown.set_index("modules")), source(results, file, figure)]) + "\n"


def lengths(results: dict, file: str, folder: Path | None) -> str:
    """Return the section on padding."""
    frame = pd.DataFrame(results["runs"]).set_index(["texts", "preset"]).rename(columns={"step": "padded to"})
    frame["padding"] = [percent(value) for value in frame["padding"]]
    names = {"samples_per_second": "texts/s", "peak_mb": "peak, MB", "graphs_mb": "graphs, MB"}
    for column in names:
        frame[column] = [number(value) for value in frame[column].astype(float)]
    frame = frame.drop(columns="captured").rename(columns=names).loc[:, lambda each: (each != "").any()]
    frame.index = frame.index.map(", ".join).rename("texts, preset")
    lead = f"An epoch of {results['settings']['rows']:,} texts; captures are part of the time."
    return "\n\n".join(["## To which step is a batch padded?", lead, markdown(frame), source(results, file)]) + "\n"


def load(results: dict, file: str, folder: Path | None) -> str:
    """Return the section on how many rows fit."""
    frame = pd.DataFrame(results["runs"])
    table = pd.DataFrame({"rows": frame["rows"].map("{:,}".format)})
    table["file, MB"] = frame["file_mb"].map("{:,.0f}".format)
    for section in ("3 Data", "4 Tokens", "5 A baseline to beat", "6 The 4-bit base"):
        table[f"{section}, s"] = [f"{seconds[section]:.0f}" for seconds in frame["seconds"]]
    table["to the start of training, s"] = frame["seconds_in_all"].map("{:.0f}".format)
    table["peak, GB"] = frame["peak_gb"].map("{:.1f}".format)
    lead = "The notebook up to its training: a CSV of rows of 150 made-up words, a tiny model, 128 tokens."
    return "\n\n".join(["## How many rows fit?", lead, markdown(table.set_index("rows")), source(results, file)]) + "\n"


def overview(results: dict, folder: Path) -> None:
    """Draw README's first figure: accuracy, memory and seconds of trainings."""
    shown = {"TF-IDF": "tfidf_nb_svm", "full fine-tuning": "full_finetuning"}
    shown |= {f"QLoRA {name}": name for name in ("default", "lean", "fast", "recommended", "recommended, fast")}
    found = {row["name"]: row for row in results["rows"] if row["test"]}
    rows = [(name, found[row]) for name, row in shown.items() if row in found][::-1]
    panels = {"test": "test accuracy, %", "peak_mb": "peak memory, MB", "seconds": "training, seconds"}
    drawn, axes = plt.subplots(1, 3, figsize=(9, 0.6 + 0.32 * len(rows)), sharey=True, layout="constrained")
    for axis, (column, title) in zip(axes, panels.items()):
        for place, (name, row) in enumerate(rows):
            if column == "test":
                value, (low, high) = 100 * row["test"], 100 * pd.Series(row["test_ci95"])
                axis.errorbar(value, place, xerr=[[value - low], [high - value]], fmt="o", color=color(name), capsize=3)
                axis.text(high + 0.2, place, f"{value:.1f}", va="center", fontsize=9)
            elif row[column]:
                axis.bar_label(axis.barh(place, row[column], color=color(name)), fmt="{:,.0f}", padding=3, fontsize=9)
        axis.set_yticks(range(len(rows)), [name for name, _ in rows])
        bars = {"xlim": (0, 1.3 * max([row[column] or 1 for _, row in rows], default=1)), "xticks": []}
        axis.set(title=title, **({"xmargin": 0.35} if column == "test" else bars))
        axis.grid(False, axis="y")
    save(drawn, folder / "overview.png")


SECTIONS = {"accuracy.json": accuracy, "accuracy-small.json": accuracy, "speed.json": speed}
SECTIONS |= {"memory.json": memory, "ranks.json": ranks, "lengths.json": lengths, "load.json": load}


def write(read: Path, text: Path, folder: Path | None) -> None:
    """Write the report of the JSON files in `read` to `text`, and its figures to `folder` (None: none)."""
    sns.set_theme(style="whitegrid", palette="colorblind")
    parts, files = [INTRO], {file.name: json.loads(file.read_text(encoding="utf-8")) for file in read.glob("*.json")}
    for file in filter(files.get, SECTIONS):
        parts.append(SECTIONS[file](files[file], file, folder))
    text.write_text("\n".join(parts), encoding="utf-8")
    if folder and "accuracy.json" in files:
        overview(files["accuracy.json"], folder)


def main() -> None:
    made = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.split("\n")[0])
    made.add_argument("--read", type=Path, default=REFERENCE, help="folder of the JSON files")
    made.add_argument("--out", type=Path, default=REFERENCE, help="folder of REPORT.md and its figures")
    arguments = made.parse_args()
    write(arguments.read, arguments.out / "REPORT.md", arguments.out)


if __name__ == "__main__":
    main()
