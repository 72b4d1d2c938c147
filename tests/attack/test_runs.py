"""Attacks on training runs: bytes and contents of checkpoints, kills, two processes, threads, recipes."""

import argparse
import os
import random
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch
from tiny_runs import PLAIN, command, flags, make_images, run, same_weights, weights, write_recipe

from timm_qkformer.hub.checkpoints import CheckpointError, read_content
from timm_qkformer.training.trainer import engine
from timm_qkformer.training.trainer.checkpoint import read_run
from timm_qkformer.training.trainer.config import read_recipe
from timm_qkformer.training.trainer.network import load_weights

SMALL = {**PLAIN, "model": "test_resnet", "model_kwargs": {}, "input_size": [3, 32, 32], "opt": "adamw", "epochs": 2}


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch):
    monkeypatch.setattr(engine, "draw_curves", lambda *_: None)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A finished run, to copy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "draw_curves", lambda *_: None)
        return run(data, tmp_path_factory.mktemp("finished"), "run", **SMALL).folder


def same(a, b):
    """Whether two checkpoints hold the same."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def test_mutated_bytes_of_a_checkpoint(finished, tmp_path, tally):
    """Refused, or what is read is what was written (padding and dates were hit)."""
    rng, path = random.Random(22), tmp_path / "last.pth.tar"
    whole = (finished / "last.pth.tar").read_bytes()
    expected = read_run(finished / "last.pth.tar")
    for number in range(300):
        content = bytearray(whole)
        kind = number % 4
        if kind == 0:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        elif kind == 1:
            start = rng.randrange(len(content))
            content[start : start + rng.randrange(1, 512)] = bytes(rng.randrange(1, 512))
        elif kind == 2:
            del content[rng.randrange(len(content)) :]
        else:  # headers and directory
            content[-rng.randrange(1, 20_000)] = rng.randrange(256)
        path.write_bytes(content)
        try:
            held = same(read_run(path), expected)
        except CheckpointError:
            held = True
        except Exception as error:
            tally.attempt(False, f"{number}: {error!r}")
            continue
        tally.attempt(held, number)


def paths_of(value, path=()):
    """Every entry of a checkpoint, one of each kind."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, item in list(items):
        yield (*path, key)
        yield from paths_of(item, (*path, key))


def changed(content, path, value):
    """A copy in which one entry is another, or is not there (`del`)."""
    if not path:
        return value
    copy = dict(content) if isinstance(content, dict) else list(content)
    if len(path) == 1 and value is del_:
        del copy[path[0]]
    else:
        copy[path[0]] = changed(content[path[0]], path[1:], value)
    return copy


del_ = object()
VALUES = (del_, None, -1, 2**70, float("nan"), "text", [], {}, torch.zeros(2), True)


@pytest.mark.filterwarnings("ignore")
def test_entries_of_a_checkpoint(data, finished, tmp_path, tally):
    """--resume auto trains on or says what is wrong in one line; nothing outside of the folder is deleted."""
    rng = random.Random(23)
    content = torch.load(finished / "last.pth.tar", weights_only=True)
    paths = [path for path in paths_of(content) if path[0] != "args"]
    by_kind = {}
    for path in paths:
        kind = path[:1] if path[0] == "state_dict" else tuple(key for key in path if isinstance(key, str))
        by_kind.setdefault(kind, []).append(path)
    cases = [(rng.choice(group), value) for group in by_kind.values() for value in VALUES]
    for number, (path, value) in enumerate(rng.sample(cases, min(len(cases), 120))):
        output = tmp_path / str(number)
        shutil.copytree(finished, output / "run")
        precious = output / "precious"
        precious.write_text("mine")
        (last := output / "run" / "last.pth.tar").unlink()
        torch.save(changed(content, path, value), last)
        shown = f"{'.'.join(map(str, path))} = {'deleted' if value is del_ else value!r}"
        try:
            run(data, output, "run", "--resume", "auto", **{**SMALL, "epochs": 3})
            held = precious.exists()
        except (ValueError, OSError) as error:
            held = "\n" not in str(error) and precious.exists()
        except Exception as error:
            held, shown = False, f"{shown}: {error!r}"
        tally.attempt(held, shown)
        shutil.rmtree(output)


class Killed(BaseException):
    pass


def test_kill_points_between_files(data, tmp_path, tally):
    """Killed before any of the file system's calls and resumed: all files and weights of a run that was not."""
    changes = {**SMALL, "val_interval": 1, "recovery_interval": 4, "checkpoint_hist": 1}
    whole = run(data, tmp_path, "whole", **changes)
    expected = sorted(path.name for path in whole.folder.iterdir())
    for number in range(1, 31):
        calls = []

        def dying(real, calls=calls, number=number):
            def call(*args, **kwargs):
                calls.append(args)
                if len(calls) >= number:
                    raise Killed
                return real(*args, **kwargs)

            return call

        name = f"killed-{number}"
        with pytest.MonkeyPatch.context() as patch:
            for function in ("replace", "link", "unlink", "remove"):
                patch.setattr(os, function, dying(getattr(os, function)))
            with suppress(Killed):
                run(data, tmp_path, name, **changes)
        again = run(data, tmp_path, name, "--resume", "auto", **changes)
        found = sorted(path.name for path in again.folder.iterdir())
        held = found == expected and same_weights(weights(again.folder), weights(whole.folder))
        tally.attempt(held and again.best_metric == whole.best_metric, f"{number}: {found}")


def test_kill_9_at_any_moment(data, tmp_path, tally):
    """A process that is killed after a random time and started again ends with the weights of one that was not."""
    rng = random.Random(9)
    changes = {**SMALL, "recovery_interval": 1}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    recipe = write_recipe(tmp_path / "recipe.yaml", **changes)
    for number in range(5):
        with command("-m", "timm_qkformer.cli", "train", *flags(data, tmp_path, f"k{number}", recipe)) as process:
            for line in process.stdout:
                if line.startswith("writing to"):
                    time.sleep(rng.random() * 1.5)
                    process.send_signal(signal.SIGKILL)
                    break
            process.stdout.read()
        again = run(data, tmp_path, f"k{number}", "--resume", "auto", **changes)
        whole = run(data, tmp_path, f"w{number}", **changes)
        tally.attempt(same_weights(weights(again.folder), weights(whole.folder)), number)
    torch.set_num_threads(threads)


def test_two_processes_in_one_folder(data, tmp_path, tally):
    """The same command twice: one trains, the other one is refused, and the files are those of one run."""
    recipe = write_recipe(tmp_path / "recipe.yaml", **{**SMALL, "recovery_interval": 1, "epochs": 8})
    whole = run(data, tmp_path, "whole", **{**SMALL, "recovery_interval": 1, "epochs": 8})
    for number in range(3):
        arguments = [
            "-m",
            "timm_qkformer.cli",
            "train",
            *flags(data, tmp_path, f"r{number}", recipe, "--resume", "auto"),
        ]
        pair = [command(*arguments) for _ in range(2)]
        said = [process.communicate()[0] for process in pair]
        codes = sorted(process.returncode for process in pair)
        refused = sum("is in use by another run" in text for text in said)
        # A machine may be so slow that one is done before the other begins, which then has nothing to do.
        one_after_the_other = codes == [0, 0] and sum("resumed from" in text for text in said) == 1
        held = (codes == [0, 2] and refused == 1) or one_after_the_other
        held = held and not any("Traceback" in text for text in said)
        tally.attempt(held and same_weights(weights(tmp_path / f"r{number}"), weights(whole.folder)), (codes, said))


def test_eight_threads_read_checkpoints(tmp_path, tally):
    """None is refused, whichever reader each thread uses."""
    path, layer = tmp_path / "c.pth", torch.nn.Linear(16, 16)
    torch.save({"state_dict": layer.state_dict(), "args": argparse.Namespace(lr=0.1)}, path)

    def read(number):
        try:
            if number % 2:
                load_weights(torch.nn.Linear(16, 16), str(path), "linear")
            else:
                read_content(path)
        except Exception as error:
            return repr(error)
        return ""

    with ThreadPoolExecutor(8) as threads:
        for number, error in enumerate(threads.map(read, range(400))):
            tally.attempt(not error, f"{number}: {error}")


def laughs(depth):
    """An alias of aliases of aliases: 9 ** depth values."""
    lists = (f"b{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, depth))
    return "\n".join(["a: &a0 [x, x]", *lists, f"lr: *a{depth - 1}"])


def test_recipes(tmp_path, tally):
    """Read, or refused in one line of at most a thousand characters, within 5 seconds of processor time."""
    rng, path = random.Random(25), tmp_path / "recipe.yaml"
    pieces = [
        *(
            "lr: ",
            "model_kwargs: ",
            "[",
            "]",
            "{",
            "}",
            "&a ",
            "*a",
            "*b",
            "!!python/object:os.system ",
            "\n",
            "  ",
            "- ",
        ),
        *("1e400", ".nan", "9" * 400, "2020-99-99", "'", '"', "? ", ": ", "<<: *a", "epochs: 3", "\t", "|", "\x00"),
        *("amp: true", "0x" + "f" * 99, "depths", ", ", "#", "%YAML 9.9", "---", "..."),
    ]
    bombs = [laughs(depth) for depth in (3, 8, 20)]
    bombs += ["lr: " + bracket * depth for bracket in "[{-" for depth in (50, 500, 5000)]
    for number in range(500):
        text = bombs[number] if number < len(bombs) else "".join(rng.choices(pieces, k=rng.randrange(1, 40)))
        path.write_text(text)
        start = time.process_time()
        try:
            read_recipe(str(path))
            held = True
        except ValueError as error:
            held = "\n" not in str(error) and len(str(error)) < 1000
        except Exception as error:
            held, text = False, f"{text!r}: {error!r}"
        tally.attempt(held and time.process_time() - start < 5, text[:200])
