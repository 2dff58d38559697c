"""utils/training/optimizer.py: groups, decay, limits, and the schedule at chosen epochs."""

import math
from itertools import pairwise

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from nets.factory import build_model
from tests.conftest import settings
from utils.training.optimizer import (
    UNDECAYED,
    build_optimizer,
    learning_rate_at,
    parameter_groups,
    restore_state,
    scale_learning_rate,
    set_learning_rate,
)


def tiny_vit() -> nn.Module:
    torch.manual_seed(0)
    return build_model("vit_xs_4", 3, (8, 8))


def names_in(model: nn.Module, group: dict) -> set[str]:
    members = {id(p) for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in members}


@pytest.mark.parametrize("frozen", [None, 4, "all"])
def test_each_trainable_parameter_is_in_one_group(frozen):
    model = tiny_vit()
    if frozen is not None:
        model.freeze_backbone(frozen)
    grouped = [id(p) for group in parameter_groups(model, 0.1) for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters() if p.requires_grad}


def test_undecayed_parameters():
    model = tiny_vit()
    undecayed, decayed = sorted(parameter_groups(model, 0.1), key=lambda group: group["weight_decay"])
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.1, 0.0)
    kept = {
        n for n, _ in model.named_parameters() if n.endswith("bias") or "norm" in n or n in ("cls_token", "pos_embed")
    }
    assert names_in(model, undecayed) == kept


def test_undecayed_parameters_of_other_networks():
    """timm's networks list them; for registers and torchvision's Swin as in the code of the papers."""
    registers = build_model("vit_xs_4", 3, (8, 8), num_registers=2)
    undecayed = min(parameter_groups(registers, 0.1), key=lambda group: group["weight_decay"])
    assert "reg_token" in names_in(registers, undecayed)
    for name in ("swin_transformer_tiny", "timm/swin_tiny_patch4_window7_224"):
        swin = build_model(name, 3, (224, 224))
        undecayed = min(parameter_groups(swin, 0.1), key=lambda group: group["weight_decay"])
        tables = {n for n, _ in swin.named_parameters() if n.endswith("relative_position_bias_table")}
        assert tables and tables <= names_in(swin, undecayed)
        if name.startswith("timm/"):
            assert {f"network.{n}" for n in swin.network.no_weight_decay()} <= names_in(swin, undecayed)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("test_vit", (64, 64)),
        ("swinv2_tiny_window8_256", (64, 64)),
        ("vit_small_patch16_rope_mixed_224", (64, 64)),
        ("tiny_vit_5m_224", (64, 64)),
        ("convnext_atto", (64, 64)),
    ],
)
def test_weight_decay_of_timms_networks_is_as_in_timm(name, shape):
    model = build_model(f"timm/{name}", 3, shape)
    groups = parameter_groups(model, 0.1)
    found = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    listed = getattr(model.network, "no_weight_decay", set)()
    expected = param_groups_weight_decay(model.network, 0.1, no_weight_decay_list=listed)
    assert all(found[id(p)] == group["weight_decay"] for group in expected for p in group["params"])


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw", "muon"])
def test_weight_decay_is_applied(kind):
    def model_after_step(weight_decay):
        model = tiny_vit()
        config = settings(optimizer_type=kind, weight_decay=weight_decay, momentum=0.9)
        optimizer = build_optimizer(model, config, 0.1)
        torch.manual_seed(1)
        model.eval()(torch.randn(2, 3, 8, 8)).square().sum().backward()
        optimizer.step()
        return model

    plain, decayed = model_after_step(0.0), model_after_step(0.5)
    assert not torch.allclose(plain.head.weight, decayed.head.weight)
    assert torch.equal(plain.pos_embed, decayed.pos_embed)
    assert torch.equal(plain.norm.weight, decayed.norm.weight)


def test_adamw_decay_matches_the_paper():
    """Decoupled decay: w <- w - lr * wd * w; Adam's step is 0 without a gradient."""
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    optimizer = build_optimizer(model, settings(optimizer_type="adamw", weight_decay=0.5), 0.1)
    model(torch.zeros(1, 2)).sum().mul(0).backward()
    optimizer.step()
    torch.testing.assert_close(model.weight, before * (1 - 0.1 * 0.5))


def take_steps(model: nn.Module, optimizers: list[torch.optim.Optimizer], first: int, last: int) -> None:
    model.eval()
    for seed in range(first, last):
        torch.manual_seed(seed)
        model(torch.randn(2, 3, 8, 8)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def muon(model: nn.Module) -> torch.optim.Optimizer:
    return build_optimizer(model, settings(optimizer_type="muon", momentum=0.95, weight_decay=0.1), 1e-2)


def test_muon_matches_torch_muon_and_adamw():
    own, other = tiny_vit(), tiny_vit()
    named = dict(other.named_parameters())
    matrices = {n for n in named if n.endswith(("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight"))}
    matrices -= {"patch_embed.proj.weight"}
    plain = {n for n, p in named.items() if p.ndim == 1 or n in UNDECAYED}
    rest = [
        {"params": [named[n] for n in named.keys() - matrices - plain], "weight_decay": 0.1},
        {"params": [named[n] for n in plain], "weight_decay": 0.0},
    ]
    matrix_parameters = [named[n] for n in sorted(matrices)]
    peers = [
        torch.optim.Muon(matrix_parameters, 1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, 1e-2, betas=(0.95, 0.999), fused=True),
    ]
    take_steps(own, [muon(own)], 0, 4)
    take_steps(other, peers, 0, 4)
    for name, parameter in own.named_parameters():
        assert torch.equal(parameter, named[name]), name


def test_muon_state_is_restored():
    whole, model = tiny_vit(), tiny_vit()
    take_steps(whole, [muon(whole)], 0, 4)
    first = muon(model)
    take_steps(model, [first], 0, 2)
    second = muon(model)
    second.load_state_dict(first.state_dict())
    take_steps(model, [second], 2, 4)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dict(whole.named_parameters())[name]), name


def stepped(kind: str) -> tuple[torch.optim.Optimizer, dict]:
    """A new optimizer, and the state of another one for the same network after a step."""
    model, config = tiny_vit(), settings(optimizer_type=kind)
    first = build_optimizer(model, config, 1e-3)
    take_steps(model, [first], 0, 1)
    return build_optimizer(model, config, 1e-3), first.state_dict()["state"]


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw", "muon"])
def test_the_state_of_each_optimizer_is_restored_if_it_is_right(kind):
    optimizer, state = stepped(kind)
    restore_state(optimizer, state)
    restored = optimizer.state_dict()["state"]
    assert all(torch.equal(restored[i][name], value) for i in state for name, value in state[i].items())
    number = len(state) - 1
    for name, value in state[number].items():
        shape = (1,) if name == "step" else (2, *value.shape)
        for wrong in (3, "x", None, [], value.to(torch.complex64), value.int(), value.expand(shape)):
            with pytest.raises(ValueError, match=f"{name} of parameter {number} must be floats of the shape"):
                restore_state(optimizer, state | {number: state[number] | {name: wrong}})
        missing = {other: tensor for other, tensor in state[number].items() if other != name}
        for wrong in (missing, state[number] | {"more": value}, 3, None):
            with pytest.raises(ValueError, match=f"of parameter {number} it must have .*{name}"):
                restore_state(optimizer, state | {number: wrong})
    for wrong in (number + 1, -1, "0", True, None):
        with pytest.raises(ValueError, match=f"there is no parameter {wrong!r}"):
            restore_state(optimizer, {wrong: state[0]})
    with pytest.raises(ValueError, match="it is missing"):
        restore_state(optimizer, None)


def test_muon_uses_the_scheduled_learning_rate():
    model = tiny_vit()
    before = model.state_dict()["blocks.0.attn.proj.weight"].clone()
    optimizer = muon(model)
    set_learning_rate(optimizer, 0.0)
    take_steps(model, [optimizer], 0, 1)
    assert torch.equal(model.blocks[0].attn.proj.weight, before)


def test_momentum_and_nesterov_reach_the_optimizer():
    sgd = build_optimizer(nn.Linear(2, 2), settings(optimizer_type="sgd", momentum=0.7), 0.1)
    assert (sgd.defaults["momentum"], sgd.defaults["nesterov"]) == (0.7, True)
    adam = build_optimizer(nn.Linear(2, 2), settings(optimizer_type="adam", momentum=0.7), 0.1)
    assert adam.defaults["betas"] == (0.7, 0.999)
    assert build_optimizer(nn.Linear(2, 2), settings(optimizer_type="sgd", momentum=0), 0.1).defaults["momentum"] == 0


@pytest.mark.parametrize(
    ("kind", "init_lr", "min_lr", "batch", "transformer", "expected"),
    [
        ("adamw", 4e-3, 4e-5, 32, True, (5e-4, 5e-6)),
        ("adamw", 1e-3, 1e-5, 32, False, (5e-4, 5e-6)),
        ("muon", 4e-3, 4e-5, 128, True, (2e-3, 2e-5)),
        ("adam", 1e-2, 1e-4, 256, True, (1e-3, 1e-5)),  # at the upper limit
        ("adam", 1e-6, 1e-8, 256, True, (1e-5, 1e-7)),  # at the lower limit of transformers
        ("adam", 1e-6, 1e-8, 64, False, (1e-4, 1e-6)),  # at the lower limit of others
        ("sgd", 1e-2, 1e-4, 64, False, (1e-2, 1e-4)),
        ("sgd", 1.0, 1e-2, 128, False, (1e-1, 1e-3)),
        ("sgd", 1e-5, 1e-7, 256, True, (5e-4, 5e-6)),
        ("adamw", 1e-3, 1e-3, 256, True, (1e-3, 1e-5)),  # min_lr is limited too
    ],
)
def test_scaling_and_limits(kind, init_lr, min_lr, batch, transformer, expected):
    config = settings(optimizer_type=kind, init_lr=init_lr, min_lr=min_lr)
    scaled = [scale_learning_rate(config, field, batch, transformer) for field in ("init_lr", "min_lr")]
    assert [rate for rate, _ in scaled] == pytest.approx(expected)
    scale = batch / (256 if transformer else 64)
    within = [math.isclose(asked * scale, rate) for asked, rate in zip((init_lr, min_lr), expected, strict=True)]
    assert [note == "" for _, note in scaled] == within


def test_cosine_at_chosen_epochs():
    def rate(epoch):
        return learning_rate_at(epoch, 40, 1.0, 0.01, "cos")

    assert rate(0) == pytest.approx(0.1)
    assert rate(1) == pytest.approx(0.55)  # half of a warm-up of 5 % of 40 epochs
    assert rate(2) == pytest.approx(1.0)
    assert rate(20) == pytest.approx(0.505)  # half-way between 2 and 38
    assert rate(11) == pytest.approx(0.01 + 0.99 * (1 + math.cos(math.pi / 4)) / 2)
    assert rate(38) == pytest.approx(0.01)
    assert rate(39.99) == pytest.approx(0.01)


def test_cosine_limits_of_warm_up_and_flat_part():
    assert learning_rate_at(2.999, 1000, 1.0, 0.01, "cos") < 1.0
    assert learning_rate_at(3, 1000, 1.0, 0.01, "cos") == pytest.approx(1.0)
    assert learning_rate_at(984, 1000, 1.0, 0.01, "cos") > 0.01
    assert learning_rate_at(985, 1000, 1.0, 0.01, "cos") == pytest.approx(0.01)


@pytest.mark.parametrize("epochs", [1, 2, 7, 100])
def test_cosine_rises_then_falls_within_bounds(epochs):
    rates = [learning_rate_at(epochs * i / 500, epochs, 1.0, 0.01, "cos") for i in range(500)]
    peak = rates.index(max(rates))
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert min(rates) >= 0.01
    assert max(rates) == pytest.approx(1.0, abs=0.01)


def test_step_schedule_has_ten_levels():
    rates = [learning_rate_at(i / 10, 100, 1.0, 0.01, "step") for i in range(1000)]
    levels = sorted(set(rates), reverse=True)
    assert len(levels) == 10
    assert (levels[0], levels[-1]) == (1.0, pytest.approx(0.01))
    assert all(a / b == pytest.approx(100 ** (1 / 9)) for a, b in pairwise(levels))
    assert [rates.count(level) for level in levels] == [100] * 10


def test_learning_rate_is_set_in_every_group():
    optimizer = build_optimizer(tiny_vit(), settings(), 0.1)
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_layer_decay_matches_timm():
    own = tiny_vit()
    peer = timm.create_model("vit_tiny_patch16_224", img_size=16, depth=len(own.blocks))
    expected = {
        id(parameter): (group["lr_scale"], group["weight_decay"])
        for group in param_groups_layer_decay(peer, 0.05, no_weight_decay_list=UNDECAYED, layer_decay=0.7)
        for parameter in group["params"]
    }
    optimizer = build_optimizer(own, settings(weight_decay=0.05, layer_decay=0.7), 0.1)
    set_learning_rate(optimizer, 0.01)
    options = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    others = dict(peer.named_parameters())
    for name, parameter in own.named_parameters():
        lr_scale, weight_decay = expected[id(others[name])]
        if name.startswith("norm."):  # in timm with the last block; here, as in BEiT, with the head
            lr_scale = 1.0
        assert options[id(parameter)] == pytest.approx((0.01 * lr_scale, weight_decay)), name
