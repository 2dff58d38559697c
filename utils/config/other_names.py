"""The names that users of other projects know, and what they are called here."""

from __future__ import annotations

import difflib
from collections.abc import Collection

SPLIT = "images and lists are those of txt_annotation.py, see docs/data.md"
STEPWISE = "the schedule is set by lr_decay_type, init_lr and min_lr"
AUGMENT = "choose among augmentation, horizontal_flip, train_crop, color_jitter and random_erasing"
MODEL_SIZE = "images are resized to what the model was trained on"
ALWAYS = "this is always done"

ROWS: tuple[tuple[str, tuple[str, ...]], ...] = (
    # length of training
    ("epochs epoch e n_epoch n_epochs num_epochs max_epochs", ("unfreeze_epoch",)),
    ("init_epoch start_epoch initial_epoch last_epoch", ("resume",)),
    ("freeze_epochs frozen_epochs", ("freeze_epoch",)),
    ("freeze freeze_layers frozen", ("freeze_blocks",)),
    ("early_stopping early_stop patience_epochs", ("patience",)),
    ("warmup_epochs warmup warmup_lr warmup_steps warmup_ratio", ("thaw_warmup",)),
    ("cooldown_epochs decay_epochs step_size gamma pct_start sched", (STEPWISE,)),
    ("cos_lr scheduler lr_scheduler lr_schedule", ("lr_decay_type",)),
    # images per step
    ("batch batch_size bs b train_batch_size", ("unfreeze_batch_size", "batch_size")),
    ("val_batch_size validation_batch_size eval_batch_size", ("batch_size",)),
    ("grad_accum_steps accumulate gradient_accumulation_steps accumulate_grad_batches", ("parts",)),
    # learning rate and optimizer
    ("lr lr0 learning_rate base_lr lr_base lr_max blr", ("init_lr",)),
    ("lrf lr_min final_lr eta_min", ("min_lr",)),
    ("lr_find lr_finder auto_lr_find", ("find_lr",)),
    ("opt optim optimizer", ("optimizer_type",)),
    ("wd decay", ("weight_decay",)),
    ("clip grad_clip clip_grad_norm clipnorm gradient_clip_val", ("clip_grad",)),
    ("ema model_ema model_ema_decay", ("ema_decay",)),
    # network
    ("model m arch a architecture network net cfg", ("backbone", "model_path")),
    ("weights w checkpoint ckpt ckpt_path initial_checkpoint finetune pth load_weights", ("model_path",)),
    ("run run_dir logdir", ("model_path",)),
    ("imgsz img img_size image_size input_size size resolution", ("input_shape", MODEL_SIZE)),
    ("dropout drop drop_out", ("drop_rate",)),
    ("drop_path stochastic_depth", ("drop_path_rate",)),
    (
        "num_classes nc n_classes classes n_out class_names",
        ("the classes are those of model_data/cls_classes.txt, which txt_annotation.py writes",),
    ),
    # loss and augmentation
    ("smoothing smooth", ("label_smoothing",)),
    ("class_weight weighted_loss pos_weight", ("class_weights",)),
    ("weighted_sampler image_weights oversample", ("sampler",)),
    ("aa auto_augment autoaugment randaugment trivialaugment", ("augmentation",)),
    ("hflip fliplr", ("horizontal_flip",)),
    ("scale crop_scale", ("train_crop",)),
    ("crop_pct crop", ("eval_crop",)),
    ("reprob erasing random_erase", ("random_erasing",)),
    ("hsv_h hsv_s hsv_v jitter", ("color_jitter",)),
    ("vflip flipud ratio degrees translate shear mosaic no_aug", (AUGMENT,)),
    ("item_tfms batch_tfms transforms transform", (AUGMENT,)),
    ("mean image_means", ("image_mean",)),
    ("std image_stds", ("image_std",)),
    ("letterbox rect", ("letterbox_image",)),
    # device and precision
    ("cuda gpu gpus train_gpu accelerator no_cuda", ("device",)),
    ("amp fp16 bf16 half native_amp mixed_precision dtype int8", ("precision",)),
    ("torchcompile compile", ("torch_compile",)),
    ("workers j num_worker n_workers dataloader_workers", ("num_workers",)),
    ("channels_last pin_mem pin_memory verbose plots shuffle val", (ALWAYS,)),
    ("distributed local_rank world_size multi_gpu", ("start it with torchrun, see docs/distributed.md",)),
    ("sync_bn", ("reduce",)),
    ("deterministic random_seed random_state manual_seed", ("seed",)),
    ("nan detect_anomaly", ("on_nan",)),
    # data
    ("cache", ("cache_images",)),
    ("data data_dir data_path dataset datasets dir path root train_dir", ("data", "paths", "datasets_path", SPLIT)),
    ("train_split train annotation_path train_list", ("train_annotation_path",)),
    ("val_list val_dir", ("val_annotation_path", "data")),
    ("test test_dir test_list", ("test_annotation_path", "data", SPLIT)),
    ("valid_pct validation_split val_split val_size val_ratio", ("val_fraction", SPLIT)),
    ("test_split test_size test_ratio test_pct", ("test_fraction", SPLIT)),
    ("groups group group_by", ("group_regex",)),
    ("folds kfold k_fold n_splits cv", ("cross_validate",)),
    ("classes_file names labels class_file class_map", ("classes_path",)),
    # the run and its files
    ("project output output_dir out_dir log_dir save_path", ("save_dir", "out", "save")),
    ("o dst destination", ("out", "save")),
    ("experiment exp_name run_name", ("name", "save_dir")),
    ("exist_ok overwrite", ("every run has a folder of its own in save_dir",)),
    ("resume_from auto_resume resume_training continue_training", ("resume",)),
    ("checkpoint_hist save_total_limit", ("keep_periodic",)),
    ("save_interval checkpoint_interval save_freq save_epoch", ("save_period",)),
    ("log_interval eval_metric callbacks cbs metrics", ("see docs/metrics.md",)),
    ("info dry_run", ("summary",)),
    # prediction and export
    ("source image images i input img_path image_path file files", ("paths", "data", SPLIT)),
    ("topk k top", ("top_k",)),
    ("conf conf_thres confidence threshold thres", ("reject_below",)),
    ("save_txt save_csv csv_path", ("csv",)),
    ("save_json output_json", ("json",)),
    ("show view visualize", ("save",)),
    ("gradcam grad_cam cam heatmap", ("explain",)),
    ("augment tta_views", ("tta", "augmentation")),
    ("include export_format onnx", ("format",)),
    ("opset dynamic simplify", ("the file has a dynamic batch size, see docs/export.md",)),
)
"""Names in ultralytics, timm, fastai, Keras and classification-pytorch. For each row those of Thaw, of which the first
that a script has counts, or a sentence."""
OTHER_NAMES = {other: answers for others, answers in ROWS for other in others.split()}


def suggest_name(name: str, known: Collection[str]) -> str:
    """What to use in place of `name`: one of the `known` names, or a sentence; empty if nothing is near."""
    key = name.replace("-", "_").lower()
    for answer in OTHER_NAMES.get(key, ()):
        if answer in known or " " in answer:
            return answer
    folded = {other.lower(): other for other in known}  # classification-pytorch writes Init_lr
    near = difflib.get_close_matches(key.removeprefix("no_"), folded, n=1, cutoff=0.7)
    return folded[near[0]] if near else ""


class NamesChecked:
    """A base class of dataclasses: an unknown keyword is a ValueError that names the field to use."""

    def __new__(cls, *args: object, **values: object) -> NamesChecked:
        known = cls.__dataclass_fields__
        for name, value in values.items():
            if name not in known:
                answer = suggest_name(name, known)
                remedy = f"use {answer}" if answer in known else answer or "docs/settings.md lists them"
                raise ValueError(f"{name}={value!r}: {cls.__name__} has no such field; {remedy}")
        return super().__new__(cls)
