"""Images per second of training, ViT-B/16 at 224 pixels: Thaw against timm's network in a plain loop.

    python benchmarks/train_step.py

Three cases: all trained; embeddings and 8 of 12 blocks frozen; all but the head frozen. timm runs in fp32, and with
bf16 autocast if the hardware supports it. Thaw has `precision="auto"`; its frozen stages train on cached features,
whose computation isn't timed. There is no dropout or stochastic depth. timm's pixels are normalized beforehand, Thaw's
in the step. Both take turns. The ceiling is the speed of the plain network's matrix products alone, at the best rate
measured here. Peak memory is measured in separate processes. The last line is JSON.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
import tyro
from measure import DEVICE, PEERS, PRECISION, medians, print_ratios, print_speeds, take_turns
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nets.factory import build_model
from utils.config.train_config import TrainConfig
from utils.data.feature_dataset import FeatureDataset
from utils.data.image_list import list_in_memory
from utils.data.loader import train_loader
from utils.data.preprocessing import Preprocessing
from utils.modeling.pixel_network import PixelNetwork, ThawedPart
from utils.modeling.precision import DTYPES, autocast
from utils.training.optimizer import build_optimizer
from utils.training.trainer import Trainer

CLASSES = 10
CONFIG = TrainConfig(drop_rate=0.0, attn_drop_rate=0.0, drop_path_rate=0.0, activation="gelu").with_defaults()
Task = Callable[[], int]


def thaw(frozen: int | str | None) -> tuple[nn.Module, Trainer, torch.optim.Optimizer]:
    """Thaw's network, trainer and optimizer."""
    rates = {"drop_rate": 0.0, "attn_drop_rate": 0.0, "drop_path_rate": 0.0}
    model = build_model("vit_b_16", CLASSES, CONFIG.input_shape, activation=CONFIG.activation, **rates)
    if frozen is not None:
        model.freeze_backbone(frozen)
    network = PixelNetwork(model, Preprocessing.from_config(CONFIG), DEVICE)
    return network, Trainer(network, DEVICE, PRECISION, seed=0), build_optimizer(model, CONFIG, 1e-4)


def thaw_full(batch_size: int) -> Task:
    """A training step of Thaw, nothing frozen."""
    network, trainer, optimizer = thaw(None)
    network.train()
    pixels = torch.randint(0, 256, (batch_size, *CONFIG.input_shape, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    targets = torch.arange(batch_size) % CLASSES

    def task() -> int:
        trainer.train_step(pixels, targets, optimizer)[0].item()
        return batch_size

    return task


def thaw_frozen(frozen: int | str, batch_size: int, steps: int) -> Task:
    """An epoch of Thaw on cached features, including the loader."""
    network, trainer, optimizer = thaw(frozen)
    trainer.network = ThawedPart(network)
    shape = (768,) if frozen == "all" else (network.model.pos_embed.shape[1], 768)
    features = torch.randn(1, steps * batch_size, *shape).to(DTYPES[PRECISION])
    dataset = FeatureDataset(features, list_in_memory((i % CLASSES, "image") for i in range(steps * batch_size)), 0)
    loader = train_loader(dataset, batch_size, num_workers=0)

    def task() -> int:
        epoch = trainer.start_epoch(loader, number=1)
        for inputs, targets in epoch.batches():
            epoch.record(*trainer.train_step(inputs, targets, optimizer))
        epoch.summary()
        trainer.finish_epoch()
        return steps * batch_size

    return task


def peer(name: str, frozen: int | str | None, batch_size: int) -> Task:
    """A step of timm's network with torch's AdamW."""
    precision = name.removeprefix("timm ")
    model = timm.create_model("vit_base_patch16_224", num_classes=CLASSES).to(DEVICE).train()
    if frozen is not None:
        model.requires_grad_(False)
        for part in (model.head,) if frozen == "all" else (*model.blocks[frozen:], model.norm, model.head):
            part.requires_grad_(True)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 1e-4, weight_decay=0.05)
    pixels = torch.randn(batch_size, 3, *CONFIG.input_shape, device=DEVICE)
    targets = torch.arange(batch_size, device=DEVICE) % CLASSES

    def task() -> int:
        with autocast(DEVICE, precision):
            loss = F.cross_entropy(model(pixels), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        return batch_size

    return task


def ceiling(batch_size: int) -> float:
    """Images per second of the matrix products of a training step alone."""
    rates = []
    for inputs, outputs in ((768, 2304), (768, 768), (768, 3072), (3072, 768)):
        a = torch.randn(batch_size * 197, inputs, device=DEVICE, dtype=DTYPES[PRECISION])
        b = torch.randn(inputs, outputs, device=DEVICE, dtype=DTYPES[PRECISION])
        seconds = []
        for _ in range(15):
            started = time.perf_counter()
            (a @ b)[0, 0].item()
            seconds.append(time.perf_counter() - started)
        rates.append(2 * a.numel() * outputs / statistics.median(seconds))
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = build_model("vit_b_16", CLASSES, CONFIG.input_shape)
        model.forward_head(model.forward_features(torch.empty(1, 3, *CONFIG.input_shape)))
    print(f"{'matrix products':<20}up to {max(rates) / 1e9:.0f} GFLOP/s in {PRECISION}", flush=True)
    return max(rates) / (3 * counter.get_total_flops())  # forward, gradients of inputs, gradients of weights


def peak_memory(name: str, batch_size: int) -> float:
    """Peak memory in GB of a process that takes three full steps."""
    command = [sys.executable, __file__, "--peak-of", name, "--batch-size", str(batch_size)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak_memory(name: str, batch_size: int) -> None:
    """Take three full steps and print the peak memory of this process, or of the GPU, in GB."""
    task = thaw_full(batch_size) if name == "thaw" else peer(name, None, batch_size)
    for _ in range(3):
        task()
    unit = 1 if sys.platform == "darwin" else 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    print((torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else resident) / 1e9)


def main(batch_size: int = 16, repeats: int = 5, peak_of: str = "") -> None:
    """Compare training steps.

    Args:
        batch_size: images per step.
        repeats: steps of each, after a warm-up.
        peak_of: only print the peak memory of thaw, "timm fp32" or "timm bf16".
    """
    if peak_of:
        print_peak_memory(peak_of, batch_size)
        return
    print(f"Thaw on {DEVICE} in {PRECISION}; {' and '.join(PEERS)}")
    # First, since child processes inherit the memory of this one as their peak.
    memory = {name: peak_memory(name, batch_size) for name in ("thaw", *PEERS)}
    print(f"{'peak memory':<20}" + ", ".join(f"{name} {gigabytes:.2f} GB" for name, gigabytes in memory.items()))
    ratios: dict[str, float | None] = dict.fromkeys(
        f"{case}_vs_timm_{precision}"
        for case in ("full", "frozen8", "frozen_all", "memory")
        for precision in ("bf16", "fp32")
    )
    figures = {}
    for title, frozen, make_thaw in (
        ("full", None, lambda: thaw_full(batch_size)),
        ("frozen8", 8, lambda: thaw_frozen(8, batch_size, steps=2)),
        ("frozen_all", "all", lambda: thaw_frozen("all", batch_size, steps=64)),
    ):
        times = take_turns({"thaw": make_thaw()} | {name: peer(name, frozen, batch_size) for name in PEERS}, repeats)
        print_speeds(title, times)
        seconds = medians(times)
        figures[title] = {name: round(1 / value, 2) for name, value in seconds.items()}
        for name in PEERS:
            ratios[f"{title}_vs_{name.replace(' ', '_')}"] = seconds[name] / seconds["thaw"]
    highest = ceiling(batch_size)
    ratios["ceiling_fraction"] = figures["full"]["thaw"] / highest
    for name in PEERS:
        ratios[f"memory_vs_{name.replace(' ', '_')}"] = memory["thaw"] / memory[name]
    print_ratios("train_step", ratios, images_per_second=figures | {"ceiling": round(highest, 2)}, peak_gb=memory)


if __name__ == "__main__":
    tyro.cli(main)
