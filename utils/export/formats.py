"""Export formats: how to write each, and how to open it again for the check."""

from __future__ import annotations

import io
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
from nets.weights.digest import digest_file
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
    """How to write a classifier, which must be in fp32 on the CPU, and how to open the file for the check."""

    suffix: str
    write: Callable[[Classifier, ExportedMetadata, BinaryIO], None]
    open: Callable[[Path, Classifier], Exported]


def describe_export(classifier: Classifier, checkpoint: Path, precision: str) -> ExportedMetadata:
    """The metadata of an exported file, including its provenance."""
    provenance = {
        "checkpoint": _valid_text(checkpoint.name),
        "checkpoint_sha256": digest_file(checkpoint),
        "run": _valid_text(checkpoint.resolve().parent.name),
        "torch": str(torch.__version__),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "precision": precision,
    }
    model = classifier.network.model.arguments
    return ExportedMetadata(classifier.class_names, classifier.preprocessing, classifier.temperature, provenance, model)


def _valid_text(name: str) -> str:
    """Return a file name with undecodable bytes as escapes: metadata is UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()


def write_onnx(classifier: Classifier, metadata: ExportedMetadata, file: BinaryIO) -> None:
    """Write an ONNX file in the precision of `metadata`.

    Raises:
        ValueError: the weights exceed the maximum size of an ONNX file.
    """
    precision = metadata.provenance["precision"]
    size = sum(p.numel() for p in classifier.network.parameters()) * (2 if precision == "fp16" else 4)
    if size > MAX_BYTES:
        remedy = "--format pt2" if precision == "fp16" else "--precision fp16 (half the size) or --format pt2"
        raise ValueError(
            f"format=onnx: the weights take {format_bytes(size)}, an ONNX file can hold {format_bytes(MAX_BYTES)}; "
            f"use {remedy}"
        )
    file.write(make_onnx(trace(classifier), metadata))


def open_onnx_file(path: Path, classifier: Classifier) -> Exported:
    """Open an ONNX file in ONNX Runtime on the CPU."""
    exported = open_onnx(path)
    return lambda pixels: exported.probabilities(pixels[None])[0]


def write_pt2(classifier: Classifier, metadata: ExportedMetadata, file: BinaryIO) -> None:
    """Write a `torch.export` file, with the metadata as its extra files."""
    buffer = io.BytesIO()  # on a full disk, torch's writer would end the process
    with warnings.catch_warnings():
        # A warning about weights that are views of one tensor; the check shows that they are saved correctly.
        warnings.filterwarnings("ignore", "No complete tensor found")
        torch.export.save(trace(classifier), buffer, extra_files=metadata.as_strings())
    file.write(buffer.getbuffer())


def open_pt2(path: Path, classifier: Classifier) -> Exported:
    """Open a `torch.export` file."""
    with path.open("rb") as file:
        network = torch.export.load(file).module()

    @torch.inference_mode()
    def run(pixels: np.ndarray) -> np.ndarray:
        return network(torch.tensor(pixels)[None])[0].numpy()

    return run


def write_safetensors(classifier: Classifier, metadata: ExportedMetadata, file: BinaryIO) -> None:
    """Write the weights in the precision of `metadata`, for `model_path` of train.py and predict.py.

    The header has the metadata, which includes the arguments that build the network.
    """
    dtype = torch.float16 if metadata.provenance["precision"] == "fp16" else torch.float32
    weights = {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in classifier.network.model.state_dict().items()
    }
    file.write(safetensors.torch.save(weights, metadata.as_strings()))


def open_safetensors(path: Path, classifier: Classifier) -> Exported:
    """Load the weights into a new network, as predict.py does."""
    content = read_exported(path)
    model = restore_model(content["model"], content["weights"])
    network = PixelNetwork(model, classifier.preprocessing, classifier.device).eval().requires_grad_(False)
    reloaded = replace(classifier, network=network, temperature=content["temperature"])
    return lambda pixels: by_checkpoint(reloaded, pixels)


def write_card(path: Path, metadata: ExportedMetadata) -> None:
    """Write the JSON card beside a weights file: the metadata and the file's digest."""
    card = metadata.as_dict() | {"weights": path.name, "weights_sha256": digest_file(path)}
    write_json(path.with_suffix(".json"), card)


FORMATS: dict[str, Format] = {
    "onnx": Format(".onnx", write_onnx, open_onnx_file),
    "pt2": Format(".pt2", write_pt2, open_pt2),
    "safetensors": Format(WEIGHTS_SUFFIX, write_safetensors, open_safetensors),
}
