"""The section of the report on the speed of a training step."""

from benchmarks import figures, statistics, t4_report
from benchmarks.words import MODELS, join, number, percent, source, table


def sentences(rows):
    """Say what the ratios of a model's medians are."""
    ratios = statistics.ratios(rows)
    said = []
    if ratios["default_captured_over_eager"]:
        ratio = number(ratios["default_captured_over_eager"], 2)
        said.append(f"Captured, the default trains {ratio} times as fast as eager.")
    if ratios["fast_over_full_captured"]:
        ratio = number(ratios["fast_over_full_captured"], 2)
        sentence = f"`fast` trains {ratio} times as fast as captured full fine-tuning"
        peak = ratios["fast_peak_over_full_captured"]
        if peak:
            sentence += f", with {percent(peak)} of its peak"
        said.append(f"{sentence}.")
    if ratios["lean_over_full_captured_checkpointed"]:
        ratio = number(ratios["lean_over_full_captured_checkpointed"], 2)
        sentence = f"`lean` trains {ratio} times as fast as full fine-tuning, captured"
        said.append(f"{sentence} and checkpointed.")
    if ratios["lean_peak_mb"]:
        said.append(f"`lean` peaks at {number(ratios['lean_peak_mb'])} MB.")
    if ratios["fast_compiled_over_captured"]:
        ratio = number(ratios["fast_compiled_over_captured"], 2)
        peak = percent(ratios["fast_compiled_peak"])
        seconds = number(rows["QLoRA fast, compiled"]["seconds_before"])
        said.append(
            "Compiled (torch.compile, reduce-overhead, one round), `fast` trains"
            f" {ratio} times as fast as captured, with {peak} of its peak, after"
            f" {seconds} s of preparation."
        )
    if ratios["full_compiled_over_captured"]:
        ratio = number(ratios["full_compiled_over_captured"], 2)
        peak = percent(ratios["full_compiled_peak"])
        gain = number(ratios["fast_over_full_compiled"], 2)
        said.append(
            f"Full fine-tuning, compiled, trains {ratio} times as fast as captured,"
            f" with {peak} of its peak: `fast` is {gain} times as fast as that."
        )
    if ratios["like_lengths_over_random"]:
        ratio = number(ratios["like_lengths_over_random"], 2)
        random = rows["random"]
        grouped = rows["group_by_length"]
        said.append(
            f"An epoch of reviews is {ratio} times as fast with batches of similar"
            f" length ({number(grouped['samples_per_second'])} texts/s,"
            f" {percent(grouped['padding'])} padding) as with random ones"
            f" ({number(random['samples_per_second'])} texts/s,"
            f" {percent(random['padding'])} padding); captures are part of the time."
        )
    return " ".join(said)


def method_table(rows):
    """Return the table of a model's methods."""
    lines = []
    for method, row in rows.items():
        speed = number(row["samples_per_second"])
        if not speed:
            speed = "not measured"
            if row["errors"]:
                reason = row["errors"][0].replace("|", "/")
                speed = f"failed: {reason:.60}"
        cells = [
            method,
            speed,
            number(row["peak_mb"]),
            number(row["weights_mb"]),
            number(row["seconds_before"], 1),
        ]
        lines.append(cells)
    columns = ["method", "texts/s", "peak, MB", "weights, MB"]
    return table([*columns, "seconds before the timed steps"], lines)


def section(file, folder):
    """Return the section on the speed of a training step; draw its figure."""
    settings = file["about"]["settings"]
    parts = [
        "## How fast is a training step?",
        f"All texts have {settings['length']} tokens. Each number is the median of the"
        f" rounds, of {settings['steps']} timed steps of 32 texts each.",
    ]
    models = {}
    titles = {}
    for model in dict.fromkeys(run["model"] for run in file["runs"]):
        runs = [run for run in file["runs"] if run["model"] == model]
        rows = statistics.medians(runs)
        steps = statistics.medians([run for run in runs if "method" in run])
        title = MODELS.get(model, model)
        parts += [f"### {title}", sentences(rows)]
        if steps:
            parts.append(method_table(steps))
        if statistics.known(steps.values(), "samples_per_second"):
            models[model] = steps
            titles[model] = title
    if models:
        parts.append("![speed.png](speed.png)")
        if folder:
            figures.draw_speed(models, titles, folder / "speed.png")
    parts += [source(file), t4_report.section(file["runs"])]
    return join(parts)
