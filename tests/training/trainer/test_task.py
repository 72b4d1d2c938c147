"""Models that declare a training loss of their own are trained with it, alone and distributed."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from tiny_runs import PLAIN, run

from timm_qkformer.models import SpiLiFormer
from timm_qkformer.training.trainer.task import ModelTask


def task(model):
    return ModelTask(model, criterion=torch.nn.CrossEntropyLoss(), verbose=False)


def gradients(model):
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_spiliformer_minimises_both_passes(one_process):
    torch.manual_seed(0)
    model = timm.create_model("test_spiliformer", num_classes=3, time_steps=2)
    x, target = torch.randn(2, 3, 32, 32), torch.tensor([0, 2])
    for name, value in model.named_parameters():
        if name.endswith("bn.bias"):
            torch.nn.init.uniform_(value, 0.2, 1.2)
    state = copy.deepcopy(model.state_dict())
    expected = model.training_loss(x, target, F.cross_entropy)
    first, second = (F.cross_entropy(logits, target) for logits in model.forward_passes(x))
    assert not torch.allclose(first, second)
    expected.backward()
    wanted = gradients(model)
    assert sum(grad is not None for grad in wanted) == len(wanted)
    distributed = task(model)
    for one in (task(model), distributed):
        model.load_state_dict(state)
        model.zero_grad()
        if one is distributed:
            one.prepare_distributed()
        loss = one(x, target)["loss"]
        loss.backward()
        assert torch.equal(loss, expected)
        assert all(torch.allclose(a, b) for a, b in zip(gradients(model), wanted, strict=True))
    assert "forward" not in model.__dict__


class Own(torch.nn.Linear):
    def training_loss(self, x, target, criterion):
        return 2 * criterion(self(x), target)


def test_any_model_may_declare_a_loss_that_runs_it():
    model, x, target = Own(3, 2), torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    assert torch.equal(task(model)(x, target)["loss"], 2 * F.cross_entropy(model(x), target))
    plain = torch.nn.Linear(3, 2)
    assert task(plain)(x, target)["output"].shape == (4, 2)
    with pytest.raises(RuntimeError):
        task(model)(torch.randn(4, 5), target)
    assert model(x).shape == (4, 2)  # as it was


def test_a_run_minimises_it(data, tmp_path, monkeypatch):
    seen = []
    usual = SpiLiFormer.training_loss
    monkeypatch.setattr(SpiLiFormer, "training_loss", lambda *args: seen.append(args[1].shape) or usual(*args))
    changes = {**PLAIN, "model": "test_spiliformer", "model_kwargs": {"time_steps": 1}, "epochs": 1}
    result = run(data, tmp_path, **changes)
    assert result.folder.is_dir()
    assert len(seen) == 6  # batches of an epoch; validation asks for the answer
    with pytest.raises(ValueError, match="torchcompile: SpiLiFormer declares a training loss of its own"):
        run(data, tmp_path, "compiled", torchcompile="eager", **changes)
