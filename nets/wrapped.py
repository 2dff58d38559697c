"""Adapter from networks of torchvision and timm to `nets.network.FreezableNetwork`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from nets.network import FreezableNetwork, Part

DROP_RATES = ("drop_rate", "attn_drop_rate", "drop_path_rate")
NETWORK_PREFIX = "network."
"""Prefix of a wrapped network's parameter names, except the head's."""


class WrappedNetwork(FreezableNetwork):
    """A network of torchvision or timm.

    Args:
        network: the library's network, without its head.
        parts: see `FreezableNetwork.parts`.
        feature_map_layer: see `FreezableNetwork.feature_map_layer`.
        head_name: name of the head in the library's state dict.
        drop_rate: dropout before the head.
        ignored_rates: which of `DROP_RATES` the network does not support.
    """

    def __init__(
        self,
        network: nn.Module,
        parts: Sequence[Part],
        feature_map_layer: nn.Module,
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
        self._feature_map_layer = (feature_map_layer,)  # in a tuple, so that it isn't registered twice
        self._head_name = head_name

    def parts(self) -> list[Part]:
        return self._parts

    @property
    def feature_map_layer(self) -> nn.Module:
        return self._feature_map_layer[0]

    def to_feature_map(self, x: Tensor) -> Tensor:
        return x

    def to_own_names(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename the tensors of the library's state dict; a state dict with our names is returned unchanged."""
        if any(name.startswith(NETWORK_PREFIX) for name in state):
            return state
        head = self._head_name + "."
        return {
            "head." + name.removeprefix(head) if name.startswith(head) else NETWORK_PREFIX + name: tensor
            for name, tensor in state.items()
        }
