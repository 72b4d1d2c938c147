"""Readers of event files: ours and the libraries', on crafted files of each format.

Every reader turns a file into arrays of all its events, in turns; those that read wrong numbers are named, not timed.
CPU time of the whole process, so that neighbours on the machine do not count. Libraries that are not installed are left
out: faery, evt3, evlib, expelliarmus, evio, tonic, spikingjelly, aedat, h5py, pandas, pyarrow, polars.

`--large GB` writes an EVT 3.0 file of that size instead, turns it into clips, and says the peak memory.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from _common import argument_parser

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import event_formats
from event_files import random_events, write_aedat2, write_aedat3, write_aedat4, write_atis, write_npz
from timm_qkformer.data import Events, iter_clips, open_events, read_events
from timm_qkformer.files import write_atomically

EVT3_SIZE = (720, 1280)
_GROUP = 9  # words of a moment, see `evt3_words`
_PER_BLOCK = 2**16  # moments

Arrays = tuple[Any, Any, Any, Any]  # t, x, y, p


def evt3_words(first: int, moments: int, seed: int, singles: bool = False) -> np.ndarray:
    """Moments of 7 microseconds each: times, a row, a vector of 32 columns with a quarter of them firing, two events.

    With `singles`, six single events instead of the vector.
    """
    rng = np.random.default_rng(seed)
    t = (first + np.arange(moments)) * 7
    words = np.empty((moments, _GROUP), np.uint16)
    words[:, 0] = 8 << 12 | (t >> 12) & 0xFFF
    words[:, 1] = 6 << 12 | t & 0xFFF
    words[:, 2] = rng.integers(0, EVT3_SIZE[0], moments)
    single = 2 << 12 | rng.integers(0, 2, (moments, 6)) << 11 | rng.integers(0, EVT3_SIZE[1], (moments, 6))
    words[:, 3:] = single
    if not singles:
        masks = rng.integers(0, 2**32, moments) & rng.integers(0, 2**32, moments)
        words[:, 3] = 3 << 12 | rng.integers(0, 2, moments) << 11 | rng.integers(0, EVT3_SIZE[1] - 32, moments)
        words[:, 4], words[:, 5] = 4 << 12 | masks & 0xFFF, 4 << 12 | masks >> 12 & 0xFFF
        words[:, 6] = 5 << 12 | masks >> 24
    return words.reshape(-1)


def write_large_evt3(path: Path, size: int, singles: bool = False) -> Path:
    """An EVT 3.0 file of about so many bytes."""
    with path.open("wb") as file:
        file.write(event_formats.raw_header("3.0", EVT3_SIZE))
        first = 0
        while file.tell() < size:
            moments = min(_PER_BLOCK, max((size - file.tell()) // (2 * _GROUP), 1))
            file.write(evt3_words(first, moments, seed=first, singles=singles).astype("<u2").tobytes())
            first += moments
    return path


def library(name: str, read: Callable[[Any, Path], Arrays]) -> Callable[[Path], Arrays] | None:
    """A reader of a library, if it is installed."""
    try:
        module = import_module(name)
    except ImportError:
        return None
    return lambda path: read(module, path)


def columns(array: np.ndarray, names: str = "t x y p") -> Arrays:
    t, x, y, p = (array[name] for name in names.split())
    return t, x, y, p


def faery(module: Any, path: Path) -> Arrays:
    return columns(np.concatenate(list(module.events_stream_from_file(path))), "t x y on")


def expelliarmus(encoding: str) -> Callable[[Any, Path], Arrays]:
    return lambda module, path: columns(module.Wizard(encoding=encoding).read(str(path)))


def evt3(module: Any, path: Path) -> Arrays:
    events = module.decode_file(str(path))
    return events.timestamp, events.x, events.y, events.polarity


def evio(module: Any, path: Path) -> Arrays:
    return columns(module.read(str(path)))


def evlib(module: Any, path: Path) -> Arrays:
    frame = module.load_events(str(path)).collect()
    t, x, y, p = (frame[name].to_numpy() for name in ("t", "x", "y", "polarity"))
    return t.astype("m8[us]") if t.dtype.kind == "m" else t, x, y, p > 0


def table(read: Callable[[Any, Path], Any]) -> Callable[[Any, Path], Arrays]:
    def columns_of(module: Any, path: Path) -> Arrays:
        frame = read(module, path)
        t, x, y, p = (frame[name].to_numpy() for name in "txyp")
        return t, x, y, p

    return columns_of


def numpy_loadtxt(module: Any, path: Path) -> Arrays:
    return tuple(module.loadtxt(path, np.int64, delimiter=",", skiprows=1).T)  # type: ignore[return-value]


def aedat(module: Any, path: Path) -> Arrays:
    return columns(np.concatenate([p["events"] for p in module.Decoder(path) if "events" in p]), "t x y on")


def h5py(module: Any, path: Path) -> Arrays:
    with module.File(path) as file:
        t, x, y, p = (file[f"events/{name}"][:] for name in "txyp")
    return t, x, y, p


def tonic_mnist(module: Any, path: Path) -> Arrays:
    return columns(module.read_mnist_file(str(path), module.events_struct))


def tonic_gesture(module: Any, path: Path) -> Arrays:
    _, events = module.read_dvs_ibm(str(path))
    return columns(events)


def spikingjelly(name: str) -> Callable[[Any, Path], Arrays]:
    return lambda module, path: columns(getattr(module, name)(str(path)))


def numpy_npz(module: Any, path: Path) -> Arrays:
    return columns(module.load(path))


def scipy(module: Any, path: Path) -> Arrays:
    data = module.loadmat(path)
    t, x, y, p = (data[name].ravel() for name in ("ts", "x", "y", "pol"))
    return t, x, y, p


def ours(path: Path) -> Arrays:
    events = read_events(path)
    return events.t, events.x, events.y, events.p


SJ = "spikingjelly.datasets.utils"


def contenders(count: int, folder: Path) -> dict[str, tuple[Path, dict[str, Callable[[Path], Arrays] | None]]]:
    """Files of about so many events, and who reads them."""
    hd, dvs = random_events(count, (480, 640), span=count * 5), random_events(count, (128, 128), span=count * 5)
    vectors = event_formats.clustered(count, (480, 640), span=count * 5)
    return {
        "EVT2": (
            event_formats.write_evt2(folder / "2.raw", hd),
            {
                "faery": library("faery", faery),
                "expelliarmus": library("expelliarmus", expelliarmus("evt2")),
                "evlib": library("evlib", evlib),
            },
        ),
        "EVT2.1": (event_formats.write_evt21(folder / "21.raw", vectors), {"evlib": library("evlib", evlib)}),
        "EVT3, vectors": (
            write_large_evt3(folder / "3v.raw", count * 18 // 10),
            {
                "evt3": library("evt3", evt3),
                "faery": library("faery", faery),
                "expelliarmus": library("expelliarmus", expelliarmus("evt3")),
                "evlib": library("evlib", evlib),
            },
        ),
        "EVT3, single events": (
            write_large_evt3(folder / "3s.raw", count * 3, singles=True),
            {"evt3": library("evt3", evt3), "faery": library("faery", faery)},
        ),
        ".dat": (
            event_formats.write_dat(folder / "a.dat", hd),
            {
                "faery": library("faery", faery),
                "expelliarmus": library("expelliarmus", expelliarmus("dat")),
                "evio": library("evio", evio),
            },
        ),
        "AEDAT 2.0": (write_aedat2(folder / "2.aedat", dvs), {}),
        "AEDAT 3.1": (
            write_aedat3(folder / "3.aedat", dvs),
            {"tonic": library("tonic.io", tonic_gesture), "spikingjelly": library(SJ, spikingjelly("load_aedat_v3"))},
        ),
        "AEDAT 4": (
            write_aedat4(folder / "a.aedat4", dvs),
            {"aedat alone": library("aedat", aedat), "faery": library("faery", faery)},
        ),
        "N-MNIST .bin": (
            write_atis(folder / "a.bin", random_events(count, (34, 34), span=2**22)),
            {
                "tonic": library("tonic.io", tonic_mnist),
                "spikingjelly": library(SJ, spikingjelly("load_ATIS_bin")),
                "evio": library("evio", evio),
            },
        ),
        "HDF5": (event_formats.write_hdf5(folder / "a.h5", hd), {"h5py alone": library("h5py", h5py)}),
        ".mat": (event_formats.write_mat(folder / "a.mat", dvs), {"scipy": library("scipy.io", scipy)}),
        ".npz": (write_npz(folder / "a.npz", hd), {"numpy": library("numpy", numpy_npz)}),
        ".csv": (
            event_formats.write_text(folder / "a.csv", hd, header="t,x,y,p\n"),
            {
                "faery": library("faery", faery),
                "pandas": library("pandas", table(lambda module, path: module.read_csv(path))),
                "pyarrow": library("pyarrow.csv", table(lambda module, path: module.read_csv(path))),
                "polars": library("polars", table(lambda module, path: module.read_csv(path))),
                "numpy.loadtxt": library("numpy", numpy_loadtxt),
            },
        ),
        ".txt in seconds": (event_formats.write_seconds(folder / "a.txt", hd), {}),
    }


def is_wrong(read: Callable[[Path], Arrays], path: Path, expected: Arrays) -> str:
    """What is wrong with a reader's answer, "" if nothing."""
    try:
        found = read(path)
    except BaseException as error:  # parsers in Rust panic with one
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        return f"{type(error).__name__} ({str(error)[:60]})"
    for name, one, other in zip("txyp", found, expected, strict=True):
        if len(one) != len(other):
            return f"{len(one):,} events of {len(other):,}"
        if not np.array_equal(np.asarray(one).astype(np.int64), np.asarray(other).astype(np.int64)):
            return f"another {name}"
    return ""


def measure(rounds: int, count: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        print("writing the files", file=sys.stderr)
        for title, (path, readers) in contenders(count, Path(folder)).items():
            expected = ours(path)
            number = len(expected[0])
            there = {name: read for name, read in readers.items() if read is not None}
            wrong = {name: text for name, read in there.items() if (text := is_wrong(read, path, expected))}
            runs = {"ours": ours, **{name: read for name, read in there.items() if name not in wrong}}
            times: dict[str, list[float]] = {name: [] for name in runs}
            del expected
            for _ in range(rounds):
                for name, read in runs.items():
                    start = time.process_time()
                    read(path)
                    times[name].append(time.process_time() - start)
            rates = {name: number / statistics.median(seconds) / 1e6 for name, seconds in times.items()}
            ratios = {
                name: statistics.median(a / b for a, b in zip(times["ours"], seconds, strict=True))
                for name, seconds in times.items()
                if name != "ours"
            }
            results[title] = {"events": number, "million_per_second": rates, "ours_takes_times": ratios, "wrong": wrong}
            others = [f"{name} {rates[name]:.1f} ({ratio:.2f})" for name, ratio in ratios.items()]
            others += [f"{name}: {text}" for name, text in wrong.items()]
            print(f"| {title} | {rates['ours']:.1f} | {', '.join(others) or '-'} |", flush=True)
    return results


def peak_memory(reset: bool = False) -> float:
    """The most megabytes that this process had since the last reset, which forgets what was before (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def large(gigabytes: float) -> None:
    """Clips of a large file, and the memory that they took."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_large_evt3(Path(folder) / "large.raw", int(gigabytes * 1e9))
        before = peak_memory(reset=True)
        clips = events = 0
        start, begin = time.process_time(), time.perf_counter()
        with open_events(path) as recording, tqdm(total=recording.size, unit="B", unit_scale=True) as bar:

            def counted() -> Any:
                nonlocal events
                for chunk in recording:
                    events += len(chunk)
                    bar.update(recording.progress - bar.n)
                    yield Events(chunk.t, chunk.x, chunk.y, chunk.p)

            for clip in iter_clips(counted(), EVT3_SIZE, 16, duration=10_000, size=(90, 160)):
                clips += 1
                assert clip.sum() > 0
        after = peak_memory()
        seconds, passed = time.process_time() - start, time.perf_counter() - begin
        print(
            f"{path.stat().st_size:,} bytes, {events:,} events: {clips} clips [16, 2, 90, 160] in {passed:.0f} s, "
            f"{seconds:.0f} s of CPU time, {events / seconds / 1e6:.1f} M events/s; peak memory "
            f"{before:.0f} MB before, {after:.0f} MB after"
        )


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown"


def main() -> None:
    parser = argument_parser(__doc__ or "", rounds=5)
    parser.add_argument("--events", type=int, default=2_000_000, help="in each file, about (%(default)s)")
    parser.add_argument("--large", type=float, metavar="GB", help="clips of one large file instead")
    args: argparse.Namespace = parser.parse_args()
    if args.large:
        large(args.large)
        return
    print("| Format | Ours, M events/s | Others, M events/s (our time / theirs) |\n|---|---|---|")
    results = {"processor": processor(), "formats": measure(args.rounds, args.events)}
    import json

    args.out.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out / "event_files.json", json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
