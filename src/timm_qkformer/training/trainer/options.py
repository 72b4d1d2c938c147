"""The command line of the trainer: names, types and defaults of timm's train.py, some of our own besides.

A table, not a parser: recipes are checked against it, too. It is read without importing torch or timm.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional, Union

__all__ = ["LOADED", "OPTIONS", "OURS", "UNSUPPORTED", "Option", "add_train_arguments", "add_validate_arguments"]


@dataclass(frozen=True)
class Option:
    """One option, as a flag and as a key of a recipe.

    Attributes:
        flags: Names on the command line.
        default: Value without flag and recipe.
        help: One line.
        type: int, float, str, bool (a switch) or dict (KEY=VALUE ...).
        nargs: Number of values, "+" or "?"; None for exactly one.
        const: Value of a flag without one (`nargs="?"`).
        choices: Allowed values.
        metavar: Name of the value in the help.
    """

    flags: tuple[str, ...]
    default: Any
    help: str
    type: type = str
    nargs: Union[int, str, None] = None
    const: Any = None
    choices: Optional[tuple[str, ...]] = None
    metavar: Optional[str] = None

    @property
    def name(self) -> str:
        """Key in a recipe: the long flag with underscores."""
        long = next(flag for flag in self.flags if flag.startswith("--")) if self.flags[0] != "data" else "--data"
        return long.lstrip("-").replace("-", "_")


def _o(flags: str, default: Any, text: str, kind: type = str, **kwargs: Any) -> Option:
    return Option(tuple(flags.split()), default, text, kind, **kwargs)


def _switch(flag: str, text: str) -> Option:
    return Option((flag,), False, text, bool)


OPTIONS: dict[str, tuple[Option, ...]] = {
    "data": (
        _o("data", None, "folder of the data; the same as --data-dir", nargs="?", metavar="DIR"),
        _o("--data-dir", None, "folder of the data", metavar="DIR"),
        _o("--dataset", "", "'' for folders of images, torch/NAME, hfds/NAME or events/NAME", metavar="NAME"),
        _o("--train-split", "train", "split to train on", metavar="NAME"),
        _o("--val-split", "validation", "split to validate on; '' for none", metavar="NAME"),
        _switch("--dataset-download", "let torchvision download torch/NAME"),
        _o("--class-map", "", "file that maps class names to indices", metavar="FILE"),
        _o("--input-img-mode", None, "Pillow's mode of the images (RGB for 3 channels, else L)", metavar="MODE"),
        _o("--input-key", None, "column of the images in hfds/NAME", metavar="KEY"),
        _o("--target-key", None, "column of the labels in hfds/NAME", metavar="KEY"),
    ),
    "model": (
        _o("--model", "resnet50", "name of the model", metavar="NAME"),
        _switch("--pretrained", "start from the model's pretrained weights"),
        _o("--pretrained-path", None, "start from this file as if it were the pretrained weights", metavar="FILE"),
        _o("--initial-checkpoint", "", "start from the weights of this checkpoint", metavar="FILE"),
        _o("--resume", "", "go on from this checkpoint, or 'auto': from the newest one of the run", metavar="FILE"),
        _switch("--no-resume-opt", "resume without the optimizer's state"),
        _o("--num-classes", None, "number of classes", int, metavar="N"),
        _o("--gp", None, "kind of global pooling", metavar="POOL"),
        _o("--img-size", None, "side of the images", int, metavar="PIXELS"),
        _o("--in-chans", None, "channels of the input", int, metavar="N"),
        _o("--input-size", None, "channels, height and width of the input", int, nargs=3, metavar="N"),
        _o("--crop-pct", None, "share of the image that validation crops", float, metavar="SHARE"),
        _o("--mean", None, "mean of each channel, of images in 0 to 1", float, nargs="+", metavar="MEAN"),
        _o("--std", None, "standard deviation of each channel", float, nargs="+", metavar="STD"),
        _o("--interpolation", "", "how validation resizes", metavar="NAME"),
        _o("-b --batch-size", 128, "batch of one process", int, metavar="N"),
        _o("-vb --validation-batch-size", None, "batch of one process in validation", int, metavar="N"),
        _switch("--channels-last", "channels-last memory format"),
        _o("--grad-accum-steps", 1, "batches per update", int, metavar="N"),
        _switch("--grad-checkpointing", "recompute activations in the backward pass to save memory"),
        _switch("--fast-norm", "timm's fast layer norms"),
        _o("--model-kwargs", {}, "arguments of the model", dict, metavar="KEY=VALUE"),
        _o("--head-init-scale", None, "scale the classifier's initial weights", float, metavar="X"),
        _o("--head-init-bias", None, "initial bias of the classifier", float, metavar="X"),
        _o("--torchcompile", None, "torch.compile the model", nargs="?", const="inductor", metavar="BACKEND"),
        _o("--torchcompile-mode", None, "mode of torch.compile", metavar="MODE"),
    ),
    "device": (
        _o("--device", "cuda", "device"),
        _switch("--amp", "mixed precision"),
        _o("--amp-dtype", "float16", "dtype of mixed precision", choices=("float16", "bfloat16")),
        _o("--model-dtype", None, "dtype of the whole model", choices=("float32", "float16", "bfloat16")),
        _switch("--no-ddp-bb", "do not broadcast the model's buffers between processes"),
        _switch("--synchronize-step", "wait for the device after each update"),
        _o("--local_rank", 0, "taken from the environment, as torchrun sets it", int, metavar="N"),
    ),
    "optimizer": (
        _o("--opt", "sgd", "optimizer, any of timm's", metavar="NAME"),
        _o("--opt-eps", None, "epsilon", float, metavar="X"),
        _o("--opt-betas", None, "betas", float, nargs="+", metavar="X"),
        _o("--momentum", 0.9, "momentum", float, metavar="X"),
        _o("--weight-decay", 2e-5, "weight decay", float, metavar="X"),
        _o("--clip-grad", None, "clip gradients at this value", float, metavar="X"),
        _o("--clip-mode", "norm", "what is clipped", choices=("norm", "value", "agc")),
        _o("--layer-decay", None, "factor of the learning rate from layer to layer", float, metavar="X"),
        _o("--layer-decay-min-scale", 0.0, "smallest such factor", float, metavar="X"),
        _o("--layer-decay-no-opt-scale", None, "do not train layers with a factor below this", float, metavar="X"),
        _o("--opt-kwargs", {}, "arguments of the optimizer", dict, metavar="KEY=VALUE"),
    ),
    "learning rate": (
        _o("--sched", "cosine", "schedule, any of timm's", metavar="NAME"),
        _switch("--sched-on-updates", "change the learning rate at each update instead of each epoch"),
        _o("--lr", None, "learning rate; goes before --lr-base", float, metavar="X"),
        _o("--lr-base", 0.1, "learning rate of a global batch of --lr-base-size", float, metavar="X"),
        _o("--lr-base-size", 256, "see --lr-base", int, metavar="N"),
        _o("--lr-base-scale", "", "growth with the batch: linear or sqrt ('': by optimizer)", metavar="KIND"),
        _o("--lr-noise", None, "epochs, or shares of them, with a noisy learning rate", float, nargs="+", metavar="X"),
        _o("--lr-noise-pct", 0.67, "largest noise", float, metavar="X"),
        _o("--lr-noise-std", 1.0, "standard deviation of the noise", float, metavar="X"),
        _o("--lr-cycle-mul", 1.0, "growth of a cycle's length", float, metavar="X"),
        _o("--lr-cycle-decay", 0.5, "decay from cycle to cycle", float, metavar="X"),
        _o("--lr-cycle-limit", 1, "number of cycles", int, metavar="N"),
        _o("--lr-k-decay", 1.0, "k of k-decay", float, metavar="X"),
        _o("--warmup-lr", 1e-5, "learning rate at the start of the warm-up", float, metavar="X"),
        _o("--min-lr", 0.0, "smallest learning rate", float, metavar="X"),
        _o("--epochs", 300, "epochs, without cool-down", int, metavar="N"),
        _o("--start-epoch", None, "start here, whatever the checkpoint says", int, metavar="N"),
        _o("--decay-milestones", [90, 180, 270], "epochs of decay (multistep)", int, nargs="+", metavar="N"),
        _o("--decay-epochs", 90.0, "epochs between decays (step)", float, metavar="N"),
        _o("--warmup-epochs", 5, "epochs of warm-up", int, metavar="N"),
        _switch("--warmup-prefix", "add the warm-up to --epochs"),
        _o("--cooldown-epochs", 0, "epochs at the smallest learning rate, added to --epochs", int, metavar="N"),
        _o("--patience-epochs", 10, "patience (plateau)", int, metavar="N"),
        _o("--decay-rate --dr", 0.1, "factor of a decay", float, metavar="X"),
    ),
    "augmentation and regularization": (
        _switch("--no-aug", "no augmentation, whatever the rest says"),
        _o("--train-crop-mode", None, "timm's crop mode", metavar="MODE"),
        _o("--scale", [0.08, 1.0], "share of the area that is cropped", float, nargs="+", metavar="X"),
        _o("--ratio", [3.0 / 4.0, 4.0 / 3.0], "aspect ratio of the crop", float, nargs="+", metavar="X"),
        _o("--hflip", 0.5, "probability of a horizontal flip", float, metavar="P"),
        _o("--vflip", 0.0, "probability of a vertical flip", float, metavar="P"),
        _o("--color-jitter", 0.4, "strength of colour jitter", float, metavar="X"),
        _o("--color-jitter-prob", None, "probability of colour jitter", float, metavar="P"),
        _o("--grayscale-prob", None, "probability of turning grey", float, metavar="P"),
        _o("--gaussian-blur-prob", None, "probability of a blur", float, metavar="P"),
        _o("--aa", None, "timm's auto-augment policy; for events snn-wide", metavar="NAME"),
        _o("--aug-repeats", 0.0, "augmented copies of an image in one global batch", float, metavar="N"),
        _switch("--bce-loss", "binary cross-entropy"),
        _switch("--bce-sum", "sum it over the classes"),
        _o("--bce-target-thresh", None, "threshold of soft targets", float, metavar="X"),
        _o("--bce-pos-weight", None, "weight of positive targets", float, metavar="X"),
        _o("--reprob", 0.0, "probability of random erasing", float, metavar="P"),
        _o("--remode", "pixel", "what is put there", metavar="MODE"),
        _o("--recount", 1, "erased regions", int, metavar="N"),
        _o("--mixup", 0.0, "alpha of mixup", float, metavar="X"),
        _o("--cutmix", 0.0, "alpha of CutMix", float, metavar="X"),
        _o("--cutmix-minmax", None, "smallest and largest side of CutMix", float, nargs="+", metavar="X"),
        _o("--mixup-prob", 1.0, "probability of mixing a batch", float, metavar="P"),
        _o("--mixup-switch-prob", 0.5, "probability of CutMix where both are on", float, metavar="P"),
        _o("--mixup-mode", "batch", "mix per batch, pair or elem", choices=("batch", "pair", "elem", "half")),
        _o("--mixup-off-epoch", 0, "stop mixing from this epoch on; 0 for never", int, metavar="N"),
        _o("--smoothing", 0.1, "label smoothing", float, metavar="X"),
        _o("--train-interpolation", "random", "how training resizes", metavar="NAME"),
        _o("--drop", 0.0, "dropout", float, metavar="P"),
        _o("--drop-path", None, "stochastic depth", float, metavar="P"),
        _o("--drop-block", None, "DropBlock", float, metavar="P"),
    ),
    "batch norm": (
        _o("--bn-momentum", None, "momentum", float, metavar="X"),
        _o("--bn-eps", None, "epsilon", float, metavar="X"),
        _switch("--sync-bn", "statistics over the batches of all processes"),
        _o("--dist-bn", "reduce", "what to do with the processes' running statistics after an epoch: "
           "broadcast, reduce or ''", choices=("broadcast", "reduce", "")),
    ),
    "moving average of the weights": (
        _switch("--model-ema", "keep a moving average of the weights"),
        _switch("--model-ema-force-cpu", "keep it on the CPU, and do not validate it"),
        _o("--model-ema-decay", 0.9998, "its decay", float, metavar="X"),
        _switch("--model-ema-warmup", "let the decay grow at first"),
    ),
    "run": (
        _o("--seed", 42, "seed of everything random", int, metavar="N"),
        _o("--worker-seeding", "all", "which random numbers are seeded in workers", choices=("all", "part")),
        _o("--log-interval", 50, "updates between two lines of the log", int, metavar="N"),
        _o("--val-interval", 1, "epochs between validations, with a checkpoint each", int, metavar="N"),
        _o("--recovery-interval", 0, "updates between checkpoints within an epoch; 0 for none", int, metavar="N"),
        _o("--checkpoint-hist", 10, "best checkpoints to keep", int, metavar="N"),
        _o("-j --workers", 4, "processes that load data", int, metavar="N"),
        _switch("--pin-mem", "page-locked memory in the loaders"),
        _switch("--no-prefetcher", "normalize and mix in the main process"),
        _o("--output", "", "folder of all runs (output/train)", metavar="DIR"),
        _o("--experiment", "", "name of the run's own folder (time, model and size)", metavar="NAME"),
        _o("--eval-metric", "top1", "what the best checkpoint is best in", choices=("top1", "top5", "loss")),
    ),
}  # fmt: skip

# Not in train.py.
OURS: tuple[Option, ...] = (
    _o("--on-error", "raise", "unreadable image or recording: stop and name it, or take another",
       choices=("raise", "skip")),
    _o("--round-weights", False, "train, or measure, weights rounded to 8 bits", bool),
    _o("--tensorboard", None, "write TensorBoard files (where tensorboard is installed)", bool),
    _o("--event-split-by", "number", "frames of as many events each, or of as long a time each",
       choices=("number", "time")),
    _o("--event-sensor-size", None, "height and width of the camera, for events/folder", int, nargs=2, metavar="N"),
    _o("--event-cache", None, "folder to keep event frames in", metavar="DIR"),
)  # fmt: skip

_NAFLEX = "NaFlex needs models that take patches, spiking ones take whole images"
_SIZES = "batches of changing sizes are not part of this trainer"
_TEACHER = "distillation is not part of this trainer"
_WANDB = "Weights & Biases is not written, TensorBoard files and summary.csv are"
_ITERABLE = "it is for data sets that are streamed, which cannot be resumed in the middle of an epoch"
_SPLITS = "augmentation splits are not part of this trainer"

# train.py's remaining keys: (default, why not). Set to anything else they are refused.
UNSUPPORTED: dict[str, tuple[Any, str]] = {
    "train_num_samples": (None, _ITERABLE),
    "val_num_samples": (None, _ITERABLE),
    "epoch_repeats": (0.0, _ITERABLE),
    "dataset_trust_remote_code": (False, "code that comes with a data set is never run"),
    "fuser": ("", "TorchScript's fusers do not apply, see --torchcompile"),
    "torchscript": (False, "TorchScript is not trained, see --torchcompile"),
    "device_modules": (None, "no module is imported by name"),
    "aug_splits": (0, _SPLITS),
    "jsd_loss": (False, _SPLITS),
    "resplit": (False, _SPLITS),
    "split_bn": (False, _SPLITS),
    "drop_connect": (None, "train.py does not use it either; --drop-path does what it says"),
    "save_images": (False, "batches are not saved"),
    "tta": (0, "train.py's loaders make no such copies either"),
    "use_multi_epochs_loader": (False, "workers live on between epochs anyway"),
    "log_wandb": (False, _WANDB),
    "wandb_project": (None, _WANDB),
    "wandb_tags": ([], _WANDB),
    "wandb_resume_id": ("", _WANDB),
    "train_img_sizes": (None, _SIZES),
    "train_batch_sizes": (None, _SIZES),
    "train_size_probs": (None, _SIZES),
    "train_size_schedule": ("constant", _SIZES),
    "train_size_schedule_spread": (0.65, _SIZES),
    "train_size_random_mix": (0.1, _SIZES),
    "train_batches_per_epoch": (None, _SIZES),
    "variable_batch_loss_scale": ("none", _SIZES),
    "naflex_loader": (False, _NAFLEX),
    "naflex_train_seq_lens": ([128, 256, 576, 784, 1024], _NAFLEX),
    "naflex_max_seq_len": (576, _NAFLEX),
    "naflex_patch_sizes": (None, _NAFLEX),
    "naflex_patch_size_probs": (None, _NAFLEX),
    "naflex_loss_scale": ("linear", _NAFLEX),
    "naflex_patchify_channels_first": (False, _NAFLEX),
    "kd_model_name": (None, _TEACHER),
    "kd_distill_type": ("logit", _TEACHER),
    "kd_loss_type": ("kl", _TEACHER),
    "distill_loss_weight": (None, _TEACHER),
    "task_loss_weight": (None, _TEACHER),
    "kd_temperature": (4.0, _TEACHER),
    "kd_student_feature_dim": (None, _TEACHER),
    "kd_teacher_feature_dim": (None, _TEACHER),
    "kd_token_distill_type": ("soft", _TEACHER),
}

# Options that say what is read and how it is seen: those of `validate`.
LOADED = (
    "data_dir", "dataset", "dataset_download", "class_map", "input_img_mode", "input_key", "target_key",
    "num_classes", "gp", "img_size", "in_chans", "input_size", "crop_pct", "mean", "std", "interpolation",
    "batch_size", "channels_last", "model_kwargs", "torchcompile", "torchcompile_mode",
    "device", "amp", "amp_dtype", "model_dtype", "pretrained", "workers", "pin_mem", "no_prefetcher",
    "on_error", "round_weights", "event_split_by", "event_sensor_size", "event_cache",
)  # fmt: skip


class _KeywordArguments(argparse.Action):
    """KEY=VALUE ... to a dict, by timm's rules."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        from timm.utils import ParseKwargs

        bad = [value for value in values if "=" not in value]
        if bad:
            parser.error(f"argument {self.option_strings[0]}: expected KEY=VALUE, got {bad[0]!r}")
        ParseKwargs(self.option_strings, self.dest)(parser, namespace, values)


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `timm-qkformer train` takes."""
    _add_recipe(parser)
    _add_options(parser)


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add -c."""
    parser.add_argument("-c", "--config", metavar="RECIPE", help="recipe: a YAML file, or a name such as cpu_cifar10")


def add_validate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `timm-qkformer validate` takes."""
    parser.add_argument("model", metavar="MODEL", help="name of the model, with a tag for pretrained weights")
    parser.add_argument("--checkpoint", metavar="FILE", help="weights, and where it is a trainer's, its settings")
    parser.add_argument("--no-ema", action="store_true", help="the weights themselves, not their moving average")
    parser.add_argument("--split", metavar="NAME", help="split to validate on (the recipe's val_split, or validation)")
    parser.add_argument("--results-file", metavar="FILE", help="write the results to a new .json or .csv file")
    _add_recipe(parser)
    _add_options(parser, only=LOADED)


def _add_options(parser: argparse.ArgumentParser, only: Optional[Sequence[str]] = None) -> None:
    """Add the options to a parser. The namespace it returns holds what was given, and no defaults.

    Args:
        parser: Parser of a command.
        only: Names of options to add; None adds all, also those that train.py has and this trainer refuses.
    """
    for title, options in {**OPTIONS, "not in train.py": OURS}.items():
        chosen = [option for option in options if only is None or option.name in only]
        group = parser.add_argument_group(title) if chosen else parser
        for option in chosen:
            _add(group, option)
    if only is None:
        for name in UNSUPPORTED:
            flags = [f"--{name.replace('_', '-')}"]
            parser.add_argument(*flags, dest=name, nargs="*", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def _add(group: Any, option: Option) -> None:
    kwargs: dict[str, Any] = {"default": argparse.SUPPRESS, "help": option.help}
    if option.default not in (None, False, "", {}):
        shown = " ".join(f"{v:.4g}" for v in option.default) if isinstance(option.default, list) else option.default
        kwargs["help"] += f" ({shown})"
    if option.type is bool:
        # --no-aug and its like are the switch itself
        two_ways = not option.name.startswith("no_")
        kwargs["action"] = argparse.BooleanOptionalAction if two_ways else "store_true"
    elif option.type is dict:
        kwargs |= {"action": _KeywordArguments, "nargs": "*", "metavar": option.metavar}
    else:
        kwargs |= {"type": option.type, "nargs": option.nargs, "choices": option.choices, "metavar": option.metavar}
        if option.nargs == "?" and option.flags[0].startswith("-"):
            kwargs["const"] = option.const
    if option.flags[0].startswith("-"):
        kwargs["dest"] = option.name
    group.add_argument(*option.flags, **kwargs)
