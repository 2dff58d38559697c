"""Embeddings of images by a pretrained backbone, cached by the digest of their pixels."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nets.vit import SIZES
from nets.weights.load import Weights, read_weights
from nets.weights.pretrained import BUNDLED_FOLDER, BUNDLED_WEIGHTS
from utils.annotation.audited_images import AuditedImage
from utils.config.train_config import TrainConfig
from utils.data.cache_file import is_intact, replace_cache
from utils.data.preprocessing import Preprocessing
from utils.data.transforms import EvalTransform
from utils.modeling.build import build_network
from utils.modeling.pixel_network import PixelNetwork
from utils.modeling.precision import autocast, choose_precision, pick_device
from utils.system.digests import IMAGE_CODE, code_digest, digest
from utils.system.thread_map import map_parallel

DINOV2 = ("vit_s_14", "vit_b_14", "vit_l_14")
"""Backbones whose weights are looked for in `model_data/` if none is named."""
PATCHES = 8
"""Rows and columns of patches: 112 x 112 pixels for DINOv2, and 32 x 32 for the bundled network."""
BATCH = 32
CODE = (*IMAGE_CODE, "nets", "utils/modeling")
"""The packages that decide embeddings."""


class Embeddings(NamedTuple):
    """Class tokens of N images.

    Attributes:
        middle: (N, C), after two thirds of the blocks: what an image looks like.
        both: (N, 2C), the middle and the last: also what it shows.
    """

    middle: np.ndarray
    both: np.ndarray


def choose_backbone(deep: bool | str) -> TrainConfig:
    """Return settings with the backbone, its weights and its input shape.

    Args:
        deep: a file of weights of a ViT; the name of a ViT, whose published weights are used; or True: the first of
            `DINOV2` with weights in `model_data/`, else the bundled weights.

    Raises:
        ValueError: it is none of these, or the network of the file is unknown.
    """
    if deep is True:
        deep = next(filter(_has_weights, DINOV2), BUNDLED_WEIGHTS.stem)
        if deep == BUNDLED_WEIGHTS.stem:
            print(
                f"deep=True: no weights of DINOv2 in model_data/: the bundled network is used, which knows only small "
                f"images; for photos give --deep {DINOV2[0]}, which downloads DINOv2, or --deep FILE with its weights"
            )
    if Path(deep).is_file():
        weights = read_weights(deep)
        name = _recognize_vit(weights)
        return TrainConfig(backbone=name, model_path=str(deep), input_shape=weights.input_shape or _shape(name))
    if deep not in SIZES:
        raise ValueError(f"deep={deep!r}: neither a file of weights nor a ViT; choose one of {', '.join(SIZES)}")
    return TrainConfig(backbone=deep, pretrained=True, input_shape=_shape(deep))


def _has_weights(name: str) -> bool:
    places = (Path("model_data"), BUNDLED_FOLDER)
    return any((place / f"{name}{suffix}").is_file() for place in places for suffix in (".safetensors", ".pth"))


def _shape(name: str) -> tuple[int, int]:
    side = PATCHES * SIZES[name].patch_size
    return side, side


def _recognize_vit(weights: Weights) -> str:
    """Return the name in `SIZES` of the network that `weights` are for."""
    blocks = [int(name.split(".")[1]) for name in weights.state if name.startswith("blocks.")]
    if blocks and "patch_embed.proj.weight" in weights.state:
        num_features, _, patch_size, _ = weights.state["patch_embed.proj.weight"].shape
        for name, size in SIZES.items():
            if (size.num_features, size.patch_size, size.depth) == (num_features, patch_size, 1 + max(blocks)):
                return name
    raise ValueError(
        f"deep={str(weights.path)!r}: its network isn't a ViT of a known size; give weights of one of "
        f"{', '.join(SIZES)}"
    )


def embed_images(images: Sequence[AuditedImage], config: TrainConfig) -> Embeddings:
    """Return the embeddings, fp32, of readable images; those in `cache_dir` aren't computed again.

    Args:
        images: one or more.
        config: from `choose_backbone`; its `cache_dir`, `max_pixels` and `allow_truncated` apply.

    Raises:
        ImageError: an image can't be read any more.
        FileNotFoundError: there are no weights, and they can't be downloaded.
    """
    config, model, origin, _ = build_network(config.with_defaults(), ["any", "other"])  # the head isn't used
    preprocessing = Preprocessing.from_config(config)
    network = PixelNetwork(model.eval(), preprocessing, pick_device(config.device))
    content = digest([origin["sha256"], str(preprocessing), config.device, code_digest(CODE)])
    path = Path(config.cache_dir, f"embeddings-{origin['sha256'][:8]}-{content}.npz")
    known = _read_cache(path)
    missing = {image.fingerprint.digest: image.path for image in images if image.fingerprint.digest not in known}
    if missing:
        try:
            for key, embedding in zip(missing, _embed(list(missing.values()), network, preprocessing), strict=True):
                known[key] = embedding
        finally:  # an interrupted audit resumes from here
            _write_cache(path, known)
    both = np.stack([known[image.fingerprint.digest] for image in images])
    return Embeddings(both[:, : both.shape[1] // 2], both)


def _embed(paths: Sequence[str], network: PixelNetwork, preprocessing: Preprocessing) -> Iterator[np.ndarray]:
    """Yield the class tokens (2C,) of the middle and the last block for each image."""
    transform = EvalTransform(preprocessing)

    def load(path: str) -> Tensor:
        with preprocessing.open(path) as image:
            return transform.resize(transform.region(image))

    pixels = map_parallel(load, paths, "embedding images")
    while batch := list(islice(pixels, BATCH)):
        yield from _class_tokens(network, torch.stack(batch)).numpy()


@torch.inference_mode()
def _class_tokens(network: PixelNetwork, pixels: Tensor) -> Tensor:
    """Return the class tokens (B, 2C) of the middle and the last block for pixels (B, 3, height, width)."""
    device = network.normalize.scale.device
    parts = network.model.parts()  # the embedding, the blocks, the last norm
    with autocast(device, choose_precision("auto", device)[0]):
        x = network.normalize(pixels.to(device))
        for i, part in enumerate(parts):
            x = part.forward(x)
            if i == 2 * (len(parts) - 2) // 3:
                middle = x[:, 0]
        return torch.cat([middle, x], dim=1).float().cpu()


def _read_cache(path: Path) -> dict[bytes, np.ndarray]:
    try:
        if not is_intact(path):
            return {}
        with np.load(path) as stored:
            return dict(zip(map(bytes, stored["digests"]), stored["embeddings"], strict=True))
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):  # missing or damaged
        return {}


def _write_cache(path: Path, known: dict[bytes, np.ndarray]) -> None:
    digests = np.array([np.frombuffer(key, np.uint8) for key in known])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_cache(path, replaces=f"{path.name.rpartition('-')[0]}-*") as file:
            np.savez(file, digests=digests, embeddings=np.stack(list(known.values())))
    except OSError as error:
        print(f"warning: {path} can't be written ({error}): embeddings are not cached")
