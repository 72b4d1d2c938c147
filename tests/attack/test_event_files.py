"""Mutated event files: each reads as it was, or is repaired with a count, or is refused by name, or has other numbers.

The last where a format has no checksum, and a changed coordinate is as good as the one before.
"""

import random
import time
import tracemalloc
import warnings

import numpy as np
import pytest

from event_formats import FORMATS, write_compressed_aedat4, write_hdf5
from timm_qkformer.data import EventFileError, FrameSpec, events_to_frames, open_events
from timm_qkformer.data.formats.recording import gather

TRIALS = 300
MOST_MEMORY = 2**22  # bytes, beside files of some kilobytes
MOST_TIME = 5  # seconds


def mutate(content, rng):
    """Flip, overwrite, cut, extend, repeat, zero or swap some bytes."""
    data = bytearray(content)
    kind = rng.choice(["bit", "bytes", "cut", "extend", "repeat", "zeros", "swap"])
    at = rng.randrange(len(data))
    length = rng.randint(1, 16)
    if kind == "bit":
        data[at] ^= 1 << rng.randrange(8)
    elif kind == "bytes":
        data[at : at + length] = rng.randbytes(length)
    elif kind == "cut":
        del data[at : at + rng.choice([length, len(data)])]
    elif kind == "extend":
        data += rng.randbytes(rng.choice([length, 1000]))
    elif kind == "repeat":
        data[at:at] = data[at : at + length]
    elif kind == "zeros":
        data[at : at + rng.choice([length, 1000])] = bytes(length)
    else:
        other = rng.randrange(len(data))
        data[at], data[other] = data[other], data[at]
    return bytes(data), kind


def write_packed_npz(path, events):
    np.savez_compressed(path, t=events.t, x=events.x, y=events.y, p=events.p)
    return path


ATTACKED = {
    **FORMATS,
    "npz, compressed": (".npz", write_packed_npz, *FORMATS["npz"][2:]),
    "AEDAT 4, LZ4": (".aedat4", lambda p, e: write_compressed_aedat4(p, e, "LZ4"), *FORMATS["AEDAT 4"][2:]),
    "AEDAT 4, Zstandard": (".aedat4", lambda p, e: write_compressed_aedat4(p, e, "ZSTD"), *FORMATS["AEDAT 4"][2:]),
    "HDF5, gzip": (".h5", lambda p, e: write_hdf5(p, e, compression="gzip"), *FORMATS["HDF5"][2:]),
}
CHECKSUMS = {"npz", "npz, compressed"}
IN_ORDER = {"N-MNIST", "AEDAT 4", "AEDAT 4, LZ4", "AEDAT 4, Zstandard"}


def peak_of_reading(path):
    """Bytes of memory while a file is read in chunks, to its end or to where it is refused; "" or what is wrong."""
    tracemalloc.reset_peak()
    wrong = ""
    try:
        with open_events(path, warn=False) as recording:
            for _ in recording:
                pass
    except EventFileError:
        pass
    except BaseException as error:
        wrong = repr(error)
    return tracemalloc.get_traced_memory()[1], wrong


def attempt(path, events, size, name):
    """What is wrong, "" if nothing."""
    before, memory = time.monotonic(), 0
    tracemalloc.reset_peak()
    try:
        with open_events(path, warn=False) as recording:
            read = gather(recording)
            found = str(recording.findings)
        memory = tracemalloc.get_traced_memory()[1]
    except EventFileError as error:
        wrong = "" if error.path == path and len(error.reason) > 10 else f"an empty reason: {error}"
    except BaseException as error:
        wrong = repr(error)
    else:
        same = len(read) == len(events) and all(np.array_equal(getattr(read, k), getattr(events, k)) for k in "txyp")
        backwards = bool((np.diff(read.t) < 0).any())
        inside = read.x.max() < size[1] and read.y.max() < size[0] and min(read.x.min(), read.y.min()) >= 0
        wrong = ""
        if name in CHECKSUMS and not same:
            wrong = "other numbers in spite of checksums"
        elif backwards and (name in IN_ORDER or (name not in CHECKSUMS and name != "npy" and not found)):
            wrong = "time runs backwards, and nobody says so"
        elif read.sensor_size == size and not inside:
            wrong = "events off the stated sensor"
        elif inside and events_to_frames(read, FrameSpec(4, size=(8, 8)), size).sum() != len(read):
            wrong = "lost events"
    memory = memory or tracemalloc.get_traced_memory()[1]  # of a file that was refused
    if memory > MOST_MEMORY:
        wrong = wrong or f"{memory} bytes of memory"
    if time.monotonic() - before > MOST_TIME:
        wrong = wrong or "too long"
    return wrong


@pytest.mark.parametrize("name", ATTACKED)
@pytest.mark.filterwarnings("ignore")
def test_mutated_event_files(name, tmp_path, tally):
    if name.startswith("AEDAT 4"):
        pytest.importorskip("aedat")
    if name.startswith("HDF5"):
        pytest.importorskip("h5py")
    suffix, write, size, _, make = ATTACKED[name]
    events = make(300, size)
    path = write(tmp_path / f"a{suffix}", events)
    content = path.read_bytes()
    tracemalloc.start()
    try:
        for trial in range(TRIALS):
            changed, kind = mutate(content, random.Random(trial))
            path.unlink()
            path.write_bytes(changed)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                wrong = attempt(path, events, size, name)
            tally.attempt(not wrong, (trial, kind, wrong))
    finally:
        tracemalloc.stop()


LARGE = 400_000  # events
FEW_TRIALS = 10
CHUNK_MEMORY = 2**23  # bytes that a chunk and its decoder may take beside twice the file


@pytest.mark.parametrize("name", ATTACKED)
@pytest.mark.filterwarnings("ignore")
def test_memory_of_large_event_files(name, tmp_path, tally):
    """Read in chunks: a chunk's and no more than twice the file, damaged or not; .mat is unpacked whole."""
    if name.startswith("AEDAT 4"):
        pytest.importorskip("aedat")
    if name.startswith("HDF5"):
        pytest.importorskip("h5py")
    suffix, write, size, _, make = ATTACKED[name]
    path = write(tmp_path / f"a{suffix}", make(LARGE, size))
    content = path.read_bytes()
    most = CHUNK_MEMORY + (2 * len(content) if name != "mat" else 3 * 11 * LARGE)
    tracemalloc.start()
    try:
        for trial in range(FEW_TRIALS):
            changed, kind = mutate(content, random.Random(trial)) if trial else (content, "none")
            path.unlink()
            path.write_bytes(changed)
            del changed
            memory, wrong = peak_of_reading(path)
            held = not wrong and memory < most
            tally.attempt(held, (trial, kind, wrong or f"{memory:,} bytes for a file of {len(content):,}"))
    finally:
        tracemalloc.stop()
