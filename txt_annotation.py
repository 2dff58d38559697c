"""Write the lists for training from folders of images: `python txt_annotation.py`, see `--help`.

Images are in `datasets/train/<class>/`, with optional `datasets/val/` and `datasets/test/`, or in `datasets/<class>/`.
"""

from utils.annotation.annotate import annotate
from utils.system import cli

if __name__ == "__main__":
    cli.run(annotate)
