"""Event-driven convolutions against dense ones."""

from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F

import tiny
from timm_qkformer import deploy
from timm_qkformer.execution import BINARY, events, execution_policy
from timm_qkformer.inference import kernels, projection, weights
from timm_qkformer.inference.projection import Projection
from timm_qkformer.inference.weights import Folded
from timm_qkformer.neurons import IF, LIF, NeuronSpec

pytestmark = pytest.mark.usefixtures("event_kernels")

DTYPES = [torch.float32, torch.bfloat16, torch.int8]
SHAPES = {  # input [N, H, W, C], output channels, side, stride
    "tokens": ((3, 1, 70, 64), 96, 1, 1),
    "odd": ((2, 7, 5, 13), 19, 3, 1),
    "strided": ((2, 9, 8, 24), 64, 3, 2),
    "strided pixels": ((1, 9, 8, 24), 48, 1, 2),
    "wide kernel": ((1, 6, 11, 8), 16, 5, 1),
    "one pixel": ((1, 1, 1, 3), 2, 3, 1),
    "several blocks of channels": ((2, 3, 4, 450), 64, 3, 1),
    "more pixels than a thread takes": ((2, 13, 17, 9), 130, 3, 1),
}


def make(channels, outputs, side=1, stride=1, dtype=torch.float32):
    weight = torch.randn(outputs, channels, side, side, dtype=torch.float64) / (channels * side**2) ** 0.5
    unit = Projection([Folded(weight, torch.randn(outputs, dtype=torch.float64))], stride, 1, dtype)
    unit.events = True
    return unit


def spikes(shape, rate=0.2, largest=1):
    return (torch.rand(shape) < rate).to(torch.uint8) * torch.randint(1, largest + 1, shape, dtype=torch.uint8)


def dense(unit, x):
    """In float64, with the unit's own weights."""
    weight = unit.weight.double()
    if unit.scale is not None:
        weight = weight * unit.scale.double().view(-1, 1, 1, 1)
    out = F.conv2d(x.double().permute(0, 3, 1, 2), weight, unit.bias.double(), unit.stride, unit.kernel_size // 2)
    return out.permute(0, 2, 3, 1)


def check(unit, x):
    currents = unit(x)
    assert "events" in unit.derived
    assert currents.dtype == torch.float32
    assert currents.is_contiguous()
    torch.testing.assert_close(currents.double(), dense(unit, x), rtol=1e-5, atol=1e-5 * max(1, int(x.max())))
    return currents


@pytest.mark.parametrize("largest", [1, 3, 129])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "outputs", "side", "stride"), SHAPES.values(), ids=SHAPES)
def test_equals_the_dense_convolution(shape, outputs, side, stride, dtype, largest):
    unit = make(shape[-1], outputs, side, stride, dtype)
    for rate in (0.0, 0.05, 0.5, 1.0):
        currents = check(unit, spikes(shape, rate, largest))
    if largest == 1:
        assert not torch.equal(currents, unit(spikes(shape, 0.0)))


@pytest.mark.parametrize("largest", [1, 129])
def test_8_bit_sums_do_not_overflow(largest):
    """Thousands of the largest weights for each output, all of one sign."""
    unit = make(3072, 32, dtype=torch.int8)
    unit.weight.fill_(127)
    unit.weight[::2] = -127
    x = torch.full((2, 1, 3, 3072), largest, dtype=torch.uint8)
    exact = 3072 * 127.0 * largest * torch.tensor([-1.0, 1.0]).repeat(16) * unit.scale + unit.bias
    torch.testing.assert_close(unit(x), exact.expand(2, 1, 3, -1), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_answers_depend_on_neither_batch_nor_threads(dtype):
    unit = make(40, 64, 3, dtype=dtype)
    x = spikes((5, 9, 9, 40), 0.3, 3)
    expected = unit(x)
    assert torch.equal(torch.cat([unit(one) for one in x.split(1)]), expected)
    noisy = torch.cat([x[:1], torch.full_like(x, 7)])
    assert torch.equal(unit(noisy)[:1], expected[:1])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(unit(x), expected)
    finally:
        torch.set_num_threads(threads)


NEURONS = [NeuronSpec(0.5, 1.0, False, True), NeuronSpec(0.25, 0.7, True, False)]


@pytest.mark.parametrize("neuron", NEURONS, ids=str)
@pytest.mark.parametrize("steps", [1, 4, 19, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("outputs", "side", "stride"), [(64, 1, 1), (96, 3, 1), (32, 3, 2), (48, 1, 2)])
def test_neurons_that_follow_fire_alike(outputs, side, stride, dtype, steps, neuron):
    unit = make(24, outputs, side, stride, dtype)
    x = spikes((steps, 2, 7, 6, 24), 0.4, 2)
    fired = unit.fire(x, neuron, torch.uint8)
    expected = kernels.fire(unit.currents(x), neuron, torch.uint8)
    assert torch.equal(fired, expected)
    assert steps == 1 or 0 < fired.float().mean() < 1
    sums = torch.randint(0, 9, (steps, 5, *fired.shape[1:]), dtype=torch.uint8)[:, 2]
    added = sums + expected
    assert unit.fire(x, neuron, torch.uint8, sums) is sums
    assert torch.equal(sums, added)


@pytest.mark.parametrize(("steps", "outputs"), [(65, 32), (4, 19)])
def test_neurons_fire_by_themselves_where_the_kernel_does_not_fit(steps, outputs):
    unit = make(8, outputs, dtype=torch.int8)
    x = spikes((steps, 2, 9, 8), 0.4)
    assert torch.equal(unit.fire(x, NEURONS[0], torch.uint8), kernels.fire(unit.currents(x), NEURONS[0], torch.uint8))
    assert unit.fire(x, NEURONS[0], torch.float32).dtype == torch.float32


def test_any_memory_layout():
    unit = make(16, 16, 3)
    x = spikes((2, 6, 5, 16))
    for other in (x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1), torch.cat([x, x], 3)[..., :16]):
        assert torch.equal(unit(other), unit(x))


def test_weights_follow_the_buffers():
    unit, other = make(16, 16), make(16, 16)
    x = spikes((1, 4, 4, 16))
    assert not torch.equal(unit(x), other(x))
    unit.load_state_dict(other.state_dict())
    assert torch.equal(unit(x), other(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_products_stand_in(dtype, monkeypatch):
    unit = make(24, 32, 3, dtype=dtype)
    x = spikes((2, 6, 6, 24), 0.3, 3)
    expected = check(unit, x)
    rounds = tiny.rounds_currents("bf16", "dense") and dtype == torch.bfloat16
    within = {"rtol": 2**-8, "atol": 2**-8 * expected.abs().max().item()} if rounds else {}
    with execution_policy(kernels="never"):
        torch.testing.assert_close(unit(x), expected, **within)
    monkeypatch.setattr(events, "MOST_CHANNELS", 23)
    torch.testing.assert_close(unit(x), expected, **within)
    monkeypatch.setattr(projection, "has_onednn", lambda *_: False)
    unit.derived = {}
    torch.testing.assert_close(unit(x), expected)
    grouped = Projection([Folded(torch.randn(24, 1, 3, 3, dtype=torch.float64), torch.zeros(24))], 1, 24, dtype)
    grouped.events = True
    assert grouped(x).shape == (2, 6, 6, 24)
    assert "events" not in grouped.derived


def test_matrix_units_are_used_where_there_are_some(monkeypatch):
    capabilities = {"amx_int8": True, "amx_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    for precision, expected in zip(weights.PRECISIONS, ("events", "events", "dense"), strict=True):
        assert set(deploy(tiny.tiny("test_qkformer").float(), precision).products.values()) == {expected}
    full = torch.empty(0, device="meta")
    assert weights.spikes_dtype("fp32", full, True, BINARY) == torch.float32


@pytest.mark.parametrize("steps", [1, 2, 4, 7, 12, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("side", "stride"), [(3, 1), (3, 2), (1, 2)])
def test_neurons_that_fire_at_every_kth_step_are_added_once(dtype, steps, side, stride):
    periods = torch.randint(1, steps + 3, (2, 7, 5, 24))
    x = torch.stack([(t % periods == 0).to(torch.uint8) for t in range(1, steps + 1)])
    first = events.first_spikes(x)
    assert all(torch.equal(first[t - 1] == 1, periods == t) for t in range(1, steps + 1))
    unit = make(24, 48, side, stride, dtype)
    expected, found = unit.currents(x), unit.currents(x, periodic=True)
    if dtype == torch.int8:
        assert torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(unit.currents(x[:, 1:], periodic=True), found[:, 1:])


@pytest.mark.parametrize("neuron", [LIF, IF, partial(LIF, decay_input=False), partial(LIF, v_reset=None)])
def test_models_of_static_images_make_use_of_periods(neuron, monkeypatch):
    """The stem's neurons have periods if they reset hard; the answer is that of the sums over all spikes."""
    model = tiny.lively(timm.create_model("test_qkformer", neuron=neuron, time_steps=5)).float()
    deployed = deploy(model, "int8", products="events")
    images = torch.randn(2, 3, 32, 32)
    taken = []
    real = events.first_spikes
    monkeypatch.setattr(events, "first_spikes", lambda x: taken.append(len(x)) or real(x))
    logits = deployed(images)
    assert taken == ([] if getattr(neuron, "keywords", {}).get("v_reset", 0.0) is None else [5])
    assert deployed(torch.stack([images] * 5, 1)).equal(logits)  # the same clip, of which nothing is known
    assert len(taken) <= 1
