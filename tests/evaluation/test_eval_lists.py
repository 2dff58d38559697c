"""Tests of utils/evaluation/eval_lists.py."""

from pathlib import Path

import pytest

from tests.conftest import touch
from utils.evaluation.eval_lists import check_classes, list_folder


@pytest.mark.parametrize(
    ("names", "folders"),
    [(["cat", "dog"], ["2023/cat", "2023/dog", "2024/cat"]), (["a/cat", "b/cat"], ["a/cat", "b/cat"])],
)
def test_folders_of_a_model_of_nested_classes(here, names, folders):
    touch(*(f"data/{folder}/1.jpg" for folder in folders))
    images = list_folder("data", names)
    found = [(names[images.class_ids[i]], Path(images.path(i)).parent.as_posix()) for i in range(len(images))]
    assert sorted(place for _, place in found) == [f"data/{folder}" for folder in folders]
    assert all(place.endswith(f"/{name}") for name, place in found)


@pytest.mark.parametrize("folder", ["train", "Testing", "seg_test"])
def test_folder_of_splits_is_refused(here, folder):
    touch(*(f"data/{folder}/{name}/1.jpg" for name in ("cat", "dog")))
    with pytest.raises(ValueError, match="data contains no folders named after classes; give the one that does"):
        list_folder("data", ["cat", "dog"])


def test_few_of_many_classes_are_listed():
    with pytest.raises(ValueError, match=r"only in list\.txt: 1, 10, 11, 12, 13 and 76 more; only in the .*: cat, dog"):
        check_classes(list(map(str, range(1, 82))), ["cat", "dog"], "list.txt")
