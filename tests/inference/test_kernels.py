"""Every kernel against its readable version in torch operations: sizes, types, neurons, memory layouts."""

import sys

import pytest
import torch
from torch import nn

from timm_qkformer.execution import execution_policy, native
from timm_qkformer.inference import kernels
from timm_qkformer.inference.blocks import DeployedOperator
from timm_qkformer.neurons import IF, LIF, NeuronSpec
from timm_qkformer.operators import get_operator, operator_names

SPEC = NeuronSpec(0.5, 1.0, False, True)
NEURONS = {
    "lif": SPEC,
    "lif, tau 3, soft reset": NeuronSpec(1 / 3, 0.7, True, True),
    "lif, input undamped": NeuronSpec(0.25, 1.0, False, False),
    "if, soft reset": NeuronSpec(0.0, 1.0, True, False),
    "ternary": SPEC._replace(levels="ternary"),
    "ternary, soft reset": NeuronSpec(0.25, 0.6, True, False, "ternary"),
}
TYPES = list(kernels._TYPES)
STEPS = [1, 4, 19]
OPERATORS = [name for name in operator_names() if get_operator(name)(16).kernel is not None]


@pytest.fixture(autouse=True)
def _compiler():
    if kernels._own("fire", torch.zeros(1, 1), SPEC, torch.float32) is None:
        pytest.skip("no C++ compiler here")


def currents(*shape, dtype=torch.float32):
    """Around the threshold, with some exactly on it."""
    return (torch.randn(shape) * 8).round().div(4).to(dtype) + torch.randint(0, 2, shape).mul(0.1).to(dtype)


def both(op, x, *args):
    """What the kernel gives, checked against torch operations."""
    found = op(x, *args)
    with execution_policy(kernels="never", neurons="eager"):
        expected = op(x, *args)
    assert found.dtype == expected.dtype == args[-1]
    assert torch.equal(found, expected)
    if found.numel() > 500:  # some fire and some do not
        assert 0 < found.to(torch.float64).abs().mean() < 1
    return found


def bytes_hold(neuron, dtype):
    return neuron.levels == "binary" or dtype != torch.uint8


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("neuron", NEURONS.values(), ids=NEURONS)
@pytest.mark.parametrize("types", TYPES, ids=str)
def test_fire(types, neuron, steps):
    if bytes_hold(neuron, types[1]):
        x = currents(steps, 3, 7, 53, dtype=types[0])
        both(kernels.fire, x, neuron, types[1])
        both(kernels.fire, x[:, :1, :1, :1].expand(-1, 2, 1, 1).contiguous(), neuron, types[1])


@pytest.mark.parametrize("neuron", NEURONS.values(), ids=NEURONS)
def test_steps_one_at_a_time_continue_from_the_potential(neuron):
    x = currents(5, 2, 30, 9)
    whole, final = kernels.run(x, neuron)
    assert torch.equal(whole, kernels.fire(x, neuron, torch.float32))
    v, steps = None, []
    for step in x.split(1):
        spikes, v = kernels.run(step, neuron, v)
        steps.append(spikes)
    assert torch.equal(torch.cat(steps), whole)
    assert torch.equal(v, final)
    with execution_policy(kernels="never", neurons="eager"):
        torch.testing.assert_close(kernels.run(x, neuron), (whole, final), rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("types", TYPES, ids=str)
def test_fire_adds_to_sums_in_place(types):
    x = currents(4, 2, 30, 9, dtype=types[0])
    sums = torch.randint(0, 120, (4, 3, 30, 9)).to(types[1])
    expected = sums.clone()
    expected[:, 1:] += kernels.fire(x, SPEC, types[1])
    view = sums[:, 1:]  # steps that do not follow each other
    assert kernels.fire(x, SPEC, types[1], sums=view, out=view) is view
    assert torch.equal(sums, expected)


def test_fire_takes_one_current_for_all_steps():
    x = currents(1, 2, 30, 9)
    repeated = x.expand(5, -1, -1, -1)
    found = both(kernels.fire, repeated, SPEC, torch.uint8)
    assert torch.equal(found, kernels.fire(repeated.contiguous(), SPEC, torch.uint8))


def test_fire_takes_any_memory_layout():
    x = currents(2, 9, 4, 30).permute(2, 0, 3, 1)
    assert not x[0].is_contiguous()
    assert torch.equal(kernels.fire(x, SPEC, torch.uint8), kernels.fire(x.contiguous(), SPEC, torch.uint8))


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 8), (7, 5), (8, 6)], ids=str)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("types", TYPES, ids=str)
def test_pool_fire(types, steps, size):
    x = currents(steps, 2, *size, 37, dtype=types[0]) + 0.25
    for neuron in (SPEC, NEURONS["ternary"]):
        if bytes_hold(neuron, types[1]):
            both(kernels.pool_fire, x, neuron, types[1])
            both(kernels.pool_fire, x[:1].expand(4, *[-1] * 4), neuron, types[1])


def test_pool_fire_of_many_channels():
    both(kernels.pool_fire, currents(4, 1, 5, 4, 600), SPEC, torch.uint8)


class Fused(nn.Module):
    """In place of a fused projection: gives the input currents that it is given."""

    def currents(self, x):
        return x


def deployed(name, dim, heads, *neurons):
    """A deployed operator with these neurons that takes fused input currents [T, B, N, inputs * C]."""
    operator = get_operator(name)(dim, num_heads=heads)
    for part, neuron in zip((*operator.inputs, *operator.inner_neurons), neurons, strict=False):
        if part in operator.inputs:
            getattr(operator, part).neuron = neuron
        else:
            setattr(operator, part, neuron)
    result = DeployedOperator(operator, name, torch.float32)
    result.inputs = Fused()
    return result


@pytest.mark.parametrize("tokens", [1, 35])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("types", TYPES, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_operators(name, types, steps, tokens):
    count = len(get_operator(name)(16).inputs)
    neurons = [LIF(), LIF(3.0, v_threshold=0.7, v_reset=None), IF(v_reset=None)][:count]
    operator = deployed(name, 42, 3, *neurons, LIF(v_threshold=0.1 if tokens * steps < 100 else 3.0))
    x = currents(steps, 2, tokens, count * 42, dtype=types[0]) + 0.5
    size = (1, tokens)
    found = both(lambda x, spikes: operator(x, spikes, size), x, types[1])
    assert torch.equal(operator(x[:, 1:], types[1], size), found[:, 1:])  # no sample sees another
    assert operator(x[:, :0], types[1], size).shape == (steps, 0, tokens, 42)


def test_self_attention_counts_beyond_16_bits():
    """Every neuron fires: sums reach tokens * channels, far beyond what half precision or 16 bits hold."""
    tokens, channels = 1100, 64
    x = torch.full((1, 1, tokens, 3 * channels), 4.0)
    most = 0.5 * tokens * channels * 0.125
    for threshold, fires in ((most, 1), (most + 1, 0)):
        layers = [LIF(), LIF(), LIF(), LIF(v_threshold=threshold)]
        out = deployed("ssa", channels, 1, *layers)(x, torch.uint8, (1, tokens))
        assert torch.equal(out, torch.full_like(out, fires))


def test_nothing_to_compute():
    x = torch.zeros(4, 0, 5, 12)
    assert kernels.fire(x, SPEC, torch.uint8).shape == x.shape
    assert kernels.pool_fire(torch.zeros(4, 0, 6, 5, 3), SPEC, torch.uint8).shape == (4, 0, 3, 3, 3)


@pytest.mark.parametrize("neurons", ["eager", "spikingjelly"])
def test_the_policy_of_neurons_leaves_kernels_alone(neurons):
    x = torch.zeros(1, 1)
    with execution_policy(neurons=neurons):
        assert kernels._own("fire", x, SPEC, x.dtype) is not None
    with execution_policy(kernels="never"):
        assert kernels._own("fire", x, SPEC, x.dtype) is None


def test_a_wrong_setting_is_an_error_and_no_missing_library(monkeypatch):
    monkeypatch.setattr(native, "_libraries", {})
    monkeypatch.setenv(native.prebuilt.ENVIRONMENT_VARIABLE, "quick")
    if sys.platform == "linux":
        with pytest.raises(ValueError, match="TIMM_QKFORMER_PREBUILT='quick'"):
            kernels.fire(currents(4, 3, 50), SPEC, torch.uint8)


def test_without_a_compiler_torch_operations_run_after_one_warning(monkeypatch, recwarn):
    def fail(*args, **kwargs):
        raise OSError("no such compiler")

    x = currents(4, 3, 50)
    expected = kernels.fire(x, SPEC, torch.uint8)
    monkeypatch.setattr(native.compiler, "load", fail)
    monkeypatch.setattr(native, "_libraries", {})
    monkeypatch.setattr(native, "_warned", False)
    for _ in range(2):
        assert torch.equal(kernels.fire(x, SPEC, torch.uint8), expected)
    kernels.pool_fire(currents(1, 1, 2, 2, 3).double(), SPEC, torch.float64)  # another library
    (said,) = [str(w.message) for w in recwarn if "no such compiler" in str(w.message)]
    assert said.startswith(
        "the kernels of kernels.cpp did not come with this installation and do not compile on this machine: deployed "
        "models and training on CPUs do without, which changes no result but takes up to three times as long: OSError: "
        "no such compiler. "
    )
    assert "apt install g++" in said
