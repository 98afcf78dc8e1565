"""The figures of the report."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.ticker import LogLocator, StrMethodFormatter

from benchmarks import statistics

sns.set_theme(style="whitegrid", palette="colorblind")

COLORS = {"full": "C7", "LoRA": "C2", "QLoRA": "C0", "TF-IDF": "C1", "frozen": "C4"}


def color(name):
    """Return the color of a method, the same in all figures."""
    for family, its_color in COLORS.items():
        if name.startswith(family):
            return its_color
    return "C0"


def save(figure, path):
    """Write a figure, and forget it."""
    figure.savefig(path, dpi=150, bbox_inches="tight", facecolor="white")
    plt.close(figure)


def draw_dot(axis, place, accuracy, its_color):
    """Draw a mean and its interval as a dot on a horizontal line, in percent."""
    mean, (low, high) = accuracy
    ends = [100 * low, 100 * high]
    axis.plot(ends, [place, place], "|-", color=its_color, markersize=9)
    axis.plot(100 * mean, place, "o", color=its_color)
    axis.annotate(
        f"{100 * mean:.1f}",
        (100 * high, place),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        fontsize=10,
    )


def draw_bars(axis, values, colors):
    """Draw horizontal bars with their values; None: not measured."""
    for place, value in enumerate(values):
        if value is None:
            axis.text(0, place, " not measured", va="center", fontsize=10)
            continue
        bars = axis.barh(place, value, color=colors[place])
        axis.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=10)
    axis.set_xlim(0, 1.35 * max(value or 1 for value in values))
    axis.grid(False)


def name_rows(axis, names):
    """Name the rows of an axis, the first on top."""
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)


def label_ends(axis, labels, values):
    """Write labels beside the right ends of lines, moved up until none overlap."""
    axis.autoscale_view()
    to_axes = axis.transScale + axis.transLimits
    last = -1
    for number in np.argsort(values):
        _, height = to_axes.transform((1, values[number]))
        last = max(height, last + 0.055)
        axis.text(
            1.02,
            last,
            labels[number],
            transform=axis.transAxes,
            color=color(labels[number]),
            va="center",
            fontsize=11,
        )


# ---- One function for each figure


def draw_accuracy(rows, path):
    """Draw the accuracy of each recipe on the further reviews."""
    height = 0.9 + 0.36 * len(rows)
    figure, axis = plt.subplots(figsize=(8, height), layout="constrained")
    for place, row in enumerate(rows):
        draw_dot(axis, place, row.further, color(row.title))
    name_rows(axis, [row.title for row in rows])
    axis.margins(x=0.15)
    axis.grid(False, axis="y")
    axis.set_xlabel("accuracy, %")
    axis.set_title("Accuracy on the further reviews, with 95% intervals")
    save(figure, path)


def draw_overview(rows, names, path):
    """Draw what some recipes reach, hold and take, side by side."""
    height = 0.9 + 0.36 * len(rows)
    figure, axes = plt.subplots(
        1, 3, figsize=(10, height), sharey=True, layout="constrained"
    )
    colors = [color(name) for name in names]
    for place, row in enumerate(rows):
        draw_dot(axes[0], place, row.further, colors[place])
    axes[0].set_title("further reviews right, %")
    axes[0].margins(x=0.35)
    axes[0].grid(False, axis="y")
    draw_bars(axes[1], [row.peak_mb for row in rows], colors)
    axes[1].set_title("peak memory, MB")
    axes[1].set_xticks([])
    draw_bars(axes[2], [row.seconds for row in rows], colors)
    axes[2].set_title("training, seconds")
    axes[2].set_xticks([])
    name_rows(axes[0], names)
    save(figure, path)


def draw_labels(estimates, path):
    """Draw the accuracy of each method by the number of labels."""
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    lines = {}
    for (size, method), accuracy in estimates.items():
        lines.setdefault(method, {})[size] = accuracy
    shift = 0.96  # so that the intervals stand side by side
    for marker, (method, line) in zip("osD", lines.items()):
        means = []
        for size, (mean, (low, high)) in line.items():
            interval = [100 * low, 100 * high]
            axis.plot([size * shift] * 2, interval, "_-", color=color(method))
            means.append(100 * mean)
        places = np.array(list(line)) * shift
        axis.plot(places, means, f"{marker}-", color=color(method), label=method)
        shift *= 1.04
    axis.set_xscale("log")
    sizes = sorted({size for size, method in estimates})
    axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axis.minorticks_off()
    axis.legend(loc="lower right")
    axis.set_xlabel("labeled texts to train on")
    axis.set_ylabel("test accuracy, %")
    axis.set_title("Accuracy by the number of labels, with 95% intervals")
    save(figure, path)


def draw_memory(runs, parameters, path):
    """Draw the peak of each method by the size of the model, and what cards hold."""
    figure, axis = plt.subplots(figsize=(9, 5.5), layout="constrained")
    lines = {}
    for run in runs:
        peak = statistics.needed_mb(run) / 1000
        lines.setdefault(run["method"], {})[parameters[run["model"]]] = peak
    drawn = set()
    labels = []
    ends = []
    for method, line in lines.items():
        style = "o-"
        if color(method) in drawn:
            style = "s--"
        drawn.add(color(method))
        sizes = sorted(line)
        peaks = list(map(line.get, sizes))
        axis.plot(sizes, peaks, style, color=color(method))
        labels.append(method.replace("g, checkpointed", "g,\ncheckpointed"))
        ends.append(peaks[-1])
    axis.set_xscale("log")
    axis.set_yscale("log")
    for card in statistics.CARDS:
        axis.axhline(card, color="black", linewidth=0.8, linestyle=":")
        axis.text(min(parameters.values()), card, f"{card} GB card", va="bottom")
    names = []
    for model, count in parameters.items():
        family, _, size = model.rpartition("-")
        names.append(f"{family}-\n{size}\n{count / 1e6:,.0f} M")
    axis.set_xticks(list(parameters.values()), names, fontsize=10)
    axis.yaxis.set_major_locator(LogLocator(subs=[1, 2, 5]))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.minorticks_off()
    label_ends(axis, labels, ends)
    axis.set_xlabel("encoder, and its parameters")
    axis.set_ylabel("peak, GB")
    axis.set_title("Memory by the size of the encoder")
    save(figure, path)


def draw_speed(models, titles, path):
    """Draw the speed of each method, with a panel for each model."""
    methods = []
    for rows in models.values():
        for method in rows:
            if rows[method]["samples_per_second"] and method not in methods:
                methods.append(method)
    height = 1.2 + 0.34 * len(methods)
    figure, axes = plt.subplots(
        1,
        len(models),
        figsize=(10, height),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    colors = [color(method) for method in methods]
    for axis, (model, rows) in zip(axes[0], models.items()):
        speeds = []
        for method in methods:
            speeds.append(rows.get(method, {}).get("samples_per_second"))
        longest = axis.get_xlim()[1]  # of the panel before
        draw_bars(axis, speeds, colors)
        axis.set_xlim(right=max(longest, axis.get_xlim()[1]))
        axis.set_title(titles[model])
        axis.set_xlabel("texts per second")
    name_rows(axes[0][0], methods)
    save(figure, path)
