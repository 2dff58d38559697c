"""Write the lists that training reads: `python txt_annotation.py`, see `--help`.

Images lie in `datasets/train/<class>/`, with optional `datasets/val/` and `datasets/test/`, or simply in
`datasets/<class>/`.
"""

from utils.annotation.annotate import annotate
from utils.system import cli

if __name__ == "__main__":
    cli.run(annotate)
