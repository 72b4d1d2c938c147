"""Every kernel against its readable version in torch operations: sizes, types, neurons, memory layouts."""

import pytest
import torch

from timm_qkformer.inference import native, ops, reference
from timm_qkformer.inference.neurons import NeuronSpec
from timm_qkformer.layers import native as layers_native
from timm_qkformer.layers import set_lif_backend

LIF = NeuronSpec(0.5, 1.0, False, True)
NEURONS = {
    "lif": LIF,
    "lif, tau 3, soft reset": NeuronSpec(1 / 3, 0.7, True, True),
    "lif, input undamped": NeuronSpec(0.25, 1.0, False, False),
    "if, soft reset": NeuronSpec(0.0, 1.0, True, False),
}
TYPES = list(native._TYPES)
STEPS = [1, 4, 19]
HALF = NeuronSpec(0.5, 0.5, False, True)


@pytest.fixture(autouse=True)
def _compiler():
    x = torch.zeros(1, 1)
    if native.kernel("fire", x, x) is None:
        pytest.skip("no C++ compiler here")


def currents(*shape, dtype=torch.float32):
    """Around the threshold, with some exactly on it."""
    return (torch.randn(shape) * 8).round().div(4).to(dtype) + torch.randint(0, 2, shape).mul(0.1).to(dtype)


def both(op, x, *args):
    """What the kernel gives, checked against torch operations."""
    probe = torch.empty(0, dtype=args[-1])
    assert native.kernel("fire", x.new_zeros(1), probe) is not None
    found = op(x, *args)
    with set_lif_backend("eager"):
        expected = op(x, *args)
    assert found.dtype == expected.dtype == args[-1]
    assert torch.equal(found, expected)
    if found.numel() > 500:  # some fire and some do not
        assert 0 < found.to(torch.float64).mean() < 1
    return found


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("neuron", NEURONS.values(), ids=NEURONS)
@pytest.mark.parametrize("types", TYPES, ids=str)
def test_fire(types, neuron, steps):
    x = currents(steps, 3, 7, 53, dtype=types[0])
    both(ops.fire, x, neuron, types[1])
    both(ops.fire, x[:, :1, :1, :1].expand(-1, 2, 1, 1).contiguous(), neuron, types[1])


def test_fire_agrees_with_the_neurons_of_the_layers():
    x = currents(4, 5, 300)
    for neuron in NEURONS.values():
        assert torch.equal(ops.fire(x, neuron, torch.float32), neuron.fire(x))


@pytest.mark.parametrize("types", TYPES, ids=str)
def test_fire_adds_to_sums_in_place(types):
    x = currents(4, 2, 30, 9, dtype=types[0])
    sums = torch.randint(0, 120, (4, 3, 30, 9)).to(types[1])
    expected = sums.clone()
    expected[:, 1:] += ops.fire(x, LIF, types[1])
    view = sums[:, 1:]  # steps that do not follow each other
    assert ops.fire(x, LIF, types[1], sums=view, out=view) is view
    assert torch.equal(sums, expected)


def test_fire_takes_one_current_for_all_steps():
    x = currents(1, 2, 30, 9)
    repeated = x.expand(5, -1, -1, -1)
    assert torch.equal(both(ops.fire, repeated, LIF, torch.uint8), ops.fire(repeated.contiguous(), LIF, torch.uint8))


def test_fire_takes_any_memory_layout():
    x = currents(2, 9, 4, 30).permute(2, 0, 3, 1)
    assert not x[0].is_contiguous()
    assert torch.equal(ops.fire(x, LIF, torch.uint8), ops.fire(x.contiguous(), LIF, torch.uint8))


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 8), (7, 5), (8, 6)], ids=str)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("types", TYPES, ids=str)
def test_pool_fire(types, steps, size):
    x = currents(steps, 2, *size, 37, dtype=types[0]) + 0.25
    both(ops.pool_fire, x, LIF, types[1])
    both(ops.pool_fire, x[:1].expand(4, *[-1] * 4), LIF, types[1])


def test_pool_fire_of_many_channels():
    both(ops.pool_fire, currents(4, 1, 5, 4, 600), LIF, torch.uint8)


def test_pools_as_torch_does():
    x = currents(1, 1, 6, 7, 3)
    pooled = reference.max_pool(x)[0].permute(0, 3, 1, 2)
    assert torch.equal(pooled, torch.nn.functional.max_pool2d(x[0].permute(0, 3, 1, 2), 3, 2, 1))


@pytest.mark.parametrize("tokens", [1, 35])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("types", TYPES, ids=str)
@pytest.mark.parametrize("op", [ops.token_attention, ops.channel_attention])
def test_query_key_attention(op, types, steps, tokens):
    neurons = [LIF, NEURONS["lif, tau 3, soft reset"], HALF._replace(threshold=0.4 if tokens == 1 else 3.0)]
    x = currents(steps, 2, tokens, 2 * 42, dtype=types[0]) + 0.5
    both(op, x, 3, neurons, types[1])


@pytest.mark.parametrize("tokens", [1, 35])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("types", TYPES, ids=str)
def test_self_attention(types, steps, tokens):
    neurons = [LIF, NEURONS["lif, tau 3, soft reset"], NEURONS["if, soft reset"], HALF]
    x = currents(steps, 2, tokens, 3 * 42, dtype=types[0]) + 0.5
    both(ops.self_attention, x, 3, 1.0 if tokens == 1 else 0.125, neurons, types[1])


def test_self_attention_counts_beyond_16_bits():
    """Every neuron fires: sums reach tokens * channels, far beyond what half precision or 16 bits hold."""
    tokens, channels = 1100, 64
    x = torch.full((1, 1, tokens, 3 * channels), 4.0)
    reached = NeuronSpec(0.5, tokens * channels * 0.5, False, True)
    missed = reached._replace(threshold=tokens * channels * 0.5 + 1)
    for last, fires in ((reached, 1), (missed, 0)):
        out = ops.self_attention(x, 1, 1.0, [LIF, LIF, LIF, last], torch.uint8)
        assert torch.equal(out, torch.full_like(out, fires))


def test_self_attention_does_not_see_other_samples_or_heads():
    x = currents(4, 3, 10, 3 * 8)
    neurons = [LIF, LIF, LIF, HALF]
    together = ops.self_attention(x, 2, 0.125, neurons, torch.float32)
    assert torch.equal(ops.self_attention(x[:, 1:2], 2, 0.125, neurons, torch.float32), together[:, 1:2])


def test_nothing_to_compute():
    x = torch.zeros(4, 0, 5, 12)
    assert ops.fire(x, LIF, torch.uint8).shape == x.shape
    assert ops.token_attention(x, 2, [LIF] * 3, torch.uint8).shape == (4, 0, 5, 6)
    assert ops.channel_attention(x, 2, [LIF] * 3, torch.uint8).shape == (4, 0, 5, 6)
    assert ops.self_attention(x, 2, 0.125, [LIF] * 4, torch.uint8).shape == (4, 0, 5, 4)
    assert ops.pool_fire(torch.zeros(4, 0, 6, 5, 3), LIF, torch.uint8).shape == (4, 0, 3, 3, 3)


@pytest.mark.parametrize("backend", ["eager", "spikingjelly"])
def test_other_backends_run_without_kernels(backend):
    x = torch.zeros(1, 1)
    with set_lif_backend(backend):
        assert native.kernel("fire", x, x) is None


def test_without_a_compiler_torch_operations_run_after_one_warning(monkeypatch, recwarn):
    from torch._inductor.codecache import CppCodeCache

    def fail(*args, **kwargs):
        raise OSError("no such compiler")

    x = currents(4, 3, 50)
    expected = ops.fire(x, LIF, torch.uint8)
    monkeypatch.setattr(CppCodeCache, "load", fail)
    monkeypatch.setattr(layers_native, "_libraries", {})
    for _ in range(2):
        assert torch.equal(ops.fire(x, LIF, torch.uint8), expected)
    assert [str(w.message) for w in recwarn if "no such compiler" in str(w.message)] == [
        "the kernels of kernels.cpp do not compile on this machine; models run without them, which costs speed but "
        "changes no result: OSError: no such compiler"
    ]
