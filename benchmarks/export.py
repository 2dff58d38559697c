"""Size and speed of exported ONNX files, against PyTorch on the CPU.

    python benchmarks/export.py

From the pixels of one image of 500 x 375 to probabilities: with ONNX Runtime, and with Thaw's classifier, which resizes
with Pillow, in fp32 and, if the CPU supports it, bf16. The weights are random. The last line is JSON.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import tyro
from measure import medians, print_ratios, print_speeds, take_turns
from PIL import Image

from nets.factory import BACKBONES, build_model
from utils.config.train_config import TrainConfig
from utils.data.preprocessing import Preprocessing
from utils.data.transforms import EvalTransform
from utils.export.formats import write_onnx
from utils.inference.classifier import Classifier
from utils.inference.exported_metadata import ExportedMetadata
from utils.inference.onnx_classifier import open_onnx
from utils.modeling.pixel_network import PixelNetwork, cast_for_inference
from utils.modeling.precision import choose_precision

NETWORKS = ("vit_s_16", "resnet18")
CLASSES = 10
CONFIG = TrainConfig().with_defaults()
CPU = torch.device("cpu")
PRECISIONS = ["fp32"] + (["bf16"] if choose_precision("bf16", CPU)[0] == "bf16" else [])
EXPORTS = ("fp32", "fp16", "int8")


def make_classifier(name: str, precision: str) -> Classifier:
    """A classifier with random weights, the same in every precision, built as by `load_classifier`."""
    torch.manual_seed(0)
    preprocessing = Preprocessing.from_config(CONFIG)
    model = build_model(name, CLASSES, CONFIG.input_shape)
    network = cast_for_inference(PixelNetwork(model, preprocessing, CPU), precision).eval()
    names = [str(i) for i in range(CLASSES)]
    return Classifier(network, preprocessing, EvalTransform(preprocessing), names, CPU, precision)


def torch_task(name: str, precision: str, pixels: np.ndarray) -> Callable[[], int]:
    """Classify an image with Thaw's classifier."""
    classifier = make_classifier(name, precision)
    return lambda: len(classifier.probabilities(classifier.transform(Image.fromarray(pixels))[None]))


def onnx_task(name: str, precision: str, pixels: np.ndarray, folder: str) -> tuple[Callable[[], int], int]:
    """Classify an image with an exported file; also return the size of the file in bytes."""
    path = Path(folder, f"{name}_{precision}.onnx")
    classifier = make_classifier(name, "fp32")
    provenance = {"precision": precision}
    metadata = ExportedMetadata(classifier.class_names, classifier.preprocessing, 1.0, provenance, {"name": name})
    with path.open("wb") as file:
        write_onnx(classifier, metadata, file)
    exported = open_onnx(path)
    return lambda: len(exported.probabilities(pixels[None])), path.stat().st_size


def main(repeats: int = 15) -> None:
    """Compare exported files with the classifier.

    Args:
        repeats: images, after two warm-ups.
    """
    pixels = np.random.default_rng(0).integers(0, 256, (375, 500, 3), dtype=np.uint8)
    ratios: dict[str, float | None] = {}
    sizes, rates = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name in NETWORKS:
            if name not in BACKBONES:
                print(f"{name}: skipped, there is no such network")
                continue
            exports = {f"onnx {precision}": onnx_task(name, precision, pixels, folder) for precision in EXPORTS}
            tasks = {f"torch {precision}": torch_task(name, precision, pixels) for precision in PRECISIONS}
            times = take_turns(tasks | {key: task for key, (task, _) in exports.items()}, repeats, warm_ups=2)
            print_speeds(name, times)
            seconds = medians(times)
            sizes[name] = {key: round(size / 1e6, 2) for key, (_, size) in exports.items()}
            print(f"{name:<20}MB: {', '.join(f'{key} {size}' for key, size in sizes[name].items())}")
            rates[name] = {key: round(1 / value, 2) for key, value in seconds.items()}
            for key in exports:
                ratios[f"{name}_{key.replace(' ', '_')}_vs_torch_fp32"] = seconds["torch fp32"] / seconds[key]
    print_ratios("export", ratios, images_per_second=rates, megabytes=sizes)


if __name__ == "__main__":
    tyro.cli(main)
