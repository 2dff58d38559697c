"""The job files in examples/cluster/, with stubs for the commands of a cluster."""

import os
import shlex
import signal
import subprocess
import time

import pytest
import yaml

import train
from tests.ranks.conftest import ROOT
from utils.config.train_config import OPTIONAL_SWITCHES, TrainConfig
from utils.system import cli

SLURM = ROOT / "examples/cluster/slurm.sh"
STUBS = {
    "scontrol": 'echo "scontrol $@" >> calls; [ "$1" = show ] && printf "one\\ntwo\\n"; true',
    "srun": """echo "srun $@" >> calls
trap "echo terminated >> calls; exit 1" TERM
sleep "$SECONDS_TO_RUN" & wait
exit 7""",
}


@pytest.fixture
def slurm(tmp_path):
    """Starts the job in `tmp_path`, where the stubs write what they are called with."""
    for name, text in STUBS.items():
        stub = tmp_path / name
        stub.write_text(f"#!/bin/bash\n{text}\n")
        stub.chmod(0o755)

    def start(seconds: float) -> subprocess.Popen:
        variables = {
            "SLURM_JOB_ID": "12",
            "SLURM_NNODES": "2",
            "SLURM_GPUS_ON_NODE": "8",
            "SLURM_JOB_NODELIST": "x[1-2]",
        }
        variables |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SECONDS_TO_RUN": str(seconds)}
        return subprocess.Popen(["bash", str(SLURM), "--data", "my flowers"], cwd=tmp_path, env=os.environ | variables)

    return start


def test_slurm_starts_torchrun_with_the_first_machine_as_meeting_point(slurm, tmp_path):
    assert subprocess.run(["bash", "-n", str(SLURM)], check=True).returncode == 0
    assert slurm(0).wait(20) == 7
    (call,) = [line for line in (tmp_path / "calls").read_text().splitlines() if line.startswith("srun")]
    assert "--nnodes 2 --nproc-per-node 8" in call
    assert "--rdzv-id 12 --rdzv-endpoint one:29400" in call
    assert call.endswith("train.py --data my flowers")


def test_slurm_stops_the_run_and_requeues_when_the_time_is_over(slurm, tmp_path):
    process = slurm(60)
    while not (tmp_path / "calls").exists() or "srun" not in (tmp_path / "calls").read_text():
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(20) == 0
    assert (tmp_path / "calls").read_text().splitlines()[-2:] == ["terminated", "scontrol requeue 12"]


def test_kubernetes_runs_torchrun_with_flags_that_exist():
    job = yaml.safe_load((ROOT / "examples/cluster/kubernetes.yaml").read_text())
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    launcher, script, *flags = worker["containers"][0]["command"]
    assert (launcher, script) == ("torchrun", "train.py")
    assert shlex.join(cli.order_words(cli.expand_switches(flags, OPTIONAL_SWITCHES), train.main, cli.suggest_nothing))
    fields = {word.removeprefix("--").replace("-", "_") for word in flags if word.startswith("--")}
    assert fields <= set(TrainConfig.__dataclass_fields__)
    assert {mount["name"] for mount in worker["containers"][0]["volumeMounts"]} == {
        v["name"] for v in worker["volumes"]
    }
