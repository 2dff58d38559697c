"""nets/vit.py: against timm's network and a worked example; freezing, dropout, initialization."""

from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from nets.factory import build_model
from nets.vit import ACTIVATIONS, SIZES, DropPath, VisionTransformer, attention, vit
from nets.weights.load import Weights, load_weights


def small_vit(**changes) -> VisionTransformer:
    options = {
        "input_shape": (16, 16),
        "patch_size": 4,
        "num_classes": 5,
        "num_features": 24,
        "depth": 3,
        "num_heads": 3,
    }
    torch.manual_seed(0)
    return VisionTransformer(**options | changes)


def images(*shape: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, *shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", [(224, 224), (160, 224)])
def test_equals_timm(shape):
    torch.manual_seed(0)
    peer = timm.create_model("vit_base_patch16_224", img_size=shape).eval()
    own = vit(input_shape=list(shape), activation="gelu").eval()
    own.load_state_dict(peer.state_dict(), strict=True)
    with torch.inference_mode():
        x = images(*shape)
        torch.testing.assert_close(own(x), peer(x), atol=1e-4, rtol=0)
        torch.testing.assert_close(own.forward_features(x), peer.forward_features(x), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "peer"),
    [
        ("vit_t_16", "vit_tiny_patch16_224"),
        ("vit_s_16", "vit_small_patch16_224"),
        ("vit_b_16", "vit_base_patch16_224"),
        ("vit_l_16", "vit_large_patch16_224"),
        ("vit_b_32", "vit_base_patch32_224"),
        ("vit_l_32", "vit_large_patch32_224"),
        ("vit_h_14", "vit_huge_patch14_224"),
    ],
)
def test_sizes_equal_timms(name, peer):
    with torch.device("meta"):
        own = {key: value.shape for key, value in vit(name=name).state_dict().items()}
        other = {key: value.shape for key, value in timm.create_model(peer, num_classes=1000).state_dict().items()}
    assert own == other


def test_parameter_count_and_names():
    with torch.device("meta"):
        model = vit(input_shape=[224, 224], pretrained=False, num_classes=1000)
    assert sum(p.numel() for p in model.parameters()) == 86_567_656
    assert not list(model.buffers())
    layers = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
    modules = ["patch_embed.proj", "norm", "head", *(f"blocks.{i}.{layer}" for i in range(12) for layer in layers)]
    expected = {"cls_token", "pos_embed"} | {f"{m}.{kind}" for m in modules for kind in ("weight", "bias")}
    assert {name for name, _ in model.named_parameters()} == expected


def test_attention_worked_example():
    q = torch.tensor([[1.0, 0, 2], [2, 2, 2], [2, 1, 3]])
    k = torch.tensor([[0.0, 1, 1], [4, 4, 0], [2, 3, 1]])
    v = torch.tensor([[1.0, 2, 3], [2, 8, 0], [2, 6, 3]])
    assert (q @ k.T)[0].tolist() == [2, 4, 4]
    result = attention(q, k, v, scale=1.0)
    torch.testing.assert_close(result[0], torch.tensor([1.94, 6.68, 1.60]), atol=0.01, rtol=0)
    by_hand = torch.exp(q @ k.T) / torch.exp(q @ k.T).sum(dim=1, keepdim=True) @ v
    torch.testing.assert_close(result, by_hand)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
def test_attention_is_the_papers_equation(dtype, training):
    """For both kernels; bf16 training uses the explicit one."""
    q, k, v = torch.randn(3, 2, 4, 9, 8, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_(training)
    by_hand = (0.3 * q.double() @ k.double().mT).softmax(-1) @ v.double()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(attention(q, k, v, scale=0.3).double(), by_hand, atol=tolerance, rtol=tolerance)


def test_gradients_reach_every_parameter():
    model = small_vit()
    model(images(16, 16)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_initialization():
    model = small_vit(num_features=192)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == (1 if name.endswith("weight") else 0)).all()
        elif name.endswith("bias"):
            assert not parameter.any()
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.15), name


def test_exact_gelu_can_be_chosen():
    x = torch.linspace(-3, 3, 101)
    torch.testing.assert_close(ACTIVATIONS["gelu"]()(x), x * torch.special.ndtr(x))
    assert not torch.allclose(ACTIVATIONS["gelu_tanh"]()(x), x * torch.special.ndtr(x), atol=1e-5)
    tanh, exact = (vit([32, 32], num_classes=2, name="vit_xs_4", activation=name) for name in ACTIVATIONS)
    assert tanh.blocks[0].mlp.act.approximate == "tanh"
    assert exact.blocks[0].mlp.act.approximate == "none"


def test_input_shape_is_a_multiple_of_the_patch():
    with pytest.raises(ValueError, match=r"input_shape=\(225, 224\).*multiples of the patch size, 16 .*\(224, 224\)"):
        vit(input_shape=[225, 224])
    with pytest.raises(ValueError, match="input_shape"):
        vit(input_shape=[0, 224])


def test_images_of_another_shape_fail():
    with pytest.raises(RuntimeError):
        small_vit()(images(32, 32))


@pytest.mark.parametrize("shape", [(160, 224), (448, 96)])
def test_resize_equals_loading_at_that_size(shape):
    model = vit([224, 224], num_classes=2, name="vit_t_16").eval()
    other = vit(shape, num_classes=2, name="vit_t_16").eval()
    load_weights(other, Weights(Path("x"), "test", model.state_dict()))
    model.resize(shape)
    assert model.arguments == other.arguments
    assert torch.equal(model(images(*shape)), other(images(*shape)))
    with pytest.raises(ValueError, match="multiples of the patch"):
        model.resize((20, 20))


def test_width_is_a_multiple_of_the_heads():
    with pytest.raises(ValueError, match="num_heads=5"):
        small_vit(num_heads=5)


def test_unknown_backbone():
    with pytest.raises(ValueError, match=r"backbone='vit_x'.*vit_b_16"):
        build_model("vit_x", 2, (224, 224))


@pytest.mark.parametrize("name", SIZES)
def test_arguments_rebuild_the_network(name):
    side = SIZES[name].patch_size * 2
    with torch.device("meta"):
        model = build_model(name, 3, (side, 2 * side), activation="gelu", norm_eps=1e-5, num_registers=2)
        twin = build_model(**model.arguments)
    assert str(twin) == str(model)
    assert {k: v.shape for k, v in twin.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


def test_stochastic_depth_rises_linearly():
    rates = [block.drop_path.drop_rate for block in small_vit(depth=5, drop_path_rate=0.4).blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_drop_path_keeps_whole_samples_and_the_expectation(device):
    """On a CPU only the kept samples go through the branch; on other devices all do, to avoid synchronization."""
    torch.manual_seed(0)
    layer = DropPath(0.3).train()
    x = torch.ones(20_000, 2, 3, device=device)
    batch_sizes = []
    y = layer(x, x, lambda x: batch_sizes.append(len(x)) or 2 * x)
    assert y.shape == x.shape
    if device == "meta":
        assert batch_sizes == [20_000]
        return
    added = (y - x).flatten(1)
    dropped = (added == 0).all(1)
    assert (dropped | torch.isclose(added, torch.tensor(2 / 0.7)).all(1)).all()
    assert batch_sizes == [20_000 - dropped.sum().item()]
    assert added.mean().item() == pytest.approx(2, abs=0.04)
    assert torch.equal(layer.eval()(x, x, lambda x: 2 * x), 3 * x)


def test_drop_path_by_rows_equals_a_mask():
    """Outputs and gradients equal those of a mask, also if few samples or none are kept."""
    linear = nn.Linear(3, 3)
    for drop_rate in (0.2, 0.6, 0.999):
        for seed in range(4):
            x = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(seed), requires_grad=True)
            torch.manual_seed(seed)
            mask = (torch.rand(5) < 1 - drop_rate).view(5, 1, 1) / (1 - drop_rate)
            expected = x + linear(x) * mask
            torch.manual_seed(seed)
            result = DropPath(drop_rate).train()(x, x, linear)
            torch.testing.assert_close(result, expected)
            for own, by_mask in zip(
                *(torch.autograd.grad(y.square().sum(), [x, *linear.parameters()]) for y in (result, expected)),
                strict=True,
            ):
                torch.testing.assert_close(own, by_mask)


def test_dropout_acts_in_training_only():
    model = small_vit(drop_rate=0.5, attn_drop_rate=0.5)
    x = images(16, 16)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def test_dropout_and_stochastic_depth_in_every_layer():
    model = small_vit(drop_rate=0.2, attn_drop_rate=0.3, drop_path_rate=0.4).train()
    called = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout | DropPath):
            module.register_forward_hook(lambda module, args, output, name=name: called.append(name))
    model(images(16, 16))
    block_layers = ["attn.proj_drop", "drop_path", "mlp.drop1", "mlp.drop2", "drop_path"]
    assert called == ["pos_drop", *(f"blocks.{i}.{name}" for i in range(3) for name in block_layers)]
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.2}
    assert [block.attn.attn_drop_rate for block in model.blocks] == [0.3] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_drops_weights_in_training_only(dtype):
    q = torch.ones(1, 1, 50, 4, dtype=dtype, requires_grad=True)
    v = torch.eye(50, dtype=dtype).view(1, 1, 50, 50)
    weights = attention(q, q, v, scale=1.0, drop_rate=0.5)  # v being the identity, these are the weights themselves
    assert (weights == 0).float().mean().item() == pytest.approx(0.5, abs=0.06)
    model = small_vit(drop_rate=0.0, attn_drop_rate=0.5, drop_path_rate=0.0)
    x = images(16, 16)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def test_queries_keys_and_values_without_bias():
    assert small_vit(qkv_bias=False).blocks[0].attn.qkv.bias is None


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_freeze_some_blocks():
    model = small_vit().train()
    model.freeze_backbone(blocks=2)
    prefixes = ("blocks.2.", "norm.", "head.")
    assert trainable(model) == {name for name, _ in model.named_parameters() if name.startswith(prefixes)}
    model.train()
    frozen = [model.patch_embed, model.pos_drop, *model.blocks[:2]]
    assert not any(m.training for part in frozen for m in part.modules())
    assert all(m.training for m in model.blocks[2].modules())


def test_freeze_all_leaves_the_head():
    model = small_vit()
    model.freeze_backbone(blocks="all")
    model.train()
    assert trainable(model) == {"head.weight", "head.bias"}
    assert not model.norm.training
    assert model.head.training


def test_freezing_fewer_blocks_and_unfreezing():
    model = small_vit()
    model.freeze_backbone("all")
    model.freeze_backbone(1)
    assert "blocks.1.norm1.weight" in trainable(model)
    assert "pos_embed" not in trainable(model)
    model.unfreeze_backbone()
    assert trainable(model) == {name for name, _ in model.named_parameters()}
    assert all(m.training for m in model.train().modules())


@pytest.mark.parametrize("blocks", [4, -1, "most"])
def test_invalid_number_of_frozen_blocks(blocks):
    with pytest.raises(ValueError, match=r"freeze_blocks=.*3 blocks"):
        small_vit().freeze_backbone(blocks)


def test_forward_equals_head_of_features():
    """Outputs and gradients, although the forward computes only the class token in the last block."""
    model = small_vit(drop_rate=0.0, attn_drop_rate=0.0, drop_path_rate=0.0)
    x = images(16, 16)
    features = model.forward_features(x)
    assert features.shape == (2, 17, 24)
    logits, by_features = model(x), model.forward_head(features)
    torch.testing.assert_close(logits, by_features)
    parameters = list(model.parameters())
    for own, other in zip(*(torch.autograd.grad(y.sum(), parameters) for y in (logits, by_features)), strict=True):
        torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("blocks", "shape"), [(0, (2, 17, 24)), (2, (2, 17, 24)), (3, (2, 1, 24)), ("all", (2, 24))])
def test_frozen_and_thawed_part_make_the_forward(blocks, shape):
    model = small_vit(drop_rate=0.5, attn_drop_rate=0.5, drop_path_rate=0.5)
    model.freeze_backbone(blocks)
    x = images(16, 16)
    features = model.train().forward_frozen(x)
    assert features.shape == shape
    assert not features.requires_grad
    assert torch.equal(features, model.eval().forward_frozen(x))
    torch.testing.assert_close(model.forward_thawed(features), model.forward_head(model.forward_features(x)))
    model.forward_thawed(features).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trainable(model)


def test_forward_thawed_with_nothing_frozen():
    model = small_vit().eval()
    x = images(16, 16)
    assert model.forward_frozen(x) is x
    assert torch.equal(model.forward_thawed(x), model(x))


def test_norm_and_activation_are_arguments():
    model = small_vit(norm_layer=partial(nn.LayerNorm, eps=1e-3), act_layer=nn.ReLU)
    assert model.norm.eps == model.blocks[0].norm1.eps == 1e-3
    assert isinstance(model.blocks[0].mlp.act, nn.ReLU)
    assert small_vit().norm.eps == 1e-6


def test_registers_are_between_class_token_and_patches():
    """`to_feature_map` depends on the order of the tokens."""
    torch.manual_seed(0)
    model = build_model("vit_xs_4", 3, (8, 12), num_registers=2).eval()
    with torch.no_grad():
        tokens = model.embed(torch.zeros(1, 3, 8, 12))
        patches = model.patch_embed(torch.zeros(1, 3, 8, 12)) + model.pos_embed[:, 1:]
        assert torch.equal(tokens[:, 0], model.cls_token[:, 0] + model.pos_embed[:, 0])
        assert torch.equal(tokens[:, 1:3], model.reg_token)
        assert torch.equal(tokens[:, 3:], patches)
        assert torch.equal(model.to_feature_map(tokens), patches.transpose(1, 2).unflatten(2, (2, 3)))
