"""Kill a run of the notebook with SIGKILL at random moments, run it again each time, and compare what it ends with to a run that nothing interrupted.

The cells up to the end of section 9 are run, one after the other, in a process of their own: training, saving, and the scores of the test split. Settings are given
as ``QLORA_<FIELD>=VALUE``, behind the options or in the environment; without the Hugging Face Hub the offline assets stand in:

    .venv/bin/python scripts/kill_and_resume.py --kills 10 --seed 0 QLORA_MAX_TRAIN_SAMPLES=320 QLORA_NUM_TRAIN_EPOCHS=4
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from run_notebook import NOTEBOOK, ROOT, hub_is_reached, use_offline_assets

AFTER = "## 10 Efficiency"  # the first section that is not run
IN_A_ROW = 3  # kills before a run is left to end


def run_cells(folder: Path) -> None:
    """Run the notebook in ``folder`` up to ``AFTER``, note in ``where.txt`` the section that runs, and write what it ended with to ``end.json``."""
    os.chdir(folder)
    os.environ.setdefault("MPLBACKEND", "agg")
    space = {"__name__": "__main__"}
    for cell in nbformat.read(ROOT / NOTEBOOK, as_version=4).cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, "<cell>", "exec"), space)
        elif cell.source.startswith(AFTER):
            break
        elif cell.source.startswith("## "):
            Path("where.txt").write_text(cell.source.splitlines()[0].removeprefix("## "))
    history = [{name: value for name, value in row.items() if not name.endswith(("_runtime", "_per_second"))} for row in json.loads(space["history"].to_json(orient="records", double_precision=15))]
    adapter = hashlib.sha256((Path(space["adapter_dir"]) / "adapter_model.safetensors").read_bytes()).hexdigest()
    test = {name: space["test_scores"][name] for name in ("accuracy", "f1_weighted", "confusion_matrix")}
    end = {"resumed": space["resume_line"], "outcome": {"test": test, "epochs": space["epochs_run"], "best_epoch": space["best_epoch"], "history": history, "adapter_sha256": adapter}}
    Path("end.json.part").write_text(json.dumps(end))
    Path("end.json.part").replace("end.json")


def seconds_to(section: str, folder: Path, process: subprocess.Popen) -> float:
    """Wait until ``process`` runs ``section`` (an empty one: not at all), or has ended; return for how long."""
    start, where = time.monotonic(), folder / "where.txt"
    while section and process.poll() is None and not (where.exists() and where.read_text().startswith(section)):
        time.sleep(0.05)
    return time.monotonic() - start


def run(folder: Path, environ: dict[str, str], section: str, seconds: float | None = None) -> tuple[dict | None, float]:
    """Run the notebook in ``folder`` in a process of its own; kill it ``seconds`` after ``section`` has begun. Return what it ended with, None if it was killed, and how many seconds it ran from ``section`` on.

    Raises:
        SystemExit: the run failed by itself.
    """
    for name in ("end.json", "where.txt"):
        (folder / name).unlink(missing_ok=True)
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen([sys.executable, __file__, "--run-in", str(folder)], env=environ, stdout=log, stderr=log)
        seconds_to(section, folder, process)
        start = time.monotonic()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return None, time.monotonic() - start
    if process.returncode:
        raise SystemExit((folder / "log.txt").read_text()[-3000:])
    return json.loads((folder / "end.json").read_text()), time.monotonic() - start


def main() -> None:
    """Compare, print each kill and each end, and fail if an end differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="QLORA_FIELD=VALUE")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--section", default="8 Training", help='kill in this section and those after it ("" for all)')
    parser.add_argument("--run-in", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run_in:
        return run_cells(arguments.run_in)
    sections = [cell.source.splitlines()[0].removeprefix("## ") for cell in nbformat.read(ROOT / NOTEBOOK, as_version=4).cells if cell.source.startswith("## ")]
    sections = sections[: sections.index(AFTER.removeprefix("## "))]
    if not any(each.startswith(arguments.section) for each in sections):
        parser.error(f"--section {arguments.section!r} is not run. Allowed: {', '.join(sections)}.")
    environ = dict(os.environ) | dict(setting.split("=", 1) for setting in arguments.settings)
    if not hub_is_reached():
        use_offline_assets(environ)
        environ["HF_HUB_OFFLINE"] = "1"
    moments, kills, different = random.Random(arguments.seed), 0, 0
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "whole"
        folder.mkdir()
        end, duration = run(folder, environ, arguments.section)
        whole = end["outcome"]
        print(f"Uninterrupted: {duration:.1f} s{' from section ' + arguments.section if arguments.section else ''} on, {whole['epochs']:g} epochs, test accuracy {whole['test']['accuracy']:.4f}, adapter {whole['adapter_sha256'][:12]}.", flush=True)
        while kills < arguments.kills:
            folder, end, in_a_row = Path(home) / f"killed-{kills}", None, 0
            folder.mkdir()
            while end is None:
                seconds = moments.uniform(0, duration) if kills < arguments.kills and in_a_row < IN_A_ROW else None
                end, ran = run(folder, environ, arguments.section, seconds)
                if end is None:
                    kills, in_a_row = kills + 1, in_a_row + 1
                    where = (folder / "where.txt").read_text() if (folder / "where.txt").exists() else "the start"
                    checkpoints = sorted(path.name for path in folder.glob("outputs/checkpoints/*/checkpoint-*"))
                    print(f"Kill {kills}: after {ran:.1f} s, in {where}; checkpoints: {', '.join(checkpoints) or 'none'}.", flush=True)
            same = end["outcome"] == whole
            different += not same
            print(f"  Run again to the end: {'the same' if same else 'DIFFERENT'}. {end['resumed']}", flush=True)
            shutil.rmtree(folder)
    if different:
        raise SystemExit(f"{different} ends differ from the uninterrupted run.")
    print(f"{kills} kills, and every run ended as the uninterrupted one: the same history, adapter and test scores.")


if __name__ == "__main__":
    sys.exit(main())
