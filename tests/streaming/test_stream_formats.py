"""`timm-qkformer events` and `stream` on every format that the package reads, and on real recordings."""

import json
import tracemalloc
import warnings

import pytest

from event_files import random_events, real_aedat4, unpack_real_nmnist
from event_formats import FORMATS, write_compressed_aedat4, write_dat, write_hdf5, write_text
from timm_qkformer import cli
from timm_qkformer.data import EventFileError, read_events
from timm_qkformer.streaming import cut_windows

MODEL = "qkformer_hst3_128 --random --precision plain --model-kwargs embed_dims=[8,16,32] num_heads=4 num_classes=3"
CASES = {
    **FORMATS,
    "AEDAT 4, LZ4": (".aedat4", lambda p, e: write_compressed_aedat4(p, e, "LZ4"), *FORMATS["AEDAT 4"][2:]),
    "DSEC": (".h5", lambda p, e: write_hdf5(p, e, t_offset=10**9), *FORMATS["HDF5"][2:]),
}


def run(path, size, capsys):
    """What both commands say of a recording: events of the summary, and of all windows of 50 ms."""
    if path.suffix == ".aedat4":
        pytest.importorskip("aedat")
    if path.suffix in (".h5", ".hdf5"):
        pytest.importorskip("h5py")
    assert cli.main(["events", str(path), "--json"]) == 0
    (summary,) = json.loads(capsys.readouterr().out)
    sensor = ["--sensor-size", *map(str, size)] if size else []
    command = ["stream", *MODEL.split(), "--window", "50ms", "--json"]
    model, *options = command[1:]
    assert cli.main(["stream", model, str(path), *options, *sensor]) == 0, capsys.readouterr().err
    report = json.loads(capsys.readouterr().out)
    assert report["windows"] == len(report["rows"]) == summary["duration"] // 50_000 + 1
    return summary["events"], sum(row["events"] for row in report["rows"])


@pytest.mark.parametrize("name", CASES)
def test_both_commands_read_it(name, tmp_path, capsys):
    suffix, write, size, states, make = CASES[name]
    events = make(300, size)
    path = write(tmp_path / f"a{suffix}", events)
    assert run(path, None if states and name != "AEDAT 3.1" else size, capsys) == (len(events), len(events))


def test_both_commands_read_real_recordings(tmp_path, capsys):
    assert run(real_aedat4(), None, capsys) == (111_954, 111_954)
    path = sorted(unpack_real_nmnist(tmp_path).rglob("*.bs2"))[0]
    count = len(read_events(path))
    assert run(path, (34, 34), capsys) == (count, count)


def test_a_file_is_cut_in_constant_memory(tmp_path):
    path = write_dat(tmp_path / "a.dat", random_events(600_000, (34, 34), span=4_000_000))
    tracemalloc.start()
    try:
        count = sum(window.events for window in cut_windows(path, duration=10_000, size=(17, 17)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 600_000
    assert peak < path.stat().st_size, "the whole recording, of 13 bytes an event, was in memory"


def test_a_file_gives_windows_before_it_is_read(tmp_path):
    """Damage at the end is met at the end."""
    path = write_text(tmp_path / "a.csv", random_events(200_000, (34, 34)), header="t,x,y,p\n")
    path.write_text(path.read_text() + "oops,1,2,3\n")
    windows = cut_windows(path, count=1000, sensor_size=(34, 34))
    assert next(windows).events == 1000
    with pytest.raises(EventFileError, match="oops"):
        list(windows)


def test_events_off_the_sensor_that_is_given(tmp_path):
    path = write_dat(tmp_path / "a.dat", random_events(100, (34, 34)))
    with pytest.raises(EventFileError, match="outside the sensor"):
        list(cut_windows(path, count=10, sensor_size=(20, 34)))


def test_repairs_are_said_once(tmp_path):
    path = write_dat(tmp_path / "a.dat", random_events(100, (34, 34)))
    path.write_bytes(path.read_bytes()[:-3])
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        assert sum(window.events for window in cut_windows(path, duration=10_000)) == 99
    assert [str(warning.message) for warning in found] == [
        f"{path}: the file is cut: 5 bytes at its end are no whole record and were left out"
    ]
