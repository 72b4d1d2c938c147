"""Windows of recordings and of live sources, and what models see of them."""

import itertools

import numpy as np
import pytest
import torch

from event_files import as_dict, random_events, write_atis, write_npz
from event_formats import clustered, write_evt3
from timm_qkformer.data import (
    Events,
    FrameSpec,
    ToFrames,
    ToTimeSurface,
    ToVoxelGrid,
    as_clip,
    count_windows,
    events_to_frames,
    iter_clips,
    open_events,
    slice_windows,
    time_surface,
    time_windows,
    voxel_grid,
)

SIZE = (20, 30)


def chunks(events, lengths):
    """The recording in chunks of these lengths, over and over."""
    start = 0
    for length in itertools.cycle(lengths):
        if start >= len(events):
            return
        yield Events(*(getattr(events, name)[start : start + length] for name in "txyp"))
        start += length


def joined(windows, name):
    return np.concatenate([getattr(window.events, name) for window in windows])


@pytest.mark.parametrize("lengths", [(1000,), (1, 7, 0, 100), (333,)])
@pytest.mark.parametrize("count", [1, 50, 300])
def test_windows_by_count(count, lengths):
    events = random_events(1000, SIZE)
    windows = list(count_windows(chunks(events, lengths), count))
    assert [len(window.events) for window in windows] == [count] * (1000 // count)
    whole = list(count_windows(chunks(events, lengths), count, incomplete=True))
    np.testing.assert_array_equal(joined(whole, "t"), events.t)
    np.testing.assert_array_equal(joined(whole, "x"), events.x)
    assert (whole[0].start, whole[0].end) == (events.t[0], events.t[count - 1])


@pytest.mark.parametrize("lengths", [(1000,), (1, 7, 0, 100), (333,)])
@pytest.mark.parametrize("duration", [1_000, 33_333, 10**6])
def test_windows_by_duration(duration, lengths):
    events = random_events(1000, SIZE)
    windows = list(time_windows(chunks(events, lengths), duration, incomplete=True))
    np.testing.assert_array_equal(joined(windows, "t"), events.t)
    for number, window in enumerate(windows):
        assert window.start == events.t[0] + number * duration
        assert window.end == window.start + duration
        inside = (events.t >= window.start) & (events.t < window.end)
        np.testing.assert_array_equal(window.events.x, events.x[inside])
    assert len(windows) == (events.t[-1] - events.t[0]) // duration + 1
    assert len(list(time_windows(chunks(events, lengths), duration))) == len(windows) - 1


def test_silence_is_a_window_and_a_jump_an_error():
    events = Events(np.array([0, 5, 35, 36]), *(np.zeros(4, int),) * 2, np.zeros(4, bool))
    assert [len(window.events) for window in time_windows(events, 10, incomplete=True)] == [2, 0, 0, 2]
    events.t[2:] = 10**12
    with pytest.raises(ValueError, match="time jumps by 1000000000000 microseconds"):
        list(time_windows(events, 10))


def test_late_events_are_counted():
    events = Events(np.array([0, 12, 3, 4, 25]), np.arange(5), np.zeros(5, int), np.zeros(5, bool))
    with pytest.warns(UserWarning, match="2 events came later than their window"):
        windows = list(time_windows(events, 10, incomplete=True))
    assert [window.events.x.tolist() for window in windows] == [[0], [1, 2, 3], [4]]
    with pytest.warns(UserWarning, match="3 events came later"):
        list(time_windows(events, 10, start=10, incomplete=True))


def test_a_live_source_gives_windows_as_soon_as_they_are_complete():
    seen = []

    def camera():
        for chunk in chunks(random_events(1000, SIZE), (100,)):
            seen.append(len(chunk))
            yield chunk

    windows = count_windows(camera(), 150)
    next(windows)
    assert seen == [100, 100]
    next(windows)
    assert seen == [100, 100, 100]


def test_windows_by_count_follow_each_other():
    events = Events(np.array([5, 9, 7, 20, 21]), *(np.zeros(5, int),) * 2, np.zeros(5, bool))
    windows = list(count_windows(chunks(events, (1, 2)), 2, incomplete=True))
    assert [(w.start, w.end) for w in windows] == [(5, 9), (9, 20), (20, 21)]


def test_signed_and_unsigned_times_stay_whole_numbers():
    events = random_events(100, SIZE)
    both = [{**as_dict(events), "t": events.t.astype(kind)} for kind in (np.int64, np.uint64)]
    (window,) = count_windows(both, 200)
    assert window.events.t.dtype == np.int64
    with pytest.raises(ValueError, match="timestamps run from 0 to 9223372036854775808"):
        list(count_windows({**as_dict(events), "t": np.array([0, 2**63] * 50, np.uint64)}, 10))


def test_sources_of_tonics_arrays_and_mappings():
    events = random_events(100, SIZE)
    array = np.zeros(100, [("x", "i2"), ("y", "i2"), ("t", "i8"), ("p", "?")])
    for name, values in as_dict(events).items():
        array[name] = values
    for source in (array, [array[:30], array[30:30], array[30:]], as_dict(events), [as_dict(events)]):
        np.testing.assert_array_equal(joined(count_windows(source, 10), "x"), events.x)


@pytest.mark.parametrize("split_by", ["number", "time"])
@pytest.mark.parametrize("number", [1, 7, 2000])
def test_slices_are_those_of_frames(number, split_by):
    events = random_events(1000, SIZE)
    frames = events_to_frames(events, FrameSpec(number, split_by), SIZE)
    windows = slice_windows(events, number, split_by)
    assert [len(window.events) for window in windows] == frames.sum((1, 2, 3)).tolist()


def test_clips_in_a_row(tmp_path):
    size = (720, 1280)
    events = clustered(3000, size)
    with open_events(write_evt3(tmp_path / "a.raw", events)) as recording:
        clips = list(iter_clips(recording, size, 4, count=200, size=(45, 80)))
    assert len(clips) == len(events) // 800
    expected = events_to_frames(Events(*(getattr(events, n)[:800] for n in "txyp")), FrameSpec(4, size=(45, 80)), size)
    np.testing.assert_array_equal(clips[0], expected)
    binary = next(iter_clips(events, size, 4, count=200, size=(45, 80), representation="binary"))
    np.testing.assert_array_equal(binary, np.minimum(expected, 1))
    surface = next(iter_clips(events, size, 2, duration=10_000, size=(45, 80), representation="surface"))
    assert surface.shape == (2, 2, 45, 80)
    assert 0 < surface.max() <= 1
    for kwargs in ({}, {"count": 1, "duration": 1}, {"count": 1, "representation": "picture"}, {"count": 0}):
        with pytest.raises(ValueError, match=r"one of duration|representation=|count=0"):
            next(iter_clips(events, size, 4, **kwargs))


# Representations


def test_a_time_surface_by_hand():
    events = Events(np.array([0, 10, 30]), np.array([1, 1, 2]), np.zeros(3, int), np.array([True, True, False]))
    surface = time_surface(events, (1, 3), decay=20.0)
    np.testing.assert_allclose(surface, [[[0, 0, 1]], [[0, np.exp(-1), 0]]], rtol=1e-6)
    np.testing.assert_allclose(time_surface(events, (1, 3), decay=20.0, at=50)[0, 0, 2], np.exp(-1), rtol=1e-6)


def test_a_voxel_grid_by_hand():
    events = Events(np.array([0, 25, 100]), np.array([0, 1, 1]), np.zeros(3, int), np.array([True, False, True]))
    grid = voxel_grid(events, (1, 2), 3)  # moments 0, 50, 100
    np.testing.assert_allclose(grid[:, 0, 0], [[0, 0.5], [0, 0.5], [0, 0]])
    np.testing.assert_allclose(grid[:, 1, 0], [[1, 0], [0, 0], [0, 1]])
    np.testing.assert_allclose(voxel_grid(events, (1, 2), 3, signed=True)[:, 0], [[1, -0.5], [0, -0.5], [0, 1]])


@pytest.mark.parametrize("seed", range(3))
def test_a_voxel_grid_keeps_every_event(seed):
    events = random_events(2000, SIZE, seed=seed)
    grid = voxel_grid(events, SIZE, 5, (10, 15))
    assert grid.shape == (5, 2, 10, 15)
    np.testing.assert_allclose(grid.sum((0, 2, 3)), [(~events.p).sum(), events.p.sum()], rtol=1e-5)


def test_no_events_are_zeros():
    none = Events(*(np.zeros(0, int),) * 3, np.zeros(0, bool))
    assert not time_surface(none, SIZE).any()
    assert not voxel_grid(none, SIZE, 3).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: voxel_grid(e, SIZE, 1), "bins=1"),
        (lambda e: time_surface(e, SIZE, decay=0), "decay=0"),
        (lambda e: time_surface(e, (5, 5)), "outside of a sensor"),
        (lambda e: list(count_windows(e, 0)), "count=0"),
        (lambda e: list(time_windows(e, 0)), "duration=0"),
        (lambda e: slice_windows(e, 0), "number=0"),
        (lambda e: slice_windows(e, 2, "size"), "split_by='size'"),
        (lambda e: as_clip(np.zeros((4, 1, 5, 5))), r"shape \[4, 1, 5, 5\]"),
    ],
)
def test_what_cannot_be_done_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(random_events(100, SIZE))


# tonic's interface: transforms take a structured array and give an array


def test_transforms_take_structured_arrays(tmp_path):
    events = random_events(500, SIZE)
    array = np.zeros(500, [("x", "i2"), ("y", "i2"), ("t", "i8"), ("p", "?")])
    for name, values in as_dict(events).items():
        array[name] = values
    frames = ToFrames(SIZE, 4)(array)
    np.testing.assert_array_equal(frames, events_to_frames(events, FrameSpec(4), SIZE))
    assert ToTimeSurface(SIZE)(array).shape == (2, *SIZE)
    assert ToVoxelGrid(SIZE, 5)(array).shape == (5, 2, *SIZE)


@pytest.mark.parametrize("dtype", [np.int16, np.float64, np.uint8])
def test_frames_of_others_are_taken_as_they_are(dtype):
    frames = np.random.default_rng(0).integers(0, 9, (4, 2, 5, 6)).astype(dtype)
    assert as_clip(frames).dtype == torch.float32
    np.testing.assert_array_equal(as_clip(frames).numpy(), frames)
    np.testing.assert_array_equal(as_clip(frames.transpose(0, 2, 3, 1)).numpy(), frames)
    assert as_clip(torch.from_numpy(frames)).shape == (4, 2, 5, 6)


def test_tonics_frames_are_ours():
    transforms = pytest.importorskip("tonic.transforms")
    events = random_events(500, SIZE)
    array = np.zeros(500, [("x", "i2"), ("y", "i2"), ("t", "i8"), ("p", "?")])
    for name, values in as_dict(events).items():
        array[name] = values
    frames = transforms.ToFrame(sensor_size=(SIZE[1], SIZE[0], 2), n_event_bins=4)(array)
    np.testing.assert_array_equal(as_clip(frames).numpy(), ToFrames(SIZE, 4)(array))
    both = transforms.Compose([transforms.RefractoryPeriod(10), ToVoxelGrid(SIZE, 5)])(array)
    assert both.shape == (5, 2, *SIZE)


def test_tonics_data_sets_take_our_transforms_and_ours_take_its_files(tmp_path, monkeypatch):
    """N-MNIST as tonic lays it out."""
    tonic = pytest.importorskip("tonic")
    for split, digit in (("Train", 3), ("Train", 7), ("Test", 3), ("Test", 7)):
        for i in range(3):
            folder = tmp_path / "NMNIST" / split / str(digit)
            write_atis(folder / f"{i:05}.bin", random_events(300, (34, 34), seed=10 * digit + i))
    monkeypatch.setattr(tonic.datasets.NMNIST, "_check_exists", lambda self: True)
    frames, grid = ToFrames((34, 34), 4), ToVoxelGrid((34, 34), 3, size=(17, 17))
    theirs = tonic.datasets.NMNIST(str(tmp_path), train=False, transform=frames)
    assert len(theirs) == 6
    seen = set()
    for clip, target in theirs:
        seeds = [10 * target + i for i in range(3)]
        expected = [frames(random_events(300, (34, 34), seed=seed)) for seed in seeds]
        seen.add((target, next(i for i, e in enumerate(expected) if np.array_equal(e, clip))))
    assert len(seen) == 6
    cached = tonic.MemoryCachedDataset(tonic.datasets.NMNIST(str(tmp_path), train=False, transform=grid))
    loader = torch.utils.data.DataLoader(cached, batch_size=3, collate_fn=tonic.collation.PadTensors())
    assert next(iter(loader))[0].shape == (3, 3, 2, 17, 17)
    sliced = tonic.SlicedDataset(
        tonic.datasets.NMNIST(str(tmp_path), train=False),
        tonic.slicers.SliceByEventCount(100),
        metadata_path=str(tmp_path / "slices"),
        transform=frames,
    )
    assert sliced[0][0].shape == (4, 2, 34, 34)
    assert sliced[0][0].sum() == 100


def test_windows_of_a_file(tmp_path):
    events = random_events(500, SIZE)
    with open_events(write_npz(tmp_path / "a.npz", events)) as recording:
        np.testing.assert_array_equal(joined(time_windows(recording, 50_000, incomplete=True), "y"), events.y)
