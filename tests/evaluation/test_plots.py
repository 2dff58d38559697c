"""Plots, and the model and settings tables of a run."""

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array

from nets.factory import build_model
from tests.conftest import SMALL, settings
from utils.evaluation.plots import MAX_CLASSES, arrange_classes, plot_confusion
from utils.runs.curves import plot_losses
from utils.training.stages import plan_stages
from utils.training.summary import count_flops, format_model


def test_confusion_plot_has_true_classes_in_rows():
    axes = plot_confusion(csr_array([[7, 2], [0, 5]]), ["a", "b"]).axes[0]
    assert {text.get_position(): text.get_text() for text in axes.texts} == {(0, 0): "7", (1, 0): "2", (1, 1): "5"}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")


def test_confused_classes_are_adjacent():
    """Eight classes; i is confused with i + 4."""
    confusion = 10 * np.eye(8, dtype=int)
    for i in range(4):
        confusion[i, i + 4] = 3 + i
    order = arrange_classes(csr_array(confusion)).tolist()
    assert sorted(order) == list(range(8))
    assert all(abs(order.index(i) - order.index(i + 4)) == 1 for i in range(4))
    names = [f"class {i}" for i in range(8)]
    assert "often confused are next to each other" in plot_confusion(csr_array(confusion), names).axes[0].get_title()
    no_mistakes = plot_confusion(csr_array(10 * np.eye(8, dtype=int)), names).axes[0]
    assert "in the order of the class file" in no_mistakes.get_title()
    assert [label.get_text() for label in no_mistakes.get_yticklabels()] == names


@pytest.mark.parametrize("classes", [2, 10, 81, 1000])
def test_at_most_max_classes_are_shown(classes):
    confusion = 10 * np.eye(classes, dtype=int)
    confusion[1, 0] = 5
    if classes > 20:
        confusion[17, 5] = 2
    confusion = csr_array(confusion)
    order = arrange_classes(confusion)
    assert len(order) == min(classes, MAX_CLASSES)
    assert {0, 1} <= set(order)
    axes = plot_confusion(confusion, [f"class {i}" for i in range(classes)]).axes[0]
    assert len(axes.get_yticklabels()) == len(order)
    assert ("classes with the most mistakes" in axes.get_title()) == (classes > MAX_CLASSES)


def test_loss_curves_have_the_history():
    keys = ("epoch", "loss", "val_loss", "val_calibrated_loss", "top1", "val_top1")
    history = [dict(zip(keys, (i, 3 - i, 4 - i, 3.5 - i, 0.1 * i, 0.2 * i), strict=True)) for i in (1, 2)]
    loss, top1 = plot_losses(history).axes
    assert [line.get_ydata().tolist() for line in loss.lines] == [[2, 1], [3, 2], [2.5, 1.5]]
    assert [line.get_xdata().tolist() for line in top1.lines] == [[1, 2], [1, 2]]


def test_flops_of_the_base_network():
    """By hand: patch embedding 2·196·768·768; per block 2·197·12·768² for linear layers and 4·197²·768 for attention;
    in the last block everything after queries, keys and values (3 of the 12) is for the class token only; the head."""
    with torch.device("meta"):
        model = build_model("vit_b_16", 1000, (224, 224))
    by_hand = 2 * 196 * 768 * 768 + 11 * (2 * 197 * 12 * 768**2 + 4 * 197**2 * 768) + 2 * 768 * 1000
    by_hand += 2 * (197 * 3 + 9) * 768**2 + 4 * 197 * 768
    assert count_flops(model) == by_hand


def test_model_table_counts_trainable_parameters_per_stage():
    with torch.device("meta"):
        model = build_model("vit_xs_4", 2, (8, 8))
    table = format_model(model, plan_stages(settings(**SMALL | {"freeze_blocks": "all"}), 100, transformer=True))
    rows = {line.split()[0]: line.split()[1:] for line in table.splitlines()[1:-1]}
    assert rows["head"] == ["386", "386", "386"]
    assert rows["pos_embed"] == ["960", "0", "960"]
    total = f"{sum(p.numel() for p in model.parameters()):,}"
    assert rows["all"] == [total, "386", total]
