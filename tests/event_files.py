"""Synthetic recordings in every format that the package reads."""

import os
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest

from golden import SHARED
from timm_qkformer.data import Events


def random_events(count: int, size: tuple[int, int] = (34, 34), seed: int = 0, span: int = 300_000) -> Events:
    rng = np.random.default_rng(seed)
    return Events(
        t=np.sort(rng.integers(0, span, count)),
        x=rng.integers(0, size[1], count),
        y=rng.integers(0, size[0], count),
        p=rng.integers(0, 2, count).astype(bool),
        sensor_size=size,
    )


def as_dict(events: Events) -> dict[str, np.ndarray]:
    return {"t": events.t, "x": events.x, "y": events.y, "p": events.p}


def write_npz(path: Path, events: Events) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **as_dict(events))
    return path


def write_atis(path: Path, events: Events) -> Path:
    """N-MNIST's 5 bytes an event."""
    path.parent.mkdir(parents=True, exist_ok=True)
    word = events.x << 32 | events.y << 24 | events.p.astype(np.int64) << 23 | events.t
    path.write_bytes(word.astype(">u8").view(np.uint8).reshape(-1, 8)[:, 3:].tobytes())
    return path


def write_aedat4(path: Path, events: Events, streams: int = 1) -> Path:
    """AEDAT 4.0 without compression: a header and one packet of events per stream, both flatbuffers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = events.sensor_size
    nodes = "".join(
        f'<node name="{i}" path="/outInfo/{i}/"><attr key="compression" type="string">NONE</attr>'
        f'<attr key="typeIdentifier" type="string">EVTS</attr><node name="info" path="/outInfo/{i}/info/">'
        f'<attr key="sizeX" type="int">{width}</attr><attr key="sizeY" type="int">{height}</attr></node></node>'
        for i in range(streams)
    )
    xml = f'<dv version="2.0"><node name="outInfo" path="/outInfo/">{nodes}</node></dv>'.encode()
    vtable = struct.pack("<5H", 10, 20, 4, 12, 8)
    table = struct.pack("<iiIq", 10, 0, 12, -1)
    header = struct.pack("<I4s6x", 24, b"IOHE") + vtable + table + struct.pack("<I", len(xml)) + xml + b"\0"
    record = np.dtype({"names": ["t", "x", "y", "p"], "formats": ["<i8", "<i2", "<i2", "?"], "itemsize": 16})
    data = np.zeros(len(events), record)
    for key, values in as_dict(events).items():
        data[key] = values
    packet = struct.pack("<I4s3H2xiI4xI", 16, b"EVTS", 6, 8, 4, 8, 8, len(data)) + data.tobytes()
    out = b"#!AER-DAT4.0\r\n" + struct.pack("<I", len(header)) + header
    for stream in range(streams):
        out += struct.pack("<iiI", stream, len(packet) + 4, len(packet)) + packet
    path.write_bytes(out)
    return path


def write_aedat2(path: Path, events: Events) -> Path:
    """The original CIFAR10-DVS: big-endian address and timestamp. The axes are swapped and mirrored there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    address = (127 - events.x) << 8 | (127 - events.y) << 1 | (1 - events.p.astype(np.int64))
    words = np.stack([address, events.t], 1).astype(">u4")
    path.write_bytes(b"#!AER-DAT2.0\r\n# comment\r\n" + words.tobytes())
    return path


def write_aedat3(path: Path, events: Events) -> Path:
    """The original DVS128 Gesture: one packet of polarity events."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack("<HHIIIIII", 1, 0, 8, 4, 0, len(events), len(events), len(events))
    address = events.x << 17 | events.y << 2 | events.p.astype(np.int64) << 1 | 1
    words = np.stack([address, events.t], 1).astype("<u4")
    path.write_bytes(b"#!AER-DAT3.1\r\n#!END-HEADER\r\n" + header + words.tobytes())
    return path


def real_aedat4() -> Path:
    path = SHARED / "data" / "sample.aedat4"
    if not path.exists():
        pytest.skip(f"the real recording is not here: {path} does not exist")
    return path


def unpack_real_nmnist(target: Path) -> Path:
    archive = SHARED / "data" / "nmnist_small.tar.gz"
    if not archive.exists():
        pytest.skip(f"the real N-MNIST recordings are not here: {archive} does not exist")
    with tarfile.open(archive) as tar:
        tar.extractall(target, filter="data")
    return next(Path(parent) for parent, _, files in os.walk(target) if "train1K.txt" in files)
