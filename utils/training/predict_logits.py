"""The outputs of a network for all images of a loader."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from utils.data.loader import iterate_batches
from utils.modeling.precision import autocast
from utils.system.runtime import runtime


def predict_logits(
    network: nn.Module,
    loader: DataLoader,
    device: torch.device,
    precision: str,
    title: str = "evaluating",
    micro_batches: int = 1,
    together: bool = False,
) -> tuple[Tensor, Tensor]:
    """Logits (N, classes) in fp32 and class ids (N,) of all images of `loader`, in its order, on the CPU of rank 0;
    empty on other ranks.

    Each batch is split into `micro_batches`. With `together`, all ranks call the network equally often.
    """
    network.eval()
    logits, targets = [], []
    bar = tqdm(iterate_batches(loader), desc=title, total=len(loader), unit="batch", leave=False, disable=None)
    # FSDP keeps the tensors of its first pass for training, which can't use those of inference mode.
    with torch.no_grad() if together else torch.inference_mode():
        for inputs, batch_targets in bar:
            for part in inputs.to(device, non_blocking=True).tensor_split(min(micro_batches, len(inputs))):
                with autocast(device, precision):
                    logits.append(network(part).float())
            targets.append(batch_targets)
        batches = loader.batch_sampler
        if together and len(batches) < batches.longest:
            network(torch.zeros(1, 3, *loader.dataset.transform.size, dtype=torch.uint8, device=device))
    outputs = [torch.cat(tensors).cpu() if tensors else torch.empty(0) for tensors in (logits, targets)]
    logits, targets = runtime.collect_batches(outputs, loader.batch_sampler.batch_size)
    return logits, targets
