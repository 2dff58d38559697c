"""Run by torchrun in each rank: trains a run in the working folder, with a fault in one rank. See test_death.py.

Arguments: settings as JSON; then a fault, or nothing: what happens, where, in which rank, at which call, such as
"kill step 1 7". It happens once: a restarted process finds the file `happened`.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path

import torch
from torch.distributed.checkpoint import HuggingFaceStorageWriter

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train
from tests.conftest import TINY, settings
from utils.data import dataset
from utils.data.image_io import ImageError
from utils.runs import saving
from utils.system import cli
from utils.system.runtime import runtime
from utils.training.feature_cache import FeatureCache
from utils.training.trainer import Trainer

SETTINGS = TINY | {
    "recipe": "none",
    "cache_features": False,
    "parts": 4,
    "freeze_epoch": 1,
    "unfreeze_epoch": 3,
    "save_every_steps": 2,
}
HAPPENED = Path("happened")
PLACES = {
    "step": (Trainer, "train_step"),
    "part": (Trainer, "_accumulate_gradients"),
    "validation": (Trainer, "validate"),
    "features": (FeatureCache, "_compute"),
    "saving": (saving, "save_checkpoint"),
    "pieces": (HuggingFaceStorageWriter, "write_data"),
    "reading": (dataset.ImageDataset, "_crop"),
}


def fail(what: str) -> None:
    """Let a fault happen in this process."""
    HAPPENED.touch()
    if what in ("kill", "stop", "term"):
        signals = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}
        os.kill(os.getpid(), signals[what])
    elif what == "memory":
        raise MemoryError
    elif what == "full":
        raise saving_error()
    elif what == "write":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    elif what == "unreadable":
        raise ImageError("it can't be read", "x.png", "damaged")


def saving_error() -> Exception:
    """What saving raises on a full disk."""
    from utils.runs.checkpoint import SaveError

    return SaveError(f"{os.strerror(errno.ENOSPC)}")


def inject(what: str, where: str, rank: int, number: int) -> None:
    """Let `what` happen at call `number`, from 1, of the function of a place in PLACES."""
    owner, name = PLACES[where]
    function: Callable = getattr(owner, name)
    calls = 0

    @wraps(function)
    def faulty(*args: object, **named: object) -> object:
        nonlocal calls
        calls += 1
        if runtime.rank == rank and calls == number and not HAPPENED.exists():
            fail(what)
        return function(*args, **named)

    setattr(owner, name, faulty)


def main() -> None:
    """Train, as train.py does."""
    changes = json.loads(sys.argv[1])
    what, where, rank, number = (sys.argv[2] if len(sys.argv) > 2 else "none step 0 0").split()
    inject(what, where, int(rank), int(number))
    sys.argv[1:] = []
    cli.run(lambda: train.main(settings(**SETTINGS | changes)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
