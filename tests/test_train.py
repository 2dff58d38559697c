"""train.py, from images to checkpoints."""

import dataclasses
import importlib
import itertools
import json
import math
import re
import shutil
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

import eval as evaluation
import train
from nets.factory import build_model
from tests.conftest import NAMES, SMALL, TINY, settings, write_image, write_two_classes
from tests.faults.harness import digest
from utils.annotation.annotate import annotate
from utils.config.train_config import StageConfig
from utils.data.image_list import read_list
from utils.data.preprocessing import resolve_preprocessing
from utils.modeling.build import build_network
from utils.runs.checkpoint import BEST, LAST, find_checkpoint, load_checkpoint, save_checkpoint
from utils.runs.folder import new_run_folder
from utils.runs.log import RunLog
from utils.runs.resume import open_run
from utils.training.datasets import StageInputs
from utils.training.non_finite import NonFiniteLoss
from utils.training.trainer import Trainer


def only_run(folder: Path = Path()) -> Path:
    (run,) = Path(folder, "logs").iterdir()
    return run


def state_of(checkpoint) -> str:
    return digest([checkpoint[key] for key in ("weights", "optimizer", "step", "epoch", "best_val_loss")])


def without_times(history) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in ("seconds", "time")} for row in history]


def test_files_of_a_run(trained):
    run = only_run()
    names = {path.name for path in run.iterdir()}
    assert {BEST, LAST, "config.json", "epoch_loss.txt", "epoch_val_loss.txt", "epoch_loss.png"} <= names
    assert sorted(name[:5] for name in names if name.startswith("ep0")) == ["ep002", "ep004"]
    assert json.loads((run / "config.json").read_text()) == settings(**SMALL).as_dict()
    last = load_checkpoint(run / LAST)
    assert [float(line) for line in (run / "epoch_loss.txt").read_text().split()] == [
        r["loss"]
        for r in last["history"][1:]  # without epoch 0
    ]
    assert (run / "epoch_loss.png").read_bytes().startswith(b"\x89PNG")
    with Image.open(run / "augmented.png") as grid:
        assert grid.size == (4 * (8 + 4) + 4, 4 * (8 + 4) + 4)  # 16 images of 8 x 8


def test_loss_curve_is_drawn_at_intervals_and_at_the_end(here, monkeypatch):
    rows = [
        dict.fromkeys(("loss", "top1", "val_loss", "val_top1"), 0.5) | {"epoch": i, "step": i, "time": i}
        for i in range(4)
    ]
    drawn = []
    monkeypatch.setattr("utils.runs.curves.plot_losses", lambda history: drawn.append(len(history)) or Figure())
    log = RunLog(here, [])
    for i in range(1, 4):
        log.log_epoch(rows[:i])
    assert drawn == []
    monkeypatch.setattr("utils.runs.log.DRAW_EVERY", 0.0)
    log.log_epoch(rows)
    assert drawn == [4]
    log.close()  # no new epoch
    assert drawn == [4]
    RunLog(here, rows).close()  # a resumed run, perhaps interrupted before the last drawing
    assert drawn == [4, 4]


def test_checkpoint_content(trained):
    last = load_checkpoint(only_run() / LAST)
    assert last["class_names"] == ["dark", "light"]
    assert (last["epoch"], last["step"]) == (4, 36 // 8 + 3 * (36 // 6))
    assert last["config"] == resolve_preprocessing(settings(**SMALL), {}).as_dict()
    assert last["origin"] == {}
    assert last["preprocessing"]["input_shape"] == [8, 8]
    build_model(**last["model"]).load_state_dict(last["weights"], strict=True)
    assert [row["epoch"] for row in last["history"]] == [0, 1, 2, 3, 4]


def test_best_checkpoint_is_of_the_best_epoch(trained):
    best, last = (load_checkpoint(only_run() / name) for name in (BEST, LAST))
    candidates = [row["epoch"] for row in last["history"] if not row["val_beaten"] and not row["val_worse"]]
    assert best["epoch"] == max(candidates)
    assert best["best_val_loss"] == last["best_val_loss"] == last["history"][best["epoch"]]["val_loss"]


def test_training_learns(trained):
    last = load_checkpoint(only_run() / LAST)
    assert last["history"][-1]["val_top1"] == 1.0
    assert last["history"][-1]["val_loss"] < last["history"][0]["val_loss"]


def test_tensorboard_has_scalars_images_and_the_graph(trained):
    events = EventAccumulator(str(only_run()))
    events.Reload()
    history = load_checkpoint(only_run() / LAST)["history"]
    for name in ("loss", "val_loss", "top1", "val_top1", "learning_rate"):
        points = events.Scalars(name)
        rows = [row for row in history if np.isfinite(row[name])]
        assert [point.value for point in points] == pytest.approx([row[name] for row in rows])
        assert [point.step for point in points] == [row["step"] for row in rows]
    assert [row["step"] for row in history] == [0, 4, 10, 16, 22]
    assert len(events.Tags()["images"]) >= 1
    assert events.Tags()["graph"]


def test_network_that_cannot_be_traced_is_trained(two_classes, monkeypatch, capsys):
    def fail(*arguments: object) -> None:
        raise RuntimeError("Tracer cannot infer")

    monkeypatch.setattr(SummaryWriter, "add_graph", fail)
    train.main(settings(**TINY | {"unfreeze_epoch": 2}))
    assert "the graph of the network isn't logged, torch can't trace it (Tracer" in capsys.readouterr().out
    assert load_checkpoint(only_run() / LAST)["epoch"] == 2


def test_frozen_then_thawed(two_classes):
    """The frozen part is constant in stage 1 and changes in stage 2."""
    config = settings(**TINY | {"save_period": 1})
    start = {name: value.clone() for name, value in build_network(config, NAMES).model.state_dict().items()}
    train.main(config)
    first, second = (load_checkpoint(next(only_run().glob(f"ep{n:03d}-*")))["weights"] for n in (1, 2))
    for name in start:
        frozen = name.startswith(
            ("patch_embed", "cls_token", "pos_embed", "blocks.0.", "blocks.1.", "blocks.2.", "blocks.3.")
        )
        assert torch.equal(first[name], start[name]) == frozen, name
        assert not torch.equal(second[name], start[name]), name


GRADUAL = {
    "stages": (StageConfig(1, "all", 8), StageConfig(1, 4, 7), StageConfig(1, "nothing", 6)),
    "thaw_warmup": 0.5,
    "save_period": 1,
}


def test_gradual_thawing_and_resuming(two_classes, monkeypatch):
    """Each layer changes from its stage on; a run interrupted between stages gives the same result."""
    config = settings(**TINY | GRADUAL)
    start = {name: value.clone() for name, value in build_network(config, NAMES).model.state_dict().items()}
    train.main(config)
    states = [start] + [load_checkpoint(next(only_run().glob(f"ep{n:03d}-*")))["weights"] for n in (1, 2, 3)]
    thawed_in = {"head.": 0, "blocks.5.": 1, "norm.": 1, "blocks.3.": 2, "patch_embed": 2, "pos_embed": 2}
    for part, first in thawed_in.items():
        for name in (name for name in start if name.startswith(part)):
            moved = [not torch.equal(before[name], after[name]) for before, after in pairwise(states)]
            assert moved == [stage >= first for stage in range(3)], name
    check_interrupted_runs(config, (1, 2), monkeypatch)


def check_interrupted_runs(config, epochs, monkeypatch):
    """Check that runs interrupted after each of `epochs` and resumed equal the run in `logs`."""
    whole = state_of(load_checkpoint(only_run() / LAST))
    for epoch in epochs:

        def interrupt(path, content, pieces, epoch=epoch):
            if content["epoch"] > epoch:
                raise KeyboardInterrupt
            save_checkpoint(path, content, pieces)

        again = dataclasses.replace(config, save_dir=f"logs{epoch}")
        with monkeypatch.context() as patch:
            patch.setattr("utils.runs.saving.save_checkpoint", interrupt)
            with pytest.raises(KeyboardInterrupt):
                train.main(again)
        train.main(again)
        assert state_of(load_checkpoint(next(Path(again.save_dir).glob(f"*/{LAST}")))) == whole


GROWING = {
    "input_shape": (16, 16),
    "stages": (StageConfig(1, "all", 8, (8, 8)), StageConfig(2, 4, 7, (12, 8)), StageConfig(1, "nothing", 6)),
    "ema_decay": 0.5,
    "save_period": 1,
}


@pytest.mark.parametrize(
    ("backbone", "optimizer"),
    [("vit_of_the_tests", "muon"), pytest.param("mobilenetv2", "adamw", marks=pytest.mark.slow)],
)
def test_growing_images_and_resuming(two_classes, monkeypatch, backbone, optimizer):
    """Checkpoints have the input shape of their stage; an interrupted run gives the same result."""
    variant = {"backbone": backbone, "optimizer_type": optimizer, "device": "cpu"}  # GPUs aren't deterministic
    config = settings(**TINY | GROWING | variant)
    train.main(config)
    for number, shape in enumerate(stage.input_shape for stage in config.all_stages for _ in range(stage.epochs)):
        checkpoint = load_checkpoint(next(only_run().glob(f"ep{number + 1:03d}-*")))
        assert checkpoint["model"]["input_shape"] == checkpoint["preprocessing"]["input_shape"] == list(shape)
        for weights in (checkpoint["weights"], checkpoint["weights_in_training"]):
            build_model(**checkpoint["model"]).load_state_dict(weights)
    assert load_checkpoint(only_run() / BEST)["epoch"] == 4  # the only one with the last input shape
    monkeypatch.setattr("utils.training.lr_finder.STEPS", 3)
    monkeypatch.setattr(
        "utils.training.lr_finder.suggest", lambda rates, losses: 1e-3
    )  # the loss may not fall in so few steps
    train.main(dataclasses.replace(config, save_dir="tried"), find_lr=True)
    check_interrupted_runs(config, (2,), monkeypatch)  # within the second stage


def test_patience_stops_a_run(two_classes, monkeypatch, capsys):
    """It counts epochs of the last stage only; also if interrupted right before the end."""
    values = [1.0, 0.25, 0.5, 0.75, 0.875, 0.9375, 0.375, 0.4375, 0.5, 0.75]  # epoch 0, three of stage 1
    losses = iter(values)
    calibrated = lambda logits, targets: torch.full((4,), next(losses))  # noqa: E731
    monkeypatch.setattr("utils.training.trainer.calibrated_losses", calibrated)
    config = settings(**TINY | {"freeze_epoch": 3, "unfreeze_epoch": 20, "patience": 3})
    with monkeypatch.context() as patch:
        patch.setattr("utils.runs.run.Run.finish", lambda run, calibrate: None)
        train.main(config)
    assert "stopped early: no lower calibrated validation loss" in capsys.readouterr().out
    last = load_checkpoint(only_run() / LAST)
    assert [row["val_calibrated_loss"] for row in last["history"]] == values
    train.main(config)
    assert state_of(load_checkpoint(only_run() / LAST)) == state_of(last)
    assert load_checkpoint(only_run() / LAST)["finished"]
    assert load_checkpoint(only_run() / BEST)["epoch"] == 1


def test_run_depends_on_seed_but_not_on_workers(two_classes):
    digests = []
    for i, changes in enumerate(({}, {}, {"num_workers": 2}, {"seed": 12})):
        train.main(settings(**TINY | {"save_dir": f"logs{i}", "unfreeze_epoch": 2} | changes))
        digests.append(state_of(load_checkpoint(next(Path(f"logs{i}").glob(f"*/{LAST}")))))
    assert digests[0] == digests[1] == digests[2]
    assert digests[0] != digests[3]


@pytest.mark.parametrize("stop_after", [1, 2])
def test_resumed_run_equals_an_uninterrupted_one(trained, tmp_path, monkeypatch, capsys, stop_after):
    """Interrupted between the stages and in the second, after an epoch is logged and before it is saved."""
    whole = load_checkpoint(only_run() / LAST)
    shutil.copytree(trained / "datasets", tmp_path / "datasets")
    monkeypatch.chdir(tmp_path)
    config = settings(**SMALL)

    def interrupt(path, content, pieces):
        if content["epoch"] > stop_after:
            raise KeyboardInterrupt
        save_checkpoint(path, content, pieces)

    with monkeypatch.context() as patch:
        patch.setattr("utils.runs.saving.save_checkpoint", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train.main(config)
    run = only_run()
    assert load_checkpoint(run / LAST)["epoch"] == stop_after
    train.main(config)
    resumed = load_checkpoint(only_run() / LAST)
    assert f"run       {run} (resumed after epoch {stop_after}" in capsys.readouterr().out
    assert state_of(resumed) == state_of(whole)
    assert without_times(resumed["history"]) == without_times(whole["history"])
    assert len((run / "epoch_loss.txt").read_text().split()) == 4
    events = EventAccumulator(str(run))
    events.Reload()
    assert [point.step for point in events.Scalars("loss")] == [4, 10, 16, 22]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"input_shape": (12, 12)}, r"input_shape was \[8, 8\] and is \[12, 12\]"),
        ({"weight_decay": 0.5}, "weight_decay was 0.05 and is 0.5"),
        ({"optimizer_type": "sgd"}, "optimizer_type was 'adamw' and is 'sgd'"),
        ({"precision": "fp16", "seed": 3}, "precision was 'fp32' and is 'fp16', seed was 11 and is 3"),
        ({"freeze_epoch": 2}, "freeze_epoch was 1 and is 2"),
        ({"letterbox_image": True}, "letterbox_image was False"),
    ],
)
def test_resuming_with_other_settings_is_refused(trained, changed, message):
    with pytest.raises(ValueError, match=rf"^resume=.*{message}"):
        train.main(settings(**SMALL | changed, resume=str(only_run())))


def test_resuming_with_other_classes_is_refused(trained):
    config = settings(**SMALL, resume=str(only_run()))
    with pytest.raises(ValueError, match=r"has the classes dark, light, and .* has light, dark"):
        open_run(config, ["light", "dark"], {})


def test_resuming_from_an_older_checkpoint_is_refused(trained):
    older = next(only_run().glob("ep002-*"))
    with pytest.raises(ValueError, match=r"from its last checkpoint.*set model_path"):
        train.main(settings(**SMALL, resume=str(older)))


def test_resuming_keeps_the_gelu_of_the_weights(trained):
    resumed = load_checkpoint(only_run() / LAST)
    resumed["model"]["activation"] = "gelu"
    resumed["preprocessing"]["interpolation"] = "bicubic"
    config = settings(**SMALL, pretrained=True)
    resolved, model, *_ = build_network(config, NAMES, resumed)
    assert model.blocks[0].mlp.act.approximate == "none"
    assert resolved.interpolation == "bicubic"
    assert all(torch.equal(value, resumed["weights"][name]) for name, value in model.state_dict().items())


def test_resuming_a_finished_run_does_nothing(trained, capsys):
    before = (only_run() / LAST).read_bytes()
    train.main(settings(**SMALL, resume=str(only_run())))
    assert (only_run() / LAST).read_bytes() == before
    assert "epoch 5" not in capsys.readouterr().out


def test_starting_from_weights(trained, tmp_path, capsys):
    best = only_run() / BEST
    model = build_network(settings(**SMALL, model_path=str(best)), NAMES).model
    weights = load_checkpoint(best)["weights"]
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    build_network(settings(**SMALL, model_path=str(best)), ["a", "b", "c"])
    assert "head of 2 other classes isn't loaded; the new head has 3 classes" in capsys.readouterr().out
    model = build_network(settings(**SMALL, model_path=str(best)), ["cat", "dog"]).model
    assert "head of 2 other classes isn't loaded" in capsys.readouterr().out
    assert not torch.equal(model.head.weight, weights["head.weight"])
    assert torch.equal(model.norm.weight, weights["norm.weight"])


def test_a_new_head_differs_from_the_old_heads_initial_numbers(trained):
    """Otherwise, with the classes in another order, each image would first look like the other class."""
    initial = build_network(settings(**SMALL), NAMES).model.head.weight
    old = load_checkpoint(find_checkpoint(""))["weights"]["head.weight"]
    new = build_network(settings(**SMALL, model_path=str(find_checkpoint(""))), NAMES[::-1]).model.head.weight
    assert not torch.equal(new, initial)
    assert torch.cosine_similarity(old[0], initial[0], dim=0) > 0.9
    assert torch.cosine_similarity(new, initial, dim=1).abs().max() < 0.5


def test_model_path_overrides_pretrained(trained):
    best = only_run() / BEST
    model = build_network(settings(**SMALL, pretrained=True, model_path=str(best)), NAMES).model
    assert torch.equal(model.norm.weight, load_checkpoint(best)["weights"]["norm.weight"])


def test_gelu_of_a_checkpoint_is_kept(trained, tmp_path):
    checkpoint = load_checkpoint(only_run() / BEST)
    checkpoint["model"]["activation"] = "gelu"
    torch.save(checkpoint, tmp_path / "w.pth")
    model = build_network(settings(**SMALL, model_path=str(tmp_path / "w.pth")), NAMES).model
    assert model.blocks[0].mlp.act.approximate == "none"


def test_config_is_applied_to_the_network():
    config = settings(
        **TINY, drop_rate=0.2, attn_drop_rate=0.3, drop_path_rate=0.4, activation="gelu", freeze_train=False
    )
    block = build_network(config, NAMES).model.blocks[-1]
    assert (block.mlp.drop1.p, block.attn.attn_drop_rate, block.drop_path.drop_rate) == pytest.approx((0.2, 0.3, 0.4))
    assert block.mlp.act.approximate == "none"
    with pytest.raises(ValueError, match="pretrained=True: no weights are published"):
        build_network(settings(**TINY | {"backbone": "vit_t_4"}, pretrained=True), NAMES)


def test_weights_depend_on_the_seed():
    one, same, other = (build_network(settings(**TINY, seed=seed), NAMES).model.head.weight for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"backbone": "resnet51"}, "backbone='resnet51'"),
        ({"input_shape": (9, 8)}, "input_shape"),
        ({"freeze_blocks": 8}, "freeze_blocks=8: this network has 6 blocks"),
    ],
)
def test_invalid_network_fails_before_writing(here, changed, message):
    with pytest.raises(ValueError, match=message):
        train.main(settings(**TINY | changed))
    assert list(here.iterdir()) == []


def test_missing_weights_leave_no_run(two_classes):
    with pytest.raises(FileNotFoundError, match=r"there is no file nowhere\.pth"):
        train.main(settings(**TINY, model_path="nowhere.pth"))
    assert not list(Path("logs").iterdir())


def test_two_runs_in_one_second(here):
    folders = [new_run_folder("logs") for _ in range(5)]
    assert len(set(folders)) == 5
    assert all(folder.is_dir() for folder in folders)


def test_summary_writes_nothing(two_classes, monkeypatch):
    before = set(Path.cwd().rglob("*"))
    for folder in (".", "empty"):
        Path(folder).mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        with pytest.raises(FileNotFoundError, match="there are no lists yet, and --summary writes nothing: run python"):
            train.main(settings(**TINY, demo=True), summary=True)
    assert set(two_classes.parent.rglob("*")) == before | {two_classes.parent / "empty"}


def test_summary(two_classes, capsys):
    annotate(audit=False)
    train.main(settings(**TINY), summary=True)
    printed = capsys.readouterr().out
    assert not Path("logs").exists()
    model = build_model("vit_of_the_tests", 2, (8, 8))
    assert f"{sum(p.numel() for p in model.parameters()):,}" in printed
    assert "stage 1   epoch 1, 8 x 8 pixels, frozen: stem or embeddings and first 4 blocks; 4 steps" in printed
    assert "stage 2   epochs 2 to 4, 8 x 8 pixels, frozen: nothing; 6 steps of 6 images per epoch; learning" in printed
    # The second stage continues the cosine of the whole run.
    highest = [float(rate) for rate in re.findall(r"learning rate peaks at ([\d.e-]+), ends at", printed)]
    assert highest == pytest.approx([1.25e-4, 8.4e-5], rel=0.05)
    assert "warning: the images have" not in printed


def test_non_finite_loss_keeps_the_last_good_checkpoint(two_classes, monkeypatch):
    start_epoch = Trainer.start_epoch

    def poison_third(trainer, loader, number):
        if number == 2:
            with torch.no_grad():
                trainer.network.model.head.weight.mul_(math.nan)
        return start_epoch(trainer, loader, number)

    monkeypatch.setattr(Trainer, "start_epoch", poison_third)
    with pytest.raises(NonFiniteLoss, match=r"finite at step 11 .*images: datasets.train"):
        train.main(settings(**TINY))
    for name in (BEST, LAST):
        checkpoint = load_checkpoint(only_run() / name)
        assert checkpoint["epoch"] <= 2
        assert all(value.isfinite().all() for value in checkpoint["weights"].values())


def test_freezing_an_untrained_backbone_warns(capsys):
    build_network(settings(**TINY), NAMES)
    assert "freezes an untrained backbone" in capsys.readouterr().out
    build_network(settings(**TINY | {"freeze_train": False}), NAMES)
    assert "untrained" not in capsys.readouterr().out


def test_small_images_and_large_input_shape_warn(two_classes, capsys):
    annotate(audit=False)
    for side, warned in ((64, False), (72, True)):
        train.main(settings(**TINY | {"input_shape": (side, side)}), summary=True)
        assert ("pixels, input_shape (72, 72) enlarges them to 5184" in capsys.readouterr().out) == warned


def test_photos_and_small_input_shape_warn(here, capsys):
    for name in "ab":
        for i in range(3):
            write_image(here / "datasets" / name / f"{i}.png", size=(400, 300), seed=ord(name) + i)
    annotate(audit=False)
    train.main(settings(**TINY), summary=True)
    assert "warning: the images have about 120 thousand pixels" in capsys.readouterr().out


def test_missing_list(here):
    write_two_classes(here / "datasets")
    annotate()
    with pytest.raises(FileNotFoundError, match=r"mine\.txt"):
        train.main(settings(**TINY, train_annotation_path="mine.txt"))


def test_balanced_sampler_and_class_weights(two_classes, monkeypatch):
    """Of 22 dark and 14 light images."""
    made = {}

    def recording(name, make):
        def recorded(*args, **options):
            made[name] = make(*args, **options)
            return made[name]

        return recorded

    for module, name in (("datasets", "train_loader"), ("trainer", "Trainer")):
        module = importlib.import_module(f"utils.training.{module}")
        monkeypatch.setattr(module, name, recording(name, getattr(module, name)))
    monkeypatch.setattr(Trainer, "start_epoch", lambda *args: 1 / 0)
    for balance in ({}, {"sampler": "balanced"}, {"class_weights": "balanced"}):
        made.clear()
        with pytest.raises(ZeroDivisionError):
            train.main(settings(**TINY, **balance, resume="no"))
        loader, loss = made["train_loader"], made["Trainer"].loss
        assert loader.batch_sampler.keys.sampling == balance.get("sampler", "shuffle")
        expected = pytest.approx([36 / 2 / 22, 36 / 2 / 14]) if "class_weights" in balance else None
        assert (None if loss.class_weights is None else loss.class_weights.tolist()) == expected


def test_seconds_of_an_epoch_exclude_feature_caching(two_classes, monkeypatch):
    clock = itertools.count()

    def open_late(*args, open=StageInputs.open):
        nonlocal clock
        clock = itertools.count(next(clock) + 1000)
        return open(*args)

    monkeypatch.setattr(StageInputs, "open", open_late)
    monkeypatch.setattr("utils.runs.run.time", SimpleNamespace(monotonic=lambda: next(clock), time=time.time))
    train.main(settings(**TINY | {"unfreeze_epoch": 2}))
    assert all(0 < row["seconds"] < 1000 for row in load_checkpoint(only_run() / LAST)["history"])


def test_unreadable_image_is_reported_after_its_epoch(two_classes, capsys):
    annotate()
    images = read_list("cls_train.txt", 2)
    Path(images.path(5)).write_text("no image")
    train.main(settings(**TINY, max_bad_fraction=0.05))
    lines = capsys.readouterr().out.splitlines()
    printed = [i for i, line in enumerate(lines) if "1 unreadable" in line]
    assert len(printed) == 1
    assert lines[printed[0] - 1].startswith("epoch ")
    assert images.path(5) in lines[printed[0]]


@pytest.mark.slow
def test_compiled_network_gives_the_same_weights(two_classes, monkeypatch):
    """On features and on images; with the eager backend, since compiling takes minutes."""
    compiled = []

    def trace(network, compile=torch.compile):
        compiled.append(type(network).__name__)
        return compile(network, backend="eager")

    monkeypatch.setattr(torch, "compile", trace)
    weights = []
    for torch_compile in (False, True):
        changes = {"freeze_epoch": 2, "unfreeze_epoch": 3, "feature_views": 1, "save_dir": f"logs{torch_compile}"}
        train.main(settings(**TINY | changes, torch_compile=torch_compile))
        weights.append(load_checkpoint(next(Path(f"logs{torch_compile}").glob(f"*/{LAST}")))["weights"])
    assert compiled == ["ThawedPart", "PixelNetwork"]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, msg=name)


@pytest.mark.slow
def test_digits_accuracy_in_auto_and_fp32(here):
    """With fewer epochs. Of 359 test images, 2 % are noise."""
    top1 = {}
    for precision in ("fp32", "auto"):
        train.main(dataclasses.replace(train.CONFIG, precision=precision, unfreeze_epoch=10, save_dir=precision))
        (run,) = Path(precision).iterdir()
        evaluation.main(model_path=str(run), out=precision)
        top1[precision] = json.loads(Path(precision, "metrics.json").read_text())["top1"]
    assert min(top1.values()) > 0.85
    assert top1["auto"] == pytest.approx(top1["fp32"], abs=0.03)
