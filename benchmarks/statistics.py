"""What the report computes from runs: means, intervals, differences, ratios."""

import numpy as np

from benchmarks import common

DRAWS = 1000


def known(runs, column):
    """Return the values of a column, from the runs that have one."""
    values = []
    for run in runs:
        if run.get(column) is not None:
            values.append(run[column])
    return values


def mean(runs, column):
    """Return the mean of a column over the runs that have it, or None."""
    values = known(runs, column)
    if not values:
        return None
    return float(np.mean(values))


def median(runs, column):
    """Return the median of a column over the runs that have it, or None."""
    values = known(runs, column)
    if not values:
        return None
    return float(np.median(values))


# ---- Accuracy


def mean_and_interval(values, same_texts):
    """Return the mean over seeds, and its 95% interval `[low, high]`.

    `values` has an array for each seed: a number for each text. Seeds and texts are
    drawn with replacement: the texts once for all seeds if these are the same
    (`same_texts`), or else anew for each seed. With one seed the interval covers the
    texts alone. (Owen, "The pigeonhole bootstrap", 2007.)
    """
    rng = np.random.default_rng(0)
    n_seeds = len(values)
    n_texts = len(values[0])
    drawn_means = []
    for _ in range(DRAWS):
        texts = rng.integers(n_texts, size=n_texts)
        total = 0
        for seed in rng.integers(n_seeds, size=n_seeds):
            if not same_texts:
                n_texts = len(values[seed])
                texts = rng.integers(n_texts, size=n_texts)
            total += values[seed][texts].mean()
        drawn_means.append(total / n_seeds)
    low, high = np.percentile(drawn_means, [2.5, 97.5])
    seed_means = [array.mean() for array in values]
    return float(np.mean(seed_means)), [float(low), float(high)]


def accuracy(runs, column, same_texts):
    """Return the mean accuracy and its interval; without answers, None and None."""
    values = []
    for packed in known(runs, column):
        values.append(common.unpack(packed))
    if not values:
        return None, None
    return mean_and_interval(values, same_texts)


def pairs(runs, others):
    """Return the pairs of runs that have the same seed."""
    found = []
    for run in runs:
        for other in others:
            if run["seed"] == other["seed"]:
                found.append((run, other))
    return found


def paired(runs, others, column):
    """Return the mean difference in accuracy on the same texts, and its interval.

    Without a seed that both have: None and None.
    """
    differences = []
    for run, other in pairs(runs, others):
        if column in run and column in other:
            is_right = common.unpack(run[column]).astype(int)
            differences.append(is_right - common.unpack(other[column]))
    if not differences:
        return None, None
    return mean_and_interval(differences, same_texts=True)


def crossing(means, method, other):
    """Return the smallest size from which on `method` is above `other`, or None.

    `means` has the mean accuracy of each `(size, method)`.
    """
    sizes = [size for size, name in means if name == method and (size, other) in means]
    smallest = None
    for size in sorted(sizes, reverse=True):
        if means[size, method] <= means[size, other]:
            break
        smallest = size
    return smallest


# ---- Costs


CARDS = [8, 16, 24, 80]  # GB


def needed_mb(run):
    """Return the peak with what CUDA itself holds, or None."""
    if run.get("peak_mb") is None:
        return None
    return run["peak_mb"] + (run.get("outside_the_allocator_mb") or 0)


def smallest_card(megabytes):
    """Return the smallest card that has so much memory, as text."""
    if megabytes is None:
        return ""
    for card in CARDS:
        if megabytes <= card * 1000:
            return f"{card} GB"
    return "none of them"


COSTS = [
    "samples_per_second",
    "peak_mb",
    "weights_mb",
    "seconds_before",
    "padding",
    "captured_share",
]


def medians(runs):
    """Return the medians over rounds of each method and epoch, by their names."""
    rounds = {}
    for run in runs:
        name = run.get("method") or run.get("epoch")
        rounds.setdefault(name, []).append(run)
    rows = {}
    for name, its_runs in rounds.items():
        row = {"errors": known(its_runs, "error")}
        for column in COSTS:
            row[column] = median(its_runs, column)
        rows[name] = row
    return rows


def ratio(rows, first, second, column="samples_per_second"):
    """Return the ratio of two rows' medians; None where one is missing."""
    if first not in rows or second not in rows:
        return None
    if not rows[first][column] or not rows[second][column]:
        return None
    return rows[first][column] / rows[second][column]


def ratios(rows):
    """Return the comparisons that matter, from the medians of one model."""
    default = "QLoRA default, captured"
    fast = "QLoRA fast, captured"
    fast_compiled = "QLoRA fast, compiled"
    lean = "QLoRA lean, captured"
    full = "full, captured, 32 x 1"
    full_compiled = "full, compiled, 32 x 1"
    checkpointed = "full, captured, 16 x 2, checkpointed"
    return {
        "default_captured_over_eager": ratio(rows, default, "QLoRA default, eager"),
        "fast_over_full_captured": ratio(rows, fast, full),
        "fast_peak_over_full_captured": ratio(rows, fast, full, "peak_mb"),
        "lean_over_full_captured_checkpointed": ratio(rows, lean, checkpointed),
        "fast_compiled_over_captured": ratio(rows, fast_compiled, fast),
        "fast_compiled_peak": ratio(rows, fast_compiled, fast, "peak_mb"),
        "full_compiled_over_captured": ratio(rows, full_compiled, full),
        "full_compiled_peak": ratio(rows, full_compiled, full, "peak_mb"),
        "fast_over_full_compiled": ratio(rows, fast, full_compiled),
        "lean_peak_mb": rows.get(lean, {}).get("peak_mb"),
        "like_lengths_over_random": ratio(rows, "group_by_length", "random"),
    }
