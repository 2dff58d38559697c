"""Tests of utils/training/sharding.py with one process; tests/ranks/ has those with several."""

import pytest
import torch
from torch import nn

from tests.conftest import settings
from utils.training.parts import Parts
from utils.training.sharding import (
    TreeScatter,
    check_sharding,
    gather_shards,
    must_shard,
    norm_by_rows,
    scale_gradients,
)

CPU = torch.device("cpu")


def with_gradients() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.zeros(shape)) for shape in ((), (5,), (3, 4), (2, 3, 4, 4))]
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator)
    return weights


def test_a_rank_with_fewer_parts_keeps_pace():
    """Its last pass isn't a part."""
    scatter = TreeScatter(Parts(count=1, first=0, end=1, rounds=2))
    for _ in range(2):  # steps
        output = torch.full((3,), torch.nan)
        scatter(output, torch.tensor([1.0, 2.0, 3.0]))
        assert torch.equal(output, torch.zeros(3))
        scatter(output, torch.full((3,), torch.nan))
        assert torch.equal(output, torch.tensor([1.0, 2.0, 3.0]))


def test_norm_and_scaling_are_those_of_torch():
    weights, others = with_gradients(), with_gradients()
    norm = norm_by_rows([*weights, nn.Parameter(torch.zeros(2))])  # one without a gradient
    scale_gradients(weights, norm, 1.0)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(others, 1.0))
    for weight, other in zip(weights, others, strict=True):
        torch.testing.assert_close(weight.grad, other.grad)


def test_small_gradients_are_not_scaled():
    weights, others = with_gradients(), with_gradients()
    scale_gradients(weights, norm_by_rows(weights), 1000.0)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(weights, others, strict=True))


def test_gradients_are_zero_until_the_last_part():
    scatter = TreeScatter(Parts.of_rank(3, 0, 1))
    for _ in range(2):  # steps
        outputs = []
        for part in range(3):
            output = scatter.allocate((4,), dtype=torch.float32, device=CPU)
            scatter(output_tensor=output, input_tensor=torch.full((4,), 10.0**part), group=None, op=None)
            outputs.append(output.tolist())
        assert outputs == [[0.0] * 4, [0.0] * 4, [111.0] * 4]


def test_what_cannot_be_divided_is_refused():
    with pytest.raises(ValueError, match=r"optimizer_type='muon': .* set adamw, or shard=no"):
        check_sharding(settings(optimizer_type="muon"), "fp32")
    with pytest.raises(ValueError, match=r"precision='fp16': .* set bf16 or fp32, or shard=no"):
        check_sharding(settings(), "fp16")
    check_sharding(settings(), "bf16")


def test_one_process_divides_nothing():
    assert not must_shard(settings(shard="yes"), 10**12, CPU)
    content = {"a": [torch.ones(2)], "b": 3}
    assert gather_shards(content)["a"][0] is content["a"][0]
