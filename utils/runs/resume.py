"""Which run a start goes on with: the newest unfinished one of the same settings, a given one, or a new one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from utils.config.train_config import PLAIN_DEFAULTS, RESUMABLE_FIELDS, TrainConfig, upgrade
from utils.data.image_list import ImageList, compare_lists, read_list
from utils.runs.checkpoint import LAST, SaveError, load_newest, prune_periodic, read_progress, save_checkpoint
from utils.runs.folder import (
    ASKED_FILE,
    CONFIG_FILE,
    LIST_FILES,
    RunFolder,
    create_run_folder,
    has_no_checkpoint,
    remove_leftovers,
    write_lists,
)
from utils.system.files import read_json, write_whole
from utils.system.folder_lock import FolderLock


def open_run(
    config: TrainConfig, class_names: list[str], lists: Mapping[str, ImageList], asked: TrainConfig | None = None
) -> RunFolder:
    """The folder of the run that `config.resume` means, and what is said of it.

    Args:
        config: the settings.
        class_names: name of each class id.
        lists: by the keys of `LIST_FILES`.
        asked: the settings before a recipe chose among them.

    Raises:
        FileNotFoundError: there is no such run.
        ValueError: it has other settings, classes or lists, or none of its checkpoints is whole.
        InUse: another process writes to it.
        SaveError: `save_dir` can't be written to.
    """
    try:
        return _open(config, class_names, lists, asked or config)
    except (FileNotFoundError, SaveError):
        raise
    except OSError as error:
        raise SaveError(
            f"save_dir={config.save_dir!r} can't be written ({error.strerror}: {error.filename}); make it writable, "
            f"or set save_dir to another folder"
        ) from error


def _open(config: TrainConfig, class_names: list[str], lists: Mapping[str, ImageList], asked: TrainConfig) -> RunFolder:
    remove_leftovers(Path(config.save_dir))
    if config.resume == "auto":
        for path in find_runs(config, finished=False):
            run, newest = _open_folder(path)
            if run and _has_classes(run, class_names):
                _prepare_resume(run, newest, config, lists)
                return run
            print(f"warning: {path} isn't finished, but {'has other classes' if run else 'has no whole checkpoint'}")
        _report_differences(config)
    elif config.resume != "no":
        return _open_given(config, class_names, lists)
    return create_run_folder(config, asked, lists)


def _report_differences(config: TrainConfig) -> None:
    """Name the newest run if it isn't finished and other settings keep it from going on: a flag may be forgotten."""
    newest = next(iter(_newest_first(config.save_dir)), None)
    if newest is None or _is_finished(newest) or not (then := read_json(newest / CONFIG_FILE)):
        return
    if changed := changed_fields(then, config):
        told = ", ".join(f"{name}={before!r}" for name, (before, _) in changed.items())
        print(f"{newest} isn't finished; it would go on with its own settings, {told}")


def _open_given(config: TrainConfig, class_names: list[str], lists: Mapping[str, ImageList]) -> RunFolder:
    path = Path(config.resume)
    if path.is_file() and path.name != LAST:
        raise ValueError(
            f"resume={config.resume!r}: a run goes on from its last checkpoint, so give its folder; to begin a new run "
            f"with the weights of another checkpoint, set model_path"
        )
    path = _folder_of(config.resume)
    if not path.is_dir() or not (path / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"resume={config.resume!r}: there is no run; give its folder, auto or no")
    check_config(path, config)
    run, newest = _open_folder(path)
    if run is None:
        raise ValueError(f"resume={config.resume!r}: it has no whole checkpoint; begin a new run with resume=no")
    if not _has_classes(run, class_names):
        raise ValueError(
            f"resume={config.resume!r}: that run has the classes {', '.join(run.checkpoint['class_names'])}, and "
            f"{config.classes_path} names {', '.join(class_names)}"
        )
    _prepare_resume(run, newest, config, lists)
    return run


def find_runs(config: TrainConfig, finished: bool) -> Iterator[Path]:
    """The folders in `save_dir` of runs with these settings that are at their end, or aren't, the newest first."""
    for folder in _newest_first(config.save_dir):
        if _is_finished(folder) == finished and not changed_fields(read_json(folder / CONFIG_FILE), config):
            yield folder


def earlier_choices(asked: TrainConfig, class_names: list[str]) -> dict[str, Any] | None:
    """The values that a recipe chose for the run that `asked` resumes, by field; None: there is no such run."""
    if asked.resume == "no":
        return None
    folders = _newest_first(asked.save_dir) if asked.resume == "auto" else [_folder_of(asked.resume)]
    for folder in folders:
        then, now = read_json(folder / ASKED_FILE), read_json(folder / CONFIG_FILE)
        if not then or not now or changed_fields(then, asked) or (asked.resume == "auto" and _is_finished(folder)):
            continue
        found = load_newest(folder)
        if found is None and not has_no_checkpoint(folder):
            continue
        if found is None or found[1]["class_names"] == class_names:
            unset = [name for name, value in upgrade(then).items() if value is None and name in PLAIN_DEFAULTS]
            return {name: now[name] for name in unset}
    return None


def _newest_first(save_dir: str) -> list[Path]:
    """The folders of runs in `save_dir`, by when they began."""
    files = Path(save_dir).glob(f"*/{CONFIG_FILE}")
    return [file.parent for file in sorted(files, key=lambda file: file.stat().st_mtime_ns, reverse=True)]


def _is_finished(folder: Path) -> bool:
    progress = read_progress(folder / LAST)
    return bool(progress and progress.finished)


def _folder_of(resume: str) -> Path:
    """The run's folder, which may be given by its last checkpoint."""
    path = Path(resume)
    return path.parent if path.is_file() else path


def changed_fields(then: Mapping[str, Any], config: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """The fields that decide what a run becomes and differ from the settings `then` of an earlier one, with both
    values.

    Fields that didn't exist then had their default. If `then` is empty, since the file couldn't be read, all fields
    differ.
    """
    now = config.as_dict()
    default = TrainConfig() if config.recipe == "auto" else TrainConfig().with_defaults()
    before = default.as_dict() | upgrade(then) if then else dict.fromkeys(now)
    names = sorted((before.keys() | now.keys()) - RESUMABLE_FIELDS)
    pairs = {name: (before.get(name), now.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def check_config(folder: Path, config: TrainConfig) -> None:
    """Raise a ValueError that names the fields in which a run has other settings, if they decide what comes of it."""
    if changed := changed_fields(read_json(folder / CONFIG_FILE), config):
        told = ", ".join(f"{name} was {before!r} and is {now!r}" for name, (before, now) in changed.items())
        raise ValueError(
            f"resume={config.resume!r}: {told}; give the settings, flags too, that the run was started with (they are "
            f"in {folder / CONFIG_FILE}), or begin a new run, with model_path to start from its weights"
        )


def check_lists(run: RunFolder, config: TrainConfig, lists: Mapping[str, ImageList]) -> bool:
    """Whether the lists have changed since a run began.

    Raises:
        ValueError: they have, and `accept_changed_lists` isn't set; names the images.
    """
    if run.checkpoint is None:
        return False
    told = []
    for key, images in lists.items():
        if run.checkpoint["lists"].get(key) == images.digest():
            continue
        copy = run.path / LIST_FILES[key]
        names = run.checkpoint["class_names"]
        before = read_list(copy, len(names)) if copy.is_file() else None
        known = before is not None and before.digest() == run.checkpoint["lists"].get(key)
        differences = compare_lists(before, images, names) if known else f"{copy}, what it was, is gone or changed"
        told.append(f"{getattr(config, f'{key}_annotation_path')}: {differences}")
    if not told:
        return False
    if not config.accept_changed_lists:
        run.lock.release()
        raise ValueError(
            f"{run.path} was begun with other lists than there are now. {'; '.join(told)}. Begin a new run with "
            f"resume=no, or go on with accept_changed_lists, which isn't the same as a run without interruption"
        )
    print(f"warning: the lists have changed since the run began. {'; '.join(told)}")
    return True


def _has_classes(run: RunFolder, class_names: list[str]) -> bool:
    if run.checkpoint is None or run.checkpoint["class_names"] == class_names:
        return True
    run.lock.release()
    return False


def _open_folder(path: Path) -> tuple[RunFolder | None, Path | None]:
    """A run that was begun, and the file of its newest checkpoint; no run if none is whole, though it came
    farther than its beginning."""
    lock = FolderLock(path)
    found = load_newest(path)
    if found:
        return RunFolder(path, lock, found[1]), found[0]
    if has_no_checkpoint(path):
        return RunFolder(path, lock, None), None
    lock.release()
    return None, None


def _prepare_resume(run: RunFolder, newest: Path | None, config: TrainConfig, lists: Mapping[str, ImageList]) -> None:
    """Make the run's folder what it goes on from: its newest checkpoint, `newest`, the last one, with these
    lists.

    Raises:
        ValueError: see `check_lists`; nothing has been touched then.
    """
    changed = check_lists(run, config, lists)
    if newest:
        # A full disk may be why it was cut off. The newest of them may be what it goes on from.
        prune_periodic(run.path, max(1, config.keep_periodic))
        if newest.name != LAST:  # it is the max_distance, so it is the last
            with write_whole(run.path / LAST) as file, newest.open("rb") as max_distance:
                shutil.copyfileobj(max_distance, file)
    if changed:  # known to the checkpoint first: copies that it doesn't know would be taken for somebody's change
        digests = {key: images.digest() for key, images in lists.items()}
        save_checkpoint(run.path / LAST, run.checkpoint | {"lists": digests})
    write_lists(run.path, lists)
