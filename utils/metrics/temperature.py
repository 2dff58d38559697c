"""Temperature scaling, which calibrates probabilities."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.metrics.blocks import map_rows, row_blocks


def fit_temperature(logits: Tensor, class_ids: Tensor) -> float:
    """Return the temperature that minimizes the cross-entropy of logits (n, classes) / temperature.

    Guo et al., 2017, https://arxiv.org/abs/1706.04599, by L-BFGS. A standard normal prior on the logarithm of the
    temperature, with the weight of a single image, keeps the temperature above 0 when all of a few images are correct.
    """
    class_ids = class_ids.clone()  # tensors of inference_mode can't take part in autograd
    log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_temperature], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        prior = log_temperature.square() / 2
        prior.backward()
        value = prior.detach()
        for block, ids in row_blocks(logits.shape[1], logits, class_ids):
            likelihood = F.cross_entropy(block.double() / log_temperature.exp(), ids, reduction="sum")
            likelihood.backward()  # adds to the gradient
            value += likelihood.detach()
        return value

    optimizer.step(loss)
    return log_temperature.exp().item()


def calibrated_losses(logits: Tensor, class_ids: Tensor) -> Tensor:
    """Cross-entropy in nats of each row of logits (n, classes) at their fitted temperature, (n,)."""
    temperature = fit_temperature(logits, class_ids)

    def cross_entropies(logits: Tensor, class_ids: Tensor) -> tuple[Tensor]:
        return (F.cross_entropy(logits / temperature, class_ids, reduction="none"),)

    (losses,) = map_rows(cross_entropies, logits.shape[1], logits, class_ids)
    return losses
