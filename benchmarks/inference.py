"""Images per second of inference, ViT-B/16 at 224 pixels: Thaw's classifier against timm's network.

    python benchmarks/inference.py

timm runs in fp32, and with bf16 autocast if the hardware supports it; Thaw has `precision="auto"`. Both run in turn
under `torch.inference_mode`. timm's pixels are normalized beforehand, Thaw's in the network. The last line is JSON.
"""

from __future__ import annotations

from collections.abc import Callable

import timm
import torch
import tyro
from measure import DEVICE, PEERS, PRECISION, medians, print_ratios, print_speeds, take_turns

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
    """Classify a batch with Thaw's classifier, built as by `load_classifier`."""
    preprocessing = Preprocessing.from_config(CONFIG)
    model = build_model("vit_b_16", CLASSES, CONFIG.input_shape, activation=CONFIG.activation)
    network = cast_for_inference(PixelNetwork(model, preprocessing, DEVICE), PRECISION).eval()
    names = [str(i) for i in range(CLASSES)]
    classifier = Classifier(network, preprocessing, EvalTransform(preprocessing), names, DEVICE, PRECISION)
    pixels = torch.randint(0, 256, (batch_size, *CONFIG.input_shape, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    return lambda: len(classifier.probabilities(pixels))


def peer(name: str, batch_size: int) -> Callable[[], int]:
    """Classify a batch with timm's network."""
    precision = name.removeprefix("timm ")
    model = timm.create_model("vit_base_patch16_224", num_classes=CLASSES).to(DEVICE).eval()
    pixels = torch.randn(batch_size, 3, *CONFIG.input_shape)

    @torch.inference_mode()
    def task() -> int:
        with autocast(DEVICE, precision):
            logits = model(pixels.to(DEVICE))
        return len(logits.float().softmax(dim=1).cpu())

    return task


def main(batch_size: int = 32, repeats: int = 9) -> None:
    """Compare inference.

    Args:
        batch_size: images per batch.
        repeats: batches of each, after a warm-up.
    """
    print(f"Thaw on {DEVICE} in {PRECISION}; {' and '.join(PEERS)}")
    times = take_turns({"thaw": thaw(batch_size)} | {name: peer(name, batch_size) for name in PEERS}, repeats)
    print_speeds(f"batch {batch_size}", times)
    seconds = medians(times)
    ratios = dict.fromkeys(f"batch{batch_size}_vs_timm_{precision}" for precision in ("bf16", "fp32"))
    for name in PEERS:
        ratios[f"batch{batch_size}_vs_{name.replace(' ', '_')}"] = seconds[name] / seconds["thaw"]
    rates = {name: round(1 / value, 2) for name, value in seconds.items()}
    print_ratios("inference", ratios, images_per_second=rates)


if __name__ == "__main__":
    tyro.cli(main)
