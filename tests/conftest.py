"""Fixtures that several tests share."""

import copy
import functools
import io
import os
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

import export
import train
from nets.vit import SIZES, Size
from utils.config.train_config import TrainConfig
from utils.export import formats, onnx_write
from utils.inference.classifier import load_classifier
from utils.runs.checkpoint import LAST, find_checkpoint
from utils.runs.run import Run
from utils.training.optimizer import set_learning_rate

# A second thread is slower for networks as small as these, and one thread has a fixed order of summation.
torch.set_num_threads(1)

SHARED = Path(__file__).resolve().parents[2] / "shared"

SMALL = {
    "backbone": "vit_xs_4",
    "input_shape": (8, 8),
    "freeze_epoch": 1,
    "freeze_blocks": 4,
    "unfreeze_epoch": 4,
    "freeze_batch_size": 8,
    "unfreeze_batch_size": 6,
    "init_lr": 4e-3,
    "min_lr": 4e-5,
    "train_crop": 0.5,
    "augmentation": "none",  # it changes the brightness, in which the classes differ
    "num_workers": 0,
    "save_period": 2,
    "precision": "fp32",
}
"""A run of a few seconds with dropout, stochastic depth, random crops, mirroring and both stages."""
SIZES["vit_of_the_tests"] = Size(patch_size=4, num_features=48, depth=6, num_heads=3)
TINY = SMALL | {"backbone": "vit_of_the_tests"}
"""The same with a sixteenth of the weights, for tests that start no other process."""


def settings(**changes) -> TrainConfig:
    """A config with a value in every field."""
    return TrainConfig(**changes).with_defaults()


def train_epoch(trainer, loader, optimizer, number, learning_rate, after_step=lambda: None) -> dict[str, float]:
    """Train the remaining steps of an epoch as train.py does; return its summary."""
    epoch = trainer.start_epoch(loader, number)
    for inputs, targets in epoch.batches():
        rate = learning_rate(epoch.position)
        set_learning_rate(optimizer, rate)
        epoch.record(*trainer.train_step(inputs, targets, optimizer))
        trainer.non_finite.check(epoch, trainer.step, rate)
        after_step()
    return epoch.summary()


@pytest.fixture(autouse=True)
def no_graph(request, monkeypatch) -> None:
    """Skip tracing the network for TensorBoard, a quarter of the time of a run, except in tests marked `graph`."""
    if not request.node.get_closest_marker("graph"):
        monkeypatch.setattr(SummaryWriter, "add_graph", lambda *arguments: None)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def shared() -> Path:
    """The folder of real images and weights beside the project."""
    if not SHARED.is_dir():
        pytest.skip("no ../shared with real images beside the project")
    return SHARED


@pytest.fixture
def command(monkeypatch, capsys) -> Callable[..., subprocess.CompletedProcess]:
    """Runs `python <script> ...` in this process, since a new one takes seconds to import torch."""

    def run(script: str, *args: str, input: str = "") -> subprocess.CompletedProcess:
        monkeypatch.setattr(sys, "argv", [script, *args])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(input.encode())))
        capsys.readouterr()
        try:
            runpy.run_path(str(Path(train.__file__).with_name(script)), run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code or 0
        return subprocess.CompletedProcess(args, status, *capsys.readouterr())

    return run


def write_image(path: Path, level: int = 128, size: tuple[int, int] = (20, 16), seed: int = 0) -> Path:
    """Write a noisy image of mean brightness `level`, and its parent folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(-40, 40, (size[1], size[0], 3))
    Image.fromarray(np.clip(level + noise, 0, 255).astype(np.uint8)).save(path)
    return path


def touch(*names: str) -> None:
    """Create empty files, and their parent folders."""
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()


NAMES = ["dark", "light"]


def write_two_classes(datasets: Path) -> Path:
    """Write dark and light images to `datasets`: 24 and 16 for training, 6 and 5 for testing."""
    for split, counts in (("train", (24, 16)), ("test", (6, 5))):
        for name, level, count in zip(("dark", "light"), (60, 190), counts, strict=True):
            for i in range(count):
                write_image(datasets / split / name / f"{i:02d}.png", level, seed=i)
    return datasets


def write_scene(datasets: Path) -> None:
    """Write twenty near-duplicates in each of two classes, as of a fixed camera."""
    scene = Image.effect_noise((120, 90), 80).resize((480, 360), Image.Resampling.BICUBIC).convert("RGB")
    for name in ("good", "scratched"):
        (datasets / name).mkdir(parents=True)
        for i in range(20):
            image = scene.copy()
            image.paste((200, 30 if name == "good" else 90, i), (10 * i, 100, 10 * i + 8, 108))
            image.save(datasets / name / f"{i}.png")


def train_one_epoch(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start a run that is interrupted after its first epoch."""
    finish = Run.finish_epoch

    def interrupt(self, metrics):
        finish(self, metrics)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "finish_epoch", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train.main(config)


def write_back(run: Path, epoch: int) -> None:
    """Set a run back to its periodic checkpoint of `epoch`, as if it had been interrupted there."""
    (kept,) = run.glob(f"ep{epoch:03d}-*")
    for path in run.glob("*.safetensors"):
        if path != kept:
            path.unlink()
    kept.rename(run / LAST)


@pytest.fixture
def two_classes(here) -> Path:
    """`write_two_classes` in the working folder."""
    return write_two_classes(here / "datasets")


@pytest.fixture(scope="session")
def trained_folder(tmp_path_factory) -> Path:
    """A folder with a run on two classes; tests must not write there."""
    folder = tmp_path_factory.mktemp("trained")
    write_two_classes(folder / "datasets")
    before = Path.cwd()
    os.chdir(folder)
    try:
        train.main(TrainConfig(**SMALL))
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def trained(trained_folder, monkeypatch) -> Path:
    """The trained folder as the working folder."""
    monkeypatch.chdir(trained_folder)
    return trained_folder


EXPORTS = {
    "fp32": ("onnx", "fp32", "model.onnx"),
    "fp16": ("onnx", "fp16", "model_fp16.onnx"),
    "int8": ("onnx", "int8", "model_int8.onnx"),
    "pt2": ("pt2", "fp32", "model.pt2"),
    "safetensors": ("safetensors", "fp32", "model.safetensors"),
}
"""Format, precision and file name of the exports."""


@pytest.fixture(scope="session")
def export_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("exported")


@pytest.fixture(scope="session")
def traced() -> tuple[Callable, Callable]:
    """`trace` and `convert`, which take most of the time, with cached results for the one network."""
    trace, convert = formats.trace, onnx_write.convert
    program = functools.cache(lambda: trace(load_classifier(find_checkpoint(""), "cpu", precision="fp32")))
    model = functools.cache(lambda: convert(program()))
    return lambda _: program(), lambda _: copy.deepcopy(model())


@pytest.fixture
def exported(trained, export_folder, traced, monkeypatch) -> Callable[[str], Path]:
    """Exports the trained network, once, by the key of `EXPORTS`."""
    monkeypatch.setattr(formats, "trace", traced[0])
    monkeypatch.setattr(onnx_write, "convert", traced[1])

    def make(key: str) -> Path:
        format, precision, name = EXPORTS[key]
        if not (export_folder / name).exists():
            export.main(format=format, precision=precision, out=str(export_folder))
        return export_folder / name

    return make


CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


@pytest.fixture(scope="session")
def browser():
    """Chromium, driven by playwright."""
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed; on Debian: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield chromium
        chromium.close()


def wait_for_property(page, selector: str, name: str, value: object) -> None:
    """Wait until an element has this property. `page.wait_for_function` is stopped by the page's security policy unless
    the function is true at once."""
    from playwright.sync_api import expect

    expect(page.locator(selector)).to_have_js_property(name, value)


def open_page(browser, path: Path, width: int = 1280, scheme: str = "light"):
    """The page, its errors (console, dialogs, requests), and the seconds it took to load."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("dialog", lambda dialog: (errors.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: request.url.startswith(("file:", "data:")) or errors.append(request.url))
    start = time.perf_counter()
    page.goto(path.as_uri())
    return page, errors, time.perf_counter() - start
