"""Libraries of kernels that came with the wheel: the one for this processor, bound to torch's OpenMP runtime.

They are plain C functions, so any torch and any Python may call them. They name no OpenMP runtime: a second one beside
torch's would have threads of its own. Other systems than Linux build what they need (`compiler`).
"""

import ctypes
import logging
import os
import platform
import sys
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import torch

from .libraries import LEVELS, Level, Source, candidates, intact

_logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "TIMM_QKFORMER_PREBUILT"
_ON, _OFF = ("", "1", "on", "true", "yes"), ("0", "off", "false", "no")

FOLDER = Path(__file__).with_name("kernels")  # hatch_build.py fills it: a folder for each level


def levels() -> tuple[Level, ...]:
    """What this processor can run and the environment variable does not rule out, the best first.

    Raises:
        ValueError: If the environment variable says something that is not known or cannot run here.
    """
    if sys.platform != "linux":
        return ()
    able = tuple(level for level in LEVELS if level.machine == platform.machine() and level.needs <= _instructions())
    setting = os.environ.get(ENVIRONMENT_VARIABLE, "").strip().lower()
    if setting in _ON:
        return able
    chosen = tuple(level for level in able if level.name == setting)
    if not chosen and setting not in _OFF:
        names = [level.name for level in able]
        raise ValueError(f"environment variable {ENVIRONMENT_VARIABLE}={setting!r}: choose 0, 1 or one of {names}")
    return chosen


@lru_cache
def _instructions() -> frozenset[str]:
    """What all cores can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    found = [frozenset(line.partition(":")[2].split()) for line in lines if line.startswith(("flags", "Features"))]
    return frozenset.intersection(*found) if found else frozenset()


def find(source: Source) -> tuple[Level, Path] | None:
    """The best library of a source for this processor; None if none came along.

    A file that is damaged is passed over, with a message; one of another source or other flags has another name.
    """
    for level in levels():
        folder, key = FOLDER / level.name, source.key(level)
        path = intact(folder, key)
        if path is not None:
            return level, path
        if candidates(folder, key):
            _logger.warning(
                "the kernels of %s for %s are damaged: install timm-qkformer again", source.file, level.name
            )
    return None


def load(source: Source, functions: Iterable[str]) -> ctypes.CDLL | None:
    """The library that `find` finds, if it can be loaded here and has these functions."""
    found = find(source)
    if found is None or not shares_openmp():
        return None
    level, path = found
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        _logger.warning("the kernels of %s for %s cannot be loaded: %s", source.file, level.name, error)
        return None
    return library if all(hasattr(library, name) for name in functions) else None


_OF_OPENMP = "GOMP_parallel"  # what GCC calls; LLVM's and Intel's runtimes have it, too


def shares_openmp() -> bool:
    """Whether libraries that name no OpenMP runtime find the one that torch has loaded."""
    return hasattr(ctypes.CDLL(None), _OF_OPENMP) or _publish_openmp() is not None


def _publish_openmp() -> str | None:
    """Let all libraries see torch's OpenMP runtime, and say which file it is.

    Importing torch does this wherever libtorch_global_deps.so depends on the runtime.
    """
    try:
        torchs = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        path = _mapped_at(ctypes.cast(getattr(torchs, _OF_OPENMP), ctypes.c_void_p).value or 0)
        if path is not None:
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    except (AttributeError, OSError):  # torch has none, or is put together in another way
        return None
    return path


def _mapped_at(address: int) -> str | None:
    """The file that this process has mapped at an address."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        start, end = (int(bound, 16) for bound in fields[0].split("-"))
        if start <= address < end:
            return fields[5] if len(fields) == 6 else None
    return None
