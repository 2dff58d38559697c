"""The settings of a training run, with their meaning and valid values."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal, get_args, get_origin, get_type_hints

from utils.config.frozen import Frozen
from utils.config.other_names import NamesChecked
from utils.config.setting import (
    ABOVE_0,
    ABOVE_0_TO_1,
    BELOW_1,
    FROM_0,
    FROM_1,
    SHARE,
    SIZE,
    Setting,
    Valid,
    has_type,
    is_file_name,
    lists_to_tuples,
    setting,
    to_plain,
)

AUTO = "auto"
"""As `TrainConfig.backbone`: chosen by measurement."""
Device = Literal["auto", "cuda", "cpu", "mps"]
Augmentation = Literal["none", "autoaugment", "randaugment", "trivialaugment", "augmix"]


@dataclass(frozen=True)
class StageConfig(NamesChecked):
    """One stage of a run, see `TrainConfig.stages`.

    Attributes:
        epochs: number of epochs, 1 or more.
        frozen: number of first blocks frozen, along with the stem or embeddings; "all": everything but the head;
            "nothing".
        batch_size: images per step.
        input_shape: height and width in pixels; None: the run's. Smaller images take less time. The position embedding
            of a ViT is resampled from stage to stage. The last stage must have the run's shape, and only its epochs can
            be the best one.

    Each stage starts with a new optimizer state, see `TrainConfig.thaw_warmup`.

    Raises:
        ValueError: a value is invalid.
    """

    epochs: int
    frozen: int | Literal["all", "nothing"]
    batch_size: int = 32
    input_shape: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        lists_to_tuples(self)
        for field in ("epochs", "batch_size"):
            value = getattr(self, field)
            if type(value) is not int or value < 1:
                raise ValueError(f"stages: {field}={value!r}: must be an integer of 1 or more")
        if not Frozen.is_valid(self.frozen):
            raise ValueError(f'stages: frozen={self.frozen!r}: must be 0 or more, "all" or "nothing"')
        shape = self.input_shape
        if shape is not None and not (has_type(shape, tuple[int, int]) and min(shape) > 0):
            raise ValueError(f"stages: input_shape={shape!r}: must be height and width in pixels, or None")


@dataclass(frozen=True)
class TrainConfig(NamesChecked):
    """The settings of a run. `CONFIG` at the top of `train.py` sets the common ones; every field but `stages` is also
    a flag.

    Fields that a recipe may choose default to None; `with_defaults` or the recipe fills them in.

    Raises:
        ValueError: a value is invalid; the message names the field, its value and the remedy.
    """

    # Data

    data: str = setting("", resumable=True)
    """Folder of a project, with its lists and its class file, as `txt_annotation.py --out` writes it, for several
    projects side by side. Empty: the lists are in the working folder, and the class file is in `model_data/`."""

    classes_path: str | None = None
    """File of class names, one per line; the line number is the class id. None: `cls_classes.txt` in `data`."""

    train_annotation_path: str | None = None
    """List of the training images, one `class_id;path` per line. None: `cls_train.txt` in `data`."""

    val_annotation_path: str | None = None
    """List of the validation images, which select the best epoch. Don't use the test images. None: `cls_val.txt` in
    `data`."""

    test_annotation_path: str | None = setting(None, resumable=True)
    """List of the test images. Training doesn't read it; a copy is kept in the run for `eval.py`. None: `cls_test.txt`
    in `data`, if there is one."""

    unlabeled: str = ""
    """Folder of images without labels, searched recursively. Those whose class the network in `distill_from` predicts
    with few errors (5 % of its validation images) are trained on with that class. Empty: none."""

    demo: bool = setting(False, resumable=True)
    """If there are no lists and no images in `datasets/`, train on handwritten digits, written to `demo/`."""

    # Recipe

    recipe: Literal["none", "auto"] = "none"
    """`auto`: epochs, batch size, optimizer, learning rate, crops and others are chosen by the number of images per
    class, the network, its weights and the device; see `utils/config/recipe.py`. What you set is never changed.
    `none`: fields that you don't set keep their defaults."""

    # Network

    backbone: str = "vit_b_16"
    """For photos a ViT: vit_t_16, vit_s_16, vit_b_16, vit_l_16, vit_b_32, vit_l_32, vit_h_14; with DINOv2 weights
    vit_s_14, vit_b_14, vit_l_14; for fine detail, but slow, vit_s_8, vit_b_8. Others: resnet18, 34, 50, 101, 152;
    mobilenetv2; vgg11, 13, 16, also with _bn; swin_transformer_tiny, _small, _base; `timm/<name>`: any timm network
    with a linear head. For images of 16 to 64 pixels: vit_xs_4, vit_t_4, vit_s_4. Larger networks are slower, but more
    accurate given enough images. `auto`, with `pretrained=True`: the best of several pretrained ones, measured on up to
    2,000 training images, see [recipe](recipe.md#the-backbone)."""

    backbone_minutes: float = setting(0.0, FROM_0)
    """With `backbone="auto"`: only networks whose training takes about this many minutes or less are chosen; 0: no
    limit."""

    input_shape: tuple[int, int] = setting((224, 224), SIZE, shapes_images=True)
    """Height and width in pixels that images are resized to, multiples of the patch size. Larger images show finer
    detail; the time grows faster than the area."""

    pretrained: bool | str = setting(
        False, Valid(lambda value: value != "", "must be True, False, a file, or a Hugging Face Hub repository")
    )
    """Start from published weights. True: those of the backbone, from `model_data/` or downloaded. Or a file, or a
    repository on the Hugging Face hub, such as "facebook/dinov2-small", with "@" and a revision to pin it. With fewer
    than ten thousand images this matters most."""

    model_path: str = ""
    """Start from the weights in this file, whatever `pretrained` says: a Thaw checkpoint, or a file of timm,
    torchvision, Hugging Face, Google or Meta, recognized by its tensor names. Empty: not used."""

    activation: Literal["auto", "gelu_tanh", "gelu"] = "auto"
    """GELU of a ViT: tanh approximation or exact. `auto`: as the weights need it; without weights the approximation, as
    in classification-pytorch. Set it if the weights don't specify it."""

    drop_rate: float | None = setting(0.1, BELOW_1, by_recipe=True)
    """Dropout in the network. Towards 0 for small networks, short runs and pretrained weights."""

    attn_drop_rate: float | None = setting(0.1, BELOW_1, by_recipe=True)
    """Dropout on the attention weights."""

    drop_path_rate: float | None = setting(0.1, BELOW_1, by_recipe=True)
    """Stochastic depth of the last block, rising from 0 at the first. Up to 0.4 for large networks."""

    head_init: Literal["random", "probe"] | None = setting("random", by_recipe=True)
    """Initial head. `probe`: logistic regression on the features of the pretrained backbone, its penalty chosen on the
    validation list. It saves epochs and protects the thawed backbone from the gradients of an untrained head (Kumar et
    al., 2022)."""

    distill_from: str = ""
    """Run folder or checkpoint of a teacher, such as a larger network trained on the same classes: half of the loss is
    how much the probabilities differ from the teacher's for the same image. For small networks; each step also takes a
    forward pass of the teacher. Empty: none."""

    refit_head: bool = False
    """After training, fit the head by logistic regression to the features of training and validation images, unless it
    is significantly worse without the latter. A gain with few images; not with more than 5,000 (or five of each class).
    Then only a test list shows how good the network is, since the validation images are trained on."""

    # Stages

    freeze_train: bool | None = setting(True, by_recipe=True)
    """Train in two stages: backbone frozen up to `freeze_epoch`, then thawed. False: train everything from the start,
    for runs without pretrained weights or with `head_init="probe"`."""

    freeze_epoch: int | None = setting(50, FROM_0, by_recipe=True)
    """Epoch at which the backbone is thawed, at most `unfreeze_epoch`."""

    freeze_blocks: int | Literal["all"] = setting(
        8, Valid(lambda value: value == "all" or value >= 0, 'must be 0 or more, or "all"')
    )
    """Number of first blocks frozen in the first stage, along with the stem or embeddings; "all": everything but the
    head. Freezing more is faster and overfits less; freezing fewer adapts better."""

    freeze_batch_size: int = setting(32, FROM_1)
    """Images per step while frozen. Can be larger than once thawed, much larger with "all"."""

    unfreeze_epoch: int | None = setting(100, FROM_1, by_recipe=True)
    """Number of epochs of the whole run. With pretrained weights 5 to 100, few with `head_init="probe"`; from scratch
    300 or more."""

    unfreeze_batch_size: int | None = setting(32, FROM_1, by_recipe=True)
    """Images per step once thawed. As large as memory allows; the learning rate is scaled with it."""

    epoch_repeats: int | None = setting(1, FROM_1, by_recipe=True)
    """How often an epoch goes over the training list. With a few dozen images, 10 to 50: more steps, without more
    validations and checkpoints."""

    stages: tuple[StageConfig, ...] = ()
    """Custom stages instead of these two: `(StageConfig(5, "all"), StageConfig(5, 8), StageConfig(20, "nothing"))`
    trains the head for 5 epochs, the head and all blocks after the eighth for 5, and everything for 20. `freeze_train`,
    `freeze_epoch`, `freeze_blocks`, `unfreeze_epoch` and the batch sizes are then ignored. For pretrained weights that
    two stages still damage (Howard and Ruder, 2018), or to start with smaller images: `StageConfig(10, "nothing", 32,
    (160, 160))`. Not a flag: import `StageConfig` into train.py and set it in `CONFIG`."""

    cache_features: bool = True
    """Compute the features of the frozen part once and train on them. With 8 of 12 blocks frozen an epoch takes half
    the time, with "all" hardly any. A stage with no more epochs than `feature_views` is trained on images."""

    feature_views: int = setting(4, FROM_1)
    """Number of views of each image that are cached: one as in evaluation, the others augmented; epochs cycle through
    them. Each costs a pass over the images and a file."""

    feature_cache_gb: float = setting(4.0, FROM_0, resumable=True)
    """Features up to this size, in GB, are held in memory; larger ones are read from their file in `cache_dir`. About
    half of the free memory."""

    patience: int = setting(0, FROM_0)
    """Stop when the calibrated validation loss hasn't fallen for this many epochs of the last stage; 0: never. Try 5 to
    10. A run that stops early doesn't reach the low learning rates at the end of the cosine."""

    thaw_warmup: float = setting(0.0, FROM_0)
    """Epochs over which the learning rate rises again, from a tenth, after each thaw. 0.5 to 2 if the loss jumps
    there, since the optimizer state is new."""

    # Optimizer

    optimizer_type: Literal["sgd", "adam", "adamw", "muon"] | None = setting("adamw", by_recipe=True)
    """`adamw` suits transformers, especially pretrained ones. `muon` (with `momentum` 0.95) is for transformers from
    scratch: it learns more from each image, at a fifth more time per step (vit_xs_4 on 24 x 24 pixels of CIFAR-10: 71 %
    of the validation images after 4 epochs; adamw 57 % after 14). `sgd` (Nesterov) needs a learning rate ten to a
    hundred times as high."""

    init_lr: float | None = setting(1e-3, ABOVE_0, by_recipe=True)
    """Peak learning rate, for 256 images per step (64 for networks that aren't transformers). It is scaled by the
    batch size and clamped to a range. Halve it if the loss jumps."""

    min_lr: float | None = setting(1e-5, FROM_0, by_recipe=True)
    """Learning rate at the end, scaled the same way; usually `init_lr` / 100."""

    momentum: float | None = setting(0.9, BELOW_1, by_recipe=True)
    """Momentum of SGD and Muon, beta1 of Adam and AdamW."""

    weight_decay: float = setting(0.05, FROM_0)
    """Weight decay (not of biases, norms, learned tokens and position embeddings). 0.05 with adamw, 5e-4 with sgd, 0
    with adam."""

    layer_decay: float | None = setting(1.0, ABOVE_0_TO_1, by_recipe=True)
    """Factor of the learning rate from each layer to the one below. 0.65 to 0.85 for pretrained transformers, whose
    early layers need little change. 1: the same rate for all layers."""

    ema_decay: float | None = setting(0.0, BELOW_1, by_recipe=True)
    """Decay of the exponential moving average (EMA) of the weights, which is evaluated and saved. 0.99 to 0.9999,
    higher for runs with more steps. 0: no EMA."""

    clip_grad: float | None = setting(0.0, FROM_0, by_recipe=True)
    """Maximum gradient norm over all weights; larger gradients are scaled down. 1 helps if the first steps are unstable
    (Dosovitskiy et al., 2021). 0: no limit."""

    lr_decay_type: Literal["cos", "step"] = "cos"
    """`cos`: warm-up, half a cosine, constant end. `step`: ten steps down by the same factor."""

    label_smoothing: float | None = setting(0.0, BELOW_1, by_recipe=True)
    """Share of each label that is spread over all classes. 0.1 for long runs and where some labels are wrong (Szegedy
    et al., 2016)."""

    class_weights: Literal["none", "balanced"] = "none"
    """`balanced`: the training loss of an image is weighted by one over the size of its class. Gentler than
    `sampler="balanced"`; use one of them. The validation loss, which selects the best epoch, stays unweighted."""

    on_nan: Literal["stop", "skip"] = setting("stop", resumable=True)
    """What happens when the loss or gradient of a step isn't finite. `stop`: the run stops and lists the images.
    `skip`: the step is skipped, reported and counted; every step then waits for the device, which costs speed on a
    GPU."""

    # Processes

    parts: int | None = setting(1, FROM_1, by_recipe=True)
    """Micro-batches of each global batch, whose gradients are added in a fixed order; batch norm and mixing see one
    at a time. On a CPU, the result of a run depends on this number, but not on the number of processes, which can be up
    to it."""

    reduce: Literal["auto", "exact", "fast"] = "auto"
    """How processes add their gradients. `exact`: in an order that doesn't depend on their number. `fast`: by torch's
    DistributedDataParallel, while the rest is still computed; batch norm sees the whole batch on GPUs. `auto`: exact on
    a CPU, fast on a GPU."""

    shard: Literal["auto", "yes", "no"] = "auto"
    """Whether processes divide weights, gradients and optimizer state between them (FSDP), and not only the images.
    `auto`: if a GPU has too little memory for them. Slower; cached features aren't used, and not with `muon` or
    fp16."""

    # Images

    train_crop: float | None = setting(0.08, ABOVE_0_TO_1, by_recipe=True, shapes_images=True)
    """Smallest area of a random training crop, as a share of the image. Towards 1 if a crop can cut off what
    matters."""

    eval_crop: float | None = setting(None, ABOVE_0_TO_1, shapes_images=True)
    """Share of each side that the center crop of evaluation keeps. None: as the weights expect, else 0.875. 1 if
    the subject fills the frame."""

    letterbox_image: bool = setting(False, shapes_images=True)
    """How evaluation fits an image into `input_shape`. False: resize the short side and crop the center. True: keep
    the whole image, padded with gray (128), if what matters may be at the border."""

    horizontal_flip: float = setting(0.5, SHARE, shapes_images=True)
    """Probability of mirroring a training image. 0 where left and right matter: digits, letters, signs."""

    color_jitter: float = setting(0.0, SHARE, shapes_images=True)
    """Strength of random changes of brightness, contrast and saturation. 0.2 to 0.4 where lighting varies and
    `augmentation` is none."""

    augmentation: Augmentation | None = setting("autoaugment", by_recipe=True, shapes_images=True)
    """Random changes of training images: colors, contrast, shear, rotation and others. `autoaugment`: the ImageNet
    policy (Cubuk et al., 2019), the fastest here. `randaugment`: two operations of fixed strength (Cubuk et al., 2020).
    `trivialaugment`: one of any strength (Müller and Hutter, 2021). `augmix`: mixed chains, if images in use are
    worse than in training (Hendrycks et al., 2020). `none` where color or orientation decides the class."""

    random_erasing: float = setting(0.0, SHARE, shapes_images=True)
    """Probability that a box of 2 to 33 % of a training image is made gray. 0.25 where objects may be partly
    hidden (Zhong et al., 2020)."""

    mixup: float = setting(0.0, FROM_0)
    """MixUp (Zhang et al., 2018): parameter of the Beta distribution of the share by which images and labels are mixed.
    0.1 to 0.8, higher for longer runs. Not applied to cached features. 0: off."""

    cutmix: float = setting(0.0, FROM_0)
    """CutMix (Yun et al., 2019): a box of each image and a share of its label come from another. 1 for hundreds of
    epochs. With `mixup` too, each step draws one of the two. Not applied to cached features. 0: off."""

    sampler: Literal["shuffle", "balanced"] | None = setting("shuffle", by_recipe=True)
    """`shuffle`: every training image once per epoch. `balanced`: every class equally often, images of small classes
    several times; for class sizes that differ tenfold or more."""

    interpolation: Literal["auto", "bilinear", "bicubic"] = setting("auto", shapes_images=True)
    """How images are resized. `auto`: as the weights expect, else bilinear."""

    image_mean: tuple[float, float, float] | None = setting(None, shapes_images=True)
    """Mean of red, green and blue (0 to 1) that is subtracted. None: as the weights expect, else ImageNet's, 0.485
    0.456 0.406."""

    image_std: tuple[float, float, float] | None = setting(
        None, Valid(lambda value: min(value) > 0, "must be three numbers above 0"), shapes_images=True
    )
    """Standard deviation of red, green and blue that is divided by. None: as the weights expect, else ImageNet's, 0.229
    0.224 0.225."""

    # Reading images

    max_bad_fraction: float = setting(0.01, SHARE, resumable=True, shapes_images=True)
    """Training images that can't be read are replaced by others of their class and listed after the epoch. Above this
    share of the list the run stops."""

    max_pixels: int = setting(100_000_000, FROM_1, shapes_images=True)
    """Largest number of pixels of a decoded image. Decoding may take 15 bytes for each; images that take more, such as
    those with alpha and JPEG 2000, may have fewer pixels, see [data](data.md#damaged-and-hostile-images). A larger
    JPEG, such as a phone's of 200 megapixels, is decoded at 1/2, 1/4 or 1/8 of its size, unless it is progressive.
    Other images with more pixels are refused before they are decoded."""

    allow_truncated: bool = setting(False, shapes_images=True)
    """Read files that end too early or are damaged, their missing part gray, instead of refusing them."""

    cache_images: bool = setting(False, shapes_images=True)
    """Keep the training images decoded, and shrunk to what `input_shape` needs, in a file that is rebuilt when
    images change. Loading is three times as fast and takes 0.4 MB of disk per image at 224 pixels; small crops are a
    little softer. For runs that wait for the loader."""

    cache_dir: str = setting("cache", resumable=True)
    """Folder for caches, which can be rebuilt. Use a fast disk."""

    num_workers: int = setting(4, FROM_0, resumable=True)
    """Processes that load images; 0: only the main one. About the number of cores with a GPU (on Windows at most 4),
    half of them without."""

    # Device

    device: Device = setting("auto", resumable=True)
    """Where to train. `auto`: CUDA if there is a GPU, else Apple's GPU (mps), else the CPU."""

    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Precision of matrix products. `auto`: bf16 on GPUs that have it in hardware (since Ampere) and on CPUs where a
    short test finds it faster than fp32; else fp16 with a loss scaler on GPUs since Volta; else fp32 (TF32 on GPUs
    since Ampere). Set it to compare, or if the loss isn't finite."""

    torch_compile: bool = False
    """Compile the network with torch.compile, which takes a minute or more per stage and a C++ compiler. For long runs
    on a GPU, where it isn't measured yet; on a CPU in fp32 it gained nothing (ViT-S/16, batch 16: 3.55 s per step
    against 3.54)."""

    # The run

    save_dir: str = setting("logs", resumable=True)
    """Parent of the run folders."""

    name: str = setting("", Valid(is_file_name, "must be letters, digits, - and _, at most 100"))
    """Name of the run, appended to its folder's name. `python eval.py --list` shows all runs."""

    resume: str = setting("auto", Valid(lambda value: value != "", "must be auto, no, or a run folder"), resumable=True)
    """`auto`: resume the newest unfinished run in `save_dir` with these settings, else start a new one; rerunning
    the same command resumes. `no`: start a new run. A run folder: resume that run."""

    accept_changed_lists: bool = setting(False, resumable=True)
    """Resume a run even if its lists have changed. The result isn't that of an uninterrupted run."""

    save_period: int = setting(10, FROM_1, resumable=True)
    """Keep a checkpoint every this many epochs, besides the best and the last."""

    keep_periodic: int = setting(5, FROM_0, resumable=True)
    """Number of periodic checkpoints to keep; older ones are deleted. Each takes about 12 bytes per parameter."""

    divide_checkpoints: Literal["auto", "yes", "no"] = setting("auto", resumable=True)
    """Whether each process writes its share of the tensors of a checkpoint into a folder beside it, instead of process
    0 all of them into one file. `auto`: with several processes and over 2 billion parameters. The best checkpoint of a
    finished run is one file in any case."""

    save_every_steps: int = setting(0, FROM_0, resumable=True)
    """Also save the last checkpoint every this many steps; 0: only after each epoch."""

    save_every_minutes: float = setting(10.0, FROM_0, resumable=True)
    """Also save it every this many minutes; 0: only after each epoch."""

    seed: int = setting(11, FROM_0, shapes_images=True)
    """The same seed, config and lists give the same run."""

    def __post_init__(self) -> None:
        lists_to_tuples(self)
        for field in SETTINGS:
            check_value(field, getattr(self, field))
        self._check_pairs()

    def _check(self, field: str, holds: bool, remedy: str) -> None:
        if not holds:
            raise ValueError(f"{field}={getattr(self, field)!r}: {remedy}")

    def _check_pairs(self) -> None:
        """Check combinations of values; fields that are still None are checked once they have a value."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        if self.recipe == "none":
            given = PLAIN_DEFAULTS | given
        self._check(
            "class_weights",
            self.class_weights == "none" or given.get("sampler") != "balanced",
            'sampler is already "balanced"; set only one of them',
        )
        init_lr = given.get("init_lr", float("inf"))
        self._check("min_lr", given.get("min_lr", 0) <= init_lr, f"must be between 0 and init_lr ({init_lr})")
        epochs = given.get("unfreeze_epoch", float("inf"))
        self._check(
            "freeze_epoch",
            not given.get("freeze_train", True) or given.get("freeze_epoch", 0) <= epochs,
            f"must be at most unfreeze_epoch ({epochs}); lower it, or raise unfreeze_epoch",
        )
        self._check(
            "backbone",
            self.backbone != AUTO or (self.pretrained is True and not self.model_path),
            "chooses among published weights; set pretrained to True and leave model_path empty, or name a backbone",
        )
        self._check(
            "stages",
            not self.stages or self.stages[-1].input_shape is None,
            "the last stage trains at the run's input_shape; remove its own",
        )

    def with_defaults(self, **chosen: Any) -> TrainConfig:
        """A copy with `chosen`, and the plain default in every field that is None."""
        unset = {name: value for name, value in PLAIN_DEFAULTS.items() if getattr(self, name) is None}
        return dataclasses.replace(self.with_paths(), **unset | {"recipe": "none"} | chosen)

    def with_paths(self) -> TrainConfig:
        """A copy in which lists and class file that aren't set are those of the project `data`."""
        paths = project_files(self.data)
        return dataclasses.replace(self, **{field: getattr(self, field) or path for field, path in paths.items()})

    @property
    def leaves_choices(self) -> bool:
        """Whether the program chooses settings when a run starts: by the recipe, or the backbone."""
        return AUTO in (self.recipe, self.backbone)

    @property
    def all_stages(self) -> tuple[StageConfig, ...]:
        """The stages in order, `stages` or frozen and thawed; each has an input shape and at least one epoch."""
        if self.stages:
            return tuple(
                dataclasses.replace(stage, input_shape=stage.input_shape or self.input_shape) for stage in self.stages
            )
        frozen = self.freeze_epoch if self.freeze_train else 0
        two_stages = (
            (frozen, self.freeze_blocks, self.freeze_batch_size),
            (self.unfreeze_epoch - frozen, "nothing", self.unfreeze_batch_size),
        )
        return tuple(StageConfig(*stage, self.input_shape) for stage in two_stages if stage[0])

    @property
    def epoch_shapes(self) -> list[tuple[int, int]]:
        """The input shape of each epoch."""
        return [stage.input_shape for stage in self.all_stages for _ in range(stage.epochs)]

    @property
    def epochs(self) -> int:
        """Number of epochs of the whole run."""
        return sum(stage.epochs for stage in self.all_stages)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> TrainConfig:
        """The config from the dict returned by `as_dict`.

        Raises:
            ValueError, TypeError, KeyError: `values` isn't such a dict.
        """
        stages = tuple(StageConfig(**stage) for stage in values["stages"])
        return TrainConfig(**upgrade(values) | {"stages": stages})

    def as_dict(self) -> dict[str, Any]:
        """All fields as plain types, for JSON and checkpoints."""
        return to_plain(dataclasses.asdict(self))


SETTINGS: dict[str, Setting] = {
    field.name: field.metadata.get("setting", Setting(None, field.default, False, False, False))
    for field in dataclasses.fields(TrainConfig)
}
"""The metadata of each field, by name."""
PLAIN_DEFAULTS = {name: spec.plain for name, spec in SETTINGS.items() if spec.by_recipe}
"""The defaults, without a recipe, of the fields that a recipe may choose."""
RESUMABLE_FIELDS = frozenset(name for name, spec in SETTINGS.items() if spec.resumable)
IMAGE_FIELDS = tuple(name for name, spec in SETTINGS.items() if spec.shapes_images)


@functools.cache
def field_types() -> dict[str, Any]:
    """The type of each field."""
    return get_type_hints(TrainConfig)


OPTIONAL_SWITCHES = [name for name, hint in field_types().items() if hint is not bool and has_type(True, hint)]
"""Fields that take True, False and something else, see `utils.system.cli.expand_switches`."""


def check_value(field: str, value: Any) -> None:
    """Raise a ValueError if `value` isn't valid in `field`."""
    hint, valid = field_types()[field], SETTINGS[field].valid
    literals = [option for option in _options(hint) if option is not None]
    remedy = f"must be one of {', '.join(literals)}" if literals else f"must be of type {hint}"
    if not has_type(value, hint):
        raise ValueError(f"{field}={value!r}: {remedy}")
    if valid and value is not None and not valid.test(value):
        raise ValueError(f"{field}={value!r}: {valid.remedy}")


def check_saved(values: Mapping[str, Any]) -> None:
    """Raise a ValueError if a value of `TrainConfig.as_dict` isn't valid. Fields of other versions aren't checked."""
    for field in values.keys() & SETTINGS.keys():
        if field != "stages":
            check_value(field, values[field])
        elif not has_type(values[field], list[dict[str, Any]]):
            raise ValueError(f"stages={values[field]!r:.60}: must be a list of stages")
    try:
        for stage in values.get("stages", []):
            StageConfig(**stage)
    except TypeError as error:
        raise ValueError(f"stages={values['stages']!r:.60}: {error}") from error


def _options(hint: Any) -> tuple[Any, ...]:
    """The values of a `Literal` or an optional `Literal`; () for other types."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    kinds = [kind for kind in get_args(hint) if kind is not type(None)]
    return _options(kinds[0]) if len(kinds) == 1 else ()


PROJECT_FILES = {
    "classes_path": "cls_classes.txt",
    "train_annotation_path": "cls_train.txt",
    "val_annotation_path": "cls_val.txt",
    "test_annotation_path": "cls_test.txt",
}
"""The files of a project, by the field that can set another path."""


def project_files(folder: str) -> dict[str, str]:
    """The paths of a project's files by field; "": the working folder, with the class file in model_data/."""
    paths = {field: (PurePath(folder) / name).as_posix() for field, name in PROJECT_FILES.items()}
    return paths if folder else paths | {"classes_path": f"model_data/{PROJECT_FILES['classes_path']}"}


def upgrade(values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert settings that an earlier version saved.

    In it, fields at their default counted as not set, except those listed in `keep`.
    """
    values = dict(values)
    kept = values.pop("keep", None)
    if kept is not None and values.get("recipe") == "auto":
        unset = [name for name, plain in PLAIN_DEFAULTS.items() if values.get(name) == plain and name not in kept]
        values |= dict.fromkeys(unset)
    return values
