"""What all networks here have in common: parts in a row, the first few of which can be frozen, and a head."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn

Network = TypeVar("Network", bound="FreezableNetwork")


class Part(NamedTuple):
    """A step on the way from images to what the head takes.

    Attributes:
        forward: the step; the first one takes images (B, 3, height, width), the last one gives (B, C).
        owned: the modules and parameters that are frozen with it.
    """

    forward: Callable[[Tensor], Tensor]
    owned: tuple[nn.Module | nn.Parameter, ...]


class FreezableNetwork(nn.Module):
    """A network whose backbone can be frozen up to any of its parts, and thawed.

    Attributes:
        head: the linear layer from what the backbone makes of an image, (B, C), to logits (B, classes).
        arguments: what `nets.factory.build_model` needs to build this network again; a checkpoint carries it.
        ignored_rates: those of its `drop_rate`, `attn_drop_rate` and `drop_path_rate` that it has no place for.

    Args:
        head_drop_rate: dropout before the head.
    """

    head: nn.Linear
    arguments: dict[str, Any]
    ignored_rates: tuple[str, ...] = ()

    def __init__(self, head_drop_rate: float = 0.0) -> None:
        super().__init__()
        self.head_drop = nn.Dropout(head_drop_rate) if head_drop_rate else nn.Identity()
        self._num_frozen_parts = 0

    @abstractmethod
    def parts(self) -> list[Part]:
        """All but the head, in the order in which it can be frozen: embeddings or stem, the blocks, and what makes one
        vector of it."""

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, height, width) to logits (B, classes)."""
        return self.forward_thawed(self.forward_frozen(x))

    def forward_frozen(self, x: Tensor) -> Tensor:
        """Images to the output of what is frozen, with nothing frozen the images themselves.

        For a given image it is always the same.
        """
        for part in self._frozen_parts():
            x = part.forward(x)
        return x

    def forward_thawed(self, x: Tensor) -> Tensor:
        """The output of `forward_frozen` to logits (B, classes)."""
        for part in self.parts()[self._num_frozen_parts :]:
            x = part.forward(x)
        return self.head(self.head_drop(x))

    def forward_embedding(self, x: Tensor) -> Tensor:
        """Images (B, 3, height, width) to what the head takes, (B, C)."""
        for part in self.parts():
            x = part.forward(x)
        return x

    def resize(self, input_shape: Sequence[int]) -> None:
        """Take images of another height and width from now on."""
        self.arguments = self.arguments | {"input_shape": list(input_shape)}

    def resize_state(self, state: dict[str, Tensor], input_shape: Sequence[int]) -> dict[str, Tensor]:
        """A state dict of this network as it is after `resize`: itself, unless it has positions."""
        return state

    def rename_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state dict as others publish it of this network, under the names that it has here."""
        return state

    @property
    def transformer(self) -> bool:
        """Whether it is trained as transformers are: those that have layer norms are."""
        return any(isinstance(module, nn.LayerNorm) for module in self.modules())

    @property
    def convolutional(self) -> bool:
        """Whether most of its work is convolutions: a ViT has one, that of the patches."""
        return sum(isinstance(module, nn.Conv2d) for module in self.modules()) > 1

    @property
    @abstractmethod
    def map_layer(self) -> nn.Module:
        """The last module whose output has a place for each part of the image."""

    @abstractmethod
    def to_map(self, x: Tensor) -> Tensor:
        """What `map_layer` gives as a map (B, C, rows, columns)."""

    def layers(self) -> dict[str, int]:
        """The layer of each parameter by its name: the number of its part; the head's is that of the last part."""
        parts = self.parts()
        numbers = {id(parameter): number for number, part in enumerate(parts) for parameter in _parameters(part)}
        return {name: numbers.get(id(parameter), len(parts) - 1) for name, parameter in self.named_parameters()}

    def frozen_state(self) -> dict[str, Tensor]:
        """The parameters and buffers that are frozen, by name."""
        frozen = {id(tensor) for part in self._frozen_parts() for tensor in (*_parameters(part), *_buffers(part))}
        named = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        return {name: tensor for name, tensor in named.items() if id(tensor) in frozen}

    def freeze_backbone(self, blocks: int | str = 8) -> None:
        """Freeze the first part and the `blocks` after it; with "all", everything but the head.

        A frozen part has no gradient and stays in eval mode whatever `train()` is told, so its output for a given
        image never changes. What an earlier call froze is thawed first.

        Raises:
            ValueError: there are fewer blocks than that.
        """
        parts = self.parts()
        depth = len(parts) - 2
        if blocks != "all" and not (isinstance(blocks, int) and 0 <= blocks <= depth):
            raise ValueError(f'freeze_blocks={blocks!r}: this network has {depth} blocks; give 0 to {depth}, or "all"')
        self.unfreeze_backbone()
        self._num_frozen_parts = len(parts) if blocks == "all" else 1 + blocks
        for part in self._frozen_parts():
            for owned in part.owned:
                owned.requires_grad_(False)
        self.train(self.training)

    def unfreeze_backbone(self) -> None:
        """Give every parameter its gradient back."""
        self._num_frozen_parts = 0
        self.requires_grad_(True)
        self.train(self.training)

    def _frozen_parts(self) -> list[Part]:
        return self.parts()[: self._num_frozen_parts]

    def train(self: Network, mode: bool = True) -> Network:
        """Like `nn.Module.train`, but a frozen part stays in eval mode."""
        super().train(mode)
        for part in self._frozen_parts():
            for owned in part.owned:
                if isinstance(owned, nn.Module):
                    owned.eval()
        return self


def _parameters(part: Part) -> list[nn.Parameter]:
    return [p for owned in part.owned for p in ([owned] if isinstance(owned, nn.Parameter) else owned.parameters())]


def _buffers(part: Part) -> list[Tensor]:
    return [buffer for owned in part.owned if isinstance(owned, nn.Module) for buffer in owned.buffers()]
