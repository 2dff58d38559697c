"""Temperature scaling, which calibrates probabilities."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def fit_temperature(logits: Tensor, class_ids: Tensor) -> float:
    """Return the temperature that minimizes the cross-entropy of logits (n, classes) / temperature.

    Guo et al., 2017, https://arxiv.org/abs/1706.04599, by L-BFGS. A standard normal prior on the logarithm of the
    temperature, with the weight of a single image, keeps the temperature above 0 when all of a few images are correct.
    """
    logits, class_ids = logits.double(), class_ids.clone()  # tensors of inference_mode can't take part in autograd
    log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_temperature], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        likelihood = F.cross_entropy(logits / log_temperature.exp(), class_ids, reduction="sum")
        value = likelihood + log_temperature.square() / 2
        value.backward()
        return value

    optimizer.step(loss)
    return log_temperature.exp().item()


def calibrated_loss(logits: Tensor, class_ids: Tensor) -> tuple[float, float]:
    """Cross-entropy in nats of logits (n, classes) at their fitted temperature, and its standard error."""
    losses = F.cross_entropy(logits / fit_temperature(logits, class_ids), class_ids, reduction="none")
    return losses.mean().item(), losses.std(correction=0).item() / len(losses) ** 0.5
