"""Explanation maps: Grad-CAM and attention rollout.

Grad-CAM is implemented here since importing the package grad-cam takes 3 s (it imports scikit-learn, matplotlib and
torchvision), and the forward hooks are needed for rollout anyway.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from utils.inference.classifier import Classifier
from utils.modeling.precision import autocast


class Maps(NamedTuple):
    """The maps of a batch, with values from 0 to 1.

    Attributes:
        cam: (B, rows, columns), Grad-CAM: evidence for a class; all 0 if there is none.
        rollout: (B, rows, columns), attention rollout, independent of the class; None if the network has no attention.
    """

    cam: Tensor
    rollout: Tensor | None


def explain(classifier: Classifier, pixels: Tensor, class_ids: Tensor) -> Maps:
    """Compute the maps of preprocessed images (B, 3, height, width), uint8.

    Grad-CAM (Selvaraju et al., 2017, https://arxiv.org/abs/1610.02391): the features of `model.feature_map_layer`, the
    last layer with spatial positions, weighted by the mean gradient of the class's logit. Rollout (Abnar and Zuidema,
    2020, https://arxiv.org/abs/2005.00928): the product over the blocks of the attention weights, averaged over the
    heads and then with the identity for the residual connection. Grad-CAM is for the classes in `class_ids` (B,).
    """
    model = classifier.network.model
    blocks = getattr(model, "blocks", [])
    features: list[Tensor] = []
    qkvs: list[Tensor] = []

    def start_graph(_: nn.Module, __: tuple, output: Tensor) -> Tensor:
        features.append(output.detach().requires_grad_())
        return features[0]

    hooks = [(model.feature_map_layer, start_graph)]
    hooks += [(block.attn.qkv, lambda _, __, output: qkvs.append(output.detach().float())) for block in blocks]
    with ExitStack() as stack, torch.enable_grad(), autocast(classifier.device, classifier.precision):
        for module, hook in hooks:
            stack.enter_context(module.register_forward_hook(hook))
        logits = classifier.network(pixels.to(classifier.device))
        class_logits = logits.float().gather(1, class_ids.to(logits.device)[:, None])
        (gradient,) = torch.autograd.grad(class_logits.sum(), features)
    cam = _grad_cam(features[0].detach().float(), gradient.float(), model)
    if not qkvs:
        return Maps(cam, None)
    weights = [_attention_weights(qkv, block.attn) for qkv, block in zip(qkvs, blocks, strict=True)]
    rollout = attention_rollout(weights)[:, 0, model.num_prefix_tokens :].unflatten(1, model.grid)
    low, high = rollout.amin(dim=(1, 2), keepdim=True), rollout.amax(dim=(1, 2), keepdim=True)
    return Maps(cam, ((rollout - low) / (high - low).clamp_min(1e-12)).cpu())


def _grad_cam(features: Tensor, gradient: Tensor, model: nn.Module) -> Tensor:
    """The map (B, rows, columns) from the output of `model.feature_map_layer` and its gradient."""
    features, gradient = model.to_feature_map(features), model.to_feature_map(gradient)  # (B, C, rows, columns)
    cam = (features * gradient.mean(dim=(2, 3), keepdim=True)).sum(dim=1).relu()  # (B, rows, columns)
    return (cam / cam.amax(dim=(1, 2), keepdim=True).clamp_min(1e-12)).cpu()


def _attention_weights(qkv: Tensor, attention: nn.Module) -> Tensor:
    """Attention weights averaged over the heads (B, N, N), from the projection (B, N, 3C)."""
    q, k, _ = qkv.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, N, D)
    return (q * attention.scale @ k.transpose(-2, -1)).softmax(dim=-1).mean(dim=1)


def attention_rollout(weights: list[Tensor]) -> Tensor:
    """How much each output token attends to each input token (B, N, N), from the weights (B, N, N) of each block."""
    identity = rollout = torch.eye(weights[0].shape[-1], device=weights[0].device)
    for block in weights:
        rollout = (block + identity) / 2 @ rollout
    return rollout


def overlay(pixels: Tensor, heat: Tensor, side: int) -> Image.Image:
    """Blend a map (rows, columns), in colors from blue (0) to red (1), over a preprocessed image (3, height, width).

    The result has `side` pixels on its longer side.
    """
    image = shown(pixels, side)
    levels = (heat.numpy() * 255).round().astype(np.uint8)
    colors = cv2.applyColorMap(cv2.resize(levels, image.size, interpolation=cv2.INTER_CUBIC), cv2.COLORMAP_TURBO)
    return Image.blend(image, Image.fromarray(cv2.cvtColor(colors, cv2.COLOR_BGR2RGB)), 0.45)


def shown(pixels: Tensor, side: int) -> Image.Image:
    """A preprocessed image, uint8 (3, height, width), with `side` pixels on its longer side."""
    return fit(Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()), side)


def fit(image: Image.Image, side: int) -> Image.Image:
    """Resize an image to `side` pixels on its longer side; tiny images keep sharp pixels."""
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale > 3 else Image.Resampling.BILINEAR)


def explain_one(classifier: Classifier, pixels: Tensor, class_id: int, side: int) -> dict[str, Image.Image]:
    """Map title -> overlay for one preprocessed image (3, height, width), see `titled_overlays`."""
    return titled_overlays(pixels, explain(classifier, pixels[None], torch.tensor([class_id])), 0, side)


def titled_overlays(pixels: Tensor, maps: Maps, row: int, side: int) -> dict[str, Image.Image]:
    """Map title -> overlay for one preprocessed image (3, height, width), the one in row `row` of `maps`."""
    title = "evidence" if maps.cam[row].any() else "no evidence"
    overlays = {title: overlay(pixels, maps.cam[row], side)}
    if maps.rollout is not None:
        overlays["attention"] = overlay(pixels, maps.rollout[row], side)
    return overlays
