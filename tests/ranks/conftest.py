"""Processes under torchrun, on gloo."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest

from tests.conftest import write_two_classes
from utils.annotation.annotate import annotate

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


@pytest.fixture(scope="session")
def project(tmp_path_factory):
    """A folder with two classes of images and their lists."""
    folder = tmp_path_factory.mktemp("project")
    write_two_classes(folder / "datasets")
    annotate(str(folder / "datasets"), out=str(folder))
    return folder


def rank_environment() -> dict[str, str]:
    """One thread for each rank, as torchrun sets it."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}


def start_torchrun(
    ranks: int,
    script: str,
    *args: str,
    cwd: Path,
    options: tuple[str, ...] = ("--standalone",),
    variables: Mapping[str, str] = MappingProxyType({}),
    **named: object,
) -> subprocess.Popen:
    """Start a script of the project in `ranks` processes."""
    cwd.mkdir(parents=True, exist_ok=True)
    command = [*TORCHRUN, *options, "--nproc-per-node", str(ranks), str(ROOT / script), *args]
    named = {"stdout": subprocess.PIPE} | named
    return subprocess.Popen(
        command, cwd=cwd, env=rank_environment() | variables, stderr=subprocess.STDOUT, text=True, **named
    )


def torchrun(ranks: int, script: str, *args: str, cwd: Path, timeout: float = 180, **options: object):
    """Run a script of the project in `ranks` processes; return its exit status and output."""
    process = start_torchrun(ranks, script, *args, cwd=cwd, **options)
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, output


def train_ranks(ranks: int, changes: dict, fault: str = "", *, cwd: Path, **options: object):
    """Train with trainee.py; return exit status and output."""
    return torchrun(ranks, "tests/ranks/trainee.py", json.dumps(changes), *[fault] * bool(fault), cwd=cwd, **options)


def processes_of(folder: Path) -> dict[int, str]:
    """The processes whose working folder is `folder`: their commands by number."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if process.joinpath("cwd").readlink() == folder:
                found[int(process.name)] = process.joinpath("cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
    return found


def wait_until_gone(folder: Path, seconds: float) -> dict[int, str]:
    """The processes that are still in `folder` after at most `seconds`."""
    deadline = time.monotonic() + seconds
    while (left := processes_of(folder)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left
