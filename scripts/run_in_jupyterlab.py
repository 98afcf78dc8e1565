"""Run the notebook as a reader does: in JupyterLab, in a browser, with Run > Run All Cells, and picture what comes.

    python scripts/run_in_jupyterlab.py outputs/browser --theme "JupyterLab Dark"

It copies this repository, clears the saved outputs, runs all cells (without the Hub on the offline assets, as ``make run`` does), types a
review into the text box of section 12, and fails unless every code cell was executed, in order and without an error. Screenshots and the
executed notebook go to the named folder. Besides what ``make run`` installs it needs jupyterlab, playwright and a Chromium (one that
``--browser`` names, or ``playwright install chromium``). With ``--python`` the kernel's packages are another environment's.
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
from pathlib import Path

from playwright.sync_api import Page, sync_playwright
from run_notebook import NOTEBOOK, ROOT, hub_is_reached, use_offline_assets

REVIEW = "The plot is thin, but the actors are wonderful and the ending is a delight."
PICTURES = {
    "widget": ".jupyter-widgets textarea",
    "evidence": "bdi",
    "training": "progress",
    "table": "table[id^=T_]",
    "figure": "img",
}  # an output that holds such an element


def start_lab(folder: Path, python: str, theme: str) -> tuple[subprocess.Popen, str]:
    """Start JupyterLab on ``folder``, with a kernel of ``python`` and none of the user's settings; return it and the notebook's address."""
    own = folder / ".jupyter"
    kernel, themes = (
        own / "kernels/python3/kernel.json",
        own / "settings/@jupyterlab/apputils-extension/themes.jupyterlab-settings",
    )
    for path, content in (
        (
            kernel,
            {
                "argv": [python, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
                "display_name": "Python 3",
                "language": "python",
            },
        ),
        (themes, {"theme": theme}),
    ):
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(content))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port, token = listener.getsockname()[1], secrets.token_hex(16)
    environ = os.environ | {
        "JUPYTER_PATH": str(own),
        "JUPYTER_CONFIG_DIR": str(own / "config"),
        "JUPYTERLAB_SETTINGS_DIR": str(own / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(own / "workspaces"),
    }
    arguments = [
        "--no-browser",
        "--allow-root",
        f"--ServerApp.port={port}",
        "--ServerApp.port_retries=0",
        f"--IdentityProvider.token={token}",
        f"--ServerApp.root_dir={folder}",
    ]
    lab = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", *arguments],
        cwd=folder,
        env=environ,
        stdout=(own / "log").open("w"),
        stderr=subprocess.STDOUT,
    )
    for _ in range(120):
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return lab, f"http://127.0.0.1:{port}/lab/tree/{NOTEBOOK}?token={token}"
        time.sleep(0.5)
    lab.terminate()
    raise SystemExit("JupyterLab did not start:\n" + (own / "log").read_text())


def choose(page: Page, menu: str, item: str) -> None:
    """Choose ``item`` of the menu ``menu``."""
    page.get_by_role("menuitem", name=menu, exact=True).click()
    page.locator(".lm-Menu-itemLabel", has_text=item).first.click()


def run_all(page: Page, minutes: float) -> list[str]:
    """Clear the saved outputs, choose Run > Run All Cells, wait until no cell is running or waiting, and return each code cell's prompt."""
    prompts = page.locator(".jp-Notebook .jp-CodeCell .jp-InputPrompt")
    page.wait_for_selector(".jp-NotebookPanel-toolbar [data-status='idle']", timeout=60_000)
    loaded = 0
    while not loaded or loaded != prompts.count():  # cells come one by one, and only those that are there are cleared
        loaded = prompts.count()
        page.wait_for_timeout(5000)
    choose(page, "Edit", "Clear Outputs of All Cells")
    page.wait_for_timeout(5000)
    choose(page, "Run", "Run All Cells")
    for _ in range(round(6 * minutes)):
        page.wait_for_timeout(10_000)
        texts = [text.strip() for text in prompts.all_text_contents()]
        print(f"{len(texts) - texts.count('[*]:')} of {len(texts)} cells", flush=True)
        if "[*]:" not in texts:
            return texts
    raise SystemExit(f"After {minutes:g} minutes it was still running. --minutes allows it more.")


def main() -> None:
    """Run it, check it and picture it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the pictures and the executed notebook go")
    parser.add_argument("--python", default=sys.executable, help="the Python of the kernel")
    parser.add_argument("--theme", default="JupyterLab Light")
    parser.add_argument("--browser", default=shutil.which("chromium"), help="a Chromium; without one, Playwright's own")
    parser.add_argument("--minutes", type=float, default=60.0, help="give up after so many")
    arguments = parser.parse_args()
    if not hub_is_reached():
        use_offline_assets(os.environ)
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        copy = Path(
            shutil.copytree(
                ROOT, Path(scratch) / "copy", ignore=shutil.ignore_patterns(".git", ".venv", "outputs", "wandb", ".env")
            )
        )
        lab, address = start_lab(copy, arguments.python, arguments.theme)
        browser = playwright.chromium.launch(executable_path=arguments.browser, args=["--no-sandbox"])
        try:
            page = browser.new_page(viewport={"width": 1280, "height": 1000})
            page.goto(address)
            prompts = run_all(page, arguments.minutes)
            page.keyboard.press("Control+s")
            page.wait_for_timeout(5000)
            arguments.folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(copy / NOTEBOOK, arguments.folder)
            cells = [
                cell
                for cell in json.loads((copy / NOTEBOOK).read_text(encoding="utf-8"))["cells"]
                if cell["cell_type"] == "code"
            ]
            errors = [
                f"{output['ename']}: {output['evalue']}"
                for cell in cells
                for output in cell["outputs"]
                if output["output_type"] == "error"
            ]
            if errors or prompts != [f"[{number}]:" for number in range(1, len(cells) + 1)]:
                raise SystemExit(
                    "\n".join(["Not every cell was executed once and in order:", *errors, " ".join(prompts)])
                )
            page.locator(".jupyter-widgets textarea").first.fill(REVIEW)
            page.get_by_role("button", name="Classify").click()
            print(page.locator(".jupyter-widgets.widget-html", has_text="margin").inner_text(timeout=60_000))
            for name, selector in PICTURES.items():
                page.locator(".jp-OutputArea-output", has=page.locator(selector)).first.scroll_into_view_if_needed()
                page.wait_for_timeout(500)
                page.screenshot(path=arguments.folder / f"{name}.png")
        finally:
            browser.close()
            lab.terminate()
            lab.wait()


if __name__ == "__main__":
    main()
