"""The notebooks in a real JupyterLab and browser: all cells run, a slider changes the summary, a click stops a run."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from conftest import sentences
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from playwright.sync_api import Page, expect, sync_playwright

ROOT = Path(__file__).parent.parent
PICTURES = ROOT / "papermill_runs" / "browser"
CHROMIUM = shutil.which("chromium")
MINUTE = 60_000  # milliseconds, as Playwright counts

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM, reason="needs chromium (Debian: apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, tiny_llm: Path, trained_run: Path, small_data: Path) -> Path:
    """A folder of all notebooks at smoke size: a tiny LLM, each reading what the one before wrote."""
    place = tmp_path_factory.mktemp("workplace")
    texts = [json.dumps({"text": text, "summary": summary}) + "\n" for text, summary in sentences(120, 2)]
    (place / "texts.jsonl").write_text("".join(texts))
    (place / "space.yaml").write_text(
        f"learning_rate: {{low: 1.0e-4, high: 1.0e-2, log: true}}\nllm_model_name: {tiny_llm}\nhidden_dim: 32\n"
    )
    (place / "trials.yaml").write_text("batch_size: 8\nmax_new_tokens: 8\nuse_bf16: false\n")
    parameters: dict[str, dict[str, Any]] = {
        "00_build_corpus": {
            "source": "texts.jsonl", "output_dir": "synthesis", "output_embeddings_dir": "embeddings", "limit": 0,
            "val_fraction": 0.2, "test_fraction": 0.1,
        },
        "01_filter_summaries": {
            "input_dir": "synthesis", "input_embeddings_dir": "embeddings", "output_dir": "filtered/synthesis",
            "output_embeddings_dir": "filtered/embeddings",
        },
        "02_train": {
            "data_dir": "filtered", "checkpoint_dir": "run", "llm_model_name": str(tiny_llm), "hidden_dim": 32,
            "batch_size": 8, "eval_nll_samples": 16, "eval_samples": 8, "max_new_tokens": 8, "use_bf16": False,
            "max_epochs": 400, "early_stopping_patience": 400,
        },
        "03_study": {
            "study_name": "study", "data_dir": "filtered", "checkpoint_dir": ".", "space": "space.yaml", "trials": 1,
            "training_config": "trials.yaml", "eval_samples": 8, "evals_per_epoch": 1,
        },
        "04_analysis": {"run_dir": "run", "data_dir": "filtered", "samples": 8, "candidates": 0},
        "05_ask": {"checkpoint": str(trained_run), "data_dir": str(small_data)},
    }  # fmt: skip
    for source in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = parameterize_notebook(load_notebook_node(str(source)), parameters[source.stem])
        nbformat.write(notebook, place / source.name)
    return place


@pytest.fixture(scope="module")
def lab(workplace: Path) -> Iterator[str]:
    """The address of a JupyterLab that serves that folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # All cells in the page, not those alone that a person would see; and no questions about news.
    for name, values in (
        ("notebook-extension/tracker", {"windowingMode": "none"}),
        ("apputils-extension/notification", {"fetchNews": "false", "checkForUpdates": False}),
    ):
        settings = workplace / ".lab" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        settings.parent.mkdir(parents=True)
        settings.write_text(json.dumps(values))
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}", "--ip=127.0.0.1",
               "--IdentityProvider.token=", "--expose-app-in-browser",
               f"--ServerApp.root_dir={workplace}"]  # fmt: skip
    environment = os.environ | {"JUPYTERLAB_SETTINGS_DIR": str(workplace / ".lab"), "PYTHONPATH": str(ROOT)}
    with open(workplace / "lab.log", "wb") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        address, give_up = f"http://127.0.0.1:{port}", time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"{address}/api/status", timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError):
                assert time.monotonic() < give_up and server.poll() is None, (workplace / "lab.log").read_text()
                time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture
def page(lab: str) -> Iterator[Page]:
    PICTURES.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1300, "height": 1700})
        page.set_default_timeout(4 * MINUTE)
        yield page
        browser.close()


def open_notebook(page: Page, lab: str, name: str) -> None:
    """Open a notebook in the lab, and wait for its kernel."""
    page.goto(f"{lab}/lab/tree/{name}.ipynb?reset")
    page.wait_for_function(
        """name => {
            const panel = window.jupyterapp?.shell.currentWidget;
            const kernel = panel?.sessionContext?.session?.kernel;
            return panel?.context?.path === name && panel.context.isReady
                && kernel?.connectionStatus === 'connected' && kernel.status === 'idle';
        }""",
        arg=f"{name}.ipynb",
    )


def start_all(page: Page) -> None:
    """Run all cells, as the menu's entry does, without waiting for them."""
    page.evaluate(
        "window.ran = null; jupyterapp.commands.execute('notebook:run-all-cells').then(ran => {window.ran = ran}); null"
    )


def wait_for_all(page: Page, name: str) -> list[dict[str, Any]]:
    """The cells, when all have run; none has failed, and a picture of the page is kept."""
    page.wait_for_function("window.ran !== null", timeout=6 * MINUTE)
    cells = page.evaluate("jupyterapp.shell.currentWidget.content.model.toJSON().cells")
    page.screenshot(path=PICTURES / f"{name}.png")
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    errors = [output for cell in code for output in cell["outputs"] if output["output_type"] == "error"]
    assert not errors, errors
    missed = ["".join(cell["source"]) for cell in code if not cell["execution_count"]]
    assert not missed, f"{name}: {len(missed)} of {len(code)} cells did not run, first {missed[0]}"
    return code


@pytest.mark.parametrize("name", ["00_build_corpus", "01_filter_summaries"])
def test_data_notebooks_run_all_cells(name: str, page: Page, lab: str) -> None:
    open_notebook(page, lab, name)
    start_all(page)
    wait_for_all(page, name)


def test_train_shows_growing_curves_and_saves_when_interrupted(page: Page, lab: str, workplace: Path) -> None:
    open_notebook(page, lab, "02_train")
    start_all(page)
    picture = page.locator(".jp-OutputArea .jp-RenderedImage img").first
    picture.wait_for()
    first = picture.get_attribute("src")
    expect(picture).not_to_have_attribute("src", str(first), timeout=2 * MINUTE)  # the curves grow
    page.locator('[data-jp-item-name="interrupt"]:visible').click()  # the stop button of the toolbar
    wait_for_all(page, "02_train")
    result = json.loads((workplace / "run" / "result.json").read_text())
    assert result["stopped"] == "interrupted" and 0 < result["steps"] < 400 * 9
    assert (workplace / "run" / f"adapter_step_{result['steps']}.safetensors").is_file()


@pytest.mark.parametrize("name", ["03_study", "04_analysis"])
def test_study_and_analysis_run_all_cells(name: str, page: Page, lab: str) -> None:
    open_notebook(page, lab, name)
    start_all(page)
    wait_for_all(page, name)


def test_a_slider_changes_the_summary_and_a_typed_text_gets_one(page: Page, lab: str) -> None:
    open_notebook(page, lab, "05_ask")
    start_all(page)
    wait_for_all(page, "05_ask")
    cell = page.locator(".jp-CodeCell", has_text="explorer.card(between")
    card, handle = cell.locator(".elm-card"), cell.locator(".noUi-handle")
    before = card.inner_text()
    handle.press("End")  # all of text B
    expect(card).not_to_have_text(before, timeout=MINUTE)
    expect(card).to_contain_text("summary")
    typed = page.locator(".jp-CodeCell", has_text="a text of your own")
    typed.locator("textarea").fill("The engine counts the old letter.")
    typed.get_by_role("button", name="Summarise").click()
    expect(typed.locator(".elm-card")).to_contain_text("The engine counts the old letter.")
    cell.scroll_into_view_if_needed()
    page.screenshot(path=PICTURES / "05_ask_moved.png")
