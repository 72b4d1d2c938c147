"""Recordings in every format, their frames, and the examples of docs/events.md."""

import pickle
import sys
import warnings

import numpy as np
import pytest

from doc_examples import DOCS, run_examples
from event_files import as_dict, random_events, real_aedat4, write_aedat4, write_atis, write_npz
from timm_qkformer.data import EventFileError, Events, FrameSpec, check_events, events_to_frames, read_events

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


@pytest.mark.parametrize("p", [np.array([0, 1], dtype) for dtype in (bool, np.int8, np.float32)] + [[-1, 1]])
def test_npz_polarities(p, tmp_path):
    np.savez(tmp_path / "a.npz", t=[1, 2], x=[0, 1], y=[0, 1], p=p)
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
def test_truncated_and_empty(suffix, tmp_path):
    path = write(tmp_path / f"a{suffix}", random_events(1000))
    for content, message in ((path.read_bytes()[:-1001], "a" + suffix), (b"", "0 bytes")):
        path.write_bytes(content)
        with pytest.raises(EventFileError, match=message):
            read_events(path)


def test_unreadable_files(tmp_path):
    (tmp_path / "folder.npz").mkdir()
    with open(tmp_path / "array.npz", "wb") as file:
        np.save(file, np.zeros(3))
    for name in ("noise.npz", "noise.aedat4", "noise.xyz"):
        (tmp_path / name).write_bytes(np.random.default_rng(0).bytes(1000))
    for name, message in [
        ("nowhere.npz", "no such file"),
        ("folder.npz", "no such file"),
        ("noise.xyz", r"of no known format .* unknown suffix '\.xyz'"),
        ("array.npz", "single array"),
        ("noise.npz", "not a readable"),
        ("noise.aedat4", "not a readable"),
    ]:
        if name.endswith("aedat4"):
            pytest.importorskip("aedat")
        with pytest.raises(EventFileError, match=message):
            read_events(tmp_path / name)


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


CASES = [(count, by, steps) for count in (1000, 1007) for by in ("number", "time") for steps in (1, 3, 16)]


@pytest.mark.parametrize(("count", "split_by", "time_steps"), [*CASES, (3, "number", 4)])
def test_frames_are_spikingjellys(time_steps, split_by, count):
    from spikingjelly.datasets.utils import integrate_events_by_fixed_frames_number

    events = random_events(count, (20, 30), seed=count)
    ours = events_to_frames(events, FrameSpec(time_steps, split_by), (20, 30))
    theirs = integrate_events_by_fixed_frames_number(as_dict(events), split_by, time_steps, 20, 30)
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(("t", "counts"), [([0, 1, 98, 99], [2, 0, 0, 2]), ([0] * 4, [4, 0, 0, 0])])
def test_a_silent_slice_is_an_empty_frame(t, counts):
    zero = np.zeros(4, dtype=np.int64)
    frames = events_to_frames(Events(np.array(t), zero, zero, zero > 0), FrameSpec(4, "time"), (1, 1))
    assert frames.sum((1, 2, 3)).tolist() == counts


def test_channels_are_off_and_on():
    one = np.array([1, 1, 1])
    frames = events_to_frames(Events(one, one, one * 0, np.array([True, True, False])), FrameSpec(1), (2, 3))
    assert frames[0, 0].tolist() == [[0, 1, 0], [0, 0, 0]]
    assert frames[0, 1].tolist() == [[0, 2, 0], [0, 0, 0]]


def test_sampling_down_by_whole_ratios_is_sum_pooling():
    events = random_events(5000, (24, 36))
    full = events_to_frames(events, FrameSpec(4), (24, 36))
    small = events_to_frames(events, FrameSpec(4, size=(8, 9)), (24, 36))
    np.testing.assert_array_equal(small, full.reshape(4, 2, 8, 3, 9, 4).sum((3, 5)))


def test_sampling_down_counts_every_event():
    frames = events_to_frames(random_events(5000, (34, 34)), FrameSpec(4, size=(32, 15)), (34, 34))
    assert frames.shape == (4, 2, 32, 15)
    assert frames.sum() == 5000
    assert frames.sum((0, 1)).min() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "time_steps=0"),
        ((4, "count"), "split_by='count'"),
        ((4, "number", (0, 3)), r"size=\(0, 3\)"),
        ((2, "number", (64, 34)), "larger than the sensor"),
    ],
)
def test_bad_spec(arguments, message):
    with pytest.raises(ValueError, match=message):
        events_to_frames(random_events(10), FrameSpec(*arguments), (34, 34))


def test_examples_of_the_docs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the skipped recording
        assert run_examples(DOCS / "events.md") == 6
    out = capsys.readouterr().out
    for text in ("[4, 4, 2, 64, 64] torch.int64", "[4, 2]", "4000 (16, 2, 128, 128) 4000"):
        assert text in out
    for text in ("1 of 18 recordings cannot be used", "17 {'3.npz': 'the file is empty (0 bytes)'}"):
        assert text in out
