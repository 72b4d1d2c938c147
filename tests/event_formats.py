"""Crafted recordings in the cameras' formats, written from the formats' published descriptions."""

import struct
import zlib
from pathlib import Path

import numpy as np

from event_files import as_dict, random_events, write_aedat2, write_aedat3, write_aedat4, write_atis, write_npz
from timm_qkformer.data import Events

# EVT 2.0 and 2.1 (docs.prophesee.ai): kind in bits 31-28 of the upper word, time 27-22, x 21-11, y 10-0


def raw_header(version: str, size: tuple[int, int], extra: str = "") -> bytes:
    """As an EVK4 writes it."""
    return (
        f"% camera_integrator_name Prophesee\n% date 2023-03-29 16:37:46\n% evt {version}\n"
        f"% format EVT{version.replace('.0', '').replace('.', '')};height={size[0]};width={size[1]}{extra}\n"
        f"% geometry {size[1]}x{size[0]}\n% end\n"
    ).encode()


def evt2_words(events: Events) -> np.ndarray:
    words, last = [], None
    for t, x, y, p in zip(*(getattr(events, name).tolist() for name in "txyp"), strict=True):
        if t >> 6 != last:
            last = t >> 6
            words.append(8 << 28 | last & 0xFFFFFFF)
        words.append(int(p) << 28 | (t & 63) << 22 | x << 11 | y)
    return np.array(words, np.uint32)


def write_evt2(path: Path, events: Events, order: str = "<", extra: str = "") -> Path:
    path.write_bytes(raw_header("2.0", events.sensor_size, extra) + evt2_words(events).astype(order + "u4").tobytes())
    return path


def write_evt21(path: Path, events: Events, layout: str = "little", extra: str = "") -> Path:
    """Events of one time, row, polarity and group of 32 columns in one word."""
    words, last, open_key = [], None, None
    for t, x, y, p in zip(*(getattr(events, name).tolist() for name in "txyp"), strict=True):
        if t >> 6 != last:
            last, open_key = t >> 6, None
            words.append((8 << 28 | last & 0xFFFFFFF, 0))
        key, bit = (t, y, p, x >> 5), 1 << (x & 31)
        if key == open_key and words[-1][1] < bit:  # bits are read from the lowest on
            words[-1] = (words[-1][0], words[-1][1] | bit)
        else:
            words.append((int(p) << 28 | (t & 63) << 22 | (x & ~31) << 11 | y, bit))
        open_key = key
    pairs = np.array(words, np.uint32)
    pairs = {"little": pairs[:, ::-1].astype("<u4"), "legacy": pairs.astype("<u4"), "big": pairs.astype(">u4")}[layout]
    path.write_bytes(raw_header("2.1", events.sensor_size, extra) + pairs.tobytes())
    return path


def evt3_words(events: Events, vectors: bool = True) -> np.ndarray:
    """Neighbours in a row, of one time and polarity, as vectors of 12 and 8 columns; the rest as single events."""
    words: list[int] = []
    high = low = row = None
    columns = list(zip(*(getattr(events, name).tolist() for name in "txyp"), strict=True))
    at = 0
    while at < len(columns):
        t, x, y, p = columns[at]
        if (t >> 12) & 0xFFF != high:
            high, low = (t >> 12) & 0xFFF, None  # the lower bits always follow
            words.append(8 << 12 | high)
        if t & 0xFFF != low:
            low = t & 0xFFF
            words.append(6 << 12 | low)
        if y != row:
            row = y
            words.append(y)
        run = at
        while (
            vectors
            and run + 1 < len(columns)
            and columns[run + 1][0] == t
            and columns[run + 1][2:] == (y, p)
            and columns[run][1] < columns[run + 1][1] < x + 32
        ):
            run += 1
        if run - at < 2:
            words.append(2 << 12 | int(p) << 11 | x)
            at += 1
            continue
        mask = sum(1 << (columns[i][1] - x) for i in range(at, run + 1))
        words += [
            3 << 12 | int(p) << 11 | x,
            4 << 12 | mask & 0xFFF,
            4 << 12 | mask >> 12 & 0xFFF,
            5 << 12 | mask >> 24,
        ]
        at = run + 1
    return np.array(words, np.uint16)


def write_evt3(path: Path, events: Events, order: str = "<", vectors: bool = True, extra: str = "") -> Path:
    words = evt3_words(events, vectors)
    path.write_bytes(raw_header("3.0", events.sensor_size, extra) + words.astype(order + "u2").tobytes())
    return path


def write_dat(path: Path, events: Events, version: int = 2) -> Path:
    """Time (32 bits), then x, y (14 bits each; 9 and 8 in version 1) and the polarity."""
    x_bits, y_bits = (14, 14) if version == 2 else (9, 8)
    height, width = events.sensor_size
    header = f"% Data file containing CD events.\n% Version {version}\n% Height {height}\n% Width {width}\n".encode()
    address = events.x | events.y << x_bits | events.p.astype(np.int64) << (x_bits + y_bits)
    path.write_bytes(header + b"\x0c\x08" + np.stack([events.t, address], 1).astype("<u4").tobytes())
    return path


def write_davis(path: Path, events: Events) -> Path:
    """AEDAT 2.0 of a DAVIS346, with a sample of a frame and a trigger in between."""
    x, y = 345 - events.x, 259 - events.y
    address = y << 22 | x << 12 | events.p.astype(np.int64) << 11
    words = np.stack([address, events.t], 1)
    words = np.concatenate([words[:3], [[0x80000123, events.t[2]], [0x400, events.t[2]]], words[3:]])
    header = b"#!AER-DAT2.0\r\n# AEChip: eu.seebetter.ini.chips.davis.Davis346blue\r\n#End Of ASCII Header\r\n"
    path.write_bytes(header + words.astype(">u4").tobytes())
    return path


def write_dvs128(path: Path, events: Events) -> Path:
    """AEDAT 2.0 of a DVS128 as jAER has it."""
    swapped = Events(events.t, events.y, events.x, events.p, events.sensor_size)
    return write_aedat2(path, swapped)


def write_hdf5(path: Path, events: Events, group: str = "events", **options: object) -> Path:
    """DSEC's datasets in /events, with a t_offset if it is given."""
    import h5py

    offset = options.pop("t_offset", None)
    with h5py.File(path, "w") as file:
        if offset is not None:
            file["t_offset"] = np.int64(offset)
        for name, values in as_dict(events).items():
            dtype = {"t": "u4", "x": "u2", "y": "u2", "p": "u1"}[name]
            file.create_dataset(f"{group}/{name}", data=values.astype(dtype), chunks=True, **options)
    return path


def write_metavision_hdf5(path: Path, events: Events) -> Path:
    """Prophesee's compound dataset, without its codec."""
    import h5py

    records = np.zeros(len(events), [("x", "<u2"), ("y", "<u2"), ("p", "<i2"), ("t", "<i8")])
    for name, values in as_dict(events).items():
        records[name] = values
    with h5py.File(path, "w") as file:
        file.attrs["geometry"] = "{1}x{0}".format(*events.sensor_size)
        file.create_dataset("CD/events", data=records, chunks=True)
    return path


def write_mat(path: Path, events: Events, order: str = "<", compressed: bool = True) -> Path:
    """MATLAB 5: columns ts, x, y and pol of doubles and bytes, as ASL-DVS has them."""

    def element(kind: int, data: bytes) -> bytes:
        if len(data) <= 4:
            tag = len(data) << 16 | kind
            return struct.pack(order + "I", tag) + data.ljust(4, b"\0")
        return struct.pack(order + "II", kind, len(data)) + data + bytes(-len(data) % 8)

    header = b"MATLAB 5.0 MAT-file, Platform: GLNXA64".ljust(124)
    header += struct.pack(order + "H", 0x0100) + (b"IM" if order == "<" else b"MI")
    out = header
    for name, values in {"ts": events.t, "x": events.x, "y": events.y, "pol": events.p}.items():
        flags, kind, dtype = (6, 9, "f8") if name == "ts" else (9, 2, "u1")
        body = element(6, struct.pack(order + "II", flags, 0)) + element(5, struct.pack(order + "ii", len(values), 1))
        body += element(1, name.encode()) + element(kind, values.astype(order + dtype).tobytes())
        matrix = struct.pack(order + "II", 14, len(body)) + body
        if compressed:
            packed = zlib.compress(matrix)
            matrix = struct.pack(order + "II", 15, len(packed)) + packed
        out += matrix
    path.write_bytes(out)
    return path


def write_text(path: Path, events: Events, order: str = "txyp", header: str = "", separator: str = ",") -> Path:
    columns = {**as_dict(events), "p": events.p.astype(int)}
    rows = zip(*(columns[name].tolist() for name in order), strict=True)
    path.write_text(header + "".join(separator.join(map(str, row)) + "\n" for row in rows))
    return path


def write_seconds(path: Path, events: Events) -> Path:
    """The Robotics and Perception Group's events.txt: seconds, x, y, polarity."""
    rows = zip(events.t, events.x, events.y, events.p.astype(int), strict=True)
    path.write_text("".join(f"{t // 10**6}.{t % 10**6:06}000 {x} {y} {p}\n" for t, x, y, p in rows))
    return path


def write_npy(path: Path, events: Events, byte_order: str = "<") -> Path:
    """tonic's structured array."""
    records = np.zeros(
        len(events), [(name, byte_order + kind) for name, kind in (("x", "i2"), ("y", "i2"), ("t", "i8"), ("p", "i1"))]
    )
    for name, values in as_dict(events).items():
        records[name] = values
    np.save(path, records)
    return path


_P32 = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1)


def _xxh32(data: bytes) -> int:
    """XXH32 of fewer than 4 bytes with seed 0, for the header of an LZ4 frame."""
    value = _P32[4] + len(data)
    for byte in data:
        value = (value + byte * _P32[4]) & 0xFFFFFFFF
        value = ((value << 11 | value >> 21) & 0xFFFFFFFF) * _P32[0] & 0xFFFFFFFF
    for shift, factor in ((15, _P32[1]), (13, _P32[2]), (16, 1)):
        value = (value ^ value >> shift) * factor & 0xFFFFFFFF
    return value


def stored_frame(data: bytes, compression: str) -> bytes:
    """An LZ4 or Zstandard frame whose blocks are stored as they are."""
    if compression == "LZ4":
        descriptor = bytes([0x40, 0x70])  # independent blocks of up to 4 MB
        out = struct.pack("<I", 0x184D2204) + descriptor + bytes([_xxh32(descriptor) >> 8 & 0xFF])
        return out + struct.pack("<I", 1 << 31 | len(data)) + data + bytes(4)
    out = struct.pack("<I", 0xFD2FB528) + bytes([0x00, 0x58])  # no checksum, a window of 2 MB
    parts = [data[i : i + 2**16] for i in range(0, len(data), 2**16)]
    for i, part in enumerate(parts):
        out += (len(part) << 3 | (i == len(parts) - 1)).to_bytes(3, "little") + part
    return out


def write_compressed_aedat4(path: Path, events: Events, compression: str) -> Path:
    """The uncompressed file with its packets in frames of `compression`, LZ4 or ZSTD."""
    content = write_aedat4(path, events).read_bytes()
    content = content.replace(b">NONE<", f">{compression}<".encode())
    shift = len(compression) - 4  # of the XML in the header
    header = bytearray(content[: content.index(b"</dv>") + 6])  # as long as the XML has become
    length = int.from_bytes(header[14:18], "little") + shift
    header[14:18] = length.to_bytes(4, "little")
    at = header.index(b"<dv ") - 4
    header[at : at + 4] = (int.from_bytes(header[at : at + 4], "little") + shift).to_bytes(4, "little")
    stream, size = struct.unpack_from("<ii", content, len(header))
    root = 18 + int.from_bytes(header[18:22], "little")
    header[root + 4] = {"LZ4": 1, "ZSTD": 3}[compression]
    start = len(header) + 8
    frame = stored_frame(content[start : start + size], compression)
    path.write_bytes(bytes(header) + struct.pack("<ii", stream, len(frame)) + frame)
    return path


def clustered(count: int, size: tuple[int, int], seed: int = 0, span: int = 300_000) -> Events:
    """Events in runs of neighbours of one time and polarity, as vector formats are made for."""
    rng = np.random.default_rng(seed)
    runs = max(count // 6, 1)
    length = rng.integers(1, 12, runs)
    start = rng.integers(0, size[1] - 12, runs)
    x = np.concatenate([np.sort(rng.choice(12, n, replace=False)) + s for n, s in zip(length, start, strict=True)])
    t, y, p = np.sort(rng.integers(0, span, runs)), rng.integers(0, size[0], runs), rng.integers(0, 2, runs) > 0
    columns = (np.repeat(values, length) for values in (t, y, p))
    t, y, p = columns
    return Events(t, x, y, p, size)


# name: (suffix, writer, sensor size, whether the file states it, events)
FORMATS = {
    "EVT2": (".raw", write_evt2, (480, 640), True, random_events),
    "EVT2.1": (".raw", write_evt21, (480, 640), True, clustered),
    "EVT3": (".raw", write_evt3, (720, 1280), True, clustered),
    "dat": (".dat", write_dat, (240, 304), True, random_events),
    "dat version 1": (".dat", lambda path, events: write_dat(path, events, 1), (240, 304), True, random_events),
    "AEDAT 2.0": (".aedat", write_dvs128, (128, 128), True, random_events),
    "AEDAT 2.0 DAVIS": (".aedat", write_davis, (260, 346), True, random_events),
    "AEDAT 3.1": (".aedat", write_aedat3, (128, 128), False, random_events),
    "AEDAT 4": (".aedat4", write_aedat4, (128, 128), True, random_events),
    "N-MNIST": (".bin", write_atis, (34, 34), False, random_events),
    "HDF5": (".h5", write_hdf5, (480, 640), False, random_events),
    "HDF5 Metavision": (".hdf5", write_metavision_hdf5, (480, 640), True, random_events),
    "mat": (".mat", write_mat, (180, 240), False, random_events),
    "csv": (".csv", write_text, (480, 640), False, random_events),
    "txt": (".txt", write_seconds, (180, 240), False, random_events),
    "npy": (".npy", write_npy, (34, 34), False, random_events),
    "npz": (".npz", write_npz, (34, 34), False, random_events),
}
