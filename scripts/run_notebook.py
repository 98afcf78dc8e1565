"""Execute the notebook top to bottom, with its progress in the terminal: `make run`.

Where the Hugging Face Hub answers, the notebook fetches its own model and data. Where
it does not, the offline assets stand in, with the demo preset. Settings win over both:
those of the notebook's own cell first, then `QLORA_*` of the environment and `.env`.
"""

import ast
import asyncio
import contextlib
import html
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import MutableMapping
from pathlib import Path

import nbformat
import offline_assets
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from notebook_api import NOTEBOOK, ROOT, read_environment


STOPPED = "\nStopped. To resume, rerun with the same settings; whole epochs are kept."


def hub_is_reached(timeout: float = 5.0) -> bool:
    """Tell whether the Hub may be used (no `HF_HUB_OFFLINE`) and answers in time."""
    # imported here, since it reads the environment then, and `.env` is part of that
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=timeout)
    except Exception:  # offline mode, no name server, refused, timed out: all the same
        return False
    return True


def shown_path(path: Path) -> str:
    """Return a path within this repository, or with the home folder as `~`.

    So outputs can be shared: they do not hold the user's name.
    """
    if path.is_relative_to(ROOT):
        return str(path.relative_to(ROOT))
    if path.is_relative_to(Path.home()):
        return f"~/{path.relative_to(Path.home()).as_posix()}"
    return str(path)


def own_settings(notebook: nbformat.NotebookNode) -> dict:
    """Return the `settings` of the notebook's cell for them.

    Raises SystemExit: they are not literal, so what the notebook will do is not known.
    """
    settings = {}
    for cell in notebook.cells:
        if "parameters" not in cell.metadata.get("tags", []):
            continue
        try:
            for statement in ast.parse(cell.source).body:
                if not ast.unparse(statement).startswith("settings = "):
                    raise ValueError("another statement")
                settings = dict(ast.literal_eval(statement.value))
        except (SyntaxError, TypeError, ValueError):
            raise SystemExit(
                "The notebook's cell for settings cannot be read by this command:"
                f"\n{cell.source}\nNeeded: settings = {{...}} with values as they are,"
                " such as 7 or 'my.csv', and nothing else. Or run it in Jupyter."
            ) from None
    return settings


def chosen(field: str, own: dict, environ: MutableMapping[str, str]) -> str:
    """Return a setting as the notebook will read it; empty where nothing sets it."""
    for value in (own.get(field), environ.get(f"QLORA_{field.upper()}")):
        if str(value or "").strip():
            return str(value).strip()
    return ""


def use_offline_assets(own: dict, environ: MutableMapping[str, str]) -> None:
    """Let the notebook run without the Hub, on the offline assets.

    They stand in where neither its `own` settings nor `environ` name others. The demo's
    settings apply only to its own data: other data get the defaults.
    """
    environ["HF_HUB_OFFLINE"] = "1"  # nothing in the notebook waits for the Hub
    if not chosen("model_name", own, environ):
        environ["QLORA_MODEL_NAME"] = shown_path(offline_assets.ensure_model())
        print(f"Whatever the preset, the model is {environ['QLORA_MODEL_NAME']}.")
    if not chosen("dataset_name", own, environ):
        environ["QLORA_DATASET_NAME"] = shown_path(offline_assets.ensure_reviews())
        environ.setdefault("QLORA_PRESET", "demo")
        environ.setdefault("QLORA_MAX_TRAIN_SAMPLES", "2500")
        environ.setdefault("QLORA_VALIDATION_SHARE", "0.05")
        environ.setdefault("QLORA_NUM_TRAIN_EPOCHS", "2")


def table_text(markup: str) -> str:
    """Return the tables in HTML that pandas wrote as text: a line for each row."""
    lines = []
    for row in re.findall(r"<tr\b.*?</tr>", markup, re.DOTALL):
        cells = []
        for cell in re.findall(r"<t[hd]\b[^>]*>(.*?)</t[hd]>", row, re.DOTALL):
            text = " ".join(html.unescape(re.sub(r"<[^>]*>", "", cell)).split())
            if len(text) > 60:
                text = text[:56] + " ..."
            cells.append(text)
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines)]
    rows = []
    for cells in lines:
        padded = [cell.ljust(width) for cell, width in zip(cells, widths)]
        rows.append("  ".join(padded).rstrip())
    return "\n".join(rows)


class ProgressClient(NotebookClient):
    """Execute a notebook; show each cell as it starts, what it prints, its tables."""

    def __init__(self, notebook: nbformat.NotebookNode, folder: Path):
        super().__init__(
            notebook,
            timeout=None,
            kernel_name="python3",
            record_timing=False,
            resources={"metadata": {"path": str(folder)}},
            # the kernel warns that it speaks plain TCP, on this machine alone
            extra_arguments=["--log-level=ERROR"],
            on_notebook_start=self.notebook_starts,
            on_cell_execute=self.cell_starts,
            on_cell_executed=self.cell_ends,
        )
        self.seconds = Counter()  # of each section
        self.cell_start = 0.0
        self.last_bar = 0.0
        self.numbers = {}  # place of a code cell -> its number
        self.sections = {}  # place of a code cell -> the heading above it
        section = ""
        for place, cell in enumerate(notebook.cells):
            if cell.cell_type == "code":
                self.numbers[place] = len(self.numbers) + 1
                self.sections[place] = section
            for heading in re.findall(r"^## (.+)$", cell.source, re.MULTILINE):
                if cell.cell_type == "markdown":
                    section = heading

    def notebook_starts(self, notebook: nbformat.NotebookNode) -> None:
        """Let Ctrl-C interrupt the cell, as in Jupyter: nbclient kills the kernel."""
        loop = asyncio.get_running_loop()

        def interrupt():
            loop.remove_signal_handler(signal.SIGINT)  # the second one ends all
            loop.create_task(self.km.interrupt_kernel())

        with contextlib.suppress(NotImplementedError):  # on Windows
            loop.add_signal_handler(signal.SIGINT, interrupt)

    def cell_starts(self, cell: nbformat.NotebookNode, cell_index: int) -> None:
        """Print the cell's number and first line, and the heading of a new section."""
        section = self.sections[cell_index]
        if section not in self.seconds:
            print(f"\n== {section}")
        first_line = cell.source.strip().splitlines()[0].removeprefix("# @title ")
        number = self.numbers[cell_index]
        print(f"[{number:>2}/{len(self.numbers)}] {first_line:.100}", flush=True)
        self.cell_start = time.monotonic()

    def cell_ends(self, cell_index: int, **others) -> None:
        """Add the cell's time to that of its section."""
        section = self.sections[cell_index]
        self.seconds[section] += time.monotonic() - self.cell_start

    def process_message(self, msg, cell, cell_index):
        """Print what the cell prints and, every ten seconds, its progress bar."""
        content = msg["content"]
        if msg["msg_type"] == "stream":
            print(content["text"], end="", flush=True)
        markup = content.get("data", {}).get("text/html", "")
        if "<progress" in markup:
            if time.monotonic() - self.last_bar > 10:
                self.print_bar(markup)
        elif "<table" in markup:
            print(table_text(markup), flush=True)
        return super().process_message(msg, cell, cell_index)

    def print_bar(self, markup: str) -> None:
        """Print the numbers of Trainer's progress bar."""
        text = re.sub(r"</?[a-z][^>]*>", " ", markup)
        numbers = re.search(r"\[ *\d+/\d+[^\]]*\]", text)
        if numbers:
            self.last_bar = time.monotonic()
            print("      " + " ".join(numbers[0].split()), flush=True)


def execute(path: Path, executed: Path, folder: Path) -> dict[str, float]:
    """Execute the notebook `path` in `folder`, and return the seconds of each section.

    It is written to `executed` with its outputs, also when a cell fails. Raises
    SystemExit: a cell failed, or the kernel died; says why.
    """
    notebook = nbformat.read(path, as_version=4)
    client = ProgressClient(notebook, folder)
    executed.parent.mkdir(parents=True, exist_ok=True)
    reason = ""
    try:
        client.execute()
    except CellExecutionError as error:
        if error.ename == "KeyboardInterrupt":
            raise SystemExit(STOPPED) from None
        reason = f"{error.ename}: {error.evalue}"
    except (DeadKernelError, AssertionError):  # nbclient asserts that there is a kernel
        reason = (
            "The notebook's process was killed, from outside or for lack of memory."
            " Run it again: a training goes on from its last whole epoch."
        )
    finally:
        nbformat.write(notebook, executed)
    if reason:
        raise SystemExit(
            f"\n{reason}\n"
            f"The cells up to here, and their outputs: {shown_path(executed)}"
        )
    return dict(client.seconds)


def git_commit() -> str | None:
    """Return the commit of this code; without a repository, GIT_COMMIT names it."""
    if "GIT_COMMIT" in os.environ:
        return os.environ["GIT_COMMIT"]
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:  # there is no git
        return None
    return done.stdout.strip() or None


def add_sections(path: Path, seconds: dict[str, float]) -> dict:
    """Add the seconds of each section and the commit to the results in `path`.

    Returns all of them.
    """
    results = json.loads(path.read_text(encoding="utf-8"))
    results["provenance"]["git_commit"] = git_commit()
    results["sections"] = {name: round(value, 1) for name, value in seconds.items()}
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def peak_memory_gb() -> float:
    """Return the most memory that a finished child, the kernel, held (10^9 bytes)."""
    size = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    if sys.platform == "darwin":
        return size / 1e9  # macOS counts bytes, Linux KiB
    return size * 1024 / 1e9


def lines_to_look_at(executed: Path) -> list[str]:
    """Return what the notebook printed about the data that the user should check."""
    found = []
    for cell in nbformat.read(executed, as_version=4).cells:
        for output in cell.get("outputs", []):
            for line in output.get("text", "").splitlines():
                is_cut = line.endswith("(max_length).") and not line.startswith("0%")
                if line.startswith("LOOK") or is_cut:
                    found.append(line)
    return found


def score_line(name: str, scores: dict) -> str:
    """Return a line of the summary: accuracy with its interval, and macro F1."""
    low, high = scores["accuracy_ci95"]
    interval = f"[{100 * low:.1f}, {100 * high:.1f}]"
    macro_f1 = f"macro F1 {scores['f1_macro']:.1%}"
    return f"{name:<24}{scores['accuracy']:.1%} {interval}; {macro_f1}"


def summary(results: dict, data_dir: str, output_dir: str, executed: Path) -> str:
    """Return what `make run` ends with: scores, times and where everything is."""
    about = results["provenance"]
    seconds = sum(results["sections"].values())
    training = results["training"]
    memory = peak_memory_gb()
    n_texts = results["test"]["n"]
    lines = [
        f"\n{about['model']} on {about['dataset']}, {n_texts:,} test texts;"
        f" {about['device']}",
        score_line("merged model", results["test_merged"]),
        score_line("adapter", results["test"]),
    ]
    for name, scores in results["baselines"].items():
        if scores is not None:
            lines.append(score_line(name, scores))
    lines += [
        f"largest class           {about['largest_class']:.1%}",
        results["reliable"]["words"],
        *results["cautions"],
        *lines_to_look_at(executed),
        f"time, memory            {seconds:.0f} s; {memory:.1f} GB",
        f"training                {training['seconds']:.0f} s in all attempts",
        f"results and plots       {data_dir}/",
        f"adapter, merged model   {output_dir}/adapter/, {output_dir}/merged/",
        f"TF-IDF, test answers    {output_dir}/tfidf.joblib, test_predictions.csv",
        f"executed notebook       {shown_path(executed)}",
    ]
    return "\n".join(lines)


def main() -> None:
    """Prepare the input, execute the notebook, and print the summary."""
    os.chdir(ROOT)
    read_environment()
    own = own_settings(nbformat.read(NOTEBOOK, as_version=4))
    if not hub_is_reached():
        print(
            "The Hugging Face Hub does not answer, or HF_HUB_OFFLINE is set:"
            " using the offline assets.",
            flush=True,
        )
        use_offline_assets(own, os.environ)
    output_dir = os.path.expanduser(chosen("output_dir", own, os.environ) or "outputs")
    data_dir = os.path.expanduser(chosen("data_dir", own, os.environ) or "Data")
    executed = ROOT / output_dir / f"{NOTEBOOK.stem}.executed.ipynb"
    seconds = execute(NOTEBOOK, executed, ROOT)
    results = add_sections(ROOT / data_dir / "results.json", seconds)
    print(summary(results, data_dir, output_dir, executed))
    if chosen("predict_name", own, os.environ):
        print(f"predictions             {output_dir}/predictions.csv")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(STOPPED) from None
