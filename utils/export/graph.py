"""What is exported: an image's pixels in, probabilities out, with nothing left to do outside."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from utils.export.pillow_resize import PixelResize
from utils.inference.classifier import Classifier
from utils.inference.exported_metadata import INPUT


class PixelClassifier(nn.Module):
    """Images (B, height, width, 3), uint8 RGB of any size, to probabilities (B, classes), fp32.

    What `Classifier.transform` does to images in memory, then the network, the temperature and the softmax.
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
    """The graph of a classifier that is in fp32 on the CPU; number, height and width of the images stay open."""
    assert (classifier.device.type, classifier.precision) == ("cpu", "fp32")
    example = torch.zeros(2, 37, 41, 3, dtype=torch.uint8)  # sizes that no side of a network has
    sizes = {0: Dim("batch"), 1: Dim("height"), 2: Dim("width")}
    program = torch.export.export(PixelClassifier(classifier).eval(), (example,), dynamic_shapes={INPUT: sizes})
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it names the folders of this machine
    return program
