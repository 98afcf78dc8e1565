"""How many rows fit? The notebook up to the start of training, on made-up CSV files.

Seconds of each section, and the most memory that the notebook's process held. The model
is tiny and reads 128 tokens; each row has 150 words. Each size runs in a new process.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
import numpy as np

from benchmarks import common

SETTINGS = {
    "QLORA_PRESET": "full",
    "QLORA_MAX_LENGTH": "128",
    "QLORA_GRADIENT_CHECKPOINTING": "false",
    "HF_HUB_OFFLINE": "1",
}


def write_rows(path: Path, n_rows: int) -> None:
    """Write a CSV of texts of 150 made-up words, and a label that two words give."""
    random = np.random.default_rng(0)
    words = np.array([f"word{number}" for number in range(5, 20_000)])
    with path.open("w") as file:
        file.write("text,label\n")
        for number in range(n_rows):
            places = (random.random(150) ** 3 * len(words)).astype(int)  # some are rare
            label = number % 2
            file.write(f"{['bad', 'good'][label]} {' '.join(words[places])},{label}\n")


def before_training(folder: Path) -> Path:
    """Write the notebook's cells above the one that trains, and return their path."""
    common.notebook()  # so that scripts/ can be imported
    from notebook_api import NOTEBOOK

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = []
    for cell in notebook.cells:
        if "if not finished.exists():\n    trainer = " in cell.source:
            break
        cells.append(cell)
    notebook.cells = cells
    path = folder / "before_training.ipynb"
    nbformat.write(notebook, path)
    return path


def run_here(n_rows: int, model: str) -> dict:
    """Return the seconds of each section, and the peak in GB, for so many rows."""
    with tempfile.TemporaryDirectory(prefix="load-") as name:
        folder = Path(name)
        write_rows(folder / "rows.csv", n_rows)
        os.environ.update(SETTINGS)
        os.environ["QLORA_MODEL_NAME"] = model
        os.environ["QLORA_DATASET_NAME"] = "rows.csv"
        path = before_training(folder)
        import run_notebook

        megabytes = (folder / "rows.csv").stat().st_size / 1e6
        seconds = run_notebook.execute(path, folder / "executed.ipynb", folder)
        return {
            "file_mb": megabytes,
            "seconds": seconds,
            "peak_gb": run_notebook.peak_memory_gb(),
        }


def run_apart(n_rows: int, model: str) -> dict:
    """Return what `run_here` returns in a process of its own."""
    program = "import json; from benchmarks import load; "
    program += f"print(json.dumps(load.run_here({n_rows}, {model!r})))"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{n_rows:,} rows: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure each size, and write load.json."""
    parser = common.parser("load", __doc__)
    parser.add_argument("--rows", nargs="+", type=int, default=[10_000, 100_000, 10**6])
    arguments = parser.parse_args()
    sizes = [400] if arguments.tiny else arguments.rows
    model = common.random_model(common.TINY)
    study = common.Study("load", arguments.out, {"tiny": arguments.tiny})
    for n_rows in sizes:
        study.add({"rows": n_rows}, run_apart, n_rows, model)


if __name__ == "__main__":
    main()
