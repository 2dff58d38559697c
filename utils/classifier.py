"""A checkpoint becomes a classifier: the only way in for evaluation and prediction."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from nets import TRANSFORMERS, build_model
from utils.checkpoint import find_checkpoint, load_checkpoint
from utils.device import DTYPES, autocast, choose_precision, pick_device, tune_kernels
from utils.transforms import EvalTransform, Normalise, Preprocessing


@dataclass(frozen=True)
class Classifier:
    """A trained network with all that it needs.

    Attributes:
        network: uint8 pixels (B, 3, height, width) to logits (B, classes), on `device`, in eval mode; it is called
            under `utils.device.autocast(device, precision)`.
        preprocessing: how it wants its pictures.
        transform: a picture to uint8 (3, height, width).
        class_names: name of each class id.
        device: where the network is.
        precision: the arithmetic: what the run was set to, as far as this device has it.
    """

    network: nn.Module
    preprocessing: Preprocessing
    transform: EvalTransform
    class_names: list[str]
    device: torch.device
    precision: str

    def load(self, path: str) -> Tensor:
        """A picture as the network wants it, uint8 (3, height, width). For one in memory there is `transform`.

        Raises:
            ImageError: the file can't be read.
        """
        return self.transform.resize(self.preprocessing.read(path, self.transform))

    @torch.inference_mode()
    def probabilities(self, pixels: Tensor) -> Tensor:
        """Probabilities (B, classes), fp32 on the CPU, of pictures (B, 3, height, width) uint8."""
        with autocast(self.device, self.precision):
            logits = self.network(pixels.to(self.device))
        return logits.float().softmax(dim=1).cpu()


def pixel_network(model: nn.Module, preprocessing: Preprocessing, device: torch.device) -> nn.Module:
    """`model` behind the normalisation that it expects: uint8 pixels (B, 3, height, width) to logits. On `device`, in
    the order of memory and with the kernels that suit it there."""
    convolutional = model.arguments["name"] not in TRANSFORMERS
    tune_kernels(device, convolutional)
    normalise = Normalise(preprocessing.image_mean, preprocessing.image_std)
    memory_format = torch.channels_last if convolutional else torch.preserve_format
    return nn.Sequential(normalise, model).to(device, memory_format=memory_format)


def cast_products(network: nn.Module, precision: str) -> nn.Module:
    """`network` with the weights of its matrix products in `precision`, for inference only.

    Under autocast it gives what it gave before, without casting every weight at every batch.
    """
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.to(DTYPES[precision])
    return network


def load_classifier(path: str | Path, device: str = "auto") -> Classifier:
    """Open a checkpoint, or the best one in a run's folder; nothing else is needed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it isn't one of Thaw's checkpoints, or there is no such device.
    """
    place = pick_device(device)
    checkpoint = load_checkpoint(find_checkpoint(str(path)))
    try:
        with torch.device("meta"):  # no time is spent on weights that are replaced at once
            model = build_model(**checkpoint["model"])
        model.load_state_dict(checkpoint["weights"], assign=True)
        preprocessing = Preprocessing.from_dict(checkpoint["preprocessing"])
        precision, _ = choose_precision(checkpoint["config"]["precision"], place)
    except (TypeError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path} can't be used: its parts don't fit together ({error})") from error
    return Classifier(
        network=cast_products(pixel_network(model, preprocessing, place), precision).eval(),
        preprocessing=preprocessing,
        transform=EvalTransform(preprocessing),
        class_names=checkpoint["class_names"],
        device=place,
        precision=precision,
    )
