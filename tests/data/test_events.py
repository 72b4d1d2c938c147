import pickle
import sys

import numpy as np
import pytest

from event_files import as_dict, random_events, real_aedat4, write_aedat4, write_atis, write_npz
from timm_qkformer.data import EventFileError, check_events, read_events

WRITERS = {".npz": write_npz, ".bin": write_atis, ".bs2": write_atis, ".aedat4": write_aedat4}


def write(path, events):
    if path.suffix == ".aedat4":
        pytest.importorskip("aedat")
    return WRITERS[path.suffix](path, events)


@pytest.mark.parametrize("suffix", WRITERS)
def test_reads_what_was_written(suffix, tmp_path):
    events = random_events(1000, (34, 30))
    read = read_events(write(tmp_path / f"a{suffix}", events))
    for key, values in as_dict(events).items():
        np.testing.assert_array_equal(getattr(read, key), values)
    assert read.sensor_size == ((34, 30) if suffix == ".aedat4" else None)


def test_agrees_with_spikingjelly_on_atis_files(tmp_path):
    from spikingjelly.datasets.utils import load_ATIS_bin

    path = write_atis(tmp_path / "a.bin", random_events(500, (34, 34), span=2**23))
    read = read_events(path)
    for key, values in load_ATIS_bin(path).items():
        np.testing.assert_array_equal(getattr(read, key), values)


@pytest.mark.parametrize("dtype", [bool, np.int8, np.float32])
def test_npz_polarities(dtype, tmp_path):
    np.savez(tmp_path / "a.npz", t=[1, 2], x=[0, 1], y=[0, 1], p=np.array([0, 1], dtype))
    assert read_events(tmp_path / "a.npz").p.tolist() == [False, True]


def test_npz_signed_polarities(tmp_path):
    np.savez(tmp_path / "a.npz", t=[1, 2], x=[0, 1], y=[0, 1], p=[-1, 1])
    assert read_events(tmp_path / "a.npz").p.tolist() == [False, True]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"t": [1], "x": [1], "y": [1]}, "lacks p"),
        ({"t": [1, 2], "x": [1], "y": [1], "p": [1]}, "vectors of one length"),
        ({"t": [[1]], "x": [[1]], "y": [[1]], "p": [[1]]}, "vectors of one length"),
        ({"t": [0.5], "x": [1], "y": [1], "p": [1]}, "whole microseconds"),
        ({"t": [np.nan], "x": [1], "y": [1], "p": [1]}, "whole microseconds"),
        ({"t": [1], "x": [1], "y": [1], "p": [7]}, "polarities run from 7 to 7"),
        ({"t": [], "x": [], "y": [], "p": []}, "holds no events"),
        ({"t": np.array([{}]), "x": [1], "y": [1], "p": [1]}, "not a readable .npz"),
    ],
)
def test_bad_npz(arrays, message, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(EventFileError, match=message) as caught:
        read_events(tmp_path / "a.npz")
    assert caught.value.path == tmp_path / "a.npz"
    assert "a.npz" in str(caught.value)


@pytest.mark.parametrize("suffix", WRITERS)
def test_truncated(suffix, tmp_path):
    path = write(tmp_path / f"a{suffix}", random_events(1000))
    path.write_bytes(path.read_bytes()[:-1001])
    with pytest.raises(EventFileError, match="a" + suffix):
        read_events(path)


@pytest.mark.parametrize("suffix", WRITERS)
def test_empty_file(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    path.touch()
    with pytest.raises(EventFileError, match="0 bytes"):
        read_events(path)


@pytest.mark.parametrize("suffix", [".npz", ".aedat4"])
def test_noise(suffix, tmp_path):
    pytest.importorskip("aedat")
    path = tmp_path / f"a{suffix}"
    path.write_bytes(np.random.default_rng(0).bytes(1000))
    with pytest.raises(EventFileError, match="not a readable"):
        read_events(path)


def test_single_array_is_no_recording(tmp_path):
    with open(tmp_path / "a.npz", "wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(EventFileError, match="single array"):
        read_events(tmp_path / "a.npz")


def test_unreadable_paths(tmp_path):
    with pytest.raises(EventFileError, match="no such file"):
        read_events(tmp_path / "a.npz")
    with pytest.raises(EventFileError, match=r"unknown suffix '\.mat'"):
        read_events(tmp_path / "a.mat")
    (tmp_path / "b.npz").mkdir()
    with pytest.raises(EventFileError, match="no such file"):
        read_events(tmp_path / "b.npz")


def test_a_panic_of_the_aedat4_decoder_is_an_error(tmp_path):
    pytest.importorskip("aedat")
    path = write_aedat4(tmp_path / "a.aedat4", random_events(10))
    data = path.read_bytes()
    # The string's length points past the end; the decoder panics with a BaseException.
    at = data.index(b"<dv") - 4
    path.write_bytes(data[:at] + b"\xff\xff\xff\x2f" + data[at + 4 :])
    with pytest.raises(EventFileError, match=r"not a readable \.aedat4"):
        read_events(path)


def test_aedat4_with_several_streams(tmp_path):
    pytest.importorskip("aedat")
    with pytest.raises(EventFileError, match="2 event streams"):
        read_events(write_aedat4(tmp_path / "a.aedat4", random_events(10), streams=2))


def test_aedat4_without_its_reader(tmp_path, monkeypatch):
    path = write_aedat4(tmp_path / "a.aedat4", random_events(10))
    monkeypatch.setitem(sys.modules, "aedat", None)
    with pytest.raises(ImportError, match=r"timm-qkformer\[events\]"):
        read_events(path)


def test_real_aedat4():
    pytest.importorskip("aedat")
    events = read_events(real_aedat4())
    assert len(events) == 111_954
    assert events.sensor_size == (240, 320)
    check_events(events, (240, 320), "sample")
    assert (np.diff(events.t) >= 0).all()
    assert 0.1 < events.p.mean() < 0.9


def test_error_survives_pickling():
    error = pickle.loads(pickle.dumps(EventFileError("a/b.npz", "is bad")))
    assert str(error) == str(EventFileError("a/b.npz", "is bad"))


@pytest.mark.parametrize(("size", "message"), [((10, 34), "y runs from"), ((34, 10), "x runs from")])
def test_events_off_the_sensor(size, message):
    with pytest.raises(EventFileError, match=message):
        check_events(random_events(1000), size, "a")


def test_nonsensical_timestamps(tmp_path):
    np.savez(tmp_path / "a.npz", t=[-(2**62), 5, 2**62], x=[0] * 3, y=[0] * 3, p=[0] * 3)
    with pytest.raises(EventFileError, match="timestamps run from -4611686018427387904 to 4611686018427387904"):
        check_events(read_events(tmp_path / "a.npz"), (1, 1), "a")
