"""Run the notebook as a reader does: in JupyterLab, in a browser, with Run > Run All Cells, and picture what comes.

    python scripts/run_in_jupyterlab.py outputs/browser
    python scripts/run_in_jupyterlab.py outputs/browser --theme "JupyterLab Dark"

It takes a copy of this repository, clears the saved outputs, runs all cells, types a review into the text box of section 12, and fails
unless every code cell was executed without an error. Screenshots and the executed notebook are written to the named folder. Without the
Hugging Face Hub it runs on the offline assets, as ``make run`` does. It needs what the notebook needs, and jupyterlab, playwright and a
Chromium (named by ``--browser``, or ``playwright install chromium``). With ``--python``, the kernel's packages can be another
environment's, which then needs ipykernel.
"""

import argparse
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = "QLoRA_BERT_TextClassification.ipynb"
REVIEW = "The plot is thin, but the actors are wonderful and the ending is a delight."


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_lab(folder: Path, python: str, theme: str, port: int, token: str) -> subprocess.Popen:
    """Start JupyterLab on the copy of the repository in ``folder``, with a kernel of ``python`` and nothing of the user's settings."""
    kernel = folder / ".jupyter/kernels/python3/kernel.json"
    kernel.parent.mkdir(parents=True)
    kernel.write_text(json.dumps({"argv": [python, "-m", "ipykernel_launcher", "-f", "{connection_file}"], "display_name": "Python 3", "language": "python"}))
    themes = folder / ".jupyter/settings/@jupyterlab/apputils-extension/themes.jupyterlab-settings"
    themes.parent.mkdir(parents=True)
    themes.write_text(json.dumps({"theme": theme}))
    environ = os.environ | {"JUPYTER_PATH": str(folder / ".jupyter"), "JUPYTER_CONFIG_DIR": str(folder / ".jupyter/config"), "JUPYTERLAB_SETTINGS_DIR": str(folder / ".jupyter/settings"), "JUPYTERLAB_WORKSPACES_DIR": str(folder / ".jupyter/workspaces")}
    environ = {name: value for name, value in environ.items() if name != "HF_HUB_OFFLINE"}  # as a reader has it
    arguments = ["--no-browser", "--allow-root", f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}"]
    return subprocess.Popen([sys.executable, "-m", "jupyterlab", *arguments], cwd=folder, env=environ, stdout=(folder / ".jupyter/log").open("w"), stderr=subprocess.STDOUT)


def wait_for(url: str, seconds: float = 60) -> None:
    """Wait until ``url`` answers."""
    end = time.monotonic() + seconds
    while True:
        try:
            return urllib.request.urlopen(url, timeout=5).close()
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)


def choose(page: Page, menu: str, item: str) -> None:
    """Choose ``item`` of the menu ``menu``."""
    page.get_by_role("menuitem", name=menu, exact=True).click()
    page.locator(".lm-Menu-itemLabel", has_text=item).first.click()


def show(page: Page, text: str, folder: Path, name: str) -> None:
    """Picture the window with the first output that holds ``text`` (a CSS selector or Playwright text) in its middle."""
    found = page.locator(".jp-OutputArea-output", has=page.locator(text)).first
    found.scroll_into_view_if_needed(timeout=20_000)
    page.wait_for_timeout(500)
    page.screenshot(path=folder / f"{name}.png")


def run_all(page: Page, minutes: float) -> list[str]:
    """Clear the saved outputs, choose Run > Run All Cells, wait until no cell is running or waiting, and return each code cell's prompt."""
    prompts = page.locator(".jp-Notebook .jp-CodeCell .jp-InputPrompt")
    loaded = -1
    while loaded != prompts.count() or not loaded:  # cells come one by one, and only those that are there are cleared
        loaded = prompts.count()
        page.wait_for_timeout(5000)
    page.wait_for_selector(".jp-NotebookPanel-toolbar [data-status='idle']", timeout=60_000)
    choose(page, "Edit", "Clear Outputs of All Cells")
    page.wait_for_timeout(5000)
    choose(page, "Run", "Run All Cells")
    end = time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        page.wait_for_timeout(10_000)
        texts = [text.strip() for text in prompts.all_text_contents()]
        print(f"{len(texts) - texts.count('[*]:')} of {len(texts)} cells", flush=True)
        if "[*]:" not in texts:
            return texts
    raise SystemExit(f"After {minutes:g} minutes it was still running.")


def try_review(page: Page, text: str) -> str:
    """Type ``text`` into the text box, press its button and return the answer."""
    box = page.locator(".jupyter-widgets textarea").first
    box.scroll_into_view_if_needed()
    box.fill(text)
    page.get_by_role("button", name="Classify").click()
    answer = page.locator(".jupyter-widgets.widget-html", has_text="margin")
    answer.wait_for(timeout=60_000)
    return answer.inner_text()


def main() -> None:
    """Run it, check it and picture it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the pictures and the executed notebook go")
    parser.add_argument("--python", default=sys.executable, help="the Python of the kernel")
    parser.add_argument("--theme", default="JupyterLab Light")
    parser.add_argument("--browser", default=shutil.which("chromium"), help="a Chromium; without one, Playwright's own")
    parser.add_argument("--minutes", type=float, default=60.0, help="give up after so many")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(ROOT / "scripts"))
    import run_notebook

    if not run_notebook.hub_is_reached():
        run_notebook.use_offline_assets(os.environ)
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        folder, port, token = Path(scratch) / "work", free_port(), secrets.token_hex(16)
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", ".venv", "outputs", "wandb", ".env"))
        lab = start_lab(folder, arguments.python, arguments.theme, port, token)
        browser = playwright.chromium.launch(executable_path=arguments.browser, args=["--no-sandbox"])
        try:
            wait_for(f"http://127.0.0.1:{port}/api")
            page = browser.new_page(viewport={"width": 1280, "height": 1000})
            page.goto(f"http://127.0.0.1:{port}/lab/tree/{NOTEBOOK}?token={token}")
            prompts = run_all(page, arguments.minutes)
            page.keyboard.press("Control+s")
            page.wait_for_timeout(5000)
            shutil.copy(folder / NOTEBOOK, arguments.folder)
            errors = page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.error']").all_text_contents()
            assert not errors, errors
            assert prompts == [f"[{number}]:" for number in range(1, len(prompts) + 1)], prompts
            print(try_review(page, REVIEW))
            pictures = {"widget": ".jupyter-widgets textarea", "evidence": "bdi", "training": "progress", "table": "table[id^=T_]", "figure": "img"}
            for name, selector in pictures.items():
                show(page, selector, arguments.folder, name)
        finally:
            browser.close()
            lab.terminate()
            lab.wait()


if __name__ == "__main__":
    main()
