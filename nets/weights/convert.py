"""Convert other projects' tensors to the names and shapes of `nets.vit`."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor

from nets.weights.sources import Source, State

# Parts of other networks that `nets.vit` doesn't have. Their weights would give wrong outputs without them.
FOREIGN_PARTS: dict[str, str] = {
    r"^pre_logits\b": "a layer between backbone and head (pre-logits)",
    r"(^|\.)(dist_token|distillation_token)$|^(head_dist|distillation_classifier)\.": "a second token (distilled DeiT)",
    r"^fc_norm\.": "a head on the mean of all tokens",
    r"\.attn\.(q|k)_norm\.": "norms of queries and keys",
    r"\.mlp\.(w12|w3|weights_in|weights_out|fc1_g)\.": "SwiGLU in its blocks",
    r"^norm_pre\.|^pre_layrnorm\.": "a norm before its blocks (CLIP)",
    r"\.gamma_1$": "LayerScale under BEiT's name, and relative positions",
}

TORCH_PREFIXES = ("module.", "_orig_mod.", "model.", "net.")
"""Prefixes of DataParallel, torch.compile and modules of Lightning, which any project may have."""
PREFIXES = (*TORCH_PREFIXES, "backbone.", "encoder.")
WRAPPERS = ("model", "teacher", "state_dict")
"""Keys under which projects store the state dict in their files."""


def unwrap(content: Any) -> tuple[State, bool]:
    """Return a file's state dict without wrapper or prefix, and whether it had a wrapper or prefix of Meta's projects.

    Raises:
        ValueError: the file contains no state dict.
    """
    wrapper = next((name for name in WRAPPERS if isinstance(content, dict) and isinstance(content.get(name), dict)), "")
    state = content[wrapper] if wrapper else content
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
    ):
        raise ValueError("it contains no state dict (tensors by name)")
    of_meta = wrapper in ("model", "teacher")
    while prefix := next((prefix for prefix in PREFIXES if _is_prefix(prefix, state)), ""):
        bare = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
        if len(bare) < len(state):
            raise ValueError(f"two of its names differ only by the prefix {prefix!r}")
        state, of_meta = bare, of_meta or prefix not in TORCH_PREFIXES
    return state, of_meta


def _is_prefix(prefix: str, state: State) -> bool:
    """Return whether all names, or the name of a ViT's first layer, have the prefix."""
    first_layer = f"{prefix}patch_embed.proj.weight"
    return first_layer in state or (bool(state) and all(name.startswith(prefix) for name in state))


def convert_names(state: State, source: Source) -> tuple[State, list[str]]:
    """Return the tensors of `source` under the names of `nets.vit`, and the names of excluded tensors.

    Raises:
        ValueError: the network has parts that `nets.vit` doesn't have.
    """
    if source.of_flax:
        state = {name: _from_flax(name, tensor) for name, tensor in state.items()}
    converted: State = {}
    excluded = []
    for name, tensor in state.items():
        new_name = name
        for pattern, replacement in source.renames:
            new_name = re.sub(pattern, replacement, new_name)
        foreign = next((part for pattern, part in FOREIGN_PARTS.items() if re.search(pattern, new_name)), None)
        if foreign:
            raise ValueError(f"it has {foreign}, {name!r}, which the ViT here doesn't support; choose other weights")
        if re.search(source.excluded, new_name):
            excluded.append(name)
        else:
            converted[new_name] = tensor
    return _add_class_position(_fold_layer_scale(_join_queries_keys_values(converted))), excluded


def _from_flax(name: str, tensor: Tensor) -> Tensor:
    """Return a tensor of flax in torch's layout.

    Kernels of flax are (in, out), of convolutions (height, width, in, out); attention has a separate dimension for
    heads.
    """
    if "DotProductAttention" in name:
        if name.endswith("out/kernel"):
            return tensor.flatten(0, 1).T  # (H, D, C) -> (C, C)
        if name.endswith("kernel"):
            return tensor.flatten(1, 2).T  # (C, H, D) -> (C, C)
        return tensor.flatten()
    if name.endswith("kernel"):
        return tensor.permute(3, 2, 0, 1) if tensor.ndim == 4 else tensor.T
    return tensor


def _join_queries_keys_values(state: State) -> State:
    """Concatenate separate query, key and value layers into one `qkv` layer."""
    joined: State = {}
    for name, tensor in state.items():
        match = re.fullmatch(r"(.*\.attn\.)(q|query|k|key|v|value)\.(weight|bias)", name)
        if not match:
            joined[name] = tensor
            continue
        prefix, layer, kind = match.groups()
        if not layer.startswith("q"):
            continue
        layers = ("q", "k", "v") if layer == "q" else ("query", "key", "value")
        parts = [state.get(f"{prefix}{layer}.{kind}") for layer in layers]
        if any(part is None for part in parts):
            raise ValueError(f"it lacks the keys or values that belong to {name}")
        joined[f"{prefix}qkv.{kind}"] = torch.cat(parts)
    return joined


def _fold_layer_scale(state: State) -> State:
    """Fold LayerScale (Touvron et al., 2021; used in DINOv2) into the last linear layer of each residual branch.

    LayerScale multiplies the output of a branch by channel, which is the same as scaling the layer's rows and bias.
    """
    folded = {name: tensor for name, tensor in state.items() if not name.endswith((".ls1.gamma", ".ls2.gamma"))}
    for branch, last_layer in (("ls1", "attn.proj"), ("ls2", "mlp.fc2")):
        for name in [name for name in state if name.endswith(f".{branch}.gamma")]:
            gamma = state[name].float()
            layer = name.removesuffix(f"{branch}.gamma") + last_layer
            if not {f"{layer}.weight", f"{layer}.bias"} <= state.keys():
                raise ValueError(f"it lacks the layer scaled by {name}")
            folded[f"{layer}.weight"] = state[f"{layer}.weight"].float() * gamma[:, None]
            folded[f"{layer}.bias"] = state[f"{layer}.bias"].float() * gamma
    return folded


def _add_class_position(state: State) -> State:
    """Add a zero position for the class token where there is none.

    Some of timm's networks (with registers, DeiT III, FlexiViT) have none, or have added it to the token already.
    """
    pos_embed = state.get("pos_embed")
    if pos_embed is not None and pos_embed.ndim != 3:
        raise ValueError(f"its position embedding has the shape {tuple(pos_embed.shape)}, not (1, N, C)")
    if pos_embed is not None and pos_embed.shape[1] > 1 and math.isqrt(pos_embed.shape[1]) ** 2 == pos_embed.shape[1]:
        state["pos_embed"] = torch.cat([torch.zeros_like(pos_embed[:, :1]), pos_embed], dim=1)
    return state
