"""DVS128 Gesture's own files: an .aedat recording of a person's gestures, and a .csv that says when each one was."""

from collections import Counter
from pathlib import Path

import numpy as np

from .events import EventFileError
from .formats import read_events

_CLASSES = 11


def find_gestures(root: Path) -> Path | None:
    """The folder with trials_to_train.txt and trials_to_test.txt: `root`, or DvsGesture in it or in `root/extract`."""
    for folder in (root, root / "DvsGesture", root / "extract" / "DvsGesture"):
        if (folder / "trials_to_train.txt").is_file() or (folder / "trials_to_test.txt").is_file():
            return folder
    return None


def check_gestures(folder: Path) -> dict[str, list[str]]:
    """The trials of each split.

    Raises:
        FileNotFoundError: With a listing of the recordings and labels that are missing.
    """
    trials: dict[str, list[str]] = {}
    missing: list[str] = []
    for split in ("train", "test"):
        listing = folder / f"trials_to_{split}.txt"
        if not listing.is_file():
            missing.append(listing.name)
            continue
        trials[split] = [
            line.strip().removesuffix(".aedat") for line in listing.read_text().splitlines() if line.strip()
        ]
        for trial in trials[split]:
            missing += [name for name in (f"{trial}.aedat", f"{trial}_labels.csv") if not (folder / name).is_file()]
    if missing:
        shown = ", ".join(missing[:10]) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
        total = 2 + 2 * sum(map(len, trials.values()))
        raise FileNotFoundError(f"DVS128 Gesture in {folder} lacks {len(missing)} of {total} files: {shown}")
    return trials


def cut_gestures(folder: Path, target: Path) -> None:
    """Write each gesture as `target/<split>/<class>/<trial>_<n>.npz`, as spikingjelly names and counts them.

    Classes are the labels less 1. A gesture begins at its start and ends before its end, as labelled; labels overlap
    now and then in the original.
    """
    for split, names in check_gestures(folder).items():
        for label in range(_CLASSES):
            (target / split / str(label)).mkdir(parents=True, exist_ok=True)
        for name in names:
            events = read_events(folder / f"{name}.aedat")
            seen: Counter[int] = Counter()
            for label, begin, end in read_labels(folder / f"{name}_labels.csv"):
                inside = (events.t >= begin) & (events.t < end)
                columns = {key: getattr(events, key)[inside] for key in "txyp"}
                np.savez(target / split / str(label) / f"{name}_{seen[label]}.npz", **columns)
                seen[label] += 1


def read_labels(path: Path) -> list[tuple[int, int, int]]:
    """Class from 0, begin and end in microseconds of each gesture, from lines "class,startTime_usec,endTime_usec"."""
    labels = []
    for number, line in enumerate(path.read_text().splitlines()[1:], 2):
        if not line.strip():
            continue
        fields = line.split(",")
        if len(fields) != 3 or not all(field.strip().isdecimal() for field in fields):
            raise EventFileError(path, f"line {number} is {line!r}, expected class,startTime_usec,endTime_usec")
        label, begin, end = map(int, fields)
        if not 1 <= label <= _CLASSES or begin >= end:
            raise EventFileError(
                path, f"line {number} is {line!r}, expected a class from 1 to {_CLASSES} and a duration"
            )
        labels.append((label - 1, begin, end))
    return labels
