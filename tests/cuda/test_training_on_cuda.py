"""Packed training against plain modules, autocast, and the memory kept."""

import copy
from functools import partial

import pytest
import timm
import torch
from on_device import FLOAT64, Step, cosine

import tiny
from timm_qkformer.execution import counts, execution_policy, packing
from timm_qkformer.layers import SpikingConv, SpikingMlp, SpikingPatchEmbed
from timm_qkformer.neurons import IF, LIF, ParametricLIF, compiled

lively = partial(tiny.lively, bias=(0.5, 2.0))

UNITS = {
    "1x1": partial(SpikingConv, 6, 10),
    "1x1, stride": partial(SpikingConv, 6, 10, 1, 2),
    "3x3": partial(SpikingConv, 6, 10, 3),
    "3x3, pool": partial(SpikingConv, 6, 10, 3, pool=True),
    "depth-wise": partial(SpikingConv, 6, 6, 5, groups=6, bias=True),
    "integrate and fire": partial(SpikingConv, 6, 10, neuron_layer=IF),
    "parametric": partial(SpikingConv, 6, 10, neuron_layer=ParametricLIF),
    "soft reset": partial(SpikingConv, 6, 10, neuron_layer=partial(LIF, v_reset=None, surrogate="atan")),
    "MLP": partial(SpikingMlp, 6, 12),
    "embedding": partial(SpikingPatchEmbed, 6, 10, (True, False)),
}


def spikes(*shape, most=1):
    return torch.randint(0, most + 1, shape).double()


@pytest.mark.parametrize("most", [1, 4])
@pytest.mark.parametrize("unit", UNITS)
def test_units_train_packed_as_plain(unit, most, device):
    module = lively(UNITS[unit](input_range=counts(most))).to(device)
    x = spikes(4, 2, 6, 9, 7, most=most).to(device)
    plain, ours = (Step(module, x, packed=packed, neurons="eager") for packed in (False, True))
    assert torch.equal(ours.out, plain.out)
    assert 0.02 < ours.out.mean() < 4
    ours.assert_close_to(plain, **FLOAT64)


@pytest.mark.parametrize("name", tiny.NAMES)
def test_models_train_packed_as_plain(name, device):
    model = tiny.tiny(name, time_steps=2).to(device)
    x = tiny.images(2, model.in_chans).to(device)
    plain, ours = (Step(model, x, packed=packed, neurons="eager") for packed in (False, True))
    torch.testing.assert_close(ours.out, plain.out, rtol=1e-9, atol=1e-9)
    # Through batch norms of little variance sums in another order differ by this much.
    ours.assert_close_to(plain, rtol=1e-6, atol=1e-7)


def test_compiled_training_is_eager_training(device):
    model = tiny.tiny("test_qkformer", time_steps=2).to(device)
    x = tiny.images(2).to(device)
    compiled, eager = (Step(model, x, neurons=neurons) for neurons in ("compile", "eager"))
    torch.testing.assert_close(compiled.out, eager.out, rtol=1e-9, atol=1e-9)
    compiled.assert_close_to(eager, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_close_to_float32(dtype, packed, device):
    module = lively(SpikingConv(6, 10, 3, input_range=counts(1))).float().to(device)
    x = spikes(4, 2, 6, 8, 8).float().to(device)
    full, half = Step(module, x, packed=packed), Step(module, x, autocast=dtype, packed=packed)
    assert half.out.dtype == dtype
    assert (half.out != full.out).float().mean() < 0.03
    for name, grad in full.grads.items():
        assert half.grads[name].isfinite().all()
        assert cosine(half.grads[name], grad) > 0.97 or name == "conv.bias", name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["test_qkformer", "test_qkformer_ms", "test_maxformer", "test_sdt"])
def test_models_train_under_autocast(name, dtype, device):
    model = tiny.tiny(name, time_steps=2).float().to(device)
    step = Step(model, tiny.images(2).float().to(device), autocast=dtype)
    assert step.out.isfinite().all()
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in step.grads.values())


def test_gradient_checkpointing_changes_nothing(device):
    model = tiny.tiny("test_qkformer", time_steps=2, drop_path_rate=0.2).to(device)
    x = tiny.images(2).to(device)
    steps = []
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)
        torch.manual_seed(0)
        steps.append(Step(model, x, neurons="eager"))
    torch.testing.assert_close(steps[1].out, steps[0].out)
    steps[1].assert_close_to(steps[0], rtol=1e-6, atol=1e-7)


def kept_for_backward(model, x):
    """Bytes that a forward pass keeps for its backward pass, parameters aside."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def quarter_of_hst4():
    return timm.create_model("qkformer_hst4_384", embed_dims=(24, 48, 96), num_classes=10).train()


def test_as_much_is_kept_as_on_a_cpu(device):
    model, x = quarter_of_hst4(), torch.randn(2, 3, 32, 32)
    with execution_policy(neurons="eager", kernels="never"):
        on_cpu = kept_for_backward(model, x)
        assert kept_for_backward(copy.deepcopy(model).to(device), x.to(device)) == on_cpu
        with execution_policy(packed=False):
            assert on_cpu < 0.4 * kept_for_backward(copy.deepcopy(model).to(device), x.to(device))


def test_the_peak_is_below_that_of_plain_modules(cuda):
    peaks = {}
    for packed in (True, False, True, False):  # the first round makes libraries' workspaces
        model, x = quarter_of_hst4().to(cuda), torch.randn(64, 3, 32, 32, device=cuda)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with execution_policy(packed=packed, neurons="eager"):
            model(x).sum().backward()
        torch.cuda.synchronize()
        peaks[packed] = torch.cuda.max_memory_allocated() - before
    assert peaks[True] < 0.6 * peaks[False], peaks


def test_spikes_come_packed_from_the_kernel_that_fires(device, monkeypatch):
    monkeypatch.setattr(compiled, "_PACKING_DEVICES", {device.type})  # on a CPU it could, too
    asked, own = [], packing.pack
    monkeypatch.setattr(packing, "pack", lambda x, numbers: asked.append(x.shape) or own(x, numbers))
    units = SpikingConv(6, 10, 3, input_range=counts(1)), SpikingConv(10, 4, input_range=counts(1))
    layer = lively(torch.nn.Sequential(*units)).to(device)
    x = spikes(4, 2, 6, 8, 8).to(device)
    ours, plain = (Step(layer, x, packed=packed, neurons="compile") for packed in (True, False))
    assert asked == [(8, 6, 8, 8)], "the input alone"
    ours.assert_close_to(plain, **FLOAT64)
