"""Tests of utils/training/parts.py: sums of parts don't depend on who has computed which."""

import copy

import pytest
import torch

from nets.factory import build_model
from tests.conftest import settings
from utils.data.preprocessing import Preprocessing
from utils.modeling.pixel_network import PixelNetwork
from utils.training.optimizer import build_optimizer
from utils.training.parts import Parts, TreeSum, nodes_of
from utils.training.trainer import Trainer

CPU = torch.device("cpu")


def add_as_tree(vectors: list[torch.Tensor]) -> torch.Tensor:
    """The definition: the left part is the largest power of two below the number of vectors."""
    if len(vectors) == 1:
        return vectors[0].clone()
    left = 1 << (len(vectors) - 1).bit_length() - 1
    return add_as_tree(vectors[:left]) + add_as_tree(vectors[left:])


@pytest.mark.parametrize("count", range(1, 18))
def test_the_sum_has_the_same_bits_for_any_number_of_ranks(count):
    vectors = list(torch.randn(count, 64, generator=torch.Generator().manual_seed(count)))
    wanted = add_as_tree(vectors)
    for world_size in range(1, count + 1):
        total = TreeSum(count)
        for rank in range(world_size):
            parts = Parts.of_rank(count, rank, world_size)
            own = TreeSum(count)
            for part in range(parts.first, parts.end):
                own.add(vectors[part].clone(), part)
            assert [(level, index) for level, index, _ in own.nodes] == nodes_of(parts)
            for level, index, value in own.nodes:
                total.add(value, index, level)
        ((*_, found),) = total.nodes
        assert torch.equal(found, wanted)


def test_the_order_matters_so_the_test_above_can_fail():
    vectors = list(torch.randn(8, 64, generator=torch.Generator().manual_seed(0)))
    assert not torch.equal(sum(vectors), add_as_tree(vectors))


@pytest.mark.parametrize(("count", "batch_size"), [(1, 7), (4, 32), (5, 7), (8, 9), (3, 3)])
def test_ranks_divide_a_batch(count, batch_size):
    rows = list(range(batch_size))
    for world_size in range(1, count + 1):
        shares = [Parts.of_rank(count, rank, world_size) for rank in range(world_size)]
        assert [row for share in shares for row in rows[share.rows(batch_size)]] == rows
        sizes = [size for share in shares for size in share.sizes(batch_size)]
        assert len(sizes) == count
        assert sum(sizes) == batch_size
        assert max(sizes) - min(sizes) <= 1


def test_more_ranks_than_parts_are_refused():
    with pytest.raises(ValueError, match="parts=2: 3 processes need at least as many parts; set parts=3"):
        Parts.of_rank(2, 0, 3)


def step(backbone: str, count: int, shape: tuple[int, int]) -> tuple[PixelNetwork, float, int]:
    """A network after a step of SGD on a batch in `count` parts, with its loss and correct predictions."""
    torch.manual_seed(1)
    model = build_model(backbone, 3, shape, drop_rate=0.0, attn_drop_rate=0.0, drop_path_rate=0.0)
    config = settings(optimizer_type="sgd", input_shape=shape, momentum=0.0, weight_decay=0.0)
    network = PixelNetwork(model, Preprocessing.from_config(config), CPU)
    trainer = Trainer(network, CPU, "fp32", seed=1, parts=Parts.of_rank(count, 0, 1))
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randint(0, 256, (8, 3, *shape), dtype=torch.uint8, generator=generator)
    loss, hits = trainer.train_step(pixels, torch.arange(8) % 3, build_optimizer(model, config, 0.1))
    return network, float(loss), int(hits)


def test_parts_add_up_to_the_gradient_of_the_batch():
    """Of a network without batch norm, dropout and mixing."""
    whole, loss, hits = step("vit_xs_4", 1, (8, 8))
    for count in (2, 3, 8):
        parted, parted_loss, parted_hits = step("vit_xs_4", count, (8, 8))
        assert parted_loss == pytest.approx(loss, rel=1e-5)
        assert parted_hits == hits
        for a, b in zip(parted.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_batch_norm_statistics_are_the_mean_of_the_parts():
    """Each part starts with those of before the step, and the step counts once."""
    network, *_ = step("resnet18", 2, (32, 32))
    alone = []
    for part in range(2):
        torch.manual_seed(1)
        model = build_model("resnet18", 3, (32, 32))
        other = PixelNetwork(model, Preprocessing.from_config(settings(input_shape=(32, 32))), CPU).train()
        pixels = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
        other(pixels.split(4)[part])
        alone.append(copy.deepcopy(other.state_dict()))
    for name, value in network.state_dict().items():
        if "running" in name:
            torch.testing.assert_close(value, (alone[0][name] + alone[1][name]) / 2)
        if "num_batches" in name:
            assert value == 1


def test_parts_draw_different_numbers():
    """Two parts with the same image see it through different dropout."""
    model = build_model("vit_xs_4", 3, (8, 8), drop_rate=0.5)
    config = settings(input_shape=(8, 8))
    network = PixelNetwork(model, Preprocessing.from_config(config), CPU).train()
    outputs = []
    network.register_forward_hook(lambda module, inputs, logits: outputs.append(logits.detach()))
    trainer = Trainer(network, CPU, "fp32", seed=1, parts=Parts.of_rank(2, 0, 1))
    trainer.train_step(
        torch.full((2, 3, 8, 8), 99, dtype=torch.uint8), torch.ones(2).long(), build_optimizer(model, config, 0.1)
    )
    first, second = outputs
    assert not torch.equal(first, second)
