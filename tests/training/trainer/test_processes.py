"""Two processes are one with twice the batch, batch norms included."""

import os
import signal
import socket

import pytest
import torch
import torch.multiprocessing as mp
from tiny_runs import PLAIN, command, flags, run, same_weights, weights, write_recipe
from torch import nn

from timm_qkformer.data import SharedRandomSampler
from timm_qkformer.training.trainer.distributed import CPUSyncBatchNorm, synchronize_batch_norm

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


@pytest.mark.slow
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


@pytest.mark.slow
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


SHAPES = {"even": (3, 3), "uneven": (4, 2)}


def net():
    torch.manual_seed(1)
    layers = [nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3, momentum=None)]
    return nn.Sequential(*layers).double()


def batch():
    torch.manual_seed(2)
    return torch.randn(6, 2, 4, 5, dtype=torch.float64), torch.randn(6, 3, 4, 5, dtype=torch.float64)


def results(model, x, weight, reduce):
    """What two steps leave: outputs, gradients, statistics."""
    x = x.clone().requires_grad_()
    for _ in range(2):
        y = model(x)
        (y * weight).sum().backward()
    gradients = [p.grad for p in model.parameters()]
    for gradient in gradients:
        reduce(gradient)
    return [y, model.eval()(x), x.grad], [*gradients, *model.buffers()]


def half(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for name, sizes in SHAPES.items():
        model = synchronize_batch_norm(net(), torch.device("cpu")).train()
        x, weight = (t.split(sizes)[rank] for t in batch())
        torch.save(results(model, x, weight, torch.distributed.all_reduce), folder / f"{name}{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_halves_are_the_whole(tmp_path):
    mp.spawn(half, args=(tmp_path,), nprocs=2)
    by_sample, common = results(net().train(), *batch(), lambda _: None)
    for name in SHAPES:
        halves = [torch.load(tmp_path / f"{name}{rank}.pt") for rank in range(2)]
        for first, second, expected in zip(halves[0][0], halves[1][0], by_sample, strict=True):
            torch.testing.assert_close(torch.cat([first, second]), expected, rtol=1e-10, atol=1e-12)
        for got in (halves[0][1], halves[1][1]):
            for tensor, expected in zip(got, common, strict=True):
                torch.testing.assert_close(tensor, expected, rtol=1e-10, atol=1e-12)


def test_conversion_keeps_the_tensors():
    model = net()
    before = dict(model.state_dict(keep_vars=True))
    converted = synchronize_batch_norm(model, torch.device("cpu"))
    after = dict(converted.state_dict(keep_vars=True))
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    assert sum(isinstance(m, CPUSyncBatchNorm) for m in converted.modules()) == 2


def test_alone_it_is_batch_norm():
    x, _ = batch()
    converted = synchronize_batch_norm(net(), torch.device("cpu")).train()
    plain = net().train()
    assert torch.equal(converted(x), plain(x))
    assert all(torch.equal(a, b) for a, b in zip(converted.buffers(), plain.buffers(), strict=True))


def test_activations_inside_are_refused():
    from timm.layers import BatchNormAct2d

    with pytest.raises(ValueError, match="BatchNormAct2d cannot be synchronized on the CPU"):
        synchronize_batch_norm(nn.Sequential(BatchNormAct2d(3)), torch.device("cpu"))
