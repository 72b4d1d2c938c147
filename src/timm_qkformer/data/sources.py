"""Where the recordings of the known data sets lie, and which belong to which split."""

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from timm.layers import to_2tuple
from torch import Tensor

from .dataset import EventDataset
from .events import FrameSpec
from .formats import EVENT_SUFFIXES
from .sampling import split_by_class

Recordings = list[tuple[Path, int]]

_SPLITS = {"train": ("train",), "test": ("test", "val", "validation")}


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

    - "cifar10dvs": CIFAR10-DVS as spikingjelly lays it out (`root/events_np`), or from the original archives in
      `root/download`, which spikingjelly converts. Split 0.9 by class without shuffling, as published.
    - "dvs128gesture": DVS128 Gesture, likewise, with its own split by user. Classes are in spikingjelly's order, which
      sorts their numbers as text: 0, 1, 10, 2, ...
    - "nmnist": N-MNIST unpacked (`root/Train`, `root/Test`), a folder of .bs2 files with lists such as train1K.txt and
      test100.txt, or as spikingjelly lays it out.
    - "folder": class folders of recordings, `root/<class>/*`, split by class, or `root/train/<class>/*` and
      `root/test/<class>/*` (also "val", "validation"). Classes are in the order of their sorted names.

    Args:
        name: One of the above.
        root: Folder of the data.
        split: "train" or "test".
        time_steps: Number of frames, T.
        split_by: "number" gives every frame the same number of events, "time" the same duration.
        size: (height, width), or one number for both, to sample down to; None keeps the sensor's.
        sensor_size: (height, width), or one number for both, of the camera; for "folder" only, the others' are known.
        train_ratio: Share of each class to train on, for "cifar10dvs" and for a "folder" without split folders.
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
    recordings, class_names = find(root, split, train_ratio, split_seed)
    if not recordings:
        raise ValueError(f"the {split} split of {name} in {root} is empty; train_ratio={train_ratio} may leave nothing")
    return EventDataset(
        recordings, class_names, spec, sensor_size=camera, on_error=on_error, cache_dir=cache_dir, transform=transform
    )


def _cifar10_dvs(
    root: Path, split: str, train_ratio: float, split_seed: int | None
) -> tuple[Recordings, tuple[str, ...]]:
    from spikingjelly.datasets.cifar10_dvs import CIFAR10DVS, CIFAR10DVS_CLASS_NAMES

    folder = _spikingjelly_events(CIFAR10DVS, "CIFAR10-DVS", root)
    classes = _expect_classes(folder, CIFAR10DVS_CLASS_NAMES)
    return _take(_in_class_folders(folder, classes), split, train_ratio, split_seed), classes


def _dvs128_gesture(
    root: Path, split: str, _train_ratio: float, _split_seed: int | None
) -> tuple[Recordings, tuple[str, ...]]:
    from spikingjelly.datasets.dvs128_gesture import DVS128Gesture

    folder = _spikingjelly_events(DVS128Gesture, "DVS128 Gesture", root) / split
    classes = _expect_classes(folder, [str(i) for i in range(11)])
    return _in_class_folders(folder, classes), classes


def _nmnist(root: Path, split: str, _train_ratio: float, _split_seed: int | None) -> tuple[Recordings, tuple[str, ...]]:
    digits = [str(i) for i in range(10)]
    lists = sorted(root.glob(f"{split}*.txt"))
    if len(lists) > 1:
        raise ValueError(f"{root} has several lists of the {split} split: {', '.join(path.name for path in lists)}")
    if lists:
        return _in_list(lists[0], len(digits)), tuple(digits)
    folder = root / split.capitalize()
    if not folder.is_dir():
        from spikingjelly.datasets.n_mnist import NMNIST

        folder = _spikingjelly_events(NMNIST, "N-MNIST", root) / split
    classes = _expect_classes(folder, digits)
    return _in_class_folders(folder, classes), classes


def _folder(root: Path, split: str, train_ratio: float, split_seed: int | None) -> tuple[Recordings, tuple[str, ...]]:
    names = _subfolders(root)
    split_names = {name for aliases in _SPLITS.values() for name in aliases}
    if not names:
        raise FileNotFoundError(f"{root} has no class folders; expected {root}/<class>/<recording>")
    if not set(names) <= split_names:  # a class may be called "train"
        return _take(_in_class_folders(root, names), split, train_ratio, split_seed), names
    folders = [root / name for name in names if name in _SPLITS[split]]
    if len(folders) != 1:
        raise FileNotFoundError(f"{root} has {', '.join(names)}, expected one of {', '.join(_SPLITS[split])} in it")
    # Of all splits, so that a class index means the same in each of them.
    classes = tuple(sorted({c for name in names for c in _subfolders(root / name)}))
    return _in_class_folders(folders[0], classes, complete=split == "train"), classes


# Sensor's (height, width) where it is known, and how to find (recordings, class names).
EVENT_DATASETS: dict[str, tuple[tuple[int, int] | None, Callable[..., tuple[Recordings, tuple[str, ...]]]]] = {
    "cifar10dvs": ((128, 128), _cifar10_dvs),
    "dvs128gesture": ((128, 128), _dvs128_gesture),
    "nmnist": ((34, 34), _nmnist),
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


def _in_class_folders(root: Path, classes: tuple[str, ...], complete: bool = True) -> Recordings:
    """Recordings in the order of torchvision's DatasetFolder, on which the published split rests."""
    recordings: Recordings = []
    for target, name in enumerate(classes):
        files = [
            Path(parent) / file
            for parent, _, names in sorted(os.walk(root / name, followlinks=True))
            for file in sorted(names)
            if file.lower().endswith(EVENT_SUFFIXES)
        ]
        if not files and (complete or (root / name).is_dir()):
            raise ValueError(f"class {name!r} has no recordings ({', '.join(EVENT_SUFFIXES)}) in {root / name}")
        recordings += [(file, target) for file in files]
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


def _spikingjelly_events(dataset: Any, title: str, root: Path) -> Path:
    """Return `root/events_np`, the recordings as spikingjelly's data sets keep them; make it if the raw files are here.

    spikingjelly's own preparation downloads what is missing, deletes what is damaged and has to be cleaned up by hand
    after an interruption. So its steps are called one by one, into temporary folders that are renamed when complete.
    """
    events, extracted = root / "events_np", root / "extract"
    marker = root / "events_np.building"
    if marker.exists():
        raise ValueError(
            f"{marker}: spikingjelly was interrupted here; delete {events}, {extracted} and this file, then try again"
        )
    if events.is_dir():
        return events
    if not extracted.is_dir():
        _check_downloads(dataset, title, root)
        _build_folder(extracted, title, lambda target: dataset.extract_downloaded_files(root / "download", target))
    _build_folder(events, title, lambda target: dataset.create_raw_from_extracted(extracted, target))
    return events


def _check_downloads(dataset: Any, title: str, root: Path) -> None:
    from torchvision.datasets.utils import check_integrity

    download = root / "download"
    wanted = dataset.resource_url_md5()
    problems = []
    for file, url, md5 in wanted:
        if not (download / file).is_file():
            problems.append(f"  {file} is missing; it is at {url}")
        elif not check_integrity(download / file, md5):
            problems.append(f"  {file} is damaged (its MD5 is not {md5}); it is at {url}")
    if problems:
        raise FileNotFoundError(
            f"{title} is not in {root}: there is no events_np, and of the {len(wanted)} files expected in {download}\n"
            + "\n".join(problems)
            + f"\nDownload them to {download} and call this again; they are unpacked and converted then."
        )


def _build_folder(folder: Path, title: str, build: Callable[[Path], None]) -> None:
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        try:
            build(temporary)
        except Exception as error:
            raise ValueError(f"{title}: spikingjelly could not make {folder} ({error!r})") from error
        temporary.chmod(0o755)  # mkdtemp makes it private
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
