"""Where a network runs, and in which arithmetic."""

from __future__ import annotations

import functools
import platform
import time
from contextlib import AbstractContextManager, nullcontext

import torch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is CUDA, else Apple's GPU, else the processor.

    Raises:
        ValueError: that device isn't there.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available.get(name):
        raise ValueError(f"device={name!r}: torch finds none on this machine; set device to auto or cpu")
    return torch.device(name)


def choose_precision(precision: str, device: torch.device) -> tuple[str, str]:
    """The arithmetic for `precision` on `device`, "fp32", "fp16" or "bf16", and why.

    "auto" is the fastest that learns as well as fp32. "bf16" becomes "fp32" on a processor that would only emulate it,
    at a tenth of the speed.
    """
    has_bf16 = _has_bf16(device)
    if precision == "auto":
        if has_bf16 and device.type == "cpu":
            gain = _bf16_gain()
            return "bf16" if gain > 1 else "fp32", f"this processor multiplies {gain:.1f} times as fast in bf16"
        if has_bf16:
            return "bf16", f"this {device.type} device has it in hardware"
        if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0):
            return "fp16", "this GPU has it in hardware, and no bf16"
        return "fp32", f"this {device.type} device has nothing faster that torch uses"
    if precision == "bf16" and device.type == "cpu" and not has_bf16:
        return "fp32", "this processor has no bf16"
    return precision, "as set"


def _has_bf16(device: torch.device) -> bool:
    """Whether `device` multiplies bf16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported()
    # Arm's BFMMLA, by the library that would use it, if torch was built with it.
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@functools.cache
def _bf16_gain() -> float:
    """How many times as fast as in fp32 one core of the processor multiplies matrices in bf16.

    To have the instructions isn't enough: Xeons whose AMX is hidden, as in many virtual machines, are at half of fp32's
    speed with AVX512-BF16, where AMD's are at nearly twice. The products are so short that among fifty are some that
    nothing else on the machine disturbed; on many cores they would mostly wait for each other.
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
    """Let CUDA's fp32 products run on tensor cores, in TF32, and cuDNN try its convolutions out.

    Trying them out takes images of one size, which a run has, and costs seconds; of a transformer's one convolution
    nothing is gained by it.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = convolutional


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """The context in which matrix products are done in `precision` ("fp32", "fp16" or "bf16")."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, DTYPES[precision])
