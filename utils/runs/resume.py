"""Finds the run to resume: the newest unfinished one with the same settings, a given one, or none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from utils.config.train_config import AUTO, PLAIN_DEFAULTS, RESUMABLE_FIELDS, TrainConfig, project_files, upgrade
from utils.data.image_list import ImageList, compare_lists, read_list
from utils.runs.checkpoint import LAST, SaveError, amend_checkpoint, load_newest, prune_periodic, read_progress
from utils.runs.folder import (
    ASKED_FILE,
    CONFIG_FILE,
    LIST_FILES,
    RunFolder,
    create_run_folder,
    has_no_checkpoint,
    read_settings,
    remove_leftovers,
    write_lists,
)
from utils.system.files import copy_whole
from utils.system.folder_lock import FolderLock
from utils.system.text import shorten_list


def open_run(
    config: TrainConfig, class_names: list[str], lists: Mapping[str, ImageList], asked: TrainConfig | None = None
) -> RunFolder:
    """The locked folder of the run that `config.resume` selects, with the checkpoint to resume from.

    `lists` are by the keys of `LIST_FILES`; `asked` are the settings before the recipe filled unset fields.

    Raises:
        FileNotFoundError: there is no such run.
        ValueError: it has other settings, classes or lists, or no intact checkpoint.
        InUse: another process writes to it.
        SaveError: `save_dir` can't be written to.
    """
    try:
        return _open(config, class_names, lists, asked or config)
    except (FileNotFoundError, SaveError):
        raise
    except OSError as error:
        raise SaveError(
            f"save_dir={config.save_dir!r}: it can't be written ({error.strerror}: {error.filename}); make it "
            f"writable, or set save_dir to another folder"
        ) from error


def _open(config: TrainConfig, class_names: list[str], lists: Mapping[str, ImageList], asked: TrainConfig) -> RunFolder:
    remove_leftovers(Path(config.save_dir))
    if config.resume == "auto":
        _report_damaged_settings(config.save_dir)
        for path in find_runs(config, finished=False):
            run, newest = _open_folder(path)
            if run and _has_classes(run, class_names):
                return _prepare_resume(run, newest, config, lists)
            reason = "it has other classes" if run else "it has no intact checkpoint"
            print(f"warning: the unfinished run {path} isn't resumed: {reason}")
        _report_differences(config)
    elif config.resume != "no":
        return _open_given(config, class_names, lists)
    return create_run_folder(config, asked, lists)


def _report_damaged_settings(save_dir: str) -> None:
    """Print how to resume the runs whose settings can't be compared."""
    for folder in _newest_first(save_dir):
        if not read_settings(folder) and not has_no_checkpoint(folder):
            print(
                f"warning: {folder / CONFIG_FILE} is damaged, so it is unknown whether this run has the same settings; "
                f"its checkpoint has them: resume it with --resume {folder}"
            )


def _report_differences(config: TrainConfig) -> None:
    """Print which settings of the newest run differ, if it is unfinished: a flag may have been forgotten."""
    newest = next(iter(_newest_first(config.save_dir)), None)
    if newest is None or _is_finished(newest) or not (saved := read_settings(newest)):
        return
    if changed := changed_fields(saved, config):
        settings = ", ".join(f"{name}={before!r}" for name, (before, _) in changed.items())
        print(f"the unfinished run {newest} isn't resumed: its settings differ; to resume it, set {settings}")


def _open_given(config: TrainConfig, class_names: list[str], lists: Mapping[str, ImageList]) -> RunFolder:
    given = f"resume={config.resume!r}"
    path = Path(config.resume)
    if path.is_file() and path.name != LAST:
        raise ValueError(
            f"{given}: a run only resumes from its last checkpoint; give its folder, or set model_path to start a new "
            f"run from the weights in this file"
        )
    path = _folder_of(config.resume)
    if not path.is_dir() or not (path / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"{given}: no run found; give a run folder, auto or no")
    if changed := changed_fields(read_settings(path), config):
        differences = ", ".join(f"{name} was {before!r} and is {now!r}" for name, (before, now) in changed.items())
        raise ValueError(
            f"{given}: {differences}; a resumed run can't change this: remove it, or train the run's best checkpoint "
            f"further in a new run, --continue {path}"
        )
    run, newest = _open_folder(path)
    if run is None:
        raise ValueError(f"{given}: it has no intact checkpoint; start a new run with resume=no")
    if not _has_classes(run, class_names):
        raise ValueError(
            f"{given}: it has the classes {shorten_list(run.checkpoint['class_names'])}, and {config.classes_path} "
            f"has {shorten_list(class_names)}; restore that file, or start a new run with resume=no"
        )
    return _prepare_resume(run, newest, config, lists)


def find_runs(config: TrainConfig, finished: bool) -> Iterator[Path]:
    """The finished or unfinished runs in `save_dir` with these settings, newest first."""
    for folder in _newest_first(config.save_dir):
        if _is_finished(folder) == finished and not changed_fields(read_settings(folder), config):
            yield folder


def earlier_choices(asked: TrainConfig, class_names: list[str]) -> dict[str, Any] | None:
    """The values, by field, that were chosen for the run that `asked` resumes; None if it resumes none."""
    if asked.resume == "no" or not asked.leaves_choices:
        return None
    folders = _newest_first(asked.save_dir) if asked.resume == "auto" else [_folder_of(asked.resume)]
    for folder in folders:
        saved, now = read_settings(folder, ASKED_FILE), read_settings(folder)
        if not saved or not now or changed_fields(saved, asked) or (asked.resume == "auto" and _is_finished(folder)):
            continue
        newest = load_newest(folder)
        if newest is None and not has_no_checkpoint(folder):
            continue
        if newest is None or newest[1]["class_names"] == class_names:
            values = upgrade(saved)
            open_fields = ["backbone"] if asked.backbone == AUTO else []
            if asked.recipe == "auto":
                open_fields += [name for name, value in values.items() if value is None and name in PLAIN_DEFAULTS]
            return {name: now[name] for name in open_fields}
    return None


def _newest_first(save_dir: str) -> list[Path]:
    """The run folders in `save_dir`, the latest start first."""
    files = filter(Path.is_file, Path(save_dir).glob(f"*/{CONFIG_FILE}"))
    return [file.parent for file in sorted(files, key=lambda file: file.stat().st_mtime_ns, reverse=True)]


def _is_finished(folder: Path) -> bool:
    progress = read_progress(folder / LAST)
    return bool(progress and progress.finished)


def _folder_of(resume: str) -> Path:
    """The run folder that `resume` selects, which may be the path of its last checkpoint."""
    path = Path(resume)
    return path.parent if path.is_file() else path


def changed_fields(saved: Mapping[str, Any], config: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """The fields that prevent resuming a run with settings `saved`: (value before, value now) by name.

    Fields that are missing in `saved` are newer than the run and had their defaults. If `saved` is empty, because its
    file couldn't be read, all fields differ.
    """
    now = config.with_paths().as_dict()
    default = TrainConfig() if config.leaves_choices else TrainConfig().with_defaults()
    before = default.as_dict() | upgrade(saved) if saved else dict.fromkeys(now)
    before |= {field: before[field] or path for field, path in project_files(before["data"] or "").items()}
    names = sorted((before.keys() | now.keys()) - RESUMABLE_FIELDS)
    pairs = {name: (before.get(name), now.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _has_other_lists(run: RunFolder, lists: Mapping[str, ImageList]) -> bool:
    return any(run.checkpoint["lists"].get(key) != images.digest() for key, images in lists.items())


def _check_lists(run: RunFolder, config: TrainConfig, lists: Mapping[str, ImageList]) -> bool:
    """Whether the lists have changed since the run started.

    Raises:
        ValueError: they have, and `accept_changed_lists` isn't set.
    """
    if run.checkpoint is None or not _has_other_lists(run, lists):
        return False
    changes = []
    for key, images in lists.items():
        digest = run.checkpoint["lists"].get(key)
        if digest == images.digest():
            continue
        copy = run.path / LIST_FILES[key]
        names = run.checkpoint["class_names"]
        before = read_list(copy, len(names)) if copy.is_file() else None
        known = before is not None and before.digest() == digest
        differences = compare_lists(before, images, names) if known else f"its copy {copy} is missing or changed"
        changes.append(f"{getattr(config, f'{key}_annotation_path')}: {differences}")
    message = f"the lists have changed since the run started: {'; '.join(changes)}"
    if not config.accept_changed_lists:
        run.lock.release()
        raise ValueError(
            f"resume={config.resume!r}: {run.path} can't be resumed, {message}; start a new run with resume=no, or set "
            f"accept_changed_lists (the result differs from that of an uninterrupted run)"
        )
    print(f"warning: {message}")
    return True


def _has_classes(run: RunFolder, class_names: list[str]) -> bool:
    """Whether a run has these classes; if not, its folder is released."""
    if run.checkpoint is None or run.checkpoint["class_names"] == class_names:
        return True
    run.lock.release()
    return False


def _open_folder(path: Path) -> tuple[RunFolder | None, Path | None]:
    """A run with its newest intact checkpoint, and the path of that. (None, None) if all its checkpoints are damaged or
    gone."""
    lock = FolderLock(path)
    if newest := load_newest(path):
        return RunFolder(path, lock, newest[1]), newest[0]
    if has_no_checkpoint(path):
        return RunFolder(path, lock, None), None
    lock.release()
    return None, None


def _prepare_resume(
    run: RunFolder, newest: Path | None, config: TrainConfig, lists: Mapping[str, ImageList]
) -> RunFolder:
    """Make the checkpoint `newest` the last one of the run, store the lists, and return the run.

    A run that hasn't made a step, and whose lists have changed, starts anew in its folder.

    Raises:
        ValueError: see `_check_lists`; the folder is unchanged.
    """
    if run.checkpoint and run.checkpoint["step"] == 0 and _has_other_lists(run, lists):
        print(f"{run.path} hasn't made a step and its lists have changed: it starts anew")
        run, newest = replace(run, checkpoint=None), None
    changed = _check_lists(run, config, lists)
    if newest:
        # First free disk space, since a full disk may have interrupted the run; keep at least one, it may be `newest`.
        prune_periodic(run.path, max(1, config.keep_periodic))
        if newest.name != LAST:
            copy_whole(newest, run.path / LAST)
    if changed:  # the digests before the copies: a copy that doesn't match its digest counts as changed by a user
        digests = {key: images.digest() for key, images in lists.items()}
        # Earlier validations were of other images.
        forgotten = {"start": {}, "lowest": {}}
        amend_checkpoint(run.path / LAST, {"lists": digests} | forgotten)
        run.checkpoint.update(forgotten)
    write_lists(run.path, lists, config)
    return run
