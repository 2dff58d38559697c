"""What is about to be trained, printed before it is."""

from __future__ import annotations

import math
import statistics

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nets.wrapped import OWN
from utils.config.train_config import TrainConfig
from utils.data.image_io import ImageError, read_size
from utils.data.image_list import ImageList
from utils.training.stages import Stage


def format_config(config: TrainConfig) -> str:
    """All fields and their values as a table."""
    fields = config.as_dict()
    width = max(map(len, fields))
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in fields.items())


def count_flops(model: nn.Module) -> int:
    """Floating-point operations of a forward of one image; a multiplication and an addition count as two.

    `model` is on the meta device, so that nothing is computed.
    """
    image = torch.empty(1, 3, *model.arguments["input_shape"], device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(image)
    return counter.get_total_flops()


def format_model(model: nn.Module, stages: list[Stage]) -> str:
    """Parameters of each part, how many of them each stage trains, and the FLOPs of a forward.

    `model` is a network of its own on the meta device, for it goes through the stages here.
    """
    parts: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        parts.setdefault(name.removeprefix(OWN).split(".")[0], []).append(parameter)
    table = {"parameters": [sum(p.numel() for p in part) for part in parts.values()]}
    for number, stage in enumerate(stages, start=1):
        stage.freeze(model)
        table[f"trained in stage {number}"] = [
            sum(p.numel() for p in part if p.requires_grad) for part in parts.values()
        ]
    columns = [[*counts, sum(counts)] for counts in table.values()]
    lines = ["  " + " " * 12 + "".join(f"{title:>20}" for title in table)]
    for row, name in enumerate([*parts, "all"]):
        lines.append(f"  {name:<12}" + "".join(f"{column[row]:>20,}" for column in columns))
    return "\n".join([*lines, f"  forward of an image: {count_flops(model) / 1e9:.3g} GFLOPs"])


def format_stages(stages: list[Stage], num_images: int) -> str:
    """A line a stage: its epochs, steps, frozen part and learning rates."""
    lines = []
    for number, stage in enumerate(stages, start=1):
        part = {"all": "all but the head", "nothing": "nothing"}.get(
            stage.frozen, f"embeddings or stem, and {stage.frozen} blocks"
        )
        steps, left = divmod(num_images, stage.batch_size)
        highest = max(map(stage.learning_rate, np.linspace(stage.start, stage.end, 1000, endpoint=False)))
        sitting_out = f" ({left} sit out, others each time)" if left else ""
        lines.append(
            f"  stage {number}: epochs {stage.start + 1} to {stage.end}, {stage.input_shape[0]} x "
            f"{stage.input_shape[1]} pixels, frozen: {part}; {steps} steps of "
            f"{stage.batch_size} images an epoch{sitting_out}; learning rate "
            f"up to {highest:.2g}, down to {stage.learning_rate(stage.end):.2g}"
        )
    return "\n".join(lines)


def warn_of_input_shape(images: ImageList, input_shape: tuple[int, int], max_pixels: int) -> None:
    """Say so when `input_shape` is meant for tiny images and those of `images` are photos, or the other way round."""
    areas = []
    for index in range(0, len(images), max(1, len(images) // 20)):
        try:
            areas.append(math.prod(read_size(images.path(index), max_pixels)))
        except ImageError as error:
            print(f"warning: {error}")
    if not areas:
        return
    theirs, shown = statistics.median(areas), math.prod(input_shape)
    if max(input_shape) < 100 and theirs > 16 * shown:
        print(
            f"warning: the images have some {theirs / 1e3:.0f} thousand pixels, and input_shape {input_shape} shows "
            f'the network {shown} of them; README.md, "Your own images", has the settings for photos'
        )
    if shown > 16 * theirs:
        print(
            f"warning: the images have some {theirs:.0f} pixels, and input_shape {input_shape} enlarges them to "
            f"{shown}; half of it takes a quarter of the time, in which more epochs may do better"
        )
