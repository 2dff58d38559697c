"""Attention by explicit matrix products, these with recomputed weights, and torch's fused function, in turn, by type.

    python benchmarks/attention.py [--batch 16 --heads 12 --tokens 197 --width 64]

`nets.vit.attention` chooses by what this shows. The last line is JSON.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nets.vit import explicit_attention
from utils.modeling.precision import DTYPES, choose_precision


def explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """By matrix products."""
    return explicit_attention(q, k, v, q.shape[-1] ** -0.5)


def recomputed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same, with the weights not kept for the gradient but computed again."""
    return checkpoint(explicit, q, k, v, use_reentrant=False, preserve_rng_state=False)


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
    for name, dtype in DTYPES.items():
        if choose_precision(name, torch.device(device))[0] != name or (device, name) == ("cpu", "fp16"):
            continue
        # In the order of memory that they have in the network.
        inputs = [torch.randn(batch, tokens, heads, width, device=device, dtype=dtype) for _ in range(3)]
        inputs = [tensor.transpose(1, 2) for tensor in inputs]
        for backward in (False, True):
            for tensor in inputs:
                tensor.requires_grad_(backward)
            kinds = {"explicit": explicit, "recomputed": recomputed, "fused": F.scaled_dot_product_attention}
            times: dict[str, list[float]] = {kind: [] for kind in kinds}
            for i in range(repeats + 3):
                for kind, function in kinds.items():
                    elapsed = milliseconds(function, inputs, backward)
                    if i >= 3:  # the first are warming up
                        times[kind].append(elapsed)
            title = f"{name} {'forward and backward' if backward else 'forward'}"
            medians = {kind: statistics.median(values) for kind, values in times.items()}
            told = ", ".join(f"{k} {medians[k]:7.2f} ms ({min(t):.2f} to {max(t):.2f})" for k, t in times.items())
            print(f"{device} {title:<26}{told}", flush=True)
            results[title] = medians
    ratios = {
        f"{title} fused_vs_{kind}": round(found["fused"] / found[kind], 2)
        for title, found in results.items()
        for kind in ("explicit", "recomputed")
    }
    print(json.dumps({"benchmark": "attention", "device": device, "ratios": ratios}))


if __name__ == "__main__":
    tyro.cli(main)
