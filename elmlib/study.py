"""A study: workers that share it, what a person sees of it while it runs, what is left when it ends."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage
from tqdm.auto import tqdm

from elmlib.results import best_trial, importance, results_table, write_results
from elmlib.search import begin
from elmlib.storage import STORAGE_VARIABLE, journal_path, open_storage, turn, without_password
from elmlib.study_commands import DashboardConfig, ReapConfig, StudyConfig, StudyPlace
from elmlib.tally import HALTED, Tally, reap, tally
from elmlib.worker import work

_LOOK = 1.0  # seconds between looks at the study


class WorkersFailedError(RuntimeError):
    """Workers ended by an error of their own; the message says where they wrote it down."""


def storage_address(config: StudyPlace) -> str:
    """Where the study lives: `config.storage`, else the environment's, else a journal file in its folder."""
    return config.storage or os.environ.get(STORAGE_VARIABLE) or str(config.folder / "journal.log")


def run_study(config: StudyConfig) -> optuna.Study:
    """Run trials until `config.trials` are finished, with `config.jobs` workers, and write the results.

    The first Ctrl-C lets running trials end, the second stops them, to be taken up when the study goes on. Raises
    ValueError as `begin` does and for a study that exists where `config.resume` is off, and WorkersFailedError.
    """
    address = storage_address(config)
    study, storage = begin(config, address)
    if not config.resume and any(trial.state.is_finished() for trial in study.get_trials(deepcopy=False)):
        raise ValueError(f"study {config.study_name!r} exists; leave --no-resume out, or use another --study-name")
    if study.user_attrs.get(HALTED):
        study.set_user_attr(HALTED, "")
    with turn(storage, config.folder):
        reap(study, storage, config.folder, config.max_retries)
    deadline = time.time() + 3600 * config.timeout if config.timeout else float("inf")
    workers = [start_worker(config, address, deadline, index) for index in range(config.jobs)]
    with _signals(workers), Progress(study, config) as progress:
        while any(worker.is_alive() for worker in workers):
            progress.update()
            time.sleep(_LOOK)
        progress.update()
    if broken := [worker for worker in workers if worker.exitcode not in (0, -signal.SIGTERM, -signal.SIGKILL)]:
        raise WorkersFailedError(f"{len(broken)} workers broke down; see {config.folder / 'workers'}/*.log")
    write_results(study, config)
    return study


def open_study(config: StudyPlace) -> tuple[optuna.Study, BaseStorage]:
    """A study that exists, and its storage; ValueError where there is none of that name."""
    address = storage_address(config)
    path = journal_path(address)
    if path and not path.is_file():
        raise FileNotFoundError(f"no study's journal {path}; `elm study` makes it, or name another with --storage")
    storage = open_storage(address)
    try:
        return optuna.load_study(study_name=config.study_name, storage=storage), storage
    except KeyError as error:
        names = ", ".join(optuna.get_all_study_names(storage)) or "none"
        raise ValueError(
            f"no study {config.study_name!r} in {without_password(address)}; there are: {names}"
        ) from error


def reap_study(config: ReapConfig) -> list[int]:
    """Fail the trials whose worker is gone and put them back into the queue; their numbers."""
    study, storage = open_study(config)
    config.folder.mkdir(parents=True, exist_ok=True)
    with turn(storage, config.folder):
        return reap(study, storage, config.folder, config.max_retries)


def serve_dashboard(config: DashboardConfig) -> None:
    """Run optuna-dashboard until it is interrupted, on 127.0.0.1 alone: it has delete buttons and no login."""
    import optuna_dashboard
    from optuna.artifacts import FileSystemArtifactStore

    _, storage = open_study(config)
    artifacts = config.folder / "artifacts"
    artifacts.mkdir(parents=True, exist_ok=True)
    optuna_dashboard.run_server(
        storage, host="127.0.0.1", port=config.port, artifact_store=FileSystemArtifactStore(artifacts)
    )


def submit_workers(config: StudyConfig) -> list[str]:
    """Begin the study and submit `config.jobs` workers as jobs of their own; the ids of the jobs.

    Raises ValueError for a storage that machines cannot share, and as `begin` does.
    """
    import submitit

    address = storage_address(config)
    if config.slurm_cluster == "slurm" and address.startswith("sqlite"):
        raise ValueError(
            "SQLite cannot be shared by machines; use --storage postgresql+psycopg://..., or a journal file on a file "
            "system that all of them see"
        )
    if path := journal_path(address):
        address = str(path.absolute())
    begin(config, address)
    # Not as an argument: submitit writes those to disk, and the address may hold a password.
    os.environ[STORAGE_VARIABLE] = address
    executor = submitit.AutoExecutor(folder=config.folder / "slurm", cluster=config.slurm_cluster)
    executor.update_parameters(
        name=config.study_name,
        timeout_min=max(1, round(60 * config.slurm_hours)),
        gpus_per_node=config.slurm_gpus if config.slurm_cluster == "slurm" else 0,
        slurm_partition=config.slurm_partition or None,
    )
    quiet = replace(config, storage="")
    jobs = [executor.submit(work, quiet) for _ in range(config.jobs)]
    return [job.job_id for job in jobs]


def start_worker(config: StudyConfig, address: str, deadline: float, index: int) -> BaseProcess:
    """A worker process with its share of the processors, or a GPU of its own where there are any."""
    log = config.folder / "workers" / f"{index}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_work, args=(config, address, deadline, log, _share(index, config.jobs)))
    process.start()
    return process


def _share(index: int, jobs: int) -> dict[str, str]:
    """Environment of worker `index` of `jobs`."""
    import torch

    if gpus := torch.cuda.device_count():
        return {"CUDA_VISIBLE_DEVICES": str(index % gpus)}
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))} if jobs > 1 else {}


def _work(config: StudyConfig, address: str, deadline: float, log: Path, environment: dict[str, str]) -> None:
    os.setsid()  # the terminal's Ctrl-C is for the study, which passes it on
    os.environ.update(environment)
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    work(config, address, deadline)


@contextmanager
def _signals(workers: Sequence[BaseProcess]) -> Iterator[None]:
    """The first Ctrl-C drains the workers, any further one stops their trials."""
    pressed = 0

    def pass_on(*_: object) -> None:
        nonlocal pressed
        pressed += 1
        told = "running trials end, no new ones begin; Ctrl-C again stops them" if pressed == 1 else "stopping trials"
        tqdm.write(f"interrupted: {told}", file=sys.stderr)
        for worker in workers:
            if worker.is_alive() and worker.pid:
                os.kill(worker.pid, signal.SIGINT if pressed == 1 else signal.SIGTERM)

    before = signal.signal(signal.SIGINT, pass_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Progress:
    """One line: finished trials of those asked for, how they ended, the best so far, the time left."""

    def __init__(self, study: optuna.Study, config: StudyConfig):
        self._study, self._config = study, config
        now = tally(study, config.max_retries)
        # Without smoothing: the mean over all trials, where its default would weigh in each look without a new one.
        self._bar = tqdm(total=config.trials, initial=now.finished, desc=config.study_name, unit="trial", smoothing=0)
        self._run: Any = None
        if config.wandb:
            import wandb

            self._run = wandb.init(
                project=config.project, name=config.study_name, group=config.study_name, dir=str(config.folder)
            )
        self._logged = now.finished

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self._run:
            self._run.finish()

    def update(self) -> None:
        """Look at the study, and show it."""
        now, best = tally(self._study, self._config.max_retries), best_trial(self._study)
        self._bar.update(now.finished - self._bar.n)
        self._bar.set_postfix_str(progress_line(now, best))
        if self._run and now.finished != self._logged:
            self._logged = now.finished
            self._log(now, best)

    def _log(self, now: Tally, best: optuna.trial.FrozenTrial | None) -> None:
        values: dict[str, float] = {f"study/{name}": getattr(now, name) for name in ("complete", "pruned", "failed")}
        if best is not None:
            assert best.value is not None, best
            values["study/best_so_far"] = best.value
        values |= {f"importance/{name}": share for name, share in importance(self._study).items()}
        self._run.log(values)


def progress_line(now: Tally, best: optuna.trial.FrozenTrial | None) -> str:
    """What stands behind the bar."""
    found = f", best {best.value:.4f} (trial {best.number})" if best is not None else ""
    return f"{now.running} running, {now.pruned} pruned, {now.failed} failed{found}"


def report(study: optuna.Study, config: StudyConfig) -> str:
    """What `elm study` ends with."""
    return f"{results_table(study, config)}\n\nresults: {config.results_dir or config.folder}"
