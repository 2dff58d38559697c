"""Find the pretrained weights of a network: in `model_data/`, in a cache, or online."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from nets.timm_networks import TIMM, license_by_timm, published_by_timm
from nets.torchvision_networks import TORCHVISION, published_by_torchvision
from nets.weights.hub import FILE_SUFFIXES, WeightsFile, download_from_hub, download_from_url
from nets.weights.license import clean_license
from nets.weights.load import BUBBLIIIING_FILE
from nets.weights.sources import IMAGENET

# timm's weights on the Hugging Face hub. Names include the training data: ImageNet-21k (in21k), in most cases followed
# by ImageNet-1k (ft_in1k); DINO and DINOv2 are self-supervised.
HUB_REPOS: dict[str, str] = {
    "vit_t_16": "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k",
    "vit_s_8": "timm/vit_small_patch8_224.dino",
    "vit_s_14": "timm/vit_small_patch14_dinov2.lvd142m",
    "vit_s_16": "timm/vit_small_patch16_224.augreg_in21k_ft_in1k",
    "vit_b_8": "timm/vit_base_patch8_224.augreg_in21k_ft_in1k",
    "vit_b_14": "timm/vit_base_patch14_dinov2.lvd142m",
    "vit_b_16": "timm/vit_base_patch16_224.augreg2_in21k_ft_in1k",
    "vit_l_14": "timm/vit_large_patch14_dinov2.lvd142m",
    "vit_l_16": "timm/vit_large_patch16_224.augreg_in21k_ft_in1k",
    "vit_b_32": "timm/vit_base_patch32_224.augreg_in21k_ft_in1k",
    "vit_l_32": "timm/vit_large_patch32_384.orig_in21k_ft_in1k",
    "vit_h_14": "timm/vit_huge_patch14_224.orig_in21k",
}
PUBLISHED_PREPROCESSING: dict[str, dict[str, Any]] = {"vit_s_8": IMAGENET}
"""What weights of `HUB_REPOS` expect of images unlike others of their project, for files without their description."""
BUNDLED_FOLDER = Path(__file__).resolve().parents[2] / "model_data"
"""Folder of the weights that are part of the repository."""
BUNDLED_WEIGHTS = BUNDLED_FOLDER / "vit_xs_4.safetensors"
"""The bundled weights: a small ViT for images of 32 x 32 pixels, see `recipes/cifar10.py`."""

BUBBLIIIING_FILES: dict[str, str] = {"vit_b_16": BUBBLIIIING_FILE}


def find_pretrained(
    name: str, wanted: bool | str = True, folder: str | Path = "model_data", online: bool = True
) -> WeightsFile:
    """Find the pretrained weights of the network `name`, and download them if needed.

    Args:
        name: of the network.
        wanted: a file; a repository on the Hugging Face hub, `owner/name` or `owner/name@revision`; or True for the
            network's published weights. These are searched for in `folder` and `BUNDLED_FOLDER`, as
            `<name>.safetensors` or `<name>.pth` (without timm/; the base ViT also as `vit-patch_16.pth`), and then
            downloaded to a cache.
        folder: see `wanted`.
        online: whether to download published weights that are in no cache.

    Raises:
        ValueError: no weights are published for `name`, or the download is damaged.
        FileNotFoundError: there is no such file, and it can't be downloaded.
    """
    folder = Path(folder)
    if isinstance(wanted, str):
        return _find_named(wanted, folder, online)
    stem = name.removeprefix(TIMM)
    for place, file in product(
        (folder, BUNDLED_FOLDER), (BUBBLIIIING_FILES.get(name), f"{stem}.safetensors", f"{stem}.pth")
    ):
        if file and (place / file).is_file():
            origin = {"license": "mit"} if (place / file).resolve() == BUNDLED_WEIGHTS else {}
            return WeightsFile(place / file, origin, PUBLISHED_PREPROCESSING.get(name, {}))
    remedy = f"Download it on a computer with internet and put it at {folder / stem}.{{}}"
    if name in TORCHVISION:
        return download_from_url(published_by_torchvision(name)[0], remedy.format("pth"), online)
    repository = HUB_REPOS.get(name)
    if name.startswith(TIMM):
        repository, _ = published_by_timm(name)
    if repository is None:
        raise ValueError(
            f"pretrained=True: no weights are published for backbone={name!r}, only for "
            f"{', '.join([*HUB_REPOS, *TORCHVISION])}; choose one of them, or with ten thousand images or more "
            f"train from scratch, pretrained=False"
        )
    file = download_from_hub(repository, None, remedy.format("safetensors"), online)
    if name.startswith(TIMM) and "license" not in file.origin and (license := clean_license(license_by_timm(name))):
        return replace(file, origin={**file.origin, "license": license})
    return file


def _find_named(wanted: str, folder: Path, online: bool) -> WeightsFile:
    if Path(wanted).is_file():
        return WeightsFile(Path(wanted))
    repository, _, revision = wanted.partition("@")
    owner, _, stem = repository.partition("/")
    is_path = stem.endswith(FILE_SUFFIXES) or Path(owner).is_dir()
    if is_path or not owner or not stem or "/" in stem or owner.startswith("."):
        raise FileNotFoundError(
            f"pretrained={wanted!r}: no such file, and not a repository on the Hugging Face hub (owner/name)"
        )
    local = folder / f"{stem}.safetensors"
    remedy = f"Download its model.safetensors on a computer with internet and set pretrained to its path, e.g. {local}"
    return download_from_hub(repository, revision or None, remedy, online)
