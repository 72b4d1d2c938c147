"""Convolutions that add spikes up event by event while a model trains, against dense ones."""

import pytest
import timm
import torch
import torch.nn.functional as F

from timm_qkformer import execution
from timm_qkformer.execution import calibration, convolution, execution_policy, native
from timm_qkformer.execution.packing import TERNARY, counts, pack
from timm_qkformer.layers import SpikingConv

pytestmark = pytest.mark.usefixtures("event_kernels")

MANY = counts(255)
CONVOLUTIONS = {  # input [M, C, H, W], output channels, side, stride
    "1x1": ((3, 5, 6, 7), 16, 1, 1),
    "3x3": ((2, 17, 9, 5), 48, 3, 1),
    "5x5": ((1, 8, 7, 11), 16, 5, 1),
    "stride": ((2, 9, 9, 8), 32, 3, 2),
    "one pixel": ((4, 3, 1, 1), 16, 3, 1),
    "more images than parts": ((50, 4, 3, 3), 16, 1, 1),
    "more pixels than are summed apart": ((1, 4, 70, 40), 16, 3, 1),
    "rows longer than that": ((1, 2, 3, 1300), 16, 3, 1),
    "many channels": ((1, 300, 4, 4), 160, 1, 1),
}


@pytest.fixture
def small_layers_too(monkeypatch):
    """Lets layers as small as these tests' add events up."""
    for thresholds in (convolution._PRODUCTS, convolution._GRADIENTS):
        for dtype in thresholds:
            monkeypatch.setitem(thresholds, dtype, calibration.BreakEven(0.5))


@pytest.fixture
def chosen(monkeypatch):
    """What was chosen for each convolution."""
    choices = []

    def choose(*args):
        choices.append(real(*args))
        return choices[-1]

    real = convolution._choose
    monkeypatch.setattr(convolution, "_choose", choose)
    return choices


def spike_sums(shape, rate, largest=1):
    x = (torch.rand(shape) < rate) * torch.randint(1, largest + 1, shape)
    return x.float().contiguous(memory_format=torch.channels_last)


def integers(*shape):
    """Sums of a few thousand of them are exact in float32, in any order."""
    return torch.randint(-8, 9, shape).float()


@pytest.mark.parametrize("largest", [1, 5])
@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("shape", "outputs", "side", "stride"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_products_and_gradients_are_exact(shape, outputs, side, stride, rate, largest):
    x = spike_sums(shape, rate, largest)
    weight = integers(outputs, shape[1], side, side).requires_grad_()
    expected = F.conv2d(x, weight, None, stride, side // 2)
    assert torch.equal(convolution._event_products(x, weight.detach(), None, stride), expected)
    if stride > 1:  # the weights' gradients of those are dense
        return
    grad = integers(*expected.shape)
    expected.backward(grad)
    bytes_ = x.to(torch.uint8)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        for dtype in (torch.float32, torch.bfloat16):
            grads = grad.to(dtype, memory_format=memory_format)
            like = weight.detach().contiguous(memory_format=memory_format)
            gradient = convolution._event_weight_gradient(bytes_, grads, like)
            assert torch.equal(gradient, weight.grad)
            assert gradient.stride() == like.stride()


def test_answers_do_not_depend_on_threads():
    x = spike_sums((5, 40, 9, 9), 0.3, 3)
    weight, grad = torch.randn(64, 40, 3, 3), torch.randn(5, 64, 9, 9)
    results = []
    threads = torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            products = convolution._event_products(x, weight, torch.ones(64), 1)
            results.append((products, convolution._event_weight_gradient(x.to(torch.uint8), grad, weight)))
    finally:
        torch.set_num_threads(threads)
    for one, three in zip(*results, strict=True):
        assert torch.equal(one, three)


def train(layer, x, kernels, half=False):
    """Output and gradients."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    policy = execution_policy(neurons="eager", kernels=kernels)
    with policy, torch.autocast("cpu", torch.bfloat16, enabled=half):
        out = layer(x * 1.0)
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    return [out.detach(), x.grad, *(p.grad.clone() for p in layer.parameters() if p.requires_grad)]


def unit(*args, **kwargs):
    layer = SpikingConv(*args, **{"input_range": counts(255), **kwargs})
    torch.nn.init.constant_(layer.bn.bias, 0.5)
    return layer.train()


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    "layer",
    [
        lambda: unit(24, 48),
        lambda: unit(24, 32, 3, bias=True),
        lambda: unit(24, 32, 3, 2),
        lambda: unit(24, 32, 1, 2),
        lambda: unit(24, 32, 3).requires_grad_(False),
    ],
    ids=["1x1", "3x3", "strided", "strided pixels", "frozen"],
)
def test_units_train_as_with_dense_products(layer, half, chosen, small_layers_too):
    layer = layer()
    x = spike_sums((8, 24, 7, 6), 0.07, 2).unflatten(0, (4, 2))
    with execution_policy(packed=False):
        plain = train(layer, x, "never", half)
    dense, ours = train(layer, x, "never", half), train(layer, x, "always", half)
    strided = layer.conv.stride != (1, 1) and layer.conv.kernel_size != (1, 1)
    assert chosen == [(False, False), (True, not strided)]
    assert 0.05 < ours[0].mean() < 0.95
    tolerance = {"rtol": 0.05, "atol": 0.05} if half else {"rtol": 1e-4, "atol": 1e-4}
    for own, wanted, readable in zip(ours, dense, plain, strict=True):
        torch.testing.assert_close(own, wanted, **tolerance)
        if not half:  # there the plain modules round sums of products differently
            torch.testing.assert_close(own, readable, **tolerance)


@pytest.mark.parametrize(
    ("layer", "rate", "expected"),
    [
        (lambda: unit(256, 256), 0.1, (True, True)),
        (lambda: unit(256, 256), 0.2, (True, False)),
        (lambda: unit(256, 256), 0.4, (False, False)),
        (lambda: unit(256, 1024), 0.38, (False, True)),
        (lambda: unit(64, 64, 3), 0.2, (True, True)),
        (lambda: unit(64, 64, 3), 0.4, (True, False)),
        (lambda: unit(64, 64, 3), 0.5, (False, False)),
        (lambda: unit(64, 64, 3, 2), 0.2, (True, False)),
        (lambda: unit(256, 264), 0.1, (False, False)),
        (lambda: unit(64, 64), 0.01, (False, False)),
    ],
)
def test_dense_products_where_many_fire_or_nothing_fits(layer, rate, expected, chosen):
    layer = layer()
    x = torch.zeros(2, 1, layer.conv.in_channels, 6, 6)
    x.view(-1)[: round(rate * x.numel())] = 1
    train(layer, x, "always")
    assert chosen == [expected]


def choose(x, weight, kernels, held=MANY):
    conv = convolution._Conv([1, 1], [weight.shape[2] // 2] * 2, [1, 1], 1)
    with execution_policy(kernels=kernels):
        return convolution._choose(x, pack(x, held), weight, [1, 1], conv)


def test_native_bfloat16_is_harder_to_beat():
    x, weight = torch.zeros(2, 256, 6, 6), torch.zeros(256, 256, 3, 3)
    x.view(-1)[: round(0.25 * x.numel())] = 1
    for dtype, expected in ((torch.float32, (True, True)), (torch.bfloat16, (True, False))):
        assert choose(x, weight.to(dtype), "always") == expected


def test_the_policy_may_leave_kernels_out():
    x, weight = torch.zeros(1, 16, 4, 4), torch.zeros(16, 16, 1, 1)
    x[0, 0] = 1
    wide = (x.repeat(1, 16, 1, 1), weight.repeat(16, 16, 1, 1))
    assert choose(*wide, "always") == (True, True)
    assert choose(*wide, "never") == (False, False)
    assert choose(*wide, "always", TERNARY) == (False, False)  # whose kernels take spikes of one sign


def test_groups_unknown_input_and_other_precision_multiply(chosen):
    x = spike_sums((4, 16, 5, 5), 0.1).unflatten(0, (4, 1))
    train(unit(16, 16, 3, groups=16), x, "always")
    train(unit(16, 16, input_range=execution.REAL), x, "always")  # nobody declared that these are spikes
    train(unit(16, 16).double(), x.double(), "always")
    assert chosen == [(False, False)] * 3


def test_auto_begins_once_it_pays_and_so_does_a_resumed_process(monkeypatch, small_layers_too):
    x, weight = spike_sums((2, 16, 4, 4), 0.1), torch.zeros(16, 16, 3, 3)
    work = 2 * 4 * 4 * 16 * 16 * 9
    monkeypatch.setattr(native, "AUTO_BUDGET", 3 * work)
    monkeypatch.setattr(native._budget, "work", {})

    def adds_events():
        return any(choose(x, weight, "auto"))

    assert [adds_events() for _ in range(2)] == [False, False]
    progress = execution.state_dict()
    assert native._budget.work == {native._TRAINING: 2 * work}
    assert [adds_events() for _ in range(3)] == [False, False, True]
    for work_in_this_process in (0, 10 * work):
        monkeypatch.setattr(native._budget, "work", {native._TRAINING: work_in_this_process})
        execution.load_state_dict(progress)
        assert [adds_events() for _ in range(3)] == [False, False, True]


def test_a_model_trains_alike(chosen, small_layers_too):
    """One step of a whole model, whose attention, residual sums and pooling are between the convolutions."""
    torch.manual_seed(0)
    model = timm.create_model("test_qkformer", num_classes=5).train()
    images = torch.randn(4, 3, 32, 32)

    def gradients(kernels):
        model.zero_grad()
        with execution_policy(neurons="eager", kernels=kernels):
            model(images).square().sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    dense, ours = gradients("never"), gradients("always")
    assert sum(choice.products and choice.weight_gradient for choice in chosen) >= 10
    assert F.cosine_similarity(ours, dense, 0) > 0.999


def test_without_a_compiler_products_stay_dense_after_one_warning(monkeypatch, small_layers_too):
    def fail(*args, **kwargs):
        raise OSError("no such compiler")

    monkeypatch.setattr(native.compiler, "load", fail)
    monkeypatch.setattr(native, "_libraries", {})
    monkeypatch.setattr(native, "_warned", False)
    x, weight = torch.zeros(1, 16, 4, 4), torch.zeros(16, 16, 1, 1)
    with pytest.warns(RuntimeWarning, match=r"do not compile.*no such compiler") as caught:
        assert [choose(x, weight, "always") for _ in range(2)] == [(False, False)] * 2
    assert len(caught) == 1
    assert "apt install g++" in str(caught[0].message)
