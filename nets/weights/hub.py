"""Downloads of weights: from the Hugging Face hub into its cache, from an address into torch's; checked by a hash."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nets.weights.seal import digest_file

HUB_FILES = ("model.safetensors", "pytorch_model.bin")
"""What weights are called on the hub: the first of them that there is."""
DESCRIPTIONS = ("config.json", "preprocessor_config.json")


@dataclass(frozen=True)
class Found:
    """A file of weights, and where it was downloaded from: `repository` and `revision`, or `url`; nothing for a file
    that was put where it is."""

    path: Path
    origin: Mapping[str, str] = field(default_factory=dict)


def download_from_hub(repository: str, revision: str | None, remedy: str) -> Found:
    """Weights of a repository, and what describes them, in the hub's cache: downloaded unless they are there.

    Args:
        repository: `owner/name`.
        revision: a commit, tag or branch; None: the newest there is, which the origin then names by its commit.
        remedy: what to do where there is no network, for the error.

    Raises:
        FileNotFoundError: it can't be had.
        ValueError: the file isn't the one whose hash the hub told.
    """
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    missing = []

    def fetch(name: str, revision: str | None) -> Path | None:
        try:
            return Path(huggingface_hub.hf_hub_download(repository, name, revision=revision))
        except EntryNotFoundError as error:  # of the repository, or of the cache where there is no network
            missing.append(error)
            return None

    try:
        path = next(filter(None, (fetch(name, revision) for name in HUB_FILES)), None)
        if path is None:
            cause = next((error for error in missing if isinstance(error, LocalEntryNotFoundError)), None)
            raise cause or FileNotFoundError(f"it has none of {', '.join(HUB_FILES)}")
        commit = path.parent.name  # the cache has a folder for each
        for name in DESCRIPTIONS:
            fetch(name, commit)
    except Exception as error:  # the hub's client lets through whatever its HTTP library raises
        pinned = f" at revision {revision}" if revision else ""
        raise FileNotFoundError(
            f"weights of {repository}{pinned} could not be fetched from the Hugging Face hub ({error}). {remedy}"
        ) from error
    expected = path.resolve().name  # the cache names large files by the SHA-256 that the hub told
    if re.fullmatch(r"[0-9a-f]{64}", expected) and digest_file(path) != expected:
        raise ValueError(f"{path} is damaged: its SHA-256 isn't the one that the hub told; delete it and try again")
    return Found(path, {"repository": repository, "revision": commit})


def download_from_url(url: str, remedy: str) -> Found:
    """The file at `url` in torch's cache: downloaded unless it is there. Its name ends with the first digits of its
    SHA-256, as torchvision's do, which are checked.

    Raises:
        FileNotFoundError: it can't be had; `remedy` says what to do.
        ValueError: it isn't what its name says.
    """
    name = url.rpartition("/")[2]
    path = Path(torch.hub.get_dir(), "checkpoints", name)
    digits = re.search(r"-([0-9a-f]{8,})\.\w+$", name)[1]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), digits)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(f"{name} could not be fetched from {url} ({error}). {remedy}") from error
    if not digest_file(path).startswith(digits):
        raise ValueError(f"{path} is damaged: its SHA-256 doesn't begin with {digits}; delete it and try again")
    return Found(path, {"url": url})
