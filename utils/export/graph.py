"""The exported graph: from an image's pixels to probabilities, preprocessing included."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from utils.export.pillow_resize import PixelResize
from utils.inference.classifier import Classifier
from utils.inference.exported_metadata import INPUT


class PixelClassifier(nn.Module):
    """Maps RGB images uint8 (B, height, width, 3) of any size to probabilities fp32 (B, classes).

    Preprocesses as `Classifier.transform` does images in memory, then applies network, temperature and softmax.
    """

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.resize = PixelResize(classifier.preprocessing)
        self.network = classifier.network
        self.temperature = classifier.temperature

    def forward(self, images: Tensor) -> Tensor:
        logits = self.network(self.resize(images))
        return (logits / self.temperature).softmax(dim=1)


def trace(classifier: Classifier) -> ExportedProgram:
    """Trace a classifier, which must be in fp32 on the CPU, with dynamic batch size, height and width."""
    assert (classifier.device.type, classifier.precision) == ("cpu", "fp32")
    example = torch.zeros(2, 37, 41, 3, dtype=torch.uint8)  # differs from all network sizes: none is specialized
    sizes = {0: Dim("batch"), 1: Dim("height"), 2: Dim("width")}
    program = torch.export.export(PixelClassifier(classifier).eval(), (example,), dynamic_shapes={INPUT: sizes})
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # contains local paths
    return program
