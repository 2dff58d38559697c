"""Outputs of small trained networks on images that they haven't seen, for calibration.py and ood.py.

Networks have DINOv2's ViT-S/14 at 70 pixels, and see images cut from the training images of four data sets, by seed.
Every third training image serves for testing, as in best_epoch.py; the data sets' own test images aren't used. There
are three kinds of networks: with the frozen backbone and `probe`, the head of `head_init="probe"`; the same with
`overfitted`, logistic regression with hardly any penalty; and `fine-tuned` by train.py with `recipe="auto"`, which
takes minutes for each. Only the last has mirrored TTA views.
"""

from __future__ import annotations

import contextlib
import random
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from accuracy import auto_config, dinov2_in
from measure import DEVICE, PRECISION
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from time_to_accuracy import MEAN, STD, annotate_by_seed, in_temporary_folder
from torch import Tensor

import train
from utils.config.train_config import TrainConfig
from utils.data.preprocessing import Preprocessing
from utils.data.transforms import EvalTransform
from utils.inference.classifier import Classifier, load_classifier
from utils.inference.predictor import read_region
from utils.modeling.build import build_network
from utils.modeling.pixel_network import PixelNetwork, cast_for_inference
from utils.runs.checkpoint import BEST
from utils.training.linear_probe import fit_probe

SIDE, EPOCHS = 70, 4
TRAIN, VAL, TEST = 300, 300, 300
"""Images of each network, at most; trashnet has 200 of each."""
OVERFITTED_C = 10.0
"""scikit-learn's inverse penalty."""
OOD_OF = {
    "trashnet": "cifar10 0-4",
    "sign_digits": "mnist_png",
    "cifar10 0-4": "cifar10 5-9",
    "mnist_png": "sign_digits",
}
"""Data sets, and where the out-of-distribution images of each come from."""
CIFAR = {"cifar10 0-4": slice(0, 5), "cifar10 5-9": slice(5, 10)}
MAX_IMAGES = 900
"""Images of each data set that are used, evenly from its classes."""
BATCH = 12
"""Images, each with its views, in a forward pass."""

Labelled = list[tuple[int, Path]]
"""Class ids and images."""
Tensors = dict[str, Tensor]
"""Of the parts `train`, `val`, `test` and `ood`: `{part}_ids`, `{part}_embeddings` (N, C), `{part}_logits` (N,
classes), all of the center crop, and of `val` and `test` the logits of all TTA views, `{part}_views` (N, views,
classes)."""


def unpack(shared: Path, folder: Path) -> dict[str, Path]:
    """The folders of training images, one folder per class in each; those of CIFAR-10 are extracted to `folder`."""
    with tarfile.open(shared / "data/cifar10.tar") as archive:
        members = [m for m in archive if m.isfile() and Path(m.name).parts[-3] == "train"]
        names = sorted({Path(member.name).parts[-2] for member in members})
        for part, classes in CIFAR.items():
            for name in names[classes]:
                (folder / part / name).mkdir(parents=True)
                of_class = sorted(m.name for m in members if Path(m.name).parts[-2] == name)
                for file in of_class[: MAX_IMAGES // 5]:
                    (folder / part / name / Path(file).name).write_bytes(archive.extractfile(file).read())
    plain = {name: (shared / "data" / name / "train").resolve() for name in OOD_OF if name not in CIFAR}
    return plain | {name: folder / name for name in CIFAR}


def images_of(source: Path) -> tuple[Labelled, Labelled]:
    """The images of a data set, without and of every third one of each class, which are for testing."""
    rest, test = [], []
    folders = sorted(source.iterdir())
    for class_id, folder in enumerate(folders):
        for i, image in enumerate(sorted(folder.iterdir())[: MAX_IMAGES // len(folders)]):
            (test if i % 3 == 2 else rest).append((class_id, image))
    return rest, test


def divide(source: Path, seed: int) -> dict[str, Labelled]:
    """Training, validation and test images, drawn by seed."""
    rest, test = images_of(source)
    generator = random.Random(seed)
    generator.shuffle(rest)
    generator.shuffle(test)
    count = min(TRAIN, len(rest) // 2)
    return {"train": rest[:count], "val": rest[count : count + VAL], "test": test[:TEST]}


def pretrained_network(weights: Path) -> Classifier:
    """The pretrained network, with a random head."""
    config = TrainConfig(
        backbone="vit_s_14",
        model_path=str(weights),
        activation="gelu",
        image_mean=MEAN,
        image_std=STD,
        input_shape=(SIDE, SIDE),
    ).with_defaults()
    names = ["a", "b"]
    model, preprocessing = build_network(config, names).model, Preprocessing.from_config(config)
    network = cast_for_inference(PixelNetwork(model, preprocessing, DEVICE), PRECISION).eval()
    return Classifier(network, preprocessing, EvalTransform(preprocessing), names, DEVICE, PRECISION)


def train_network(config: TrainConfig, images: Labelled) -> Classifier:
    """Train on images, in an empty working folder."""
    data = Path("images").resolve()
    for _, image in images:
        link = data / "train" / image.parent.name / image.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(image)
    with Path("log.txt").open("w") as log, contextlib.redirect_stdout(log):
        annotate_by_seed(data, config.seed)
        train.main(config)
    (run,) = Path(config.save_dir).iterdir()
    return load_classifier(run / BEST)


def view_embeddings(classifier: Classifier, images: Labelled) -> Tensor:
    """Embeddings (N, views, C) of the TTA views of images; the first view is the center crop."""
    views, rows = classifier.tta_views, []
    for start in range(0, len(images), BATCH):
        batch = [
            views.resize(read_region(path, classifier.preprocessing, views))
            for _, path in images[start : start + BATCH]
        ]
        embeddings, _ = classifier.forward(torch.cat(batch))
        rows.append(embeddings.unflatten(0, (len(batch), -1)))
    return torch.cat(rows)


def embed_set(classifier: Classifier, source: Path) -> Tensors:
    """Embeddings (N, views, C) of the images of a data set, by path in it."""
    rest, test = images_of(source)
    images = rest + test
    rows = view_embeddings(classifier, images)
    return {str(path.relative_to(source)): row.clone() for (_, path), row in zip(images, rows, strict=True)}


def describe(parts: dict[str, Labelled], embeddings: dict[str, Tensor], head: Callable[[Tensor], Tensor]) -> Tensors:
    """The tensors of a network, of embeddings (N, views, C) of each part and its head."""
    tensors: Tensors = {}
    for part, images in parts.items():
        tensors[f"{part}_ids"] = torch.tensor([class_id for class_id, _ in images])
        tensors[f"{part}_embeddings"] = embeddings[part][:, 0].clone()
        logits = head(embeddings[part].flatten(0, 1)).unflatten(0, embeddings[part].shape[:2])
        tensors |= {f"{part}_views": logits, f"{part}_logits": logits[:, 0].clone()}
    return tensors


def fine_tuned(config: TrainConfig, parts: dict[str, Labelled]) -> Tensors:
    """The outputs of a network that is trained on the images `train`; the working folder must be empty."""
    classifier = train_network(config, parts["train"])
    embeddings = {part: view_embeddings(classifier, images) for part, images in parts.items()}
    head = classifier.network.model.head.float().cpu().requires_grad_(False)
    return describe(parts, embeddings, head)


def probe(x: Tensor, ids: np.ndarray) -> Callable[[Tensor], Tensor]:
    """The head of `head_init="probe"`, of training embeddings (N, C), a tenth of which choose the penalty."""
    held_out, features = np.arange(len(x)) % 10 == 0, x.numpy()
    sets = (features[~held_out], ids[~held_out], features[held_out], ids[held_out])
    fitted = fit_probe(*sets, num_classes=int(ids.max()) + 1, balanced=False)
    return lambda embeddings: embeddings @ fitted.weight.T + fitted.bias


def overfitted(x: Tensor, ids: np.ndarray) -> Callable[[Tensor], Tensor]:
    """A head that is fitted with hardly any penalty to embeddings (N, C)."""
    regression = make_pipeline(StandardScaler(), LogisticRegression(C=OVERFITTED_C, max_iter=1000)).fit(x.numpy(), ids)
    return lambda embeddings: torch.from_numpy(regression.decision_function(embeddings.numpy())).float()


HEADS = {"probe": probe, "overfitted": overfitted}


def with_head(kind: str, parts: dict[str, Labelled], embedded: dict[Path, Tensor]) -> Tensors:
    """The outputs of the pretrained network with a head that is fitted to the images `train`."""
    embeddings = {part: torch.stack([embedded[path] for _, path in images]) for part, images in parts.items()}
    ids = np.array([class_id for class_id, _ in parts["train"]])
    return describe(parts, embeddings, HEADS[kind](embeddings["train"][:, 0], ids))


def cached(file: Path, compute: Callable[[], Tensors]) -> Tensors:
    """What is in a file; if there is none, it is computed and written."""
    if not file.is_file():
        torch.save(compute(), file)
    return torch.load(file, weights_only=True)


def trained_outputs(seeds: int, tuned: int, shared: Path, folder: Path) -> Iterator[tuple[str, str, Tensors]]:
    """Yield data set, kind and outputs of each network; what takes long is kept in `folder`.

    Of each set there are `seeds` networks of each of `HEADS`, and `tuned` fine-tuned ones.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    weights = dinov2_in(shared)
    with tempfile.TemporaryDirectory() as unpacked:
        sources = unpack(shared, Path(unpacked))
        classifier = pretrained_network(weights)
        embedded: dict[Path, Tensor] = {}
        for name, source in sources.items():
            of_set = cached(folder / f"{name}.pt", partial(embed_set, classifier, source))
            embedded |= {source / path: rows for path, rows in of_set.items()}
        for name, seed in product(OOD_OF, range(seeds)):
            parts = divide(sources[name], seed) | {"ood": divide(sources[OOD_OF[name]], seed)["test"]}
            for kind in HEADS:
                yield name, kind, with_head(kind, parts, embedded)
            if seed < tuned:
                run = partial(in_temporary_folder, fine_tuned, auto_config(weights, SIDE, EPOCHS, seed), parts)
                yield name, "fine-tuned", cached(folder / f"{name} fine-tuned {seed}.pt", run)
