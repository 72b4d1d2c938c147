"""`timm-qkformer events`: what recordings hold, and conversions."""

import json

import numpy as np
import pytest
from PIL import Image

from event_files import as_dict, random_events, real_aedat4, unpack_real_nmnist, write_aedat3, write_atis, write_npz
from event_formats import clustered, write_dat, write_evt2, write_evt3
from timm_qkformer import cli
from timm_qkformer.data import Events, convert_events, read_events, summarize
from timm_qkformer.data.summary import sparkline


def test_a_summary_counts(tmp_path):
    events = random_events(5000, (34, 30), span=2_000_000)
    events.x[:300], events.y[:300] = 7, 9
    summary = summarize(write_dat(tmp_path / "a.dat", events))
    assert (summary.events, summary.on, summary.sensor_size) == (5000, int(events.p.sum()), (34, 30))
    assert (summary.first, summary.last) == (events.t[0], events.t[-1])
    assert summary.hot_pixels == 1
    assert summary.hottest[0][:2] == (7, 9)
    assert summary.hottest[0][2] >= 300
    assert sum(summary.counts) == 5000
    for index, count in enumerate(summary.counts):
        begin = events.t[0] + index * summary.rate_step
        assert count == np.count_nonzero((events.t >= begin) & (events.t < begin + summary.rate_step))
    assert len(summary.counts) > 64
    for p in (0, 1):
        inside = events.p == p
        counted = np.zeros((34, 30), int)
        np.add.at(counted, (events.y[inside], events.x[inside]), 1)
        np.testing.assert_array_equal(summary.pixels[p], counted)


def test_a_size_that_is_not_stated_is_what_events_reach(tmp_path):
    events = Events(np.arange(3), np.array([0, 9, 4]), np.array([5, 0, 2]), np.ones(3, bool))
    summary = summarize(write_npz(tmp_path / "a.npz", events))
    assert (summary.sensor_size, summary.seen_size, summary.active_pixels) == (None, (6, 10), 3)
    assert summary.pixels.shape == (2, 6, 10)


def test_clocks_that_run_back_or_jump_are_summed_up(tmp_path):
    t = np.array([100, 5, 200, 10**15])
    events = Events(t, *(np.zeros(4, int),) * 2, np.ones(4, bool))
    summary = summarize(write_npz(tmp_path / "a.npz", events))
    assert (summary.first, summary.last, sum(summary.counts)) == (5, 10**15, 4)


def test_text_json_and_pictures(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    raw = write_evt3(tmp_path / "night.raw", clustered(2000, (90, 160)))
    cut = write_evt2(tmp_path / "cut.raw", random_events(300, (90, 160)))
    cut.write_bytes(cut.read_bytes()[:-3])
    out = tmp_path / "pictures"
    command = ["events", str(raw), str(cut), "--json", str(tmp_path / "all.json"), "--pictures", str(out), "--gif"]
    assert cli.main(command) == 0
    text = capsys.readouterr().out
    for line in ("format      EVT3", "sensor      90 x 160 (height x width)", "% on", "hot pixels", "▁"):
        assert line in text
    assert "repaired    the file is cut: 1 bytes" in text
    numbers = json.loads((tmp_path / "all.json").read_text())
    assert [entry["format"] for entry in numbers] == ["EVT3", "EVT2"]
    assert numbers[0]["events"] == len(read_events(raw))
    assert sorted(path.name for path in out.iterdir()) == [
        "cut.raw.gif",
        "cut.raw.png",
        "night.raw.gif",
        "night.raw.png",
    ]
    with Image.open(out / "night.raw.gif") as film:
        assert film.n_frames > 20
        assert film.size == (160, 90)
        assert np.asarray(film.convert("RGB")).std() > 1
    assert cli.main(["events", str(raw), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0] == numbers[0]
    assert cli.main(command) == 2
    assert "already and will not be overwritten" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".npz", ".npy", ".csv", ".dat", ".h5"])
def test_conversions_read_back(suffix, tmp_path, capsys):
    if suffix == ".h5":
        pytest.importorskip("h5py")
    events = clustered(3000, (480, 640))
    source, target = write_evt3(tmp_path / "a.raw", events), tmp_path / "new" / f"a{suffix}"
    assert cli.main(["events", str(source), "--to", str(target)]) == 0
    assert f"{len(events):,} events" in capsys.readouterr().out
    read = read_events(target)
    for name, values in as_dict(events).items():
        np.testing.assert_array_equal(getattr(read, name), values)
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    before = target.read_bytes()
    assert cli.main(["events", str(source), "--to", str(target)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert target.read_bytes() == before
    assert cli.main(["events", str(source), "--to", str(target), "--force"]) == 0


def test_a_conversion_that_fails_leaves_nothing(tmp_path):
    source = write_atis(tmp_path / "a.bin", Events(np.array([5, 9, 3]), *(np.arange(3),) * 2, np.ones(3, bool)))
    old = tmp_path / "old.npz"
    old.write_bytes(b"old")
    for target, overwrite in ((tmp_path / "new.npz", False), (old, True)):
        with pytest.raises(ValueError, match="time runs backwards"):
            convert_events(source, target, overwrite=overwrite)
    assert old.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "old.npz"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "b.mp4"], "'.mp4' is not written, only .npz"),
        (["--to", "a.npz", "--force"], "is the recording itself"),
        (["--gif"], "--gif needs --pictures"),
        (["a.npz", "--to", "b.npz"], "takes one recording, and neither --json"),
        (["a.npz", "--pictures", "out"], "several recordings are called a.npz"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_npz(tmp_path / "a.npz", random_events(10))
    assert cli.main(["events", "a.npz", *options]) == 2
    assert message in capsys.readouterr().err


def test_times_that_a_format_does_not_hold(tmp_path):
    events = Events(np.array([0, 2**32]), *(np.zeros(2, int),) * 2, np.ones(2, bool))
    source = write_npz(tmp_path / "a.npz", events)
    with pytest.raises(ValueError, match=r"times reach 4294967296 microseconds; \.dat holds"):
        convert_events(source, tmp_path / "a.dat")


def test_the_cameras_that_we_have_recordings_of(tmp_path, capsys):
    pytest.importorskip("aedat")
    nmnist = next(iter(sorted(unpack_real_nmnist(tmp_path).rglob("*.bs2"))))
    gesture = write_aedat3(tmp_path / "a.aedat", random_events(100, (128, 128)))
    assert cli.main(["events", str(real_aedat4()), str(nmnist), str(gesture)]) == 0
    text = capsys.readouterr().out
    assert "AEDAT 4.0" in text
    assert "240 x 320" in text
    assert "111,954" in text


def test_a_sparkline():
    assert sparkline([0, 1, 2, 4, 8]) == " ▂▃▅█"
    assert len(sparkline(list(range(1, 129)))) == 64
