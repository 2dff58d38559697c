"""Every setting of a training run, with its meaning, range and check."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from utils.config.field_types import fits, make_tuples, plain

Device = Literal["auto", "cuda", "cpu", "mps"]


@dataclass(frozen=True)
class StageConfig:
    """One of the stages of a run, see `TrainConfig.stages`.

    Attributes:
        epochs: how many it takes, 1 or more.
        frozen: blocks that are frozen, from the first, besides embeddings or stem; "all": everything but the head;
            "nothing".
        batch_size: images a step.
        input_shape: height and width in pixels, to begin with smaller images, which take less time; the positions of
            a ViT are resampled from stage to stage, so that pretrained ones lose in detail, and the best epoch is one
            of the last size. None: the run's, as the last stage's must be.

    Each stage begins with a new state of the optimizer, see `TrainConfig.thaw_warmup`.

    Raises:
        ValueError: a value can't work.
    """

    epochs: int
    frozen: int | Literal["all", "nothing"]
    batch_size: int = 32
    input_shape: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        make_tuples(self)
        for field in ("epochs", "batch_size"):
            value = getattr(self, field)
            if type(value) is not int or value < 1:
                raise ValueError(f"stages: {field}={value!r}: give a whole number from 1 up")
        if self.frozen not in ("all", "nothing") and not (type(self.frozen) is int and self.frozen >= 0):
            raise ValueError(f'stages: frozen={self.frozen!r}: give 0 or more, "all" or "nothing"')
        if self.input_shape is not None and not (fits(self.input_shape, tuple[int, int]) and min(self.input_shape) > 0):
            raise ValueError(f"stages: input_shape={self.input_shape!r}: give height and width in pixels, or None")


RANGES: dict[str, tuple[Callable[[Any], bool], tuple[str, ...]]] = {
    "give a number from 0 to below 1": (
        lambda value: 0 <= value < 1,
        ("drop_rate", "attn_drop_rate", "drop_path_rate", "momentum", "ema_decay", "label_smoothing"),
    ),
    "give a number above 0, at most 1": (
        lambda value: value is None or 0 < value <= 1,
        ("eval_crop", "train_crop", "layer_decay"),
    ),
    "give a number from 0 to 1": (
        lambda value: 0 <= value <= 1,
        ("horizontal_flip", "max_bad_fraction", "color_jitter", "random_erasing"),
    ),
    "give a whole number from 1 up": (
        lambda value: value >= 1,
        (
            *("freeze_batch_size", "unfreeze_batch_size", "unfreeze_epoch"),
            *("save_period", "max_pixels", "feature_views"),
        ),
    ),
    "give 0 or more": (
        lambda value: value >= 0,
        (
            *("freeze_epoch", "num_workers", "seed", "weight_decay", "feature_cache_gb", "patience", "thaw_warmup"),
            *("keep_periodic", "save_every_steps", "save_every_minutes", "clip_grad", "mixup", "cutmix"),
        ),
    ),
    'give 0 or more, or "all"': (lambda value: value == "all" or value >= 0, ("freeze_blocks",)),
    "give a number above 0": (lambda value: value > 0, ("init_lr",)),
    "give height and width in pixels": (lambda value: min(value) > 0, ("input_shape",)),
    "give three numbers above 0": (lambda value: value is None or min(value) > 0, ("image_std",)),
    "give auto, no, or a run's folder": (lambda value: value != "", ("resume",)),
    "give True, False, a file, or a name on the Hugging Face hub": (lambda value: value != "", ("pretrained",)),
}
"""For what holds of single fields: the remedy where it doesn't, the test, and the fields."""


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a run. `CONFIG` at the top of `train.py` sets those often edited; all but `stages` are flags too.

    Raises:
        ValueError: a value can't work; the message names field, value and remedy.
    """

    classes_path: str = "model_data/cls_classes.txt"
    """Class names, one a line; the line number is the class id. `txt_annotation.py` writes it."""

    train_annotation_path: str = "cls_train.txt"
    """List of the training images, one `class_id;path` a line. `txt_annotation.py` writes it."""

    val_annotation_path: str = "cls_val.txt"
    """List of the validation images, which choose the best epoch; never the test images."""

    recipe: Literal["none", "auto"] = "none"
    """`auto`: epochs, batch size, optimizer, learning rate, crops and the like are chosen by the number of images per
    class, by whether the network is a transformer and pretrained, and by the device; see `utils/config/recipe.py`. Each
    choice is printed with its reason. A field that you set to other than its default stays as it is. `none`: all is as
    it stands here."""

    keep: tuple[str, ...] = ()
    """Names of fields that `recipe` leaves alone though they are at their default, such as `freeze_train`."""

    backbone: str = "vit_b_16"
    """Network. For photos a ViT: vit_t_16, vit_s_16, vit_b_16, vit_l_16, vit_b_32, vit_l_32 or vit_h_14; with DINOv2's
    weights vit_s_14, vit_b_14 or vit_l_14; for fine detail, and slow, vit_s_8 or vit_b_8. Or another: resnet18, 34, 50,
    101 or 152; mobilenetv2; vgg11, 13 or 16, also with _bn; swin_transformer_tiny, _small or _base; or timm/<name>, any
    of timm's, if that is installed, whose head is a linear layer. For images of about 16 to 64 pixels: vit_xs_4,
    vit_t_4 or vit_s_4. Larger is slower and more accurate if there are images enough."""

    input_shape: tuple[int, int] = (224, 224)
    """Height and width in pixels that images are brought to, multiples of the network's patch. Larger shows finer
    detail; the time grows faster than the area."""

    pretrained: bool | str = False
    """Start from published weights. True: those of the backbone, from `model_data/`, else downloaded. Or others for the
    same network: a file, or a repository on the Hugging Face hub, such as "facebook/dinov2-small", with "@" and a
    revision to have the same again later. With fewer than some ten thousand images this decides how good the result
    is."""

    model_path: str = ""
    """Start from the weights in this file, whatever `pretrained` says: a checkpoint of Thaw, or a file of timm,
    torchvision, Hugging Face, Google or Meta, recognised by its tensors' names. Empty: don't."""

    resume: str = "auto"
    """What to go on with. `auto`: the newest run in `save_dir` with these settings that isn't finished, else a new one;
    so the same command started again goes on where it was cut off. `no`: a new run. A run's folder: that run."""

    accept_changed_lists: bool = False
    """Go on with a run though images were added, removed, renamed or relabelled in its lists since. It is then not
    what a run without interruption would have become."""

    activation: Literal["auto", "gelu_tanh", "gelu"] = "auto"
    """A ViT's GELU: by its tanh approximation, or exact. `auto`: as in the weights that training starts from;
    without any the approximation, bubbliiiing's. Touch it for weights that don't tell, such as bubbliiiing's under
    another file name than `vit-patch_16.pth`."""

    drop_rate: float = 0.1
    """Dropout in the network, 0 to below 1. Towards 0 for small networks, short runs and pretrained weights."""

    attn_drop_rate: float = 0.1
    """Dropout on the attention weights, 0 to below 1."""

    drop_path_rate: float = 0.1
    """Stochastic depth of the last block, rising from 0 at the first; 0 to below 1. Up to 0.4 for large networks."""

    freeze_train: bool = True
    """Train in two stages: with a frozen backbone up to `freeze_epoch`, then all of it. False: all of it from the
    start, without pretrained weights or with `head_init="probe"`."""

    freeze_epoch: int = 50
    """Epoch at which the backbone is thawed, at most `unfreeze_epoch`."""

    freeze_blocks: int | Literal["all"] = 8
    """How many blocks, from the first, are frozen in the first stage, besides embeddings or stem; "all": everything but
    the head. More is faster and safer with few images, fewer adapts better."""

    cache_features: bool = True
    """Compute what the frozen part makes of the images once, before the first stage, which then trains on that. With
    8 of 12 blocks frozen an epoch takes half the time, with "all" next to none. A stage with no more epochs than
    `feature_views` goes without."""

    feature_views: int = 4
    """How many views of each image that is: one as in evaluation, the others augmented; they take turns from epoch to
    epoch. 1 to about 10: more vary more, and each costs a pass over the images and its part of the file."""

    feature_cache_gb: float = 4.0
    """Features are held in memory up to this size, in GB; larger ones are read from their file in `cache_dir` when they
    are needed. About half of the memory that is free."""

    head_init: Literal["random", "probe"] = "random"
    """How the head begins. `probe`: as the logistic regression on the features of the backbone as it starts, its
    penalty chosen on the validation list; for pretrained weights, where it saves epochs and keeps the thawed backbone
    from being pulled about by a head that knows nothing (Kumar et al., 2022)."""

    freeze_batch_size: int = 32
    """Images a step while frozen. It takes less memory than thawed, so it can be larger; with "all" by far."""

    unfreeze_epoch: int = 100
    """Epochs in all. From pretrained weights 5 to 100, few with `head_init="probe"`; from scratch 300 and more."""

    unfreeze_batch_size: int = 32
    """Images a step once thawed. As large as memory takes; the learning rate follows it."""

    stages: tuple[StageConfig, ...] = ()
    """Stages of your own in the place of the two, to thaw bit by bit: `(StageConfig(5, "all"), StageConfig(5, 8),
    StageConfig(20, "nothing"))` trains 5 epochs of the head, 5 of four blocks of twelve, 20 of everything. The fields
    from `freeze_train` to `freeze_blocks`, the batch sizes and `unfreeze_epoch` then don't count. For pretrained
    weights that two stages spoil (Howard and Ruder, 2018); or to begin with smaller images, which take less time:
    `StageConfig(10, "nothing", 32, (160, 160))`. No flag: import `StageConfig` from here into train.py and set it in
    `CONFIG`."""

    patience: int = 0
    """End the run when the calibrated validation loss hasn't fallen for so many epochs of its last stage; 0: never.
    5 to 10. A run that ends early never reaches the low learning rates at the cosine's end, so where you know how many
    epochs it takes, give that many instead."""

    thaw_warmup: float = 0.0
    """Epochs over which the learning rate rises again, from a tenth, after each thaw; 0 or more. 0.5 to 2 where the
    loss jumps there: the optimizer knows nothing yet of what was just thawed."""

    optimizer_type: Literal["sgd", "adam", "adamw", "muon"] = "adamw"
    """`adamw` suits transformers, pretrained ones above all. `muon`, with `momentum` 0.95, for transformers from
    scratch: it learns more from each image, at a fifth more time a step (vit_xs_4 on 24 x 24 pixels of CIFAR-10: 71 %
    of the validation images after 4 epochs, adamw 57 % after 14). `sgd` (Nesterov) wants a learning rate ten to a
    hundred times as high."""

    init_lr: float = 1e-3
    """Highest learning rate, for 256 images a step (64 for networks that are not transformers): it is scaled by the
    batch size, kept within limits, and printed. Halve it if the loss jumps."""

    min_lr: float = 1e-5
    """Learning rate at the end, scaled likewise; usually `init_lr` / 100."""

    momentum: float = 0.9
    """SGD's and Muon's momentum, and beta1 of Adam and AdamW; 0 to below 1."""

    weight_decay: float = 0.05
    """Decay of the weights (not of biases, norms, learned tokens and positions). 0.05 with adamw, 5e-4 with sgd,
    0 with adam."""

    layer_decay: float = 1.0
    """Each layer's learning rate is that of the one above it times this, from the head down to the embeddings; above 0
    to 1. 0.65 to 0.85 for pretrained transformers: the early layers, which hardly need to change, then keep what they
    know. 1: all alike, for networks from scratch."""

    ema_decay: float = 0.0
    """Evaluate and save an exponential moving average of the weights, which keeps this part of itself at every step; 0
    to below 1. 0.99 to 0.9999, the more the more steps the run has; smooths the end of noisy runs. 0: none."""

    clip_grad: float = 0.0
    """Largest norm of the gradient, of all weights together; a longer one is shortened to it. 1 keeps runs that jump
    early on from losing what they know (Dosovitskiy et al., 2021, train so). 0: as long as it is."""

    lr_decay_type: Literal["cos", "step"] = "cos"
    """`cos`: warm-up, half a cosine, flat end. `step`: ten equal steps down."""

    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Arithmetic of the matrix products. `auto`: bf16 where the device has it in hardware (GPUs since Ampere) and, of
    processors with AVX512-BF16 or AMX, which are timed for a moment, where it is faster than fp32; it learns as well.
    Else fp16 with a loss scaler on GPUs since Volta; else fp32, whose products on GPUs since Ampere are TF32's. Touch
    it to compare, or if the loss isn't finite."""

    on_nan: Literal["stop", "skip"] = "stop"
    """What becomes of a step whose loss or gradient isn't finite. `stop`: the run stops and names its images. `skip`:
    it is left out, named and counted; each step then waits for the device, which costs a GPU some speed."""

    torch_compile: bool = False
    """Let torch compile the network first, which takes a minute or more a stage, and a C++ compiler. To be tried on
    long runs on a GPU, where it isn't measured yet; on a processor in fp32 it gained nothing (ViT-S/16, batch 16: 3.55
    s a step against 3.54, after 45 s)."""

    device: Device = "auto"
    """Where to train. `auto`: CUDA if there is one, else Apple's GPU (mps), else the processor."""

    letterbox_image: bool = False
    """How evaluation brings an image to `input_shape`. False: resize the short side and cut out the centre. True:
    show all of it, with grey (128) bars; for when what matters may lie at the border."""

    eval_crop: float | None = None
    """The part of each side that the centre crop keeps, above 0 to 1. None: as the weights that training starts from
    expect, else 0.875. 1 for images that fill their frame."""

    train_crop: float = 0.08
    """The least area that a random training crop keeps, above 0 to 1. Towards 1 if a crop can cut off what matters."""

    horizontal_flip: float = 0.5
    """Probability of mirroring a training image, 0 to 1. 0 where left and right matter: digits, letters, signs."""

    color_jitter: float = 0.0
    """Change brightness, contrast and saturation of training images at random, each by up to this part, 0 to 1. 0.2
    to 0.4 where light differs from image to image and `augmentation` is none."""

    augmentation: Literal["none", "autoaugment", "randaugment", "trivialaugment", "augmix"] = "autoaugment"
    """Random changes of training images, each a mix of colours, contrast, shear, rotation and the like.
    `autoaugment`: the policy found on ImageNet (Cubuk et al., 2019), and the fastest here. `randaugment`: two at a set
    strength (Cubuk et al., 2020). `trivialaugment`: one of any strength (Müller and Hutter, 2021). `augmix`: chains of
    them blended, for images that get worse in use (Hendrycks et al., 2020). `none` where colour or orientation tells
    the class."""

    random_erasing: float = 0.0
    """Probability that a box of a training image, of 2 to 33 % of its area, is made grey, 0 to 1. 0.25 where what
    matters is partly hidden at times (Zhong et al., 2020)."""

    label_smoothing: float = 0.0
    """The part of each label that is spread over all classes, 0 to below 1. 0.1 for long runs and where some labels are
    wrong: the network is then less sure of itself (Szegedy et al., 2016)."""

    mixup: float = 0.0
    """MixUp: training images are blended in pairs, in parts from a Beta distribution with this parameter, and so are
    their labels. 0.1 to 0.8, the more the longer the run (Zhang et al., 2018). A stage on cached features goes without.
    0: none."""

    cutmix: float = 0.0
    """CutMix: a box of each training image comes from another, and its part of the label. 1 for hundreds of epochs
    (Yun et al., 2019); with `mixup` besides, each step draws one of the two. A stage on cached features goes
    without. 0: none."""

    sampler: Literal["shuffle", "balanced"] = "shuffle"
    """`shuffle`: every training image once an epoch. `balanced`: every class equally often, the images of small
    classes several times. For when classes differ tenfold or more in size and each counts alike."""

    class_weights: Literal["none", "balanced"] = "none"
    """`balanced`: every class counts alike in the training loss, its images weighted by one over their number. The
    gentler of the two; use one of them. The validation loss, by which the best epoch is chosen, stays unweighted."""

    max_bad_fraction: float = 0.01
    """An image that can't be read while training is replaced by another of its class, and named at the epoch's end.
    Above this part of the list, 0 to 1, the run stops."""

    max_pixels: int = 100_000_000
    """Images that say they have more pixels are refused unread; raise it for larger ones, at four bytes a pixel."""

    allow_truncated: bool = False
    """Take what there is of files that end too early, the rest grey, instead of refusing them."""

    cache_images: bool = False
    """Shrink the training images once to what `input_shape` needs and keep them decoded in a file, which is made anew
    when images change. Loading is then three times as fast, and takes 0.4 MB of disk an image at 224 pixels.
    Small crops are a little softer: photos differ by two levels of 255 in the mean. For when the loader, not the
    network, is what the training waits for."""

    cache_dir: str = "cache"
    """Folder for what can be made again, such as that file. On a fast disk."""

    interpolation: Literal["auto", "bilinear", "bicubic"] = "auto"
    """How images are resized. `auto`: as the weights expect, else bilinear."""

    image_mean: tuple[float, float, float] | None = None
    """Mean of red, green and blue (0 to 1) that is subtracted. None: as the weights expect, else ImageNet's, 0.485
    0.456 0.406. Touch it for weights that don't tell (DeiT's have AugReg's names and ImageNet's mean)."""

    image_std: tuple[float, float, float] | None = None
    """Deviation of red, green and blue that is divided by. None: as the weights expect, else ImageNet's,
    0.229 0.224 0.225."""

    save_period: int = 10
    """Keep the checkpoint of every so many epochs by itself, besides the best and the last."""

    keep_periodic: int = 5
    """How many of those are kept, the newest; older ones are deleted. 0: none. Each has about 12 bytes a parameter."""

    save_every_steps: int = 0
    """Save the last checkpoint every so many steps too, not only after each epoch; 0: don't."""

    save_every_minutes: float = 10.0
    """Save it too when so many minutes have gone by, so that a power cut costs no more than these. 0:
    only after each epoch."""

    save_dir: str = "logs"
    """Folder that gets a folder for every run."""

    num_workers: int = 4
    """Processes that load images; 0: none besides the main one. About the number of cores beside a GPU (on Windows no
    more than 4, which are slow to start), half of them without one."""

    seed: int = 11
    """The same seed, config and lists give the same run."""

    def __post_init__(self) -> None:
        make_tuples(self)

        def check(field: str, holds: bool, remedy: str) -> None:
            if not holds:
                raise ValueError(f"{field}={getattr(self, field)!r}: {remedy}")

        for field, hint in get_type_hints(TrainConfig).items():
            literal = get_origin(hint) is Literal
            remedy = f"choose one of {', '.join(get_args(hint))}" if literal else f"give a value of the type {hint}"
            check(field, fits(getattr(self, field), hint), remedy)
        for remedy, (holds, fields) in RANGES.items():
            for field in fields:
                check(field, holds(getattr(self, field)), remedy)
        check(
            "class_weights",
            self.class_weights == "none" or self.sampler == "shuffle",
            "sampler is balanced already; set one of the two",
        )
        check(
            "min_lr",
            self.min_lr >= 0 and (self.recipe == "auto" or self.min_lr <= self.init_lr),
            f"give a number from 0 to init_lr ({self.init_lr})",
        )
        check(
            "freeze_epoch",
            not self.freeze_train or self.recipe == "auto" or self.freeze_epoch <= self.unfreeze_epoch,
            f"the backbone is thawed by unfreeze_epoch ({self.unfreeze_epoch}) at the latest; lower it or raise that",
        )
        unknown = set(self.keep) - {field.name for field in dataclasses.fields(self)}
        check("keep", not unknown, f"there is no field {', '.join(sorted(unknown))}")
        check(
            "stages",
            not self.stages or self.stages[-1].input_shape is None,
            "the last stage trains at input_shape; leave its own out",
        )

    @property
    def all_stages(self) -> tuple[StageConfig, ...]:
        """The stages in their order, those of `stages` or the two; none is without epochs, or without input shape."""
        if self.stages:
            return tuple(
                dataclasses.replace(stage, input_shape=stage.input_shape or self.input_shape) for stage in self.stages
            )
        frozen = self.freeze_epoch if self.freeze_train else 0
        both = (
            (frozen, self.freeze_blocks, self.freeze_batch_size),
            (self.unfreeze_epoch - frozen, "nothing", self.unfreeze_batch_size),
        )
        return tuple(StageConfig(*stage, self.input_shape) for stage in both if stage[0])

    @property
    def epoch_shapes(self) -> list[tuple[int, int]]:
        """The input shape of each epoch."""
        return [stage.input_shape for stage in self.all_stages for _ in range(stage.epochs)]

    def best_epoch(self, history: Sequence[Mapping[str, float]]) -> int:
        """The epoch, counted from 0, that is the best of these so far: the latest whose calibrated validation loss is
        within one standard error of the lowest, among the last ones with images of one size, as losses at other sizes
        don't compare.

        Learning rates fall, so later epochs are mostly better; one standard error of a loss is a convention, from
        Breiman et al., Classification and Regression Trees, 1984, section 3.4.3, for what the validation images,
        which may be few, must say to the contrary. Their rule takes the simplest tree within it, this one the longest
        trained network, mostly the last. The loss is that of calibrated answers, since a network goes on learning to
        tell classes apart when it has long grown too sure of itself, and that costs only the plain loss.
        """
        shapes = self.epoch_shapes[: len(history)]
        first = max((i + 1 for i, shape in enumerate(shapes) if shape != shapes[-1]), default=0)
        lowest = min(history[first:], key=lambda row: row["val_calibrated_loss"])
        most = lowest["val_calibrated_loss"] + lowest["val_calibrated_loss_error"]
        return max(i for i in range(first, len(history)) if history[i]["val_calibrated_loss"] <= most)

    @property
    def epochs(self) -> int:
        """Of the whole run."""
        return sum(stage.epochs for stage in self.all_stages)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> TrainConfig:
        """What `as_dict` gave.

        Raises:
            ValueError, TypeError, KeyError: it isn't that.
        """
        stages = tuple(StageConfig(**stage) for stage in values["stages"])
        return TrainConfig(**values | {"stages": stages})

    def as_dict(self) -> dict[str, Any]:
        """All fields as plain types, for JSON and checkpoints."""
        return plain(dataclasses.asdict(self))


# A run that goes on may have other values of these; all others decide what comes out of it.
FREE_FIELDS = frozenset(
    [
        *("resume", "accept_changed_lists", "on_nan", "max_bad_fraction", "num_workers", "device"),
        *("save_dir", "save_period", "save_every_steps", "save_every_minutes", "keep_periodic"),
        *("cache_dir", "feature_cache_gb"),
    ]
)
