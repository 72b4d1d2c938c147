"""Recordings in every format: read as they were written, in chunks, whatever their name; and what becomes of damage."""

import re
import sys
import tracemalloc
import warnings

import numpy as np
import pytest

from event_files import as_dict, random_events, write_aedat3, write_npz
from event_formats import (
    FORMATS,
    clustered,
    evt2_words,
    evt3_words,
    raw_header,
    write_compressed_aedat4,
    write_dat,
    write_evt2,
    write_evt3,
    write_evt21,
    write_hdf5,
    write_mat,
    write_metavision_hdf5,
    write_npy,
    write_text,
)
from timm_qkformer.data import (
    EventDataset,
    EventFileError,
    EventFileWarning,
    Events,
    FrameSpec,
    iter_events,
    open_events,
    read_events,
)

NEEDS = {"AEDAT 4": "aedat", "HDF5": "h5py", "HDF5 Metavision": "h5py"}


def assert_same(read, events):
    for name, values in as_dict(events).items():
        np.testing.assert_array_equal(getattr(read, name), values, err_msg=name)


def written(name, tmp_path, count=2000):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    suffix, write, size, states, make = FORMATS[name]
    events = make(count, size)
    return write(tmp_path / f"a{suffix}", events), events, size if states else None


@pytest.fixture(autouse=True)
def _no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", EventFileWarning)
        yield


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name, tmp_path):
    path, events, size = written(name, tmp_path)
    read = read_events(path)
    assert_same(read, events)
    assert read.sensor_size == (size if name != "AEDAT 3.1" else None)


@pytest.mark.parametrize("name", ["EVT3", "dat", "AEDAT 2.0", "HDF5", "mat", "npy", "csv", "N-MNIST"])
def test_the_content_says_what_a_file_is_not_its_name(name, tmp_path):
    path, events, _ = written(name, tmp_path, 300)
    for other in ("a.aedat4", "a.npz", "a.raw" if path.suffix != ".raw" else "a.dat"):
        if name == "N-MNIST":
            break  # without a header, a name that belongs to another format counts
        renamed = path.rename(tmp_path / other)
        with pytest.warns(EventFileWarning, match="the name ends in"):
            assert_same(read_events(renamed), events)
        renamed.rename(path)
    assert_same(read_events(path.rename(tmp_path / "recording.unknown")), events)


def test_chunks_are_the_recording_and_take_constant_memory(tmp_path, monkeypatch):
    from timm_qkformer.data.formats import prophesee

    monkeypatch.setattr(prophesee, "_WORDS", 2**11)
    events = clustered(40_000, (720, 1280), span=60_000_000)  # the 24-bit clock wraps three times
    path = write_evt3(tmp_path / "a.raw", events)
    tracemalloc.start()
    count, lengths, previous = 0, [], -1
    with open_events(path) as recording:
        for chunk in recording:
            lengths.append(len(chunk))
            assert chunk.t[0] >= previous
            np.testing.assert_array_equal(chunk.x, events.x[count : count + len(chunk)])
            np.testing.assert_array_equal(chunk.t, events.t[count : count + len(chunk)])
            count, previous = count + len(chunk), chunk.t[-1]
        assert recording.findings.notes == ["the clock wrapped 3 times"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == len(events)
    assert len(lengths) > 5
    assert peak < 40 * 2**11 * 12 < 13 * len(events) * 2  # a block's, not the recording's


def test_state_is_carried_from_chunk_to_chunk(tmp_path, monkeypatch):
    """Vectors that go on in the next chunk, and chunks without an event or without a time."""
    from timm_qkformer.data.formats import prophesee

    events = clustered(200, (720, 1280), span=40_000_000)
    paths = {
        "_WORDS": [write_evt3(tmp_path / "3.raw", events), write_evt2(tmp_path / "2.raw", events)],
        "_VECTORS": [write_evt21(tmp_path / "21.raw", events)],
    }
    for words in (1, 3):
        for name, files in paths.items():
            monkeypatch.setattr(prophesee, name, words)
            for path in files:
                assert_same(read_events(path), events)


@pytest.mark.parametrize("vectors", [True, False])
def test_single_and_vector_events_of_evt3(vectors, tmp_path):
    events = clustered(300, (720, 1280))
    assert_same(read_events(write_evt3(tmp_path / "a.raw", events, vectors=vectors)), events)


@pytest.mark.parametrize("name", ["EVT2", "EVT2.1", "EVT3"])
def test_raw_files_are_what_evlib_reads(name, tmp_path):
    """The one independent reader of EVT 2.1 that installs."""
    evlib = pytest.importorskip("evlib")
    path, events, _ = written(name, tmp_path, 5000)
    theirs = {name: column.to_numpy() for name, column in evlib.load_events(str(path)).collect().to_dict().items()}
    times, on = theirs["t"].astype("m8[us]").astype(np.int64), theirs["polarity"] > 0
    assert_same(Events(times, theirs["x"], theirs["y"], on), events)


def test_a_time_word_sets_the_lower_bits_to_zero(tmp_path):
    """As Metavision has it: an event between a high and a low time word is at the high word's time."""
    words = np.array([0x8001, 0x6005, 0x0003, 0x2007, 0x8002, 0x2808, 0x6001, 0x2009], "<u2")
    (tmp_path / "a.raw").write_bytes(raw_header("3.0", (720, 1280)) + words.tobytes())
    read = read_events(tmp_path / "a.raw")
    assert read.t.tolist() == [0x1005, 0x2000, 0x2001]
    assert read.x.tolist() == [7, 8, 9]
    assert read.p.tolist() == [False, True, False]


# Byte orders


@pytest.mark.parametrize("order", ["big", "legacy", "little"])
def test_byte_orders_of_evt21(order, tmp_path):
    events = clustered(400, (480, 640))
    assert_same(read_events(write_evt21(tmp_path / "a.raw", events, order, f";endianness={order}")), events)
    if order != "little":
        with pytest.warns(EventFileWarning, match=f"words are in {order} byte order, and not in little"):
            assert_same(read_events(write_evt21(tmp_path / "a.raw", events, order)), events)


@pytest.mark.parametrize("write", [write_evt2, write_evt3])
def test_big_endian_words(write, tmp_path):
    events = clustered(400, (480, 640))
    assert_same(read_events(write(tmp_path / "a.raw", events, ">", extra=";endianness=big")), events)
    with pytest.warns(EventFileWarning, match="big byte order"):
        assert_same(read_events(write(tmp_path / "a.raw", events, ">")), events)


def test_big_endian_arrays(tmp_path):
    events = random_events(300)
    assert_same(read_events(write_npy(tmp_path / "a.npy", events, ">")), events)
    assert_same(read_events(write_mat(tmp_path / "a.mat", events, ">", compressed=False)), events)


# Time


def test_clocks_wrap(tmp_path):
    """EVT 2 after 2^34 microseconds, .dat and AEDAT 2.0 after 2^32."""
    for write, bits in ((write_evt2, 34), (write_dat, 32), (FORMATS["AEDAT 2.0"][1], 32)):
        events = random_events(200, (128, 128))
        late = Events(events.t + (2**bits - 100_000), events.x, events.y, events.p, events.sensor_size)
        path = tmp_path / "a"
        if bits == 32:
            late = Events(late.t % 2**32, *(getattr(late, name) for name in ("x", "y", "p", "sensor_size")))
        write(path, late)
        with open_events(path) as recording:
            read = np.concatenate([chunk.t for chunk in recording])
            assert "the clock wrapped 1 times" in recording.findings.notes
        np.testing.assert_array_equal(read, events.t + (2**bits - 100_000))


def test_time_that_runs_back_is_kept_and_counted(tmp_path):
    events = random_events(100, (240, 304))
    t = events.t.copy()
    t[50] = t[49] - 7
    t[70:] = t[70:] - t[70] + t[69] - 9
    with pytest.warns(EventFileWarning, match="time runs backwards 2 times, at most by 9 microseconds; kept"):
        read = read_events(write_dat(tmp_path / "a.dat", Events(t, events.x, events.y, events.p, (240, 304))))
    np.testing.assert_array_equal(read.t, t)


def test_pauses_are_counted(tmp_path):
    events = random_events(100, (240, 304))
    t = events.t + np.where(np.arange(100) > 30, 70_000_000, 0)
    with pytest.warns(EventFileWarning, match="jumps forward by more than a minute 1 times"):
        read_events(write_dat(tmp_path / "a.dat", Events(t, events.x, events.y, events.p, (240, 304))))


def test_events_before_the_first_time_are_left_out(tmp_path):
    events = random_events(100, (480, 640))
    words = np.concatenate([evt2_words(events)[1:4], evt2_words(events)])
    assert (words[:2] >> 28 <= 1).any()
    (tmp_path / "a.raw").write_bytes(raw_header("2.0", (480, 640)) + words.astype("<u4").tobytes())
    with pytest.warns(EventFileWarning, match="events come before the first time"):
        assert len(read_events(tmp_path / "a.raw")) <= 103


# Pixels and polarities


def test_events_off_the_sensor_are_left_out_and_counted(tmp_path):
    events = random_events(1000, (240, 304))
    events.x[[5, 500]] = 304
    with pytest.warns(EventFileWarning, match=r"2 events off the sensor of \(height, width\) \(240, 304\)"):
        read = read_events(write_dat(tmp_path / "a.dat", events))
    assert len(read) == 998
    wrong = Events(events.t, events.x, events.y, events.p, (100, 100))
    with pytest.raises(EventFileError, match="the stated size is wrong"):
        read_events(write_dat(tmp_path / "a.dat", wrong))


def test_polarities(tmp_path):
    for values in ([0, 1, 1], [-1, 1, 1]):
        np.savez(tmp_path / "a.npz", t=[1, 2, 3], x=[0] * 3, y=[0] * 3, p=values)
        assert read_events(tmp_path / "a.npz").p.tolist() == [False, True, True]
    np.savez(tmp_path / "a.npz", t=[1, 2, 3], x=[0] * 3, y=[0] * 3, p=[-1, 0, 1])
    with pytest.raises(EventFileError, match="polarities are -1 and 0"):
        read_events(tmp_path / "a.npz")


# Cut and empty files


@pytest.mark.parametrize("name", ["EVT2", "EVT2.1", "EVT3", "dat", "AEDAT 2.0", "AEDAT 3.1", "csv"])
def test_a_cut_file_keeps_its_whole_records(name, tmp_path):
    path, events, _ = written(name, tmp_path, 500)
    path.write_bytes(path.read_bytes()[: -7 if name != "csv" else -4])
    with pytest.warns(EventFileWarning, match="the file is cut"):
        read = read_events(path)
    assert len(events) - 32 <= len(read) < len(events)
    np.testing.assert_array_equal(read.t, events.t[: len(read)])


@pytest.mark.parametrize("name", FORMATS)
def test_files_without_events(name, tmp_path):
    path, _, _ = written(name, tmp_path, 300)
    content = path.read_bytes()
    path.write_bytes(b"")
    with pytest.raises(EventFileError, match=r"empty \(0 bytes\)"):
        read_events(path)
    if path.suffix in (".raw", ".aedat", ".dat"):
        ends = {".raw": b"% end\n", ".dat": b"\x0c\x08", ".aedat": b"Header\r\n" if name.endswith("DAVIS") else b"\r\n"}
        end = (
            b"#!END-HEADER\r\n"
            if name == "AEDAT 3.1"
            else b"# comment\r\n"
            if name == "AEDAT 2.0"
            else ends[path.suffix]
        )
        path.write_bytes(content[: content.index(end) + len(end)])
        with pytest.raises(EventFileError, match=r"holds no events|words are of no kind"):
            read_events(path)


# Particular formats


@pytest.mark.parametrize("compression", ["LZ4", "ZSTD"])
def test_compressed_aedat4(compression, tmp_path):
    pytest.importorskip("aedat")
    events = random_events(3000, (128, 128))
    assert_same(read_events(write_compressed_aedat4(tmp_path / "a.aedat4", events, compression)), events)


def test_aedat3_of_several_cameras_or_compressed(tmp_path):
    path = write_aedat3(tmp_path / "a.aedat", random_events(10, (128, 128)))
    content = path.read_bytes()
    second = bytearray(content[content.index(b"HEADER\r\n") + 8 :])
    second[2] = 1  # the source
    path.write_bytes(content + second)
    with pytest.raises(EventFileError, match="several cameras, the sources 0 and 1"):
        read_events(path)
    path.write_bytes(content.replace(b"DAT3.1\r\n", b"DAT3.1\r\n#Format: SerializedTS\r\n"))
    with pytest.raises(EventFileError, match=r"compressed \(SerializedTS\)"):
        read_events(path)
    path.write_bytes(b"#!AER-DAT1.0\r\n")
    with pytest.raises(EventFileError, match=r"AEDAT 1\.0 is not read"):
        read_events(path)


def test_a_packet_of_aedat3_as_long_as_the_file_is_read_in_pieces(tmp_path):
    events = random_events(400_000, (128, 128))
    path = write_aedat3(tmp_path / "a.aedat", events)
    tracemalloc.start()
    try:
        count = 0
        with open_events(path) as recording:
            for chunk in recording:
                np.testing.assert_array_equal(chunk.t, events.t[count : count + len(chunk)])
                np.testing.assert_array_equal(chunk.y, events.y[count : count + len(chunk)])
                count += len(chunk)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == len(events)
    assert peak < path.stat().st_size, "the whole packet was in memory"


def test_aedat3_names_its_camera_and_leaves_out_invalid_events(tmp_path):
    path = write_aedat3(tmp_path / "a.aedat", random_events(10, (128, 128)))
    content = path.read_bytes().replace(b"DAT3.1\r\n", b"DAT3.1\r\n#Format: RAW\r\n#Source 0: DVS128\r\n")
    start = content.index(b"HEADER\r\n") + 8 + 28
    content = content[: start + 8] + bytes([content[start + 8] & 0xFE]) + content[start + 9 :]
    path.write_bytes(content)
    with open_events(path) as recording:
        assert recording.sensor_size == (128, 128)
        assert recording.details == {"camera": "DVS128"}
        assert sum(map(len, recording)) == 9
        assert recording.findings.notes == ["1 events are marked as invalid by the camera's filters"]


def test_an_unknown_camera_of_aedat2_is_named(tmp_path):
    path = FORMATS["AEDAT 2.0 DAVIS"][1](tmp_path / "a.aedat", random_events(10, (100, 100)))
    path.write_bytes(path.read_bytes().replace(b"Davis346blue", b"Retina900"))
    with pytest.raises(EventFileError, match="recorded with 'Retina900'"):
        read_events(path)
    path.write_bytes(path.read_bytes().replace(b"AEChip", b"Nobody"))
    with pytest.raises(EventFileError, match="not those of a DVS128"):
        read_events(path)


def test_dsec(tmp_path):
    pytest.importorskip("h5py")
    events = random_events(500, (480, 640))
    path = write_hdf5(tmp_path / "a.h5", events, compression="gzip", t_offset=10**12)
    np.testing.assert_array_equal(read_events(path).t, events.t + 10**12)


def test_hdf5_with_prophesees_codec_says_what_to_do(tmp_path):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "a.hdf5"
    with h5py.File(path, "w") as file:
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_chunk((100,))
        properties.set_filter(0x8ECF, h5py.h5z.FLAG_OPTIONAL, ())
        kind = h5py.h5t.py_create(np.dtype([("x", "<u2"), ("y", "<u2"), ("p", "<i2"), ("t", "<i8")]))
        file.create_group("CD")
        h5py.h5d.create(file["CD"].id, b"events", kind, h5py.h5s.create_simple((100,)), properties)
    with pytest.raises(EventFileError, match=r"ECF codec\. Convert it with Metavision's"):
        read_events(path)


def test_hdf5_that_points_elsewhere_or_unpacks_to_too_much(tmp_path):
    h5py = pytest.importorskip("h5py")
    outside = write_hdf5(tmp_path / "outside.h5", random_events(10))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["events"] = h5py.ExternalLink(str(outside), "/events")
    with pytest.raises(EventFileError, match="no datasets t, x, y and p"):
        read_events(tmp_path / "a.h5")
    with h5py.File(tmp_path / "bomb.h5", "w") as file:
        for name in "txyp":
            file.create_dataset(name, shape=(10**10,), dtype="u1", chunks=(10**6,))
    with pytest.raises(EventFileError, match="times as many"):
        read_events(tmp_path / "bomb.h5")


def test_hdf5_without_its_reader(tmp_path, monkeypatch):
    pytest.importorskip("h5py")
    path = write_metavision_hdf5(tmp_path / "a.h5", random_events(10))
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r"timm-qkformer\[events\]"):
        read_events(path)


def test_mat_is_what_scipy_writes_and_reads(tmp_path):
    io = pytest.importorskip("scipy.io")
    events = random_events(300, (180, 240))
    columns = {"ts": events.t, "x": events.x, "y": events.y, "pol": events.p}
    for compressed in (False, True):
        io.savemat(tmp_path / "a.mat", {k: v[:, None] for k, v in columns.items()}, do_compression=compressed)
        assert_same(read_events(tmp_path / "a.mat"), events)
    theirs = io.loadmat(write_mat(tmp_path / "b.mat", events))
    for name, values in columns.items():
        np.testing.assert_array_equal(theirs[name].ravel(), values)


@pytest.mark.parametrize(
    ("order", "header", "separator"),
    [
        ("txyp", "", " "),
        ("xypt", "", ","),
        ("xytp", "", "\t"),
        ("pyxt", "p,y,x,t\n", ","),
        ("txyp", "# made here\n#t x y p\n", " "),
    ],
)
def test_text(order, header, separator, tmp_path):
    events = random_events(500, (180, 240))
    assert_same(read_events(write_text(tmp_path / "a.txt", events, order, header, separator)), events)


def test_text_that_does_not_say_what_it_is(tmp_path):
    path = tmp_path / "a.txt"
    for content, message in (
        ("1 2 3 1\n1 2 3 1\n", "which column is which"),
        ("1 2 3\n", "lines of 3 numbers"),
        ("hello world\n", "neither names of columns nor numbers"),
        ("t,x,y,p\n1,2,3\n", "names the columns"),
        ("t,x,y,p\n1,2,3,1\n1,2,3,oops\n", "line 2 of events is"),
        ("t,x,y,p\n1,2,3,1\n" + "1" * 10_000 + "\n1,2,3,1\n", "line 2 of events is"),
        ("0.5 1 2 0\n99999999 1 2 1\n", "neither whole microseconds nor seconds"),
    ):
        path.write_text(content)
        with pytest.raises(EventFileError, match=message):
            read_events(path)


def test_lines_that_are_too_short_and_too_long_do_not_make_up_for_each_other(tmp_path):
    """As many numbers and lines as there should be, but not the same in each."""
    events = random_events(200, (180, 240))
    path = write_text(tmp_path / "a.csv", events, header="t,x,y,p\n")
    lines = path.read_text().splitlines()
    lines[50:52] = [lines[50] + ",7", lines[51][: lines[51].rindex(",")]]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(EventFileError, match="line 50 of events is"):
        read_events(path)


LINES = {
    "whole": (["1,2,33,1", "100,2,3,0"], "i"),
    "windows' line ends": (["1,2,33,1\r", "100,2,3,0\r"], "i"),
    "signs": (["-1 2 33 -1", "-100 2 3 1"], "i"),
    "18 digits": (["999999999999999999 2 3 1", "1 2 3 0"], "i"),
    "19 digits": (["9000000000000000000 2 3 1", "1 2 3 0"], "f"),
    "seconds": (["0.003811 96 133 0", "12.003820 96 7 1"], "f"),
    "seconds of several lengths": (["0.0038 96 133 0", "12.00382 96 7 1"], "f"),
    "fractions twice": (["0.003811 96.5 133 0", "12.003820 96.5 7 1"], "f"),
    "negative seconds": (["-0.003811 96 133 0", "0.003820 96 7 1"], "f"),
    "exponents": (["1e3 96 133 0", "2e3 96 7 1"], "f"),
    "some fractions": (["1 96 133 0", "2.5 96 7 1"], "f"),
    "several separators": (["1,2;3\t1", "2,2;3\t1"], "i"),
    "other separators": (["1,2;3\t1", "2 2 3 1"], "f"),
}


@pytest.mark.parametrize("name", LINES)
def test_numbers_of_text_are_pythons(name):
    from timm_qkformer.data.formats.lines import parse_lines

    lines, kind = LINES[name]
    table = parse_lines("\n".join(lines * 3).encode() + b"\n", 4)
    rows = [[float(word) for word in re.split(r"[,;\s]+", line.strip())] for line in lines * 3]
    np.testing.assert_array_equal(np.array(table, float).T, rows)
    assert table[0].dtype.kind == kind


@pytest.mark.parametrize(
    "text",
    [
        "1,2,3\n1,2,3,4",
        "1,2,3,4,5\n1,2,3,4",
        "1,2,3,\n1,2,3,",
        "1-2,3,4,5",
        "1,,2,3",
        "1,2,3,x",
        "1.2.3,4,5,6",
        "-,1,2,3",
    ],
)
def test_what_is_no_line_of_four_numbers(text):
    from timm_qkformer.data.formats.lines import parse_lines

    assert parse_lines(text.encode(), 4) is None


def test_a_block_of_whole_seconds_among_others(tmp_path, monkeypatch):
    from timm_qkformer.data.formats import text

    monkeypatch.setattr(text, "_BLOCK", 64)
    events = Events(np.arange(100) * 500_000, *(np.arange(100),) * 2, np.ones(100, bool))
    rows = [f"{t / 1e6:g} {x} {y} 1\n" for t, x, y in zip(events.t, events.x, events.y, strict=True)]
    rows = [row if (20 < i < 80 and i % 2 == 0) or i < 20 else "" for i, row in enumerate(rows)]
    (tmp_path / "a.txt").write_text("t x y p\n" + "".join(rows))
    kept = [i for i, row in enumerate(rows) if row]
    assert read_events(tmp_path / "a.txt").t.tolist() == events.t[kept].tolist()


def test_spaces_between_numbers_of_text(tmp_path):
    events = random_events(200, (180, 240))
    rows = zip(events.t, events.x, events.y, events.p.astype(int), strict=True)
    (tmp_path / "a.txt").write_text("".join(f" {t:9}  {x:4} {y:4} {p}\r\n" for t, x, y, p in rows))
    assert_same(read_events(tmp_path / "a.txt"), events)


def test_data_that_begins_like_a_header_line(tmp_path):
    """Without "% end", the header ends at the first line that is no text."""
    events = random_events(50, (480, 640))
    words = np.concatenate([[0x80000A25], evt2_words(events)])  # bytes "%", line feed, ...
    header = raw_header("2.0", (480, 640)).replace(b"% end\n", b"")
    (tmp_path / "a.raw").write_bytes(header + words.astype("<u4").tobytes())
    assert len(read_events(tmp_path / "a.raw")) == 50


def test_text_with_the_size_of_the_sensor(tmp_path):
    events = random_events(300, (180, 240))
    read = read_events(write_text(tmp_path / "a.txt", events, header="240 180\n", separator=" "))
    assert_same(read, events)
    assert read.sensor_size == (180, 240)


def test_a_wrong_header(tmp_path):
    path = write_evt3(tmp_path / "a.raw", clustered(50, (720, 1280)))
    content = path.read_bytes()
    for old, new, message in (
        (b"EVT3", b"EVT9", "its encoding is 'EVT9"),
        (b"width=1280", b"width=0000", r"a sensor of \(height, width\) \(720, 0\)"),
        (b"EVT3;", b"EVT2;", "words are of no kind"),
    ):
        path.write_bytes(content.replace(old, new))
        with pytest.raises(EventFileError, match=message):
            read_events(path)


def test_one_warning_for_a_data_set(tmp_path):
    events = random_events(300, (240, 304))
    good, cut = write_dat(tmp_path / "good.dat", events), write_dat(tmp_path / "cut.dat", events)
    cut.write_bytes(cut.read_bytes()[:-3])
    with pytest.warns(EventFileWarning, match=r"1 of 2 recordings were repaired: .*cut\.dat: the file is cut: 5 bytes"):
        data = EventDataset([(good, 0), (cut, 0)], ["a"], FrameSpec(2))
    assert data.repaired == {cut: "the file is cut: 5 bytes at its end are no whole record and were left out"}
    assert len(data) == 2


def test_iterating_over_a_file(tmp_path):
    events = random_events(70_000)
    path = write_npz(tmp_path / "a.npz", events)
    chunks = list(iter_events(path))
    assert len(chunks) == 3
    np.testing.assert_array_equal(np.concatenate([chunk.t for chunk in chunks]), events.t)


def test_evt3_words_are_those_of_the_format():
    """A check of the writer, by hand: row 2, columns 5, 7 and 30 of one moment, then column 3."""
    events = Events(np.array([4098] * 3 + [4099]), np.array([5, 7, 30, 3]), np.full(4, 2), np.ones(4, bool))
    words = [0x8001, 0x6002, 0x0002, 0x3805, 0x4005, 0x4000, 0x5002, 0x6003, 0x2803]
    assert evt3_words(events).tolist() == words
