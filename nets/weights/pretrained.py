"""Which published weights go with a network, and where they are: in `model_data/`, in a cache, or on the network."""

from __future__ import annotations

from itertools import product
from pathlib import Path

from nets.timm_networks import TIMM, published_by_timm
from nets.torchvision_networks import TORCHVISION, published_by_torchvision
from nets.weights.hub import Found, download_from_hub, download_from_url
from nets.weights.load import LAYOUT_FILE

# timm's weights of the same networks on the Hugging Face hub. The names say what they learned from: ImageNet-21k,
# and most of them ImageNet-1k after it; DINO's and DINOv2's learned without labels.
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
BUNDLED_FOLDER = Path(__file__).resolve().parents[2] / "model_data"
"""Where weights lie that come with the project."""
BUNDLED_WEIGHTS = BUNDLED_FOLDER / "vit_xs_4.safetensors"
"""A small ViT for images of 32 x 32 pixels, see `recipes/cifar10.py`."""

FILE_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".npz", ".ckpt")
LAYOUT_FILES: dict[str, str] = {"vit_b_16": LAYOUT_FILE}


def find_pretrained(name: str, wanted: bool | str = True, folder: str | Path = "model_data") -> Found:
    """The pretrained weights for the network `name`.

    Args:
        name: of the network.
        wanted: a file; a repository on the Hugging Face hub, `owner/name` or `owner/name@revision`; or True: those that
            are published for the network, from `folder` (`<name>.safetensors` or `<name>.pth`, without timm/, or for
            the base ViT bubbliiiing's `vit-patch_16.pth`) or from `BUNDLED_FOLDER`, else from a cache, else downloaded
            to it.
        folder: see `wanted`.

    Raises:
        ValueError: no weights are published for `name`, or what was downloaded isn't what it was said to be.
        FileNotFoundError: there is no such file, and it can't be downloaded; says what to put where.
    """
    folder = Path(folder)
    if isinstance(wanted, str):
        return _find_named(wanted, folder)
    stem = name.removeprefix(TIMM)
    for place, file in product(
        (folder, BUNDLED_FOLDER), (LAYOUT_FILES.get(name), f"{stem}.safetensors", f"{stem}.pth")
    ):
        if file and (place / file).is_file():
            return Found(place / file)
    remedy = f"Fetch it where there is internet and put it at {folder / stem}.{{}}, or set pretrained=False"
    if name in TORCHVISION:
        return download_from_url(published_by_torchvision(name)[0], f"pretrained=True: {remedy.format('pth')}")
    repository = HUB_REPOS.get(name)
    if name.startswith(TIMM):
        repository, _ = published_by_timm(name)
    if repository is None:
        raise ValueError(
            f"pretrained=True: no weights are published for backbone={name!r}, only for "
            f"{', '.join([*HUB_REPOS, *TORCHVISION])}; choose one of them, or set pretrained=False"
        )
    return download_from_hub(repository, None, f"pretrained=True: {remedy.format('safetensors')}")


def _find_named(wanted: str, folder: Path) -> Found:
    if Path(wanted).is_file():
        return Found(Path(wanted))
    repository, _, revision = wanted.partition("@")
    owner, _, stem = repository.partition("/")
    is_path = stem.endswith(FILE_SUFFIXES) or Path(owner).is_dir()
    if is_path or not owner or not stem or "/" in stem or owner.startswith("."):
        raise FileNotFoundError(
            f"pretrained={wanted!r}: there is no such file, and it is no name on the Hugging Face hub, owner/name"
        )
    local = folder / f"{stem}.safetensors"
    remedy = f"Fetch its model.safetensors where there is internet, and set pretrained to where you put it, say {local}"
    return download_from_hub(repository, revision or None, remedy)
