"""Other projects' tensors under the names, and in the shapes, that `nets.vit` has for them."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor

from nets.weights.sources import Source, State

# Parts that some networks have and `nets.vit` doesn't, so that their weights can't give what they gave.
FOREIGN_PARTS: dict[str, str] = {
    r"^pre_logits\b": "a layer between backbone and head (pre-logits)",
    r"(^|\.)(dist_token|distillation_token)$|^(head_dist|distillation_classifier)\.": "a second token (distilled DeiT)",
    r"^fc_norm\.": "a head that takes the mean of all tokens",
    r"\.attn\.(q|k)_norm\.": "norms of queries and keys",
    r"\.mlp\.(w12|w3|weights_in|weights_out|fc1_g)\.": "SwiGLU in its blocks",
    r"^norm_pre\.|^pre_layrnorm\.": "a norm before its blocks (CLIP)",
    r"\.gamma_1$": "LayerScale under BEiT's name, and relative positions",
}

# What other projects put around their tensors' names.
OF_TORCH = ("module.", "_orig_mod.")
"""Of DataParallel and of torch.compile, so that they tell nothing of the project."""
PREFIXES = (*OF_TORCH, "backbone.", "encoder.")
WRAPPERS = ("model", "teacher", "state_dict")


def unwrap(content: Any) -> tuple[State, bool]:
    """The tensors by name in what a file holds, out of the dict and without the prefix that many projects put around
    them, and whether one of those of Meta's projects was there.

    Raises:
        ValueError: there are no tensors by name.
    """
    wrapper = next((name for name in WRAPPERS if isinstance(content, dict) and isinstance(content.get(name), dict)), "")
    state = content[wrapper] if wrapper else content
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
    ):
        raise ValueError("it holds no state dict (tensors by name)")
    of_meta = wrapper in ("model", "teacher")
    while prefix := next((prefix for prefix in PREFIXES if _is_prefix(prefix, state)), ""):
        bare = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
        if len(bare) < len(state):
            raise ValueError(f"names in it differ only by {prefix!r}")
        state, of_meta = bare, of_meta or prefix not in OF_TORCH
    return state, of_meta


def _is_prefix(prefix: str, state: State) -> bool:
    """Whether all names begin with it, or that of a ViT's first layer does."""
    first = f"{prefix}patch_embed.proj.weight"
    return first in state or (bool(state) and all(name.startswith(prefix) for name in state))


def convert_names(state: State, source: Source) -> tuple[State, list[str]]:
    """The tensors of `source` as `nets.vit` has them, and the names of those that are left out.

    Raises:
        ValueError: the network has parts that `nets.vit` hasn't.
    """
    if source.of_flax:
        state = {name: _from_flax(name, tensor) for name, tensor in state.items()}
    found: State = {}
    excluded = []
    for name, tensor in state.items():
        ours = name
        for pattern, replacement in source.renames:
            ours = re.sub(pattern, replacement, ours)
        foreign = next((what for pattern, what in FOREIGN_PARTS.items() if re.search(pattern, ours)), None)
        if foreign:
            raise ValueError(f"it has {foreign}, {name!r}, which the ViT here lacks; choose weights without it")
        if re.search(source.excluded, ours):
            excluded.append(name)
        else:
            found[ours] = tensor
    found = _fold_layer_scale(_join_queries_keys_values(found))
    return _with_class_position(found), excluded


def _from_flax(name: str, tensor: Tensor) -> Tensor:
    """A tensor of flax in torch's order: kernels are (in, out), of convolutions (height, width, in, out), and those of
    attention have the heads as a dimension of their own."""
    if "DotProductAttention" in name:
        if name.endswith("out/kernel"):
            return tensor.flatten(0, 1).T  # (heads, head width, C) -> (C, C)
        if name.endswith("kernel"):
            return tensor.flatten(1, 2).T  # (C, heads, head width) -> (C, C)
        return tensor.flatten()
    if name.endswith("kernel"):
        return tensor.permute(3, 2, 0, 1) if tensor.ndim == 4 else tensor.T
    return tensor


def _join_queries_keys_values(state: State) -> State:
    """With one layer for the three where there are three."""
    joined: State = {}
    for name, tensor in state.items():
        if match := re.fullmatch(r"(.*\.attn\.)(q|query|k|key|v|value)\.(weight|bias)", name):
            prefix, which, kind = match.groups()
            if not which.startswith("q"):
                continue
            others = ("q", "k", "v") if which == "q" else ("query", "key", "value")
            parts = [state.get(f"{prefix}{other}.{kind}") for other in others]
            if any(part is None for part in parts):
                raise ValueError(f"it lacks the keys or values that go with {name}")
            joined[f"{prefix}qkv.{kind}"] = torch.cat(parts)
        else:
            joined[name] = tensor
    return joined


def _fold_layer_scale(state: State) -> State:
    """Without LayerScale (Touvron et al., 2021; DINOv2 has it), but with the same outputs.

    LayerScale multiplies what a residual branch adds, channel by channel. So does multiplying the rows of the linear
    layer that the branch ends with, and its bias.
    """
    folded = {name: tensor for name, tensor in state.items() if not name.endswith((".ls1.gamma", ".ls2.gamma"))}
    for branch, last_layer in (("ls1", "attn.proj"), ("ls2", "mlp.fc2")):
        for name in [name for name in state if name.endswith(f".{branch}.gamma")]:
            gamma = state[name].float()
            layer = name.removesuffix(f"{branch}.gamma") + last_layer
            if not {f"{layer}.weight", f"{layer}.bias"} <= state.keys():
                raise ValueError(f"it lacks the layer that {name} scales")
            folded[f"{layer}.weight"] = state[f"{layer}.weight"].float() * gamma[:, None]
            folded[f"{layer}.bias"] = state[f"{layer}.bias"].float() * gamma
    return folded


def _with_class_position(state: State) -> State:
    """With a position for the class token: some of timm's networks (those with registers, DeiT III, FlexiViT) have
    none, or have it added to the token already."""
    pos_embed = state.get("pos_embed")
    if pos_embed is not None and pos_embed.ndim != 3:
        raise ValueError(f"its position embedding has the shape {tuple(pos_embed.shape)}, not (1, N, C)")
    if pos_embed is not None and pos_embed.shape[1] > 1 and math.isqrt(pos_embed.shape[1]) ** 2 == pos_embed.shape[1]:
        state["pos_embed"] = torch.cat([torch.zeros_like(pos_embed[:, :1]), pos_embed], dim=1)
    return state
