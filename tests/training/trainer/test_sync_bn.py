"""Batch norm over two processes against one batch norm with both halves, forward and backward, in float64."""

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from timm_qkformer.training.trainer.sync_bn import CPUSyncBatchNorm, synchronize_batch_norm

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
