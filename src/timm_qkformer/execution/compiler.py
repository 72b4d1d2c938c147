"""Libraries of kernels on disk: compiled once for all processes of a machine, and checked before they are loaded.

A library's file is named after what it was made of (source, torch, processor) and after its own content, so a file that
was damaged or emptied is told from a sound one before it is loaded, and made anew. What is on disk needs no compiler
and no right to write there. Processes that find nothing take turns: the first compiles and the others wait, by a lock
that the system releases when its holder ends, however it ends.

The compiler and its flags are those of torch's Inductor: this processor's instructions, torch's OpenMP runtime, no
contraction of products and sums.
"""

import ctypes
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from getpass import getuser
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from .libraries import candidates, intact
from .libraries import name as file_name

_logger = logging.getLogger(__name__)

TIMEOUT = 300.0  # seconds for one library; a busy core takes about ten


class NoCompilerError(RuntimeError):
    """There is no C++ compiler, or it does not come to an end: no library can be made in this process."""


def load(source: str, name: str) -> ctypes.CDLL:
    """The library of a source, compiled if it is not on disk.

    Args:
        source: C++.
        name: What to call it in messages.

    Raises:
        NoCompilerError: If there is no compiler, or it takes longer than `TIMEOUT`.
        RuntimeError: If the source does not compile.
        OSError: If the result cannot be loaded.
    """
    folder, key = cache_folder(), machine_key(source)
    found = intact(folder, key)
    if found is not None:
        return ctypes.CDLL(str(found))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, probe = tempfile.mkstemp(dir=folder, suffix=".tmp")
        os.close(descriptor)
        os.unlink(probe)
    except OSError:  # for this process alone, then
        folder = Path(tempfile.mkdtemp(prefix="timm_qkformer_"))
        try:
            return ctypes.CDLL(str(_build(source, folder, key)))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    with turn(folder / f"{key}.lock", name):
        found = intact(folder, key)  # by whoever was first
        return ctypes.CDLL(str(_build(source, folder, key) if found is None else found))


def compiler_path() -> str | None:
    """The C++ compiler that Inductor would call; None if there is none."""
    default = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    return shutil.which(os.environ.get("CXX") or default)


def is_kept(source: str) -> bool:
    """Whether the library of a source is on disk."""
    return intact(cache_folder(), machine_key(source)) is not None


def cache_folder() -> Path:
    """Where libraries are kept: in the cache of torch's own kernels."""
    given = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if given:
        return Path(given) / "timm_qkformer"
    user = re.sub(r'[\\/:*?"<>|]', "_", getuser())
    folder = Path(tempfile.gettempdir()) / f"torchinductor_{user}" / "timm_qkformer"
    if folder.exists() and hasattr(os, "getuid") and folder.stat().st_uid not in (os.getuid(), 0):
        return Path(tempfile.gettempdir()) / f"timm_qkformer_{os.getuid()}"  # somebody else made it in our name
    return folder


def machine_key(source: str) -> str:
    """A name for what was made of a source on this machine: machines of several kinds may share a folder."""
    parts = (source, torch.__version__, os.environ.get("CXX", ""), platform.machine(), _processor())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


@lru_cache
def _processor() -> str:
    """The instructions that this processor has."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.processor()} {torch.backends.cpu.get_cpu_capability()}"
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


@contextmanager
def turn(path: Path, name: str) -> Iterator[None]:
    """Wait until no other process holds the lock; with a message, and no longer than a compiler may take.

    Without locks (Windows, some network file systems) nobody waits, and a library may be made twice.
    """
    try:
        import fcntl

        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except (ImportError, OSError):
        yield
        return
    try:
        deadline, said = time.monotonic() + 2 * TIMEOUT, False
        while time.monotonic() < deadline:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not said:
                    _logger.warning("waiting for another process, which compiles the kernels of %s", name)
                    said = True
                time.sleep(0.1)
            except OSError:
                break
        yield
    finally:
        os.close(descriptor)


def _build(source: str, folder: Path, key: str) -> Path:
    """Compile, and move the library to its name when it is whole."""
    with tempfile.TemporaryDirectory(prefix="build-", dir=folder, ignore_cleanup_errors=True) as made:
        file = Path(made) / "kernels.cpp"
        file.write_text(source, encoding="utf-8")
        command, target = _within_timeout(lambda: _command(str(file), made))
        _run(command, made)
        content = Path(target).read_bytes()
        path = folder / file_name(key, content)
        for damaged in candidates(folder, key):
            damaged.unlink(missing_ok=True)
        os.replace(target, path)
    return path


def _command(file: str, folder: str) -> tuple[list[str], str]:
    """What compiles a file, and what it will write."""
    from torch._inductor.cpp_builder import CppBuilder, CppTorchDeviceOptions  # not at import: it takes seconds

    try:
        builder = CppBuilder(
            name="kernels", sources=file, BuildOption=CppTorchDeviceOptions(device_type="cpu"), output_dir=folder
        )
    except Exception as error:
        raise NoCompilerError(f"{type(error).__name__}: {error}".strip()) from error
    # Of its parts, the Windows way of quoting alone keeps backslashes.
    return shlex.split(builder.get_command_line(), posix=os.name != "nt"), builder.get_target_file_path()


def _within_timeout(function: Callable[[], Any]) -> Any:
    """What a function gives that asks the compiler for its version, and so may never return."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((function(), None))
        except Exception as error:
            outcome.append((None, error))

    thread = Thread(target=run, daemon=True, name="timm_qkformer compiler")
    thread.start()
    thread.join(TIMEOUT)
    if not outcome:
        raise NoCompilerError(f"the C++ compiler did not say its version within {TIMEOUT:g} seconds")
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


def _run(command: list[str], folder: str) -> None:
    """Run the compiler in a group of its own, so that all of it ends when its time is over."""
    try:
        compiler = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise NoCompilerError(str(error)) from error
    try:
        said, _ = compiler.communicate(timeout=TIMEOUT)
    except BaseException as error:
        if os.name == "posix":
            os.killpg(compiler.pid, signal.SIGKILL)
        compiler.kill()
        compiler.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            raise NoCompilerError(f"the C++ compiler was not done within {TIMEOUT:g} seconds") from error
        raise
    if compiler.returncode != 0:
        raise RuntimeError(f"{command[0]} ended with {compiler.returncode}: {said.strip()[-2000:]}")
