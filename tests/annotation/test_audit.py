"""Tests of the audit: faults of every kind are planted in real photos, and exactly these must be found."""

import io
import json
import os
import random
import re
import shutil
import sqlite3
import tracemalloc
import zlib
from collections import Counter, defaultdict
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageEnhance

from tests.conftest import open_page, touch, wait_for_property, write_image, write_scene
from utils.annotation import fingerprints, near_duplicates
from utils.annotation.annotate import annotate
from utils.annotation.audit import Finding, audit_counts, audit_images
from utils.annotation.audit_report import format_findings, write_audit
from utils.annotation.audited_images import AuditedImage, AuditedImages
from utils.annotation.fingerprint_table import Fingerprint, FingerprintTable
from utils.annotation.fingerprints import Fingerprints, take_fingerprint
from utils.annotation.folder_scan import SPLITS
from utils.annotation.near_duplicates import MAX_BITS, NARROW, WIDE, _candidates, near_duplicate_groups
from utils.data import image_io
from utils.data.image_list import read_list

CLASSES = ("cardboard", "glass", "metal", "paper", "plastic", "trash")
CHANGES = {
    "recompressed": lambda image: Image.open(io.BytesIO(jpeg(image, 30))).convert("RGB"),
    "halved": lambda image: image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.1),
    "paler": lambda image: ImageEnhance.Contrast(image).enhance(0.85),
    "grey": lambda image: image.convert("L"),
}


def jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def photos(shared, split, name) -> list[Path]:
    return sorted((shared / "data" / "trashnet" / split / name).glob("*.jpg"))


@pytest.fixture
def rubbish(shared, here) -> Path:
    """datasets/ with 24 photos of each class to train on and 10 to test on."""
    for split, count in (("train", 24), ("test", 10)):
        for name in CLASSES:
            (here / "datasets" / split / name).mkdir(parents=True)
            # Without two bursts of paper, which the audit reports correctly.
            for path in [p for p in photos(shared, split, name) if p.stem not in ("paper53", "paper74")][:count]:
                shutil.copy(path, here / "datasets" / split / name)
    return here / "datasets"


def findings_of() -> dict[str, list[set[str]]]:
    """Return kind -> groups of paths from audit.json."""
    content = json.loads(Path("audit/audit.json").read_text())
    found = defaultdict(list)
    for finding in content["findings"]:
        found[finding["kind"]] += [{image["path"] for image in group} for group in finding["groups"]]
    return found


def test_no_findings_in_good_photos(rubbish, capsys):
    annotate()
    assert findings_of() == {}
    assert "audit: no problems found" in capsys.readouterr().out


def test_all_planted_faults_are_found_and_nothing_else(rubbish):
    planted = plant(rubbish)
    annotate()
    found = findings_of()
    for kind, groups in planted.items():
        assert sorted(map(sorted, found.pop(kind))) == sorted(map(sorted, groups)), kind
    assert {kind for kind in found if found[kind]} == set()
    kinds = {finding["kind"] for finding in json.loads(Path("audit/audit.json").read_text())["findings"]}
    assert kinds == set(planted) | {"missing class", "tiny class"}


def plant(datasets: Path) -> dict[str, list[set[str]]]:
    """Create faults in `datasets`; return kind -> groups of paths to be found."""
    planted = defaultdict(list)
    train = {name: sorted((datasets / "train" / name).iterdir()) for name in CLASSES}

    def add(kind, *paths):
        planted[kind].append({path.relative_to(Path.cwd()).as_posix() for path in paths})

    def save(image, split, name, file) -> Path:
        image.save(datasets / split / name / file)
        return datasets / split / name / file

    half = datasets / "train" / "glass" / "half.jpg"
    half.write_bytes(train["glass"][0].read_bytes()[:3000])
    (datasets / "train" / "glass" / "empty.jpg").touch()
    (datasets / "test" / "metal" / "page.jpg").write_text("<html>404</html>")
    for path in (half, half.with_name("empty.jpg"), datasets / "test" / "metal" / "page.jpg"):
        add("unreadable", path)
    shutil.copy(train["paper"][0], datasets / "train" / "paper" / "photo.png")
    add("duplicate within a class", train["paper"][0], datasets / "train" / "paper" / "photo.png")
    add("wrong suffix", datasets / "train" / "paper" / "photo.png")
    # The same pixels in another file format: digests of the files differ.
    for name, split, place in (("trash", "train", "across classes"), ("cardboard", "test", "across splits")):
        source = train["cardboard"][1 if split == "train" else 2]
        add(f"duplicate {place}", source, save(Image.open(source), split, name, f"copy_{split}.png"))
    for number, (change, function) in enumerate(CHANGES.items()):
        for place, split, name, start in (
            ("within a class", "train", "plastic", 3),
            ("across splits", "test", "plastic", 9),
            ("across classes", "train", "metal", 15),
        ):
            source = train["plastic"][start + number]
            changed = function(Image.open(source).convert("RGB"))
            add(f"near-duplicate {place}", source, save(changed, split, name, f"{change}_{place[:12]}.png"))
    sign = Image.effect_noise((200, 150), 60).convert("RGB")
    add("placeholder", *(save(sign, "train", name, "missing.png") for name in CLASSES))
    add("blank", save(Image.new("RGB", (300, 200), (250, 250, 250)), "train", "trash", "white.jpg"))
    for path in train["trash"][6:]:
        path.unlink()
    shutil.rmtree(datasets / "test" / "glass")
    return planted


def test_fix_excludes_faulty_images_and_changes_no_file(rubbish, capsys):
    planted = plant(rubbish)
    before = {path: path.read_bytes() for path in rubbish.rglob("*") if path.is_file()}
    annotate(fix=True)
    assert {path: path.read_bytes() for path in rubbish.rglob("*") if path.is_file()} == before
    lists = {name: read_list(f"cls_{name}.txt", 6) for name in ("train", "val", "test")}
    listed = {name: {images.path(i) for i in range(len(images))} for name, images in lists.items()}
    everywhere = set.union(*listed.values())
    for kind in ("unreadable", "placeholder", "blank", "duplicate across classes"):
        assert not set.union(*planted[kind]) & everywhere, kind
    for group in planted["duplicate within a class"]:
        assert len(group & everywhere) == 1
    for group in planted["duplicate across splits"] + planted["near-duplicate across splits"]:
        assert len(group & everywhere) == 1
        assert len(group & listed["test"]) == 1
    for group in planted["near-duplicate within a class"] + planted["near-duplicate across classes"]:
        assert group <= listed["train"] or group <= listed["val"]
    excluded = dict(reversed(line.split(";", 1)) for line in Path("audit/excluded.txt").read_text().splitlines())
    assert set(excluded) == {path.relative_to(Path.cwd()).as_posix() for path in before} - everywhere
    assert excluded["datasets/train/glass/empty.jpg"] == "unreadable"
    assert "excluded, see excluded.txt" in capsys.readouterr().out
    annotate()
    assert "the previous lists were written with --fix" in capsys.readouterr().out
    assert not Path("audit/excluded.txt").exists()


def test_second_run_reads_only_new_images(rubbish, monkeypatch):
    plant(rubbish)
    annotate()
    first = Path("audit/audit.json").read_bytes(), Path("audit/audit.html").read_bytes()
    write_image(rubbish / "train" / "glass" / "new.png", size=(50, 40))

    read = []
    opened = image_io._opened
    monkeypatch.setattr(
        image_io, "_opened", lambda path, *limits: read.append(Path(path).name) or opened(path, *limits)
    )
    annotate()
    unreadable = {"half.jpg", "empty.jpg", "page.jpg"}  # not cached
    assert set(read) == {"new.png"} | unreadable
    (rubbish / "train" / "glass" / "new.png").unlink()
    read.clear()
    annotate()
    assert set(read) == unreadable
    assert (Path("audit/audit.json").read_bytes(), Path("audit/audit.html").read_bytes()) == first


def test_damaged_cache_and_interrupted_run(here, monkeypatch):
    paths = [str(write_image(Path(f"{i}.png"), seed=i)) for i in range(5)]
    Path("prints").write_bytes(b"no database" * 100)
    expected = [take_fingerprint(path) for path in paths]
    monkeypatch.setattr(fingerprints, "SAVE_EVERY", 2)

    def stop_at_the_fourth(path, **limits):
        if path == "3.png":
            raise KeyboardInterrupt
        return take_fingerprint(path, **limits)

    with monkeypatch.context() as patch:
        patch.setattr(fingerprints, "take_fingerprint", stop_at_the_fourth)
        with pytest.raises(KeyboardInterrupt):
            Fingerprints("prints").read(paths)
    again = []
    monkeypatch.setattr(
        fingerprints, "take_fingerprint", lambda path, **limits: again.append(path) or take_fingerprint(path)
    )
    assert list(Fingerprints("prints").read(paths)) == expected
    assert len(again) == 3
    write_image(Path("2.png"), seed=99)
    assert Fingerprints("prints").read(paths)[2] == take_fingerprint("2.png") != expected[2]


def test_failures_are_not_cached(here, monkeypatch):
    path = str(write_image(here / "a.png"))
    with monkeypatch.context() as patch:
        patch.setattr(image_io.Image, "open", lambda *args, **kwargs: (_ for _ in ()).throw(MemoryError()))
        assert "MemoryError" in Fingerprints("prints").read([path])[0].error
    assert Fingerprints("prints").read([path])[0].error == ""


def test_a_file_system_without_locks_has_a_cache(here, monkeypatch, capsys):
    """SQLite would wait for the lock and then fail, so it is told not to lock: another one's lock is ignored, too."""
    path = str(write_image(here / "a.png"))
    monkeypatch.setattr(fingerprints, "supports_locks", lambda folder: False)
    other = sqlite3.connect("prints")
    other.execute("BEGIN EXCLUSIVE")
    expected = list(Fingerprints("prints").read([path]))
    assert "has no locks: run only one audit at a time" in capsys.readouterr().out
    monkeypatch.setattr(fingerprints, "take_fingerprint", lambda path, **limits: pytest.fail("read again"))
    assert list(Fingerprints("prints").read([path])) == expected
    other.close()


def test_unwritable_cache_is_not_used(here, monkeypatch, capsys):
    monkeypatch.setattr(fingerprints, "LOCK_TIMEOUT", 0)
    path = str(write_image(here / "a.png"))
    expected = list(Fingerprints("prints").read([path]))
    new = str(write_image(here / "b.png", seed=2))
    other = sqlite3.connect("prints")
    for place, lock in (("prints", "IMMEDIATE"), ("prints", "EXCLUSIVE"), ("a.png/prints", "EXCLUSIVE")):
        other.execute(f"BEGIN {lock}")
        found = Fingerprints(place)
        assert list(found.read([path, new]))[:1] == expected
        assert found.preview(path)
        assert capsys.readouterr().out.count(f"{place} can't be used") == 1
        other.rollback()
    monkeypatch.setattr(fingerprints, "take_fingerprint", lambda path, **limits: pytest.fail("read again"))
    other.execute("BEGIN IMMEDIATE")
    assert list(Fingerprints("prints").read([path])) == expected  # cached results are still read
    other.close()


def test_allow_truncated_holds_in_all_threads(shared, here):
    whole = photos(shared, "train", "glass")[0].read_bytes()
    paths = [str(here / f"{i}.jpg") for i in range(100)]
    for i, path in enumerate(paths):
        Path(path).write_bytes(whole[: 6000 + i])
    assert not any(found.error for found in Fingerprints("prints", allow_truncated=True).read(paths))
    assert all(found.error for found in Fingerprints("prints").read(paths))


def test_fine_texture_is_not_blank(here):
    squares = np.kron(np.indices((64, 64)).sum(0) % 2 * 255, np.ones((4, 4))).astype(np.uint8)
    Image.fromarray(squares).save("squares.png")
    Image.new("RGB", (200, 100), (250, 251, 252)).save("white.jpg")
    assert not take_fingerprint("squares.png").flat
    assert take_fingerprint("white.jpg").flat


def audited(*images: AuditedImage) -> AuditedImages:
    """These images in columns."""
    names = list(dict.fromkeys(image.class_name for image in images))
    return AuditedImages(
        [image.path for image in images],
        np.array([SPLITS.index(image.split) for image in images]),
        np.array([names.index(image.class_name) for image in images]),
        names,
        FingerprintTable.of(image.fingerprint for image in images),
    )


def images_of(counts: dict[str, int], make) -> AuditedImages:
    """Return training images with synthetic fingerprints; `make(name, i)` returns fields to override."""
    rng = random.Random(0)
    defaults = {"format": "JPEG", "width": 640, "height": 480}
    return audited(
        *(
            AuditedImage(
                f"{name}/{i}.jpg",
                "train",
                name,
                Fingerprint(
                    **defaults
                    | {"digest": rng.randbytes(16), "phash": rng.randbytes(8), "thumbnail": rng.randbytes(256)}
                    | make(name, i)
                ),
            )
            for name, count in counts.items()
            for i in range(count)
        )
    )


def kinds(images):
    return {finding.kind: finding.message for finding in audit_images(images)}


def test_format_shortcut():
    found = kinds(images_of({"a": 20, "b": 20, "c": 20}, lambda name, i: {"format": "PNG" if name == "a" else "JPEG"}))
    assert found["shortcut"].startswith("format predicts the class: nearly all images of a are PNG, hardly any of b, c")


def test_color_shortcut():
    found = kinds(images_of({"a": 20, "b": 20, "c": 20}, lambda name, i: {"grey": name == "b" and i > 0}))
    assert found["shortcut"].startswith("color predicts the class: nearly all images of b are gray, hardly any of a, c")


@pytest.mark.parametrize("differs", [True, False])
def test_size_shortcut(differs):
    rng = random.Random(1)

    def make(name, i):
        side = {"a": 300, "b": 600, "c": 1200}[name] if differs else 600
        return {"width": side + rng.randrange(100), "height": side + rng.randrange(100)}

    found = kinds(images_of({"a": 30, "b": 30, "c": 30}, make))
    assert ("shortcut" in found) == differs
    assert not differs or "size predicts the class" in found["shortcut"]


def test_format_that_one_class_lacks():
    lacking = images_of(
        {"a": 20, "b": 20, "c": 20}, lambda name, i: {"format": ("PNG", "GIF")[i % 2] if name == "c" else "JPEG"}
    )
    assert kinds(lacking)["shortcut"].startswith(
        "format predicts the class: nearly all images of a, b are JPEG, hardly any of c"
    )


def test_mixed_attributes_are_no_shortcut():
    mixed = images_of(
        {"a": 30, "b": 30, "c": 30}, lambda name, i: {"format": "PNG" if i % 3 else "JPEG", "grey": i % 2 == 0}
    )
    assert "shortcut" not in kinds(mixed)
    assert "shortcut" not in kinds(images_of({"a": 30, "b": 30, "c": 30}, lambda name, i: {"grey": True}))


def test_class_sizes():
    counts = {"train": {"a": 100, "b": 10, "c": 4}, "val": {"a": 2, "b": 1, "c": 1, "d": 2}, "test": {}}
    assert [(finding.kind, finding.message) for finding in audit_counts(counts, ("a", "b", "c", "d"))] == [
        ("missing class", "no train images of d"),
        ("tiny class", "fewer than 10 training images of c (4)"),
        ("tiny class", "a single val image of b, c: the accuracy of such a class is either 0 or 100%"),
        (
            "imbalance",
            "a has 100 training images and c 4; see class_weights and sampler in utils/config/train_config.py",
        ),
    ]
    assert audit_counts({"train": {"a": 99, "b": 10}, "val": {"a": 2, "b": 2}, "test": {}}, ("a", "b")) == []
    ones = {f"class {i}": 1 for i in range(80)}
    messages = [finding.message for finding in audit_counts({"train": ones, "val": ones, "test": {"": 1}}, list(ones))]
    assert [" and 75 more" in message for message in messages] == [True] * 3
    assert max(map(len, messages)) < 140


def test_class_sizes_are_those_of_the_lists(here, capsys):
    """160 and 12 images become 112 and 9 for training, and a single validation image of the smaller class."""
    touch(*(f"datasets/{name}/{i}.png" for name, count in (("many", 160), ("few", 12)) for i in range(count)))
    annotate(test_fraction=0.2)
    counts = Counter(tuple(Path(line).parts[-2:-1]) for line in Path("cls_train.txt").read_text().splitlines())
    content = json.loads(Path("audit/audit.json").read_text())
    messages = {finding["message"] for finding in content["findings"]}
    assert counts == {("many",): 112, ("few",): 9}
    assert "fewer than 10 training images of few (9)" in messages
    assert "many has 112 training images and few 9; see class_weights" in capsys.readouterr().out
    assert "a single val image of few: the accuracy of such a class is either 0 or 100%" in messages


def test_report_says_in_which_list_an_image_is(here):
    touch(*(f"datasets/{name}/{i}.png" for name in "ab" for i in range(10)))
    annotate(val_fraction=0.5)
    (finding,) = [f for f in json.loads(Path("audit/audit.json").read_text())["findings"] if f["kind"] == "unreadable"]
    listed = {split: Path(f"cls_{split}.txt").read_text() for split in ("train", "val")}
    for (image,) in finding["groups"]:
        assert image["path"] in listed[image["split"]]
    assert len({image["split"] for (image,) in finding["groups"]}) == 2


@pytest.mark.parametrize("bands", [NARROW, WIDE])
def test_candidates_are_all_pairs_within_max_bits(bands, monkeypatch):
    """Each once, also where many hashes are compared in several blocks."""
    monkeypatch.setattr(near_duplicates, "ROWS", 7)
    monkeypatch.setattr(near_duplicates, "COLUMNS", 5)
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 300, np.uint64)
    near = [int(h) ^ sum(1 << int(bit) for bit in rng.choice(64, rng.integers(0, 10), replace=False)) for h in hashes]
    every = np.concatenate([hashes, np.array(near, np.uint64), hashes[:1] ^ np.arange(30, dtype=np.uint64)])
    distance = np.bitwise_count(every[:, None] ^ every[None])
    expected = np.stack(np.nonzero(np.triu(distance <= MAX_BITS, k=1)), axis=1)
    assert len(expected) > 200
    found = np.sort(np.concatenate(list(_candidates(every, np.arange(len(every)), bands))), axis=1)
    np.testing.assert_array_equal(found[np.lexsort(found.T[::-1])], expected)


def test_many_images_have_the_same_groups_as_few(monkeypatch):
    """From `MANY` images on the hash is searched in other bands."""
    rng = np.random.default_rng(0)
    thumbnails = rng.integers(0, 256, (400, 256), np.uint8)
    prints = []
    for number in rng.integers(0, 400, 1500):  # copies of few images, of which each differs in some bits and levels
        bits = sum(1 << int(bit) for bit in rng.choice(64, rng.integers(0, 6), replace=False))
        level = np.clip(thumbnails[number] + rng.normal(0, rng.choice([5, 40]), 256), 0, 255).astype(np.uint8)
        phash = (int(number) * 0x9E3779B97F4A7C15 % 2**64 ^ bits).to_bytes(8, "little")
        prints.append(Fingerprint("", "JPEG", 640, 480, digest=bytes(16), phash=phash, thumbnail=level.tobytes()))
    table, indices = FingerprintTable.of(prints), np.arange(3, 1500)
    expected = near_duplicate_groups(table, indices)
    assert len(expected) > 100
    assert expected == sorted(map(sorted, expected))
    monkeypatch.setattr(near_duplicates, "MANY", 0)
    monkeypatch.setattr(near_duplicates, "PAIRS", 10)
    assert near_duplicate_groups(table, indices) == expected


def test_one_scene_is_no_fault(here):
    write_scene(here / "datasets")
    annotate(fix=True)
    assert set(findings_of()) == {"similar by nature"}
    assert len(read_list("cls_train.txt", 2)) == 36
    assert len(read_list("cls_val.txt", 2)) == 4


@pytest.mark.parametrize("bits", [10, 12, 16])
def test_12_bit_images_in_16_bit_files_are_dark(here, bits):
    for name in "ab":
        for i in range(4):
            noise = np.random.default_rng(ord(name) + i).integers(0, 2**bits, (30, 40))
            path = here / "datasets" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(cv2.resize(noise.astype(np.uint16), (400, 300))).save(path)
    annotate()
    assert len(findings_of().get("dark", [])) == (0 if bits == 16 else 8)


def test_many_near_duplicates_take_little_memory_and_time(monkeypatch):
    pairs: list[int] = []

    def count(*args):
        for some in candidates(*args):
            pairs.append(len(some))
            yield some

    candidates = near_duplicates._candidates
    monkeypatch.setattr(near_duplicates, "_candidates", count)
    rng = np.random.default_rng(0)
    hashes = [int(rng.integers(0, 2)) << int(rng.integers(0, 64)) for _ in range(3000)]
    thumbnail = rng.integers(0, 256, 256, np.uint8).tobytes()
    fields = {"thumbnail": thumbnail, "width": 640, "height": 480, "digest": bytes(16)}
    prints = FingerprintTable.of(Fingerprint(phash=h.to_bytes(8, "little"), **fields) for h in hashes)
    tracemalloc.start()
    assert near_duplicate_groups(prints, np.arange(3000)) == [list(range(3000))]
    assert tracemalloc.get_traced_memory()[1] < 300e6
    assert sum(pairs) < 1_000_000  # of 4.5 million
    tracemalloc.stop()


def test_oversampled_images_are_kept_once(here):
    for name, copies in (("few", 6), ("many", 1)):
        for i in range(12):
            for copy in range(copies):
                write_image(here / "datasets" / name / f"{i}_{copy}.png", size=(80, 60), seed=100 * copies + i)
    annotate(fix=True)
    assert set(findings_of()) == {"duplicate within a class", "tiny class"}
    assert len(read_list("cls_train.txt", 2)) + len(read_list("cls_val.txt", 2)) == 24


def test_patient_in_two_splits_is_reported(here, capsys):
    for split in ("train", "val"):
        for name in ("a", "b"):
            for i in range(12):
                place = here / "datasets" / split / name / f"p{i if split == 'train' else i + 10}_{name}.png"
                write_image(place, size=(80, 60), seed=zlib.crc32(f"{split} {name} {i}".encode()))
    annotate(group_regex=r"^(p\d+)_", fix=True)
    assert findings_of()["group across splits"] == [
        {f"datasets/{split}/{name}/p{i}_{name}.png" for split in ("train", "val") for name in "ab"} for i in (10, 11)
    ]
    assert "22 groups; 0 images" in capsys.readouterr().out
    lists = [read_list(f"cls_{name}.txt", 2) for name in ("train", "val")]
    patients = [{Path(images.path(i)).name.split("_")[0] for i in range(len(images))} for images in lists]
    assert not patients[0] & patients[1]
    assert len(lists[1]) == 24


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda image: image.convert("L").convert("RGB"), "color predicts the class"),
        (lambda image: image.resize((320, 200)), "size predicts the class"),
    ],
)
def test_shortcuts_in_real_photos(rubbish, change, message):
    rename = {"glass": "a", "paper": "b"}
    for name, new in rename.items():
        (rubbish / "train" / name).rename(Path(new))
    shutil.rmtree(rubbish)
    for new in "ab":
        for i, path in enumerate(sorted(Path(new).iterdir())):
            image = Image.open(path).resize((90 + i, 70))
            target = rubbish / new / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            (change(image) if new == "b" else image).save(target)
    annotate()
    found = [
        f["message"] for f in json.loads(Path("audit/audit.json").read_text())["findings"] if f["kind"] == "shortcut"
    ]
    assert any(message in text for text in found)


@pytest.mark.parametrize(("name", "limit"), [("mnist_png", 4), ("sign_digits", 2)])
def test_images_of_one_kind_are_not_near_duplicates(shared, name, limit):
    """Handwritten digits, and hands before one wall: hundreds of pairs have similar hashes."""
    paths = sorted(str(path) for path in (shared / "data" / name).rglob("*") if path.is_file())[::2]
    prints = FingerprintTable.of(map(take_fingerprint, paths))
    every = np.arange(len(prints))
    assert sum(map(len, near_duplicate_groups(prints, every))) <= limit
    assert sum(map(len, _candidates(prints.rows["phash"].view(np.uint64)[:, 0], every, NARROW))) > 20


def test_names_are_escaped_in_the_report(here):
    name = "<script>alert(1)<"
    path = str(write_image(Path("datasets", f"{name} \udcff.png")))
    image = AuditedImage(path, "train", name, Fingerprint(error="<b>broken</b>"))
    found = audit_images(audited(image))
    write_audit("audit", found, audited(image), Fingerprints("prints"))
    page = Path("audit/audit.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
    assert "<b>broken" not in page
    assert "default-src 'none'" in page
    assert json.loads(Path("audit/audit.json").read_text())["findings"][0]["groups"][0][0]["path"] == path
    assert "1 file can't be read: 1 x <b>broken</b>" in format_findings(found, "audit", fix=False)


def test_the_audit_does_not_steer_the_terminal_and_an_empty_class_name_is_one(here):
    image = AuditedImage("\x1b[2Ja.png", "train", "\x1b[A", Fingerprint(error="gone"))
    finding = Finding("likely wrong label", "of \x1b[2J", [[image]], [], {image.path: ""})
    text = format_findings([finding], "audit", fix=False)
    assert "\x1b" not in text and "of \\x1b[2J" in text
    assert "\\x1b[2Ja.png (perhaps )" in text
    write_audit("audit", [finding], audited(image), Fingerprints("prints"))
    assert "\\x1b[A, perhaps " in Path("audit/audit.html").read_text(encoding="utf-8")


def test_without_the_audit_no_image_is_read(rubbish, monkeypatch):
    monkeypatch.setattr(image_io, "_opened", None)
    annotate(audit=False)
    assert not Path("audit").exists()


def test_the_page_has_all_groups_class_counts_and_samples(rubbish):
    """What doesn't fit at first sight is folded, not left to audit.json."""
    for i in range(30):
        shutil.copy(rubbish / "train" / "glass" / sorted(os.listdir(rubbish / "train" / "glass"))[i % 5], f"{i}.png")
        shutil.move(f"{i}.png", rubbish / "train" / "glass" / f"copy{i:02d}.png")
    annotate()
    page = Path("audit/audit.html").read_text(encoding="utf-8")
    findings = json.loads(Path("audit/audit.json").read_text())["findings"]
    for finding in findings:
        for group in finding["groups"]:
            assert all(image["path"] in page for image in group)
    assert "<details>" in page
    counts = [len(read_list(f"cls_{split}.txt", 10).class_ids) for split in ("train", "val")]
    cells = re.findall(r"<td>(\d+)</td>", page)
    assert [sum(map(int, cells[k::3])) for k in (0, 1)] == counts


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_the_screen_and_enlarges_images(here, browser, width):
    """Also with long names without spaces, and with everything unfolded."""
    for name in ("a" * 60, "b"):
        for i in range(15):
            path = Path("datasets", "train", name, f"{'x' * 60}{i}.png")
            write_image(path, size=(300, 200), seed=100 * len(name) + i)
        Path("datasets", "train", name, "broken.png").write_bytes(b"no image")
    annotate()
    page, errors, _ = open_page(browser, Path("audit/audit.html").absolute(), width)
    page.evaluate("for (const details of document.querySelectorAll('details')) details.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator("#samples figure img").first.click()
    wait_for_property(page, "dialog img", "naturalWidth", 300)
    assert page.locator("dialog").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator("dialog").click()
    assert not page.locator("dialog").is_visible()
    assert errors == []


def test_show_writes_samples_only(rubbish, capsys):
    annotate(show=True)
    assert "written: audit/samples.html" in capsys.readouterr().out
    assert [path.name for path in Path("audit").iterdir()] == ["samples.html"]
    assert not Path("cls_train.txt").exists()
    assert Path("audit/samples.html").read_text().count("<figure>") > 3


RECURSIVE = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i AS path FROM n"


@pytest.mark.parametrize("name", ["fingerprints", "previews", "other"])
def test_a_view_in_the_cache_is_not_run(here, capsys, name):
    """It could run without end."""
    path = str(write_image(here / "a.png"))
    expected = list(Fingerprints("prints").read([path]))
    other = sqlite3.connect("prints")
    other.execute(f"DROP TABLE IF EXISTS {name}")
    other.execute(f"CREATE VIEW {name} AS {RECURSIVE}")
    other.commit()
    other.close()
    found = Fingerprints("prints")
    assert "prints is damaged" in capsys.readouterr().out
    assert list(found.read([path])) == expected
    assert found.preview(path).startswith(fingerprints.JPEG)


@pytest.mark.parametrize(("column", "value"), [("width", "x"), ("height", 1 << 60), ("phash", b""), ("format", "X")])
def test_wrong_values_in_the_cache_are_computed_again(here, column, value):
    path = str(write_image(here / "a.png"))
    expected = list(Fingerprints("prints").read([path]))
    other = sqlite3.connect("prints")
    other.execute(f"UPDATE fingerprints SET {column} = ?", (value,))
    other.commit()
    other.close()
    assert list(Fingerprints("prints").read([path])) == expected
