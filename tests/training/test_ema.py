"""utils/training/ema.py against torch's own average."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from nets.factory import build_model
from utils.training.ema import WeightEMA


def test_the_average_is_that_of_torch():
    """Against its AveragedModel, with the warm-up of the decay written out, over a frozen and a thawed part and the
    statistics of a batch norm."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.BatchNorm1d(2))
    model[0].requires_grad_(False)
    average = WeightEMA(model, 0.6)
    average.set_frozen(["0.weight", "0.bias"])
    step = 0

    def mean_of(mean, new, _):
        share = 1 - min(0.6, (1 + step) / (10 + step))
        return mean + share * (new - mean) if mean.is_floating_point() else new

    peer = AveragedModel(model, avg_fn=mean_of, use_buffers=True)
    peer.n_averaged.fill_(1)  # else its first update copies
    for _ in range(20):
        model(torch.randn(5, 3) + step)
        with torch.no_grad():
            for parameter in model[1].parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update(step)
        peer.update_parameters(model)
        step += 1
    live = {name: value.clone() for name, value in model.state_dict().items()}
    with average.swapped_in():
        averaged = {name: value.clone() for name, value in model.state_dict().items()}
    for name, value in peer.module.state_dict().items():
        torch.testing.assert_close(averaged[name], value)
        assert torch.equal(model.state_dict()[name], live[name])
    for name in ("1.weight", "2.running_mean"):
        assert not torch.equal(averaged[name], live[name])


def test_what_is_shared_is_averaged_once():
    """A module in two places, as in some of timm's networks."""
    shared = nn.Linear(2, 2)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    average = WeightEMA(model, 0.9)
    nn.init.ones_(shared.weight)
    average.update(0)
    with average.swapped_in():
        assert not torch.equal(shared.weight, torch.ones(2, 2))
    assert torch.equal(shared.weight, torch.ones(2, 2))


def test_what_is_frozen_again_is_what_was_evaluated():
    """A part that was thawed has an average that lags behind its weights; frozen, both are one and don't change."""
    model = build_model("resnet18", 3, (32, 32))
    average = WeightEMA(model, 0.9)
    for step in range(3):
        with torch.no_grad():
            model(torch.rand(4, 3, 32, 32))
            for parameter in model.parameters():
                parameter.add_(1)
        average.update(step)
    averages = {name: tensor.clone() for name, tensor in average.averages.items()}
    model.freeze_backbone("all")
    average.set_frozen(model.frozen_state())
    assert average.thawed == ["head.weight", "head.bias"]
    average.update(3)
    with average.swapped_in():
        evaluated = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, tensor in model.state_dict().items():
        if name in averages and not name.startswith("head"):
            assert torch.equal(tensor, averages[name]), name
            assert torch.equal(evaluated[name], averages[name]), name
    assert not torch.equal(model.head.weight, evaluated["head.weight"])


def test_the_average_gives_way_even_when_evaluation_fails():
    model = nn.Linear(2, 2)
    average = WeightEMA(model, 0.9)
    nn.init.ones_(model.weight)
    with pytest.raises(KeyboardInterrupt), average.swapped_in():
        assert not torch.equal(model.weight, torch.ones(2, 2))
        raise KeyboardInterrupt
    assert torch.equal(model.weight, torch.ones(2, 2))
