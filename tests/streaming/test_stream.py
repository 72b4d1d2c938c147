"""Windows of recordings and of a camera, and the model's answers to them as they come."""

import json
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch

from event_files import random_events, unpack_real_nmnist, write_atis, write_npz
from timm_qkformer import cli, deploy
from timm_qkformer.data import EventFileError, Events, FrameSpec, count_windows, events_to_frames, time_windows
from timm_qkformer.streaming import StreamReport, cut_windows, stream
from timm_qkformer.streaming.report import Row
from tiny import lively

SIZE = (34, 34)
SRC = Path(__file__).resolve().parents[2] / "src"


def part(events: Events, start: int, end: int) -> Events:
    arrays = (getattr(events, name)[start:end] for name in "txyp")
    return Events(*arrays, sensor_size=events.sensor_size)


def camera(events: Events, seed: int = 0, asked: list[int] | None = None):
    """Packets of all sizes, as they come; some are empty, some structured arrays."""
    rng, start = np.random.default_rng(seed), 0
    record = np.dtype([("t", "<u8"), ("x", "<u2"), ("y", "<u2"), ("on", "?")])
    while start < len(events):
        end = start + int(rng.integers(0, 300))
        packet = part(events, start, end)
        if asked is not None:
            asked.append(int(packet.t[-1]) if len(packet) else 0)
        if rng.integers(2):
            array = np.zeros(len(packet), record)
            array["t"], array["x"], array["y"], array["on"] = packet.t, packet.x, packet.y, packet.p
            yield array
        else:
            yield packet
        start = end


def same(a, b) -> bool:
    plain = [(w.start, w.end, w.events) for w in a] == [(w.start, w.end, w.events) for w in b]
    return plain and all(torch.equal(x.frame, y.frame) for x, y in zip(a, b, strict=True))


def test_windows_of_fixed_duration():
    events = random_events(5000, SIZE)
    events.t[events.t > 100_000] += 35_000  # silence
    found = list(cut_windows(events, duration=10_000))
    begin = int(events.t[0])
    assert [w.start for w in found] == [begin + 10_000 * i for i in range(len(found))]
    assert sum(w.events for w in found) == sum(w.frame.sum() for w in found) == 5000
    assert sum(w.events == 0 for w in found) == 3
    for window in found:
        inside = (events.t >= window.start) & (events.t < window.end)
        assert window.events == inside.sum()
        if window.events:
            own = Events(*(getattr(events, name)[inside] for name in "txyp"))
            assert np.array_equal(window.frame, events_to_frames(own, FrameSpec(1), SIZE))
    assert next(cut_windows(events, duration=50_000, size=(17, 16))).frame.shape == (1, 2, 17, 16)


def test_windows_of_a_fixed_count():
    events = random_events(1050, SIZE)
    found = list(cut_windows(events, count=100))
    assert [w.events for w in found] == [100] * 10 + [50]
    assert [w.end for w in found] == [int(events.t[i]) for i in (*range(99, 1050, 100), 1049)]
    assert [w.start for w in found] == [int(events.t[0]), *(w.end for w in found[:-1])]


@pytest.mark.parametrize("cut", [{"duration": 7_000}, {"count": 130}])
def test_a_camera_s_packets_are_cut_like_the_recording(cut, tmp_path):
    events = random_events(4000, SIZE)
    whole = list(cut_windows(events, **cut))
    assert same(list(cut_windows(camera(events), sensor_size=SIZE, **cut)), whole)
    path = write_npz(tmp_path / "recording.npz", events)
    assert same(list(cut_windows(path, sensor_size=SIZE, **cut)), whole)


def test_a_window_is_given_as_soon_as_it_is_complete():
    events, asked = random_events(4000, SIZE), []
    windows = cut_windows(camera(events, asked=asked), duration=10_000, sensor_size=SIZE)
    for window in windows:
        before = [t for t in asked[:-1] if t]
        assert not before or before[-1] < window.end, "it waited for more packets than it needed"


def test_windows_that_cannot_be():
    events = random_events(100, SIZE)
    far = Events(np.array([0, 2**50]), events.x[:2], events.y[:2], events.p[:2], SIZE)
    for source, options, message in (
        (events, {}, "one of duration=None and count=None"),
        (events, {"duration": 5, "count": 5}, "one of duration=5 and count=5"),
        (events, {"duration": 0}, "duration=0 needs to be"),
        (events, {"count": 1.5}, "count=1.5 needs to be"),
        (Events(events.t, events.x, events.y, events.p), {"count": 5}, "the stream does not state"),
        (far, {"duration": 10}, "time jumps by"),
        ({"t": events.t}, {"count": 5}, "lack the fields x, y, p"),
        ({"x": events.x}, {"count": 5}, "lack the fields t, y, p"),
        (events, {"count": 5, "sensor_size": (8, 8)}, "outside of a sensor"),
    ):
        with pytest.raises(ValueError, match=message):
            list(cut_windows(source, **options))
    with pytest.raises(EventFileError, match="no such file"):
        list(cut_windows("missing.npz", count=5))
    assert list(cut_windows([], count=5)) == []


@pytest.mark.parametrize("cut", [{"duration": 7_000}, {"count": 130}])
def test_windows_are_those_of_data(cut):
    """One cutter, for events that come late as well."""
    events = random_events(4000, SIZE)
    events.t[1000:1100] -= 20_000
    events.t[2000:] += 30_000
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        frames = list(cut_windows(camera(events), sensor_size=SIZE, **cut))
        if "count" in cut:
            windows = list(count_windows(camera(events, seed=1), cut["count"], incomplete=True))
        else:
            windows = list(time_windows(camera(events, seed=1), cut["duration"], incomplete=True))
    assert [(w.start, w.end, w.events) for w in frames] == [(w.start, w.end, len(w.events)) for w in windows]
    assert [w.start for w in frames[1:]] == [w.end for w in frames[:-1]]
    late = [str(warning.message) for warning in found]
    assert len(late) == (0 if "count" in cut else 2)
    assert all("events came later than their window" in text for text in late)
    for frame, window in zip(frames, windows, strict=True):
        assert frame.frame.sum() == len(window.events)
        if len(window.events):
            assert np.array_equal(frame.frame, events_to_frames(window.events, FrameSpec(1), SIZE))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return lively(timm.create_model("qkformer_hst3_128", num_classes=10)).float()


@torch.no_grad()
def test_answers_are_those_of_the_clip_so_far(model):
    events = random_events(3000, SIZE, span=60_000)
    windows = list(cut_windows(events, duration=10_000))
    clip = torch.stack([w.frame for w in windows], 1)
    runner = deploy(model)
    found = list(stream(runner, camera_windows(events)))
    assert [p.steps for p in found] == list(range(1, len(windows) + 1))
    for prediction in found:
        torch.testing.assert_close(prediction.logits, runner(clip[:, : prediction.steps])[0])
        assert prediction.label == int(prediction.logits.argmax())
        assert prediction.seconds > 0
    lean = list(stream(runner, windows, states=False))
    assert all(torch.equal(a.logits, b.logits) and a.state is None for a, b in zip(lean, found, strict=True))
    seconds = sum(w.seconds for w in windows)
    assert 0 < seconds < sum(p.seconds for p in found), "counting the events is a part of the latency"
    again = list(stream(runner, windows, restart=2))
    assert [p.steps for p in again] == [1, 2] * 3
    torch.testing.assert_close(again[3].logits, runner(clip[:, 2:4])[0])
    first = found[0].state
    resumed = list(stream(runner, windows[1:], state=first, states=False))
    assert all(torch.equal(a.logits, b.logits) for a, b in zip(resumed, found[1:], strict=True))
    kept = next(stream(runner, windows[1:], state=first))  # which nobody has written to
    assert torch.equal(kept.logits, found[1].logits)
    for wrong, message in ((model.train(), "train mode"), (timm.create_model("test_qkformer").eval(), "3 channels")):
        with pytest.raises(ValueError, match=message):
            stream(wrong, windows)
    model.eval()
    with pytest.raises(ValueError, match="restart=0"):
        stream(model, windows, restart=0)


def camera_windows(events: Events):
    return cut_windows(camera(events), duration=10_000, sensor_size=SIZE)


RESUME = """
import sys, numpy, timm, torch
from timm_qkformer import deploy
from timm_qkformer.streaming import cut_windows, stream
folder = sys.argv[1]
model = timm.create_model("qkformer_hst3_128", num_classes=10).eval()
model.load_state_dict(torch.load(folder + "/model.pt", weights_only=True))
state = torch.load(folder + "/state.pt", weights_only=True)
windows = list(cut_windows(folder + "/recording.npz", duration=10_000, sensor_size=(34, 34)))[3:]
torch.save([p.logits for p in stream(deploy(model, "int8"), windows, state=state)], folder + "/answers.pt")
"""


def test_a_state_saved_in_the_middle_goes_on_in_another_process(model, tmp_path):
    events = random_events(3000, SIZE, span=60_000)
    path = write_npz(tmp_path / "recording.npz", events)
    whole = list(stream(deploy(model, "int8"), cut_windows(path, duration=10_000, sensor_size=SIZE)))
    torch.save(whole[2].state, tmp_path / "state.pt")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    environment = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", RESUME, str(tmp_path)], check=True, env=environment, capture_output=True)
    rest = torch.load(tmp_path / "answers.pt", weights_only=True)
    assert len(rest) == len(whole) - 3 > 0
    for found, expected in zip(rest, whole[3:], strict=True):
        assert torch.equal(found, expected.logits)


def test_eight_threads_share_a_model_each_with_a_state(model):
    runner = deploy(model, "int8")
    recordings = [random_events(1500, SIZE, seed=seed, span=40_000) for seed in range(8)]

    def answers(events: Events) -> torch.Tensor:
        return torch.stack([p.logits for p in stream(runner, cut_windows(events, duration=5_000))])

    expected = [answers(events) for events in recordings]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(answers, recordings))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len({tuple(a[-1].tolist()) for a in expected}) == 8


def report(seconds: list[float], width: int = 10_000) -> StreamReport:
    rows = [Row(i * width, (i + 1) * width, 5, i + 1, i % 2, [0.4, 0.6], s) for i, s in enumerate(seconds)]
    return StreamReport(rows, ("cat", "dog"))


def test_who_keeps_up():
    fast = report([0.004] * 199 + [0.5])  # only the last answer, with nothing behind it, is late
    assert (fast.late, fast.keeps_up) == (0, True)
    assert fast.milliseconds == (pytest.approx(4.0), pytest.approx(4.0))
    assert report([0.011] * 100).late == 99, "each answer waits for those before it"
    once = report([0.004] * 10 + [0.035] + [0.004] * 189)
    assert once.late == 5, "35 ms late, made good 6 ms at a time"
    assert not once.keeps_up
    assert report([0.004] * 10 + [0.012] + [0.004] * 189).keeps_up  # one in two hundred
    text = once.text()
    assert "does NOT keep up" in text
    assert "dog" in text
    with pytest.raises(ValueError, match="no events"):
        StreamReport.of([])


def test_the_command(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = write_atis(tmp_path / "wave.bin", random_events(800, SIZE, span=50_000))
    numbers, picture = tmp_path / "numbers.json", tmp_path / "picture.png"
    command = ["stream", "qkformer_hst3_128.nmnist", str(path)]
    size = ["--sensor-size", "34", "34"]
    assert cli.main([*command, "--window", "10ms", *size, "--json", str(numbers), "--output", str(picture)]) == 0
    said = capsys.readouterr().out
    assert "5 windows of 10 ms (median): latency" in said
    assert "keep" in said
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = json.loads(numbers.read_text())
    assert [row["end"] - row["start"] for row in found["rows"]] == [10_000] * 5
    assert found["label"] == found["rows"][-1]["label"]
    assert cli.main([*command, "--count", "300", *size, "--precision", "plain"]) == 0
    assert "3 windows" in capsys.readouterr().out
    for more, message in (
        (["--count", "300"], "--sensor-size"),
        (["--count", "0", *size], "count=0 needs to be"),
        (["--window", "10ms", *size, "--json", str(numbers)], "exists already"),
    ):
        assert cli.main([*command, *more]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*command, "--window", "10"])
    assert "such as 10ms" in capsys.readouterr().err


@pytest.mark.slow
def test_real_recordings_keep_up(tmp_path):
    """N-MNIST's own, in windows of 10 ms: the last answer is right for most."""
    root = unpack_real_nmnist(tmp_path)
    lines = (root / "test100.txt").read_text().splitlines()[1:]
    runner = deploy(timm.create_model("qkformer_hst3_128.nmnist", pretrained=True).eval(), "int8")
    right, reports = 0, []
    for line in lines[::4]:
        number, label = line.split()
        windows = cut_windows(root / f"{number}.bs2", duration=10_000, sensor_size=SIZE)
        reports.append(StreamReport.of(stream(runner, windows)))
        right += reports[-1].rows[-1].label == int(label)
    rows = SimpleNamespace(rows=[row for one in reports for row in one.rows])
    median, late = np.median([row.seconds for row in rows.rows]) * 1e3, sum(one.late for one in reports)
    print(f"{right} of {len(reports)} right, median {median:.2f} ms, {late} of {len(rows.rows)} late")
    assert right > len(reports) / 2
