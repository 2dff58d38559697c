"""Whose weights a file holds, told by the names of its tensors.

Every project that publishes Vision Transformers names the same tensors otherwise, and trains them with its own kind of
GELU, epsilon of the norms, and preprocessing. `SOURCES` has a row for each.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

State = dict[str, Tensor]

HALF = (0.5, 0.5, 0.5)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OF_INCEPTION = {"image_mean": HALF, "image_std": HALF}
OF_IMAGENET = {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}
OF_META = {**OF_IMAGENET, "interpolation": "bicubic", "eval_crop": 0.875}


@dataclass(frozen=True)
class Source:
    """What a project's files of weights have of their own.

    Attributes:
        name: how it is called in messages.
        mark: pattern of a tensor's name that no other project's files have.
        of_flax: whether its tensors are in flax's order.
        wrapped: whether its tensors lie in a dict of their own, or their names begin with that of a part.
        renames: pairs of a pattern and what takes its place, applied to each name one after the other.
        excluded: pattern of (renamed) tensors that a classifier has no use for; they are named when they are left out.
        variant: what sets the network apart from `nets.vit`'s by default, see `nets.vit.vit`.
        preprocessing: what it expects of images, by the names of the config's fields.
        resampling: how the project itself resamples a position embedding, as arguments of `F.interpolate`.
    """

    name: str
    mark: str
    of_flax: bool = False
    wrapped: bool | None = None
    renames: tuple[tuple[str, str], ...] = ()
    excluded: str = "$^"
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

# In this order: the first whose mark is found. bubbliiiing's file has timm's names, so it can't be told by them.
SOURCES: tuple[Source, ...] = (
    Source(
        "Google's ViT (.npz)",
        r"(^|/)Transformer/encoder_norm/scale$",
        of_flax=True,
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
        excluded=r"^opt/state/",
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
        excluded=r"^mask_token$",
        variant={"activation": "gelu"},
        preprocessing=OF_META,
        resampling={"antialias": True},
    ),
    Source(
        "Hugging Face's DINOv2",
        r"\.layer_scale1\.lambda1$",
        renames=HUGGING_FACE_NAMES,
        excluded=r"^mask_token$",
        variant={"activation": "gelu"},
        preprocessing=OF_META,
    ),
    Source(
        "Hugging Face's ViT",
        r"(^|\.)embeddings\.patch_embeddings\.projection\.weight$",
        renames=HUGGING_FACE_NAMES,
        excluded=r"^(mask_token$|pooler\.|decoder\.)",
        variant={"activation": "gelu", "norm_eps": 1e-12},
        preprocessing={**OF_INCEPTION, "interpolation": "bilinear", "eval_crop": 1.0},
    ),
    Source(
        "DINOv2, or another with LayerScale",
        r"(^|\.)blocks\.0\.ls1\.gamma$",
        renames=((r"^register_tokens$", "reg_token"),),
        excluded=r"^mask_token$",
        variant={"activation": "gelu"},
        preprocessing=OF_META,
        resampling={"antialias": True},  # timm's way; Meta's code has it as a choice
    ),
    Source(
        "Meta's MAE, DINO or DeiT",
        r"^patch_embed\.proj\.weight$",
        wrapped=True,
        excluded=r"^(mask_token$|decoder_|head\.(mlp|last_layer)\.)",
        variant={"activation": "gelu"},
        preprocessing=OF_META,
    ),
    Source(
        "timm's ViT",
        r"^patch_embed\.proj\.weight$",
        variant={"activation": "gelu"},
        preprocessing={**OF_INCEPTION, "interpolation": "bicubic", "eval_crop": 0.9},
        resampling={"antialias": True},
    ),
)


def recognise(state: State, wrapped: bool) -> Source | None:
    """Whose weights these are; None: none of a ViT that is known."""
    rows = (source for source in SOURCES if source.wrapped in (None, wrapped))
    return next((source for source in rows if any(re.search(source.mark, name) for name in state)), None)
