"""Compare attention by matrix products, the same with recomputed weights, and torch's fused function.

    python benchmarks/attention.py [--batch 16 --heads 12 --tokens 197 --width 64]

The choice in `nets.vit.attention` follows these results. The functions take turns. The last line is JSON.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
import tyro
from measure import medians, print_result, take_turns
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nets.vit import explicit_attention
from utils.modeling.precision import DTYPES, choose_precision


def explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return explicit_attention(q, k, v, q.shape[-1] ** -0.5)


def recomputed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Recompute the attention weights in the backward pass instead of storing them."""
    return checkpoint(explicit, q, k, v, use_reentrant=False, preserve_rng_state=False)


def call(function: Callable[..., Tensor], inputs: list[Tensor], backward: bool) -> int:
    """Call a function once."""
    out = function(*inputs)
    if backward:
        out.sum().backward()
    if out.is_cuda:
        torch.cuda.synchronize()
    return 1


def main(batch: int = 16, heads: int = 12, tokens: int = 197, width: int = 64, repeats: int = 20) -> None:
    """Compare the functions on the GPU, or on the CPU if there is none."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    functions = {"explicit": explicit, "recomputed": recomputed, "fused": F.scaled_dot_product_attention}
    results = {}
    for name, dtype in DTYPES.items():
        if choose_precision(name, device)[0] != name or (device.type, name) == ("cpu", "fp16"):
            continue
        # In the memory order that they have in the network.
        inputs = [torch.randn(batch, tokens, heads, width, device=device, dtype=dtype) for _ in range(3)]
        inputs = [tensor.transpose(1, 2) for tensor in inputs]
        for backward in (False, True):
            for tensor in inputs:
                tensor.requires_grad_(backward)
            tasks = {key: partial(call, function, inputs, backward) for key, function in functions.items()}
            times = {
                key: [1000 * seconds for seconds in values]
                for key, values in take_turns(tasks, repeats, warm_ups=3).items()
            }
            title = f"{name} {'forward and backward' if backward else 'forward'}"
            results[title] = medians(times)
            parts = (f"{k} {results[title][k]:7.2f} ms ({min(t):.2f} to {max(t):.2f})" for k, t in times.items())
            print(f"{device.type} {title:<26}{', '.join(parts)}", flush=True)
    ratios = {
        f"{title} fused_vs_{key}": round(result["fused"] / result[key], 2)
        for title, result in results.items()
        for key in ("explicit", "recomputed")
    }
    print_result("attention", device=device.type, ratios=ratios)


if __name__ == "__main__":
    tyro.cli(main)
