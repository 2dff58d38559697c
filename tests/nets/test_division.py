"""nets/division.py on small networks; tests/nets/test_backbones.py has those of timm."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nets.division import divide


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, shift: Tensor | float = 0.0) -> Tensor:
        return x + self.linear(x + shift)


class Network(nn.Module):
    """Three blocks, which get a learned shift of the size of the batch and the positions of the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 2, stride=2)
        self.shift = nn.Parameter(torch.randn(1, 1, 4))
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def embed(self, x: Tensor) -> Tensor:
        return self.stem(x).flatten(2).transpose(1, 2)  # (B, N, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        count, tokens, _ = x.shape
        shift = self.shift.expand(count, tokens, -1) + torch.arange(tokens, device=x.device)[:, None]
        for block in self.blocks:
            x = block(x, shift)
        return x.mean(dim=1)


class Skipping(Network):
    """The input of the first block is added after the second one, too."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.blocks[2](self.blocks[1](self.blocks[0](x)) + x)


class Deciding(Network):
    """What is computed depends on the pixels."""

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x) if x.mean() > 0 else self.blocks[0](self.embed(x))


class Dropping(Network):
    """In training, the forward pass itself does something else."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = F.dropout(block(x), 0.5, self.training)
        return x


def divided(kind: type[Network]) -> tuple[Network, list]:
    torch.manual_seed(0)
    network = kind().eval()
    return network, divide(network, copy.deepcopy(network).to("meta"), (8, 6))


@pytest.mark.parametrize(("kind", "count"), [(Network, 5), (Skipping, 4)])
def test_segments_in_a_row_are_the_network(kind, count):
    network, segments = divided(kind)
    assert len(segments) == count
    images = x = torch.randn(5, 3, 8, 6)
    for segment in segments:
        x = segment.forward(x)
        assert x.shape[0] == 5
    assert torch.equal(x, network(images))


def test_parameters_belong_to_the_first_segment_that_uses_them():
    _, segments = divided(Network)
    assert [segment.owned for segment in segments] == [
        ("shift", "stem"),
        ("blocks.0",),
        ("blocks.1",),
        ("blocks.2",),
        (),
    ]


def test_segments_compute_with_the_parameters_of_the_moment():
    network, segments = divided(Network)
    x = torch.randn(2, 12, 4)
    before = segments[1].forward(x)
    network.shift = nn.Parameter(network.shift + 1)
    assert not torch.allclose(segments[1].forward(x), before)
    segments[1].forward(x).sum().backward()
    assert network.shift.grad is not None


@pytest.mark.parametrize("kind", [Deciding, Dropping])
def test_networks_that_cannot_be_divided(kind):
    assert divided(kind)[1] == []
