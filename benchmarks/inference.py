"""Images a second in inference, ViT-B/16 at 224: Thaw's classifier against timm's network, in turn.

    python benchmarks/inference.py

timm runs as it comes, in fp32, and under bf16 autocast where the processor or GPU has bf16; Thaw chooses by itself.
Both under `torch.inference_mode`; timm's pixels are normalised beforehand, Thaw's in the network. The last line is
JSON.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import timm
import torch
import tyro
from measure import DEVICE, PEERS, PRECISION, finish, in_turn, medians, show

from nets.factory import build_model
from utils.config.train_config import TrainConfig
from utils.data.preprocessing import Preprocessing
from utils.data.transforms import EvalTransform
from utils.inference.classifier import Classifier
from utils.modeling.pixel_network import PixelNetwork, cast_for_inference
from utils.modeling.precision import autocast

CLASSES = 10
CONFIG = TrainConfig(activation="gelu").with_defaults()


def thaw(batch_size: int) -> Callable[[], int]:
    """A batch through Thaw's classifier, as `load_classifier` puts it together."""
    preprocessing = Preprocessing.from_config(CONFIG)
    model = build_model("vit_b_16", CLASSES, CONFIG.input_shape, activation=CONFIG.activation)
    network = cast_for_inference(PixelNetwork(model, preprocessing, DEVICE), PRECISION).eval()
    names = [str(i) for i in range(CLASSES)]
    classifier = Classifier(network, preprocessing, EvalTransform(preprocessing), names, DEVICE, PRECISION)
    pixels = torch.randint(0, 256, (batch_size, *CONFIG.input_shape, 3), dtype=torch.uint8).permute(0, 3, 1, 2)

    def work() -> int:
        return len(classifier.probabilities(pixels))

    return work


def peer(name: str, batch_size: int) -> Callable[[], int]:
    """A batch through timm's network."""
    precision = name.removeprefix("timm ")
    model = timm.create_model("vit_base_patch16_224", num_classes=CLASSES).to(DEVICE).eval()
    pixels = torch.randn(batch_size, 3, *CONFIG.input_shape)

    @torch.inference_mode()
    def work() -> int:
        with autocast(DEVICE, precision):
            logits = model(pixels.to(DEVICE))
        return len(logits.float().softmax(dim=1).cpu())

    return work


def main(batch_size: int = 32, repeats: int = 9) -> None:
    """Compare inference.

    Args:
        batch_size: images at a time.
        repeats: batches of each, in turn, after one that isn't counted; the median counts.
    """
    print(f"Thaw on {DEVICE} in {PRECISION}; {' and '.join(PEERS)}")
    times = in_turn({"thaw": thaw(batch_size)} | {name: peer(name, batch_size) for name in PEERS}, repeats)
    show(f"batch {batch_size}", times)
    found = medians(times)
    ratios = dict.fromkeys(f"batch{batch_size}_vs_timm_{precision}" for precision in ("bf16", "fp32"))
    for name in PEERS:
        ratios[f"batch{batch_size}_vs_{name.replace(' ', '_')}"] = found[name] / found["thaw"]
    rates = {name: round(1 / seconds, 2) for name, seconds in found.items()}
    finish("inference", ratios, images_per_second=rates)


if __name__ == "__main__":
    tyro.cli(main)
