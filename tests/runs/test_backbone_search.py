"""utils/runs/backbone_search.py: which networks are measured, which is chosen, and that a run stores it."""

import dataclasses
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

import train
from nets.factory import build_meta_model, build_model
from nets.weights.pretrained import BUNDLED_WEIGHTS, HUB_REPOS
from tests.conftest import TINY, write_back
from utils.config.train_config import StageConfig, TrainConfig
from utils.data.image_list import list_in_memory
from utils.runs import backbone_search
from utils.runs.backbone_search import CANDIDATES, Measured, format_measured, sample_images, select_backbone
from utils.runs.saved_settings import settings_to_continue, settings_to_resume
from utils.runs.setup import prepare

SEARCH = TINY | {"backbone": "auto", "pretrained": True, "unfreeze_epoch": 2, "save_period": 1}


def result(backbone="a", hits=90, images=100, minutes=1.0) -> Measured:
    return Measured(backbone, hits, images, 10.0, 1_000_000, minutes)


@pytest.mark.parametrize(
    ("others", "max_minutes", "expected"),
    [
        ([result("b", 80, minutes=0.1)], 0, "a"),  # ten standard deviations of 3 % below
        ([result("b", 87, minutes=0.9)], 0, "b"),  # exactly one below, and faster
        ([result("b", 86, minutes=0.9)], 0, "a"),
        ([result("b", 87, minutes=1.1)], 0, "a"),  # slower
        ([result("b", 88, minutes=0.9), result("c", 87, minutes=0.8)], 0, "c"),
        ([result("b", 80, minutes=0.1)], 0.5, "b"),
        ([result("b", 80, minutes=0.1), result("c", 99, minutes=1.01)], 1.0, "a"),  # the limit is allowed
    ],
)
def test_the_fastest_within_one_standard_error(others, max_minutes, expected):
    choice = select_backbone([result(), *others], max_minutes)
    assert (choice.field, choice.value, choice.by) == ("backbone", expected, "measurement")
    assert ("in 0.5 minutes" in choice.reason or "in 1 minutes" in choice.reason) == bool(max_minutes)


def test_reason_of_the_choice():
    assert select_backbone([result()], 0).reason == "accuracy 90.0%, the highest"
    close = [result(), result("b", 88, minutes=0.5)]
    assert select_backbone(close, 0).reason == "accuracy 88.0%, within one standard error of 90.0% of a, and faster"


def test_nothing_to_choose_from():
    with pytest.raises(ValueError, match=r"^backbone='auto': no candidate could be .* or name a backbone$"):
        select_backbone([], 0)
    with pytest.raises(ValueError, match=r"^backbone_minutes=0\.5: b, the fastest, takes about 0\.7; raise it"):
        select_backbone([result(), result("b", minutes=0.7)], 0.5)


def test_table(monkeypatch):
    monkeypatch.setattr(backbone_search, "CANDIDATES", {"a": "mit", "b": "apache-2.0"})
    header, first, second = format_measured([result(hits=81, images=263), result("b", 200, 263)]).splitlines()
    assert re.split("  +", header)[:4] == ["backbone", "accuracy", "95 % interval", "images/s"]
    assert first.startswith("b")
    # Wilson's interval of 81 of 263: Newcombe, 1998, table I
    assert re.split("  +", second) == ["a", "30.8%", "25.5% to 36.6%", "10.0", "1.0", "mit", "1.0"]


def test_sample_is_of_all_classes_with_two_images(monkeypatch):
    monkeypatch.setattr(backbone_search, "MAX_IMAGES", 20)
    ids = [0] * 50 + [1] * 3 + [3] + [4] * 9
    sample = sample_images(list_in_memory((k, str(i)) for i, k in enumerate(ids)), seed=0)
    assert np.bincount(sample.class_ids).tolist() == [9, 3, 0, 0, 8]  # as even as possible
    assert len({sample.path(i) for i in range(20)}) == 20
    assert all(ids[int(sample.path(i))] == sample.class_ids[i] for i in range(20))
    many = sample_images(list_in_memory((i % 30, str(i)) for i in range(300)), seed=0)
    assert np.unique(np.bincount(many.class_ids), return_counts=True)[1][-1] == 4  # a class for every fifth image
    assert np.bincount(many.class_ids).max() == 5
    with pytest.raises(ValueError, match="two images of at least two classes; name a backbone"):
        sample_images(list_in_memory([(0, "a"), (0, "b"), (1, "c")]), seed=0)


def test_licenses_are_those_that_timm_states():
    for name, license in CANDIDATES.items():
        assert license in ("mit", "apache-2.0", "bsd-3-clause")
        published = HUB_REPOS.get(name, name)
        if published.startswith("timm/"):
            assert timm.get_pretrained_cfg(published.removeprefix("timm/")).license == license
    assert CANDIDATES["vit_xs_4"] in Path(train.__file__).with_name("LICENSE").read_text().lower()


def test_candidates_are_in_the_order_of_their_size():
    networks = [build_meta_model(name, 2, (64, 64) if name == "vit_xs_4" else (224, 224)) for name in CANDIDATES]
    sizes = [sum(parameter.numel() for parameter in network.parameters()) for network in networks]
    assert all(small <= 1.03 * large for small, large in itertools.pairwise(sizes))


@pytest.fixture
def offline(monkeypatch, here) -> list:
    """No network and empty caches; returns the servers that were asked."""
    asked = []
    monkeypatch.setattr("nets.weights.hub.find_obstacle", lambda request: asked.append(request) or "no network")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(here / "hub"))
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(here / "torch"))
    return asked


@pytest.fixture
def candidates(offline, monkeypatch, two_classes) -> dict:
    """Two candidates with weights at hand: that of the tests, which is blind, and the bundled one."""
    names = {"vit_of_the_tests": "mit", "vit_xs_4": "mit"}
    monkeypatch.setattr(backbone_search, "CANDIDATES", names)
    torch.manual_seed(0)
    state = build_model("vit_of_the_tests", 2, (8, 8)).state_dict()
    state = {name: 0 * tensor if name.startswith("patch_embed") else tensor for name, tensor in state.items()}
    Path("model_data").mkdir()
    save_file(state, "model_data/vit_of_the_tests.safetensors")
    return names


def only_run() -> Path:
    (run,) = Path("logs").iterdir()
    return run


@pytest.mark.parametrize("recipe", ["none", "auto"])
def test_run_stores_the_choice_and_resumes_with_it(candidates, capsys, monkeypatch, recipe):
    config = TrainConfig(**SEARCH | {"recipe": recipe})
    train.main(config)
    printed = capsys.readouterr().out
    # The blind one predicts the larger class, which has 22 of the 36 training images.
    assert re.search(r"^vit_xs_4 +100\.0%.*\nvit_of_the_tests +61\.1%", printed, flags=re.M)
    assert re.search(r"^  backbone +vit_xs_4 +measurement: accuracy 100\.0%, the highest$", printed, flags=re.M)
    assert printed.count("model_data/vit_xs_4.safetensors") == 1  # that it loads weights is printed once
    run = only_run()
    assert json.loads((run / "config.json").read_text())["backbone"] == "vit_xs_4"
    assert settings_to_continue(str(run)).backbone == "vit_xs_4"
    assert settings_to_resume(str(run)) == dataclasses.replace(config, resume=str(run))

    write_back(run, epoch=1)
    monkeypatch.setattr(backbone_search, "CANDIDATES", {})  # another search would fail
    for resumed in (config, settings_to_resume(str(run))):
        train.main(resumed)
        assert re.search(
            r"^  backbone +vit_xs_4 +measurement: as chosen when the run started$", capsys.readouterr().out, flags=re.M
        )
        assert only_run() == run
    with pytest.raises(ValueError, match="no candidate could be measured"):
        train.main(config)  # a new run


def test_networks_are_measured_at_the_shape_of_the_run_with_smaller_first_stages(candidates, capsys):
    stages = (StageConfig(1, "nothing", 8, (4, 4)), StageConfig(1, "nothing", 8))
    setup = prepare(TrainConfig(**SEARCH | {"recipe": "none", "stages": stages}))
    assert setup.config.backbone == "vit_xs_4"
    assert "not measured" not in capsys.readouterr().out


def test_a_network_that_does_not_fit_into_memory_is_listed(candidates, monkeypatch, capsys):
    compute = backbone_search.compute_features

    def limited(model, config, *rest):
        if config.backbone == "vit_xs_4":
            raise torch.OutOfMemoryError
        return compute(model, config, *rest)

    monkeypatch.setattr(backbone_search, "compute_features", limited)
    assert prepare(TrainConfig(**SEARCH | {"recipe": "none"})).config.backbone == "vit_of_the_tests"
    assert "vit_xs_4 not measured: it doesn't fit into the memory of the device" in capsys.readouterr().out


def test_the_same_images_give_the_same_choice_for_the_recipe(candidates):
    """The recipe chooses for the network that was chosen."""
    named = prepare(TrainConfig(**SEARCH | {"recipe": "auto", "backbone": "vit_xs_4"}))
    searched = prepare(TrainConfig(**SEARCH | {"recipe": "auto"}))
    assert searched.config == named.config
    assert searched.choices[1:] == named.choices
    assert [stage.init_lr for stage in searched.stages] == [stage.init_lr for stage in named.stages]


def test_what_is_not_measured_is_listed_with_reasons(offline, two_classes, capsys):
    """At 32 x 32 pixels, without a network: each server is asked once."""
    choice = prepare(TrainConfig(**SEARCH | {"freeze_train": False, "input_shape": (32, 32)})).choices[0]
    assert choice.value == BUNDLED_WEIGHTS.stem
    printed = capsys.readouterr().out
    assert "vit_s_14 not measured: input_shape=(32, 32): height and width must be multiples of" in printed
    (line,) = [line for line in printed.splitlines() if "not at hand, and not downloaded" in line]
    assert "resnet18, vit_s_16, timm/convnext_tiny.fb_in22k_ft_in1k, " in line
    assert "siglip_224.v2_webli; connect to the internet, set HF_ENDPOINT" in line
    assert len(offline) == 2


def test_no_candidate_is_at_hand(offline, two_classes, capsys):
    """At 224 x 224 pixels, since the bundled one is for small images."""
    with pytest.raises(ValueError, match=r"no candidate could be measured.* put their weights into model_data/"):
        prepare(TrainConfig(**SEARCH | {"input_shape": (224, 224), "freeze_train": False}))
    printed = capsys.readouterr().out
    assert "vit_xs_4 not measured: it is for images of up to 64 pixels" in printed
    assert ", ".join(list(CANDIDATES)[1:]) in printed
    assert len(offline) == 2


def test_time_is_up(candidates, capsys, monkeypatch):
    """The second candidate isn't opened."""
    monkeypatch.setattr(backbone_search, "SEARCH_MINUTES", 1)
    now = 0.0
    monkeypatch.setattr("utils.runs.backbone_search.time.monotonic", lambda: now)

    def measure(planned, *_):
        nonlocal now
        now = 61.0
        return result(planned[0].backbone)

    monkeypatch.setattr(backbone_search, "measure", measure)
    assert prepare(TrainConfig(**SEARCH)).config.backbone == "vit_of_the_tests"
    assert "vit_xs_4 not measured: it doesn't fit into the time of the search" in capsys.readouterr().out


def test_damaged_images_are_not_blamed_on_the_candidates(candidates):
    for path in Path("datasets/train/dark").iterdir():
        path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"dark.*can't be read"):
        prepare(TrainConfig(**SEARCH))


def test_weights_that_do_not_fit_are_listed(candidates, capsys):
    save_file({"patch_embed.proj.weight": torch.zeros(1, 3, 4, 4)}, "model_data/vit_of_the_tests.safetensors")
    assert prepare(TrainConfig(**SEARCH)).config.backbone == "vit_xs_4"
    assert re.search(r"vit_of_the_tests not measured: .*doesn't fit this network", capsys.readouterr().out)


def test_cross_validation_needs_a_name(two_classes):
    with pytest.raises(ValueError, match=r"^cross_validate: .*--backbone auto --summary"):
        train.main(TrainConfig(**SEARCH), cross_validate=2)
    assert not Path("logs").exists()


@pytest.mark.parametrize("changes", [{"pretrained": False}, {"pretrained": "file.pth"}, {"model_path": "file.pth"}])
def test_needs_published_weights(changes):
    with pytest.raises(ValueError, match=r"^backbone='auto': .*set pretrained to True and leave model_path empty"):
        TrainConfig(**SEARCH | changes)
