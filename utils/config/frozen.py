"""How much of a backbone is frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol


class Freezable(Protocol):
    """See `nets.network.FreezableNetwork`."""

    def freeze_backbone(self, blocks: int | str) -> None: ...

    def unfreeze_backbone(self) -> None: ...


@dataclass(frozen=True)
class Frozen:
    """How much of a backbone is frozen.

    Attributes:
        written: the setting: number of first blocks, frozen along with the stem or embeddings; "all": everything but
            the head; "nothing".
    """

    written: int | Literal["all", "nothing"]

    @staticmethod
    def is_valid(written: Any) -> bool:
        """Whether `written` is a valid setting."""
        return written in ("all", "nothing") or (type(written) is int and written >= 0)

    def __bool__(self) -> bool:
        """Whether anything is frozen."""
        return self.written != "nothing"

    def __str__(self) -> str:
        text = {"all": "all but the head", "nothing": "nothing"}
        return text.get(self.written, f"stem or embeddings and first {self.written} blocks")

    def apply(self, model: Freezable) -> None:
        """Freeze this much of `model` and thaw the rest.

        Raises:
            ValueError: the network has fewer blocks.
        """
        if self:
            model.freeze_backbone(self.written)
        else:
            model.unfreeze_backbone()
