"""utils/inference/explain.py against the package grad-cam, timm's attention, and images with a known decisive patch."""

import numpy as np
import pytest
import timm
import torch
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn

from nets.factory import build_model
from tests.conftest import settings
from utils.data.preprocessing import Preprocessing
from utils.data.transforms import EvalTransform
from utils.inference.classifier import Classifier
from utils.inference.explain import attention_rollout, explain, overlay, shown
from utils.modeling.pixel_network import PixelNetwork

CPU = torch.device("cpu")
SHAPE = (32, 48)


def make_classifier(model: nn.Module, shape: tuple[int, int] = SHAPE) -> Classifier:
    preprocessing = Preprocessing.from_config(settings(input_shape=shape))
    network = PixelNetwork(model, preprocessing, CPU).eval()
    return Classifier(network, preprocessing, EvalTransform(preprocessing), ["a", "b", "c"], CPU, "fp32")


def vit(shape: tuple[int, int] = SHAPE) -> nn.Module:
    torch.manual_seed(0)
    return build_model("vit_xs_4", 3, shape)


def pixels(n: int = 2, shape: tuple[int, int] = SHAPE) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def resnet(shape: tuple[int, int]) -> nn.Module:
    torch.manual_seed(0)
    return build_model("resnet18", 3, shape)


def swin(shape: tuple[int, int]) -> nn.Module:
    torch.manual_seed(0)
    return build_model("swin_transformer_tiny", 3, shape)


@pytest.mark.parametrize(
    ("make", "shape", "expected_grid"),
    [(vit, SHAPE, (8, 12)), (resnet, (128, 160), (4, 5)), (swin, (128, 160), (4, 5))],
)
def test_grad_cam_agrees_with_the_package(make, shape, expected_grid):
    model = make(shape).eval()
    classifier = make_classifier(model, shape)
    batch, class_ids = pixels(shape=shape), torch.tensor([2, 0])
    maps = explain(classifier, batch, class_ids)
    grid = tuple(maps.cam.shape[1:])
    assert grid == expected_grid

    def to_feature_map(x: torch.Tensor) -> torch.Tensor:
        if make is swin:
            return x.permute(0, 3, 1, 2)
        return x if x.ndim == 4 else x[:, 1:].unflatten(1, grid).permute(0, 3, 1, 2)

    with GradCAM(model, [model.feature_map_layer], reshape_transform=to_feature_map) as reference:
        normalized = classifier.network.normalize(batch)
        expected = reference(normalized, [ClassifierOutputTarget(int(k)) for k in class_ids])  # (B, height, width)
    ours = np.stack(
        [np.asarray(torch.nn.functional.interpolate(m[None, None], shape, mode="bilinear")[0, 0]) for m in maps.cam]
    )
    assert np.corrcoef(ours.ravel(), expected.ravel())[0, 1] > 0.99
    assert (maps.rollout is None) == (make is not vit)


def test_grad_cam_with_a_single_position():
    """At 32 x 32, a resnet's last map has one position. Its features are not negative, so positive weights make it
    evidence for a class, and negative ones don't."""
    model = resnet((32, 32)).eval()
    model.head.weight.data[0], model.head.weight.data[1] = 0.1, -0.1
    classifier = make_classifier(model, (32, 32))
    batch = pixels(shape=(32, 32))
    for class_id, expected in ((0, 1.0), (1, 0.0)):
        maps = explain(classifier, batch, torch.tensor([class_id, class_id]))
        assert maps.cam.tolist() == [[[expected]]] * 2


def test_rollout_agrees_with_timms_attention():
    """With `fused_attn` = False, timm computes attention weights that a hook can record."""
    model = vit().eval()
    classifier = make_classifier(model)
    timm_model = timm.create_model(
        "vit_tiny_patch16_224", img_size=SHAPE, patch_size=4, depth=6, num_classes=3, act_layer=lambda: nn.GELU("tanh")
    ).eval()
    timm_model.load_state_dict(model.state_dict())
    weights = []
    for block in timm_model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _, __, output: weights.append(output.detach().numpy()))
    batch = pixels()
    timm_model(classifier.network.normalize(batch))
    rolled = np.eye(97)
    for w in weights:
        mixed = 0.5 * w.mean(axis=1) + 0.5 * np.eye(97)
        rolled = mixed / mixed.sum(axis=-1, keepdims=True) @ rolled
    expected = rolled[:, 0, 1:].reshape(2, 8, 12)
    low, high = expected.min((1, 2), keepdims=True), expected.max((1, 2), keepdims=True)
    maps = explain(classifier, batch, torch.tensor([0, 1]))
    assert np.allclose(maps.rollout, (expected - low) / (high - low), atol=1e-3)


def test_rollout_by_hand():
    """Two tokens and two blocks; both tokens attend to the second one only."""
    weights = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]])
    assert attention_rollout([weights, weights]).tolist() == [[[0.25, 0.75], [0.0, 1.0]]]


def test_rollout_finds_the_decisive_patch():
    """A network that learned to detect one bright patch attends to it."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = build_model("vit_of_the_tests", 2, (16, 16), drop_rate=0.0, attn_drop_rate=0.0, drop_path_rate=0.0)
    classifier = make_classifier(model, (16, 16))

    def batch(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        images = torch.randint(0, 60, (n, 3, 16, 16), dtype=torch.uint8, generator=generator)
        class_ids, patches = torch.arange(n) % 2, torch.randint(16, (n,), generator=generator)
        for i in torch.nonzero(class_ids).flatten().tolist():
            row, column = divmod(int(patches[i]), 4)
            images[i, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 250
        return images, class_ids, patches

    optimizer = torch.optim.AdamW(model.parameters(), 5e-4)
    model.train()
    for _ in range(60):
        images, class_ids, _ = batch(32)
        nn.functional.cross_entropy(classifier.network(images), class_ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    images, class_ids, patches = batch(64)
    bright = class_ids == 1
    assert (classifier.network(images).argmax(1) == class_ids).float().mean() > 0.95
    maps = explain(classifier, images[bright], class_ids[bright])
    correct = maps.rollout.flatten(1).argmax(1) == patches[bright]
    assert correct.float().mean() > 0.6  # chance is 1 in 16


def test_overlays_have_the_size_and_colors_of_the_map():
    image = pixels(1)[0]
    assert shown(image, 96).size == (96, 64)
    blended = overlay(image, torch.eye(8, 12), 96)
    assert blended.size == (96, 64)
    red, blue = (np.asarray(blended, float)[..., c] for c in (0, 2))
    assert red[4, 4] > red[60, 10] or blue[4, 4] < blue[60, 10]


def test_hooks_and_gradients_are_removed():
    model = vit().eval()
    explain(make_classifier(model), pixels(), torch.tensor([0, 1]))
    assert not any(module._forward_hooks for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
