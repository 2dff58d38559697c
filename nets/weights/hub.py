"""Download weights from the Hugging Face hub or a URL into a cache, and verify their SHA-256."""

from __future__ import annotations

import queue
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nets.weights.digest import digest_file
from nets.weights.license import CARD, read_license

HUB_FILES = ("model.safetensors", "pytorch_model.bin")
"""Names of weights in a repository, in order of preference."""
DESCRIPTIONS = ("config.json", "preprocessor_config.json")
FILE_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".npz", ".ckpt")
"""Suffixes of files of weights."""
TIMEOUT = 8
"""Seconds to wait for the first answer of a server. The clients would wait and retry for minutes."""
NOT_ASKED = "it isn't in the cache"
MIRROR = "Or set the environment variable HF_ENDPOINT to a mirror, such as https://hf-mirror.com"


@dataclass(frozen=True)
class WeightsFile:
    """A file of weights.

    Attributes:
        path: the file.
        origin: `repository` and `revision`, `url`, or neither for a local file; `license`, where known.
        preprocessing: what the published weights expect of images, as config fields, where the tensors don't show it.
    """

    path: Path
    origin: Mapping[str, str] = field(default_factory=dict)
    preprocessing: Mapping[str, Any] = field(default_factory=dict)


def download_from_hub(repository: str, revision: str | None, remedy: str, online: bool = True) -> WeightsFile:
    """Download the weights of a repository and the files that describe them, unless they are in the hub's cache.

    Args:
        repository: `owner/name`.
        revision: a commit, tag or branch; None for the newest. The returned origin has the commit.
        remedy: what to do without a network, for the error message.
        online: whether to ask the hub; if not, only its cache is searched.

    Raises:
        FileNotFoundError: the download failed.
        ValueError: the file's hash differs from the hub's.
    """
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    missing = []
    url, obstacle = "", "" if online else NOT_ASKED

    def fetch(name: str, revision: str | None) -> Path | None:
        try:
            found = huggingface_hub.hf_hub_download(
                repository, name, revision=revision, local_files_only=bool(obstacle)
            )
            return Path(found)
        except EntryNotFoundError as error:  # not in the repository, or offline and not in the cache
            missing.append(error)
            return None

    try:
        url = huggingface_hub.hf_hub_url(repository, HUB_FILES[0], revision=revision)
        obstacle = obstacle or find_obstacle(lambda: huggingface_hub.get_session().head(url, timeout=TIMEOUT))
        path = next(filter(None, (fetch(name, revision) for name in HUB_FILES)), None)
        if path is None:
            cause = next((error for error in missing if isinstance(error, LocalEntryNotFoundError)), None)
            raise cause or FileNotFoundError(f"it has none of {', '.join(HUB_FILES)}")
        commit = path.parent.name  # the cache has a folder for each commit
        for name in (*DESCRIPTIONS, CARD):
            fetch(name, commit)
    except Exception as error:  # the client passes on any exception of its HTTP library
        pinned = f" at revision {revision}" if revision else ""
        cause = " ".join((obstacle or str(error)).split())
        raise FileNotFoundError(
            f"weights of {repository}{pinned}: download from the Hugging Face hub failed: {url} ({cause}). {remedy}"
            f"{f'. {MIRROR}' if obstacle else ''}"
        ) from error
    expected = path.resolve().name  # the cache names large files by the hub's SHA-256
    if re.fullmatch(r"[0-9a-f]{64}", expected) and digest_file(path) != expected:
        raise ValueError(f"{path} is damaged: its SHA-256 differs from the hub's; delete it and try again")
    origin = {"repository": repository, "revision": commit}
    license = read_license(path.with_name(CARD))
    return WeightsFile(path, origin | {"license": license} if license else origin)


def find_obstacle(request: Callable[[], object]) -> str:
    """Why a first `request` to a server gets no answer; empty if it does. Takes at most `TIMEOUT` seconds: a thread is
    waited for, since the time to look up a name can't be limited."""
    answers: queue.SimpleQueue[str] = queue.SimpleQueue()

    def ask() -> None:
        try:
            request()
        except Exception as error:  # of any HTTP library
            answers.put(str(error) or type(error).__name__)
        else:
            answers.put("")

    threading.Thread(target=ask, daemon=True).start()
    try:
        return answers.get(timeout=TIMEOUT)
    except queue.Empty:
        return f"no answer within {TIMEOUT} seconds"


def _open_url(url: str) -> None:
    """Raise an error if the server of `url` doesn't answer."""
    with suppress(urllib.error.HTTPError):  # an answer, which the download handles
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=TIMEOUT).close()


def download_from_url(url: str, remedy: str, online: bool = True) -> WeightsFile:
    """Download the file at `url`, unless it is in torch's cache; if not `online`, only search that.

    Its name ends with the first digits of its SHA-256, as torchvision's do. They are verified.

    Raises:
        FileNotFoundError: the download failed; `remedy` is part of the message.
        ValueError: the hash doesn't match.
    """
    name = url.rpartition("/")[2]
    path = Path(torch.hub.get_dir(), "checkpoints", name)
    digits = re.search(r"-([0-9a-f]{8,})\.\w+$", name)[1]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        if obstacle := find_obstacle(lambda: _open_url(url)) if online else NOT_ASKED:
            raise FileNotFoundError(f"{name}: download from {url} failed ({obstacle}). {remedy}")
        try:
            torch.hub.download_url_to_file(url, str(path), digits)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(f"{name}: download from {url} failed ({error}). {remedy}") from error
    if not digest_file(path).startswith(digits):
        raise ValueError(f"{path} is damaged: its SHA-256 doesn't start with {digits}; delete it and try again")
    return WeightsFile(path, {"url": url})
