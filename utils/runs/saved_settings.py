"""The settings of an earlier run, to resume it or to continue training from its best checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from utils.config.train_config import TrainConfig
from utils.runs.checkpoint import BEST, load_newest
from utils.runs.folder import ASKED_FILE, CONFIG_FILE
from utils.system.files import read_json, write_json

MORE_EPOCHS = 10
LOWER = 0.1
"""Factor of the learning rates of a run that is continued: at the full rate the weights first get worse."""


def settings_to_resume(run: str) -> TrainConfig:
    """The settings with which the run in this folder was started, as the user wrote them.

    Raises:
        FileNotFoundError, ValueError: see `_read`.
    """
    folder = Path(run).parent if Path(run).is_file() else Path(run)
    asked = folder / ASKED_FILE
    return replace(_read(asked if asked.is_file() else folder / CONFIG_FILE, "resume", run), resume=run)


def settings_to_continue(run: str) -> TrainConfig:
    """The settings of a new run that trains the best checkpoint of a finished one further: all layers, for
    `MORE_EPOCHS` epochs, at a tenth of the learning rate. The head is kept, unless it was fitted to validation images.

    Raises:
        FileNotFoundError, ValueError: see `_read`; or the run has no best checkpoint.
    """
    config = _read(Path(run, CONFIG_FILE), "continue", run)
    best = Path(run, BEST)
    if not best.is_file():
        raise FileNotFoundError(f"continue={run!r}: it has no {BEST} yet; resume the run with --resume {run}")
    return replace(
        config,
        model_path=str(best),
        pretrained=False,
        # The head of the checkpoint replaces a random one. One that was fitted to validation images, too, would make
        # epoch 0 look better than it is.
        head_init="probe" if config.refit_head else "random",
        stages=(),
        freeze_train=False,
        unfreeze_epoch=MORE_EPOCHS,
        epoch_repeats=1,
        init_lr=config.init_lr * LOWER,
        min_lr=config.min_lr * LOWER,
        resume="auto",
    )


def _read(path: Path, field: str, run: str) -> TrainConfig:
    """Read settings; a damaged `path` is replaced by the settings in the run's checkpoint.

    Raises:
        FileNotFoundError: `run` isn't a run folder.
        ValueError: the settings are damaged, or of another version.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{field}={run!r}: no run found; python eval.py --list shows the runs")
    values = read_json(path)
    if not values and (newest := load_newest(path.parent)):
        print(f"warning: {path} is damaged; the settings in {newest[0].name} take its place")
        values = newest[1]["config"]
        write_json(path, values)
    try:
        return TrainConfig.from_dict(values)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{field}={run!r}: {path} isn't valid ({error}); start a new run with resume=no") from error
