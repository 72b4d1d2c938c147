"""Files that nobody should load: what each is, and the reason that `convert` must give for refusing it.

`CASES` maps a name to a function of the honest checkpoint (its state dict, in the release's spelling) that writes the
file, and to a pattern for the reason.
"""

import io
import json
import random
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from training_dict import training_checkpoint

StateDict = dict[str, Tensor]
Build = Callable[[StateDict, Path], bytes]  # honest tensors, a file that code would make

CASES: dict[str, tuple[Build, str]] = {}

UNREADABLE = (
    "damaged or cut off|neither a safetensors|bare pickle|safetensors header claims|PyTorch cannot read|no data.pkl"
)


def saved(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


CONTAINERS: dict[str, Callable[[StateDict], bytes]] = {
    "plain": saved,
    "training": lambda tensors: saved(training_checkpoint(tensors, time_step=2, input_size=64)),
    "safetensors": lambda tensors: safetensors.torch.save({k: v.contiguous() for k, v in tensors.items()}),
}


def add(name: str, reason: str, build: Build) -> None:
    assert name not in CASES
    CASES[name] = (build, reason)


def changed(name: str, reason: str, change: Callable[[StateDict], Any], container: str = "plain") -> None:
    """A state dict that was tampered with before it was saved."""

    def build(tensors: StateDict, marker: Path) -> bytes:
        tensors = OrderedDict(tensors)
        result = change(tensors)
        return CONTAINERS[container](result if isinstance(result, dict) else tensors)

    add(f"{name}-{container}", reason, build)


# Cut off, overwritten, random.


def cut(name: str, container: str, tenths: int, last: int | None = None) -> None:
    def build(tensors: StateDict, marker: Path) -> bytes:
        content = CONTAINERS[container](tensors)
        return content[: len(content) * tenths // 10][:last]

    add(f"truncated-{name}-{container}", UNREADABLE, build)


for container in CONTAINERS:
    for tenths in range(10):
        cut(f"{tenths}-tenths", container, tenths)
    cut("by-one", container, 10, -1)

PREFIXES = {"bytes": b"", "zip": b"PK\x03\x04", "pickle": b"\x80\x02", "json": struct.pack("<Q", 900) + b"{"}


def fixed(name: str, reason: str, content: bytes) -> None:
    """A file that has nothing to do with the honest tensors."""
    add(name, reason, lambda tensors, marker: content)


for seed in range(10):
    for kind, prefix in PREFIXES.items():
        fixed(f"random-{kind}-{seed}", UNREADABLE, prefix + random.Random(seed).randbytes(1000 * (seed + 1)))
fixed("empty", UNREADABLE, b"")
fixed("html", UNREADABLE, b"<!DOCTYPE html><title>404</title>" * 40)
fixed("tar", UNREADABLE, b"sys_info" + bytes(504) + b"ustar" + bytes(4000))

# Code in the pickle.


def with_pickle(pickled: bytes, records: dict[str, bytes] | None = None) -> bytes:
    """A zip as torch.save writes it, with this pickle and these records."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
        for name, content in (records or {}).items():
            archive.writestr(f"archive/{name}", content)
    return buffer.getvalue()


def call(module: str, name: str, *arguments: str) -> bytes:
    """Protocol 2: call module.name with strings."""
    strings = b"".join(b"X" + struct.pack("<I", len(a)) + a.encode() for a in arguments)
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"(" + strings + b"tR."


def stack_call(module: str, name: str, *arguments: str) -> bytes:
    """Protocol 4: the names come from the stack."""
    strings = b"".join(b"\x8c" + bytes([len(a)]) + a.encode() for a in arguments)
    names = b"".join(b"\x8c" + bytes([len(a)]) + a.encode() for a in (module, name))
    return b"\x80\x04" + names + b"\x93(" + strings + b"tR."


def instance(module: str, name: str, *arguments: str) -> bytes:
    """Protocol 0: the INST opcode."""
    strings = b"".join(b"S'" + a.encode() + b"'\n" for a in arguments)
    return b"(" + strings + b"i" + f"{module}\n{name}\n".encode() + b"."


PAYLOADS: dict[str, tuple[str, str, Callable[[Path], tuple[str, ...]]]] = {
    "system": ("os", "system", lambda m: (f"touch {m}",)),
    "posix": ("posix", "system", lambda m: (f"touch {m}",)),
    "popen": ("subprocess", "getoutput", lambda m: (f"touch {m}",)),
    "eval": ("builtins", "eval", lambda m: (f"open({str(m)!r}, 'w')",)),
    "exec": ("__builtin__", "exec", lambda m: (f"open({str(m)!r}, 'w')",)),
    "open": ("io", "open", lambda m: (str(m), "w")),
    "mknod": ("os", "mknod", lambda m: (str(m),)),
    "run": ("runpy", "run_path", lambda m: (str(m),)),
    "spoofed": ("torch FloatStorage\nos", "system", lambda m: (f"touch {m}",)),
}
SPELLINGS = {"global": call, "stack": stack_call, "inst": instance}
PICKLE_REASON = "which could run code|in a way that torch.save does not|its pickle is damaged"


def code(name: str, reason: str, payload: str, write: Callable[..., bytes], wrap: Callable[[bytes], bytes]) -> None:
    module, function, arguments = PAYLOADS[payload]
    add(name, reason, lambda tensors, marker: wrap(write(module, function, *arguments(marker))))


for payload in PAYLOADS:
    for spelling, write in SPELLINGS.items():
        code(f"code-{payload}-{spelling}", PICKLE_REASON, payload, write, with_pickle)
    code(f"code-{payload}-bare", "bare pickle", payload, call, bytes)


class _Touch:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


for place in ("args", "model", "optimizer", "extra"):

    def _in_training_dict(tensors: StateDict, marker: Path, place: str = place) -> bytes:
        content = training_checkpoint(tensors, time_step=2)
        content[place] = _Touch(marker)
        return saved(content)

    add(f"code-in-{place}", PICKLE_REASON, _in_training_dict)

# Bombs.


def _deflated(tensors: StateDict, marker: Path) -> bytes:
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(saved(tensors))) as honest,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for record in honest.infolist():
            archive.writestr(record.filename, honest.read(record))
        with archive.open("archive/data/bomb", "w", force_zip64=True) as bomb:
            for _ in range(64):
                bomb.write(bytes(1 << 20))
    return buffer.getvalue()


add("bomb-deflated", "compressed or encrypted", _deflated)


def _claiming(size: int) -> Build:
    """The directory claims a size for the first tensor that the file does not have."""

    def build(tensors: StateDict, marker: Path) -> bytes:
        content = bytearray(saved(tensors))
        at = content.index(b"/data/0", content.index(b"PK\x01\x02"))
        header = content.rindex(b"PK\x01\x02", 0, at)
        content[header + 20 : header + 28] = struct.pack("<II", size, size)
        return bytes(content)

    return build


add("bomb-directory-1g", "records claim", _claiming(1 << 30))
add("bomb-directory-4g", "records claim|damaged", _claiming(0xFFFFFFFE))


def _overlapping(tensors: StateDict, marker: Path) -> bytes:
    """Each of 60 directory entries points at the whole of the same large record."""
    first = io.BytesIO()
    with zipfile.ZipFile(first, "w") as archive:
        archive.writestr("archive/data/0", bytes(1 << 20))
    content = first.getvalue()
    start = content.index(b"PK\x01\x02")
    end = content.index(b"PK\x05\x06")
    entry = content[start:end]
    entries = b"".join(entry.replace(b"data/0", b"dat%03d" % i)[: len(entry)] for i in range(60))
    tail = bytearray(content[end:])
    tail[8:12] = struct.pack("<HH", 60, 60)
    tail[12:16] = struct.pack("<I", len(entries))
    return content[:start] + entries + bytes(tail)


add("bomb-overlapping", "records claim|damaged|lists a name twice", _overlapping)


def _twice(tensors: StateDict, marker: Path) -> bytes:
    content = bytearray(with_pickle(b"\x80\x02}.", {"data/0": bytes(64), "data/1": bytes(64)}))
    at = content.rindex(b"archive/data/1")
    content[at : at + 14] = b"archive/data/0"
    return bytes(content)


add("bomb-name-twice", "lists a name twice", _twice)
BYTEARRAY = b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x02\x85R."
fixed("bomb-bytearray", "which could run code", with_pickle(BYTEARRAY))
# Built when they are needed: they are large.
add(
    "bomb-large-pickle",
    "more than names and shapes need",
    lambda tensors, marker: with_pickle(b"\x80\x02" + b"]0" * (5 << 20) + b"}."),
)
add(
    "bomb-many-opcodes",
    "more than 1,000,000 steps",
    lambda tensors, marker: with_pickle(b"\x80\x02" + b"}" * 2_000_000 + b"."),
)
for claim in (10**6, 10**9, 2**40, 2**63 - 1, 2**64 - 1):
    fixed(f"bomb-header-{claim}", "safetensors header claims", struct.pack("<Q", claim) + b"{" + bytes(2000))


def header(entries: dict[str, Any], body: int = 64) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(body)


for claim in ([1 << 40], [1 << 20, 1 << 20], [-1], [1 << 62, 4]):
    entry = {"dtype": "F32", "shape": claim, "data_offsets": [0, 64]}
    name = f"bomb-shape-{'x'.join(map(str, claim))}-safetensors"
    fixed(name, "damaged or cut off", header({"head.weight": entry}))
entry = {"dtype": "F32", "shape": [16], "data_offsets": [0, 1 << 40]}
fixed("bomb-offsets-safetensors", "damaged or cut off", header({"head.weight": entry}))
changed(
    "bomb-expanded", "its tensors claim", lambda t: t.update({"head.weight": torch.zeros(1).expand(1 << 15, 1 << 16)})
)
changed(
    "bomb-shared",
    "its tensors claim",
    lambda t: t.update({f"extra{i}": base[i:] for base in [torch.zeros(1 << 18)] for i in range(1000)}),
)


def _thousands(tensors: StateDict) -> None:
    shared = torch.zeros(1)
    tensors.update({f"stage3.{i}.mlp.fc1_conv.weight": shared.clone() for i in range(10_000)})


for container in ("plain", "safetensors"):
    changed("ten-thousand-keys", "none of these models has more than|more than .* steps", _thousands, container)

# Not a state dict.

for name, content in {
    "list": [1, 2, 3],
    "number": 3,
    "text": "weights",
    "none": None,
    "empty": {},
    "empty-model": {"model": {}},
    "strings": {"head.weight": "none"},
    "numbered": {0: torch.zeros(3)},
    "nested": {"model": {"model": {"head.weight": torch.zeros(10, 64)}}},
    "tensor": torch.zeros(3),
}.items():
    add(f"content-{name}", "not a dict|no tensors|not a state dict", lambda t, marker, c=content: saved(c))
changed(
    "other-model",
    "no classifier",
    lambda t: {"conv1.weight": torch.zeros(8, 3, 3, 3), "fc.weight": torch.zeros(10, 64)},
)
changed("other-width", "its classifier takes 65 features", lambda t: t.update({"head.weight": torch.zeros(10, 65)}))

# Tampered tensors.

VICTIMS = (
    "patch_embed1.proj_conv.weight",
    "patch_embed1.proj_bn.running_mean",
    "patch_embed2.proj_res_bn.weight",
    "stage1.0.tssa.q_conv.weight",
    "stage2.0.mlp.fc1_bn.bias",
    "stage3.1.attn.proj_conv.bias",
    "stage3.1.mlp.fc2_bn.running_var",
    "head.weight",
    "head.bias",
)


def replaced(name: str, reason: str, victim: str, change: Callable[[Tensor], Tensor]) -> None:
    """A tensor that was exchanged for another."""
    changed(name, reason, lambda t: t.update({victim: change(t[victim])}))


for victim in VICTIMS:
    short = victim.replace(".", "_")
    for dtype in (torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool, torch.complex64):
        name = f"dtype-{str(dtype).removeprefix('torch.')}-{short}"
        replaced(name, "expected float32|which could run code", victim, lambda w, d=dtype: w.to(d))
    for value in ("nan", "inf", "-inf"):

        def _spoil(weight: Tensor, value: str = value) -> Tensor:
            weight.view(-1)[-1:].fill_(float(value))
            return weight

        replaced(f"value-{value}-{short}", "not finite", victim, _spoil)
    transposed = "misshapen|classifier|no model fits"
    replaced(f"transposed-{short}", transposed, victim, lambda w: torch.zeros(*reversed(w.shape), 2))
    replaced(f"long-{short}", "misshapen|no model fits", victim, lambda w: torch.cat([w] * 2, -1))
    missing = "missing|no classifier|do not know|cannot be matched"
    changed(f"missing-{short}", missing, lambda t, v=victim: t.pop(v))
    changed(f"misspelt-{short}", "no model fits", lambda t, v=victim: t.update({"a" + v: t.pop(v)}))
EXTRA = "extra|does not know|no model fits"
for extra in ("head.extra", "stage3.2.mlp.fc1_conv.weight", "patch_embed4.proj_conv.weight", "optimizer", "x" * 5000):
    for container in CONTAINERS:
        changed(f"extra-{extra[:40]}", EXTRA, lambda t, e=extra: t.update({e: torch.zeros(2)}), container)

COUNTER, STEM = "patch_embed1.proj_bn.num_batches_tracked", "patch_embed1.proj_conv.weight"
replaced("dtype-counter", "expected an int64 counter", COUNTER, lambda w: torch.tensor(1.0))
replaced("negative-variance", "negative variances", "stage3.1.mlp.fc2_bn.running_var", torch.neg)
replaced("sparse", "could run code|dense|cannot read", "head.weight", torch.Tensor.to_sparse)
replaced(
    "quantised", "could run code|dense", "head.weight", lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8)
)
replaced("meta", "could run code|dense|claim", "head.weight", lambda w: torch.zeros(10, 64, device="meta"))
for shape in ([0, 64], [10, 0], [], [10], [10, 64, 1]):
    name = f"classifier-of-{'x'.join(map(str, shape)) or 'scalar'}"
    replaced(name, "classifier", "head.weight", lambda w, s=shape: torch.zeros(s))
for shape in ([8, 0, 3, 3], [0, 3, 3, 3], [8]):
    name = f"stem-of-{'x'.join(map(str, shape))}"
    replaced(name, "no stem|no model fits", STEM, lambda w, s=shape: torch.zeros(s))


def _odd_mlps(tensors: StateDict) -> None:
    for name in [name for name in tensors if name.endswith("fc1_conv.weight")]:
        tensors[name] = torch.zeros(1, 64, 1, 1)


changed("mlp-of-one", "no model fits", _odd_mlps)
