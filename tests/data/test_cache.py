import errno
import multiprocessing
import os
import time
import warnings

import numpy as np
import pytest

from timm_qkformer.data import FrameCache

FRAMES = np.arange(2 * 2 * 3 * 4, dtype=np.uint32).reshape(2, 2, 3, 4)


class Counter:
    def __init__(self, frames=FRAMES):
        self.frames = frames
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return self.frames


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "recording.bin"
    path.write_bytes(b"12345")
    return path


@pytest.fixture
def cache(tmp_path):
    return FrameCache(tmp_path / "deep" / "cache")


def files(cache):
    return [p for p in cache.root.rglob("*") if p.is_file()]


def test_built_once(cache, source):
    build = Counter()
    assert not cache.has(source, {})
    for _ in range(3):
        np.testing.assert_array_equal(cache.get(source, {}, build), FRAMES)
    assert build.calls == 1
    assert cache.has(source, {})
    assert FrameCache(cache.root).has(source, {})


@pytest.mark.parametrize("top", [1, 255, 256, 70_000])
def test_counts_survive_whatever_their_size(top, cache, source):
    frames = np.full((1, 2, 2, 2), top, dtype=np.uint32)
    cache.get(source, {}, lambda: frames)
    np.testing.assert_array_equal(cache.get(source, {}, Counter()), frames)


def test_parameters_and_changes_of_the_recording_make_new_entries(cache, source):
    build = Counter()
    cache.get(source, {"time_steps": 4}, build)
    cache.get(source, {"time_steps": 8}, build)
    assert build.calls == 2
    os.utime(source, ns=(1, 1))
    cache.get(source, {"time_steps": 8}, build)
    source.write_bytes(b"1234567890")
    os.utime(source, ns=(1, 1))
    cache.get(source, {"time_steps": 8}, build)
    assert build.calls == 4


@pytest.mark.parametrize("damage", ["cut", "flip", "noise", "empty", "array", "signed"])
def test_a_corrupt_file_is_rebuilt_with_a_warning(damage, cache, source):
    frames = np.random.default_rng(0).integers(0, 200, (4, 2, 16, 16)).astype(np.uint32)
    build = Counter(frames)
    cache.get(source, {}, build)
    (path,) = files(cache)
    data = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(data[:-40])
    elif damage == "flip":
        data[len(data) // 2] ^= 0xFF
        path.write_bytes(data)
    elif damage == "array":
        with open(path, "wb") as file:
            np.save(file, frames)
    elif damage == "signed":
        np.savez(path, frames=frames.astype(np.float32))
    else:
        path.write_bytes(b"" if damage == "empty" else bytes(range(200)))
    with pytest.warns(UserWarning, match=r"recording-\w+\.npz is corrupt and is rebuilt from .*recording\.bin"):
        np.testing.assert_array_equal(cache.get(source, {}, build), frames)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(cache.get(source, {}, build), frames)
    assert build.calls == 2


def test_an_interruption_leaves_nothing_behind(cache, source, monkeypatch):
    def interrupted(file, **arrays):
        file.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez_compressed", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache.get(source, {}, Counter())
    assert files(cache) == []
    assert not cache.has(source, {})
    np.testing.assert_array_equal(cache.get(source, {}, Counter()), FRAMES)


def _stall_while_writing(root, source, started):
    def stall(file, **arrays):
        file.write(b"half")
        file.flush()
        started.set()
        time.sleep(60)

    np.savez_compressed = stall
    FrameCache(root).get(source, {}, Counter())


def test_a_process_killed_while_writing(cache, source):
    context = multiprocessing.get_context("fork")
    started = context.Event()
    process = context.Process(target=_stall_while_writing, args=(cache.root, source, started))
    process.start()
    assert started.wait(30)
    process.kill()
    process.join()
    assert not cache.has(source, {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(cache.get(source, {}, Counter()), FRAMES)


def _hammer(root, source, barrier, failures):
    cache = FrameCache(root)
    frames = np.random.default_rng(0).integers(0, 200, (4, 2, 32, 32)).astype(np.uint32)
    warnings.simplefilter("error")
    for i in range(20):
        barrier.wait(30)
        got = cache.get(source, {"entry": i}, lambda: frames)
        if not np.array_equal(got, frames) or not np.array_equal(cache.get(source, {"entry": i}, Counter()), frames):
            failures.put(i)


def test_two_processes_at_once(cache, source):
    context = multiprocessing.get_context("fork")
    barrier, failures = context.Barrier(2), context.Queue()
    processes = [
        context.Process(target=_hammer, args=(cache.root, source, barrier, failures), daemon=True) for _ in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert failures.empty()
    assert len(files(cache)) == 20


def test_a_full_disk_costs_the_cache_and_not_the_run(cache, source, monkeypatch):
    def full(file, **arrays):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.warns(UserWarning, match="cannot write to the cache .*No space left on device"):
        np.testing.assert_array_equal(cache.get(source, {}, Counter()), FRAMES)
    assert files(cache) == []


def test_a_folder_that_cannot_be_made(source):
    with pytest.raises(OSError, match="cache_dir="):
        FrameCache(source / "cache")
