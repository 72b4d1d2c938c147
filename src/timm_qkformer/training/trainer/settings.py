"""The settings of the trainer: names, types and defaults of timm's train.py, and some of our own.

A field of a group is a flag of the command line and a key of a recipe. This module imports neither torch nor timm.
"""

# ruff: noqa: RUF009 (`_o` gives a field, not a value that instances share)

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import NoneType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Option:
    """How a field of the settings is given on the command line and in a recipe."""

    name: str
    group: str  # title in the help
    default: Any  # value without flag and recipe
    help: str  # one line
    type: type  # int, float, str, bool (a switch) or dict (KEY=VALUE ...)
    is_list: bool = False  # takes several values
    length: int | None = None  # of a list; None for any
    choices: tuple[str, ...] | None = None  # allowed values
    metavar: str | None = None  # name of the value in the help
    const: str | None = None  # value of a flag that is given without one
    also: str | None = None  # another spelling of the flag
    positional: bool = False  # given without a flag


def _o(default: Any, text: str, **more: Any) -> Any:
    """A field with what its `Option` cannot know from its name and type."""
    more |= {"default": default, "help": text}
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=more)
    return field(default=default, metadata=more)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings of a run. Nothing changes them: what is derived from them is a value of its own."""

    # ---- data
    data: str | None = _o(None, "folder of the data; the same as --data-dir", metavar="DIR", positional=True)
    data_dir: str | None = _o(None, "folder of the data", metavar="DIR")
    dataset: str = _o("", "'' for folders of images, torch/NAME, hfds/NAME or events/NAME")
    train_split: str = _o("train", "split to train on")
    val_split: str = _o("validation", "split to validate on; '' for none")
    dataset_download: bool = _o(False, "let torchvision download torch/NAME")
    class_map: str = _o("", "file that maps class names to indices", metavar="FILE")
    input_img_mode: str | None = _o(None, "Pillow's mode of the images (RGB for 3 channels, else L)", metavar="MODE")
    input_key: str | None = _o(None, "column of the images in hfds/NAME", metavar="KEY")
    target_key: str | None = _o(None, "column of the labels in hfds/NAME", metavar="KEY")

    # ---- model
    model: str = _o("resnet50", "name of the model")
    pretrained: bool = _o(False, "start from the model's pretrained weights")
    pretrained_path: str | None = _o(None, "start from this file as if it were the pretrained weights", metavar="FILE")
    initial_checkpoint: str = _o("", "start from the weights of this checkpoint", metavar="FILE")
    resume: str = _o("", "resume from this checkpoint, or 'auto': from the newest one of the run", metavar="FILE")
    no_resume_opt: bool = _o(False, "resume without the optimizer's state")
    num_classes: int | None = _o(None, "number of classes")
    gp: str | None = _o(None, "kind of global pooling", metavar="POOL")
    img_size: int | None = _o(None, "side of the images", metavar="PIXELS")
    in_chans: int | None = _o(None, "channels of the input")
    input_size: list[int] | None = _o(None, "channels, height and width of the input", length=3)
    crop_pct: float | None = _o(None, "share of the image that validation crops", metavar="SHARE")
    mean: list[float] | None = _o(None, "mean of each channel, of images in 0 to 1", metavar="MEAN")
    std: list[float] | None = _o(None, "standard deviation of each channel", metavar="STD")
    interpolation: str = _o("", "how validation resizes")
    batch_size: int = _o(128, "batch of one process", also="-b")
    validation_batch_size: int | None = _o(None, "batch of one process in validation", also="-vb")
    channels_last: bool = _o(False, "channels-last memory format")
    grad_accum_steps: int = _o(1, "batches per update")
    grad_checkpointing: bool = _o(False, "recompute activations in the backward pass to save memory")
    fast_norm: bool = _o(False, "timm's fast layer norms")
    model_kwargs: dict[str, Any] = _o({}, "arguments of the model")
    head_init_scale: float | None = _o(None, "scale the classifier's initial weights")
    head_init_bias: float | None = _o(None, "initial bias of the classifier")
    torchcompile: str | None = _o(None, "torch.compile the model", metavar="BACKEND", const="inductor")
    torchcompile_mode: str | None = _o(None, "mode of torch.compile", metavar="MODE")

    # ---- device
    device: str = _o("auto", "device; auto is cuda if there is one, else cpu")
    amp: bool = _o(False, "mixed precision")
    amp_dtype: Literal["float16", "bfloat16"] = _o("float16", "dtype of mixed precision")
    model_dtype: Literal["float32", "float16", "bfloat16"] | None = _o(None, "dtype of the whole model")
    no_ddp_bb: bool = _o(False, "do not broadcast the model's buffers between processes")
    synchronize_step: bool = _o(False, "wait for the device after each update")
    local_rank: int = _o(0, "taken from the environment, as torchrun sets it", also="--local_rank")

    # ---- optimizer
    opt: str = _o("sgd", "optimizer, any of timm's")
    opt_eps: float | None = _o(None, "epsilon")
    opt_betas: list[float] | None = _o(None, "betas")
    momentum: float = _o(0.9, "momentum")
    weight_decay: float = _o(2e-05, "weight decay")
    clip_grad: float | None = _o(None, "clip gradients at this value")
    clip_mode: Literal["norm", "value", "agc"] = _o("norm", "what is clipped")
    layer_decay: float | None = _o(None, "factor of the learning rate from layer to layer")
    layer_decay_min_scale: float = _o(0.0, "smallest such factor")
    layer_decay_no_opt_scale: float | None = _o(None, "do not train layers with a factor below this")
    opt_kwargs: dict[str, Any] = _o({}, "arguments of the optimizer")

    # ---- learning rate
    sched: str = _o("cosine", "schedule, any of timm's")
    sched_on_updates: bool = _o(False, "change the learning rate at each update instead of each epoch")
    lr: float | None = _o(None, "learning rate; overrides --lr-base")
    lr_base: float = _o(0.1, "learning rate of a global batch of --lr-base-size")
    lr_base_size: int = _o(256, "see --lr-base")
    lr_base_scale: str = _o("", "growth with the batch: linear or sqrt ('': by optimizer)", metavar="KIND")
    lr_noise: list[float] | None = _o(None, "epochs, or shares of them, with a noisy learning rate")
    lr_noise_pct: float = _o(0.67, "largest noise")
    lr_noise_std: float = _o(1.0, "standard deviation of the noise")
    lr_cycle_mul: float = _o(1.0, "growth of a cycle's length")
    lr_cycle_decay: float = _o(0.5, "decay from cycle to cycle")
    lr_cycle_limit: int = _o(1, "number of cycles")
    lr_k_decay: float = _o(1.0, "k of k-decay")
    warmup_lr: float = _o(1e-05, "learning rate at the start of the warm-up")
    min_lr: float = _o(0.0, "smallest learning rate")
    epochs: int = _o(300, "epochs, without cool-down")
    start_epoch: int | None = _o(None, "start here, whatever the checkpoint says")
    decay_milestones: list[int] = _o([90, 180, 270], "epochs of decay (multistep)")
    decay_epochs: float = _o(90.0, "epochs between decays (step)", metavar="N")
    warmup_epochs: int = _o(5, "epochs of warm-up")
    warmup_prefix: bool = _o(False, "add the warm-up to --epochs")
    cooldown_epochs: int = _o(0, "epochs at the smallest learning rate, added to --epochs")
    patience_epochs: int = _o(10, "patience (plateau)")
    decay_rate: float = _o(0.1, "factor of a decay", also="--dr")

    # ---- augmentation and regularization
    no_aug: bool = _o(False, "no augmentation, whatever the rest says")
    train_crop_mode: str | None = _o(None, "timm's crop mode", metavar="MODE")
    scale: list[float] = _o([0.08, 1.0], "share of the area that is cropped")
    ratio: list[float] = _o([3.0 / 4.0, 4.0 / 3.0], "aspect ratio of the crop")
    hflip: float = _o(0.5, "probability of a horizontal flip", metavar="P")
    vflip: float = _o(0.0, "probability of a vertical flip", metavar="P")
    color_jitter: float = _o(0.4, "strength of colour jitter")
    color_jitter_prob: float | None = _o(None, "probability of colour jitter", metavar="P")
    grayscale_prob: float | None = _o(None, "probability of turning grey", metavar="P")
    gaussian_blur_prob: float | None = _o(None, "probability of a blur", metavar="P")
    aa: str | None = _o(None, "timm's auto-augment policy; for events snn-wide")
    aug_repeats: float = _o(0.0, "augmented copies of an image in one global batch", metavar="N")
    bce_loss: bool = _o(False, "binary cross-entropy")
    bce_sum: bool = _o(False, "sum it over the classes")
    bce_target_thresh: float | None = _o(None, "threshold of soft targets")
    bce_pos_weight: float | None = _o(None, "weight of positive targets")
    reprob: float = _o(0.0, "probability of random erasing", metavar="P")
    remode: str = _o("pixel", "what is put there", metavar="MODE")
    recount: int = _o(1, "erased regions")
    mixup: float = _o(0.0, "alpha of mixup")
    cutmix: float = _o(0.0, "alpha of CutMix")
    cutmix_minmax: list[float] | None = _o(None, "smallest and largest side of CutMix")
    mixup_prob: float = _o(1.0, "probability of mixup in a batch", metavar="P")
    mixup_switch_prob: float = _o(0.5, "probability of CutMix where both are on", metavar="P")
    mixup_mode: Literal["batch", "pair", "elem", "half"] = _o("batch", "mixup per batch, pair or elem")
    mixup_off_epoch: int = _o(0, "no mixup from this epoch on; 0 for never")
    smoothing: float = _o(0.1, "label smoothing")
    train_interpolation: str = _o("random", "how training resizes")
    drop: float = _o(0.0, "dropout", metavar="P")
    drop_path: float | None = _o(None, "stochastic depth", metavar="P")
    drop_block: float | None = _o(None, "DropBlock", metavar="P")

    # ---- batch norm
    bn_momentum: float | None = _o(None, "momentum")
    bn_eps: float | None = _o(None, "epsilon")
    sync_bn: bool = _o(False, "statistics over the batches of all processes")
    dist_bn: Literal["broadcast", "reduce", ""] = _o(
        "reduce", "what to do with the processes' running statistics after an epoch: broadcast, reduce or ''"
    )

    # ---- moving average of the weights
    model_ema: bool = _o(False, "keep a moving average of the weights")
    model_ema_force_cpu: bool = _o(False, "keep it on the CPU, and do not validate it")
    model_ema_decay: float = _o(0.9998, "its decay")
    model_ema_warmup: bool = _o(False, "let the decay grow at first")

    # ---- distillation
    kd_model_name: str | None = _o(None, "pretrained teacher whose logits are learned, too", metavar="NAME")
    distill_loss_weight: float | None = _o(None, "weight of the teacher's loss (1, or what the task's leaves)")
    task_loss_weight: float | None = _o(None, "weight of the labels' loss (1)")
    kd_temperature: float = _o(4.0, "temperature of both logits")

    # ---- run
    seed: int = _o(42, "seed of everything random")
    worker_seeding: Literal["all", "part"] = _o("all", "which random numbers are seeded in workers")
    log_interval: int = _o(50, "updates between two lines of the log")
    val_interval: int = _o(1, "epochs between validations, with a checkpoint each")
    recovery_interval: int = _o(0, "updates between checkpoints within an epoch; 0 for none")
    checkpoint_hist: int = _o(10, "best checkpoints to keep")
    workers: int = _o(4, "processes that load data", also="-j")
    pin_mem: bool = _o(False, "page-locked memory in the loaders")
    no_prefetcher: bool = _o(False, "normalize and do mixup in the main process")
    output: str = _o("", "folder of all runs (output/train)", metavar="DIR")
    experiment: str = _o("", "name of the run's own folder (time, model and size)")
    eval_metric: Literal["top1", "top5", "loss"] = _o("top1", "what the best checkpoint is best in")

    # ---- not in train.py
    on_error: Literal["raise", "skip"] = _o("raise", "unreadable image or recording: stop and name it, or take another")
    freeze: list[str] | None = _o(None, "modules not to train, such as stem stages.0", metavar="MODULE")
    crop_padding: int = _o(0, "crop images with so many mirrored pixels around, no --scale", metavar="N")
    class_weights: list[float] | None = _o(None, "weight of each class in the loss", metavar="WEIGHT")
    time_steps_random: list[int] | None = _o(None, "draw T from LOW to HIGH for each batch", length=2)
    time_steps_random_from: int = _o(0, "first epoch of such draws, T = 1 before", metavar="EPOCH")
    tet: float | None = _o(None, "share of the loss that is the mean of each time step's own (TET)", metavar="WEIGHT")
    tet_lambda: float = _o(0.0, "share of these that is the logits' mean square distance from 1", metavar="WEIGHT")
    firing_rate_penalty: float | None = _o(None, "price of the firing rate above the target", metavar="WEIGHT")
    firing_rate_target: float = _o(0.0, "firing rate that costs nothing", metavar="RATE")
    quantize_weights: bool = _o(False, "train, or measure, with weights rounded to 8 bits")
    tensorboard: bool | None = _o(None, "write TensorBoard files (where tensorboard is installed)")
    event_split_by: Literal["number", "time"] = _o("number", "frames of as many events each, or of as long a time each")
    event_sensor_size: list[int] | None = _o(None, "height and width of the camera, for events/folder", length=2)
    event_train_ratio: float = _o(0.9, "share of each class to train on, where events have no split of their own")
    event_split_seed: int | None = _o(
        None, "shuffle before such a split (default: in the order of names, as published)"
    )
    event_cache: str | None = _o(None, "folder to keep event frames in", metavar="DIR")

    @property
    def is_events(self) -> bool:
        """Whether the data set is one of events/..."""
        return self.dataset.lower().startswith("events/")

    @property
    def uses_mixup(self) -> bool:
        """Whether training uses mixup or CutMix."""
        return self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None

    @property
    def channels(self) -> int:
        """Channels of the model's input, as train.py decides; clips of events have 2."""
        if self.in_chans is not None:
            return self.in_chans
        return self.input_size[0] if self.input_size is not None else 2 if self.is_events else 3

    def given(self, *groups: str) -> dict[str, Any]:
        """The settings of these groups that are not the defaults."""
        options = [option for group in groups for option in OPTIONS.values() if option.group == group]
        return {o.name: getattr(self, o.name) for o in options if getattr(self, o.name) != o.default}


# The first field of each group of flags.
_GROUPS = {
    "data": "data",
    "model": "model",
    "device": "device",
    "opt": "optimizer",
    "sched": "learning rate",
    "no_aug": "augmentation and regularization",
    "bn_momentum": "batch norm",
    "model_ema": "moving average of the weights",
    "kd_model_name": "distillation",
    "seed": "run",
    "on_error": "not in train.py",
}
# Former names of settings, in flags, recipes and checkpoints.
ALIASES = {"round_weights": "quantize_weights"}


def current_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings under the names that they have now."""
    return {ALIASES.get(name, name): value for name, value in values.items()}


def _options() -> dict[str, Option]:
    metavars = {int: "N", float: "X", str: "NAME"}
    hints, group, options = get_type_hints(Settings), "", {}
    for f in fields(Settings):
        group = _GROUPS.get(f.name, group)
        kind, choices, is_list = hints[f.name], None, False
        if NoneType in get_args(kind):
            kind = Union[tuple(t for t in get_args(kind) if t is not NoneType)]
        if get_origin(kind) is list:
            is_list, (kind,) = True, get_args(kind)
        if get_origin(kind) is Literal:
            kind, choices = str, get_args(kind)
        kind = get_origin(kind) or kind
        metavar = "KEY=VALUE" if kind is dict else None if choices else metavars.get(kind)
        own = {"metavar": metavar, **f.metadata}
        options[f.name] = Option(f.name, group, type=kind, is_list=is_list, choices=choices, **own)
    return options


OPTIONS = _options()


def _refused(reason: str, **defaults: Any) -> dict[str, tuple[Any, str]]:
    return {name: (default, reason) for name, default in defaults.items()}


# train.py's remaining keys: (default, why not). Set to anything else they are refused.
UNSUPPORTED: dict[str, tuple[Any, str]] = {
    **_refused(
        "it is for data sets that are streamed, which cannot be resumed in the middle of an epoch",
        train_num_samples=None, val_num_samples=None, epoch_repeats=0.0,
    ),
    **_refused("code that comes with a data set is never run", dataset_trust_remote_code=False),
    **_refused("TorchScript's fusers do not apply, see --torchcompile", fuser=""),
    **_refused("TorchScript is not trained, see --torchcompile", torchscript=False),
    **_refused("no module is imported by name", device_modules=None),
    **_refused(
        "augmentation splits are not part of this trainer", aug_splits=0, jsd_loss=False, resplit=False, split_bn=False,
    ),
    **_refused("train.py does not use it either; --drop-path does what it says", drop_connect=None),
    **_refused("batches are not saved", save_images=False),
    **_refused("train.py's loaders make no such copies either", tta=0),
    **_refused("workers live on between epochs anyway", use_multi_epochs_loader=False),
    **_refused(
        "Weights & Biases is not written, TensorBoard files and summary.csv are",
        log_wandb=False, wandb_project=None, wandb_tags=[], wandb_resume_id="",
    ),
    **_refused(
        "batches of changing sizes are not part of this trainer",
        train_img_sizes=None, train_batch_sizes=None, train_size_probs=None, train_size_schedule="constant",
        train_size_schedule_spread=0.65, train_size_random_mix=0.1, train_batches_per_epoch=None,
        variable_batch_loss_scale="none",
    ),
    **_refused(
        "NaFlex needs models that take patches, spiking ones take whole images",
        naflex_loader=False, naflex_train_seq_lens=[128, 256, 576, 784, 1024], naflex_max_seq_len=576,
        naflex_patch_sizes=None, naflex_patch_size_probs=None, naflex_loss_scale="linear",
        naflex_patchify_channels_first=False,
    ),
    **_refused(
        "a teacher's logits alone are learned",
        kd_distill_type="logit", kd_loss_type="kl", kd_student_feature_dim=None, kd_teacher_feature_dim=None,
        kd_token_distill_type="soft",
    ),
}  # fmt: skip

# Options that say what is read and how it is seen: those of `validate`.
LOADED = (
    "data_dir", "dataset", "dataset_download", "class_map", "input_img_mode", "input_key", "target_key",
    "num_classes", "gp", "img_size", "in_chans", "input_size", "crop_pct", "mean", "std", "interpolation",
    "batch_size", "channels_last", "model_kwargs", "torchcompile", "torchcompile_mode",
    "device", "amp", "amp_dtype", "model_dtype", "pretrained", "workers", "pin_mem", "no_prefetcher",
    "on_error", "quantize_weights", "event_split_by", "event_sensor_size", "event_train_ratio",
    "event_split_seed", "event_cache",
)  # fmt: skip
