"""Pretrained weights: where they are, and how they get into our networks."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nets.files import open_safely

# timm's weights of the same networks on the Hugging Face hub. The names say what they learned from: ImageNet-21k,
# and most of them ImageNet-1k after it; DINOv2's learned from 142 million pictures without labels.
HUB_REPOS: dict[str, str] = {
    "vit_t_16": "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k",
    "vit_s_14": "timm/vit_small_patch14_dinov2.lvd142m",
    "vit_s_16": "timm/vit_small_patch16_224.augreg_in21k_ft_in1k",
    "vit_b_16": "timm/vit_base_patch16_224.augreg2_in21k_ft_in1k",
    "vit_l_16": "timm/vit_large_patch16_224.augreg_in21k_ft_in1k",
    "vit_b_32": "timm/vit_base_patch32_224.augreg_in21k_ft_in1k",
    "vit_l_32": "timm/vit_large_patch32_384.orig_in21k_ft_in1k",
    "vit_h_14": "timm/vit_huge_patch14_224.orig_in21k",
}
HUB_FILE = "model.safetensors"

# The file that users of this layout have, made for the tanh GELU; everything else here comes from timm.
LAYOUT_FILES: dict[str, str] = {"vit_b_16": "vit-patch_16.pth"}


@dataclass(frozen=True)
class PretrainedSource:
    """A file of weights, and the kind of GELU (a key of `nets.vit.ACTIVATIONS`) that they were trained with."""

    path: Path
    activation: str


def find_pretrained(name: str, folder: str | Path = "model_data") -> PretrainedSource:
    """The pretrained weights of the network `name`: from `folder`, else from the hub's cache, else downloaded to it.

    In `folder` it looks for this layout's `vit-patch_16.pth` (base only), then for timm's weights as
    `<name>.safetensors` or `<name>.pth`.

    Raises:
        ValueError: no weights are published for `name`.
        FileNotFoundError: not in `folder`, and the hub can't be reached; says what to put where.
    """
    folder = Path(folder)
    if name in LAYOUT_FILES and (folder / LAYOUT_FILES[name]).is_file():
        return PretrainedSource(folder / LAYOUT_FILES[name], "gelu_tanh")
    for suffix in (".safetensors", ".pth"):
        if (folder / f"{name}{suffix}").is_file():
            return PretrainedSource(folder / f"{name}{suffix}", "gelu")
    if name not in HUB_REPOS:
        raise ValueError(
            f"pretrained=True: no weights are published for backbone={name!r}, only for {', '.join(HUB_REPOS)}; "
            f"choose one of them, or set pretrained=False"
        )
    return PretrainedSource(_download(HUB_REPOS[name], folder / f"{name}.safetensors"), "gelu")


def _download(repo: str, fallback: Path) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(repo_id=repo, filename=HUB_FILE))
    except Exception as error:  # the hub's client lets through whatever its HTTP library raises
        raise FileNotFoundError(
            f"pretrained=True: {HUB_FILE} of {repo} could not be fetched from the Hugging Face hub ({error}). "
            f"Fetch it where there is a network and put it at {fallback}, or set pretrained=False"
        ) from error


@dataclass(frozen=True)
class Weights:
    """Tensors by name, and, where Thaw wrote the file, the arguments that built their network."""

    path: Path
    state: dict[str, Tensor]
    arguments: dict[str, Any] | None

    def grid(self) -> tuple[int, int]:
        """Patches down and across that the position embedding is for: a square, unless the arguments tell.

        Raises:
            ValueError: nothing tells, and they are no square.
        """
        if self.arguments:
            patch = self.state["patch_embed.proj.weight"].shape[-1]
            return (self.arguments["input_shape"][0] // patch, self.arguments["input_shape"][1] // patch)
        patches = self.state["pos_embed"].shape[1] - 1
        side = math.isqrt(patches)
        if side * side != patches:
            raise ValueError(
                f"{self.path}: a position embedding of {patches} patches is no square, and a state dict doesn't tell "
                f"what it is: use a checkpoint of Thaw, or weights of a square input_shape"
            )
        return (side, side)


def read_weights(path: str | Path) -> Weights:
    """The weights in a `.safetensors` file, a state dict saved by torch, or a checkpoint of Thaw.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it can't be opened, would run code, or holds no tensors by name.
    """
    content = open_safely(path)
    arguments = read_arguments(Path(path)) if Path(path).suffix == ".safetensors" else None
    if isinstance(content, dict) and isinstance(content.get("weights"), dict):
        content, arguments = content["weights"], content.get("model")
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state dict (tensors by name)")
    return Weights(Path(path), fold_layer_scale(content), arguments)


def read_arguments(path: Path) -> dict[str, Any] | None:
    """The arguments that a `.safetensors` file of Thaw's holds in its header; None if it is somebody else's."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get("model")
    if text is None:
        return None
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError):
        return None
    sides = arguments.get("input_shape") if isinstance(arguments, dict) else None
    usable = isinstance(sides, list) and len(sides) == 2 and all(type(side) is int for side in sides)
    return arguments if usable and isinstance(arguments.get("activation"), str) else None


def fold_layer_scale(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without LayerScale (Touvron et al., 2021; DINOv2 has it), which gives the same outputs.

    LayerScale multiplies what a residual branch adds, channel by channel. So does multiplying the rows of the linear
    layer that the branch ends with, and its bias.
    """
    folded = {name: tensor for name, tensor in state.items() if not name.endswith((".ls1.gamma", ".ls2.gamma"))}
    for branch, last_layer in (("ls1", "attn.proj"), ("ls2", "mlp.fc2")):
        for name in [name for name in state if name.endswith(f".{branch}.gamma")]:
            gamma = state[name].float()
            layer = name.removesuffix(f"{branch}.gamma") + last_layer
            folded[f"{layer}.weight"] = state[f"{layer}.weight"].float() * gamma[:, None]
            folded[f"{layer}.bias"] = state[f"{layer}.bias"].float() * gamma
    return folded


def load_weights(model: nn.Module, weights: Weights) -> None:
    """Load `weights` into a ViT, strictly but for two things, each of which is printed.

    A position embedding made for another grid of patches is resampled; a head for another number of classes is left
    out, and the model keeps its own.

    Raises:
        ValueError: names or shapes differ in anything else; the message lists the first of them.
    """
    own, state = model.state_dict(), dict(weights.state)
    if {"pos_embed", "patch_embed.proj.weight"} <= state.keys() and weights.grid() != model.grid:
        state["pos_embed"] = resample_pos_embed(state["pos_embed"], weights.grid(), model.grid)
        print(f"{weights.path}: position embedding resampled to {model.grid[0]} x {model.grid[1]} patches")
    head = {name for name in own if name.startswith("head.")}
    if any(name not in state or state[name].shape != own[name].shape for name in head):
        outputs = state["head.bias"].shape[0] if "head.bias" in state else "no"
        ours = own["head.bias"].shape[0]
        print(f"{weights.path}: its head of {outputs} classes is left out, ours starts anew with {ours}")
        state = {name: value for name, value in state.items() if name not in head} | {name: own[name] for name in head}
    faults = {
        "missing": [name for name in own if name not in state],
        "not ours": [name for name in state if name not in own],
        "of another shape": [
            f"{name} {tuple(state[name].shape)} for {tuple(value.shape)}"
            for name, value in own.items()
            if name in state and state[name].shape != value.shape
        ],
    }
    if any(faults.values()):
        told = "; ".join(f"{len(names)} {kind}: {', '.join(names[:3])}" for kind, names in faults.items() if names)
        raise ValueError(f"{weights.path} doesn't fit this network ({told}): check backbone and input_shape")
    model.load_state_dict(state)


def resample_pos_embed(pos_embed: Tensor, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Resample a position embedding (1, 1 + h * w, C) from the grid of patches `source` = (h, w) to `target`.

    Bicubic, the class token's entry stays as it is; see section 3.2 of the ViT paper.
    """
    class_token, patches = pos_embed[:, :1], pos_embed[:, 1:]
    patches = patches.unflatten(1, source).permute(0, 3, 1, 2)  # (1, h * w, C) -> (1, C, h, w)
    patches = F.interpolate(patches.float(), size=target, mode="bicubic", align_corners=False).to(pos_embed.dtype)
    return torch.cat([class_token, patches.flatten(2).transpose(1, 2)], dim=1)
