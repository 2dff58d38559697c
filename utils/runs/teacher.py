"""A trained network as the teacher of another one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from nets.factory import restore_model
from nets.weights.digest import digest_file
from utils.config.train_config import TrainConfig
from utils.data.preprocessing import Preprocessing
from utils.modeling.pixel_network import PixelNetwork, cast_for_inference
from utils.modeling.precision import autocast
from utils.runs.checkpoint import BEST, load_checkpoint
from utils.system.text import shorten_list


class Teacher:
    """Maps images to the logits of a trained network, for the classes of its student.

    Args:
        network: in eval mode.
        input_shape: height and width of the images that it takes.
        order: (classes,), its class id of each class of the student.
        precision: of matrix products.
        digest: SHA-256 of its checkpoint.
    """

    def __init__(
        self, network: PixelNetwork, input_shape: tuple[int, int], order: Sequence[int], precision: str, digest: str
    ) -> None:
        self.network = network
        self.input_shape = input_shape
        self.order = torch.tensor(order, device=next(network.parameters()).device)
        self.precision = precision
        self.digest = digest

    @torch.no_grad()  # not inference mode, whose tensors can't take part in the student's gradient
    def __call__(self, pixels: Tensor) -> Tensor:
        """Logits (B, classes), fp32, of the student's images, (B, 3, height, width) uint8, resized if necessary."""
        if tuple(pixels.shape[-2:]) != self.input_shape:
            resized = F.interpolate(pixels.float(), self.input_shape, mode="bilinear", antialias=True)
            pixels = resized.round_().clamp_(0, 255).to(torch.uint8)
        with autocast(pixels.device, self.precision):
            return self.network(pixels).float().index_select(1, self.order)


def find_teacher(config: TrainConfig) -> Path:
    """The checkpoint that `distill_from` selects. A folder of runs isn't searched, since a newer run would change it.

    Raises:
        FileNotFoundError: there is none.
    """
    place = Path(config.distill_from)
    file = place if place.is_file() else place / BEST
    if not file.is_file():
        raise FileNotFoundError(
            f"distill_from={config.distill_from!r}: must be the folder of a run that has {BEST}, or a checkpoint"
        )
    return file


def check_teacher_classes(config: TrainConfig, names: Sequence[str], class_names: Sequence[str]) -> None:
    """Raise a ValueError if a class of the student isn't among the `names` of the teacher's."""
    if missing := sorted(set(class_names) - set(names)):
        raise ValueError(
            f"distill_from={config.distill_from!r}: it doesn't know the classes {shorten_list(missing)}; train it on "
            f"the same classes first"
        )


def load_teacher(
    config: TrainConfig, class_names: Sequence[str], device: torch.device, precision: str
) -> Teacher | None:
    """The teacher that `distill_from` selects; None: there is none.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it is damaged, or its classes aren't those of the student.
    """
    if not config.distill_from:
        return None
    path = find_teacher(config)
    checkpoint = load_checkpoint(path, training_state=False)
    names = checkpoint["class_names"]
    check_teacher_classes(config, names, class_names)
    try:
        model = restore_model(checkpoint["model"], checkpoint["weights"])
        preprocessing = Preprocessing.from_dict(checkpoint["preprocessing"])
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(f"distill_from: {path} can't be used: its contents are inconsistent ({error})") from error
    network = cast_for_inference(PixelNetwork(model, preprocessing, device), precision).eval()
    order = [names.index(name) for name in class_names]
    return Teacher(network, preprocessing.input_shape, order, precision, digest_file(path))
