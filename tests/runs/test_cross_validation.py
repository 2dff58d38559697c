"""Cross-validation: the division into folds, and the runs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import train
from tests.conftest import TINY, settings, write_image, write_scene
from utils.annotation.annotate import annotate
from utils.data.image_list import ImageList, list_in_memory
from utils.runs.checkpoint import BEST, LAST, load_checkpoint
from utils.runs.cross_validation import assign_folds, join_lists
from utils.training.datasets import load_data


def test_it_excludes_summary_and_find_lr():
    for other in ("summary", "find_lr"):
        with pytest.raises(ValueError, match="cross_validate: can't be combined"):
            train.main(settings(**TINY), cross_validate=3, **{other: True})


@pytest.fixture
def noise(tmp_path, monkeypatch) -> ImageList:
    """60 images of noise: two classes of 40 and 20, three images for each of the patients 0 to 19."""
    monkeypatch.chdir(tmp_path)
    entries = []
    for i in range(60):
        path = tmp_path / f"p{i // 3:02d}_{i % 3}.png"
        write_image(path, size=(70, 70), seed=i)
        entries.append((int(i >= 40), str(path)))
    return list_in_memory(entries)


def test_every_class_is_divided_evenly(noise):
    fold_of = assign_folds(noise, 5, settings(), "")
    for class_id, each in ((0, 8), (1, 4)):
        assert np.bincount(fold_of[noise.class_ids == class_id], minlength=5).tolist() == [each] * 5
    assert np.array_equal(fold_of, assign_folds(noise, 5, settings(), ""))
    assert not np.array_equal(fold_of, assign_folds(noise, 5, settings(seed=12), ""))


def test_groups_and_near_duplicates_stay_in_one_fold(noise, tmp_path):
    shutil.copy(noise.path(0), noise.path(30))  # of another patient
    fold_of = assign_folds(noise, 4, settings(), r"^(p\d+)_")
    for patient in range(20):
        assert len(set(fold_of[3 * patient : 3 * patient + 3])) == 1
    assert fold_of[0] == fold_of[30]
    assert set(fold_of) == {0, 1, 2, 3}


def test_links_are_grouped_by_their_own_names(two_classes, capsys):
    store = two_classes.parent / "store"
    store.mkdir()
    for number, path in enumerate(sorted((two_classes / "train").rglob("*.png"))):
        write_image(store / f"{number:x}.png", size=(70, 70), seed=number)
        path.unlink()
        path.with_name(f"p{number // 4:02d}_{number}.png").symlink_to(store / f"{number:x}.png")
    annotate(two_classes)
    images = join_lists(load_data(settings()))
    fold_of = assign_folds(images, 3, settings(), r"^(p\d+)_")
    patients = np.array([Path(images.path(i)).name[:3] for i in range(len(images))])
    assert all(len(set(fold_of[patients == patient])) == 1 for patient in patients)
    assert "group_regex: 10 groups; 0 images" in capsys.readouterr().out


def test_a_class_of_similar_images_is_divided_with_a_warning(here, capsys):
    write_scene(here / "datasets")
    paths = sorted(map(str, Path("datasets").rglob("*.png")))
    images = list_in_memory((int("scratched" in path), path) for path in paths)
    fold_of = assign_folds(images, 5, settings(), "")
    for class_id in (0, 1):
        assert np.bincount(fold_of[images.class_ids == class_id]).tolist() == [4] * 5
    assert "warning: 40 images look alike and are a large part of a class" in capsys.readouterr().out


@pytest.mark.parametrize(("folds", "regex"), [(1, ""), (21, ""), (8, r"^(p\d+)_")])
def test_more_folds_than_images_or_groups(noise, folds, regex):
    with pytest.raises(ValueError, match=f"cross_validate={folds}: give 2 to (20|7)"):
        assign_folds(noise, folds, settings(), regex)


def test_group_regex_requires_cross_validation():
    with pytest.raises(ValueError, match="group_regex: needs cross_validate"):
        train.main(settings(**TINY), group_regex="x")


def test_one_run_per_fold_and_the_same_command_resumes(two_classes, capsys, monkeypatch):
    for number, path in enumerate(sorted(Path("datasets/train").rglob("*.png"))):
        write_image(path, size=(70, 70), seed=number)  # no near-duplicates
    config = settings(**TINY)
    trained = []

    main, train_fold = train.main, train.train_fold

    def fail_at_third(of_fold):
        trained.append(of_fold)
        if len(trained) == 3:
            raise KeyboardInterrupt
        train_fold(of_fold)
        Path(of_fold.cache_dir).mkdir(parents=True)
        Path(of_fold.cache_dir, "features").touch()

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "train_fold", fail_at_third)
        main(config, cross_validate=3)
    main(config, cross_validate=3)
    output = capsys.readouterr().out
    assert output.count("Next:") == 1
    assert output.endswith("Next: the same command without --cross-validate trains the network to use\n")
    (results,) = Path("logs/cross_validation").glob("3_folds_*/cross_validation.json")
    rows = json.loads(results.read_text())["folds"]
    assert len(list(Path("logs").rglob(LAST))) == len(rows) == 3
    assert len({of_fold.cache_dir for of_fold in trained}) == 3
    assert not [path for path in Path(config.cache_dir, "cross_validation").rglob("*") if path.is_file()]
    last = [load_checkpoint(Path(row["run"]) / LAST)["history"][-1]["val_top1"] for row in rows]
    best = [load_checkpoint(Path(row["run"]) / BEST) for row in rows]
    assert [row["best_top1"] for row in rows] == [content["history"][-1]["val_top1"] for content in best]
    assert f"top-1 {np.mean(last):.1%} ± {np.std(last, ddof=1):.1%}" in output
    validated = [(results.parent / f"fold_{i}/val.txt").read_text().splitlines() for i in (1, 2, 3)]
    everything = sorted(line for lines in validated for line in lines)
    assert len(everything) == len(set(everything)) == 40
    for i, lines in enumerate(validated, 1):
        trained_on = (results.parent / f"fold_{i}/train.txt").read_text().splitlines()
        assert sorted(trained_on + lines) == everything

    def stop(of_fold):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_fold", stop)
    main(config, cross_validate=3)  # all folds are finished
    for folds, regex in ((2, ""), (3, r"(\d)\.png$")):  # another division starts new runs
        with pytest.raises(KeyboardInterrupt):
            main(config, cross_validate=folds, group_regex=regex)
    assert len(list(Path("logs/cross_validation").iterdir())) == 3
    with pytest.raises(ValueError, match=r"resume='logs/.*': is one run"):
        main(settings(**TINY, resume=rows[0]["run"]), cross_validate=3)
