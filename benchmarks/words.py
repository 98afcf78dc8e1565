"""How the report writes numbers, tables and sources."""

MODELS = {"random": "bert-base with random weights", "base": "all-mpnet-base-v2"}


def number(value, digits=0):
    """Return a number as in "1,234.5"; nothing for None."""
    if value is None:
        return ""
    return f"{value:,.{digits}f}"


def percent(value, interval=None):
    """Return a share as in "89.5% [88.0, 91.0]"; nothing for None."""
    if value is None:
        return ""
    if interval is None:
        return f"{value:.1%}"
    low, high = interval
    return f"{value:.1%} [{100 * low:.1f}, {100 * high:.1f}]"


def points(value, interval=None):
    """Return a difference in points as in "+1.3 [+0.7, +1.9]"; nothing for None."""
    if value is None:
        return ""
    if interval is None:
        return f"{100 * value:+.1f}"
    low, high = interval
    return f"{100 * value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def gigabytes(megabytes):
    """Return an amount of memory as in "3.8 GB"."""
    if megabytes is None:
        return "not measured"
    return f"{megabytes / 1000:.1f} GB"


def table(columns, rows):
    """Return a table in Markdown; all cells are text."""
    lines = []
    for cells in [columns, ["---"] * len(columns), *rows]:
        lines.append("|" + "|".join(cells) + "|")
    return "\n".join(lines)


def source(file):
    """Return the line below a section: where its numbers are from."""
    about = file["about"]
    study = about["study"]
    versions = about["versions"]
    commits = []
    for run in file["runs"]:
        commit = (run["commit"] or "unknown")[:7]
        if commit not in commits:
            commits.append(commit)
    noun = "commit"
    if len(commits) > 1:
        noun = "commits"
    line = (
        f"Source: [{study}.json]({study}.json), by `python -m benchmarks.{study}`;"
        f" {about['device']}, torch {versions['torch']},"
        f" transformers {versions['transformers']}; {noun} {', '.join(commits)}."
    )
    return f"{line} {about.get('note', '')}".strip()


def join(parts):
    """Return the parts of a section, a blank line between any two that there are."""
    return "\n\n".join(part for part in parts if part)
