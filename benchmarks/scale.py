"""Time and memory of a training step on many ranks: measured here on one and two, planned for more.

    python benchmarks/scale.py                      # measure steps and messages here, and plan with them
    python benchmarks/scale.py --latency 2e-5 --bandwidth 4e10 --micro-batch 0.11 --overlap 0.1   # plan for a cluster
    python benchmarks/scale.py --memory             # plan memory for ViT-L, ViT-H and ViT-g

The model of a step of W ranks, with gradients of G bytes:

    micro-batches of the busiest rank * time of one + rest + max(0, 2 (W - 1) (latency + G / (W bandwidth)) - overlap)

Each rank sends a slice of its gradients to each other one, and the sums back, so 2 (W - 1) messages. With
`reduce="exact"` nothing overlaps. Time of a micro-batch, rest (optimizer and overhead), latency and bandwidth are
measured with one process and with two, which take turns, of one thread each. Every figure is marked as measurement or
model. Memory is what `torch.distributed` tracks while fake tensors go through two training steps. The last line is
JSON.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import tyro
from measure import DEVICE, PRECISION, print_result
from torch import nn

from nets.factory import build_model
from nets.vit import VisionTransformer
from utils.config.train_config import TrainConfig
from utils.data.preprocessing import Preprocessing
from utils.modeling.pixel_network import PixelNetwork
from utils.system.runtime import has_other_ranks, runtime
from utils.training.optimizer import build_optimizer
from utils.training.parts import Parts
from utils.training.sharding import shard_network
from utils.training.trainer import Trainer

CONFIG = TrainConfig(drop_rate=0.0, attn_drop_rate=0.0, drop_path_rate=0.0).with_defaults()
RATES = {"drop_rate": 0.0, "attn_drop_rate": 0.0, "drop_path_rate": 0.0}
NETWORK = "vit_s_16"
MICRO_BATCH = 4
"""Images of each micro-batch when steps are measured."""
MESSAGE_BYTES = [4_000, 40_000, 400_000, 4_000_000, 40_000_000, 100_000_000]
LARGE = {"ViT-L/16": (16, 1024, 24, 16), "ViT-H/14": (14, 1280, 32, 16), "ViT-g/14": (14, 1408, 40, 16)}
"""Patch size, features, blocks, heads."""
GIB = 2**30


class Messages(NamedTuple):
    """Seconds before a message arrives, and bytes per second."""

    latency: float
    bandwidth: float

    def seconds(self, ranks: int, size: int) -> float:
        """The time in which gradients of `size` bytes are added."""
        return 2 * (ranks - 1) * (self.latency + size / (ranks * self.bandwidth))


def fit(ranks: int, measured: dict[int, float]) -> Messages:
    """Latency and bandwidth with the least squares of relative errors, of seconds by bytes."""
    sizes, seconds = np.array(list(measured)), np.array(list(measured.values()))
    terms = 2 * (ranks - 1) * np.stack([np.ones(len(sizes)), sizes / ranks], axis=1)
    (latency, per_byte), *_ = np.linalg.lstsq(terms / seconds[:, None], np.ones(len(sizes)), rcond=None)
    return Messages(max(float(latency), 0.0), 1 / float(per_byte))


def median_time(task: Callable[[], object], repeats: int) -> float:
    """The median time of a task, which all ranks start together."""
    times = []
    for _ in range(repeats + 1):
        runtime.gather(None)
        started = time.perf_counter()
        task()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def add_vectors(size: int) -> None:
    """Exchange slices of `size` bytes and collect them, as a step does."""
    width = size // 4 // runtime.world_size
    slices = [torch.zeros(1, width)] * runtime.world_size
    received = runtime.exchange(slices, [(1, width)] * runtime.world_size)
    runtime.join_slices(received[0][0])


def step_time(count: int, micro_batch: int, repeats: int = 5) -> float:
    """Seconds of an exact training step of so many micro-batches."""
    model = build_model(NETWORK, 10, CONFIG.input_shape, **RATES)
    network = PixelNetwork(model, Preprocessing.from_config(CONFIG), DEVICE).train()
    parts = Parts.of_rank(count, runtime.rank, runtime.world_size)
    trainer = Trainer(network, DEVICE, PRECISION, seed=0, parts=parts)
    optimizer = build_optimizer(model, CONFIG, 1e-4)
    rows = parts.rows(total := count * micro_batch)
    pixels = torch.randint(0, 256, (rows.stop - rows.start, 3, *CONFIG.input_shape), dtype=torch.uint8)
    targets = torch.arange(len(pixels)) % 10
    return median_time(lambda: trainer.train_step(pixels, targets, optimizer, total)[0].item(), repeats)


def measure_rank(file: Path) -> None:
    """Measure in this rank; rank 0 writes the figures."""
    with runtime.joined():
        figures = {
            "micro-batches": {count: step_time(count, MICRO_BATCH) for count in (2, 4, 8)},
            "messages": {size: median_time(lambda size=size: add_vectors(size), 20) for size in MESSAGE_BYTES}
            if runtime.world_size > 1
            else {},
            # The price of micro-batches: the same 16 images.
            "16 images": {count: step_time(count, 16 // count) for count in (1, 4, 16)}
            if runtime.world_size == 1
            else {},
        }
        if runtime.is_main:
            file.write_text(json.dumps(figures), encoding="utf-8")


def measure(ranks: int) -> dict[str, dict[int, float]]:
    """Measure with so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([*torchrun, __file__, "--rank-file", str(file)], check=True, env=environment)
        found = json.loads(file.read_text(encoding="utf-8"))
    return {name: {int(key): value for key, value in times.items()} for name, times in found.items()}


def print_measured(turns: int) -> tuple[Messages, float, float, int]:
    """Measure here and print; return messages, seconds of a micro-batch, of the rest, and bytes of gradients."""
    rounds = [(measure(1), measure(2)) for _ in range(turns)]

    def spread(side: int, name: str, key: int) -> list[float]:
        return sorted(figures[side][name][key] for figures in rounds)

    size = 4 * sum(weight.numel() for weight in build_model(NETWORK, 10, CONFIG.input_shape).parameters())
    messages = fit(2, {key: statistics.median(spread(1, "messages", key)) for key in MESSAGE_BYTES})
    for key in MESSAGE_BYTES:
        times = spread(1, "messages", key)
        print(
            f"{key:>11,} bytes added by 2 ranks: {format_times(times)} (measurement), "
            f"{1000 * messages.seconds(2, key):.2f} ms (model)"
        )
    for key in (1, 4, 16):
        print(f"16 images in {key} micro-batches, 1 rank: {format_times(spread(0, '16 images', key))} (measurement)")
    medians = {key: statistics.median(spread(0, "micro-batches", key)) for key in (2, 4, 8)}
    micro_batch = (medians[8] - medians[4]) / 4
    rest = medians[4] - 4 * micro_batch
    for ranks in (1, 2):
        for key in (4, 8):
            model = plan_step(ranks, key, micro_batch, rest, size, messages, 0.0)
            times = spread(ranks - 1, "micro-batches", key)
            measured = f"{format_times(times)} (measurement), {1000 * model:.0f} ms (model)"
            print(f"{key} micro-batches, {ranks} rank(s): {measured}")
    return messages, micro_batch, rest, size


def format_times(times: Sequence[float]) -> str:
    """The median with the range, in ms."""
    return f"{1000 * statistics.median(times):.2f} ms ({1000 * times[0]:.2f} to {1000 * times[-1]:.2f})"


def plan_step(
    ranks: int, count: int, micro_batch: float, rest: float, size: int, messages: Messages, overlap: float
) -> float:
    """Seconds of a step according to the model."""
    return -(-count // ranks) * micro_batch + rest + max(0.0, messages.seconds(ranks, size) - overlap)


def track_memory(name: str, ranks: int, images: int) -> float:
    """Peak bytes of a rank with divided weights, for a step on `images` of 224 x 224 pixels, in bf16. A model: the
    tensors are fake, and an allocator needs some more."""
    import torch.distributed as dist
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    patch_size, features, depth, heads = LARGE[name]
    with torch.device("meta"):
        model = VisionTransformer((224, 224), patch_size, 1000, features, depth, heads, **RATES)
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    mesh = init_device_mesh("cpu", (ranks,))
    with (
        patch.object(runtime, "world_size", ranks),
        patch("torch.distributed.device_mesh.init_device_mesh", lambda *_: mesh),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        model.to_empty(device="cpu")
        shard_network(model, Parts.of_rank(ranks, 0, ranks), exact=False, precision="bf16")
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        pixels = torch.empty(images, 3, 224, 224)
        tracker = FSDPMemTracker(model, optimizer)
        tracker.track_inputs((pixels,))
        with tracker:
            for _ in range(2):  # the first one creates the optimizer's state
                train_once(model, optimizer, pixels)
                tracker.reset_mod_stats()  # of modules; the peak stays
        (peak,) = tracker.get_tracker_snapshot("peak").values()
    dist.destroy_process_group()
    return peak["Total"]


def train_once(model: nn.Module, optimizer: torch.optim.Optimizer, pixels: torch.Tensor) -> None:
    """A training step."""
    model(pixels).float().logsumexp(dim=1).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def main(
    ranks: Sequence[int] = (1, 2, 8, 64, 256, 1024),
    micro_batches: int = 1024,
    latency: float | None = None,
    bandwidth: float | None = None,
    micro_batch: float | None = None,
    overlap: float = 0.0,
    size: int = 4 * 304_000_000,
    turns: int = 3,
    memory: bool = False,
    images: int = 32,
    rank_file: Path | None = None,
) -> None:
    """Measure and plan steps, or plan memory.

    Args:
        ranks: numbers of ranks to plan for.
        micro_batches: of each global batch.
        latency: seconds of a message; with bandwidth and micro_batch nothing is measured here.
        bandwidth: bytes per second of a message.
        micro_batch: seconds of a micro-batch.
        overlap: seconds of the sum that overlap with computing; 0 with reduce="exact".
        size: bytes of the gradients.
        turns: measurements with each number of processes.
        memory: plan memory instead.
        images: images of a rank, for memory.
        rank_file: used by the processes that this script starts.
    """
    if rank_file:
        measure_rank(rank_file)
        return
    assert not has_other_ranks(), "start it without torchrun"
    if memory:
        planned = {name: {count: track_memory(name, count, images) for count in ranks} for name in LARGE}
        for name, peaks in planned.items():
            row = ", ".join(f"{count}: {peak / GIB:.1f} GiB" for count, peak in peaks.items())
            print(f"{name}, {images} images a rank, by ranks: {row} (model)")
        print_result("scale", memory_bytes=planned)
        return
    rest = 0.0
    if None in (latency, bandwidth, micro_batch):
        messages, micro_batch, rest, size = print_measured(turns)
    else:
        messages = Messages(latency, bandwidth)
    alone = plan_step(1, micro_batches, micro_batch, rest, size, messages, overlap)
    steps = {count: plan_step(count, micro_batches, micro_batch, rest, size, messages, overlap) for count in ranks}
    for count, seconds in steps.items():
        efficiency = alone / count / seconds
        print(
            f"{count:>5} ranks: {seconds:10.3f} s per step of {micro_batches} micro-batches, {efficiency:.0%} (model)"
        )
    print_result("scale", latency=messages.latency, bandwidth=messages.bandwidth, seconds=steps)


if __name__ == "__main__":
    tyro.cli(main)
