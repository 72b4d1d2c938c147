"""The data of a run: data sets that are what the settings say, and the loaders of both splits.

Images come through timm's loaders, events through this package's.
"""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from urllib.error import URLError

import numpy as np
import torch
from timm.data import FastCollateMixup, Mixup, create_dataset, create_loader
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.transforms import ResizeKeepRatio
from timm.layers import to_2tuple
from torch.utils.data import DataLoader
from torchvision.transforms import Compose, Normalize, RandomCrop

from ...data import (
    RELEASE_AUGMENTATIONS,
    EventAugment,
    EventMixup,
    SharedRandomSampler,
    create_event_dataset,
    create_event_loader,
)
from ...data.images import ImageDataset
from ...errors import first_line, naming_settings
from ...models.loading import explain
from .distributed import Processes
from .facts import left_out
from .replay import ReplayableLoader, random_state, restore_random_state
from .settings import Settings

_NAMED = 5  # how many names a message lists
# Arguments of timm's `create_loader` in training, and the settings that they are.
_AUGMENTATION = {
    "re_prob": "reprob", "re_mode": "remode", "re_count": "recount", "auto_augment": "aa",
    "num_aug_repeats": "aug_repeats",
    **{name: name for name in (
        "no_aug", "train_crop_mode", "scale", "ratio", "hflip", "vflip", "color_jitter", "color_jitter_prob",
        "grayscale_prob", "gaussian_blur_prob",
    )},
}  # fmt: skip


# Arguments of `create_event_dataset`, and the flags that set them.
_EVENT_FLAGS = {
    "name": "--dataset", "root": "--data-dir", "time_steps": "--model-kwargs time_steps=T",
    "split_by": "--event-split-by", "size": "--input-size", "sensor_size": "--event-sensor-size",
    "train_ratio": "--event-train-ratio", "split_seed": "--event-split-seed",
}  # fmt: skip


def open_split(
    settings: Settings, split: str, is_training: bool, input_size: tuple[int, int, int], time_steps: int
) -> Any:
    """The data set of a split; transforms of images are still to be set, those of events are there.

    FileNotFoundError if the data is not there, ValueError if it is there and not usable.
    """
    if settings.data_dir and not Path(settings.data_dir).exists() and not settings.dataset_download:
        raise FileNotFoundError(f"data_dir={str(settings.data_dir)!r} does not exist")
    if settings.is_events:
        return _open_events(settings, split, is_training, time_steps)
    mode = settings.input_img_mode or ("RGB" if input_size[0] == 3 else "L")
    own = ("class_map", "batch_size", "seed", "input_key", "target_key")
    try:
        dataset = create_dataset(
            settings.dataset,
            root=settings.data_dir,
            split=split,
            is_training=is_training,
            download=settings.dataset_download,
            input_img_mode=mode,
            **{name: getattr(settings, name) for name in own},
        )
    except FileNotFoundError:
        raise
    except URLError as error:
        raise ValueError(
            f"dataset {settings.dataset!r} cannot be downloaded to {settings.data_dir}: {explain(error, 'url')} "
            "Or put it there yourself and leave out --dataset-download."
        ) from error
    except (ArithmeticError, AssertionError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError,
            AttributeError, EOFError, UnpicklingError) as error:  # fmt: skip
        if settings.class_map:
            raise ValueError(
                f"class_map={settings.class_map!r} with the data in {settings.data_dir}: {first_line(error)}; it needs "
                f"to be a text file with the name of a class in each line, or name and index"
            ) from error
        if isinstance(error, (OSError, ValueError)):
            raise
        can_download = settings.dataset.startswith("torch/") and not settings.dataset_download
        reason = " ".join(str(error).split()) + ("; --dataset-download gets it" if can_download else "")
        raise ValueError(f"dataset {settings.dataset!r} in {settings.data_dir}: {reason}") from error
    reader = getattr(dataset, "reader", None)
    if isinstance(reader, ReaderImageFolder):
        _check_folder(Path(settings.data_dir or "."), Path(reader.root), split, settings.class_map, reader)
    if reader is None:
        return dataset
    skip = settings.on_error == "skip"
    return ImageDataset(reader, mode, hint="" if skip else "; on_error=skip takes another", skip=skip)


def _open_events(settings: Settings, split: str, is_training: bool, time_steps: int) -> Any:
    transforms: list[Any] = []
    if is_training and not settings.no_aug:
        transforms.append(EventAugment(settings.hflip, RELEASE_AUGMENTATIONS if settings.aa else ()))
    if settings.mean or settings.std:
        mean, std = (np.broadcast_to(value, 2).tolist() for value in (settings.mean or [0.0], settings.std or [1.0]))
        if (mean, std) != ([0.0] * 2, [1.0] * 2):
            transforms.append(Normalize(mean, std))
    try:
        return create_event_dataset(
            settings.dataset.partition("/")[2],
            settings.data_dir or "",
            "test" if split in ("val", "validation") else split,  # train.py's default name
            time_steps=time_steps,
            split_by=settings.event_split_by,
            size=to_2tuple(settings.input_size[1:]) if settings.input_size else None,
            sensor_size=to_2tuple(settings.event_sensor_size) if settings.event_sensor_size else None,
            train_ratio=settings.event_train_ratio,
            split_seed=settings.event_split_seed,
            on_error=settings.on_error,
            cache_dir=settings.event_cache,
            transform=Compose(transforms) if transforms else None,
        )
    except ValueError as error:
        flags = _EVENT_FLAGS | {"split": "--train-split" if is_training else "--val-split"}
        named = [flag for name, flag in flags.items() if re.search(rf"\b{name}=", str(error))]
        if not named:
            raise
        raise ValueError(f"{', '.join(named)}: {error}") from error


def _check_folder(root: Path, found: Path, split: str, class_map: str, reader: ReaderImageFolder) -> None:
    """timm takes the whole folder if it finds no split, and leaves out classes without images. Here both are errors."""
    if split and found == root and split not in (".", "") and root.name != split:
        folders = sorted(path.name for path in root.iterdir() if path.is_dir())
        raise FileNotFoundError(f"{root} has no folder {split!r} for that split, only {_some(folders) or 'files'}")
    if class_map:
        return  # it says which classes are wanted
    used = {Path(file).relative_to(found).parts[0] for file, _ in reader.samples}
    folders = [path.name for path in found.iterdir() if path.is_dir() and not path.name.startswith(".")]
    empty = sorted(set(folders) - used)
    if empty:
        raise ValueError(f"{found}: no images in the class folders {_some(empty)}")
    if note := left_out(found, len(reader.samples)):
        warnings.warn(note, stacklevel=3)


def check_classes(dataset: Any, num_classes: int, where: str) -> None:
    """Compare the data's classes with the model's; ValueError if their numbers differ, where the data's is known."""
    names = class_names(dataset)
    if names is not None and len(names) != num_classes:
        raise ValueError(
            f"{where} has {len(names)} classes ({_some(names)}), but the model has num_classes={num_classes}; "
            f"--num-classes {len(names)} makes them agree"
        )


def check_same_classes(train: Any, other: Any, split: str) -> None:
    """Refuse splits of different classes (ValueError): timm gives indices by the order of the names in each of them."""
    names = [class_names(dataset) for dataset in (train, other)]
    if None not in names and names[0] != names[1]:
        missing, extra = sorted(set(names[0]) - set(names[1])), sorted(set(names[1]) - set(names[0]))  # type: ignore[arg-type]
        lacks = f" lacks {_some(missing)}" if missing else ""
        has = f" has {_some(extra)} besides" if extra else ""
        raise ValueError(f"the split {split!r}{lacks}{' and' if lacks and has else ''}{has}, unlike the training split")


def class_names(dataset: Any) -> list[str] | None:
    """Names in the order of their indices."""
    mapping: Mapping[str, int] | None = getattr(getattr(dataset, "reader", None), "class_to_idx", None)
    if mapping:
        return sorted(mapping, key=lambda name: mapping[name])
    names = getattr(dataset, "class_names", None) or getattr(dataset, "classes", None)
    return list(names) if names else None


def check_sample(dataset: Any, in_chans: int, where: str) -> None:
    """Refuse no samples, or other channels than the model's (ValueError); without a trace in the random numbers."""
    if not len(dataset):
        raise ValueError(f"{where} is empty")
    state = random_state()
    sample, _ = dataset[0]
    restore_random_state(state)
    # A transform for a prefetcher gives an array, others a tensor: [C, H, W] or [T, C, H, W].
    channels = sample.shape[-3]
    if channels != in_chans:
        raise ValueError(
            f"{where} has samples of {channels} channels, but the model takes {in_chans}; "
            f"set in_chans and input_size to what the data has"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


class SwitchableCollateMixup(FastCollateMixup):
    """Mixup and CutMix while collating; `mixup_enabled` reaches the copies in the loader's workers, too.

    Workers live from epoch to epoch with a copy of the collate function. timm's switch is an attribute, which the
    copies keep as it was; here it lies in memory that the processes share.
    """

    def __init__(self, **kwargs: Any) -> None:
        self._enabled = torch.ones(1, dtype=torch.bool).share_memory_()
        super().__init__(**kwargs)

    @property
    def mixup_enabled(self) -> bool:
        """Whether batches are changed. Set it between epochs: workers collate ahead."""
        return bool(self._enabled)

    @mixup_enabled.setter
    def mixup_enabled(self, enabled: bool) -> None:
        self._enabled.fill_(enabled)


@dataclass(frozen=True)
class TrainLoader:
    """Batches of an epoch, and the switches that the training loop needs."""

    batches: Any  # what to iterate: images [B, C, H, W] or clips [B, T, C, H, W], and targets
    replayable: ReplayableLoader  # the loader inside, which knows its position
    mixup: Mixup | None  # for batches in this process; None without mixup, and where the loader applies it
    on_device: bool  # batches are on the model's device already, and mixup was applied

    def __len__(self) -> int:
        return len(self.replayable)

    def begin(self, epoch: int, mixup: bool) -> None:
        """Say which epoch comes next, and whether mixup is on."""
        for part in (self.replayable.loader, self.replayable.sampler):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        if self.mixup is not None:
            self.mixup.mixup_enabled = mixup
        elif isinstance(self.replayable.collate_fn, SwitchableCollateMixup):
            self.replayable.collate_fn.mixup_enabled = mixup


def create_train_loader(settings: Settings, processes: Processes, dataset: Any, config: dict[str, Any]) -> TrainLoader:
    """The training loader, which draws random numbers as train.py's does. Settings have the number of classes.

    ValueError if there is not one full batch, or a sample or a setting does not fit.
    """
    share = len(dataset) // processes.world_size
    if share < settings.batch_size and not settings.is_events:
        raise ValueError(
            f"batch_size={settings.batch_size} is more than the {share} images that a process has to train on"
        )
    if settings.aug_repeats and not processes.distributed:
        raise ValueError(f"aug_repeats={settings.aug_repeats} needs several processes, which share an image's copies")
    prefetch = not settings.no_prefetcher and not settings.is_events
    where = f"the split {settings.train_split!r}"
    with naming_settings("batches to train on", settings.given("augmentation and regularization", "data")):
        mixup = _mixup_arguments(settings)
        augmentation = {
            "collate_fn": SwitchableCollateMixup(**mixup) if mixup and prefetch else None,
            "distributed": bool(settings.aug_repeats),
            "interpolation": (None if settings.no_aug else settings.train_interpolation) or config["interpolation"],
            "worker_seeding": settings.worker_seeding,
            **{name: getattr(settings, option) for name, option in _AUGMENTATION.items()},
        }
        loader = _create_loader(settings, processes, dataset, config, where, settings.batch_size, True, augmentation)
        if settings.crop_padding:
            size, interpolation = config["input_size"][1:], augmentation["interpolation"]
            crop_padded(dataset.transform, size, settings.crop_padding, interpolation)
        kind = EventMixup if settings.is_events else Mixup
        own_mixup = kind(**mixup) if mixup and not prefetch else None
    inner: DataLoader = loader.loader if prefetch else loader
    if processes.distributed and not settings.aug_repeats and not settings.is_events:
        sampler = SharedRandomSampler(len(dataset), _shared_seed, processes.rank, processes.world_size)
        inner.batch_sampler.sampler = sampler  # type: ignore[union-attr]
    replayable = ReplayableLoader(inner, processes.device)
    if prefetch:
        loader.loader = replayable
    return TrainLoader(loader if prefetch else replayable, replayable, own_mixup, on_device=prefetch)


def crop_padded(transform: Compose, size: tuple[int, int], padding: int, interpolation: str) -> None:
    """Have timm's augmentation crop a window of the image with mirrored pixels around it, CIFAR's usual augmentation,
    in place of a part of it that is resized; ValueError for more pixels than there are to mirror."""
    if padding >= min(size):
        raise ValueError(f"crop_padding={padding} must be below the {min(size)} pixels of an image's shorter side")
    resize = ResizeKeepRatio(size, interpolation=interpolation)  # the shorter side, leaves images of the size alone
    transform.transforms[:1] = [resize, RandomCrop(size, padding=padding, padding_mode="reflect")]


def create_eval_loader(
    settings: Settings, processes: Processes, dataset: Any, config: dict[str, Any], where: str
) -> Any:
    """The loader of the samples to validate on, each once (see `evaluation_sample_limit` for several processes).

    ValueError if a sample or a setting does not fit; `where` says what the split is called.
    """
    crop = {name: config[name] for name in ("interpolation", "crop_pct")}
    with naming_settings("batches to validate on", crop | settings.given("data")):
        batch_size = settings.validation_batch_size or settings.batch_size
        crop["distributed"] = processes.distributed
        return _create_loader(settings, processes, dataset, config, where, batch_size, False, crop)


def _create_loader(
    settings: Settings,
    processes: Processes,
    dataset: Any,
    config: dict[str, Any],
    where: str,
    batch_size: int,
    is_training: bool,
    of_images: dict[str, Any],
) -> Any:
    """This package's loader of clips, or timm's of images with these arguments besides, after a look at one sample."""
    common: dict[str, Any] = {"batch_size": batch_size, "is_training": is_training, "num_workers": settings.workers}
    common["pin_memory"] = settings.pin_mem
    if settings.is_events:
        check_sample(dataset, config["input_size"][0], where)
        return create_event_loader(dataset, seed=settings.seed, distributed=processes.distributed, **common)
    loader = create_loader(
        dataset,
        **{name: config[name] for name in ("input_size", "mean", "std")},
        img_dtype=getattr(torch, settings.model_dtype or "float32"),
        device=processes.device,
        use_prefetcher=not settings.no_prefetcher,
        **common,
        **of_images,
    )
    check_sample(dataset, config["input_size"][0], where)
    return loader


def _mixup_arguments(settings: Settings) -> dict[str, Any]:
    """Arguments of timm's Mixup; empty without mixup."""
    if not settings.uses_mixup:
        return {}
    return {
        "mixup_alpha": settings.mixup,
        "cutmix_alpha": settings.cutmix,
        "cutmix_minmax": settings.cutmix_minmax,
        "prob": settings.mixup_prob,
        "switch_prob": settings.mixup_switch_prob,
        "mode": settings.mixup_mode,
        "label_smoothing": settings.smoothing,
        "num_classes": settings.num_classes,
    }


def _shared_seed() -> int:
    """A seed that process 0 draws where torch's RandomSampler would."""
    seed = torch.empty((), dtype=torch.int64).random_()
    if torch.distributed.get_backend() == "nccl":
        seed = seed.cuda()
    torch.distributed.broadcast(seed, src=0)
    return int(seed)
