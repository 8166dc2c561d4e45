"""`make soak`: runs and studies that are killed again and again end as if nothing had happened.

Every kill is a SIGKILL at a random moment. A training run is resumed until it ends, and its files are compared with
those of an unbroken run. A study is started again until it ends, each trial must have run to completion once, and each
score is compared with that of an unbroken training with the trial's settings. Prints a table; exits 1 if anything
differs, and then keeps its folder.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path

os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
import pandas
import psutil
from conftest import run_postgres, save_data, save_llm, tiny_settings
from optuna.trial import TrialState
from study.studies import check_ended_once, kill_launcher, processes, start, tiny_study

from elmlib.config import StudyConfig, SummaryTrainingConfig
from elmlib.models.adapter import load_tensors
from elmlib.study.results import last_attempts, open_study
from elmlib.training import train

LIMIT = 600  # seconds after which a run or a study that should end is stuck
SECONDS = ("train_seconds", "eval_seconds")  # of a run: all else that it leaves has to be the same
# What is killed of a study, and within how many seconds: at any moment, right after a kill, as a trial's end is noted.
TARGETS = (("launcher", 15), ("trial", 15), ("kernel", 15), ("launcher", 2), ("launcher at an end", 1))


class Soak:
    """Kills what it starts; `rows` are the table, `deviations` what should not have happened."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.rng = folder, random.Random(seed)
        self.rows: dict[str, dict[str, object]] = {}
        self.deviations: list[str] = []
        self.settings = tiny_settings(save_llm(folder / "llm"), save_data(folder / "data"), folder)

    def check(self, holds: object, message: str) -> None:
        """Note a deviation unless it holds."""
        if not holds:
            self.deviations.append(message)
            print(f"DEVIATION: {message}", file=sys.stderr, flush=True)

    def note(self, part: str, hits: Counter[str], begun: float, counts: dict[str, object]) -> None:
        """Add a row to the table."""
        where = ", ".join(f"{count} {name}" for name, count in hits.most_common())
        self.rows[part] = {"kills": hits.total(), "hit": where, **counts, "minutes": (time.monotonic() - begun) / 60}
        print(f"{part}: {self.rows[part]}", file=sys.stderr, flush=True)

    def training(self, kills: int) -> None:
        """Kill training runs, each resumed until it ends, until `kills` have hit."""
        hits: Counter[str] = Counter()
        runs, starts, begun = 0, 0, time.monotonic()
        while hits.total() < kills and not self.deviations:
            place = self.folder / f"training-{runs}"
            config = replace(
                self.settings, seed=runs, max_epochs=60, save_interval=1, eval_interval=15, early_stopping_patience=60
            )
            whole, broken = (replace(config, checkpoint_dir=str(place / name)) for name in ("whole", "broken"))
            self.check(self.start_training(whole, place).wait(LIMIT) == 0, f"{place}: the unbroken run failed")
            runs, starts, where = runs + 1, starts + 1, ""
            while where := self.kill_training(broken, place, hits.total() < kills):
                hits[where] += 1
                starts += 1
            self.compare(place / "whole", place / "broken")
        self.note("training", hits, begun, {"runs": runs, "starts": starts})

    def start_training(self, config: SummaryTrainingConfig, place: Path) -> subprocess.Popen:
        """`elm train` as a process; each run has a cache of its own, for its writes are to be hit too."""
        name = Path(config.checkpoint_dir).name
        place.mkdir(exist_ok=True)
        (place / f"{name}.json").write_text(config.to_json())
        command = [sys.executable, "-m", "elmlib.cli", "train", "--config", str(place / f"{name}.json")]
        command += ["--resume-from", "latest"]
        environment = os.environ | {"ELMLIB_CACHE": str(place / f"{name}-cache")}
        with open(place / f"{name}.log", "ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def kill_training(self, config: SummaryTrainingConfig, place: Path, kill: bool) -> str:
        """Start a run, or resume it, and kill it; where the kill hit, empty if the run had ended before."""
        log = Path(config.checkpoint_dir) / "metrics.jsonl"
        before, process = _inode(log), self.start_training(config, place)
        if kill:
            seconds = 4.0
            if self.rng.random() < 0.75:
                _wait_for(lambda: _inode(log) != before, process)
                seconds = 1.5
            with suppress(subprocess.TimeoutExpired):
                process.wait(self.rng.uniform(0, seconds))
            process.kill()
        if process.wait(LIMIT) == -signal.SIGKILL:
            return "at the start" if _inode(log) == before else "in training"
        self.check(process.returncode == 0, f"{place}: the run failed, see broken.log")
        return ""

    def compare(self, whole: Path, broken: Path) -> None:
        """The same files with the same bytes, but for the seconds that a run counts; the picture is not compared."""
        names, others = ({p.name for p in each.iterdir() if p.is_file()} for each in (whole, broken))
        self.check(names == others, f"{broken}: files {sorted(names ^ others)} are in one run alone")
        for name in sorted((names & others) - {"curves.png"}):
            one, other = (_content(each / name) for each in (whole, broken))
            self.check(one == other, f"{broken / name} differs from the unbroken run's")

    def study(self, kind: str, kills: int, storage: str = "") -> None:
        """Kill launchers, trials and kernels of studies, each started again until it ends, until `kills` have hit."""
        hits: Counter[str] = Counter()
        studies, done, starts, begun = 0, 0, 0, time.monotonic()
        while hits.total() < kills and not self.deviations:
            place = self.folder / f"{kind}-{studies}"
            place.mkdir()
            # Random settings, nothing pruned: every trial has to end complete, and none with another one's settings.
            config = replace(
                tiny_study(self.settings, place), study_name=place.name, storage=storage, trials=6, jobs=2,
                startup_trials=1000, max_retries=kills, seed=studies,
            )  # fmt: skip
            with open(place / "launcher.log", "ab") as log:
                launcher = start(config, log)
                studies, starts = studies + 1, starts + 1
                while hits.total() < kills and launcher.poll() is None:
                    if target := self.kill_one(launcher):
                        hits[target] += 1
                    if launcher.poll() == -signal.SIGKILL:
                        launcher = start(config, log)
                        starts += 1
                self.check(launcher.wait(LIMIT) == 0, f"{place}: the launcher failed, see launcher.log")
            done += self.check_study(config)
        self.note(kind, hits, begun, {"runs": studies, "starts": starts, "trials": done})

    def kill_one(self, launcher: subprocess.Popen) -> str:
        """Kill a launcher, or a process of one of its trials; what it was, empty if there was nothing to kill."""
        target, seconds = self.rng.choice(TARGETS)
        if "end" in target:
            seen: set[int] = set()
            _wait_for(lambda: seen > (now := _children(launcher)) or seen.update(now), launcher, 60)
        with suppress(subprocess.TimeoutExpired):
            launcher.wait(self.rng.uniform(0, seconds))
        if launcher.poll() is not None:
            return ""
        if "launcher" in target:
            try:
                kill_launcher(launcher)
            except AssertionError:
                self.check(False, "processes of trials outlive their launcher")
        elif found := processes(launcher)[target]:
            with suppress(psutil.NoSuchProcess):
                self.rng.choice(found).kill()
        else:
            return ""
        return target

    def check_study(self, config: StudyConfig) -> int:
        """Each trial is complete, once, with the scores of an unbroken training; the number of complete trials."""
        study, name = open_study(config), config.study_name
        try:
            check_ended_once(study, config)
        except AssertionError as error:
            self.check(False, f"{name}: {error}, {traceback.extract_tb(error.__traceback__)[-1].line}")
        last = Counter(trial.state.name for trial in last_attempts(study.trials))
        self.check(last == {"COMPLETE": config.trials}, f"{name}: the last attempts are {dict(last)}")
        complete = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
        self.check(len(complete) <= config.trials, f"{name}: {len(complete)} attempts are complete")
        for trial in complete:
            settings = SummaryTrainingConfig.from_json(Path(trial.user_attrs["folder"], "settings.json"))
            again = config.folder / f"again-{trial.number}"
            metrics = train(replace(settings, checkpoint_dir=str(again), resume_from="")).metrics
            different = [key for key, x in metrics.items() if key not in SECONDS and trial.user_attrs.get(key) != x]
            self.check(not different, f"{name}, trial {trial.number}: {different} differ from an unbroken training's")
        return len(complete)


def _inode(log: Path) -> int:
    """Of a run's metrics.jsonl; each start replaces the file right before its first step."""
    return log.stat().st_ino if log.exists() else 0


def _children(launcher: subprocess.Popen) -> set[int]:
    """The processes of trials that run."""
    with suppress(psutil.NoSuchProcess):
        return {each.pid for each in psutil.Process(launcher.pid).children() if each.status() != psutil.STATUS_ZOMBIE}
    return set()


def _wait_for(condition: Callable[[], object], process: subprocess.Popen, seconds: float = LIMIT) -> None:
    """Return once `condition` holds, the process has ended, or time is up."""
    give_up = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < give_up:
        time.sleep(0.005)


def _content(path: Path) -> object:
    """What has to be the same in both runs."""
    if path.name == "result.json":
        return {name: x for name, x in json.loads(path.read_text()).items() if name not in SECONDS}
    if path.name.startswith("run_state"):
        tensors, header = load_tensors(path)
        bytes_of = {name: x.numpy().tobytes() for name, x in tensors.items()}
        return bytes_of, {name: x for name, x in header.items() if name not in SECONDS}
    return path.read_bytes()


def main() -> None:
    """Run the three parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("training", 40), ("sqlite", 40), ("postgres", 20)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"kills (default {default})")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and of what is killed (default 0)")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="elm-soak-"))
    os.environ["ELMLIB_CACHE"] = str(folder / "cache")
    soak = Soak(folder, options.seed)
    try:
        soak.training(options.training)
        soak.study("sqlite", options.sqlite)
        with run_postgres() if options.postgres else nullcontext("") as storage:
            soak.study("postgres", options.postgres, storage)
    finally:  # of an interrupted soak, or of a run that is stuck
        for child in psutil.Process().children(recursive=True):
            child.kill()
    print(pandas.DataFrame(soak.rows).T.to_string(float_format="{:.1f}".format, na_rep=""))
    print(f"{len(soak.deviations)} deviations", *soak.deviations, sep="\n")
    if soak.deviations:
        sys.exit(f"the files are in {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
