"""Convolutions that add spikes up event by event while a model trains, against dense ones."""

import pytest
import timm
import torch
import torch.nn.functional as F

from timm_qkformer.layers import SpikingConv, event_training, fused, lean_training, native, set_lif_backend
from timm_qkformer.layers.counts import note_counts
from timm_qkformer.layers.fusion_progress import fusion_progress, resume_fusion

pytestmark = pytest.mark.usefixtures("event_kernels")

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


@pytest.fixture(autouse=True)
def _eager_neurons(monkeypatch):
    monkeypatch.setattr(fused, "_kernel", lambda *args: None)


@pytest.fixture
def small_layers_too(monkeypatch):
    """Lets layers as small as these tests' add events up."""
    for thresholds in (event_training._PRODUCTS, event_training._GRADIENTS):
        for dtype in thresholds:
            monkeypatch.setitem(thresholds, dtype, event_training._BreakEven(0.5, 0.0))


@pytest.fixture
def chosen(monkeypatch):
    """What was chosen for each convolution."""
    choices = []

    def choose(*args):
        choices.append(real(*args))
        return choices[-1]

    real = event_training.choose
    monkeypatch.setattr("timm_qkformer.layers.lean.choose", choose)
    return choices


def counts(shape, rate, largest=1):
    x = (torch.rand(shape) < rate) * torch.randint(1, largest + 1, shape)
    return x.float().contiguous(memory_format=torch.channels_last)


def integers(*shape):
    """Sums of a few thousand of them are exact in float32, in any order."""
    return torch.randint(-8, 9, shape).float()


@pytest.mark.parametrize("largest", [1, 5])
@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("shape", "outputs", "side", "stride"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_products_and_gradients_are_exact(shape, outputs, side, stride, rate, largest):
    x = counts(shape, rate, largest)
    weight = integers(outputs, shape[1], side, side).requires_grad_()
    expected = F.conv2d(x, weight, None, stride, side // 2)
    assert torch.equal(event_training.event_products(x, weight.detach(), None, stride), expected)
    if stride > 1:  # the weights' gradients of those are dense
        return
    grad = integers(*expected.shape)
    expected.backward(grad)
    bytes_ = x.to(torch.uint8)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        for dtype in (torch.float32, torch.bfloat16):
            grads = grad.to(dtype, memory_format=memory_format)
            like = weight.detach().contiguous(memory_format=memory_format)
            gradient = event_training.event_weight_gradient(bytes_, grads, like)
            assert torch.equal(gradient, weight.grad)
            assert gradient.stride() == like.stride()


def test_answers_do_not_depend_on_threads():
    x = counts((5, 40, 9, 9), 0.3, 3)
    weight, grad = torch.randn(64, 40, 3, 3), torch.randn(5, 64, 9, 9)
    results = []
    threads = torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            products = event_training.event_products(x, weight, torch.ones(64), 1)
            results.append((products, event_training.event_weight_gradient(x.to(torch.uint8), grad, weight)))
    finally:
        torch.set_num_threads(threads)
    for one, three in zip(*results, strict=True):
        assert torch.equal(one, three)


def train(layer, x, backend, half=False):
    """Output and gradients."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    with set_lif_backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=half):
        out = layer(note_counts(x * 1.0, 255))
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    return [out.detach(), x.grad, *(p.grad.clone() for p in layer.parameters() if p.requires_grad)]


def unit(*args, **kwargs):
    layer = SpikingConv(*args, **kwargs)
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
    x = counts((8, 24, 7, 6), 0.07, 2).unflatten(0, (4, 2))
    with lean_training(False):
        plain = train(layer, x, "eager", half)
    dense, ours = train(layer, x, "eager", half), train(layer, x, "compile", half)
    strided = layer.conv.stride != (1, 1) and layer.conv.kernel_size != (1, 1)
    assert chosen == [event_training.Choice(), event_training.Choice(True, not strided)]
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
    train(layer, x, "compile")
    assert chosen == [expected]


def test_native_bfloat16_is_harder_to_beat():
    x, weight = torch.zeros(2, 256, 6, 6), torch.zeros(256, 256, 3, 3)
    x.view(-1)[: round(0.25 * x.numel())] = 1
    with set_lif_backend("compile"):
        for dtype, expected in ((torch.float32, (True, True)), (torch.bfloat16, (True, False))):
            assert event_training.choose(x, weight.to(dtype), [1, 1], [1, 1], [1, 1]) == expected


@pytest.mark.parametrize("backend", ["eager", "spikingjelly"])
def test_other_backends_multiply(backend):
    with set_lif_backend(backend):
        x, weight = torch.zeros(1, 16, 4, 4), torch.zeros(16, 16, 1, 1)
        assert event_training.choose(x, weight, [1, 1], [0, 0], [1, 1]) == (False, False)


def test_groups_unknown_input_and_other_precision_multiply(chosen):
    x = counts((4, 16, 5, 5), 0.1).unflatten(0, (4, 1))
    train(unit(16, 16, 3, groups=16), x, "compile")
    with set_lif_backend("compile"):
        unit(16, 16)(x.clone().requires_grad_()).sum().backward()  # nobody noted that these are spikes
    assert not chosen
    train(unit(16, 16).double(), x.double(), "compile")
    assert chosen == [(False, False)]


def test_auto_begins_once_it_pays_and_so_does_a_resumed_process(monkeypatch, small_layers_too):
    x, weight = counts((2, 16, 4, 4), 0.1), torch.zeros(16, 16, 3, 3)
    work = 2 * 4 * 4 * 16 * 16 * 9
    monkeypatch.setattr(event_training, "AUTO_BUDGET", 3 * work)
    monkeypatch.setattr(event_training, "_work", 0)

    def adds_events():
        with set_lif_backend("auto"):
            return any(event_training.choose(x, weight, [1, 1], [1, 1], [1, 1]))

    assert [adds_events() for _ in range(2)] == [False, False]
    progress = fusion_progress()
    assert event_training.work_done() == 2 * work
    assert [adds_events() for _ in range(2)] == [False, True]
    for work_in_this_process in (0, 10 * work):
        monkeypatch.setattr(event_training, "_work", work_in_this_process)
        resume_fusion(progress)
        assert [adds_events() for _ in range(2)] == [False, True]


def test_a_model_trains_alike(chosen, small_layers_too):
    """One step of a whole model, whose attention, residual sums and pooling are between the convolutions."""
    torch.manual_seed(0)
    model = timm.create_model("test_qkformer", num_classes=5).train()
    images = torch.randn(4, 3, 32, 32)

    def gradients(backend):
        model.zero_grad()
        with set_lif_backend(backend):
            model(images).square().sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    dense, ours = gradients("eager"), gradients("compile")
    assert sum(choice.products and choice.weight_gradient for choice in chosen) >= 10
    assert F.cosine_similarity(ours, dense, 0) > 0.999


def test_without_a_compiler_products_stay_dense_after_one_warning(monkeypatch, small_layers_too):
    from torch._inductor.codecache import CppCodeCache

    def fail(*args, **kwargs):
        raise OSError("no such compiler")

    monkeypatch.setattr(CppCodeCache, "load", fail)
    monkeypatch.setattr(native, "_libraries", {})
    x, weight = torch.zeros(1, 16, 4, 4), torch.zeros(16, 16, 1, 1)
    with (
        set_lif_backend("compile"),
        pytest.warns(RuntimeWarning, match=r"events\.cpp do not compile.*no such compiler"),
    ):
        assert event_training.choose(x, weight, [1, 1], [0, 0], [1, 1]) == (False, False)
    with set_lif_backend("compile"):
        assert event_training.choose(x, weight, [1, 1], [0, 0], [1, 1]) == (False, False)
