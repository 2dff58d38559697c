"""Tests of utils/annotation/split.py."""

import pytest

from utils.annotation.split import group_by_name, join_groups, split_validation


def test_every_class_with_two_images_is_split():
    images = {"many": [f"{i}" for i in range(50)], "two": ["a", "b"], "one": ["c"]}
    taken = split_validation(images, 0.1, seed=0)
    assert {name: len(paths) for name, paths in taken.items()} == {"many": 5, "two": 1}
    assert {name: len(paths) for name, paths in images.items()} == {"many": 45, "two": 1, "one": 1}
    assert sorted(images["many"] + taken["many"]) == sorted(f"{i}" for i in range(50))


def test_split_depends_on_the_seed_and_hardly_on_other_images():
    def draw(count, seed=0):
        return set(split_validation({"a": [f"{i}" for i in range(count)]}, 0.1, seed)["a"])

    assert draw(500) == draw(500)
    assert draw(500) != draw(500, seed=1)
    assert len(draw(500) - draw(501)) <= 1


def test_groups_are_not_divided():
    images = {name: [f"{name}/p{i // 4:02d}_{i % 4}.png" for i in range(80)] for name in ("a", "b")}
    groups = group_by_name([p for paths in images.values() for p in paths], r"^(p\d+)_")
    assert sorted(map(len, groups)) == [8] * 20  # a patient has images in both classes
    taken = split_validation(images, 0.1, seed=3, groups=groups)
    patients = [{path[2:5] for paths in side.values() for path in paths} for side in (images, taken)]
    assert not patients[0] & patients[1]
    assert [len(taken[name]) for name in ("a", "b")] == [8, 8]


def test_large_groups_give_a_validation_set():
    images = {name: [f"{name}/{name}{i // 10}_{i}.png" for i in range(30)] for name in ("a", "b")}
    groups = group_by_name([p for paths in images.values() for p in paths], r"^[ab]\d+")
    taken = split_validation(images, 0.1, seed=3, groups=groups)
    assert [len(taken[name]) for name in ("a", "b")] == [10, 10]
    assert [len(images[name]) for name in ("a", "b")] == [20, 20]


def test_split_size_is_close_to_the_fraction():
    images = {name: [f"{name}/p{i // 120}_{name}{i}.png" for i in range(960)] + [f"{name}/single.png"] for name in "ab"}
    groups = group_by_name([p for paths in images.values() for p in paths], r"^(p\d+)_")
    taken = split_validation(images, 0.1, seed=3, groups=groups)
    assert all(120 <= len(taken[name]) <= 121 for name in "ab")


def test_groups_with_common_members_are_joined():
    assert join_groups("abc", [("a", "b"), ("c", "b")]) == [["a", "b", "c"]]
    units = join_groups("abcdef", [("a", "b"), ("c", "d"), ("b", "c"), ("e", "missing")])
    assert sorted(map(sorted, units)) == [["a", "b", "c", "d"], ["e"], ["f"]]


@pytest.mark.parametrize(("regex", "message"), [("(", "not a regular expression"), ("xyz", "matches no file name")])
def test_invalid_group_regex(regex, message):
    with pytest.raises(ValueError, match=f"group_regex.*{message}"):
        group_by_name(["a/1.png"], regex)
