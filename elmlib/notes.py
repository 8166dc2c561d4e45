"""What the dashboard shows of a trial: a note in Markdown, its curves, its summaries, its notebook."""

from pathlib import Path

import optuna
from optuna.artifacts import FileSystemArtifactStore, upload_artifact
from optuna_dashboard import save_note

from elmlib.records import atomic_path
from elmlib.tables import read_predictions
from elmlib.trial import Outcome

_SAMPLES = 20
_COLUMNS = ("source_id", "target_text", "prediction", "bertscore_f1", "rank")
_FIGURES = (
    ("bertscore_composite", "BERTScore composite"),
    ("bertscore_f1", "BERTScore F1"),
    ("val_nll", "NLL (nats per token)"),
    ("drift_similarity", "drift similarity"),
)


def publish(trial: optuna.Trial, folder: Path, outcome: Outcome, artifacts: Path) -> None:
    """Upload what the trial left in `folder` into the store `artifacts`, and write its note."""
    samples = write_samples(folder)
    notebooks = sorted(folder.glob("*.ipynb"))
    shown = [path for path in (folder / "curves.png", samples, *notebooks) if path and path.is_file()]
    artifacts.mkdir(parents=True, exist_ok=True)
    store = FileSystemArtifactStore(artifacts)
    links = {
        path.name: f"/artifacts/{trial.study._study_id}/{trial._trial_id}/"
        + upload_artifact(artifact_store=store, file_path=str(path), study_or_trial=trial)
        for path in shown
    }
    save_note(trial, note(folder, outcome, trial.user_attrs.get("origin", ""), links))


def write_samples(folder: Path) -> Path | None:
    """The first summaries of a trial's best evaluation as `samples.csv`; None where there is no evaluation."""
    import pandas

    predictions = folder / "predictions.jsonl"
    if not predictions.is_file():
        return None
    lines = read_predictions(predictions, *_COLUMNS)[:_SAMPLES]
    with atomic_path(folder / "samples.csv") as temporary:
        pandas.DataFrame(lines, columns=list(_COLUMNS)).to_csv(temporary, index=False)
    return folder / "samples.csv"


def note(folder: Path, outcome: Outcome, origin: str, links: dict[str, str]) -> str:
    """How the trial ended, its figures beside their controls, and where its files are, in Markdown."""
    parts = [f"**{outcome.kind}**" + (f": {outcome.reason}" if outcome.reason else "")]
    if origin:
        parts.append(f"Settings: {origin}.")
    rows = [
        f"| {label} | {outcome.metrics[name]:.3f} | {outcome.metrics[f'{name}_shuffled']:.3f} |"
        for name, label in _FIGURES
        if name in outcome.metrics
    ]
    if rows:
        parts.append("\n".join(["| best evaluation | true | shuffled |", "|---|---:|---:|", *rows]))
    if outcome.details:
        parts.append(f"```\n{outcome.details}\n```")
    parts.append("\n".join([*(f"- [{name}]({link})" for name, link in links.items()), f"- folder: `{folder}`"]))
    return "\n\n".join(parts)
