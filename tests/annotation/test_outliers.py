"""Outliers and likely wrong labels among planted embeddings and images."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from nets.factory import build_model
from tests.conftest import write_image
from utils.annotation import embeddings
from utils.annotation.annotate import annotate
from utils.annotation.embeddings import choose_backbone
from utils.annotation.outliers import NEIGHBORS, distance_ratios, find_outliers, find_wrong_labels


def clusters(random: np.random.Generator, classes: int = 3, size: int = 30) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings (N, 8) of well separated classes, and class ids (N,)."""
    class_ids = np.repeat(np.arange(classes), size)
    return 10 * np.eye(8)[class_ids] + random.normal(size=(len(class_ids), 8)), class_ids


@given(seed=st.integers(0, 10_000), count=st.integers(1, 4))
@examples(max_examples=20, deadline=None)
def test_planted_outliers_come_first(seed, count):
    random = np.random.default_rng(seed)
    points, class_ids = clusters(random)
    planted = random.choice(len(points), count, replace=False)
    points[planted] = random.choice([-1, 1], (count, 8)) * random.uniform(15, 30, (count, 8))
    assert set(find_outliers(points, class_ids)[:count]) == set(planted.tolist())


def test_distances_by_hand():
    """Also over several blocks of rows, and for classes that are too small to compare."""
    points = np.array([[float(i)] for i in range(NEIGHBORS)] + [[100.0], [5.0], [7.0]])
    class_ids = np.array([0] * (NEIGHBORS + 1) + [1, 1])
    line = [np.abs(i - np.delete(points[: NEIGHBORS + 1, 0], i)).mean() for i in range(NEIGHBORS)]
    expected = [*line, np.mean(100 - np.arange(NEIGHBORS))]
    assert distance_ratios(points, class_ids) == pytest.approx([*(expected / np.median(expected)), 1, 1])


def test_distances_of_a_large_class(monkeypatch):
    points, _ = clusters(np.random.default_rng(0))
    whole = distance_ratios(points, np.zeros(90))
    monkeypatch.setattr("utils.annotation.outliers.ROWS", 7)
    assert distance_ratios(points, np.zeros(90)) == pytest.approx(whole)


def test_copies_of_one_image_are_no_outliers():
    assert find_outliers(np.ones((30, 4)), np.zeros(30, int)) == []


def test_swapped_labels_are_found():
    points, class_ids = clusters(np.random.default_rng(0))
    labels = class_ids + 5  # ids that aren't 0 to n - 1
    swapped = [3, 40, 77]
    labels[swapped] = [6, 7, 5]
    assert sorted(find_wrong_labels(points, labels)) == [(3, 5), (40, 6), (77, 7)]


def test_classes_too_small_for_a_probe():
    assert list(find_wrong_labels(np.eye(6), np.array([0, 0, 0, 0, 0, 1]))) == []
    assert list(find_wrong_labels(np.zeros((0, 4)), np.array([], int))) == []


@pytest.fixture
def tiny_weights(here) -> Path:
    """Random weights of the tests' network."""
    torch.manual_seed(0)
    save_file(build_model("vit_of_the_tests", 2, (32, 32)).state_dict(), "tiny.safetensors")
    return here / "tiny.safetensors"


@pytest.fixture
def photos(here) -> Path:
    """Two classes of noise, with one screenshot in dark, and one light image among the dark ones."""
    for name, level in (("dark", 60), ("light", 190)):
        for i in range(20):
            write_image(here / "datasets" / name / f"{i:02d}.png", level, (40, 40), seed=i + level)
    image = Image.new("RGB", (40, 40), "white")
    ImageDraw.Draw(image).text((2, 2), "this\nphoto\nis", "black")
    image.save(here / "datasets/dark/screenshot.png")
    write_image(here / "datasets/dark/swapped.png", 190, (40, 40), seed=999)
    return here / "datasets"


def found() -> dict[str, list[dict]]:
    """Kind of finding -> images in audit.json, in order."""
    findings = json.loads(Path("audit/audit.json").read_text())["findings"]
    return {finding["kind"]: [image for group in finding["groups"] for image in group] for finding in findings}


def test_deep_audit_of_images(photos, tiny_weights, monkeypatch, capsys):
    annotate(deep=str(tiny_weights), fix=True)
    assert "datasets/dark/screenshot.png" in [image["path"] for image in found()["outlier"]]
    wrong = {image["path"]: image["likely_class"] for image in found()["likely wrong label"]}
    assert wrong["datasets/dark/swapped.png"] == "light"
    assert "datasets/dark/swapped.png (perhaps light)" in capsys.readouterr().out
    assert "dark, perhaps light" in Path("audit/audit.html").read_text()
    assert "screenshot" not in Path("audit/excluded.txt").read_text(), "--fix doesn't exclude it"

    def embed_again(*_):
        raise AssertionError("embedded again")

    before = found()
    monkeypatch.setattr(embeddings, "_embed", embed_again)
    annotate(deep=str(tiny_weights), fix=True)  # from the cache
    assert found() == before
    write_image(photos / "light/new.png", 190, (40, 40), seed=5)
    with pytest.raises(AssertionError, match="embedded again"):
        annotate(deep=str(tiny_weights))


@pytest.mark.parametrize("words", [("--deep",), ("--deep", "vit_xs_4", "--fix")])
def test_the_flag(photos, command, words):
    result = command("txt_annotation.py", *words)
    assert result.returncode == 0, result.stderr
    assert "vit_xs_4.safetensors" in result.stdout
    assert ("for photos give --deep vit_s_14" in result.stdout) == (words == ("--deep",))
    assert "datasets/dark/swapped.png" in [image["path"] for image in found()["likely wrong label"]]


def test_an_interrupted_deep_audit_resumes(photos, tiny_weights, monkeypatch):
    original, embedded = embeddings._class_tokens, []

    def stop_at_third(network, pixels):
        embedded.append(len(pixels))
        if len(embedded) == 3:
            raise KeyboardInterrupt
        return original(network, pixels)

    monkeypatch.setattr(embeddings, "BATCH", 8)
    monkeypatch.setattr(embeddings, "_class_tokens", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        annotate(deep=str(tiny_weights))
    annotate(deep=str(tiny_weights))
    assert sum(embedded) == 42 + 8


def test_a_damaged_or_unwritable_cache(photos, tiny_weights, capsys):
    annotate(deep=str(tiny_weights))
    (cache,) = Path("cache").glob("embeddings-*.npz")
    cache.write_bytes(cache.read_bytes()[:100])
    before = found()
    annotate(deep=str(tiny_weights))
    assert found() == before
    Path("file").write_text("")
    annotate(deep=str(tiny_weights), cache_dir="file/cache")
    assert found() == before
    assert "embeddings are not cached" in capsys.readouterr().out


def test_an_altered_cache_is_made_anew(photos, tiny_weights, capsys):
    annotate(deep=str(tiny_weights))
    (cache,) = Path("cache").glob("embeddings-*.npz")
    whole = cache.read_bytes()
    for position in (50, len(whole) // 2, len(whole) - 1):
        cache.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        capsys.readouterr()
        annotate(deep=str(tiny_weights))
        assert f"warning: {cache} isn't as it was written: it is made anew" in capsys.readouterr().out
        assert cache.read_bytes() == whole
    annotate(deep=str(tiny_weights))
    assert "made anew" not in capsys.readouterr().out


def test_the_backbone_is_chosen(here, tiny_weights, capsys):
    assert choose_backbone(True).backbone == "vit_xs_4"
    assert "for photos give --deep vit_s_14" in capsys.readouterr().out
    Path("model_data").mkdir()
    Path("model_data/vit_b_14.pth").write_bytes(b"")
    config = choose_backbone(True)
    assert (config.backbone, config.pretrained, config.input_shape) == ("vit_b_14", True, (112, 112))
    config = choose_backbone(str(tiny_weights))
    assert (config.backbone, config.model_path) == ("vit_of_the_tests", str(tiny_weights))


def test_errors_of_deep(here, two_classes):
    with pytest.raises(ValueError, match="deep='dinov2': neither a file of weights nor a ViT; choose one of vit_xs_4"):
        annotate(deep="dinov2")
    save_file({"conv.weight": torch.zeros(1)}, "other.safetensors")
    with pytest.raises(ValueError, match=r"deep='other.safetensors': its network isn't a ViT"):
        annotate(deep="other.safetensors")
    with pytest.raises(ValueError, match="deep=True: needs audit=True"):
        annotate(deep=True, audit=False)
