"""Write the lists for training from folders of images: `python txt_annotation.py`, see `--help`.

Images are in `datasets/train/<class>/`, with optional `datasets/val/` and `datasets/test/`, or in `datasets/<class>/`.
"""

import utils.system.startup  # noqa: F401, before torch

# isort: split

from utils.annotation.annotate import annotate
from utils.config.other_names import suggest_name
from utils.system import cli

if __name__ == "__main__":
    cli.run(annotate, optional_switches=("deep",), suggest=suggest_name, alone=True)
