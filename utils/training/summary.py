"""Tables of the settings, the network and the stages, printed before training."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nets.wrapped import NETWORK_PREFIX
from utils.config.recipe import Choice
from utils.config.train_config import SETTINGS, TrainConfig
from utils.data.image_io import ImageError, read_size
from utils.data.image_list import ImageList
from utils.system.text import count_of
from utils.training.stages import Stage


def format_settings(config: TrainConfig, asked: TrainConfig, choices: Sequence[Choice], all_fields: bool) -> str:
    """Format the settings that differ from the default, or all, one per line, with who or what set them.

    Args:
        config: the settings of the run.
        asked: the settings as the user wrote them.
        choices: those of the recipe, the weights and the network, including those that the user overrode.
        all_fields: include fields at their default.
    """
    chosen = {choice.field: choice for choice in choices}
    rows = []
    for name, spec in SETTINGS.items():
        value, own = getattr(config, name), getattr(asked, name)
        choice = chosen.get(name)
        by_user = own is not None and own == value and (own != spec.plain or (choice and choice.value != own))
        reason = ""
        if choice and choice.by == "network":
            value, reason = f"{value} -> {choice.value}", f"network: {choice.reason}"
        elif by_user:
            reason = "you" if not choice or choice.value == own else f"you (recipe: {choice.value}, {choice.reason})"
        elif choice and choice.value == value:
            reason = f"{choice.by}: {choice.reason}"
        if all_fields or reason:
            rows.append((name, _format_value(value), reason))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)] if rows else []
    return "\n".join(f"  {name:<{widths[0]}}  {value:<{widths[1]}}  {reason}".rstrip() for name, value, reason in rows)


def _format_value(value: object) -> str:
    if isinstance(value, tuple) and value:
        return (" x " if len(value) == 2 else ", ").join(map(str, value))
    return f"{value!s}" or '""'


def count_flops(model: nn.Module) -> int:
    """Floating-point operations of a forward pass of one image; a multiply-add counts as two. `model` is on the meta
    device, where nothing is computed."""
    image = torch.empty(1, 3, *model.arguments["input_shape"], device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(image)
    return counter.get_total_flops()


def count_parameters(model: nn.Module) -> int:
    """The number of weights of a network."""
    return sum(parameter.numel() for parameter in model.parameters())


def format_model(model: nn.Module, stages: Sequence[Stage]) -> str:
    """Format the parameters of each part, how many of them each stage trains, and the FLOPs of a forward pass. `model`
    is on the meta device; freezing changes it."""
    parts: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        parts.setdefault(name.removeprefix(NETWORK_PREFIX).split(".")[0], []).append(parameter)
    table = {"parameters": [sum(p.numel() for p in part) for part in parts.values()]}
    for number, stage in enumerate(stages, start=1):
        stage.frozen.apply(model)
        table[f"trained in stage {number}"] = [
            sum(p.numel() for p in part if p.requires_grad) for part in parts.values()
        ]
    columns = [[*counts, sum(counts)] for counts in table.values()]
    lines = ["  " + " " * 12 + "".join(f"{title:>20}" for title in table)]
    for row, name in enumerate([*parts, "all"]):
        lines.append(f"  {name:<12}" + "".join(f"{column[row]:>20,}" for column in columns))
    return "\n".join([*lines, f"  forward pass of one image: {count_flops(model) / 1e9:.3g} GFLOPs"])


def format_stages(stages: Sequence[Stage]) -> str:
    """Format the epochs, steps, frozen part, learning rates and notes of each stage."""
    lines = []
    for number, stage in enumerate(stages, start=1):
        highest = max(map(stage.learning_rate, np.linspace(stage.start, stage.end, 1000, endpoint=False)))
        epochs = f"epoch {stage.end}" if stage.end == stage.start + 1 else f"epochs {stage.start + 1} to {stage.end}"
        steps = f"{count_of(stage.steps, 'step')} of {count_of(stage.batch_size, 'image')}"
        lines.append(
            f"stage {number}   {epochs}, {stage.input_shape[0]} x {stage.input_shape[1]} pixels, frozen: "
            f"{stage.frozen}; {steps} per epoch; learning rate peaks at {highest:.2g}, ends at "
            f"{stage.learning_rate(stage.end):.2g}"
        )
        lines += [f"          {note}" for note in stage.notes]
    return "\n".join(lines)


def warn_about_input_shape(images: ImageList, input_shape: tuple[int, int], max_pixels: int) -> None:
    """Print a warning if the images are much larger than a small `input_shape`, or much smaller than it."""
    areas = []
    for index in range(0, len(images), max(1, len(images) // 20)):
        try:
            areas.append(math.prod(read_size(images.path(index), max_pixels)))
        except ImageError as error:
            print(f"warning: {error}")
    if not areas:
        return
    area, shown = statistics.median(areas), math.prod(input_shape)
    if max(input_shape) < 100 and area > 16 * shown:
        print(
            f"warning: the images have about {area / 1e3:.0f} thousand pixels, input_shape {input_shape} shrinks "
            f"them to {shown}; docs/data.md has settings for photos"
        )
    if shown > 16 * area:
        print(
            f"warning: the images have about {area:.0f} pixels, input_shape {input_shape} enlarges them to {shown}; "
            f"half the side takes a quarter of the time, which may be better spent on more epochs"
        )
