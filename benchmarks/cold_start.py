"""Compare the time of `predict.py` on one image with that of importing torch and torchvision.

    python benchmarks/cold_start.py

Whole processes, in turn, with a checkpoint of ViT-B/16 as of a finished run, 0.35 GB. The last line is JSON.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
import tyro
from measure import medians, print_ratios, take_turns
from PIL import Image

from nets.factory import build_model
from utils.config.train_config import TrainConfig
from utils.data.preprocessing import Preprocessing
from utils.runs.checkpoint import save_checkpoint

ROOT = Path(__file__).resolve().parents[1]


def write_checkpoint(path: Path) -> None:
    """Write a checkpoint of ViT-B/16 like the best one of a finished run."""
    config = TrainConfig().with_defaults()
    model = build_model("vit_b_16", 10, config.input_shape)
    content = {
        "model": model.arguments,
        "weights": model.state_dict(),
        "class_names": [f"class {i}" for i in range(10)],
        "preprocessing": Preprocessing.from_config(config).as_dict(),
        "config": config.as_dict(),
        "calibration": {},
        "origin": {},
        "weights_in_training": {},
        "optimizer": {},
        "scaler": {},
        "epoch": 1,
        "step": 1,
        "epoch_losses": torch.zeros(0),
        "epoch_hits": torch.zeros(0),
        "micro_batches": 1,
        "best_val_loss": 1.0,
        "history": [],
        "finished": True,
        "lists": {},
        "environment": {},
    }
    save_checkpoint(path, content)


def run(command: list[str]) -> int:
    """Run a command, which processes one image."""
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    return 1


def main(repeats: int = 7) -> None:
    """Compare the two.

    Args:
        repeats: processes of each, after a warm-up.
    """
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, image = Path(folder, "best.safetensors"), Path(folder, "image.jpg")
        write_checkpoint(checkpoint)
        Image.effect_noise((500, 375), 50).convert("RGB").save(image)
        commands = {
            "import torch, torchvision": [sys.executable, "-c", "import torch, torchvision"],
            "predict.py": [sys.executable, "predict.py", str(image), "--model-path", str(checkpoint)],
        }
        times = take_turns({name: partial(run, command) for name, command in commands.items()}, repeats)
    seconds = medians(times)
    for name, values in times.items():
        print(f"{name:<28}{seconds[name]:6.2f} s ({min(values):.2f} to {max(values):.2f})")
    extra = seconds["predict.py"] - seconds["import torch, torchvision"]
    print_ratios("cold_start", {"seconds_over_torchvision_import": extra}, seconds=seconds)


if __name__ == "__main__":
    tyro.cli(main)
