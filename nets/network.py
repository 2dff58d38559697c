"""The interface of all networks: a sequence of parts, freezable from the front, and a linear head."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn

Network = TypeVar("Network", bound="FreezableNetwork")


class Part(NamedTuple):
    """One step of the forward pass.

    Attributes:
        forward: the first part takes images (B, 3, height, width), the last returns (B, C).
        owned: the modules and parameters that are frozen with this part.
    """

    forward: Callable[[Tensor], Tensor]
    owned: tuple[nn.Module | nn.Parameter, ...]


class FreezableNetwork(nn.Module):
    """A network whose first parts can be frozen.

    Attributes:
        head: linear layer from features (B, C) to logits (B, classes).
        arguments: arguments of `nets.factory.build_model` that rebuild this network; stored in checkpoints.
        ignored_rates: which of `drop_rate`, `attn_drop_rate` and `drop_path_rate` the network does not support.

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
        """Return all parts but the head, in forward order: embedding or stem, blocks, pooling."""

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 3, height, width) to logits (B, classes)."""
        return self.forward_thawed(self.forward_frozen(x))

    def forward_frozen(self, x: Tensor) -> Tensor:
        """Map images to the output of the frozen parts; if none is frozen, return the images.

        The output is deterministic for each image, so it can be cached.
        """
        for part in self._frozen_parts():
            x = part.forward(x)
        return x

    def forward_thawed(self, x: Tensor) -> Tensor:
        """Map the output of `forward_frozen` to logits (B, classes)."""
        for part in self.parts()[self._num_frozen_parts :]:
            x = part.forward(x)
        return self.head(self.head_drop(x))

    def forward_embedding(self, x: Tensor) -> Tensor:
        """Map images (B, 3, height, width) to the input of the head, (B, C)."""
        for part in self.parts():
            x = part.forward(x)
        return x

    def resize(self, input_shape: Sequence[int]) -> None:
        """Change the height and width of the images that the network takes."""
        self.arguments = self.arguments | {"input_shape": list(input_shape)}

    def resize_state(self, state: dict[str, Tensor], input_shape: Sequence[int]) -> dict[str, Tensor]:
        """Return a state dict that fits the network after `resize`; only position embeddings change."""
        return state

    def to_own_names(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename the tensors of a published state dict to the names used here."""
        return state

    @property
    def transformer(self) -> bool:
        """Whether the network has layer norms, and is therefore trained like a transformer."""
        return any(isinstance(module, nn.LayerNorm) for module in self.modules())

    @property
    def convolutional(self) -> bool:
        """Whether convolutions dominate. A ViT has a single one, the patch embedding."""
        return sum(isinstance(module, nn.Conv2d) for module in self.modules()) > 1

    @property
    @abstractmethod
    def feature_map_layer(self) -> nn.Module:
        """The last module whose output has spatial positions; used for class activation maps."""

    @abstractmethod
    def to_feature_map(self, x: Tensor) -> Tensor:
        """Reshape the output of `feature_map_layer` to a feature map (B, C, rows, columns)."""

    def layers(self) -> dict[str, int]:
        """Return the part index of each parameter by name; the head has the index of the last part."""
        parts = self.parts()
        indices = {id(parameter): i for i, part in enumerate(parts) for parameter in _parameters(part)}
        return {name: indices.get(id(parameter), len(parts) - 1) for name, parameter in self.named_parameters()}

    def undecayed(self) -> set[str]:
        """Return the names of parameters that its authors train without weight decay, besides biases and norms."""
        return set()

    def frozen_state(self) -> dict[str, Tensor]:
        """Return the frozen parameters and buffers by name."""
        frozen = {id(tensor) for part in self._frozen_parts() for tensor in (*_parameters(part), *_buffers(part))}
        named = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        return {name: tensor for name, tensor in named.items() if id(tensor) in frozen}

    def freeze_backbone(self, blocks: int | str = 8) -> None:
        """Freeze the first part and the next `blocks` parts, or with "all" everything but the head.

        A frozen part has no gradient and stays in eval mode even after `train()`, so its output for an image never
        changes. Parts frozen by an earlier call are unfrozen first.

        Raises:
            ValueError: `blocks` is invalid, or the network has fewer.
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
        """Enable gradients for all parameters."""
        self._num_frozen_parts = 0
        self.requires_grad_(True)
        self.train(self.training)

    def _frozen_parts(self) -> list[Part]:
        return self.parts()[: self._num_frozen_parts]

    def train(self: Network, mode: bool = True) -> Network:
        """Like `nn.Module.train`, but frozen parts stay in eval mode."""
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
