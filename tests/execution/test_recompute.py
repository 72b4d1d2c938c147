"""Gradient checkpointing computes twice and counts once."""

import copy
import threading

import pytest
import torch
from timm.layers import set_reentrant_ckpt, use_reentrant_ckpt
from torch import nn

import tiny
from timm_qkformer.execution import checkpoint_once, counts, current_policy, execution_policy
from timm_qkformer.layers import SpikingMlp

NAMES = ["test_qkformer", "test_qkformer_ms", "test_maxformer"]


@pytest.fixture(params=[False, True], ids=["", "reentrant"])
def reentrant(request):
    before = use_reentrant_ckpt()
    set_reentrant_ckpt(request.param)
    yield request.param
    set_reentrant_ckpt(before)


def train(model, enable, steps=3):
    """Outputs, gradients, and the buffers' state after a few training steps on a copy."""
    model = copy.deepcopy(model).train()
    next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).momentum = None  # cumulative average
    model.set_grad_checkpointing(enable)
    torch.manual_seed(1)
    for _ in range(steps):
        out = model(torch.randn(4, 3, 32, 32, dtype=torch.float64))
        out.square().sum().backward()
    assert {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {None, 0.1}
    return out.detach(), [p.grad for p in model.parameters()], dict(model.named_buffers())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("neuron", ["lif", "plif"])
def test_as_without_checkpointing(name, neuron, packed, reentrant):
    drops = {} if neuron == "plif" else {"drop_path_rate": 0.3, "proj_drop_rate": 0.2, "drop_rate": 0.2}
    model = tiny.tiny(name, neuron=neuron, **drops)
    with execution_policy(packed=packed):
        plain, ours = (train(model, enable) for enable in (False, True))
    torch.testing.assert_close(ours[0], plain[0], rtol=1e-12, atol=1e-12)
    for own, wanted in zip(ours[1], plain[1], strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-10, atol=1e-12)
    assert ours[2].keys() == plain[2].keys()
    for key, wanted in plain[2].items():
        torch.testing.assert_close(ours[2][key], wanted, rtol=1e-12, atol=1e-12)
        if key.endswith("num_batches_tracked"):
            assert ours[2][key] == 3


def test_the_plain_way_would_count_twice():
    """What this is for: if torch did it by itself, `recompute` could go."""
    layer = SpikingMlp(4, 8).train()
    x = torch.rand(2, 2, 4, 3, 3, requires_grad=True)
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert layer.fc1.bn.num_batches_tracked == 2
    checkpoint_once(layer, x).sum().backward()
    assert layer.fc1.bn.num_batches_tracked == 3


def test_frozen_batch_norms_stay_frozen():
    layer = SpikingMlp(4, 8).train()
    layer.fc1.bn.eval()
    layer.fc2.bn = nn.BatchNorm2d(4, track_running_stats=False)
    x = torch.rand(2, 2, 4, 3, 3, requires_grad=True)
    checkpoint_once(layer, x).sum().backward()
    assert layer.fc1.bn.num_batches_tracked == 0
    assert torch.equal(layer.fc1.bn.running_mean, torch.zeros(8))
    assert layer.fc2.bn.num_batches_tracked is None


def test_an_error_in_the_second_pass_leaves_the_batch_norms_as_they_were():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = SpikingMlp(4, 8)
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            if self.calls == 2:
                raise ZeroDivisionError
            return self.layer(x)

    layer = Fails().train()
    out = checkpoint_once(layer, torch.rand(2, 2, 4, 3, 3, requires_grad=True))
    with pytest.raises(ZeroDivisionError):
        out.sum().backward()
    assert layer.layer.fc1.bn.num_batches_tracked == 1
    assert layer.layer.fc1.bn.momentum == 0.1


def test_threads_that_train_and_save_a_model_do_not_see_the_second_pass():
    layer = SpikingMlp(4, 8).train()
    names, incomplete, done = set(layer.state_dict()), [], threading.Event()

    def save():
        while not done.is_set():
            incomplete.extend(names - set(layer.state_dict()))

    def train_on():
        for _ in range(20):
            checkpoint_once(layer, torch.rand(2, 2, 4, 3, 3, requires_grad=True)).sum().backward()

    saving, *training = (threading.Thread(target=target) for target in (save, train_on, train_on, train_on))
    for thread in (saving, *training):
        thread.start()
    for thread in training:
        thread.join()
    done.set()
    saving.join()
    assert not incomplete
    for bn in (layer.fc1.bn, layer.fc2.bn):
        assert bn.momentum == 0.1
        assert 20 <= bn.num_batches_tracked <= 60  # threads that add one at once may lose one


@pytest.mark.parametrize("neurons", ["eager", "spikingjelly"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_second_pass_runs_as_the_first_did(packed, neurons):
    """Whatever is set when and in which thread the backward pass runs."""
    layer = tiny.lively(SpikingMlp(4, 8, input_range=counts(2))).train()
    x = torch.randint(0, 3, (2, 2, 4, 3, 3)).double().requires_grad_()
    seen = []
    layer.fc1.register_forward_pre_hook(lambda *_: seen.append(current_policy()))
    with execution_policy(packed=packed, neurons=neurons, kernels="never") as policy:
        out = checkpoint_once(layer, x)
    thread = threading.Thread(target=lambda: out.sum().backward())
    thread.start()
    thread.join()
    checkpointed = [p.grad.clone() for p in layer.parameters()]
    with policy:
        assert seen == [current_policy()] * 2
    layer.zero_grad()
    layer(x).sum().backward()
    for own, wanted in zip(checkpointed, layer.parameters(), strict=True):
        torch.testing.assert_close(own, wanted.grad)


def test_memory():
    model = tiny.tiny("test_qkformer").train()
    sizes = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        kept = {}

        def pack(x, kept=kept):
            if not isinstance(x, nn.Parameter):
                kept[x.untyped_storage().data_ptr()] = (x.untyped_storage().nbytes(), x)
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(tiny.images(2))
        sizes.append(sum(size for size, _ in kept.values()))
    assert sizes[1] < 0.6 * sizes[0]


def test_kept_tensors_may_be_elsewhere_until_they_are_needed():
    """`save_on_cpu` and its like give back other tensors than were kept, parameters included."""
    model, x = tiny.tiny("test_qkformer", neuron="plif").train(), tiny.images(2)
    grads = []
    for hooks in (lambda x: x, lambda x: x.detach().clone()):
        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(hooks, lambda x: x):
            out = model(x)
        out.square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for own, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-10, atol=1e-12)
