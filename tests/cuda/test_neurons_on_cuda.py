"""Compiled neurons against the written-out recurrence on the same device: spikes to the bit, gradients to rounding."""

import pytest
import torch
from neuron_cases import assert_same, currents, differentiate, make, reference

from timm_qkformer.execution import execution_policy
from timm_qkformer.neurons import NeuronSpec, compiled, integrate_and_fire, run_neurons

CASES = [
    "lif-hard-decay-detached-sigmoid",
    "plif-hard-decay-detached-sigmoid",
    "if-shifted-whole-attached-atan",
    "ternary-soft-whole-attached-atan",
]
# Each takes some seconds to compile; the first is what a developer tries on another device.
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_compiled_neurons_equal_the_reference(case, dtype, device, monkeypatch):
    monkeypatch.setattr(compiled, "_kernels", {})
    neuron = make(case, torch.promote_types(dtype, torch.float32)).to(device)
    with execution_policy(neurons="compile"):
        for shape, start in (((3, 2, 70), False), ((3, 5, 4, 16), True)):
            x = currents(*shape, dtype=dtype).to(device)
            v = currents(*shape[1:], dtype=torch.promote_types(dtype, torch.float32), seed=5).to(device)
            found = differentiate(neuron.run, neuron, x, v if start else None)
            expected = differentiate(lambda x, v: reference(case, neuron, x, v), neuron, x, v if start else None)
            assert_same(found, expected, dtype)
    assert len(compiled._kernels) >= 2  # nothing fell back to eager mode


def test_potentials_within_a_rounding_error_of_the_threshold(device):
    threshold = 0.7
    leak = torch.tensor(1 / 3)
    v = torch.rand(20_000) * 0.6
    x = torch.stack([v / leak, v + (threshold - v) / leak, *currents(2, 20_000, dtype=torch.float32)]).to(device)
    spec = NeuronSpec(1 / 3, threshold)
    with execution_policy(neurons="compile"):
        spikes = integrate_and_fire(x, spec)
    with execution_policy(neurons="eager"):
        assert torch.equal(spikes, integrate_and_fire(x, spec))


@pytest.mark.parametrize("backend", ["eager", "compile"])
def test_steps_one_at_a_time_equal_one_call(backend, device):
    x = currents(4, 3, 32, dtype=torch.float32).to(device)
    spec = NeuronSpec(0.5)
    with execution_policy(neurons=backend):
        whole, last = run_neurons(x, spec)
        spikes, v = [], None
        for step in x.split(1):
            fired, v = run_neurons(step, spec, v)
            spikes.append(fired)
    assert torch.equal(torch.cat(spikes), whole)
    assert torch.equal(v, last)


def test_a_potential_on_another_device_is_refused(device):
    other = "meta" if device.type == "cpu" else "cpu"
    x = torch.ones(2, 3, 8, device=device)
    with pytest.raises(ValueError, match=rf"on {other} does not belong to input currents"):
        run_neurons(x, NeuronSpec(0.5), torch.zeros(3, 8, device=other))
