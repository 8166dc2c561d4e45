"""Launchers as jobs of a real SLURM on this machine's loopback, if root has Debian's slurm-wlm."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from study.studies import begun, check_ended_once, start, wait_for

from elmlib.config import StudyConfig
from elmlib.study.results import open_study

DAEMONS = ("munged", "slurmctld", "slurmd")
CONFIG = """
ClusterName=elm
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture
def slurm(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cluster of one node for one test."""
    missing = [name for name in (*DAEMONS, "sbatch") if not shutil.which(name)]
    if missing or os.geteuid():
        pytest.skip(f"SLURM cannot be started here: {', '.join(missing) or 'not root'}; apt-get install slurm-wlm")
    folder = tmp_path_factory.mktemp("slurm")
    for parent in (folder, *folder.parents[:-2]):
        parent.chmod(0o755)  # munged wants none of its folders to be writable by others
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    host, cpus = socket.gethostname().partition(".")[0], os.cpu_count()
    (folder / "slurm.conf").write_text(CONFIG.format(host=host, ports=ports, folder=folder, cpus=cpus))
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    munge = [f"--{name}={folder}/munge.{name.split('-')[0]}" for name in ("key-file", "socket", "pid-file", "log-file")]
    commands = (
        ["munged", "--foreground", "--force", f"--seed-file={folder}/munge.seed", *munge],
        ["slurmctld", "-D"],
        ["slurmd", "-D"],
    )
    running = []
    with open(folder / "log", "wb") as log:
        for command in commands:
            running.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))
            time.sleep(1)
    give_up = time.monotonic() + 30
    while b"idle" not in subprocess.run(["sinfo"], capture_output=True).stdout:
        assert time.monotonic() < give_up, (folder / "log").read_text()
        time.sleep(0.5)
    yield
    for process in reversed(running):
        process.terminate()
        process.wait()


@pytest.mark.heavy
@pytest.mark.usefixtures("slurm")
def test_submit_launchers_run_a_study_together_on_a_real_cluster(
    stub_config: StudyConfig, postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ELM_STUDY_STORAGE", postgres)
    config = replace(stub_config, study_name="slurm", trials=4, jobs=2, slurm=True, slurm_gpus=0)
    assert start(config).wait(60) == 0
    wait_for(lambda: (config.folder / "slurm_results.json").is_file() and len(begun(config)) >= 4, 180)
    wait_for(lambda: all(trial.state.is_finished() for trial in open_study(config).trials))
    check_ended_once(open_study(config), config)
