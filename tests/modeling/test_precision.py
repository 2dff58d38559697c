"""utils/modeling/precision.py: device and precision."""

import pytest
import torch
from torch.utils.benchmark import Timer

from utils.modeling.precision import DTYPES, choose_precision, pick_device, tune_kernels

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("machine", "has", "gain", "auto", "bf16"),
    [
        ("x86_64", True, 1.8, "bf16", "bf16"),
        ("x86_64", True, 0.5, "fp32", "bf16"),  # a Xeon whose AMX is hidden
        ("AMD64", False, 1.8, "fp32", "fp32"),
        ("arm64", True, 1.8, "bf16", "bf16"),
    ],
)
def test_precision_on_cpus(monkeypatch, machine, has, gain, auto, bf16):
    monkeypatch.setattr("utils.modeling.precision._bf16_gain", lambda: gain)
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has if machine != "arm64" else 1 / 0)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has, raising=False)
    assert choose_precision("auto", CPU)[0] == auto
    assert choose_precision("bf16", CPU)[0] == bf16
    assert choose_precision("fp16", CPU)[0] == "fp16"
    assert choose_precision("fp32", CPU)[0] == "fp32"


def test_auto_is_bf16_if_faster():
    """Checked with larger products and torch's timer."""
    if choose_precision("bf16", CPU)[0] == "fp32":
        pytest.skip("this CPU doesn't support bf16")
    matrices = {name: torch.ones(512, 512, dtype=DTYPES[name]) for name in ("fp32", "bf16")}
    times = {name: [] for name in matrices}
    for name in 15 * list(matrices):
        times[name].append(Timer("a @ a", globals={"a": matrices[name]}, num_threads=1).timeit(3).mean)
    gain = min(times["fp32"]) / min(times["bf16"])
    if 0.8 < gain < 1.25:
        pytest.skip(f"bf16 is {gain:.2f} times as fast: both are right")
    threads = torch.get_num_threads()
    assert choose_precision("auto", CPU)[0] == ("bf16" if gain > 1 else "fp32")
    assert torch.get_num_threads() == threads


def test_no_bf16_without_onednn(monkeypatch):
    """As in torch for macOS."""
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.delattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", raising=False)
    assert choose_precision("auto", CPU)[0] == "fp32"


@pytest.mark.parametrize(
    ("capability", "has_bf16", "expected"), [((9, 0), True, "bf16"), ((7, 5), False, "fp16"), ((6, 1), False, "fp32")]
)
def test_precision_on_gpus(monkeypatch, capability, has_bf16, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    precision, reason = choose_precision("auto", torch.device("cuda"))
    assert precision == expected
    assert reason
    assert choose_precision("bf16", torch.device("cuda")) == ("bf16", "as set")


def test_precision_on_mps():
    assert choose_precision("auto", torch.device("mps"))[0] == "fp32"


def test_auto_device_prefers_cuda_then_mps_then_cpu(monkeypatch):
    available = {"cuda": True, "mps": True}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available["cuda"])
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: available["mps"])
    assert pick_device("auto").type == "cuda"
    available["cuda"] = False
    assert pick_device("auto").type == "mps"
    available["mps"] = False
    assert pick_device("auto").type == "cpu"
    with pytest.raises(ValueError, match="device='gpu'"):
        pick_device("gpu")


def test_devices():
    assert pick_device("cpu") == CPU
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    if not torch.cuda.is_available():
        assert pick_device("auto").type != "cuda"
        with pytest.raises(ValueError, match="device='cuda': torch finds no such device"):
            pick_device("cuda")


@pytest.fixture
def restored_kernels():
    """Restore the global settings that `tune_kernels` changes."""
    conv, matmul = torch.backends.cudnn, torch.get_float32_matmul_precision()
    before = conv.benchmark
    torch.set_float32_matmul_precision("highest")
    conv.benchmark = False
    yield
    conv.benchmark = before
    torch.set_float32_matmul_precision(matmul)


@pytest.mark.parametrize("convolutional", [True, False])
def test_kernels_are_only_tuned_on_cuda(restored_kernels, convolutional):
    tune_kernels(CPU, convolutional)
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark) == ("highest", False)
    tune_kernels(torch.device("cuda"), convolutional)
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark) == ("high", convolutional)
