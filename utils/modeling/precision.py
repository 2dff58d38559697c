"""Device and precision."""

from __future__ import annotations

import functools
import platform
import time
from contextlib import AbstractContextManager, nullcontext

import torch

from utils.system.runtime import runtime

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is CUDA, else Apple's GPU, else the CPU.

    Raises:
        ValueError: the device isn't available.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, is_available in available.items() if is_available)
    if not available.get(name):
        raise ValueError(f"device={name!r}: torch finds no such device; set device to auto or cpu")
    return torch.device(name, runtime.local_rank) if name == "cuda" and runtime.world_size > 1 else torch.device(name)


def choose_precision(precision: str, device: torch.device) -> tuple[str, str]:
    """Resolve "auto" to "fp32", "fp16" or "bf16" on `device`, and return the reason too.

    "auto" is the fastest precision that learns as well as fp32. "bf16" becomes "fp32" on a CPU that only emulates it,
    at a tenth of the speed.
    """
    has_bf16 = _has_bf16(device)
    if precision == "auto":
        if has_bf16 and device.type == "cpu":
            gain = _bf16_gain()
            return "bf16" if gain > 1 else "fp32", f"bf16 is {gain:.1f} times as fast as fp32 on this CPU"
        if has_bf16:
            return "bf16", "this GPU supports it in hardware"
        if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0):
            return "fp16", "this GPU supports it in hardware, but not bf16"
        return "fp32", f"torch uses nothing faster on this {device.type} device"
    if precision == "bf16" and device.type == "cpu" and not has_bf16:
        return "fp32", "this CPU doesn't support bf16"
    return precision, "as set"


def _has_bf16(device: torch.device) -> bool:
    """Whether `device` multiplies bf16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported()
    # Arm's BFMMLA, which torch uses through oneDNN if it was built with it.
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@functools.cache
def _bf16_gain() -> float:
    """Measure the speedup of bf16 over fp32 matrix products on one CPU core.

    Supporting the instructions isn't enough: with AVX512-BF16, AMD CPUs reach nearly twice the speed of fp32, but Xeons
    whose AMX is hidden, as in many virtual machines, half of it. Takes the fastest of fifty short products, which
    other processes hardly affect; uses one thread, since several would mostly wait for each other.
    """
    matrices = [torch.ones(256, 256, dtype=DTYPES[name]) for name in ("fp32", "bf16")]
    seconds = [float("inf"), float("inf")]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(50):
            for i, matrix in enumerate(matrices):
                started = time.perf_counter()
                matrix @ matrix
                seconds[i] = min(seconds[i], time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads)
    return seconds[0] / seconds[1]


def tune_kernels(device: torch.device, convolutional: bool) -> None:
    """On CUDA, use TF32 for fp32 matrix products, and let cuDNN benchmark the convolutions of a convolutional network.

    Benchmarking takes seconds and pays off, since all images have the same size; a transformer gains nothing.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = convolutional


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """A context in which matrix products use `precision` ("fp32", "fp16" or "bf16")."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, DTYPES[precision])
