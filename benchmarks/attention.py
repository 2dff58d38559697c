"""Attention by explicit matrix products against torch's fused function: forward and backward, in turn, by type.

    python benchmarks/attention.py [--batch 16 --heads 12 --tokens 197 --width 64]

`nets.vit.attention` chooses by what this shows. The last line is JSON.
"""

from __future__ import annotations

import json
import statistics
import time

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √D) v, (B, H, N, D)."""
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v


def milliseconds(function, inputs: list[Tensor], backward: bool) -> float:
    """Of one call on the inputs."""
    cuda = inputs[0].is_cuda
    started = time.perf_counter()
    out = function(*inputs)
    if backward:
        out.sum().backward()
    if cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - started) * 1000


def main(batch: int = 16, heads: int = 12, tokens: int = 197, width: int = 64, repeats: int = 20) -> None:
    """Compare the two on this machine's GPU if it has one, else on its processor."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = {}
    for name, dtype in TYPES.items():
        if device == "cpu" and name == "fp16":
            continue
        inputs = [torch.randn(batch, heads, tokens, width, device=device, dtype=dtype) for _ in range(3)]
        for backward in (False, True):
            for tensor in inputs:
                tensor.requires_grad_(backward)
            times: dict[str, list[float]] = {"explicit": [], "fused": []}
            for i in range(repeats + 3):
                for kind, function in (("explicit", explicit), ("fused", F.scaled_dot_product_attention)):
                    elapsed = milliseconds(function, inputs, backward)
                    if i >= 3:  # the first are warming up
                        times[kind].append(elapsed)
            title = f"{name} {'forward and backward' if backward else 'forward'}"
            medians = {kind: statistics.median(values) for kind, values in times.items()}
            told = ", ".join(f"{k} {medians[k]:7.2f} ms ({min(t):.2f} to {max(t):.2f})" for k, t in times.items())
            print(f"{device} {title:<26}{told}", flush=True)
            results[title] = medians["fused"] / medians["explicit"]
    ratios = {f"{title} fused_vs_explicit": round(ratio, 2) for title, ratio in results.items()}
    print(json.dumps({"benchmark": "attention", "device": device, "ratios": ratios}))


if __name__ == "__main__":
    tyro.cli(main)
