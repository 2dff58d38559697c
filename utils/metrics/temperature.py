"""Temperature scaling, which calibrates probabilities."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.metrics.blocks import map_rows, row_blocks

PRIOR_DEVIATION = 0.5
"""Standard deviation of the logarithm of temperatures before any image is seen: two thirds of them are from 0.6 to 1.6.
Compared with others in docs/benchmarks.md, by log-loss after a fit to few images."""


def fit_temperature(logits: Tensor, class_ids: Tensor, prior_deviation: float = PRIOR_DEVIATION) -> float:
    """Return the most probable temperature, of logits (n, classes) / temperature and the true classes (n,).

    Guo et al., 2017, https://arxiv.org/abs/1706.04599, by L-BFGS. A normal prior on the logarithm of the temperature,
    with mean 0 and standard deviation `prior_deviation`, draws it towards 1 as far as the evidence of the images is
    weak: few images, or all correct.
    """
    class_ids = class_ids.clone()  # tensors of inference_mode can't take part in autograd
    log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_temperature], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        prior = (log_temperature / prior_deviation).square() / 2
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
    """Cross-entropy in nats of each row of logits (n, classes) at their fitted temperature, (n,).

    Epochs are compared by it, also where few images are all correct, so the prior is weak: the scale of the logits must
    hardly count.
    """
    temperature = fit_temperature(logits, class_ids, prior_deviation=1.0)

    def cross_entropies(logits: Tensor, class_ids: Tensor) -> tuple[Tensor]:
        return (F.cross_entropy(logits / temperature, class_ids, reduction="none"),)

    (losses,) = map_rows(cross_entropies, logits.shape[1], logits, class_ids)
    return losses
