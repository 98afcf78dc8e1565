"""Execute the notebook top to bottom with its progress in the terminal, on real input: what `make run` runs.

Where the Hugging Face Hub answers, the notebook fetches its own model and data. Where it does not, the offline assets
stand in, with the demo preset. Settings (`QLORA_*`) of the environment or of `.env` win over both.
"""

import ast
import json
import os
import re
import resource
import sys
import time
from collections.abc import MutableMapping
from contextlib import suppress
from pathlib import Path

import nbformat
import offline_assets
from dotenv import load_dotenv
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = "QLoRA_BERT_TextClassification.ipynb"


def hub_is_reached(timeout: float = 5.0) -> bool:
    """Tell whether the Hub may be used (`HF_HUB_OFFLINE` is not set) and answers within `timeout` seconds."""
    from huggingface_hub import constants, get_session  # here: at import it reads the environment, .env included

    try:
        get_session().head(constants.ENDPOINT, timeout=timeout)
    except Exception:  # offline mode, no name server, refused, timed out: all mean the same here
        return False
    return True


def with_home(path: Path) -> str:
    """Return `path` below this repository, or with the home folder as `~`, so that outputs can be shared."""
    if path.is_relative_to(ROOT):
        return str(path.relative_to(ROOT))
    return f"~/{path.relative_to(Path.home()).as_posix()}" if path.is_relative_to(Path.home()) else str(path)


def own_settings(nb: nbformat.NotebookNode) -> dict[str, str]:
    """Return the literal `settings` of the notebook's cell for them, by the names that they have in an environment."""
    values = {}
    for cell in [cell for cell in nb.cells if "parameters" in cell.metadata.get("tags", [])]:
        with suppress(ValueError, IndexError, AttributeError):  # no literal
            values |= ast.literal_eval(ast.parse(cell.source).body[-1].value)
    return {f"QLORA_{name.upper()}": str(value) for name, value in values.items()}


def use_offline_assets(environ: MutableMapping[str, str], own: dict[str, str]) -> None:
    """Let the notebook run without the Hub: on the offline assets, where neither `environ` nor its `own` settings name
    others. The demo's settings come with its data alone: who names data of their own gets the notebook's defaults."""
    if not (own.get("QLORA_MODEL_NAME") or environ.get("QLORA_MODEL_NAME")):
        environ["QLORA_MODEL_NAME"] = with_home(offline_assets.ensure_model())
    if not (own.get("QLORA_DATASET_NAME") or environ.get("QLORA_DATASET_NAME")):
        environ["QLORA_DATASET_NAME"] = with_home(offline_assets.ensure_reviews())
        for name, value in {"PRESET": "demo", "MAX_TRAIN_SAMPLES": "2500", "VALIDATION_SHARE": "0.05"}.items():
            environ.setdefault(f"QLORA_{name}", value)


class ProgressClient(NotebookClient):
    """Execute a notebook, printing each cell as it starts, what it prints, and its progress bars; time its sections."""

    last_bar = 0.0

    def announce(self, cell: nbformat.NotebookNode, cell_index: int) -> None:
        """Print the heading above a code cell, and the cell's number and first line; note when a section begins."""
        before = [each.source for each in self.nb.cells[:cell_index] if each.cell_type == "markdown"]
        heading = (re.findall(r"^## (.+)$", "\n".join(before), flags=re.MULTILINE) or [""])[-1]
        if heading not in self.begun:
            self.begun[heading] = time.monotonic()
            print(f"\n== {heading}")
        numbers = [index for index, each in enumerate(self.nb.cells) if each.cell_type == "code"]
        lines = [line for line in cell.source.splitlines() if line.strip()]
        title = lines[0].removeprefix("# @title ")[:100]
        print(f"[{numbers.index(cell_index) + 1:>2}/{len(numbers)}] {title}", flush=True)

    def seconds(self) -> dict[str, float]:
        """Return how long each section took, by its name; a section whose end was not reached is missing."""
        begun = list(self.begun.items())
        return {name: end - start for (name, start), (_, end) in zip(begun, begun[1:])}

    def process_message(self, msg, cell, cell_index):
        content = msg["content"]
        if msg["msg_type"] == "stream":
            print(content["text"], end="", flush=True)
        elif msg["msg_type"] in ("display_data", "update_display_data"):
            shown = content["data"].get("text/html", "")
            bar = re.search(r"\[ *\d+/\d+[^\]]*\]", re.sub(r"</?[a-z][^>]*>", " ", shown))
            if bar and "<progress" in shown and time.monotonic() - self.last_bar > 10:
                self.last_bar = time.monotonic()
                print("      " + " ".join(bar.group().split()), flush=True)
        return super().process_message(msg, cell, cell_index)


def execute(notebook: Path, executed: Path, folder: Path) -> dict[str, float]:
    """Execute `notebook` in `folder`, write it with its outputs to `executed`, also when a cell fails, and return the
    seconds of each section.

    Raises:
        SystemExit: a cell failed; the message is the cell's error.
    """
    nb = nbformat.read(notebook, as_version=4)
    client = ProgressClient(
        nb, timeout=None, kernel_name="python3", record_timing=False, resources={"metadata": {"path": str(folder)}}
    )
    client.extra_arguments = ["--log-level=ERROR"]  # the kernel warns that it speaks plain TCP, on this machine alone
    client.begun, client.on_cell_execute = {}, client.announce
    executed.parent.mkdir(parents=True, exist_ok=True)
    try:
        client.execute()
    except CellExecutionError as error:
        raise SystemExit(
            f"\n{error.ename}: {error.evalue}\nThe cells up to here, and their outputs: {with_home(executed)}"
        ) from None
    finally:
        nbformat.write(nb, executed)
    client.begun["end"] = time.monotonic()
    return client.seconds()


def peak_memory_gb() -> float:
    """Return the largest resident memory of a finished child process, the notebook's kernel, in GB (10^9 bytes)."""
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit / 1e9


def summary(results: dict, data_dir: str, output_dir: str, executed: Path) -> str:
    """Return what `make run` ends with: scores, times and where everything is."""

    def percent(scores: dict) -> str:
        low, high = scores["accuracy_ci95"]
        return f"{scores['accuracy']:.1%} [{100 * low:.1f}, {100 * high:.1f}]; macro F1 {scores['f1_macro']:.1%}"

    about, trained, seconds = results["provenance"], results["training"]["seconds"], sum(results["sections"].values())
    scores = {"QLoRA adapter": results["test"], "merged model": results["test_merged"], **results["baselines"]}
    rest = {
        "largest class": f"{about['largest_class']:.1%}",
        "time, memory": f"{seconds:.0f} s, training {trained:.0f} s of it; {peak_memory_gb():.1f} GB",
        "results and plots": f"{data_dir}/",
        "adapter, merged model": f"{output_dir}/adapter/, {output_dir}/merged/",
        "executed notebook": with_home(executed),
    }
    title = f"\n{about['model']} on {about['dataset']}, {results['test']['n']:,} test texts; {about['device']}"
    rows = {name: percent(each) for name, each in scores.items()} | rest
    return "\n".join([title, *(f"{name:<24}{row}" for name, row in rows.items())])


def main() -> None:
    """Prepare the input, execute the notebook, add the sections' times to its results, and print the summary."""
    os.chdir(ROOT)
    load_dotenv(".env")
    own = own_settings(nbformat.read(NOTEBOOK, as_version=4))
    if not hub_is_reached():
        print("The Hugging Face Hub does not answer, or HF_HUB_OFFLINE is set: on the offline assets.", flush=True)
        use_offline_assets(os.environ, own)
    settings = os.environ | own
    output_dir, data_dir = settings.get("QLORA_OUTPUT_DIR") or "outputs", settings.get("QLORA_DATA_DIR") or "Data"
    executed = (ROOT / output_dir / NOTEBOOK).with_suffix(".executed.ipynb")
    seconds = execute(ROOT / NOTEBOOK, executed, ROOT)
    path = ROOT / data_dir / "results.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    results["sections"] = {name: round(each, 1) for name, each in seconds.items()}
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(summary(results, data_dir, output_dir, executed))


if __name__ == "__main__":
    sys.exit(main())
