"""Whose weights a file holds, told by the names of its tensors, and those tensors under the names that `nets.vit` has.

Every project that publishes Vision Transformers names the same tensors otherwise, and trains them with its own kind of
GELU, epsilon of the norms, and preprocessing. `SOURCES` has a row for each.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]

HALF = (0.5, 0.5, 0.5)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OF_INCEPTION = {"image_mean": HALF, "image_std": HALF}
OF_IMAGENET = {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}


@dataclass(frozen=True)
class Source:
    """What a project's files of weights have of their own.

    Attributes:
        name: how it is called in messages.
        mark: pattern of a tensor's name that no other project's files have.
        wrapped: whether its tensors lie in a dict of their own, or their names begin with that of a part.
        renames: pairs of a pattern and what takes its place, applied to each name one after the other.
        left_out: pattern of (renamed) tensors that a classifier has no use for; they are named when they are left out.
        variant: what sets the network apart from `nets.vit`'s by default, see `nets.vit.vit`.
        preprocessing: what it expects of pictures, by the names of the config's fields.
        resampling: how the project itself resamples a position embedding, as arguments of `F.interpolate`.
    """

    name: str
    mark: str
    wrapped: bool | None = None
    renames: tuple[tuple[str, str], ...] = ()
    left_out: str = "$^"
    variant: Mapping[str, Any] = field(default_factory=dict)
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    resampling: Mapping[str, bool] = field(default_factory=dict)


# https://github.com/huggingface/transformers: files have the names of its versions before 5, networks in memory others.
HUGGING_FACE_NAMES = (
    (r"^(vit|dinov2|dinov2_with_registers)\.", ""),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.", ""),
    (r"^(encoder\.)?layers?\.(\d+)\.", r"blocks.\2."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.([qkv])_proj\.", r".attn.\1."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)

# In this order: the first whose mark is found. This layout's own file has timm's names, so it can't be told by them.
SOURCES: tuple[Source, ...] = (
    Source(
        "Google's ViT (.npz)",
        r"(^|/)Transformer/encoder_norm/scale$",
        renames=(
            (r"^(opt/target|params)/", ""),
            (r"^cls$", "cls_token"),
            (r"^embedding/", "patch_embed.proj."),
            (r"^Transformer/posembed_input/pos_embedding$", "pos_embed"),
            (r"^Transformer/encoderblock_(\d+)/", r"blocks.\1."),
            (r"^Transformer/encoder_norm/", "norm."),
            (r"LayerNorm_0/", "norm1."),
            (r"LayerNorm_2/", "norm2."),
            (r"MultiHeadDotProductAttention_1/out/", "attn.proj."),
            (r"MultiHeadDotProductAttention_1/(query|key|value)/", r"attn.\1."),
            (r"MlpBlock_3/Dense_0/", "mlp.fc1."),
            (r"MlpBlock_3/Dense_1/", "mlp.fc2."),
            (r"^head/", "head."),
            (r"(kernel|scale)$", "weight"),
        ),
        left_out=r"^opt/state/",
        variant={"activation": "gelu_tanh"},  # flax's default
        preprocessing={**OF_INCEPTION, "interpolation": "bilinear", "eval_crop": 1.0},
    ),
    Source(
        "torchvision's ViT",
        r"^encoder\.pos_embedding$",
        renames=(
            (r"^class_token$", "cls_token"),
            (r"^conv_proj\.", "patch_embed.proj."),
            (r"^encoder\.pos_embedding$", "pos_embed"),
            (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
            (r"^encoder\.ln\.", "norm."),
            (r"\.ln_(\d)\.", r".norm\1."),
            (r"\.self_attention\.in_proj_", ".attn.qkv."),
            (r"\.self_attention\.out_proj\.", ".attn.proj."),
            (r"\.mlp\.(0|linear_1)\.", ".mlp.fc1."),  # the published files have the names of an earlier version
            (r"\.mlp\.(3|linear_2)\.", ".mlp.fc2."),
            (r"^heads\.head\.", "head."),
        ),
        variant={"activation": "gelu"},
        preprocessing={**OF_IMAGENET, "interpolation": "bilinear", "eval_crop": 0.875},
        resampling={"align_corners": True},
    ),
    Source(
        "Hugging Face's DINOv2 with registers",
        r"(^|\.)embeddings\.register_tokens$",
        renames=HUGGING_FACE_NAMES,
        left_out=r"^mask_token$",
        variant={"activation": "gelu"},
        preprocessing={**OF_IMAGENET, "interpolation": "bicubic", "eval_crop": 0.875},
        resampling={"antialias": True},
    ),
    Source(
        "Hugging Face's DINOv2",
        r"\.layer_scale1\.lambda1$",
        renames=HUGGING_FACE_NAMES,
        left_out=r"^mask_token$",
        variant={"activation": "gelu"},
        preprocessing={**OF_IMAGENET, "interpolation": "bicubic", "eval_crop": 0.875},
    ),
    Source(
        "Hugging Face's ViT",
        r"(^|\.)embeddings\.patch_embeddings\.projection\.weight$",
        renames=HUGGING_FACE_NAMES,
        left_out=r"^(mask_token$|pooler\.|decoder\.)",
        variant={"activation": "gelu", "norm_eps": 1e-12},
        preprocessing={**OF_INCEPTION, "interpolation": "bilinear", "eval_crop": 1.0},
    ),
    Source(
        "DINOv2",
        r"(^|\.)blocks\.0\.ls1\.gamma$",
        renames=((r"^register_tokens$", "reg_token"),),
        left_out=r"^(mask_token$|head\.(mlp|last_layer|0|1|2)\.)",
        variant={"activation": "gelu"},
        preprocessing={**OF_IMAGENET, "interpolation": "bicubic", "eval_crop": 0.875},
        resampling={"antialias": True},  # timm's way; Meta's code has it as a choice
    ),
    Source(
        "Meta's MAE, DINO or DeiT",
        r"^patch_embed\.proj\.weight$",
        wrapped=True,
        left_out=r"^(mask_token$|decoder_|head\.(mlp|last_layer)\.)",
        variant={"activation": "gelu"},
        preprocessing={**OF_IMAGENET, "interpolation": "bicubic", "eval_crop": 0.875},
    ),
    Source(
        "timm's ViT",
        r"^patch_embed\.proj\.weight$",
        variant={"activation": "gelu"},
        preprocessing={**OF_INCEPTION, "interpolation": "bicubic", "eval_crop": 0.9},
        resampling={"antialias": True},
    ),
)

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


def recognise(state: State, wrapped: bool) -> Source | None:
    """Whose weights these are; None: none of a ViT that is known."""
    rows = (source for source in SOURCES if source.wrapped in (None, wrapped))
    return next((source for source in rows if any(re.search(source.mark, name) for name in state)), None)


PREFIXES = ("module.", "_orig_mod.", "backbone.", "encoder.")
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
    prefixed = False
    while prefix := next((prefix for prefix in PREFIXES if _is_prefix(prefix, state)), ""):
        bare = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
        if len(bare) < len(state):
            raise ValueError(f"names in it differ only by {prefix!r}")
        state, prefixed = bare, True
    return state, prefixed or wrapper in ("model", "teacher")


def _is_prefix(prefix: str, state: State) -> bool:
    """Whether all names begin with it, or that of a ViT's first layer does."""
    first = f"{prefix}patch_embed.proj.weight"
    return first in state or (bool(state) and all(name.startswith(prefix) for name in state))


def to_our_names(state: State, source: Source) -> tuple[State, list[str]]:
    """The tensors of `source` as `nets.vit` has them, and the names of those that are left out.

    Raises:
        ValueError: the network has parts that `nets.vit` hasn't.
    """
    if source.name.startswith("Google"):
        state = {name: _from_flax(name, tensor) for name, tensor in state.items()}
    found: State = {}
    left_out = []
    for name, tensor in state.items():
        ours = name
        for pattern, replacement in source.renames:
            ours = re.sub(pattern, replacement, ours)
        foreign = next((what for pattern, what in FOREIGN_PARTS.items() if re.search(pattern, ours)), None)
        if foreign:
            raise ValueError(f"it has {foreign}, {name!r}, which the ViT here hasn't; choose weights without")
        if re.search(source.left_out, ours):
            left_out.append(name)
        else:
            found[ours] = tensor
    found = _fold_layer_scale(_join_queries_keys_values(found))
    return _with_class_position(found), left_out


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
    """With a position for the class token: timm's networks with registers have it added to the token already."""
    pos_embed = state.get("pos_embed")
    if "reg_token" in state and pos_embed is not None and _is_square(pos_embed.shape[1]):
        state["pos_embed"] = torch.cat([torch.zeros_like(pos_embed[:, :1]), pos_embed], dim=1)
    return state


def _is_square(number: int) -> bool:
    return round(number**0.5) ** 2 == number
