"""Write the lists that training reads: `python txt_annotation.py`, see `--help`.

Pictures lie in `datasets/train/<class>/`, with optional `datasets/val/` and `datasets/test/`, or simply in
`datasets/<class>/`.
"""

import tyro

from utils.annotation import annotate

if __name__ == "__main__":
    tyro.cli(annotate)
