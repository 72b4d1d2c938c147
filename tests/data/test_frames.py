import numpy as np
import pytest

from event_files import as_dict, random_events
from timm_qkformer.data import Events, FrameSpec, events_to_frames


@pytest.mark.parametrize("time_steps", [1, 3, 16])
@pytest.mark.parametrize("split_by", ["number", "time"])
@pytest.mark.parametrize("count", [1000, 1007])
def test_equals_spikingjelly(time_steps, split_by, count):
    from spikingjelly.datasets.utils import integrate_events_by_fixed_frames_number

    events = random_events(count, (20, 30), seed=count)
    ours = events_to_frames(events, FrameSpec(time_steps, split_by), (20, 30))
    theirs = integrate_events_by_fixed_frames_number(as_dict(events), split_by, time_steps, 20, 30)
    np.testing.assert_array_equal(ours, theirs)


def test_fewer_events_than_frames_by_number():
    from spikingjelly.datasets.utils import integrate_events_by_fixed_frames_number

    events = random_events(3, (5, 5))
    ours = events_to_frames(events, FrameSpec(4), (5, 5))
    np.testing.assert_array_equal(ours, integrate_events_by_fixed_frames_number(as_dict(events), "number", 4, 5, 5))


def test_a_silent_slice_is_an_empty_frame():
    t = np.array([0, 1, 98, 99])
    zero = np.zeros(4, dtype=np.int64)
    frames = events_to_frames(Events(t, zero, zero, zero > 0), FrameSpec(4, "time"), (1, 1))
    assert frames.sum((1, 2, 3)).tolist() == [2, 0, 0, 2]


def test_all_events_at_once_by_time():
    zero = np.zeros(4, dtype=np.int64)
    assert events_to_frames(Events(zero, zero, zero, zero > 0), FrameSpec(4, "time"), (1, 1)).sum() == 4


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
    ("kwargs", "message"),
    [
        ({"time_steps": 0}, "time_steps=0"),
        ({"time_steps": 4, "split_by": "count"}, "split_by='count'"),
        ({"time_steps": 4, "size": (0, 3)}, r"size=\(0, 3\)"),
    ],
)
def test_bad_spec(kwargs, message):
    with pytest.raises(ValueError, match=message):
        FrameSpec(**kwargs)


def test_enlarging_is_refused():
    with pytest.raises(ValueError, match="larger than the sensor"):
        events_to_frames(random_events(10), FrameSpec(2, size=(64, 34)), (34, 34))
