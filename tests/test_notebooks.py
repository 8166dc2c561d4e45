"""The real notebooks, through papermill and a real kernel, on the tiny model: the demo from end to end."""

import json
from pathlib import Path

import nbformat
import pytest

from elmlib.demo import demo_stages, report, run_stages

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"

# Kernel and papermill: their own clean-up and deprecations, none of them elmlib's.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from conftest import sentences

    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": t, "summary": s}) + "\n" for t, s in sentences(120, 2)))
    return path


def test_the_demo_runs_reuses_and_goes_on(
    texts: Path, tiny_llm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "demo"
    small = {"llm_model": str(tiny_llm), "batch_size": 8, "hidden_dim": 32, "eval_samples": 8, "eval_interval": 6}
    stages = demo_stages(folder, limit=0, epochs=1, extra=small)
    stages[0].parameters["source"] = str(texts)
    run_stages(stages, folder, NOTEBOOKS)
    printed = report(folder)
    assert "BERTScore F1" in printed and "shuffled" in printed and str(folder / "curves.png") in printed
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((folder / "result.json").read_text())
    assert {
        "val_nll", "val_nll_shuffled", "bertscore_f1", "bertscore_f1_shuffled", "bertscore_composite",
        "drift_similarity", "drift_similarity_shuffled", "train_seconds", "num_parameters_trained",
    } <= result.keys()  # fmt: skip
    executed = nbformat.read(folder / "02_train.ipynb", as_version=4)
    assert any(cell.get("outputs") for cell in executed.cells)

    capsys.readouterr()
    written = (folder / "result.json").stat().st_mtime_ns
    run_stages(stages, folder, NOTEBOOKS)
    assert capsys.readouterr().out.count("finished and unchanged") == 3
    assert (folder / "result.json").stat().st_mtime_ns == written

    (folder / "result.json").unlink()  # as if it had been stopped before the end
    run_stages(stages, folder, NOTEBOOKS)
    assert "02_train: running on from where it stopped" in capsys.readouterr().out
    again = json.loads((folder / "result.json").read_text())
    assert again["val_nll"] == result["val_nll"]
