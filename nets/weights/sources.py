"""Recognize which project a ViT's weights come from, by the names of its tensors.

Each project has its own tensor names, kind of GELU, epsilon of the norms, and preprocessing: one row of `SOURCES`.
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
INCEPTION = {"image_mean": HALF, "image_std": HALF}
IMAGENET = {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}
META = {**IMAGENET, "interpolation": "bicubic", "eval_crop": 0.875}


@dataclass(frozen=True)
class Source:
    """One project's format of weights.

    Attributes:
        name: of the project, for messages.
        mark: pattern of a tensor name that only this project's files have.
        of_flax: whether tensors have flax's layout.
        wrapped: whether the state dict is inside another dict or has a prefix; None: either.
        renames: pairs of pattern and replacement, applied to each name in order.
        excluded: pattern of (renamed) tensors that a classifier doesn't need; they are reported when excluded.
        variant: arguments of `nets.vit.vit` that differ from its defaults.
        preprocessing: what the weights expect of images, as config fields.
        resampling: arguments of `F.interpolate` with which the project resamples a position embedding.
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


# https://github.com/huggingface/transformers: names in files (as before version 5) and of networks in memory differ.
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

# The first row whose mark matches is used. bubbliiiing's file has timm's names and is recognized by its file name.
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
        preprocessing={**INCEPTION, "interpolation": "bilinear", "eval_crop": 1.0},
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
            (r"\.mlp\.(0|linear_1)\.", ".mlp.fc1."),  # published files: names of an earlier version
            (r"\.mlp\.(3|linear_2)\.", ".mlp.fc2."),
            (r"^heads\.head\.", "head."),
        ),
        variant={"activation": "gelu"},
        preprocessing={**IMAGENET, "interpolation": "bilinear", "eval_crop": 0.875},
        resampling={"align_corners": True},
    ),
    Source(
        "Hugging Face's DINOv2 with registers",
        r"(^|\.)embeddings\.register_tokens$",
        renames=HUGGING_FACE_NAMES,
        excluded=r"^mask_token$",
        variant={"activation": "gelu"},
        preprocessing=META,
        resampling={"antialias": True},
    ),
    Source(
        "Hugging Face's DINOv2",
        r"\.layer_scale1\.lambda1$",
        renames=HUGGING_FACE_NAMES,
        excluded=r"^mask_token$",
        variant={"activation": "gelu"},
        preprocessing=META,
    ),
    Source(
        "Hugging Face's ViT",
        r"(^|\.)embeddings\.patch_embeddings\.projection\.weight$",
        renames=HUGGING_FACE_NAMES,
        excluded=r"^(mask_token$|pooler\.|decoder\.)",
        variant={"activation": "gelu", "norm_eps": 1e-12},
        preprocessing={**INCEPTION, "interpolation": "bilinear", "eval_crop": 1.0},
    ),
    Source(
        "DINOv2, or another with LayerScale",
        r"(^|\.)blocks\.0\.ls1\.gamma$",
        renames=((r"^register_tokens$", "reg_token"),),
        excluded=r"^mask_token$",
        variant={"activation": "gelu"},
        preprocessing=META,
        resampling={"antialias": True},  # as in timm; optional in Meta's code
    ),
    Source(
        "Meta's MAE, DINO or DeiT",
        r"^patch_embed\.proj\.weight$",
        wrapped=True,
        excluded=r"^(mask_token$|decoder_|head\.(mlp|last_layer)\.)",
        variant={"activation": "gelu"},
        preprocessing=META,
    ),
    Source(
        "timm's ViT",
        r"^patch_embed\.proj\.weight$",
        variant={"activation": "gelu"},
        preprocessing={**INCEPTION, "interpolation": "bicubic", "eval_crop": 0.9},
        resampling={"antialias": True},
    ),
)


def recognize(state: State, wrapped: bool) -> Source | None:
    """Return the project that the weights come from, or None if they are not of a known ViT."""
    rows = (source for source in SOURCES if source.wrapped in (None, wrapped))
    return next((source for source in rows if any(re.search(source.mark, name) for name in state)), None)
