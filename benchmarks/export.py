"""Exported files: their sizes, and ONNX Runtime's speed against PyTorch's, in turn, on the processor.

    python benchmarks/export.py

One image at a time, of 500 x 375 pixels and in memory, from pixels to probabilities: the exported file by itself,
and Thaw's classifier, whose resize is Pillow's, in fp32 and, where the processor has it, bf16. The weights are random,
which costs what trained ones do. The last line is JSON.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import tyro
from measure import finish, in_turn, medians, show
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
    """A classifier with random weights, the same in every precision, as `load_classifier` puts it together."""
    torch.manual_seed(0)
    preprocessing = Preprocessing.from_config(CONFIG)
    model = build_model(name, CLASSES, CONFIG.input_shape)
    network = cast_for_inference(PixelNetwork(model, preprocessing, CPU), precision).eval()
    names = [str(i) for i in range(CLASSES)]
    return Classifier(network, preprocessing, EvalTransform(preprocessing), names, CPU, precision)


def torch_work(name: str, precision: str, pixels: np.ndarray) -> Callable[[], int]:
    """An image through Thaw's classifier."""
    classifier = make_classifier(name, precision)
    return lambda: len(classifier.probabilities(classifier.transform(Image.fromarray(pixels))[None]))


def onnx_work(name: str, precision: str, pixels: np.ndarray, folder: str) -> tuple[Callable[[], int], int]:
    """An image through an exported file, and the file's bytes."""
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
        repeats: images through each, in turn, after two that aren't counted; the median counts.
    """
    pixels = np.random.default_rng(0).integers(0, 256, (375, 500, 3), dtype=np.uint8)
    ratios: dict[str, float | None] = {}
    sizes, rates = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name in NETWORKS:
            if name not in BACKBONES:
                print(f"{name} is left out: there is no such network here")
                continue
            made = {f"onnx {precision}": onnx_work(name, precision, pixels, folder) for precision in EXPORTS}
            works = {f"torch {precision}": torch_work(name, precision, pixels) for precision in PRECISIONS}
            times = in_turn(works | {key: work for key, (work, _) in made.items()}, repeats, warm_ups=2)
            show(name, times)
            found = medians(times)
            sizes[name] = {key: round(size / 1e6, 2) for key, (_, size) in made.items()}
            print(f"{name:<20}MB: {', '.join(f'{key} {size}' for key, size in sizes[name].items())}")
            rates[name] = {key: round(1 / seconds, 2) for key, seconds in found.items()}
            for key in made:
                ratios[f"{name}_{key.replace(' ', '_')}_vs_torch_fp32"] = found["torch fp32"] / found[key]
    finish("export", ratios, images_per_second=rates, megabytes=sizes)


if __name__ == "__main__":
    tyro.cli(main)
