"""A network of another library behind the interface of `nets.network.FreezableNetwork`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from nets.network import FreezableNetwork, Part

RATES = ("drop_rate", "attn_drop_rate", "drop_path_rate")
OWN = "network."
"""What the names of a wrapped network's parameters begin with, but for the head's."""


class WrappedNetwork(FreezableNetwork):
    """A network of another library.

    Args:
        network: the library's, without its head.
        parts: what it consists of, see `FreezableNetwork.parts`.
        map_layer: the last of its modules whose output has a place for each part of the image.
        head: its head.
        head_name: what the library calls it.
        drop_rate: dropout before the head.
        ignored_rates: those of `RATES` that the network has no place for.
    """

    def __init__(
        self,
        network: nn.Module,
        parts: Sequence[Part],
        map_layer: nn.Module,
        head: nn.Linear,
        head_name: str,
        drop_rate: float = 0.0,
        ignored_rates: tuple[str, ...] = (),
    ) -> None:
        super().__init__(drop_rate)
        self.network = network
        self.head = head
        self.ignored_rates = ignored_rates
        self._parts = list(parts)
        self._map_layer = (map_layer,)  # no submodule: it stands in `network` already
        self._head_name = head_name

    def parts(self) -> list[Part]:
        """Stem, blocks, and what makes one vector of their map."""
        return self._parts

    @property
    def map_layer(self) -> nn.Module:
        """The last module whose output has a place for each part of the image."""
        return self._map_layer[0]

    def to_map(self, x: Tensor) -> Tensor:
        """What `map_layer` gives as a map (B, C, rows, columns)."""
        return x

    def rename_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The library's state dict under the names that it has here; one that has them already as it is."""
        if any(name.startswith(OWN) for name in state):
            return state
        head = self._head_name + "."
        return {
            "head." + name.removeprefix(head) if name.startswith(head) else OWN + name: tensor
            for name, tensor in state.items()
        }
