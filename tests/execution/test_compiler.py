"""Libraries of kernels on disk: read-only, emptied, damaged, built by several processes, compilers that hang."""

import logging
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time

import pytest

from timm_qkformer.execution import compiler, libraries

SOURCE = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def cache(tmp_path, monkeypatch, event_kernels):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "timm_qkformer"


@pytest.fixture
def built(cache):
    assert compiler.load(SOURCE, "a.cpp").answer() == 42
    (path,) = cache.glob("*.so")
    return path


def refuse(*args, **kwargs):
    raise AssertionError("compiled once more")


def test_what_is_on_disk_needs_neither_a_compiler_nor_the_right_to_write(built, monkeypatch):
    monkeypatch.setattr(compiler, "_build", refuse)
    monkeypatch.setattr(compiler, "turn", refuse)
    monkeypatch.setattr(compiler.tempfile, "mkstemp", refuse)
    assert compiler.load(SOURCE, "a.cpp").answer() == 42


@pytest.mark.parametrize("content", [b"", b"\x7fELF", "half", "flipped"])
def test_a_damaged_library_is_told_and_made_anew(built, content):
    sound = built.read_bytes()
    broken = {"half": sound[: len(sound) // 2], "flipped": sound[:1000] + b"\xff" + sound[1001:]}.get(content, content)
    built.unlink()  # it is mapped into this process
    built.write_bytes(broken)
    assert compiler.load(SOURCE, "a.cpp").answer() == 42
    assert len(list(built.parent.glob("*.so"))) == 1
    assert libraries.intact(built.parent, compiler.machine_key(SOURCE)) is not None


def test_a_cold_cache_that_cannot_be_written_costs_a_folder_of_this_process_alone(cache, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("read-only file system")

    monkeypatch.setattr(compiler.tempfile, "mkstemp", full)
    assert compiler.load(SOURCE, "a.cpp").answer() == 42
    assert not list(cache.glob("*.so"))


def hanging(tmp_path, monkeypatch, seconds=1.0):
    script = tmp_path / "c++"
    script.write_text("#!/bin/sh\nsleep 600 & wait\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(compiler, "TIMEOUT", seconds)
    return script


def test_a_compiler_that_hangs_is_ended(cache, tmp_path, monkeypatch):
    script = hanging(tmp_path, monkeypatch)
    monkeypatch.setattr(compiler, "_command", lambda file, folder: ([str(script)], f"{folder}/kernels.so"))
    start = time.monotonic()
    with pytest.raises(compiler.NoCompilerError, match="not done within 1 seconds"):
        compiler.load(SOURCE, "a.cpp")
    assert time.monotonic() - start < 20
    monkeypatch.setattr(compiler, "_command", lambda file, folder: time.sleep(600))
    with pytest.raises(compiler.NoCompilerError, match="did not say its version within 1 seconds"):
        compiler.load(SOURCE, "a.cpp")


def test_a_source_that_does_not_compile_says_where(cache):
    with pytest.raises(RuntimeError, match="nonsense"):
        compiler.load("nonsense;\n", "a.cpp")


@pytest.mark.slow
def test_others_wait_with_a_message_and_a_builder_that_is_killed_blocks_nobody(cache, tmp_path, caplog):
    ready = tmp_path / "ready"
    code = f"""
        import pathlib, time
        from timm_qkformer.execution import compiler

        def build(*args):
            pathlib.Path({str(ready)!r}).touch()
            time.sleep(600)

        compiler._build = build
        compiler.load({SOURCE!r}, "a.cpp")
    """
    builder = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    try:
        while not ready.exists():
            assert builder.poll() is None
            time.sleep(0.05)
        killer = multiprocessing.get_context("spawn").Process(target=kill_later, args=(builder.pid,))
        killer.start()
        with caplog.at_level(logging.WARNING):
            assert compiler.load(SOURCE, "a.cpp").answer() == 42
        killer.join()
    finally:
        builder.kill()
        builder.wait()
    assert [record.getMessage() for record in caplog.records] == [
        "waiting for another process, which compiles the kernels of a.cpp"
    ]


def kill_later(pid):
    time.sleep(1.0)
    os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_eight_processes_build_once(cache, tmp_path):
    code = f"""
        import pathlib, os
        from timm_qkformer.execution import compiler

        build = compiler._build

        def counted(*args):
            pathlib.Path({str(tmp_path)!r}, f"built-{{os.getpid()}}").touch()
            return build(*args)

        compiler._build = counted
        assert compiler.load({SOURCE!r}, "a.cpp").answer() == 42
    """
    processes = [subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)]) for _ in range(8)]
    assert [process.wait() for process in processes] == [0] * 8
    assert len(list(tmp_path.glob("built-*"))) == 1
    assert len(list(cache.glob("*.so"))) == 1


def test_one_folder_serves_machines_of_several_kinds(monkeypatch):
    key = compiler.machine_key(SOURCE)
    monkeypatch.setattr(compiler, "_processor", lambda: "another one")
    assert compiler.machine_key(SOURCE) != key
