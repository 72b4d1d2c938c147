"""Libraries of kernels as files: what they are made of, for which processors, and how they are named.

A file's name says what it was made from and what is in it, so that neither a stale nor a damaged one is ever loaded.

The standard library alone is imported, and nothing of this package: hatch_build.py loads this file to build wheels,
where torch is not installed.
"""

import hashlib
from collections.abc import Iterator
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import NamedTuple

COMMON = "common.cpp"

# What KERNEL(SUFFIX, X, S) in a source is to export: types of currents and of spikes.
TYPES = (
    "float64_float64, double, double",
    "float32_float32, float, float",
    "float32_bfloat16, float, BFloat16",
    "float32_uint8, float, std::uint8_t",
    "bfloat16_bfloat16, BFloat16, BFloat16",
)

# Those of torch's Inductor, which builds what did not come along (`compiler`), but for the processor: same results.
FLAGS = (
    *("-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-fopenmp"),
    *("-fno-trapping-math", "-fno-signed-zeros", "-ffp-contract=off", "-fexcess-precision=fast"),
)


class Level(NamedTuple):
    """Processors that a library is for.

    Attributes:
        name: Also the folder's.
        machine: As `platform.machine` calls it.
        flags: That GCC takes for it.
        needs: Instructions that a processor must have, as /proc/cpuinfo spells them.
    """

    name: str
    machine: str
    flags: tuple[str, ...]
    needs: frozenset[str]


_V2 = frozenset(("cx16", "lahf_lm", "pni", "popcnt", "sse4_1", "sse4_2", "ssse3"))
_V3 = _V2 | {"abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"}
_V4 = _V3 | {"avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"}

# The best of each machine first. No source asks for more than these: VNNI, bfloat16 or dot products, for instance.
LEVELS = (
    Level("x86-64-v4", "x86_64", ("-march=x86-64-v4",), _V4),
    Level("x86-64-v3", "x86_64", ("-march=x86-64-v3", "-mtune=skylake"), _V3),  # generic tuning: up to 7 % slower
    Level("x86-64-v2", "x86_64", ("-march=x86-64-v2",), _V2),
    Level("armv8-a", "aarch64", ("-march=armv8-a",), frozenset(("asimd",))),
)


class Source(NamedTuple):
    """What a library is made from: a file that follows common.cpp.

    Attributes:
        file: Its name.
        common, own: The texts of both.
    """

    file: str
    common: str
    own: str

    @classmethod
    def of(cls, common: Traversable, own: Traversable) -> "Source":
        return cls(own.name, common.read_text("utf-8"), own.read_text("utf-8"))

    def instances(self) -> tuple[str, ...]:
        """What is put behind it for the types of currents and spikes, each in turn; nothing where it names its own."""
        return tuple(f"KERNEL({types})\n" for types in TYPES) if "#define KERNEL(" in self.own else ("",)

    def text(self, instances: str) -> str:
        """C++ for these instances."""
        return "\n".join((self.common, self.own, instances))

    def whole(self) -> str:
        """C++ for all of them, as wheels have it."""
        return self.text("".join(self.instances()))

    def key(self, level: Level) -> str:
        """How the name of its library for a level begins, in a wheel."""
        parts = (self.whole(), *FLAGS, *level.flags)
        return f"{Path(self.file).stem}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:24]}"


def sources(package: Path) -> Iterator[Source]:
    """All of the folder of timm_qkformer."""
    common = package / "execution" / COMMON
    for path in sorted(package.rglob("*.cpp")):
        if path != common:
            yield Source.of(common, path)


def name(key: str, content: bytes) -> str:
    """The name of a library's file."""
    return f"{key}-{hashlib.sha256(content).hexdigest()[:24]}.so"


def candidates(folder: Path, key: str) -> list[Path]:
    """Files that call themselves the library of this key, sound or not."""
    try:
        return sorted(folder.glob(f"{key}-*.so"))
    except OSError:
        return []


def intact(folder: Path, key: str) -> Path | None:
    """The library whose content is what its name says; damaged ones are passed over."""
    for path in candidates(folder, key):
        try:
            if path.name == name(key, path.read_bytes()):
                return path
        except OSError:
            pass  # gone meanwhile, or not for us to read
    return None
