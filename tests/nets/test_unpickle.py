"""nets/weights/unpickle.py against torch.load, and with files that attack it."""

import argparse
import codecs
import resource
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nets.weights import safe_load
from nets.weights.safe_load import open_safely


def assert_equal(found, expected) -> None:
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected.detach())
    elif isinstance(expected, dict | argparse.Namespace):
        expected = expected if isinstance(expected, dict) else vars(expected)
        assert list(found) == list(expected)
        for key in expected:
            assert_equal(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    else:
        assert found == expected


def content() -> dict:
    """What files of weights contain, with views, shared and transposed tensors."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    part = torch.arange(100)[10:20]
    return {
        "state_dict": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "args": argparse.Namespace(lr=0.1, milestones=[1, 2], name="été"),
        "transposed": torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1),
        "half": [torch.randn(3).half(), torch.randn(3).bfloat16(), torch.randn(2).double()],
        "integers": [torch.arange(3, dtype=dtype) for dtype in (torch.int8, torch.uint8, torch.int16, torch.int32)],
        "bool": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(1.5),
        "parameter": nn.Parameter(torch.randn(3)),
        "shared": OrderedDict(a=part, b=part),
        "$odd": {1: "by number", "x": None},
    }


@pytest.mark.parametrize("zip_format", [True, False])
def test_files_are_read_as_torch_reads_them(here, zip_format):
    expected = content()
    torch.save(expected, "w.pth", _use_new_zipfile_serialization=zip_format)
    assert_equal(open_safely("w.pth"), torch.load("w.pth", weights_only=False))


def test_numbers_of_numpy_are_dropped(here):
    torch.save({"w": torch.ones(2), "best": np.float64(0.5), "text": Encoded()}, "w.pth")
    loaded = open_safely("w.pth")
    assert loaded["w"].tolist() == [1, 1]
    assert (loaded["best"], loaded["text"]) == (None, None)


class Encoded:
    """Bytes that would double with each encoding."""

    def __reduce__(self):
        return (codecs.encode, (codecs.encode(bytes(1 << 10), "hex"), "hex"))


def test_hostile_files_are_refused_in_time_and_memory(shared, monkeypatch):
    """Exponential keys, tensors of memory that the file doesn't fill, states that change a tensor's size."""
    monkeypatch.setattr(safe_load, "SECONDS", 3)
    files = sorted((shared / "data/hostile_files").glob("*.pth"))
    assert len(files) >= 7
    for path in files:
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, time.monotonic()
        try:
            loaded = open_safely(path)
        except ValueError as error:
            assert str(error).startswith(f"{path} can't be opened as weights: ")
        else:
            tensors = [value for value in loaded.values() if isinstance(value, torch.Tensor)]
            assert sum(tensor.nbytes for tensor in tensors) <= path.stat().st_size
        assert time.monotonic() - started < 10
        assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss <= max(before, 600_000)


def test_no_tensor_is_made_of_other_memory(here):
    """Each description that reaches beyond the bytes of its storage is refused."""
    for view in (
        torch.zeros(1).expand(1 << 38),
        torch.zeros(4).as_strided((2, 2), (0, 1)).expand(3, 2, 2),
    ):
        torch.save({"w": view}, "w.pth")
        with pytest.raises(ValueError, match="doesn't contain all values of a tensor of shape"):
            open_safely("w.pth")
    torch.save({"w": torch.full((1000,), 7.0)}, "w.pth", _use_new_zipfile_serialization=False)
    Path("w.pth").write_bytes(Path("w.pth").read_bytes()[:-4])
    with pytest.raises(ValueError, match="it ends too early"):
        open_safely("w.pth")


def test_tensors_that_overlap_are_not_multiplied(here):
    base = torch.zeros(1 << 16)
    torch.save([base[i:] for i in range(20)], "w.pth")
    with pytest.raises(ValueError, match="its tensors overlap"):
        open_safely("w.pth")


def test_a_small_file_is_opened_fast(here):
    torch.save({"w": torch.ones(1)}, "w.pth")
    started = time.monotonic()
    open_safely("w.pth")
    assert time.monotonic() - started < 2
