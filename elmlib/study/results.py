"""How far a study is, and its results: frames, files, and each trial's note for the dashboard."""

import os
import re
from collections import Counter
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import make_url

from elmlib.config import DashboardConfig, InputError, StudyConfig, StudyPlace, SummaryTrainingConfig
from elmlib.data.records import atomic_path, write_json
from elmlib.study.search_space import DEFAULTS
from elmlib.study.trial import STORAGE_VARIABLE, Outcome, open_storage

if TYPE_CHECKING:
    import pandas

HALTED = "halted"  # attribute of a study: why all of its launchers are to stop

_SAME_FAILURES = 3  # failures of one kind that stop a study
_VARYING = re.compile(r"(~|\.{0,2})/[^\s'\":,]+|\d+(\.\d+)?(e[+-]?\d+)?")  # paths and numbers
_FIGURES = {
    "bertscore_composite": "BERTScore composite",
    "bertscore_f1": "BERTScore F1",
    "val_nll": "NLL (nats per token)",
    "drift_similarity": "drift similarity",
}


def tally(trials: list[FrozenTrial], max_retries: int) -> dict[str, int]:
    """Count all trials, one with several attempts once; `to_retry` are not in the queue again, `finished` never are."""
    states = Counter("TO_RETRY" if is_retried(each, max_retries) else each.state.name for each in last_attempts(trials))
    counts = {name: states[name.upper()] for name in ("complete", "pruned", "running", "waiting", "to_retry")}
    counts["failed"] = states["FAIL"]
    return counts | {"finished": counts["complete"] + counts["pruned"] + counts["failed"]}


def last_attempts(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """The trials that no later attempt repeats."""
    repeated = {number for trial in trials for number in trial.system_attrs.get("retry_history", ())}
    return [trial for trial in trials if trial.number not in repeated]


def outcome_of(trial: FrozenTrial) -> str:
    """How a trial ended, as its launcher noted it; `killed` where the launcher itself ended."""
    if trial.state != TrialState.FAIL:
        return trial.state.name.lower()
    noted = trial.user_attrs.get("outcome", "killed")
    return "killed" if noted in ("complete", "pruned") else noted  # its launcher ended before it told Optuna


def is_retried(trial: FrozenTrial, max_retries: int) -> bool:
    """Whether a trial is to be run again with its parameters: it did not fail by itself."""
    has_retries = len(trial.system_attrs.get("retry_history", ())) < max_retries
    return outcome_of(trial) in ("timed out", "interrupted") or (outcome_of(trial) == "killed" and has_retries)


def common_failure(trials: list[FrozenTrial], since: datetime) -> str:
    """The reason for which three trials begun after `since` failed alike; empty while they have not."""
    failed = [trial for trial in trials if outcome_of(trial) == "failed" and (trial.datetime_start or since) >= since]
    kinds: dict[str, list[str]] = {}
    for reason in [trial.user_attrs["reason"] for trial in failed]:
        kinds.setdefault(_VARYING.sub("#", reason), []).append(reason)
    return next((f"{len(k)} trials failed alike: {k[-1]}" for k in kinds.values() if len(k) >= _SAME_FAILURES), "")


def best_trial(study: optuna.Study) -> FrozenTrial | None:
    """The best complete trial; None if none is complete."""
    return max(_complete(study), key=lambda trial: trial.value or 0.0, default=None)


def default_trial(study: optuna.Study) -> FrozenTrial | None:
    """The trial of the default settings; None if it is not complete or is not part of the study."""
    return next((trial for trial in _complete(study) if trial.user_attrs.get("origin", "").startswith(DEFAULTS)), None)


def _complete(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def trials_frame(study: optuna.Study) -> "pandas.DataFrame":
    """One row an attempt: outcome, value, settings (`params_...`), and attributes such as metrics and the reason."""
    import pandas

    rows = []
    for trial in study.get_trials(deepcopy=False):
        row = {"number": trial.number, "state": trial.state.name, "outcome": outcome_of(trial), "value": trial.value}
        row |= {"reports": len(trial.intermediate_values), "seconds": trial.duration and trial.duration.total_seconds()}
        rows.append(row | {f"params_{name}": value for name, value in trial.params.items()} | trial.user_attrs)
    return pandas.DataFrame(rows)


def results_frame(study: optuna.Study, count: int = 5) -> "pandas.DataFrame":
    """The `count` best complete trials: objective, F1 and NLL beside their controls, settings; or `variants_frame`."""
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
    defaults = cells[cells.variant == DEFAULTS].set_index("seed").f1
    cells["difference"] = (cells.f1 - cells.seed.map(defaults)).where(cells.variant != DEFAULTS)
    groups = cells.groupby("variant", sort=False)
    frame = groups.agg(seeds=("seed", "size"), steps=("steps", "mean"))
    for name in ("f1", "f1_gap", "nll_gap", "top_1", "mrr", "drift_similarity"):
        frame[name], frame[f"{name}_deviation"] = groups[name].mean(), groups[name].std()
    frame["difference"], frame["pairs"] = groups.difference.mean(), groups.difference.count()
    return frame.assign(defaults_better=groups.difference.agg(lambda values: int((values < 0).sum())))


def cells_frame(study: optuna.Study) -> "pandas.DataFrame":
    """One row a complete trial of a grid: variant, seed, steps and the figures of `variants_frame`."""
    import pandas

    cells = pandas.DataFrame([trial.user_attrs for trial in _complete(study) if "variant" in trial.user_attrs])
    if cells.empty:
        raise InputError(f"study {study.study_name!r} has no complete trial of a grid; `elm study --grid` runs one")
    names = {"bertscore_f1": "f1", "identification_top_1": "top_1", "identification_mrr": "mrr"}
    cells = cells.rename(columns=names)
    cells["f1_gap"] = cells.f1 - cells.bertscore_f1_shuffled
    cells["nll_gap"] = cells.val_nll_shuffled - cells.val_nll
    columns = ["variant", "seed", "steps", "f1", "f1_gap", "nll_gap", "top_1", "mrr", "drift_similarity"]
    return cells.reindex(columns=columns)


def importance(study: optuna.Study) -> dict[str, float]:
    """Share of each parameter in the objective's variance (fANOVA, Hutter et al., 2014); empty below four values."""
    trials = _complete(study)
    if len({trial.value for trial in trials}) < 4 or not any(trial.params for trial in trials):
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return optuna.importance.get_param_importances(study, evaluator=evaluator)


def write_results(study: optuna.Study, config: StudyConfig, target: int) -> None:
    """Write `<study>_results.json`, `<study>_best_config.json` (for `elm train --config`) and `<study>_trials.csv`."""
    folder, name = config.results_dir or config.folder, study.study_name
    counts = tally(study.get_trials(deepcopy=False), config.max_retries)
    summary: dict[str, Any] = {"study": name, "trials": counts | {"asked": target}}
    summary |= {"halted": study.user_attrs.get(HALTED, ""), "best": None}
    if best := best_trial(study):
        figures = {n: best.user_attrs[n] for name in _FIGURES for n in (name, f"{name}_shuffled")}
        summary["best"] = {"number": best.number, "value": best.value, "params": best.params, "figures": figures}
        summary["best"]["folder"] = best.user_attrs["folder"]
        summary["importance"] = importance(study)
        settings = SummaryTrainingConfig.from_json(Path(best.user_attrs["folder"], "settings.json"))
        plain = SummaryTrainingConfig()
        own = ("checkpoint_dir", "resume_from", "use_wandb", "wandb_run_name", "wandb_group")
        settings = replace(settings, **{name: getattr(plain, name) for name in own})
        with atomic_path(folder / f"{name}_best_config.json") as temporary:
            temporary.write_text(settings.to_json(), encoding="utf-8")
    with atomic_path(folder / f"{name}_trials.csv") as temporary:
        trials_frame(study).to_csv(temporary, index=False)
    write_json(folder / f"{name}_results.json", summary)


def publish(trial: optuna.Trial, folder: Path, outcome: Outcome, artifacts: Path) -> None:
    """Upload a running trial's curves, first summaries and notebook to the store `artifacts`, and write its note."""
    import pandas
    from optuna.artifacts import FileSystemArtifactStore, upload_artifact
    from optuna_dashboard import save_note

    if (predictions := folder / "predictions.jsonl").is_file():
        columns = ["source_id", "target_text", "prediction", "bertscore_f1", "rank"]
        samples = pandas.read_json(predictions, lines=True, nrows=20).reindex(columns=columns)
        samples.to_csv(folder / "samples.csv", index=False)
    parts = [f"**{outcome.kind}**" + (f": {outcome.reason}" if outcome.reason else "")]
    if origin := trial.user_attrs.get("origin"):
        parts.append(f"Settings: {origin}.")
    if outcome.metrics:
        values = outcome.metrics
        rows = [f"| {_FIGURES[n]} | {values[n]:.3f} | {values[f'{n}_shuffled']:.3f} |" for n in _FIGURES if n in values]
        parts.append("\n".join(["| best evaluation | true | shuffled |", "|---|---:|---:|", *rows]))
    if outcome.details:
        parts.append(f"```\n{outcome.details}\n```")
    artifacts.mkdir(parents=True, exist_ok=True)
    store, files = FileSystemArtifactStore(artifacts), [f"- folder: `{folder}`"]
    for path in filter(Path.is_file, [folder / "curves.png", folder / "samples.csv", *sorted(folder.glob("*.ipynb"))]):
        artifact = upload_artifact(artifact_store=store, file_path=str(path), study_or_trial=trial)
        files.append(f"- [{path.name}](/artifacts/{trial.study._study_id}/{trial._trial_id}/{artifact})")
    save_note(trial, "\n\n".join([*parts, "\n".join(files)]))


def storage_address(config: StudyPlace) -> str:
    """The study's storage: `config.storage`, else the environment's, else a SQLite file in its folder."""
    address = config.storage or os.environ.get(STORAGE_VARIABLE) or f"sqlite:///{config.folder}/study.db"
    return address.replace("sqlite:///~/", f"sqlite:///{Path.home()}/")


def open_study(config: StudyPlace) -> optuna.Study:
    """A study that exists; raises InputError if there is none of that name."""
    address = storage_address(config)
    path = address.removeprefix("sqlite:///")
    if path != address and not Path(path).is_file():
        raise InputError(f"no study {path}; `elm study` makes it, or name another one with --storage")
    storage = open_storage(address)
    try:
        return optuna.load_study(study_name=config.study_name, storage=storage)
    except KeyError as error:
        names = ", ".join(optuna.get_all_study_names(storage)) or "none"
        raise InputError(f"no study {config.study_name!r} in {make_url(address)!r}; there are: {names}") from error


def serve_dashboard(config: DashboardConfig) -> None:
    """Run optuna-dashboard on 127.0.0.1 until it is interrupted: it has delete buttons and no login."""
    import optuna_dashboard
    from optuna.artifacts import FileSystemArtifactStore

    open_study(config)
    storage, artifacts = open_storage(storage_address(config)), config.folder / "artifacts"
    artifacts.mkdir(parents=True, exist_ok=True)
    optuna_dashboard.run_server(storage, "127.0.0.1", config.port, FileSystemArtifactStore(artifacts))
