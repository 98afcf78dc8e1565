"""Collect the measurements on a GPU in Data/reference/*/ into Data/reference/results.json, of the shape of the notebook's own results.json.

    python scripts/collect_reference.py

They come from several runs: of the whole notebook, and of the commands of measure.py. `provenance` names the file, and with it the
device and the versions, of each figure.
"""

import json
from pathlib import Path

REFERENCE = Path(__file__).resolve().parent.parent / "Data" / "reference"
SOURCES = {  # file: what is taken from it
    "h100-all-minilm/results.json": ["test", "baselines", "training"],
    "h200-bert-base-shapes/speed.json": ["efficiency", "ladder"],
    "h200-all-minilm/ranks-0.0002.json": ["rank_sensitivity", "adapted_modules"],
    "h200-bert-base-shapes/memory.json": ["ingredients", "growth", "lean_base"],
    "h200-bert-base-shapes/batches.json": ["largest_batch"],
    "h200-all-minilm/embeddings.json": ["four_bit_against_16_bit"],
    "h100-all-minilm/recipes.json": ["recipes", "inference", "comparisons", "calibration", "accuracy_by_length", "ensemble"],
    "h100-all-minilm/mistakes.json": ["causes"],
    "h100-x2/scaling.json": ["scaling", "accuracy_difference"],
    "cpu-imdb20k/baselines.json": ["recipes"],
}
ORDER = ["test", "baselines", "training", "efficiency", "rank_sensitivity", "recipes", "ladder", "ingredients", "growth", "largest_batch"]
ORDER += ["adapted_modules", "lean_base", "four_bit_against_16_bit", "inference", "comparisons", "calibration", "accuracy_by_length", "ensemble", "causes"]
ORDER += ["scaling", "accuracy_difference"]


def collect(reference: Path = REFERENCE) -> dict:
    """Return the figures of ``SOURCES`` below ``reference``, and where each was measured."""
    sources, figures = {}, {"recipes": []}
    for path, names in SOURCES.items():
        measured = json.loads((reference / path).read_text(encoding="utf-8"))
        origin = measured.get("provenance", measured)
        place = {name: origin[name] for name in ("model", "dataset", "device", "versions") if name in origin}
        sources[path] = {"figures": names, "model": None if "baselines" in path else "bert-base shapes, random weights"} | place
        figures |= {name: measured[name] for name in names if name != "recipes"}
        for row in measured["recipes"] if "recipes" in names else []:
            chosen = row["recipe"] == measured.get("full_finetuning")
            figures["recipes"].append(row | ({"recipe": "full_finetuning"} if chosen else {}))
    for row in figures["scaling"]:
        row.setdefault("accuracy", None)  # only whole trainings have one
    return {"provenance": {"profile": "full", "sources": sources}} | {name: figures[name] for name in ORDER}


if __name__ == "__main__":
    (REFERENCE / "results.json").write_text(json.dumps(collect(), indent=2) + "\n", encoding="utf-8")
