"""Two processes are one with twice the batch."""

import os
import signal
import socket

import pytest
import torch
from tiny_runs import PLAIN, command, flags, run, same_weights, weights, write_recipe

from timm_qkformer.data import SharedRandomSampler

# Mixing is left out, as it pairs the samples of one process.
SAME = {**PLAIN, "opt": "sgd", "lr": 0.1, "epochs": 2, "smoothing": 0.1}


def start(*arguments):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    return command(*launcher, "-m", "timm_qkformer.cli", *arguments, start_new_session=True)


def torchrun(*arguments):
    with start(*arguments) as process:
        out = process.stdout.read()
    return process.returncode, out


def test_two_processes_are_one_with_twice_the_batch(data, tmp_path):
    recipe = write_recipe(tmp_path / "two.yaml", **SAME, batch_size=4, sync_bn=True, recovery_interval=1)
    code, out = torchrun("train", *flags(data, tmp_path, "two", recipe))
    assert code == 0, out
    assert out.count("writing to") == 1
    one = run(data, tmp_path, "one", **SAME, batch_size=8)
    a, b = weights(tmp_path / "two"), weights(one.folder)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    # The statistics moved, and the weights did.
    fresh = run(data, tmp_path, "fresh", **{**SAME, "lr": 1e-12}, batch_size=8)
    moved = [name for name, w in weights(fresh.folder).items() if not torch.allclose(w, b[name], rtol=1e-2, atol=1e-3)]
    assert len(moved) > len(a) / 3
    content = torch.load(tmp_path / "two" / "last.pth.tar", weights_only=True)
    assert len(content["trainer"]["processes"]) == 2


def test_two_processes_killed_go_on_exactly(data, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml", batch_size=2, recovery_interval=1, epochs=1)
    with start("train", *flags(data, tmp_path, "killed", recipe)) as process:
        for line in process.stdout:
            if line.startswith("epoch 0 [3/6]"):
                os.killpg(process.pid, signal.SIGKILL)
                break
        process.stdout.read()
    code, out = torchrun("train", *flags(data, tmp_path, "killed", recipe, "--resume", "auto"))
    assert code == 0, out
    assert "resumed from" in out
    assert "not an exact continuation" not in out
    code, out = torchrun("train", *flags(data, tmp_path, "whole", recipe))
    assert code == 0, out
    assert same_weights(weights(tmp_path / "killed"), weights(tmp_path / "whole"))
    # The two saw losses of their own; the epoch's is the mean of both.
    losses = [torch.load(tmp_path / name / "last.pth.tar", weights_only=True)["trainer"]["history"][0]["train_loss"]
              for name in ("killed", "whole")]  # fmt: skip
    assert losses[0] == losses[1]


@pytest.mark.parametrize(("size", "world_size", "batch"), [(24, 2, 4), (23, 2, 4), (31, 3, 2), (9, 4, 1)])
def test_batches_together_are_the_larger_batch(size, world_size, batch):
    def batches(rank, processes, each):
        order = list(SharedRandomSampler(size, lambda: 7, rank, processes))
        assert len(order) == size // processes
        return [order[i : i + each] for i in range(0, len(order) - each + 1, each)]

    together = list(zip(*(batches(rank, world_size, batch) for rank in range(world_size)), strict=True))
    whole = batches(0, 1, batch * world_size)
    assert [{i for part in parts for i in part} for parts in together] == [set(b) for b in whole]
    assert all(sum(map(len, parts)) == batch * world_size for parts in together)


def test_the_order_is_that_of_torch():
    torch.manual_seed(5)
    expected = list(torch.utils.data.RandomSampler(range(50)))
    torch.manual_seed(5)
    seed = int(torch.empty((), dtype=torch.int64).random_())
    assert list(SharedRandomSampler(50, lambda: seed)) == expected
