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
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path

os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
import pandas
import psutil
from conftest import run_postgres, save_data, save_llm, tiny_settings
from optuna.trial import FrozenTrial, TrialState
from study.studies import check_ended_once, kill_launcher, processes, start, tiny_study

from elmlib.config import StudyConfig, SummaryTrainingConfig
from elmlib.models.adapter import load_tensors
from elmlib.study.results import last_attempts, open_study, outcome_of
from elmlib.training import train

LIMIT = 600  # seconds after which a run or a study that should end is stuck
SECONDS = ("train_seconds", "eval_seconds")  # of a run: all else that it leaves has to be the same


def _inode(log: Path) -> int:
    """Of a run's metrics.jsonl; each start replaces the file right before its first step."""
    return log.stat().st_ino if log.exists() else 0


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

    def training(self, kills: int) -> None:
        """Kill training runs, each resumed until it ends, until `kills` have hit."""
        hits: Counter[str] = Counter()
        runs, starts, begun = 0, 0, time.monotonic()
        while hits.total() < kills:
            place = self.folder / f"training-{runs}"
            config = replace(
                self.settings, seed=runs, max_epochs=60, save_interval=2, eval_interval=15, early_stopping_patience=60
            )
            whole, broken = (replace(config, checkpoint_dir=str(place / name)) for name in ("whole", "broken"))
            boot = self.train_whole(whole, place)
            for moment in self.train_broken(broken, place, boot, kills - hits.total()):
                starts += 1
                hits[moment] += bool(moment)
            self.compare(place / "whole", place / "broken")
            runs += 1
        self.note("training", hits, begun, {"runs": runs, "starts": starts})

    def train_whole(self, config: SummaryTrainingConfig, place: Path) -> float:
        """Train without a kill; the seconds before its first step."""
        begun, process = time.monotonic(), self.start_training(config, place)
        log = Path(config.checkpoint_dir) / "metrics.jsonl"
        while not log.exists() and process.poll() is None:
            time.sleep(0.01)
        boot = time.monotonic() - begun
        self.check(process.wait(LIMIT) == 0, f"{place}: the unbroken run failed, see whole.log")
        return boot

    def train_broken(self, config: SummaryTrainingConfig, place: Path, boot: float, kills: int) -> Iterator[str]:
        """Start a run until it ends, and kill it at most `kills` times; yields where each kill hit, at last ""."""
        log = Path(config.checkpoint_dir) / "metrics.jsonl"
        for number in range(kills + 1):
            before = _inode(log)
            process = self.start_training(replace(config, resume_from="latest"), place)
            in_training = self.rng.random() < 0.75
            moment = self.rng.uniform(0, 1.5 if in_training else boot)
            while in_training and _inode(log) == before and process.poll() is None:
                time.sleep(0.002)
            with suppress(subprocess.TimeoutExpired):
                process.wait(moment if number < kills else LIMIT)
            process.kill()
            if process.wait() != -signal.SIGKILL:
                self.check(process.returncode == 0, f"{place}: start {number} failed, see broken.log")
                yield ""
                return
            self.check(number < kills, f"{place}: start {number} did not end")
            yield "at the start" if _inode(log) == before else "in training"

    def start_training(self, config: SummaryTrainingConfig, place: Path) -> subprocess.Popen:
        """`elm train` as a process; each run has a cache of its own, for its writes are to be hit too."""
        name = Path(config.checkpoint_dir).name
        place.mkdir(exist_ok=True)
        (place / f"{name}.json").write_text(config.to_json())
        command = [sys.executable, "-m", "elmlib.cli", "train", "--config", str(place / f"{name}.json")]
        environment = os.environ | {"ELMLIB_CACHE": str(place / f"{name}-cache")}
        with open(place / f"{name}.log", "ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def compare(self, whole: Path, broken: Path) -> None:
        """The same files with the same bytes, but for the seconds that a run counts; the picture is not compared."""
        names, others = ({p.name for p in each.iterdir() if p.is_file()} for each in (whole, broken))
        self.check(names == others, f"{broken}: files {sorted(names ^ others)} are in one run alone")
        for name in sorted((names & others) - {"curves.png"}):
            pair = [self.content(each / name) for each in (whole, broken)]
            self.check(pair[0] == pair[1], f"{broken / name} differs from the unbroken run's")

    def content(self, path: Path) -> object:
        """What has to be the same in both runs."""
        if path.name == "result.json":
            return {name: x for name, x in json.loads(path.read_text()).items() if name not in SECONDS}
        if path.name.startswith("run_state"):
            tensors, header = load_tensors(path)
            bytes_of = {name: x.numpy().tobytes() for name, x in tensors.items()}
            return bytes_of, {name: x for name, x in header.items() if name not in SECONDS}
        return path.read_bytes()

    def study(self, kind: str, kills: int, storage: str = "") -> None:
        """Kill launchers, trials and kernels of studies, each started again until it ends, until `kills` have hit."""
        hits: Counter[str] = Counter()
        studies, done, starts, begun = 0, 0, 0, time.monotonic()
        while hits.total() < kills:
            place = self.folder / f"{kind}-{studies}"
            place.mkdir()
            # Random settings, nothing pruned: every trial has to end complete, and none with another one's settings.
            config = replace(
                tiny_study(self.settings, place), study_name=place.name, storage=storage, trials=6, jobs=2,
                startup_trials=1000, max_retries=kills, seed=studies,
            )  # fmt: skip
            for target in self.run_study(config, place, kills - hits.total()):
                starts += target in ("", "launcher")
                hits[target] += bool(target)
            done += self.check_study(config)
            studies += 1
        self.note(kind, hits, begun, {"runs": studies, "starts": starts, "trials": done})

    def run_study(self, config: StudyConfig, place: Path, kills: int) -> Iterator[str]:
        """Run a study to its end with at most `kills` kills; yields what each one killed, at last ""."""
        with open(place / "launcher.log", "ab") as log:
            launcher = start(config, log)
            while kills:
                moment = self.rng.uniform(0, 2 if self.rng.random() < 0.2 else 15)
                with suppress(subprocess.TimeoutExpired):
                    launcher.wait(moment)
                if launcher.poll() is not None:
                    break
                target = self.rng.choice(("launcher", "launcher", "trial", "kernel"))
                if target == "launcher":
                    try:
                        kill_launcher(launcher)
                    except AssertionError:
                        self.check(False, f"{place}: processes of trials outlive their launcher")
                    launcher = start(config, log)
                elif found := processes(launcher)[target]:
                    with suppress(psutil.NoSuchProcess):
                        self.rng.choice(found).kill()
                else:
                    continue
                kills -= 1
                yield target
            try:
                self.check(launcher.wait(LIMIT) == 0, f"{place}: the launcher failed, see launcher.log")
            except subprocess.TimeoutExpired:
                self.check(False, f"{place}: the study did not end")
                kill_launcher(launcher)
            yield ""

    def check_study(self, config: StudyConfig) -> int:
        """Each trial is complete, once, with the scores of an unbroken training; the number of complete trials."""
        study = open_study(config)
        try:
            check_ended_once(study, config)
        except AssertionError as error:
            self.check(False, f"{config.study_name}: {error}")
        last = last_attempts(study.trials)
        states = Counter(outcome_of(trial) for trial in last)
        self.check(states == {"complete": config.trials}, f"{config.study_name}: trials ended {dict(states)}")
        complete = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
        self.check(len(complete) <= config.trials, f"{config.study_name}: {len(complete)} attempts are complete")
        for trial in complete:
            self.check_scores(trial, config)
        return len(complete)

    def check_scores(self, trial: FrozenTrial, config: StudyConfig) -> None:
        settings = SummaryTrainingConfig.from_json(Path(trial.user_attrs["folder"], "settings.json"))
        place = config.folder / "again" / str(trial.number)
        metrics = train(replace(settings, checkpoint_dir=str(place), resume_from="")).metrics
        different = [n for n, x in metrics.items() if n not in SECONDS and trial.user_attrs.get(n) != x]
        self.check(not different, f"{config.study_name}, trial {trial.number}: {different} differ from unbroken ones")

    def note(self, part: str, hits: Counter[str], begun: float, counts: dict[str, object]) -> None:
        """A row of the table, printed at the end."""
        where = ", ".join(f"{count} {name}" for name, count in hits.most_common() if count)
        self.rows[part] = {"kills": hits.total(), "hit": where, **counts, "minutes": (time.monotonic() - begun) / 60}
        print(f"{part}: {self.rows[part]}", file=sys.stderr, flush=True)


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
    soak.training(options.training)
    soak.study("sqlite", options.sqlite)
    with run_postgres() if options.postgres else nullcontext("") as storage:
        soak.study("postgres", options.postgres, storage)
    print(pandas.DataFrame(soak.rows).T.to_string(float_format="{:.1f}".format, na_rep=""))
    print(f"{len(soak.deviations)} deviations", *soak.deviations, sep="\n")
    if soak.deviations:
        sys.exit(f"the files are in {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
