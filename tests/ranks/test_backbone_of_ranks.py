"""Of several ranks one measures the backbones, and all train its choice."""

import json
import re
from pathlib import Path

from tests.ranks.conftest import train_ranks
from utils.annotation.annotate import annotate


def test_one_rank_measures_and_all_train_the_choice(two_classes, tmp_path):
    """Of the bundled weights: the other candidates have another GELU, or can't take 8 x 8 pixels."""
    annotate("datasets")
    changes = {"backbone": "auto", "pretrained": True, "activation": "gelu_tanh", "unfreeze_epoch": 1}
    status, output = train_ranks(2, changes, cwd=tmp_path)
    assert status == 0, output
    assert len(re.findall(r"^vit_xs_4 +100\.0%", output, flags=re.M)) == 1
    (run,) = Path("logs").iterdir()
    assert json.loads((run / "config.json").read_text())["backbone"] == "vit_xs_4"
    assert "not at hand" not in output
