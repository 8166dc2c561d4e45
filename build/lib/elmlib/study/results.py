"""How far a study is, and its results: frames, files, and each trial's note for the dashboard."""

import json
import os
import re
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import optuna
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import make_url
from tqdm.auto import tqdm

from elmlib.config import DashboardConfig, StudyConfig, StudyPlace, SummaryTrainingConfig
from elmlib.data.records import atomic_path, write_json
from elmlib.study.search_space import DEFAULTS
from elmlib.study.trial import STORAGE_VARIABLE, Outcome, open_storage, patiently

if TYPE_CHECKING:
    import pandas

SAME_FAILURES = 3
"""Failures of one kind that stop a study."""
HALTED = "halted"
"""Attribute of a study: why all of its launchers are to stop."""

_VARYING = re.compile(r"(~|\.{0,2})/[^\s'\":,]+|\d+(\.\d+)?(e[+-]?\d+)?")
_FIGURES = {
    "bertscore_composite": "BERTScore composite",
    "bertscore_f1": "BERTScore F1",
    "val_nll": "NLL (nats per token)",
    "drift_similarity": "drift similarity",
}
_SAMPLES = ["source_id", "target_text", "prediction", "bertscore_f1", "rank"]


class Tally(NamedTuple):
    """A study's trials; a trial with several attempts counts once, as its last one."""

    complete: int
    pruned: int
    failed: int
    running: int
    waiting: int
    to_retry: int
    """Cut short, and not yet in the queue again."""
    begun: int
    """Attempts that have begun."""

    @property
    def finished(self) -> int:
        """Trials that have ended for good."""
        return self.complete + self.pruned + self.failed


def tally(trials: list[FrozenTrial], max_retries: int) -> Tally:
    """Count `trials`, all of a study; `max_retries` attempts follow one that was killed."""
    last = last_attempts(trials)
    states = [trial.state for trial in last]
    to_retry = sum(is_retried(trial, max_retries) for trial in last)
    return Tally(
        complete=states.count(TrialState.COMPLETE),
        pruned=states.count(TrialState.PRUNED),
        failed=states.count(TrialState.FAIL) - to_retry,
        running=states.count(TrialState.RUNNING),
        waiting=states.count(TrialState.WAITING),
        to_retry=to_retry,
        begun=sum(trial.state != TrialState.WAITING for trial in trials),
    )


def last_attempts(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """The trials that no later attempt repeats."""
    repeated = {number for trial in trials for number in trial.system_attrs.get("retry_history", ())}
    return [trial for trial in trials if trial.number not in repeated]


def outcome_of(trial: FrozenTrial) -> str:
    """How a trial ended, as its launcher noted it; `killed` where the launcher itself ended."""
    return trial.user_attrs.get("outcome", "killed") if trial.state == TrialState.FAIL else trial.state.name.lower()


def is_retried(trial: FrozenTrial, max_retries: int) -> bool:
    """Whether a trial is to be run again with its parameters: it did not fail by itself."""
    if trial.state != TrialState.FAIL:
        return False
    attempts = len(trial.system_attrs.get("retry_history", ()))
    return outcome_of(trial) in ("timed out", "interrupted") or (
        outcome_of(trial) == "killed" and attempts < max_retries
    )


def common_failure(trials: list[FrozenTrial], since: datetime) -> str:
    """The reason for which `SAME_FAILURES` trials begun after `since` failed alike; empty while they have not."""
    failed = [t for t in trials if t.user_attrs.get("outcome") == "failed" and (t.datetime_start or since) >= since]
    # Without numbers and paths, which differ from trial to trial.
    kinds = {_VARYING.sub("#", trial.user_attrs["reason"]): trial.user_attrs["reason"] for trial in failed}
    for kind, last in kinds.items():
        count = sum(_VARYING.sub("#", trial.user_attrs["reason"]) == kind for trial in failed)
        if count >= SAME_FAILURES:
            return f"{count} trials failed alike: {last}"
    return ""


def best_trial(study: optuna.Study) -> FrozenTrial | None:
    """The best complete trial; None if none is complete."""
    return max(_complete(study), key=lambda trial: trial.value or 0.0, default=None)


def default_trial(study: optuna.Study) -> FrozenTrial | None:
    """The trial of the default settings; None if it is not complete or is not part of the study."""
    return next((trial for trial in _complete(study) if trial.user_attrs.get("origin", "").startswith(DEFAULTS)), None)


def _complete(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def trials_frame(study: optuna.Study) -> "pandas.DataFrame":
    """One row a trial, every attempt: number, state, outcome, value, reports, seconds, its settings (`params_...`), and
    its attributes (metrics beside their shuffled controls, the reason if it was not complete)."""
    import pandas

    rows = []
    for trial in study.get_trials(deepcopy=False):
        row: dict[str, Any] = {
            "number": trial.number,
            "state": trial.state.name,
            "outcome": outcome_of(trial),
            "value": trial.value if trial.values else None,
            "reports": len(trial.intermediate_values),
            "seconds": trial.duration.total_seconds() if trial.duration else None,
        }
        rows.append(row | {f"params_{name}": value for name, value in trial.params.items()} | trial.user_attrs)
    return pandas.DataFrame(rows)


def results_frame(study: optuna.Study, count: int = 5) -> "pandas.DataFrame":
    """The `count` best complete trials by number: objective, F1 and NLL beside their shuffled controls, settings. For
    a grid: `variants_frame`."""
    import pandas

    ranked = sorted(_complete(study), key=lambda trial: -(trial.value or 0.0))
    if any("variant" in trial.user_attrs for trial in ranked):
        return variants_frame(study)
    figures = [f"{name}{end}" for name in ("bertscore_f1", "val_nll") for end in ("", "_shuffled")]
    rows = [
        {"trial": trial.number, "objective": trial.value} | {n: trial.user_attrs[n] for n in figures} | trial.params
        for trial in ranked[:count]
    ]
    return pandas.DataFrame(rows, columns=None if rows else ["trial"]).set_index("trial").round(4)


def variants_frame(study: optuna.Study) -> "pandas.DataFrame":
    """One row a variant of a grid, over its complete seeds: mean and sample standard deviation (`..._deviation`) of
    F1, F1 gap, NLL gap, top-1, MRR and drift similarity; `difference` is the mean F1 difference to the defaults at
    the same seed, `pairs` those seeds, `defaults_better` the number of them at which the defaults have a higher F1."""
    cells = cells_frame(study)
    figures = ["f1", "f1_gap", "nll_gap", "top_1", "mrr", "drift_similarity"]
    defaults = cells[cells.variant == DEFAULTS].set_index("seed").f1
    cells["difference"] = (cells.f1 - cells.seed.map(defaults)).where(cells.variant != DEFAULTS)
    groups = cells.groupby("variant", sort=False)
    frame = groups.agg(seeds=("seed", "size"), steps=("steps", "mean"))
    for name in figures:
        frame[name], frame[f"{name}_deviation"] = groups[name].mean(), groups[name].std()
    frame["difference"], frame["pairs"] = groups.difference.mean(), groups.difference.count()
    frame["defaults_better"] = groups.difference.agg(lambda values: int((values < 0).sum()))
    return frame


def cells_frame(study: optuna.Study) -> "pandas.DataFrame":
    """One row a complete trial of a grid: variant, seed, steps and the figures of `variants_frame`."""
    import pandas

    rows = []
    for trial in _complete(study):
        values = trial.user_attrs
        if "variant" in values:
            row = {"variant": values["variant"], "seed": values["seed"], "steps": values.get("steps")}
            row |= {"f1": values["bertscore_f1"], "f1_gap": values["bertscore_f1"] - values["bertscore_f1_shuffled"]}
            row |= {"nll_gap": values["val_nll_shuffled"] - values["val_nll"]}
            row |= {"top_1": values.get("identification_top_1"), "mrr": values.get("identification_mrr")}
            rows.append(row | {"drift_similarity": values["drift_similarity"]})
    if not rows:
        raise ValueError(f"study {study.study_name!r} has no complete trial of a grid; `elm study --grid` runs one")
    return pandas.DataFrame(rows)


def importance(study: optuna.Study, least: int = 4) -> dict[str, float]:
    """Share of each parameter in the variance of the objective (fANOVA, Hutter et al., 2014); empty below `least`
    complete trials of different value, and for a grid."""
    trials = _complete(study)
    if len({trial.value for trial in trials}) < least or not any(trial.params for trial in trials):
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def best_settings(study: optuna.Study) -> SummaryTrainingConfig | None:
    """The settings of the best complete trial, for `elm train --config`; None if none is complete."""
    trial = best_trial(study)
    if trial is None:
        return None
    settings = SummaryTrainingConfig.from_json(Path(trial.user_attrs["folder"]) / "settings.json")
    folder = SummaryTrainingConfig().checkpoint_dir
    return replace(
        settings, checkpoint_dir=folder, resume_from="", use_wandb=False, wandb_run_name="", wandb_group=""
    )  # fmt: skip


def write_results(study: optuna.Study, config: StudyConfig, target: int) -> Path:
    """Write `<study>_results.json`, `<study>_best_config.json` and `<study>_trials.csv`; returns the first."""
    folder, name = config.results_dir or config.folder, study.study_name
    now, best = tally(study.get_trials(deepcopy=False), config.max_retries), best_trial(study)
    summary: dict[str, Any] = {
        "study": name,
        "trials": now._asdict() | {"finished": now.finished, "asked": target},
        "halted": study.user_attrs.get(HALTED, ""),
        "best": None,
    }
    if best is not None:
        figures = {
            f"{figure}{end}": best.user_attrs[f"{figure}{end}"] for figure in _FIGURES for end in ("", "_shuffled")
        }
        summary["best"] = {"number": best.number, "value": best.value, "params": best.params, "figures": figures}
        summary["best"]["folder"] = best.user_attrs["folder"]
        summary["importance"] = importance(study)
        with atomic_path(folder / f"{name}_best_config.json") as temporary:
            temporary.write_text(best_settings(study).to_json(), encoding="utf-8")  # type: ignore[union-attr]
    with atomic_path(folder / f"{name}_trials.csv") as temporary:
        trials_frame(study).to_csv(temporary, index=False)
    path = folder / f"{name}_results.json"
    write_json(path, json.loads(json.dumps(summary)))
    return path


def publish(trial: optuna.Trial, folder: Path, outcome: Outcome, artifacts: Path) -> None:
    """Upload a running trial's curves, first summaries and notebook to the store `artifacts`, and write its note."""
    import pandas
    from optuna.artifacts import FileSystemArtifactStore, upload_artifact
    from optuna_dashboard import save_note

    if (predictions := folder / "predictions.jsonl").is_file():
        samples = pandas.read_json(predictions, lines=True, nrows=20).reindex(columns=_SAMPLES)
        samples.to_csv(folder / "samples.csv", index=False)
    artifacts.mkdir(parents=True, exist_ok=True)
    store = FileSystemArtifactStore(artifacts)
    shown = [folder / "curves.png", folder / "samples.csv", *sorted(folder.glob("*.ipynb"))]
    links = {
        path.name: f"/artifacts/{trial.study._study_id}/{trial._trial_id}/"
        + upload_artifact(artifact_store=store, file_path=str(path), study_or_trial=trial)
        for path in shown
        if path.is_file()
    }
    save_note(trial, note(folder, outcome, trial.user_attrs.get("origin", ""), links))


def note(folder: Path, outcome: Outcome, origin: str, links: dict[str, str]) -> str:
    """How a trial ended, its metrics beside their shuffled controls, and its files, in Markdown."""
    parts = [f"**{outcome.kind}**" + (f": {outcome.reason}" if outcome.reason else "")]
    if origin:
        parts.append(f"Settings: {origin}.")
    rows = [
        f"| {label} | {outcome.metrics[name]:.3f} | {outcome.metrics[f'{name}_shuffled']:.3f} |"
        for name, label in _FIGURES.items()
        if name in outcome.metrics
    ]
    if rows:
        parts.append("\n".join(["| best evaluation | true | shuffled |", "|---|---:|---:|", *rows]))
    if outcome.details:
        parts.append(f"```\n{outcome.details}\n```")
    parts.append("\n".join([*(f"- [{name}]({link})" for name, link in links.items()), f"- folder: `{folder}`"]))
    return "\n\n".join(parts)


def storage_address(config: StudyPlace) -> str:
    """The study's storage: `config.storage`, else the environment's, else a SQLite file in its folder."""
    return config.storage or os.environ.get(STORAGE_VARIABLE) or f"sqlite:///{config.folder}/study.db"


def open_study(config: StudyPlace) -> optuna.Study:
    """A study that exists; raises FileNotFoundError or ValueError if there is none of that name."""
    address = storage_address(config)
    path = Path(address.removeprefix("sqlite:///"))
    if address.startswith("sqlite:///") and not path.is_file():
        raise FileNotFoundError(f"no study {path}; `elm study` makes it, or name another one with --storage")
    storage = open_storage(address)
    try:
        return optuna.load_study(study_name=config.study_name, storage=storage)
    except KeyError as error:
        names, shown = ", ".join(optuna.get_all_study_names(storage)) or "none", make_url(address)
        raise ValueError(f"no study {config.study_name!r} in {shown!r}; there are: {names}") from error


def serve_dashboard(config: DashboardConfig) -> None:
    """Run optuna-dashboard on 127.0.0.1 until it is interrupted: it has delete buttons and no login."""
    import optuna_dashboard
    from optuna.artifacts import FileSystemArtifactStore

    open_study(config)
    artifacts = config.folder / "artifacts"
    artifacts.mkdir(parents=True, exist_ok=True)
    optuna_dashboard.run_server(
        open_storage(storage_address(config)), host="127.0.0.1", port=config.port,
        artifact_store=FileSystemArtifactStore(artifacts),
    )  # fmt: skip


class Progress:
    """One line: finished trials, running, pruned and failed ones, the best so far; with wandb a run of the study."""

    def __init__(self, study: optuna.Study, config: StudyConfig, target: int):
        self._study, self._config = study, config
        self._finished = self._tally().finished
        # Without smoothing: the mean over all trials, where its default would count each look without a new one.
        self._bar = tqdm(total=target, initial=self._finished, desc=config.study_name, unit="trial", smoothing=0)
        self._run: Any = None
        if config.wandb:
            import wandb

            self._run = wandb.init(
                project=config.project, name=config.study_name, group=config.study_name, dir=str(config.folder)
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.update()
        self._bar.close()
        if self._run:
            self._run.finish()

    def update(self) -> Tally:
        """Read the study, show it and count its trials."""
        now, best = self._tally(), best_trial(self._study)
        best_text = f", best {best.value:.4f} (trial {best.number})" if best else ""
        self._bar.update(now.finished - self._bar.n)
        self._bar.set_postfix_str(f"{now.running} running, {now.pruned} pruned, {now.failed} failed{best_text}")
        if self._run and now.finished != self._finished:
            self._finished = now.finished
            values: dict[str, Any] = {f"study/{name}": getattr(now, name) for name in ("complete", "pruned", "failed")}
            values |= {"study/best_so_far": best.value} if best else {}
            self._run.log(values | {f"importance/{name}": share for name, share in importance(self._study).items()})
        return now

    def _tally(self) -> Tally:
        return tally(patiently(lambda: self._study.get_trials(deepcopy=False)), self._config.max_retries)
