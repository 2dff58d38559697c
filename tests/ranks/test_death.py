"""Whatever happens to one process, all end or continue together, and a restart gives the result of no fault.

`python -m pytest tests/ranks -m "slow or not slow"` runs all cases.
"""

import functools
import json
import os
import random
import signal
import time

import pytest

import train
from tests.conftest import settings
from tests.ranks.conftest import processes_of, start_torchrun, torchrun, train_ranks, wait_until_gone
from tests.ranks.scenarios import digest_run
from tests.ranks.trainee import SETTINGS
from utils.runs.checkpoint import LAST, read_progress

CACHED = {"cache_features": True, "feature_views": 2, "freeze_epoch": 3, "unfreeze_epoch": 4}


def result(folder):
    """The digest of the only run in `folder`."""
    (run,) = (path.parent for path in folder.glob(f"logs/*/{LAST}"))
    return digest_run(run)


@pytest.fixture(scope="session")
def undisturbed(project, tmp_path_factory):
    """The digest of a run of one process without faults, by its settings."""

    @functools.cache
    def of(changes: str) -> str:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder := tmp_path_factory.mktemp("undisturbed"))
            train.main(settings(**SETTINGS | json.loads(changes)))
        return result(folder)

    return lambda changes: of(json.dumps(changes))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("kill step 1 7", ""),
        ("kill validation 1 2", ""),
        ("kill saving 0 3", ""),
        ("kill features 1 3", ""),
        ("term step 1 7", "Stopped"),
        ("stop step 1 7", "rank 1"),
        ("stop step 0 7", "rank 0"),
        ("full saving 0 3", "No space left on device"),
        ("kill pieces 1 3", ""),
        ("write pieces 1 3", "rank 1: No space left on device"),
        ("unreadable reading 1 20", "max_bad_fraction"),
    ],
)
def test_a_fault_ends_all_and_a_restart_gives_the_same_result(fault, message, project, undisturbed, tmp_path):
    changes = {"data": str(project)} | (CACHED if "features" in fault else {})
    changes |= {"max_bad_fraction": 0.0} if "unreadable" in fault else {}
    changes |= {"divide_checkpoints": "yes", "shard": "yes"} if "pieces" in fault else {}
    status, output = train_ranks(2, changes, fault, cwd=tmp_path)
    happened = (tmp_path / "happened").stat().st_mtime
    assert status != 0
    assert message in output
    assert time.time() - happened < 40
    assert not wait_until_gone(tmp_path, 5)
    status, output = train_ranks(2, changes, cwd=tmp_path)
    assert status == 0, output[-3000:]
    assert result(tmp_path) == undisturbed(changes)


@pytest.mark.slow
def test_all_split_their_parts_when_one_has_too_little_memory(project, tmp_path):
    status, output = train_ranks(2, {"data": str(project)}, "memory part 1 9", cwd=tmp_path)
    assert status == 0, output[-3000:]
    assert "are now split into 2 micro-batches" in output


@pytest.mark.parametrize(
    "fault", ["kill step 1 7", *(pytest.param(f, marks=pytest.mark.slow) for f in ("kill saving 0 3", "stop step 0 7"))]
)
def test_torchrun_restarts_all_in_place(fault, project, undisturbed, tmp_path):
    options = ("--standalone", "--max-restarts", "3")
    changes = {"data": str(project)}
    status, output = train_ranks(2, changes, fault, cwd=tmp_path, options=options)
    assert status == 0, output[-3000:]
    assert "resumed after" in output
    assert result(tmp_path) == undisturbed(changes)


@pytest.mark.slow
def test_ranks_end_when_torchrun_is_killed(project, undisturbed, tmp_path):
    changes = {"data": str(project)}
    process = start_torchrun(2, "tests/ranks/trainee.py", json.dumps(changes), cwd=tmp_path)
    while not list(tmp_path.glob(f"logs/*/{LAST}")):
        time.sleep(0.1)
    process.kill()
    assert not wait_until_gone(tmp_path, 30)
    status, output = train_ranks(2, changes, cwd=tmp_path)
    assert status == 0, output[-3000:]
    assert result(tmp_path) == undisturbed(changes)


def test_no_thread_outlives_the_group(tmp_path):
    """One that frees memory while Python ends would abort the process."""
    (tmp_path / "script.py").write_text(
        "import torch\nfrom pathlib import Path\nfrom utils.system.runtime import runtime\n"
        "with runtime.joined():\n"
        "    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])\n"
        "    runtime.gather(None)\n"
        "print([file.read_text() for file in Path('/proc/self/task').glob('*/comm')])\n"
    )
    status, output = torchrun(2, str(tmp_path / "script.py"), cwd=tmp_path)
    assert status == 0, output
    assert "python" in output
    assert "gloo" not in output


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_killed_at_any_time_and_continued_by_another_number_of_ranks(seed, project, undisturbed, tmp_path):
    """100 kills: of a rank, torchrun, or all of them."""
    chance = random.Random(seed)
    changes = {"data": str(project), "unfreeze_epoch": 6, "freeze_epoch": 2} | (CACHED if seed % 2 else {})
    changes |= {"divide_checkpoints": "yes"} if seed % 4 > 1 else {}
    numbers = [4, 1, 2, 3] * 9
    kills = 0
    while kills < 5:
        process = start_torchrun(numbers.pop(), "tests/ranks/trainee.py", json.dumps(changes), cwd=tmp_path)
        before = step(tmp_path)
        while process.poll() is None and step(tmp_path) == before:
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 1.5))
        pids = processes_of(tmp_path)
        ranks = [pid for pid, command in pids.items() if "trainee.py" in command and pid != process.pid]
        if process.poll() is None and ranks:
            victims = chance.choice([[process.pid], [chance.choice(ranks)], list(pids)])
            for pid in victims:
                try:
                    os.kill(pid, signal.SIGKILL)
                    kills += pid == victims[0]
                except ProcessLookupError:
                    continue
        process.communicate(timeout=120)
        assert not wait_until_gone(tmp_path, 40)
        if finished(tmp_path):
            break
    if not finished(tmp_path):
        status, output = train_ranks(2, changes, cwd=tmp_path)
        assert status == 0, output[-3000:]
    assert result(tmp_path) == undisturbed(changes)
    assert kills


def step(folder) -> int:
    """The last saved step of the run in `folder`."""
    notes = [read_progress(path) for path in folder.glob(f"logs/*/{LAST}")]
    return max((note.step for note in notes if note), default=-1)


def finished(folder) -> bool:
    """Whether the run in `folder` is finished, so that the next start would be of a new one."""
    return any(note.finished for path in folder.glob(f"logs/*/{LAST}") if (note := read_progress(path)))
