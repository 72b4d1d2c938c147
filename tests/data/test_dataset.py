import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from event_files import random_events, write_aedat4, write_atis, write_npz
from timm_qkformer.data import EventDataset, EventFileError, FrameSpec, events_to_frames

SIZE = (34, 34)
SPEC = FrameSpec(4, size=(16, 16))


@pytest.fixture
def recordings(tmp_path):
    return [(write_atis(tmp_path / f"{i}.bin", random_events(500 + i, seed=i)), i % 2) for i in range(6)]


@pytest.fixture
def spoilt(recordings, tmp_path):
    """Recordings 1, 2 and 4 are truncated, empty and missing."""
    recordings[1][0].write_bytes(recordings[1][0].read_bytes()[:-3])
    recordings[2][0].write_bytes(b"")
    recordings[4][0].unlink()
    return recordings


def dataset(recordings, spec=SPEC, sensor_size=SIZE, **kwargs):
    return EventDataset(recordings, ("even", "odd"), spec, sensor_size, **kwargs)


@pytest.mark.parametrize("cached", [False, True])
def test_clips(cached, recordings, tmp_path):
    data = dataset(recordings, cache_dir=tmp_path / "cache" if cached else None)
    assert len(data) == 6
    assert data.targets == [0, 1] * 3
    for i in range(6):
        clip, target = data[i]
        assert clip.dtype == torch.float32
        assert clip.shape == (4, 2, 16, 16)
        expected = events_to_frames(random_events(500 + i, seed=i), SPEC, SIZE)
        np.testing.assert_array_equal(clip.numpy(), expected)
        assert target == i % 2
    assert torch.equal(data[-1][0], data[5][0])
    for index in (6, -7):
        with pytest.raises(IndexError):
            data[index]


def test_the_transform_sees_each_clip(recordings):
    data = dataset(recordings, transform=lambda clip: clip * 2)
    assert torch.equal(data[3][0], dataset(recordings)[3][0] * 2)


@pytest.mark.parametrize("cached", [False, True])
def test_bad_recordings_are_refused_by_name_and_number(cached, spoilt, tmp_path):
    with pytest.raises(ValueError, match="3 of 6 recordings cannot be used") as caught:
        dataset(spoilt, cache_dir=tmp_path / "cache" if cached else None)
    for text in ("1.bin: has 2502 bytes", "2.bin: the file is empty", "4.bin: no such file", "on_error='skip'"):
        assert text in str(caught.value)


@pytest.mark.parametrize("cached", [False, True])
def test_bad_recordings_are_skipped_by_name_and_number(cached, spoilt, tmp_path):
    for _ in range(2):  # the second time with a cache that knows the good ones
        with pytest.warns(
            UserWarning, match=r"3 of 6 recordings cannot be used: .*1\.bin: .*2\.bin: .*4\.bin: "
        ) as seen:
            data = dataset(spoilt, on_error="skip", cache_dir=tmp_path / "cache" if cached else None)
        assert len(seen) == 1
        assert [path.name for path, _ in data.recordings] == ["0.bin", "3.bin", "5.bin"]
        assert data.targets == [0, 1, 1]
        assert {path.name for path in data.skipped} == {"1.bin", "2.bin", "4.bin"}
        assert len([data[i] for i in range(len(data))]) == 3


def test_long_lists_of_bad_recordings_are_cut(tmp_path):
    with pytest.raises(ValueError, match="and 15 more"):
        dataset([(tmp_path / f"{i}.bin", 0) for i in range(25)])


def test_a_class_that_loses_all_its_recordings_is_named(recordings):
    for path, target in recordings:
        if target == 1:
            path.unlink()
    with pytest.warns(UserWarning, match="of odd none is left"):
        assert len(dataset(recordings, on_error="skip")) == 3


def test_nothing_usable(tmp_path):
    with pytest.raises(ValueError, match="1 of 1 recordings cannot be used"):
        dataset([(tmp_path / "a.bin", 0)], on_error="skip")
    with pytest.raises(ValueError, match="no recordings"):
        dataset([])


def test_events_off_the_sensor_are_a_bad_recording(recordings):
    with pytest.raises(ValueError, match=r"6 of 6 recordings .* outside the sensor"):
        dataset(recordings, FrameSpec(4), (16, 16))


def test_a_recording_spoilt_after_the_start(recordings):
    data = dataset(recordings)
    recordings[3][0].write_bytes(b"123")
    with pytest.raises(EventFileError, match=r"3\.bin"):
        data[3]
    data.on_error = "skip"
    with pytest.warns(UserWarning, match=r"next recording takes its place: .*3\.bin"):
        clip, target = data[3]
    assert torch.equal(clip, data[4][0])
    assert target == 0


def test_all_recordings_gone_after_the_start(recordings):
    data = dataset(recordings, on_error="skip")
    for path, _ in recordings:
        path.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="none of the 6 recordings"):
            data[0]


def test_a_cache_spares_the_reading(recordings, tmp_path, monkeypatch):
    first = dataset(recordings, cache_dir=tmp_path / "cache")
    clips = [first[i][0] for i in range(6)]

    def never(path):
        raise AssertionError(f"{path} was read again")

    with monkeypatch.context() as patch:
        patch.setattr("timm_qkformer.data.dataset.read_events", never)
        again = dataset(recordings, cache_dir=tmp_path / "cache")
        assert all(torch.equal(again[i][0], clips[i]) for i in range(6))
    # Other parameters have their own entries.
    other = dataset(recordings, FrameSpec(4, "time", (16, 16)), cache_dir=tmp_path / "cache")
    assert not torch.equal(other[0][0], clips[0])


def test_a_changed_recording_is_read_again(recordings, tmp_path):
    data = dataset(recordings, cache_dir=tmp_path / "cache")
    before = data[0][0]
    write_atis(recordings[0][0], random_events(500, seed=99))
    os.utime(recordings[0][0], ns=(1, 1))
    assert not torch.equal(data[0][0], before)


def test_the_size_of_the_sensor(tmp_path):
    npz = [(write_npz(tmp_path / "a.npz", random_events(100)), 0)]
    with pytest.raises(ValueError, match=r"sensor_size=\(height, width\) is needed: a\.npz"):
        dataset(npz, sensor_size=None)
    with pytest.raises(ValueError, match="larger than the sensor"):
        dataset(npz, FrameSpec(4, size=(64, 64)))


def test_cameras_of_several_sizes(tmp_path):
    pytest.importorskip("aedat")
    recordings = [
        (write_aedat4(tmp_path / f"{size[0]}.aedat4", random_events(100, size)), 0) for size in ((20, 30), (24, 32))
    ]
    with pytest.raises(ValueError, match=r"several sizes, \[\(20, 30\), \(24, 32\)\]"):
        dataset(recordings, FrameSpec(4), None)
    assert dataset(recordings, FrameSpec(4, size=(16, 16)), None)[1][0].shape == (4, 2, 16, 16)
    with pytest.raises(ValueError, match=r"1 of 2 recordings .*20\.aedat4: size=\(22, 22\) is larger"):
        dataset(recordings, FrameSpec(4, size=(22, 22)), None)


def test_bad_on_error(recordings):
    with pytest.raises(ValueError, match="on_error='ignore'"):
        dataset(recordings, on_error="ignore")


def test_paths_may_be_relative(recordings, monkeypatch):
    monkeypatch.chdir(recordings[0][0].parent)
    assert len(dataset([(Path("0.bin"), 0)], cache_dir="cache")) == 1
