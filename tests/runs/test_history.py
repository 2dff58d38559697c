"""utils/runs/history.py: which epoch is selected, and why."""

import math
from itertools import pairwise

from utils.evaluation.report_page import read_epochs
from utils.runs.history import format_no_gain, format_row, select_best, start_row
from utils.runs.log import RunLog

SMALL, LARGE = (96, 96), (224, 224)


def rows_of(losses, error=0.0, worse=(), start=None):
    """Rows of epochs of an earlier version with these calibrated losses, from epoch 1; before them epoch 0 with the
    loss `start`."""
    numbered = [*([(0, start)] if start is not None else []), *enumerate(losses, 1)]
    return [
        {"epoch": number, "loss": 0.7, "top1": 0.5, "val_loss": loss, "val_top1": 0.6, "seconds": 1.0, "skipped": 0}
        | {"val_calibrated_loss": loss, "val_calibrated_loss_error": error, "val_worse": float(number in worse)}
        for number, loss in numbered
    ]


def selected(rows, shapes=(LARGE,) * 9):
    """The epoch that is selected after each row."""
    return [rows[select_best(rows[: i + 1], shapes)]["epoch"] for i in range(len(rows))]


def test_the_latest_within_one_standard_error_of_the_lowest():
    losses = [0.9, 0.5, 0.62, 0.58, 0.7, 0.61]
    assert selected(rows_of(losses)) == [1, 2, 2, 2, 2, 2]
    assert selected(rows_of(losses, error=0.1)) == [1, 2, 2, 4, 4, 4]
    assert selected(rows_of(losses, error=0.15)) == [1, 2, 3, 4, 4, 6]


def test_a_paired_comparison_replaces_the_standard_error_of_the_loss():
    """Also where the losses alone say otherwise."""
    rows = rows_of([0.9, 0.5, 0.62, 0.58], error=0.01, start=0.4)
    beaten = [0, 1, 1, 0, 1]
    rows = [row | {"val_beaten": float(flag)} for row, flag in zip(rows, beaten, strict=True)]
    assert selected(rows) == [0, 0, 0, 3, 3]
    assert format_row(rows[:4], [LARGE] * 4, True).endswith(
        "(best so far: the latest within a standard error of epoch 0)"
    )
    rows[4]["val_beaten"] = math.nan  # of an earlier version
    assert selected(rows) == [0, 0, 0, 3, 3]


def test_losses_of_another_input_shape_are_not_compared():
    assert selected(rows_of([0.5, 0.6, 0.9, 0.8]), [SMALL, SMALL, LARGE, LARGE]) == [1, 1, 3, 4]
    assert selected(rows_of([0.5, 0.9, 0.7]), [LARGE, SMALL, LARGE]) == [1, 2, 3]  # not the first stage's


def test_the_start_is_selected_until_an_epoch_is_as_good():
    assert selected(rows_of([0.9, 0.8, 0.4, 0.5], start=0.6)) == [0, 0, 0, 3, 3]
    assert selected(rows_of([0.9, 0.65, 0.8], error=0.1, start=0.6)) == [0, 0, 2, 2]


def test_an_epoch_that_is_significantly_worse_than_the_start_is_not_selected():
    """Even if its loss is the lowest: its accuracy is worse."""
    assert selected(rows_of([0.5, 0.4, 0.45], worse={1, 2, 3}, start=0.6)) == [0, 0, 0, 0]
    assert selected(rows_of([0.5, 0.4, 0.45], worse={2}, start=0.6)) == [0, 1, 1, 3]
    # Nor with images of another size; the one selected before stays.
    assert selected(rows_of([0.5, 0.4], worse={2}, start=0.6), [SMALL, LARGE]) == [0, 1, 1]


def test_a_selection_never_returns_to_an_earlier_epoch():
    """Otherwise the file of the best epoch would be of another one."""
    for start, worse in ((None, ()), (0.5, ()), (0.5, (2, 4)), (0.5, (1, 2, 3, 4, 5))):
        for shapes in ([LARGE] * 5, [SMALL, SMALL, LARGE, LARGE, LARGE]):
            for losses in ([0.9, 0.3, 0.8, 0.2, 0.25], [0.3, 0.4, 0.2, 0.9, 0.1]):
                rows = rows_of(losses, error=0.1, worse=worse, start=start)
                epochs = selected(rows, shapes)
                for (before, now), row in zip(pairwise(epochs), rows[1:], strict=True):
                    assert now in (before, row["epoch"])


def test_the_line_of_an_epoch_has_the_reason():
    rows = rows_of([0.5, 0.52, 0.9], error=0.05, worse={3}, start=0.6)

    def ending(count, is_best):
        return format_row(rows[:count], [LARGE] * 3, is_best).partition(" s")[2]

    assert format_row(rows[:1], [LARGE] * 3, True).startswith("epoch 0/3: before training; validation loss 0.600")
    assert ending(1, True) == ""
    assert ending(2, True) == " (best so far)"
    assert ending(3, True) == " (best so far: the latest within a standard error of epoch 1)"
    assert ending(4, False) == " (worse than epoch 0)"
    other = rows_of([0.3, 0.4], worse={1}, start=0.5)
    assert format_row(other, [LARGE] * 2, True).endswith("(best so far: epoch 1 is worse than epoch 0 in accuracy)")
    assert format_row(rows_of([0.3, 0.4]), [SMALL, LARGE], True).endswith("(best so far)")


def test_rows_of_an_earlier_version_are_logged_by_name(tmp_path):
    """They have no val_worse, and epoch 0 may have its columns in another order."""
    rows = [row | {"step": row["epoch"], "time": 0.0, "learning_rate": 0.1} for row in rows_of([0.5, 0.4], start=0.6)]
    rows[0] = dict(reversed(rows[0].items()))
    del rows[1]["val_worse"]
    log = RunLog(tmp_path, [])
    log.log_epoch(rows)
    log.close()
    found = read_epochs(tmp_path)
    assert [row["epoch"] for row in found] == [0, 1, 2]
    assert [row["val_loss"] for row in found] == [0.6, 0.5, 0.4]
    assert math.isnan(found[1]["val_worse"])
    assert select_best(found[:2], [LARGE] * 2) == 1  # not known to be worse


def test_no_gain_is_explained():
    rows = rows_of([0.7, 0.65], start=0.6)
    assert "0.600, top-1 60.0%; the best epoch had 0.650" in format_no_gain(rows)


def test_the_start_has_no_training_loss():
    row = start_row({"val_loss": 0.5})
    assert math.isnan(row["loss"])
    assert (row["epoch"], row["step"], row["val_loss"]) == (0, 0, 0.5)
