"""Pretrained weights: where they are, and how they get into our networks."""

from __future__ import annotations

import math
import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# timm's weights of the same networks on the Hugging Face hub. The names say what they learned from: ImageNet-21k,
# and most of them ImageNet-1k after it.
HUB_REPOS: dict[str, str] = {
    "vit_t_16": "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k",
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
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.hf_hub_download(repo_id=repo, filename=HUB_FILE))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"pretrained=True: {HUB_FILE} of {repo} could not be fetched from the Hugging Face hub ({error}). "
            f"Fetch it where there is a network and put it at {fallback}, or set pretrained=False"
        ) from error


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file, of a state dict saved by torch, or of a checkpoint of Thaw, on the CPU.

    Nothing in the file is executed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it can't be opened, would run code, or holds no tensors by name.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}: check the path")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} can't be opened as weights: {error}") from error
    if isinstance(content, dict) and isinstance(content.get("weights"), dict):
        content = content["weights"]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state dict (tensors by name)")
    return content


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load the weights in `path` into a ViT, strictly but for two things, each of which is printed.

    A position embedding made for another grid of patches is resampled; a head for another number of classes is left
    out, and the model keeps its own.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: names or shapes differ in anything else; the message lists the first of them.
    """
    state = read_state_dict(path)
    own = model.state_dict()
    if "pos_embed" in state and state["pos_embed"].shape != own["pos_embed"].shape:
        state["pos_embed"] = resample_pos_embed(state["pos_embed"], model.grid)
        print(f"{path}: position embedding resampled to {model.grid[0]} x {model.grid[1]} patches")
    head = {name for name in own if name.startswith("head.")}
    if any(name not in state or state[name].shape != own[name].shape for name in head):
        outputs = state["head.bias"].shape[0] if "head.bias" in state else "no"
        print(f"{path}: its head of {outputs} classes is left out, ours starts anew with {own['head.bias'].shape[0]}")
        state = {name: value for name, value in state.items() if name not in head} | {name: own[name] for name in head}
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    misshapen = [
        f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if missing or unexpected or misshapen:
        faults = {"missing": missing, "not ours": unexpected, "of another shape": misshapen}
        told = "; ".join(f"{len(names)} {kind}: {', '.join(names[:3])}" for kind, names in faults.items() if names)
        raise ValueError(f"{path} doesn't fit this network ({told}): check backbone and input_shape")
    model.load_state_dict(state)


def resample_pos_embed(pos_embed: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resample the position embedding of a square grid of patches (1, 1 + n * n, C) to another grid, bicubically.

    The class token's entry stays as it is. See section 3.2 of the ViT paper.

    Raises:
        ValueError: the patches of `pos_embed` are no square.
    """
    class_token, patches = pos_embed[:, :1], pos_embed[:, 1:]
    side = math.isqrt(patches.shape[1])
    if side * side != patches.shape[1]:
        raise ValueError(
            f"a position embedding of {patches.shape[1]} patches is no square and can't be resampled to "
            f"{grid[0]} x {grid[1]}: use weights of a square input_shape, or the input_shape that they were made for"
        )
    patches = patches.unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1, n * n, C) -> (1, C, n, n)
    patches = F.interpolate(patches.float(), size=grid, mode="bicubic", align_corners=False).to(pos_embed.dtype)
    return torch.cat([class_token, patches.flatten(2).transpose(1, 2)], dim=1)
