"""Parameter groups, optimizer, learning rate."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim import Optimizer

from nets.network import FreezableNetwork
from utils.config.train_config import TrainConfig

UNDECAYED = ("cls_token", "pos_embed", "reg_token", "relative_position_bias_table")
"""Last parts of the names of learned tokens and positions: our ViT's, and those of torchvision's and timm's Swins."""

# Of bubbliiiing's classification-pytorch: the batch that `init_lr` is meant for, and the limits of what scaling makes
# of it. There is no Muon there: the steps that it takes well are larger than Adam's.
REFERENCE_BATCH, REFERENCE_BATCH_TRANSFORMER = 64, 256
LIMITS = {"sgd": (5e-4, 1e-1), "adam": (1e-4, 1e-3)}
LIMITS_TRANSFORMER = {"sgd": (5e-4, 1e-1), "adam": (1e-5, 1e-3), "muon": (1e-5, 1e-2)}


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict]:
    """The trainable parameters in groups by weight decay and by learning rate, the optimizer's times `lr_scale`.

    Biases, norms, learned tokens and positions don't decay; biases and the scales of norms are the parameters of one
    dimension. Each layer, from the head down to the embeddings, learns `layer_decay` times as fast as the one above
    (Bao et al., "BEiT", 2022, https://arxiv.org/abs/2106.08254).
    """
    layers = model.layers() if layer_decay < 1 else {}
    top = max(layers.values(), default=0)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim <= 1 or name.split(".")[-1] in UNDECAYED
            lr_scale = layer_decay ** (top - layers.get(name, top))
            groups.setdefault((lr_scale, 0.0 if plain else weight_decay), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_scale": lr_scale}
        for (lr_scale, decay), parameters in groups.items()
    ]


def build_optimizer(model: FreezableNetwork, config: TrainConfig, learning_rate: float) -> Optimizer:
    """The optimizer that `config` names, over the trainable parameters of `model`."""
    groups = parameter_groups(model, config.weight_decay, config.layer_decay)
    # One pass over each tensor instead of several: a sixth of the time for ViT-B's AdamW on two cores (45 against 277
    # ms); on a GPU it also spares launches, and under a loss scaler a synchronisation at every step.
    fused = groups[0]["params"][0].device.type in ("cuda", "cpu")
    if config.optimizer_type == "sgd":
        nesterov = config.momentum > 0
        return torch.optim.SGD(groups, learning_rate, momentum=config.momentum, nesterov=nesterov, fused=fused)
    if config.optimizer_type == "muon":
        return MuonWithAdamW(model, groups, learning_rate, config.momentum)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer_type]
    return kind(groups, learning_rate, betas=(config.momentum, 0.999), fused=fused)


class MuonWithAdamW(Optimizer):
    """Muon for the matrices inside a network, AdamW for all else, as one optimizer.

    Muon gives all directions of a matrix's update the same length (Jordan, 2024,
    https://kellerjordan.github.io/posts/muon/), here scaled so that its learning rate is AdamW's (Liu et al., 2025,
    https://arxiv.org/abs/2502.16982). Embeddings, head, norms and biases are left to AdamW, as in both.

    Args:
        model: the network.
        groups: from `parameter_groups`.
        learning_rate: of all groups.
        momentum: Muon's, and AdamW's beta1.
    """

    def __init__(self, model: FreezableNetwork, groups: list[dict], learning_rate: float, momentum: float) -> None:
        linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not model.head]
        matrices = {id(module.weight) for module in linear}
        parted = []
        for group in groups:
            for is_matrix in (True, False):
                parameters = [p for p in group["params"] if (id(p) in matrices) == is_matrix]
                if parameters:
                    parted.append(group | {"params": parameters, "is_matrix": is_matrix})
        super().__init__(parted, {"lr": learning_rate, "momentum": momentum, "betas": (momentum, 0.999)})
        self._make_parts()

    def _make_parts(self) -> None:
        """The two optimizers, each over its own of `param_groups`; state and groups are those of the whole."""
        matrices = [group for group in self.param_groups if group["is_matrix"]]
        others = [group for group in self.param_groups if not group["is_matrix"]]
        self.parts: list[Optimizer] = []
        if matrices:
            self.parts.append(torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw"))
        if others:
            fused = others[0]["params"][0].device.type in ("cuda", "cpu")
            self.parts.append(torch.optim.AdamW(others, fused=fused))
        for part in self.parts:
            part.state = self.state

    def step(self, closure: None = None) -> None:
        """One step of both."""
        for part in self.parts:
            part.step()

    def load_state_dict(self, state_dict: dict) -> None:
        """Take up what `state_dict` gave."""
        super().load_state_dict(state_dict)
        self._make_parts()


def batch_scale(batch_size: int, transformer: bool) -> float:
    """What `init_lr` is multiplied by for this batch size."""
    return batch_size / (REFERENCE_BATCH_TRANSFORMER if transformer else REFERENCE_BATCH)


def rate_limits(optimizer_type: str, transformer: bool) -> tuple[float, float]:
    """The range that `init_lr`, scaled by the batch size, is limited to."""
    limits = LIMITS_TRANSFORMER if transformer else LIMITS
    return limits["adam" if optimizer_type == "adamw" else optimizer_type]


def scale_learning_rate(config: TrainConfig, field: str, batch_size: int, transformer: bool) -> tuple[float, str]:
    """`init_lr` or `min_lr` for this batch size, and a note if it was limited: in proportion to the batch size, then
    kept within limits.

    `init_lr` is meant for 64 images per step, for transformers 256. Its limits are 1e-4 to 1e-3 for Adam (1e-5 to 1e-3
    for transformers), 5e-4 to 1e-1 for SGD, and 1e-5 to 1e-2 for Muon and its AdamW part; those of `min_lr` are a
    hundredth of them.
    """
    part = {"init_lr": 1, "min_lr": 100}[field]
    low, high = (limit / part for limit in rate_limits(config.optimizer_type, transformer))
    scaled = getattr(config, field) * batch_scale(batch_size, transformer)
    rate = min(max(scaled, low), high)
    if math.isclose(rate, scaled):
        return rate, ""
    return rate, (
        f"{field} {getattr(config, field):g} is {scaled:.2g} for {batch_size} images per step -> {rate:.2g}, the limit "
        f"for {config.optimizer_type}"
    )


def learning_rate_at(epoch: float, epochs: int, init_lr: float, min_lr: float, decay: str) -> float:
    """The learning rate after `epoch` of `epochs` epochs, fractions of an epoch included.

    "cos": (1) linear warm-up from a tenth over 5 % of the run, at most 3 epochs; (2) half a cosine down to `min_lr`;
    (3) `min_lr` over the last 5 %, at most 15 epochs. "step": ten equal steps, each by the same factor, from `init_lr`
    down to `min_lr`.
    """
    assert decay in ("cos", "step"), decay
    if decay == "step":
        step = min(int(10 * epoch / epochs), 9)
        return init_lr * (min_lr / init_lr) ** (step / 9)
    warm_up = min(0.05 * epochs, 3)
    flat = min(0.05 * epochs, 15)
    if epoch < warm_up:
        return init_lr * (0.1 + 0.9 * epoch / warm_up)
    if epoch >= epochs - flat:
        return min_lr
    progress = (epoch - warm_up) / (epochs - flat - warm_up)
    return min_lr + 0.5 * (init_lr - min_lr) * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    """Give every group of `optimizer` this learning rate, times its own scale."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_scale"]
