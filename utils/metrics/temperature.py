"""Temperature scaling: probabilities that are right as often as they say."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def fit_temperature(logits: Tensor, class_ids: Tensor) -> float:
    """The temperature that logits (n, classes) are to be divided by so that their softmax suits class ids (n,) best.

    Guo et al., 2017, https://arxiv.org/abs/1706.04599: the cross-entropy is minimised by L-BFGS. A prior, a normal of
    mean 0 and deviation 1 on the temperature's logarithm, weighs as little as one image; it keeps a handful of
    images that are all named right from asking for certainty.
    """
    logits, class_ids = logits.double(), class_ids.clone()  # inference_mode's own ids can't be in a gradient
    log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_temperature], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        fit = F.cross_entropy(logits / log_temperature.exp(), class_ids, reduction="sum")
        value = fit + log_temperature.square() / 2
        value.backward()
        return value

    optimizer.step(loss)
    return log_temperature.exp().item()


def calibrated_loss(logits: Tensor, class_ids: Tensor) -> tuple[float, float]:
    """Cross-entropy in nats of logits (n, classes) at the temperature that suits them best, and its standard error: the
    mean over the images, and how far chance in their choice takes it."""
    losses = F.cross_entropy(logits / fit_temperature(logits, class_ids), class_ids, reduction="none")
    return losses.mean().item(), losses.std(correction=0).item() / len(losses) ** 0.5
