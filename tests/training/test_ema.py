"""utils/training/ema.py against torch's AveragedModel."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from nets.factory import build_model
from utils.training.ema import WeightEMA


def test_ema_matches_torch():
    """With warm-up of the decay, a frozen and a thawed layer, and batch norm statistics."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.BatchNorm1d(2))
    model[0].requires_grad_(False)
    ema = WeightEMA(model, 0.6)
    ema.set_frozen(["0.weight", "0.bias"])
    step = 0

    def warmed_up(mean, new, _):
        share = 1 - min(0.6, (1 + step) / (10 + step))
        return mean + share * (new - mean) if mean.is_floating_point() else new

    peer = AveragedModel(model, avg_fn=warmed_up, use_buffers=True)
    peer.n_averaged.fill_(1)  # else its first update copies
    for _ in range(20):
        model(torch.randn(5, 3) + step)
        with torch.no_grad():
            for parameter in model[1].parameters():
                parameter.add_(torch.randn_like(parameter))
        ema.update(step)
        peer.update_parameters(model)
        step += 1
    live = {name: value.clone() for name, value in model.state_dict().items()}
    with ema.swapped_in():
        averaged = {name: value.clone() for name, value in model.state_dict().items()}
    for name, value in peer.module.state_dict().items():
        torch.testing.assert_close(averaged[name], value)
        assert torch.equal(model.state_dict()[name], live[name])
    for name in ("1.weight", "2.running_mean"):
        assert not torch.equal(averaged[name], live[name])


def test_shared_module_is_averaged_once():
    """As in some of timm's networks."""
    shared = nn.Linear(2, 2)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    ema = WeightEMA(model, 0.9)
    nn.init.ones_(shared.weight)
    ema.update(0)
    with ema.swapped_in():
        assert not torch.equal(shared.weight, torch.ones(2, 2))
    assert torch.equal(shared.weight, torch.ones(2, 2))


def test_refrozen_weights_take_their_ema_values():
    """The EMA of a thawed layer lags behind its weights; once it is frozen, both are equal and constant."""
    model = build_model("resnet18", 3, (32, 32))
    ema = WeightEMA(model, 0.9)
    for step in range(3):
        with torch.no_grad():
            model(torch.rand(4, 3, 32, 32))
            for parameter in model.parameters():
                parameter.add_(1)
        ema.update(step)
    averages = {name: tensor.clone() for name, tensor in ema.averages.items()}
    model.freeze_backbone("all")
    ema.set_frozen(model.frozen_state())
    assert ema.thawed == ["head.weight", "head.bias"]
    ema.update(3)
    with ema.swapped_in():
        evaluated = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, tensor in model.state_dict().items():
        if name in averages and not name.startswith("head"):
            assert torch.equal(tensor, averages[name]), name
            assert torch.equal(evaluated[name], averages[name]), name
    assert not torch.equal(model.head.weight, evaluated["head.weight"])


def test_weights_are_swapped_back_after_an_error():
    model = nn.Linear(2, 2)
    ema = WeightEMA(model, 0.9)
    nn.init.ones_(model.weight)
    with pytest.raises(KeyboardInterrupt), ema.swapped_in():
        assert not torch.equal(model.weight, torch.ones(2, 2))
        raise KeyboardInterrupt
    assert torch.equal(model.weight, torch.ones(2, 2))
