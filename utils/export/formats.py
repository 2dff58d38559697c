"""The formats that a classifier is exported in: how each is written, and opened again to be checked."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import safetensors.torch
import torch

from nets.factory import restore_model
from nets.weights.seal import digest_file
from utils.export.check import Exported, by_checkpoint
from utils.export.graph import trace
from utils.export.onnx_write import make_onnx
from utils.inference.classifier import WEIGHTS_SUFFIX, Classifier, read_exported
from utils.inference.exported_metadata import ExportedMetadata
from utils.inference.onnx_classifier import open_onnx
from utils.inference.onnx_file import MAX_BYTES
from utils.modeling.pixel_network import PixelNetwork
from utils.system.files import format_bytes, write_json

STEMS = {"fp32": "model", "fp16": "model_fp16", "int8": "model_int8"}


class Format(NamedTuple):
    """A format.

    Attributes:
        suffix: of its files.
        write: writes a classifier that is in fp32 on the CPU to an open file.
        open: opens such a file, by its path, to compare it with the classifier.
    """

    suffix: str
    write: Callable[[Classifier, ExportedMetadata, BinaryIO], None]
    open: Callable[[Path, Classifier], Exported]


def describe_export(classifier: Classifier, checkpoint: Path, precision: str) -> ExportedMetadata:
    """What the file says of itself that a checkpoint is exported to now."""
    provenance = {
        "checkpoint": checkpoint.name,
        "checkpoint_sha256": digest_file(checkpoint),
        "run": checkpoint.resolve().parent.name,
        "torch": str(torch.__version__),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "precision": precision,
    }
    model = classifier.network.model.arguments
    return ExportedMetadata(classifier.class_names, classifier.preprocessing, classifier.temperature, provenance, model)


def write_onnx(classifier: Classifier, facts: ExportedMetadata, file: BinaryIO) -> None:
    """One file of ONNX, in the precision that `facts` has.

    Raises:
        ValueError: it would be larger than such a file can be.
    """
    precision = facts.provenance["precision"]
    size = sum(p.numel() for p in classifier.network.parameters()) * (2 if precision == "fp16" else 4)
    if size > MAX_BYTES:
        remedy = "--format pt2" if precision == "fp16" else "--precision fp16, which takes half, or --format pt2"
        raise ValueError(
            f"format=onnx: the weights take {format_bytes(size)}, and one file of ONNX holds "
            f"{format_bytes(MAX_BYTES)}: take {remedy}"
        )
    file.write(make_onnx(trace(classifier), facts))


def run_onnx(path: Path, classifier: Classifier) -> Exported:
    """Such a file in ONNX Runtime, on the processor."""
    exported = open_onnx(path)
    return lambda pixels: exported.probabilities(pixels[None])[0]


def write_pt2(classifier: Classifier, facts: ExportedMetadata, file: BinaryIO) -> None:
    """A file of `torch.export`, with what it says of itself as its extra files."""
    with warnings.catch_warnings():
        # Of weights that are views of one tensor; that all of them arrive is what the check is for.
        warnings.filterwarnings("ignore", "No complete tensor found")
        torch.export.save(trace(classifier), file, extra_files=facts.as_strings())


def run_pt2(path: Path, classifier: Classifier) -> Exported:
    """Such a file in torch."""
    with path.open("rb") as file:
        network = torch.export.load(file).module()

    @torch.inference_mode()
    def run(pixels: np.ndarray) -> np.ndarray:
        return network(torch.tensor(pixels)[None])[0].numpy()

    return run


def write_safetensors(classifier: Classifier, facts: ExportedMetadata, file: BinaryIO) -> None:
    """The weights alone, in the precision that `facts` has, which `model_path` of train.py and predict.py takes; its
    header holds what builds their network."""
    dtype = torch.float16 if facts.provenance["precision"] == "fp16" else torch.float32
    weights = {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in classifier.network.model.state_dict().items()
    }
    file.write(safetensors.torch.save(weights, facts.as_strings()))


def run_safetensors(path: Path, classifier: Classifier) -> Exported:
    """The weights as train.py and predict.py read them, in a new network."""
    content = read_exported(path)
    model = restore_model(content["model"], content["weights"])
    network = PixelNetwork(model, classifier.preprocessing, classifier.device).eval().requires_grad_(False)
    reloaded = replace(classifier, network=network, temperature=content["temperature"])
    return lambda pixels: by_checkpoint(reloaded, pixels)


def write_card(path: Path, facts: ExportedMetadata) -> None:
    """The JSON card beside a file of weights: all that there is to know besides them."""
    card = facts.as_dict() | {"weights": path.name, "weights_sha256": digest_file(path)}
    write_json(path.with_suffix(".json"), card)


FORMATS: dict[str, Format] = {
    "onnx": Format(".onnx", write_onnx, run_onnx),
    "pt2": Format(".pt2", write_pt2, run_pt2),
    "safetensors": Format(WEIGHTS_SUFFIX, write_safetensors, run_safetensors),
}
