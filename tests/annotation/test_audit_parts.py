"""The audit in parts gives the same files as in one, whatever became of a part."""

import os
import re
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import write_image
from utils.annotation import fingerprints
from utils.annotation.annotate import annotate
from utils.annotation.fingerprints import Fingerprints
from utils.system.part import Part

CACHE = Path("cache/fingerprints.sqlite")
FLAGS = {"test_fraction": 0.2, "fix": True}
ONE, TWO, THREE = (Part(number, 3).place(CACHE) for number in (1, 2, 3))


@pytest.fixture
def folders(here) -> dict[str, bytes]:
    """datasets/ with duplicates, near-duplicates and an unreadable image; what an audit in one writes."""
    for name in ("a", "b"):
        for i in range(14):
            write_image(Path("datasets", name, f"{i:02d}.png"), size=(80, 60), seed=100 * ord(name) + i)
        Image.open(f"datasets/{name}/00.png").save(f"datasets/{name}/same.bmp")
        Image.open(f"datasets/{name}/01.png").point(lambda level: level + 5).save(f"datasets/{name}/bright.png")
    Path("datasets/a/broken.jpg").write_bytes(b"no image")
    annotate(**FLAGS)
    expected = written()
    assert b"near-duplicate within a class" in expected["audit/audit.json"]
    remove_results()
    shutil.rmtree("cache")
    return expected


def written() -> dict[str, bytes]:
    """What the audit has written."""
    files = [path for path in Path().rglob("*") if path.is_file() and path.parts[0] not in ("cache", "datasets")]
    return {path.as_posix(): path.read_bytes() for path in files}


def remove_results() -> None:
    for name in written():
        Path(name).unlink()


@pytest.fixture
def images_read(monkeypatch) -> list[str]:
    """The names of the images that are read."""
    read: list[str] = []
    original = fingerprints.take_fingerprint

    def record(path: str, **limits):
        read.append(Path(path).name)
        return original(path, **limits)

    monkeypatch.setattr(fingerprints, "take_fingerprint", record)
    return read


def read_parts(*numbers: int) -> None:
    for number in numbers:
        annotate(**FLAGS, part=f"{number}/3")


def test_parts_give_the_same_files_as_one(folders, images_read, capsys):
    """In any order, also if one is run twice; each image is read once, except for the unreadable one."""
    read_parts(2, 3, 1, 3)
    assert written() == {}
    readable = [name for name in images_read if name != "broken.jpg"]
    assert len(readable) == 32
    output = capsys.readouterr().out
    assert "part 2/3: 11 of 33 images read" in output
    assert re.search(r"when all parts are done: python \S*txt_annotation.py --test-fraction 0.2 --fix\n", output)
    images_read.clear()
    annotate(**FLAGS)
    assert images_read == ["broken.jpg"]
    assert written() == folders
    assert "merged: 3 of 3 parts with 32 images" in capsys.readouterr().out
    assert [path.name for path in Path("cache").iterdir()] == [CACHE.name]


def test_a_missing_part_is_read_by_the_merge(folders, images_read, capsys):
    read_parts(1, 3)
    images_read.clear()
    annotate(**FLAGS)
    assert len([name for name in images_read if name != "broken.jpg"]) in (10, 11)
    assert written() == folders
    assert "merged: 2 of 3 parts" in capsys.readouterr().out


def test_a_part_that_is_run_after_the_merge_reads_nothing(folders, images_read):
    read_parts(1, 2, 3)
    annotate(**FLAGS)
    images_read.clear()
    read_parts(1, 2, 3)
    assert set(images_read) <= {"broken.jpg"}
    annotate(**FLAGS)
    assert written() == folders


def test_a_stopped_part_is_resumed(folders, images_read, monkeypatch):
    monkeypatch.setattr(fingerprints, "SAVE_EVERY", 2)
    with monkeypatch.context() as patch:
        original = fingerprints.take_fingerprint

        def stop(path: str, **limits):
            if Path(path).name == "10.png":
                raise KeyboardInterrupt
            return original(path, **limits)

        patch.setattr(fingerprints, "take_fingerprint", stop)
        with pytest.raises(KeyboardInterrupt):
            read_parts(2)
    before = len(images_read)
    read_parts(2, 1, 3)
    assert 0 < len([name for name in images_read[before:] if name != "broken.jpg"]) < 32
    annotate(**FLAGS)
    assert written() == folders


def change(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as db, db:
        for statement in statements:
            db.execute(statement)


HOSTILE: dict[str, Callable[[], object]] = {
    "no database": lambda: TWO.write_bytes(b"no database" * 100),
    "cut off": lambda: TWO.write_bytes(TWO.read_bytes()[:9000]),
    "empty": lambda: TWO.write_bytes(b""),
    "a link": lambda: (TWO.unlink(), TWO.symlink_to(ONE.name)),
    "a view": lambda: change(
        TWO,
        "DROP TABLE fingerprints",
        "CREATE VIEW fingerprints AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n",
    ),
    "a trigger": lambda: change(TWO, "CREATE TRIGGER t AFTER INSERT ON previews BEGIN DELETE FROM fingerprints; END"),
    "other states": lambda: change(TWO, "UPDATE fingerprints SET state = 'x'"),
    "other types": lambda: change(TWO, "UPDATE fingerprints SET state = 7, path = 'text'||rowid"),
    "no text": lambda: change(TWO, "UPDATE fingerprints SET state = CAST(x'ff' AS TEXT), format = CAST(x'ff' AS TEXT)"),
    "a wide image": lambda: change(TWO, "UPDATE fingerprints SET width = 1 << 60"),
    "a short hash": lambda: change(TWO, "UPDATE fingerprints SET phash = x'00'"),
    "an error": lambda: change(TWO, "UPDATE fingerprints SET error = 'x'"),
    "another format": lambda: change(TWO, "UPDATE fingerprints SET format = 'JPEG' || rowid"),
    "a preview": lambda: change(
        TWO, "INSERT INTO previews SELECT path, '128 ' || state, x'ffd8' || 'x' FROM fingerprints"
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_an_altered_part_changes_nothing(folders, kind, capsys):
    read_parts(1, 2, 3)
    HOSTILE[kind]()
    annotate(**FLAGS)
    assert written() == folders
    assert not ONE.exists() and not THREE.exists()
    assert TWO.is_symlink() == os.path.lexists(TWO) == (kind == "a link")
    damaged = kind in ("no database", "cut off", "a view", "a trigger")
    assert ("fingerprints-2-of-3.sqlite is damaged" in capsys.readouterr().out) == damaged


def test_an_older_part_doesnt_hide_a_changed_image(folders, images_read):
    read_parts(1, 2, 3)
    old = ONE.read_bytes()
    annotate(**FLAGS)
    write_image(Path("datasets/a/00.png"), size=(80, 60), seed=5)
    annotate(**FLAGS)
    expected = written()
    ONE.write_bytes(old)
    annotate(**FLAGS)
    assert written() == expected


def test_a_part_in_use_is_left_to_the_next_run(folders, monkeypatch, capsys):
    monkeypatch.setattr(fingerprints, "LOCK_TIMEOUT", 3)  # of a busy machine: threads wait for each other, too
    read_parts(1, 2, 3)
    with closing(sqlite3.connect(TWO)) as other:
        other.execute("BEGIN EXCLUSIVE")
        annotate(**FLAGS)
        assert written() == folders
        assert "fingerprints-2-of-3.sqlite can't be used" in capsys.readouterr().out
        assert TWO.exists()
        other.rollback()
    annotate(**FLAGS)
    assert not TWO.exists()


def test_a_part_without_a_cache_has_no_result(folders, monkeypatch):
    """If it can't write its own, it stops. If it can't read the merged one, it reads all of its images."""
    monkeypatch.setattr(fingerprints, "LOCK_TIMEOUT", 0)
    Path("cache").mkdir()
    CACHE.write_bytes(b"no database" * 100)
    read_parts(1)
    assert CACHE.read_bytes() == b"no database" * 100
    with closing(sqlite3.connect(ONE)) as other:
        other.execute("DELETE FROM fingerprints")
        other.commit()
        for lock in ("IMMEDIATE", "EXCLUSIVE"):  # it fails when it writes, and when it opens it
            other.execute(f"BEGIN {lock}")
            with pytest.raises(ValueError, match=r"part='1/3': .*1-of-3.sqlite can't be used .*; give a --cache-dir"):
                read_parts(1)
            other.rollback()
    with pytest.raises(ValueError, match=r"part='1/3': .* can't be used"):
        annotate(part="1/3", cache_dir="datasets/a/00.png")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"part": "4/3"}, "part='4/3': there is no such part; give 1/3 to 3/3"),
        ({"part": "1/3", "audit": False}, "part='1/3': only the audit is done in parts; leave out --no-audit"),
        ({"part": "1/3", "show": True}, "part='1/3': only the audit is done in parts; leave out --show"),
    ],
)
def test_flags(folders, flags, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        annotate(**flags)
    assert not Path("cache").exists()


def test_what_parts_read_is_what_the_cache_would_have(folders):
    """Part files are merged row by row: a second machine may use a cache in the meantime."""
    read_parts(1, 2, 3)
    paths = sorted(map(str, Path("datasets").rglob("*.png")))
    found = Fingerprints(CACHE)
    found.merge_parts()
    assert list(found.read(paths)) == [fingerprints.take_fingerprint(path) for path in paths]
