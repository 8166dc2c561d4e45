"""What a study leaves: all trials as a table, the best one's settings, a summary."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import TrialState

from elmlib.config import SummaryTrainingConfig
from elmlib.records import atomic_path, write_json
from elmlib.study_commands import StudyConfig
from elmlib.tally import HALTED, outcome_of, tally

if TYPE_CHECKING:
    import pandas


def trials_frame(study: optuna.Study) -> "pandas.DataFrame":
    """One row a trial, every attempt: number, state, outcome, value, steps reported, seconds, then its settings
    (`params_...`) and what its worker noted (figures beside their controls, the reason where it was not complete)."""
    import pandas

    rows = []
    for trial in study.get_trials(deepcopy=False):
        ended = trial.duration.total_seconds() if trial.duration else None
        row: dict[str, Any] = {
            "number": trial.number,
            "state": trial.state.name,
            "outcome": outcome_of(trial),
            "value": trial.value if trial.values else None,
            "reports": len(trial.intermediate_values),
            "seconds": ended,
        }
        row |= {f"params_{name}": value for name, value in trial.params.items()}
        rows.append(row | trial.user_attrs)
    return pandas.DataFrame(rows)


def best_settings(study: optuna.Study) -> SummaryTrainingConfig | None:
    """The settings of the best complete trial, ready for `elm train --config`; None where none is complete."""
    trial = best_trial(study)
    if trial is None:
        return None
    settings = SummaryTrainingConfig.from_json(Path(trial.user_attrs["folder"]) / "settings.json")
    plain = SummaryTrainingConfig()
    return replace(
        settings,
        checkpoint_dir=plain.checkpoint_dir,
        resume_from="",
        use_wandb=False,
        wandb_run_name="",
        wandb_group="",
    )


def best_trial(study: optuna.Study) -> optuna.trial.FrozenTrial | None:
    """The best complete trial; None where none is complete."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return max(complete, key=_value, default=None)


def _value(complete: optuna.trial.FrozenTrial) -> float:
    assert complete.value is not None, complete
    return complete.value


def default_trial(study: optuna.Study) -> optuna.trial.FrozenTrial | None:
    """The trial of the default settings; None where it is not complete or was never asked for."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return next((trial for trial in complete if trial.user_attrs.get("origin", "").startswith("defaults")), None)


def write_results(study: optuna.Study, config: StudyConfig) -> Path:
    """Write `<study>_results.json`, `<study>_best_config.json` and `<study>_trials.csv`; returns the first."""
    folder = config.results_dir or config.folder
    folder.mkdir(parents=True, exist_ok=True)
    now, best = tally(study, config.max_retries), best_trial(study)
    summary: dict[str, Any] = {
        "study": study.study_name,
        "trials": now._asdict() | {"finished": now.finished, "asked": config.trials},
        "halted": study.user_attrs.get(HALTED, ""),
        "best": None,
    }
    if best is not None:
        kept = ("bertscore_composite", "bertscore_f1", "drift_similarity", "val_nll")
        figures = {f"{name}{end}": best.user_attrs[f"{name}{end}"] for name in kept for end in ("", "_shuffled")}
        summary["best"] = {"number": best.number, "value": best.value, "params": best.params, "figures": figures}
        summary["best"]["folder"] = best.user_attrs["folder"]
        summary["importance"] = importance(study)
        settings = best_settings(study)
        assert settings
        with atomic_path(folder / f"{study.study_name}_best_config.json") as temporary:
            temporary.write_text(settings.to_json(), encoding="utf-8")
    with atomic_path(folder / f"{study.study_name}_trials.csv") as temporary:
        trials_frame(study).to_csv(temporary, index=False)
    path = folder / f"{study.study_name}_results.json"
    write_json(path, json.loads(json.dumps(summary)))
    return path


def importance(study: optuna.Study, least: int = 4) -> dict[str, float]:
    """Share of each parameter in the variance of the objective (fANOVA, Hutter et al., 2014); empty below `least`
    complete trials, or where all scored alike."""
    values = {trial.value for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))}
    if len(values) < least:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def results_table(study: optuna.Study, config: StudyConfig) -> str:
    """For a person: how the trials ended, the best five with their controls, and the importance of the settings."""
    now = tally(study, config.max_retries)
    lines = [
        f"{now.finished} of {config.trials} trials finished: {now.complete} complete, {now.pruned} pruned, "
        f"{now.failed} failed"
    ]
    if reason := study.user_attrs.get(HALTED):
        lines.append(f"halted: {reason}")
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    complete = sorted(complete, key=lambda trial: -_value(trial))[:5]
    if complete:
        lines += ["", f"{'trial':>5}{'objective':>11}{'F1':>8}{'shuffled':>10}{'NLL':>8}{'shuffled':>10}  settings"]
    for trial in complete:
        it = trial.user_attrs
        settings = ", ".join(f"{name} {_short(value)}" for name, value in trial.params.items())
        lines.append(
            f"{trial.number:>5}{trial.value:>11.4f}{it['bertscore_f1']:>8.3f}{it['bertscore_f1_shuffled']:>10.3f}"
            f"{it['val_nll']:>8.3f}{it['val_nll_shuffled']:>10.3f}  {settings}"
        )
    if found := importance(study):
        lines += ["", "importance: " + ", ".join(f"{name} {share:.2f}" for name, share in found.items())]
    return "\n".join(lines)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
