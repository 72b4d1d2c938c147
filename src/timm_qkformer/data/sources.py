"""Where the recordings of the known data sets lie, and which belong to which split."""

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from timm.layers import to_2tuple
from torch import Tensor

from .dataset import EventDataset
from .events import FrameSpec
from .formats import EVENT_SUFFIXES, TEXT_SUFFIXES
from .gesture import check_gestures, cut_gestures, find_gestures
from .sampling import split_by_class
from .spikingjelly_files import build_folder, find_events_np, make_events_np, unpack_downloads

Recordings = list[tuple[Path, int]]


@dataclass
class Found:
    """Recordings of a split that were found."""

    recordings: Recordings
    class_names: tuple[str, ...]
    orient: str = ""  # see `EventDataset`
    by_ratio: bool = False  # the data set has no split of its own


_SPLITS = {"train": ("train",), "test": ("test", "val", "validation")}

# How many recordings there are. Sources: CIFAR10-DVS: Li et al. 2017, abstract. DVS128 Gesture: what spikingjelly 2.0
# cuts out of its files, whose documentation says so and why the paper counts 1,342. N-MNIST, N-Caltech101: Orchard et
# al. 2015 (MNIST's 70,000; Caltech101 without "Faces"), and tonic 1.7, which takes fewer than 8,709 files for an
# incomplete N-Caltech101. N-CARS: Sironi et al. 2018, 12,336 cars and 11,693 others, of which 7,940 and 7,482 are to be
# trained on. ASL-DVS: Bi et al. 2019, 4,200 of each letter, and tonic 1.7.
_COUNTS = {
    "CIFAR10-DVS": 10_000,
    "DVS128 Gesture (train)": 1176,
    "DVS128 Gesture (test)": 288,
    "N-MNIST (train)": 60_000,
    "N-MNIST (test)": 10_000,
    "N-Caltech101": 8709,
    "N-CARS (train)": 15_422,
    "N-CARS (test)": 8607,
    "ASL-DVS": 100_800,
}


def create_event_dataset(
    name: str,
    root: str | Path,
    split: str = "train",
    *,
    time_steps: int = 16,
    split_by: str = "number",
    size: int | tuple[int, int] | None = None,
    sensor_size: int | tuple[int, int] | None = None,
    train_ratio: float = 0.9,
    split_seed: int | None = None,
    on_error: str = "raise",
    cache_dir: str | Path | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
) -> EventDataset:
    """Create a data set of event clips by name. Nothing is downloaded; what is missing is said, and where to get it.

    - "cifar10dvs": CIFAR10-DVS as its archives unpack, `root/<class>/*.aedat`, or as spikingjelly lays it out
      (`root/events_np`), or the archives themselves in `root/download`, which are unpacked to `root/extract`. Split 0.9
      by class without shuffling, as published.
    - "dvs128gesture": DVS128 Gesture, `root/DvsGesture/*.aedat` with its labels, which are cut into gestures in
      `root/events_np`, or likewise. Its own split by user. Classes are in spikingjelly's order, which sorts their
      numbers as text: 0, 1, 10, 2, ...
    - "nmnist": N-MNIST unpacked (`root/Train`, `root/Test`), a folder of .bs2 files with lists such as train1K.txt and
      test100.txt, or as spikingjelly lays it out.
    - "ncaltech101": N-Caltech101, `root/Caltech101/<class>/*.bin`, split by class.
    - "ncars": N-CARS, `root/n-cars_train/{cars,background}/*.dat` and `root/n-cars_test`, its own split.
    - "asldvs": ASL-DVS, `root/<letter>/*.mat`, split by class.
    - "folder": class folders of recordings, `root/<class>/*`, split by class, or `root/train/<class>/*` and
      `root/test/<class>/*` (also "val", "validation"), in any format of `read_events`. Classes are in the order of
      their sorted names.

    Args:
        name: One of the above.
        root: Folder of the data.
        split: "train" or "test".
        time_steps: Number of frames, T.
        split_by: "number" gives every frame the same number of events, "time" the same duration.
        size: (height, width), or one number for both, to sample down to; None keeps the sensor's.
        sensor_size: (height, width), or one number for both, of the camera; for "folder" only, the others' are known.
        train_ratio: Share of each class to train on, where the data set has no split of its own.
        split_seed: Shuffle before such a split; None does not, as published.
        on_error, cache_dir, transform: See `EventDataset`.

    Raises:
        FileNotFoundError: If the data is not there.
        ValueError: If an argument or the data does not fit.
    """
    if name not in EVENT_DATASETS:
        raise ValueError(f"name={name!r} is unknown, expected one of {', '.join(EVENT_DATASETS)}")
    if split not in _SPLITS:
        raise ValueError(f"split={split!r} needs to be one of {', '.join(_SPLITS)}")
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"root={str(root)!r} is not a folder")
    known_size, find = EVENT_DATASETS[name]
    camera = known_size if sensor_size is None else to_2tuple(sensor_size)
    if known_size is not None and camera != known_size:
        raise ValueError(f"sensor_size={sensor_size} is wrong for {name}, whose camera has {known_size}")
    spec = FrameSpec(time_steps, split_by, None if size is None else to_2tuple(size))
    found = find(root, "train" if split == "train" else "test", train_ratio, split_seed)
    if not found.recordings:
        raise ValueError(f"the {split} split of {name} in {root} is empty; train_ratio={train_ratio} may leave nothing")
    data = EventDataset(
        found.recordings,
        found.class_names,
        spec,
        sensor_size=camera,
        on_error=on_error,
        cache_dir=cache_dir,
        transform=transform,
        orient=found.orient,
    )
    order = "in the order of names" if split_seed is None else f"shuffled with seed {split_seed}"
    data.split = f"{split}, {train_ratio:g} of each class {order}" if found.by_ratio else f"{split}, the data set's own"
    return data


def _cifar10_dvs(root: Path, split: str, train_ratio: float, split_seed: int | None) -> Found:
    from spikingjelly.datasets.cifar10_dvs import CIFAR10DVS, CIFAR10DVS_CLASS_NAMES

    folder, orient = find_events_np(root), ""
    if folder is None:
        # The archives hold a folder for each class; jAER's columns and rows are exchanged in what spikingjelly makes.
        folder, orient = _with_folders(CIFAR10DVS_CLASS_NAMES, root, root / "extract"), "transpose"
        folder = folder or unpack_downloads(CIFAR10DVS, "CIFAR10-DVS", root)
    classes = _expect_classes(folder, CIFAR10DVS_CLASS_NAMES)
    recordings = _in_class_folders(folder, classes)
    _check_complete("CIFAR10-DVS", folder, recordings)
    return Found(_take(recordings, split, train_ratio, split_seed), classes, orient, by_ratio=True)


def _dvs128_gesture(root: Path, split: str, _train_ratio: float, _split_seed: int | None) -> Found:
    folder = find_events_np(root)
    if folder is None:
        original = find_gestures(root)
        if original is None:
            from spikingjelly.datasets.dvs128_gesture import DVS128Gesture

            unpack_downloads(DVS128Gesture, "DVS128 Gesture", root)
            original = find_gestures(root)
            if original is None:
                raise FileNotFoundError(f"{root / 'extract'} has no DvsGesture/trials_to_train.txt")
        check_gestures(original)
        folder = root / "events_np"
        build_folder(folder, "DVS128 Gesture: could", lambda target: cut_gestures(original, target))
    classes = _expect_classes(folder / split, [str(i) for i in range(11)])
    recordings = _in_class_folders(folder / split, classes)
    _check_complete(f"DVS128 Gesture ({split})", folder, recordings)
    return Found(recordings, classes)


def _nmnist(root: Path, split: str, _train_ratio: float, _split_seed: int | None) -> Found:
    digits = [str(i) for i in range(10)]
    lists = sorted(root.glob(f"{split}*.txt"))
    if len(lists) > 1:
        raise ValueError(f"{root} has several lists of the {split} split: {', '.join(path.name for path in lists)}")
    if lists:
        return Found(_in_list(lists[0], len(digits)), tuple(digits))
    folder = root / split.capitalize()
    if not folder.is_dir():
        from spikingjelly.datasets.n_mnist import NMNIST

        folder = make_events_np(NMNIST, "N-MNIST", root) / split
    classes = _expect_classes(folder, digits)
    recordings = _in_class_folders(folder, classes)
    _check_complete(f"N-MNIST ({split})", folder, recordings)
    return Found(recordings, classes)


def _ncaltech101(root: Path, split: str, train_ratio: float, split_seed: int | None) -> Found:
    """Caltech101.zip holds a folder for each of 101 classes, among them BACKGROUND_Google and Faces_easy or not."""
    folder = root / "Caltech101" if (root / "Caltech101").is_dir() else root
    classes = _subfolders(folder)
    if len(classes) < 2:
        raise FileNotFoundError(
            f"N-Caltech101 is not in {root}: expected Caltech101.zip, unpacked, so that there are "
            f"{root}/Caltech101/<class>/image_0001.bin; it is at https://www.garrickorchard.com/datasets/n-caltech101"
        )
    recordings = _in_class_folders(folder, classes)
    _check_complete("N-Caltech101", folder, recordings)
    return Found(_take(recordings, split, train_ratio, split_seed), classes, by_ratio=True)


def _ncars(root: Path, split: str, _train_ratio: float, _split_seed: int | None) -> Found:
    classes = ("background", "cars")
    name = f"n-cars_{split}"
    places = [root, root / "Prophesee_Dataset_n_cars"]
    folder = next((place / name for place in places if (place / name).is_dir()), None)
    if folder is None:
        raise FileNotFoundError(
            f"N-CARS ({split}) is not in {root}: expected {root}/{name}/{{cars,background}}/*.dat, or "
            f"Prophesee_Dataset_n_cars with these in it; it is at https://www.prophesee.ai/dataset-n-cars"
        )
    recordings = _in_class_folders(folder, _expect_classes(folder, classes))
    _check_complete(f"N-CARS ({split})", folder, recordings)
    return Found(recordings, classes)


def _asl_dvs(root: Path, split: str, train_ratio: float, split_seed: int | None) -> Found:
    letters = tuple("abcdefghiklmnopqrstuvwxy")  # j and z are movements
    folder = _with_folders(letters, root, root / "ASLDVS", root / "extract")
    if folder is None:
        raise FileNotFoundError(
            f"ASL-DVS is not in {root}: expected {root}/a/a_0001.mat and so on for the letters {''.join(letters)}; it "
            "is at https://github.com/PIX2NVS/NVS2Graph"
        )
    recordings = _in_class_folders(folder, _expect_classes(folder, letters))
    _check_complete("ASL-DVS", folder, recordings)
    # spikingjelly turns these upright too.
    return Found(_take(recordings, split, train_ratio, split_seed), letters, "rotate", by_ratio=True)


def _folder(root: Path, split: str, train_ratio: float, split_seed: int | None) -> Found:
    names = _subfolders(root)
    split_names = {name for aliases in _SPLITS.values() for name in aliases}
    if not names:
        raise FileNotFoundError(f"{root} has no class folders; expected {root}/<class>/<recording>")
    if not set(names) <= split_names:  # a class may be called "train"
        recordings = _in_class_folders(root, names, text=True)
        return Found(_take(recordings, split, train_ratio, split_seed), names, by_ratio=True)
    folders = [root / name for name in names if name in _SPLITS[split]]
    if len(folders) != 1:
        raise FileNotFoundError(f"{root} has {', '.join(names)}, expected one of {', '.join(_SPLITS[split])} in it")
    # Of all splits, so that a class index means the same in each of them.
    classes = tuple(sorted({c for name in names for c in _subfolders(root / name)}))
    return Found(_in_class_folders(folders[0], classes, split == "train", text=True), classes)


# Sensor's (height, width) where it is known, and how to find the recordings.
EVENT_DATASETS: dict[str, tuple[tuple[int, int] | None, Callable[..., Found]]] = {
    "cifar10dvs": ((128, 128), _cifar10_dvs),
    "dvs128gesture": ((128, 128), _dvs128_gesture),
    "nmnist": ((34, 34), _nmnist),
    "ncaltech101": ((180, 240), _ncaltech101),
    "ncars": ((100, 120), _ncars),
    "asldvs": ((180, 240), _asl_dvs),
    "folder": (None, _folder),
}


def _take(recordings: Recordings, split: str, train_ratio: float, split_seed: int | None) -> Recordings:
    # Over all recordings, bad ones too: leaving some out must not move others to the other side.
    train, test = split_by_class([target for _, target in recordings], train_ratio, split_seed)
    return [recordings[i] for i in (train if split == "train" else test)]


def _subfolders(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")))


def _expect_classes(folder: Path, expected: Sequence[str]) -> tuple[str, ...]:
    missing = [name for name in expected if not (folder / name).is_dir()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks the class folders {', '.join(missing)}; is the data complete?")
    return tuple(sorted(expected))


def _with_folders(classes: Sequence[str], *places: Path) -> Path | None:
    """The first place that has a folder of any of the classes."""
    return next((place for place in places if any((place / name).is_dir() for name in classes)), None)


def _check_complete(title: str, folder: Path, recordings: Recordings) -> None:
    expected = _COUNTS[title]
    if len(recordings) < expected:
        warnings.warn(f"{title} in {folder}: {len(recordings):,} of {expected:,} recordings are there", stacklevel=4)


def _in_class_folders(root: Path, classes: tuple[str, ...], complete: bool = True, text: bool = False) -> Recordings:
    """Recordings in the order of torchvision's DatasetFolder, on which the published split rests.

    With `text`, files of text are recordings where a class has no others: notes and lists lie beside recordings, too.
    """
    recordings: Recordings = []
    for target, name in enumerate(classes):
        files = [
            Path(parent) / file
            for parent, _, names in sorted(os.walk(root / name, followlinks=True))
            for file in sorted(names)
        ]
        suffixes: tuple[str, ...] = EVENT_SUFFIXES
        found = [file for file in files if file.suffix.lower() in suffixes]
        if not found and text:
            suffixes = (*EVENT_SUFFIXES, *TEXT_SUFFIXES)
            found = [file for file in files if file.suffix.lower() in suffixes]
        if not found and (complete or (root / name).is_dir()):
            raise ValueError(f"class {name!r} has no recordings ({', '.join(suffixes)}) in {root / name}")
        recordings += [(file, target) for file in found]
    return recordings


def _in_list(path: Path, num_classes: int) -> Recordings:
    """Recordings of a list of lines "<sample> <class>" after a "#" comment; sample n is the file n.bs2 beside it."""
    recordings: Recordings = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        fields = line.split("#")[0].split()
        if not fields:
            continue
        if len(fields) != 2 or not all(f.isdecimal() for f in fields) or int(fields[1]) >= num_classes:
            raise ValueError(f"{path}, line {number}: expected a sample and a class below {num_classes}, got {line!r}")
        recordings.append((path.parent / f"{fields[0]}.bs2", int(fields[1])))
    return recordings
