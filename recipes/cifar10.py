"""Train a small ViT from scratch on CIFAR-10, 32 x 32 pixels. Time and accuracy are in `model_data/vit_xs_4.md`.

With CIFAR-10 in one folder per class under `datasets/train` and `datasets/test`, run
`python txt_annotation.py --val-fraction 0.04`, then `python -m recipes.cifar10`; the same command resumes.
"""

from __future__ import annotations

from typing import Annotated

import tyro

import train
from utils.config.other_names import suggest_name
from utils.config.train_config import OPTIONAL_SWITCHES, StageConfig, TrainConfig
from utils.system import cli

CONFIG = TrainConfig(
    backbone="vit_xs_4",  # 2.7 M parameters
    input_shape=(32, 32),
    drop_rate=0.0,
    attn_drop_rate=0.0,
    drop_path_rate=0.0,
    # An epoch at 24 x 24 pixels takes half the time of one at 32 x 32.
    stages=(StageConfig(40, "nothing", 128, (24, 24)), StageConfig(20, "nothing", 128)),
    thaw_warmup=0.5,
    optimizer_type="muon",
    momentum=0.95,
    init_lr=4e-3,  # per 256 images: 2e-3 at batch size 128
    min_lr=2e-5,
    weight_decay=0.05,
    ema_decay=0.999,
    clip_grad=1.0,
    label_smoothing=0.1,
    train_crop=0.5,
    eval_crop=1.0,
    horizontal_flip=0.5,
    augmentation="autoaugment",
    cache_images=True,
    num_workers=1,
    save_every_minutes=3,
)


def main(config: Annotated[TrainConfig, tyro.conf.arg(name="")] = CONFIG, summary: bool = False) -> None:
    """Train a small ViT from scratch on CIFAR-10.

    Args:
        config: the settings.
        summary: print all settings, the network and the stages, and exit.
    """
    train.main(config, summary=summary)


if __name__ == "__main__":
    cli.run(main, OPTIONAL_SWITCHES, suggest_name)
