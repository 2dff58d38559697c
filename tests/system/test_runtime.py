"""Tests of utils/system/runtime.py with a single process; tests/ranks/ has those with several."""

import io
import pickle

import pytest
import torch

from utils.system.runtime import RankStream, Runtime, _picklable


def test_one_process_is_the_main_one_and_exchanges_nothing():
    runtime = Runtime()
    with runtime.joined():
        assert (runtime.rank, runtime.world_size, runtime.is_main) == (0, 1, True)
        assert runtime.first(lambda: 3) == 3
        assert runtime.gather("x") == ["x"]
        runtime.check_same({"torch": "2"})
        rows = torch.arange(5)
        assert runtime.collect_batches([rows], 2)[0] is rows
        with pytest.raises(KeyError):
            runtime.first(lambda: {}["missing"])


def test_lines_of_errors_begin_with_the_rank():
    stream = io.StringIO()
    errors = RankStream(stream, 3)
    for text in ("one\ntwo", " still two\n", "\n", "three\n"):
        errors.write(text)
    assert stream.getvalue() == "rank 3: one\nrank 3: two still two\nrank 3: \nrank 3: three\n"
    assert not errors.isatty()


def test_errors_that_cannot_be_pickled_keep_their_text():
    class LocalError(Exception):
        pass

    assert str(_picklable(LocalError("why"))) == "LocalError: why"
    assert isinstance(_picklable(ValueError("why")), ValueError)
    assert pickle.loads(pickle.dumps(_picklable(LocalError("why"))))
