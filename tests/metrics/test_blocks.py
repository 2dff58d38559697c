"""utils/metrics/blocks.py: results don't depend on the block, and nothing as large as the logits is added to them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from utils.inference.rejection import most_probable
from utils.metrics import blocks
from utils.metrics.blocks import map_rows
from utils.metrics.classification import evaluation_metrics, top_k_accuracy
from utils.metrics.scores import Scores
from utils.metrics.temperature import calibrated_losses, fit_temperature

MEASURE = """
import utils.system.startup
from pathlib import Path
import torch
from utils.inference.rejection import most_probable
from utils.metrics import blocks
from utils.metrics.classification import top_k_accuracy
from utils.metrics.scores import Scores
from utils.metrics.temperature import calibrated_losses, fit_temperature

blocks.MAX_VALUES = 1 << 17  # so that fewer logits are many blocks

torch.set_num_threads(1)

def peak():
    return next(int(s.split()[1]) for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmHWM"))

def compute(n, classes):
    \"""The temperature is 2: half of the images have the class with the probability 0.5 / (classes - 1) at that.\"""
    logits, class_ids = torch.zeros(n, classes), torch.arange(n) % classes * (torch.arange(n) % 2)
    logits[:, 0] = 2 * torch.tensor(classes - 1).log()
    before = peak()
    assert 1.9 < fit_temperature(logits, class_ids) < 2.1
    assert calibrated_losses(logits, class_ids).mean() > 0
    assert top_k_accuracy(logits, class_ids, 1) == 0.5
    assert most_probable(logits, 2.0)[0].isclose(torch.tensor(0.5), atol=1e-3).all()
    scores = Scores.from_logits(logits, class_ids, 2.0)
    assert scores.present_probabilities.shape == (n, n // 2 + 1)
    return (peak() - before) * 1024 / logits.nbytes

compute(100, 1000)  # imports
print(compute(500, 20_000))
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="no peak memory of a process")
def test_no_copy_of_the_logits_is_made():
    """One in float64 would take twice the memory of the logits."""
    command = [sys.executable, "-c", MEASURE]
    result = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 1.5, "peak memory besides that of the logits, as a multiple of it"


def test_results_are_the_same_in_blocks_of_any_size(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits, class_ids = torch.randn(50, 7, generator=generator), torch.arange(50) % 6
    names = [str(k) for k in range(7)]

    def results() -> tuple:
        losses = calibrated_losses(logits, class_ids), top_k_accuracy(logits, class_ids, 3)
        metrics = evaluation_metrics(Scores.from_logits(logits, class_ids, 2.5), names)
        return metrics, most_probable(logits, 2.5)[0].tolist(), *losses

    whole, temperature = results(), fit_temperature(logits, class_ids)
    for values in (1, 7 * 8, 7 * 49):
        monkeypatch.setattr(blocks, "MAX_VALUES", values)
        metrics, probable, losses, accuracy = results()
        assert (metrics, probable, accuracy) == (whole[0], whole[1], whole[3])
        torch.testing.assert_close(losses, whole[2])
        assert fit_temperature(logits, class_ids) == pytest.approx(temperature, rel=1e-9)


def test_no_rows_have_empty_results():
    lengths, sums = map_rows(lambda x, y: (y[:, 0], x.sum(dim=1)), 3, torch.zeros(0, 3), torch.zeros(0, 2))
    assert lengths.shape == sums.shape == (0,)


def test_top_classes_are_those_of_a_stable_sort():
    """Rounded logits have ties, which go to the lower id; probabilities may also be 0."""
    logits = torch.randn(200, 9, generator=torch.Generator().manual_seed(0)).round() * torch.tensor([1.0, 900]).repeat(
        100
    ).unsqueeze(1)
    scores = Scores.from_logits(logits, torch.zeros(200, dtype=torch.int64))
    probabilities = logits.double().softmax(dim=1).numpy()
    order = np.argsort(-probabilities, axis=1, kind="stable")
    assert (scores.top == order[:, :5]).all()
    assert (scores.top_probabilities == np.take_along_axis(probabilities, order, 1)[:, :5]).all()
    assert (scores.true_ranks == np.argmax(order == 0, axis=1)).all()
