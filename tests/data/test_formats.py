"""Files that may be anything: headers that lie, numbers that wrap around, bombs, clocks that run backwards."""

import io
import tracemalloc
import zipfile

import numpy as np
import pytest

from event_files import as_dict, random_events, unpack_real_nmnist, write_aedat4, write_atis, write_npz
from timm_qkformer.data import EventDataset, EventFileError, Events, FrameSpec, events_to_frames, read_events


def save(path, **changes):
    """An .npz of four events, with some of its arrays replaced, or bytes in their place."""
    arrays = {"t": np.arange(4), "x": np.arange(4), "y": np.arange(4), "p": np.array([0, 1, 0, 1]), **changes}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            content = io.BytesIO()
            if isinstance(array, bytes):
                content.write(array)
            else:
                np.save(content, array)
            archive.writestr(f"{name}.npy", content.getvalue())
    return path


def header(text, body=b""):
    text = text.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + body


def asks(shape, descr="'<i8'"):
    return header(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}", bytes(32))


BAD = {
    "10^12 elements": ({"t": asks("(1000000000000,)")}, "asks for"),
    "10^30 elements": ({"t": asks("(10**30,)".replace("10**30", "1" + "0" * 30))}, "asks for"),
    "a negative length": ({"t": asks("(-4,)")}, "asks for"),
    "a shape of text": ({"t": asks("('4',)")}, "not a readable"),
    "an unfinished header": ({"t": header("{'descr': '<i8', 'shape': (4")}, "not a readable"),
    "an indented header": ({"t": header("  \n   4\n 5")}, "not a readable"),
    "a header of nothing": ({"t": header("None")}, "not a readable"),
    "an unknown dtype": ({"t": asks("(4,)", "'?!'")}, "not a readable"),
    "objects": ({"t": asks("(4,)", "'|O'")}, "not unpickled"),
    "structured": ({"t": np.zeros(4, [("a", "<i8")])}, "whole microseconds"),
    "text": ({"x": np.array(list("abcd"))}, "x needs to be whole numbers, found <U1"),
    "complex": ({"x": np.zeros(4, complex)}, "x needs to be whole numbers"),
    "times": ({"t": np.zeros(4, "m8[us]")}, "whole microseconds"),
    "t = 1e300": ({"t": np.array([0, 1, 2, 1e300])}, "timestamps run from 0 to 1000"),
    "t = 2^63": ({"t": np.array([0, 1, 2, 2**63], np.uint64)}, "timestamps run from 0 to 9223372036854775808"),
    "t = inf": ({"t": np.array([0, 1, 2, np.inf])}, "whole microseconds"),
    "x = 2^63": ({"x": np.array([0, 1, 2, 2**63], np.uint64)}, "x runs from 0 to 9223372036854775808"),
    "y = -1": ({"y": np.array([0, 1, 2, -1])}, "y runs from -1 to 2"),
    "p = 2^64 - 1": ({"p": np.array([0, 1, 0, 2**64 - 1], np.uint64)}, "polarities run from 0 to 18446744073709551615"),
    "p = 0.5": ({"p": np.array([0, 1, 0, 0.5])}, "p needs to be whole numbers"),
    "another length": ({"p": np.zeros(5, bool)}, "vectors of one length"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::SyntaxWarning")
def test_one_bad_npz_does_not_stop_a_data_set(case, tmp_path):
    changes, message = BAD[case]
    path = save(tmp_path / "bad.npz", **changes)
    with pytest.raises(EventFileError, match=message):
        read_events(path)
    good = save(tmp_path / "good.npz")
    with pytest.warns(UserWarning, match=r"bad\.npz"):
        data = EventDataset([(path, 0), (good, 0)], ["a"], FrameSpec(2), (4, 4), on_error="skip")
    assert list(data.skipped) == [path]
    assert len(data) == 1


@pytest.mark.parametrize("damage", ["checksum", "method", "encrypted", "lzma"])
def test_damaged_archives(damage, tmp_path):
    path = save(tmp_path / "a.npz")
    content = bytearray(path.read_bytes())
    central = content.index(b"PK\x01\x02")
    if damage == "checksum":
        content[14] ^= 1
        content[central + 16] ^= 1
    if damage == "method":
        content[8] = content[central + 10] = 97
    if damage == "encrypted":
        content[6] |= 1
        content[central + 8] |= 1
    if damage == "lzma":
        content[8] = content[central + 10] = zipfile.ZIP_LZMA
    path.write_bytes(content)
    with pytest.raises(EventFileError, match=r"not a readable \.npz"):
        read_events(path)


def test_a_bomb_is_not_unpacked_and_memory_is_at_most_twice_the_file(tmp_path):
    count = 10_000_000
    bomb = tmp_path / "bomb.npz"
    np.savez_compressed(bomb, t=np.zeros(count, np.int64), x=(z := np.zeros(count, np.uint8)), y=z, p=z)
    wide, narrow = tmp_path / "wide.npz", tmp_path / "narrow.npz"
    events = random_events(300_000)
    np.savez(wide, **as_dict(events))
    np.savez(narrow, t=events.t, x=events.x.astype(np.uint16), y=events.y.astype(np.uint16), p=events.p)
    tracemalloc.start()
    try:
        with pytest.raises(EventFileError, match="times as many"):
            read_events(bomb)
        assert tracemalloc.get_traced_memory()[1] < 2**20
        for path in (wide, narrow):
            tracemalloc.reset_peak()
            read = read_events(path)
            assert tracemalloc.get_traced_memory()[1] < 2 * path.stat().st_size
            np.testing.assert_array_equal(read.x, events.x)
            del read
    finally:
        tracemalloc.stop()


def atis(path, rows):
    """Records (t, x, y, p)."""
    t, x, y, p = np.array(rows).T
    return write_atis(path, Events(t, x, y, p.astype(bool)))


def test_overflow_records_are_dropped_and_move_the_clock(tmp_path):
    rows = [(5, 1, 2, 1), (9, 0, 240, 0), (3, 4, 5, 0), (8000, 9, 240, 1), (0, 6, 7, 1)]
    read = read_events(atis(tmp_path / "a.bin", rows))
    assert read.t.tolist() == [5, 3 + 2**13, 2 * 2**13]
    assert read.x.tolist() == [1, 4, 6]
    assert read.y.tolist() == [2, 5, 7]
    assert read.p.tolist() == [True, False, True]


@pytest.mark.parametrize("suffix", [".bin", ".bs2"])
def test_time_that_runs_backwards_is_noticed(suffix, tmp_path):
    path = atis(tmp_path / f"a{suffix}", [(5, 1, 2, 1), (9, 3, 4, 0), (8, 4, 5, 0), (20, 4, 5, 0)])
    with pytest.raises(EventFileError, match="backwards 1 times, first from 9 to 8 microseconds at event 2"):
        read_events(path)


def test_real_recordings_of_nmnist_run_forwards(tmp_path):
    recordings = sorted(unpack_real_nmnist(tmp_path).rglob("*.bs2"))
    assert len(recordings) == 1100
    for path in recordings:
        assert read_events(path).y.max() < 34


def damaged_aedat4(path, change):
    pytest.importorskip("aedat")
    path = write_aedat4(path, random_events(50, (20, 30)))
    content = bytearray(path.read_bytes())
    change(content, 18 + int.from_bytes(content[14:18], "little"))
    path.write_bytes(content)
    return path


def put(at, value):
    def change(content, packet):
        content[packet + at] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(0, 9), "damaged packet at byte"),  # of a stream that the header does not name
        (put(5, 0xFF), "damaged|not a readable"),  # a length beyond the file
        (put(44 + 16 * 10 + 7, 0x3F), "time runs backwards"),
        (put(44 + 16 * 10 + 8, 200), "x runs from"),
        (put(44 + 16 * 10 + 11, 0x80), "y runs from"),
    ],
)
def test_damage_in_aedat4_is_noticed_where_it_can_be(change, message, tmp_path):
    with pytest.raises(EventFileError, match=message):
        read_events(damaged_aedat4(tmp_path / "a.aedat4", change))


DTYPES = ["uint8", "int16", "uint16", "int32", "uint32", "int64"]


@pytest.mark.parametrize("split_by", ["number", "time"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_coordinates_of_any_width_give_the_same_frames(dtype, split_by):
    size = (260, 346) if dtype != "uint8" else (200, 250)
    events = random_events(5000, size)
    spec = FrameSpec(3, split_by, (100, 120))
    narrow = Events(events.t, events.x.astype(dtype), events.y.astype(dtype), events.p.astype(dtype))
    expected = events_to_frames(events, spec, size)
    assert expected.sum() == 5000
    np.testing.assert_array_equal(events_to_frames(narrow, spec, size), expected)


@pytest.mark.parametrize("on", ["p", "on"])
def test_structured_arrays_and_mappings_are_taken(on):
    events = random_events(1000, (34, 34))
    fields = [("x", "<i2"), ("y", "<i2"), ("t", "<i8"), (on, "?")]  # as tonic, and aedat, have them
    array = np.zeros(1000, fields)
    for name, values in {"x": events.x, "y": events.y, "t": events.t, on: events.p}.items():
        array[name] = values
    expected = events_to_frames(events, FrameSpec(4), (34, 34))
    np.testing.assert_array_equal(events_to_frames(array, FrameSpec(4), (34, 34)), expected)
    np.testing.assert_array_equal(events_to_frames(as_dict(events), FrameSpec(4), (34, 34)), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": np.array([0, 40])}, "x runs from 0 to 40"),
        ({"y": np.array([-1, 4])}, "y runs from -1 to 4"),
        ({"x": np.array([0.0, 1.0])}, "integer dtype"),
        ({"x": np.array([0, 1, 2])}, "one length"),
        ({"t": np.array([0, 2**63], np.uint64)}, "timestamps run"),
        (dict.fromkeys("txyp", np.array([], int)), "no events"),
    ],
)
def test_what_cannot_be_counted_is_refused(changes, message):
    arrays = {"t": np.array([0, 1]), "x": np.array([0, 1]), "y": np.array([0, 1]), "p": np.array([0, 1]), **changes}
    with pytest.raises(ValueError, match=message):
        events_to_frames(arrays, FrameSpec(1), (34, 34))
    with pytest.raises(ValueError, match="lack the fields y"):
        events_to_frames({name: arrays[name] for name in "txp"}, FrameSpec(1), (34, 34))


def test_counting_in_chunks_is_counting(monkeypatch):
    from timm_qkformer.data import events as module

    events = random_events(1007, (20, 30))
    specs = [FrameSpec(steps, by, (4, 5)) for steps in (1, 3) for by in ("number", "time")]
    whole = [events_to_frames(events, spec, (20, 30)) for spec in specs]
    monkeypatch.setattr(module, "_CHUNK", 1)
    for spec, expected in zip(specs, whole, strict=True):
        np.testing.assert_array_equal(events_to_frames(events, spec, (20, 30)), expected)


def test_npz_without_an_order_is_as_ever(tmp_path):
    events = Events(np.array([5, 1]), np.array([0, 1]), np.array([0, 1]), np.array([True, False]))
    assert read_events(write_npz(tmp_path / "a.npz", events)).t.tolist() == [5, 1]
