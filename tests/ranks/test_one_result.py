"""One result on any number of processes: weights, optimizer, EMA, history and calibration have the same bits.

`python -m pytest tests/ranks -m "slow or not slow"` runs all scenarios.
"""

import json

import pytest

from tests.ranks.conftest import torchrun
from tests.ranks.scenarios import LISTS, SCENARIOS, run_all

SHORT = ["freeze, thaw, resize"]


def compare(ranks, names, project, folder, monkeypatch):
    """Run scenarios alone and on several ranks, and compare the digests."""
    (alone := folder / "alone").mkdir(parents=True)
    monkeypatch.chdir(alone)
    wanted = run_all(project, names, with_fast=True)
    for count in ranks:
        arguments = (str(project), "digests.json", json.dumps(names))
        status, output = torchrun(count, "tests/ranks/scenarios.py", *arguments, cwd=folder / str(count), timeout=400)
        assert status == 0, output[-3000:]
        digests = json.loads((folder / str(count) / "digests.json").read_text())
        for fast in ("fast", "fast, divided"):
            assert digests.pop(fast) == pytest.approx(wanted[fast], abs=1e-4)
        assert digests.items() <= wanted.items()
        assert digests.keys() == {*names, *(f"{images} images" for images in LISTS)}
        assert len(set(digests.values())) == len(digests)


def test_two_ranks_have_the_result_of_one(project, tmp_path, monkeypatch):
    compare([2], SHORT, project, tmp_path, monkeypatch)


@pytest.mark.slow
def test_two_to_five_ranks_have_the_result_of_one(project, tmp_path, monkeypatch):
    uneven = [name for name, changes in SCENARIOS.items() if changes["parts"] == 5]
    compare([5], uneven, project, tmp_path / "uneven", monkeypatch)
    compare([2, 3, 4], list(SCENARIOS), project, tmp_path / "all", monkeypatch)
