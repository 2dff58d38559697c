"""Milliseconds of a training step beside other processes, by the way in which OpenMP's threads wait for each other.

    python benchmarks/busy_machine.py

ViT-S/16 at 112 pixels, batch size 16, bf16, on all cores. Each way of waiting is measured on the idle machine, beside
one process that keeps a core busy, and beside five. All take turns, each in a process of its own; printed are the
medians over the rounds with the lowest and highest. The last line is JSON.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tyro

WAYS = {
    "OpenMP's own": {},
    "spin 100": {"GOMP_SPINCOUNT": "100"},
    "spin 1,000": {"GOMP_SPINCOUNT": "1000"},
    "spin 10,000": {"GOMP_SPINCOUNT": "10000"},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
LOADS = {"idle": 0, "beside 1": 1, "beside 5": 5}
WARM_UP = 3
"""Steps before the measured ones."""


def main(
    ways: tuple[str, ...] = tuple(WAYS), loads: tuple[str, ...] = tuple(LOADS), rounds: int = 3, steps: int = 8
) -> None:
    """Measure all `ways` under all `loads` in turn.

    Args:
        ways: names of ways to wait.
        loads: names of loads.
        rounds: how often each is measured.
        steps: training steps in each measurement, of which the median counts.
    """
    times: dict[str, dict[str, list[float]]] = {way: {load: [] for load in loads} for way in ways}
    for _ in range(rounds):
        for load in loads:
            for way in ways:
                with busy(LOADS[load]):
                    milliseconds = measure(WAYS[way], steps)
                times[way][load].append(milliseconds)
                print(f"{load:10} {way:14} {milliseconds:7.0f} ms", flush=True)
    for way in ways:
        row = (f"{statistics.median(ms):.0f} ({min(ms):.0f} to {max(ms):.0f})" for ms in times[way].values())
        print(f"{way:14}", *(f"{cell:>24}" for cell in row))
    print(json.dumps(times))


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """A context beside which this many processes keep a core busy each."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def measure(variables: dict[str, str], steps: int) -> float:
    """Milliseconds of a training step in a new process with these environment variables."""
    command = [sys.executable, "-c", f"import busy_machine; busy_machine.time_steps({steps})"]
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES} | variables
    folder = Path(__file__).resolve().parent
    output = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout
    return float(output.split()[-1])


def time_steps(steps: int) -> None:
    """Print the median of the milliseconds of some training steps."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import torch

    from nets.factory import build_model
    from utils.config.train_config import TrainConfig
    from utils.data.preprocessing import Preprocessing
    from utils.modeling.pixel_network import PixelNetwork
    from utils.training.optimizer import build_optimizer
    from utils.training.trainer import Trainer

    device = torch.device("cpu")
    config = TrainConfig(input_shape=(112, 112)).with_defaults()
    model = build_model("vit_s_16", 10, config.input_shape)
    network = PixelNetwork(model, Preprocessing.from_config(config), device)
    trainer = Trainer(network, device, "bf16", seed=0)
    optimizer = build_optimizer(model, config, 1e-4)
    network.train()
    pixels = torch.randint(0, 256, (16, 112, 112, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    class_ids = torch.arange(16) % 10
    milliseconds = []
    for _ in range(WARM_UP + steps):
        started = time.perf_counter()
        trainer.train_step(pixels, class_ids, optimizer)[0].item()
        milliseconds.append(1000 * (time.perf_counter() - started))
    print(statistics.median(milliseconds[WARM_UP:]))


if __name__ == "__main__":
    tyro.cli(main)
