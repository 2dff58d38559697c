"""Parameter groups, optimizers, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nets.network import FreezableNetwork
from utils.config.train_config import TrainConfig
from utils.system.runtime import runtime

UNDECAYED = ("cls_token", "pos_embed", "reg_token", "relative_position_bias_table")
"""Last parts of the names of learned tokens and positions, in our ViT and in torchvision's and timm's Swin."""

# From bubbliiiing's classification-pytorch: the batch size that `init_lr` is given for, and the limits of the scaled
# learning rate. The limits of Muon are ours; it can take larger steps than Adam.
REFERENCE_BATCH, REFERENCE_BATCH_TRANSFORMER = 64, 256
LIMITS = {"sgd": (5e-4, 1e-1), "adam": (1e-4, 1e-3)}
LIMITS_TRANSFORMER = {"sgd": (5e-4, 1e-1), "adam": (1e-5, 1e-3), "muon": (1e-5, 1e-2)}


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict]:
    """Group the trainable parameters by weight decay and by `lr_scale`, a factor of the learning rate.

    Biases and norms (all parameters of one dimension), learned tokens and positions, and what the network lists as
    `FreezableNetwork.undecayed` have no weight decay. From the head down to the embeddings, the learning rate of each
    layer is `layer_decay` times that of the layer above (Bao et al., "BEiT", 2022, https://arxiv.org/abs/2106.08254).
    """
    layers = model.layers() if layer_decay < 1 else {}
    listed = model.undecayed() if isinstance(model, FreezableNetwork) else set()
    top = max(layers.values(), default=0)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            undecayed = parameter.ndim <= 1 or name.split(".")[-1] in UNDECAYED or name in listed
            lr_scale = layer_decay ** (top - layers.get(name, top))
            groups.setdefault((lr_scale, 0.0 if undecayed else weight_decay), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_scale": lr_scale}
        for (lr_scale, decay), parameters in groups.items()
    ]


def build_optimizer(model: FreezableNetwork, config: TrainConfig, learning_rate: float) -> Optimizer:
    """The optimizer of `config.optimizer_type` for the trainable parameters of `model`."""
    groups = parameter_groups(model, config.weight_decay, config.layer_decay)
    # One pass over each tensor instead of several: AdamW of ViT-B on two cores takes 45 ms instead of 277. On a GPU it
    # also saves kernel launches, and with a loss scaler a synchronization per step.
    # With `shard` the passes are separate: a fused one rounds the last numbers of a tensor differently, which depend on
    # how it is divided.
    fused = groups[0]["params"][0].device.type in ("cuda", "cpu") and config.shard != "yes"
    if config.optimizer_type == "sgd":
        nesterov = config.momentum > 0
        return torch.optim.SGD(groups, learning_rate, momentum=config.momentum, nesterov=nesterov, fused=fused)
    if config.optimizer_type == "muon":
        return MuonWithAdamW(model, groups, learning_rate, config.momentum)
    optimizer_class = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer_type]
    return optimizer_class(groups, learning_rate, betas=(config.momentum, 0.999), fused=fused)


class MuonWithAdamW(Optimizer):
    """Muon for the weights of linear layers, AdamW for embeddings, head, norms and biases, as one optimizer.

    Muon orthogonalizes the update of a matrix (Jordan, 2024, https://kellerjordan.github.io/posts/muon/). It is scaled
    to work at AdamW's learning rate (Liu et al., 2025, https://arxiv.org/abs/2502.16982).

    Args:
        model: the network.
        groups: from `parameter_groups`.
        learning_rate: of all groups.
        momentum: of Muon; beta1 of AdamW.
    """

    def __init__(self, model: FreezableNetwork, groups: list[dict], learning_rate: float, momentum: float) -> None:
        linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not model.head]
        matrices = {id(module.weight) for module in linear}
        split_groups = []
        for group in groups:
            for is_matrix in (True, False):
                parameters = [p for p in group["params"] if (id(p) in matrices) == is_matrix]
                if parameters:
                    split_groups.append(group | {"params": parameters, "is_matrix": is_matrix})
        super().__init__(split_groups, {"lr": learning_rate, "momentum": momentum, "betas": (momentum, 0.999)})
        self._make_optimizers()

    def _make_optimizers(self) -> None:
        """Make an optimizer for each kind of group. They share the groups and the state of this one."""
        matrices = [group for group in self.param_groups if group["is_matrix"]]
        others = [group for group in self.param_groups if not group["is_matrix"]]
        self.optimizers: list[Optimizer] = []
        if matrices:
            self.optimizers.append(torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw"))
        if others:
            fused = others[0]["params"][0].device.type in ("cuda", "cpu")
            self.optimizers.append(torch.optim.AdamW(others, fused=fused))
        for optimizer in self.optimizers:
            optimizer.state = self.state

    def step(self, closure: None = None) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._make_optimizers()


def restore_state(optimizer: Optimizer, saved: Any) -> None:
    """Give a new optimizer the state `saved`, the "state" of its `state_dict`.

    The tensors get the memory format of their parameters, such as channels last, since a file doesn't keep it and sums
    depend on it.

    Raises:
        ValueError: it isn't the state of such an optimizer for these parameters; the message names what is wrong.
    """
    _check_state(optimizer, saved)
    # Keep the new options of the groups: `fused` depends on the device.
    optimizer.load_state_dict({"state": saved, "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(runtime.shard_like(value, parameter))


def _check_state(optimizer: Optimizer, saved: Any) -> None:
    """See `restore_state`. A parameter without state is as before its first step."""
    parameters = [(parameter, group) for group in optimizer.param_groups for parameter in group["params"]]
    if not isinstance(saved, Mapping):
        raise ValueError("it is missing")
    for number, state in saved.items():
        if type(number) is not int or not 0 <= number < len(parameters):
            raise ValueError(f"there is no parameter {number!r:.40}")
        parameter, group = parameters[number]
        names = _state_names(optimizer, group)
        if not isinstance(state, Mapping) or state.keys() != names:
            raise ValueError(f"of parameter {number} it must have {', '.join(sorted(names)) or 'nothing'}")
        for name, value in state.items():
            shape = () if name == "step" else parameter.shape
            if not isinstance(value, Tensor) or not value.is_floating_point() or value.shape != shape:
                raise ValueError(f"{name} of parameter {number} must be floats of the shape {tuple(shape)}")


def _state_names(optimizer: Optimizer, group: Mapping[str, Any]) -> set[str]:
    """The names of the tensors that an optimizer has for each parameter of a group."""
    if isinstance(optimizer, torch.optim.SGD):
        return {"momentum_buffer"} if group["momentum"] else set()
    return {"momentum_buffer"} if group.get("is_matrix") else {"step", "exp_avg", "exp_avg_sq"}


def batch_scale(batch_size: int, transformer: bool) -> float:
    """The factor of `init_lr` for this batch size."""
    return batch_size / (REFERENCE_BATCH_TRANSFORMER if transformer else REFERENCE_BATCH)


def rate_limits(optimizer_type: str, transformer: bool) -> tuple[float, float]:
    """The lower and upper limit of `init_lr` after scaling."""
    limits = LIMITS_TRANSFORMER if transformer else LIMITS
    return limits["adam" if optimizer_type == "adamw" else optimizer_type]


def scale_learning_rate(config: TrainConfig, field: str, batch_size: int, transformer: bool) -> tuple[float, str]:
    """Scale `init_lr` or `min_lr` in proportion to the batch size and clamp it; also return a note if it was clamped.

    The limits of `min_lr` are a hundredth of those of `init_lr`, see `rate_limits`.
    """
    divisor = {"init_lr": 1, "min_lr": 100}[field]
    low, high = (limit / divisor for limit in rate_limits(config.optimizer_type, transformer))
    scaled = getattr(config, field) * batch_scale(batch_size, transformer)
    rate = min(max(scaled, low), high)
    if math.isclose(rate, scaled):
        return rate, ""
    return rate, (
        f"{field} {getattr(config, field):g} scales to {scaled:.2g} for {batch_size} images per step -> {rate:.2g}, "
        f"the limit for {config.optimizer_type}"
    )


def learning_rate_at(epoch: float, epochs: int, init_lr: float, min_lr: float, decay: str) -> float:
    """The learning rate after `epoch` (may be a fraction) of `epochs` epochs.

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
    """Set the learning rate of every group of `optimizer`, times its `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_scale"]
