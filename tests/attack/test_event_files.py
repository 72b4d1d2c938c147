"""Mutated event files: each reads as it was, or as something that its format cannot tell from sound, or is refused."""

import random
import tracemalloc

import numpy as np
import pytest

from event_files import random_events, write_aedat4, write_atis, write_npz
from timm_qkformer.data import EventFileError, FrameSpec, check_events, events_to_frames, read_events

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SIZE = (34, 34)
TRIALS = 400


def mutate(content, rng):
    """Flip, cut, repeat or overwrite some bytes."""
    data = bytearray(content)
    kind = rng.choice(["bit", "bytes", "cut", "repeat", "zeros", "swap"])
    at = rng.randrange(len(data))
    length = rng.randint(1, 16)
    if kind == "bit":
        data[at] ^= 1 << rng.randrange(8)
    elif kind == "bytes":
        data[at : at + length] = rng.randbytes(length)
    elif kind == "cut":
        del data[at : at + rng.choice([length, len(data)])]
    elif kind == "repeat":
        data[at:at] = data[at : at + length]
    elif kind == "zeros":
        data[at : at + length] = bytes(length)
    else:
        other = rng.randrange(len(data))
        data[at], data[other] = data[other], data[at]
    return bytes(data), kind


def write_compressed(path, events):
    np.savez_compressed(path, t=events.t, x=events.x, y=events.y, p=events.p)
    return path


FORMATS = {
    ".npz": write_npz,
    "compressed.npz": write_compressed,
    ".bin": write_atis,
    ".aedat4": write_aedat4,
}


@pytest.mark.parametrize("suffix", FORMATS)
def test_mutated_files(suffix, tmp_path):
    if suffix == ".aedat4":
        pytest.importorskip("aedat")
    events = random_events(300, SIZE)
    path = FORMATS[suffix](tmp_path / f"a{suffix}", events)
    content = path.read_bytes()
    refused = same = other = 0
    broken = []
    tracemalloc.start()
    for trial in range(TRIALS):
        rng = random.Random(trial)
        changed, kind = mutate(content, rng)
        path.write_bytes(changed)
        tracemalloc.reset_peak()
        try:
            read = read_events(path)
            check_events(read, SIZE, path)
            frames = events_to_frames(read, FrameSpec(4), SIZE)
        except EventFileError:
            refused += 1
        except BaseException as error:
            broken.append((trial, kind, repr(error)))
        else:
            is_same = len(read) == len(events) and all(
                np.array_equal(getattr(read, name), getattr(events, name)) for name in "txyp"
            )
            same, other = same + is_same, other + (not is_same)
            if frames.sum() != len(read):
                broken.append((trial, kind, "lost events"))
            if suffix.endswith(".npz") and not is_same:  # checksums see everything
                broken.append((trial, kind, "other numbers"))
            if suffix != ".npz" and not suffix.endswith(".npz") and (np.diff(read.t) < 0).any():
                broken.append((trial, kind, "time runs backwards"))
        if tracemalloc.get_traced_memory()[1] > 2**22:
            broken.append((trial, kind, "memory"))
    tracemalloc.stop()
    print(
        f"{suffix}: tried {TRIALS}, held {TRIALS - len(broken)} ({refused} refused, {same} as before, {other} others)"
    )
    assert not broken
