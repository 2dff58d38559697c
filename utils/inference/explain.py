"""What the network looks at, as maps over what it was shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from utils.inference.classifier import Classifier
from utils.modeling.precision import autocast


class Maps(NamedTuple):
    """Of a batch, each with values from 0 to 1.

    Attributes:
        cam: (B, rows, columns), which parts speak for the class: Grad-CAM; all 0 where none does.
        rollout: (B, rows, columns), from which parts attention gathers, whatever the class; None: the network has none.
    """

    cam: Tensor
    rollout: Tensor | None


def explain(classifier: Classifier, pixels: Tensor, class_ids: Tensor) -> Maps:
    """What the network looks at in images (B, 3, height, width) uint8.

    Grad-CAM (Selvaraju et al., 2017, https://arxiv.org/abs/1610.02391): the features of the last layer that has places,
    weighed by the class's mean gradient. Rollout (Abnar and Zuidema, 2020, https://arxiv.org/abs/2005.00928): the
    product over the blocks of the mean attention of all heads, half of each being the shortcut.

    Args:
        classifier: whose network it is.
        pixels: as its transform gives them.
        class_ids: (B,), which class each map of Grad-CAM is for.
    """
    model = classifier.network.model
    blocks = getattr(model, "blocks", [])
    features: list[Tensor] = []
    qkvs: list[Tensor] = []

    def begin_graph(_: nn.Module, __: tuple, output: Tensor) -> Tensor:
        features.append(output.detach().requires_grad_())
        return features[0]

    hooks = [(model.map_layer, begin_graph)]
    hooks += [(block.attn.qkv, lambda _, __, output: qkvs.append(output.detach().float())) for block in blocks]
    with torch.enable_grad(), hooked(hooks), autocast(classifier.device, classifier.precision):
        logits = classifier.network(pixels.to(classifier.device))
        of_class = logits.float().gather(1, class_ids.to(logits.device)[:, None]).sum()
        (gradient,) = torch.autograd.grad(of_class, features)
    cam = _grad_cam(features[0].detach().float(), gradient.float(), model)
    if not qkvs:
        return Maps(cam, None)
    weights = [_attention_weights(qkv, block.attn) for qkv, block in zip(qkvs, blocks, strict=True)]
    rollout = attention_rollout(weights)[:, 0, model.num_prefix_tokens :].unflatten(1, model.grid)
    low, high = rollout.amin(dim=(1, 2), keepdim=True), rollout.amax(dim=(1, 2), keepdim=True)
    return Maps(cam, ((rollout - low) / (high - low).clamp_min(1e-12)).cpu())


def _grad_cam(features: Tensor, gradient: Tensor, model: nn.Module) -> Tensor:
    """The map (B, rows, columns) from what `model.map_layer` gave and the gradient there."""
    features, gradient = model.to_map(features), model.to_map(gradient)  # (B, C, rows, columns)
    cam = (features * gradient.mean(dim=(2, 3), keepdim=True)).sum(dim=1)
    cam = cam.relu()
    return (cam / cam.amax(dim=(1, 2), keepdim=True).clamp_min(1e-12)).cpu()


@contextmanager
def hooked(hooks: Sequence[tuple[nn.Module, Callable]]) -> Iterator[None]:
    """Within it, each module calls its hook after its forward."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _attention_weights(qkv: Tensor, attention: nn.Module) -> Tensor:
    """Mean weights over the heads (B, N, N) from a projection (B, N, 3C)."""
    q, k, _ = qkv.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, N, D)
    return (q * attention.scale @ k.transpose(-2, -1)).softmax(dim=-1).mean(dim=1)


def attention_rollout(weights: list[Tensor]) -> Tensor:
    """How much of each token (B, N, N) of the first block is in each of the last, given the attention weights (B, N, N)
    of each block."""
    rolled = torch.eye(weights[0].shape[-1], device=weights[0].device)
    shortcut = rolled
    for block in weights:
        rolled = (block + shortcut) / 2 @ rolled
    return rolled


def overlay(pixels: Tensor, heat: Tensor, side: int) -> Image.Image:
    """A map (rows, columns) in colours, from blue for 0 to red for 1, laid over what the network was shown (3, height,
    width) uint8, with `side` pixels on the longer side."""
    image = shown(pixels, side)
    levels = (heat.numpy() * 255).round().astype(np.uint8)
    colours = cv2.applyColorMap(cv2.resize(levels, image.size, interpolation=cv2.INTER_CUBIC), cv2.COLORMAP_TURBO)
    return Image.blend(image, Image.fromarray(cv2.cvtColor(colours, cv2.COLOR_BGR2RGB)), 0.45)


def shown(pixels: Tensor, side: int) -> Image.Image:
    """What the network was shown (3, height, width) uint8 as an image with `side` pixels on the longer side."""
    return fit(Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()), side)


def fit(image: Image.Image, side: int) -> Image.Image:
    """An image with `side` pixels on the longer side; tiny ones are enlarged to plain squares."""
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale > 3 else Image.Resampling.BILINEAR)


def explain_one(classifier: Classifier, pixels: Tensor, class_id: int, side: int) -> dict[str, Image.Image]:
    """The maps of one image (3, height, width) uint8 as overlays with titles, see `titled_overlays`."""
    return titled_overlays(pixels, explain(classifier, pixels[None], torch.tensor([class_id])), 0, side)


def titled_overlays(pixels: Tensor, maps: Maps, row: int, side: int) -> dict[str, Image.Image]:
    """Title -> overlay, `side` pixels on the longer side, of one image (3, height, width) uint8 of a batch."""
    title = "evidence for it" if maps.cam[row].any() else "no part is evidence for it"
    overlays = {title: overlay(pixels, maps.cam[row], side)}
    if maps.rollout is not None:
        overlays["attention"] = overlay(pixels, maps.rollout[row], side)
    return overlays
