"""Precision and recall of `python txt_annotation.py --deep` on planted outliers and swapped labels.

    python benchmarks/deep_audit.py --data FOLDER --weights FILE

`FOLDER` has a folder of images per class. Of up to `--images` of them, 5 % get the label of another class, and 2 % are
added that don't belong there, each once: placeholders of a photo site, screenshots of text, logos, and collages of four
of the images. The last line is JSON.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import tyro
from measure import print_result
from PIL import Image, ImageDraw, ImageFont, ImageOps

from utils.annotation.audited_images import AuditedImage
from utils.annotation.embeddings import choose_backbone
from utils.annotation.fingerprints import take_fingerprint
from utils.annotation.outliers import audit_embeddings

SWAPPED, ADDED = 0.05, 0.02
"""Parts of the images with a swapped label, and of added outliers."""
SIZE = (400, 300)
TEXTS = ("This photo is no longer available", "Image not found", "No image available", "Removed by its owner")
WORDS = "the of and a to in is that for on with as are this be at by from have it not or which you can was"

Draw = Callable[[np.random.Generator, Sequence[Path]], Image.Image]


def draw_placeholder(random: np.random.Generator, _: Sequence[Path]) -> Image.Image:
    """A gray image with a line of text."""
    level = int(random.integers(150, 245))
    image = Image.new("RGB", SIZE, (level, level, level))
    font = ImageFont.load_default(int(random.integers(16, 30)))
    text = str(random.choice(TEXTS))
    ImageDraw.Draw(image).text((200, random.integers(100, 200)), text, (level - 90,) * 3, font, anchor="mm")
    return image


def draw_screenshot(random: np.random.Generator, _: Sequence[Path]) -> Image.Image:
    """Lines of dark text on white."""
    image = Image.new("RGB", SIZE, "white")
    size = int(random.integers(10, 18))
    text = "\n".join(" ".join(random.choice(WORDS.split(), 8)) for _ in range(int(random.integers(6, 16))))
    ImageDraw.Draw(image).text(tuple(random.integers(5, 30, 2)), text, "black", ImageFont.load_default(size))
    return image


def draw_logo(random: np.random.Generator, _: Sequence[Path]) -> Image.Image:
    """Flat shapes on one color."""
    background, *colors = (tuple(color) for color in random.integers(0, 256, (4, 3)).tolist())
    image = Image.new("RGB", SIZE, background)
    draw = ImageDraw.Draw(image)
    for color in colors:
        x, y, radius = random.integers((120, 90, 30), (280, 210, 80)).tolist()
        if random.random() < 0.5:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), color)
        else:
            draw.regular_polygon((x, y, radius), int(random.integers(3, 7)), int(random.integers(90)), color)
    return image


def draw_collage(random: np.random.Generator, images: Sequence[Path]) -> Image.Image:
    """Four of the images in a grid."""
    collage = Image.new("RGB", SIZE)
    for i, index in enumerate(random.choice(len(images), 4, replace=False)):
        tile = ImageOps.fit(ImageOps.exif_transpose(Image.open(images[index])).convert("RGB"), (200, 150))
        collage.paste(tile, (200 * (i % 2), 150 * (i // 2)))
    return collage


OUTLIERS: dict[str, Draw] = {
    "placeholder": draw_placeholder,
    "screenshot": draw_screenshot,
    "logo": draw_logo,
    "collage": draw_collage,
}
WANTED = {"outlier": tuple(OUTLIERS), "likely wrong label": ("label",)}
"""The planted kinds that each kind of finding should list."""


def list_images(data: Path, images: int) -> list[tuple[Path, str]]:
    """Return (path, class) of up to `images` images in class folders, as many of each."""
    folders = sorted(folder for folder in data.iterdir() if folder.is_dir())
    return [(path, f.name) for f in folders for path in sorted(f.iterdir())[: max(1, images // len(folders))]]


def plant(images: Sequence[tuple[Path, str]], seed: int, folder: Path) -> tuple[list[AuditedImage], np.ndarray]:
    """Return images with planted faults, and for each the kind of fault: "" for none, "label", or one of `OUTLIERS`."""
    random = np.random.default_rng(seed)
    paths, names = [path for path, _ in images], [name for _, name in images]
    kinds = [""] * len(images)
    classes = sorted(set(names))
    for i in random.choice(len(images), round(len(images) * SWAPPED), replace=False):
        names[i], kinds[i] = str(random.choice([name for name in classes if name != names[i]])), "label"
    for i in range(round(len(images) * ADDED)):
        kind = list(OUTLIERS)[i % len(OUTLIERS)]
        path = folder / f"{seed}_{i}_{kind}.jpg"
        OUTLIERS[kind](random, paths[: len(images)]).save(path, quality=90)
        paths.append(path)
        names.append(str(random.choice(classes)))
        kinds.append(kind)
    prints = map(take_fingerprint, map(str, paths))
    placed = zip(map(str, paths), names, prints, strict=True)
    return [AuditedImage(path, "train", name, fingerprint) for path, name, fingerprint in placed], np.array(kinds)


def main(data: Path, weights: str, images: int = 600, seeds: int = 3, cache_dir: Path = Path("cache")) -> None:
    """Plant faults, and print what is found.

    Args:
        data: folder with a folder of images for each class.
        weights: a file of weights, or the name of a ViT.
        images: limit on the number of images.
        seeds: repeats with other faults.
        cache_dir: folder for cached embeddings.
    """
    config = dataclasses.replace(choose_backbone(weights), cache_dir=str(cache_dir))
    found, planted, listed, first = Counter(), Counter(), Counter(), Counter()
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            audited, kinds = plant(list_images(data, images), seed, Path(folder))
            kind_of = dict(zip((image.path for image in audited), kinds.tolist(), strict=True))
            counts = Counter(filter(None, kinds.tolist()))
            planted += counts
            for finding in audit_embeddings(audited, config):
                wanted = WANTED[finding.kind]
                number = sum(counts[kind] for kind in wanted)
                listed_kinds = [kind_of[image.path] for (image,) in finding.groups]
                listed[finding.kind] += len(listed_kinds)
                found.update((finding.kind, kind) for kind in listed_kinds)
                first[finding.kind] += sum(kind in wanted for kind in listed_kinds[:number]) / number / seeds
    finding_of = {kind: name for name, kinds in WANTED.items() for kind in kinds}
    recall = {kind: found[finding_of[kind], kind] / n for kind, n in planted.items()}
    precision = {kind: sum(found[kind, wanted] for wanted in WANTED[kind]) / n for kind, n in listed.items()}
    for kind, n in planted.items():
        print(f"{kind:<18} {n:4d} planted, {recall[kind]:.0%} found")
    for kind, n in listed.items():
        swapped = f", {found[kind, 'label']} of the others have swapped labels" if kind == "outlier" else ""
        print(f"{kind:<18} {n:4d} listed, {precision[kind]:.0%} of them planted{swapped}")
        print(f"{'':<18}      as many as were planted, from the top: {first[kind]:.0%} planted")
    print_result(
        "deep_audit",
        data=data.parent.name if data.name == "train" else data.name,
        weights=Path(weights).name,
        recall=recall,
        precision=precision,
        first=first,
    )


if __name__ == "__main__":
    tyro.cli(main)
