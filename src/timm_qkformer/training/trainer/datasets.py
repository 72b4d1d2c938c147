"""The data sets behind the loaders, and whether they are what the run was told."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from timm.data import create_dataset
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch.utils.data import Dataset
from torchvision.transforms import Compose, Normalize

from ...data import RELEASE_AUGMENTATIONS, EventAugment, create_event_dataset
from ...data.images import UnreadableImageError, open_image
from .randomness import random_state, restore_random_state

__all__ = ["check_classes", "check_sample", "is_events", "open_split", "same_classes"]

_NAMED = 5  # how many names a message lists


class _NamedImages(Dataset):
    """timm's data set of images, but an unreadable one stops the run and is named.

    timm's own gives the next image in its place and goes on.
    """

    def __init__(self, images: Any) -> None:
        self.reader = images.reader
        self.mode = images.input_img_mode
        self.transform = None  # set by timm's create_loader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        try:
            file, target = self.reader[index]
            image = open_image(file, self.mode, self.reader.filename(index, absolute=True))
        except (OSError, ValueError) as error:
            raise UnreadableImageError(f"{error}; on_error=skip takes another") from error
        return (image if self.transform is None else self.transform(image)), -1 if target is None else target


def is_events(args: argparse.Namespace) -> bool:
    """Whether the data set is one of events/..."""
    return bool(args.dataset.lower().startswith("events/"))


def open_split(
    args: argparse.Namespace, split: str, is_training: bool, input_size: tuple[int, int, int], time_steps: int
) -> Any:
    """The data set of a split; transforms of images are still to be set, those of events are there.

    Args:
        args: Settings.
        split: Name of the split.
        is_training: Augment.
        input_size: (channels, height, width) of the model's input.
        time_steps: T, of events.

    Raises:
        FileNotFoundError: If the data is not there.
        ValueError: If it is there and not usable.
    """
    if args.data_dir and not Path(args.data_dir).exists() and not args.dataset_download:
        raise FileNotFoundError(f"data_dir={str(args.data_dir)!r} does not exist")
    if is_events(args):
        return _open_events(args, split, is_training, time_steps)
    mode = args.input_img_mode or ("RGB" if input_size[0] == 3 else "L")
    try:
        dataset = create_dataset(
            args.dataset,
            root=args.data_dir,
            split=split,
            is_training=is_training,
            class_map=args.class_map,
            download=args.dataset_download,
            batch_size=args.batch_size,
            seed=args.seed,
            input_img_mode=mode,
            input_key=args.input_key,
            target_key=args.target_key,
        )
    except (RuntimeError, AssertionError, ImportError) as error:
        hint = "; --dataset-download gets it" if args.dataset.startswith("torch/") and not args.dataset_download else ""
        raise ValueError(
            f"dataset {args.dataset!r} in {args.data_dir}: {' '.join(str(error).split())}{hint}"
        ) from error
    reader = getattr(dataset, "reader", None)
    if isinstance(reader, ReaderImageFolder):
        _check_folder(Path(args.data_dir), Path(reader.root), split, args.class_map, reader)
    return dataset if reader is None or args.on_error == "skip" else _NamedImages(dataset)


def _open_events(args: argparse.Namespace, split: str, is_training: bool, time_steps: int) -> Any:
    transforms: list[Any] = []
    if is_training and not args.no_aug:
        transforms.append(EventAugment(args.hflip, RELEASE_AUGMENTATIONS if args.aa else ()))
    if args.mean or args.std:
        channels = 2
        mean, std = (np.broadcast_to(value, channels).tolist() for value in (args.mean or [0.0], args.std or [1.0]))
        if (mean, std) != ([0.0] * channels, [1.0] * channels):
            transforms.append(Normalize(mean, std))
    return create_event_dataset(
        args.dataset.partition("/")[2],
        args.data_dir,
        split,
        time_steps=time_steps,
        split_by=args.event_split_by,
        size=tuple(args.input_size[1:]) if args.input_size else None,
        sensor_size=tuple(args.event_sensor_size) if args.event_sensor_size else None,
        on_error=args.on_error,
        cache_dir=args.event_cache,
        transform=Compose(transforms) if transforms else None,
    )


def _check_folder(root: Path, found: Path, split: str, class_map: str, reader: ReaderImageFolder) -> None:
    """timm takes the whole folder where it finds no split, and leaves out classes without images. Here both stop."""
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


def check_classes(dataset: Any, num_classes: int, where: str) -> None:
    """Compare the data's classes with the model's.

    Raises:
        ValueError: If their numbers differ, where the data's is known.
    """
    names = _class_names(dataset)
    if names is not None and len(names) != num_classes:
        raise ValueError(
            f"{where} has {len(names)} classes ({_some(names)}), but the model has num_classes={num_classes}; "
            f"--num-classes {len(names)} makes them agree"
        )


def same_classes(train: Any, other: Any, split: str) -> None:
    """Compare the classes of two splits, whose indices timm gives by the order of the names in each of them.

    Raises:
        ValueError: If they differ.
    """
    names = [_class_names(dataset) for dataset in (train, other)]
    if None not in names and names[0] != names[1]:
        missing, extra = sorted(set(names[0]) - set(names[1])), sorted(set(names[1]) - set(names[0]))  # type: ignore[arg-type]
        lacks = f" lacks {_some(missing)}" if missing else ""
        has = f" has {_some(extra)} besides" if extra else ""
        raise ValueError(f"the split {split!r}{lacks}{' and' if lacks and has else ''}{has}, unlike the training split")


def _class_names(dataset: Any) -> list[str] | None:
    """Names in the order of their indices."""
    mapping: Mapping[str, int] | None = getattr(getattr(dataset, "reader", None), "class_to_idx", None)
    if mapping:
        return sorted(mapping, key=lambda name: mapping[name])
    names = getattr(dataset, "class_names", None) or getattr(dataset, "classes", None)
    return list(names) if names else None


def check_sample(dataset: Any, in_chans: int, where: str) -> None:
    """Look at the first sample, without any trace in the random numbers.

    Raises:
        ValueError: If there is none, or it does not have the model's channels.
    """
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
