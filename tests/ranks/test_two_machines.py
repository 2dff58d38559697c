"""Two agents of torchrun, as on two machines: one is lost and returns.

`python -m pytest -m slow tests/ranks` runs this.
"""

import json
import os
import signal
import socket
import time

import pytest

from tests.ranks.conftest import start_torchrun, train_ranks, wait_until_gone
from tests.ranks.test_death import result
from utils.runs.checkpoint import LAST, read_progress

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def test_a_machine_is_lost_and_returns(project, tmp_path):
    """The run continues on one machine and then on two again, with the result of an undisturbed run."""
    changes = {"data": str(project), "unfreeze_epoch": 60, "save_every_steps": 5}
    status, output = train_ranks(2, changes, cwd=(undisturbed := tmp_path / "undisturbed"), timeout=600)
    assert status == 0, output[-3000:]
    options = ("--nnodes", "1:2", "--max-restarts", "9", "--rdzv-backend", "c10d", "--rdzv-id", "lost")
    port = free_port()
    options += ("--rdzv-endpoint", f"localhost:{port}")
    folder = tmp_path / "lost"
    folder.mkdir()

    def start_agent():
        log = (folder / f"log{time.monotonic()}").open("w")
        arguments = ("tests/ranks/trainee.py", json.dumps(changes))
        variables = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # as docs/distributed.md says
        places = {"cwd": folder, "stdout": log, "start_new_session": True}
        return start_torchrun(1, *arguments, options=options, variables=variables, **places)

    def step() -> int:
        return max((read_progress(path).step for path in folder.glob(f"logs/*/{LAST}")), default=0)

    def wait_for(number: int, seconds: float = 180) -> None:
        deadline = time.monotonic() + seconds
        while step() < number and time.monotonic() < deadline:
            time.sleep(0.2)
        assert step() >= number

    first = start_agent()
    while socket.socket().connect_ex(("localhost", port)):  # it hosts the store, so it is the one that stays
        time.sleep(0.1)
    second = start_agent()
    wait_for(20)
    os.killpg(second.pid, signal.SIGKILL)  # the agent; its rank sees that and ends
    second.wait()
    wait_for(step() + 40)
    second = start_agent()
    wait_for(step() + 40)
    assert first.wait(600) == 0
    assert second.wait(120) == 0
    assert not wait_until_gone(folder, 10)
    assert result(folder) == result(undisturbed)
