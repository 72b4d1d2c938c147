"""Every backend against the reference: the same spikes, the same gradients."""

import itertools

import pytest
import timm
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from timm_qkformer.layers import (
    LIF,
    ParametricLIF,
    fused,
    integrate_and_fire,
    integrate_and_fire_reference,
    set_lif_backend,
)
from timm_qkformer.layers.recurrence import membrane_dtype

GRADIENT_TOLERANCE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.bfloat16: {"rtol": 2e-2, "atol": 1e-3},
    torch.float16: {"rtol": 2e-3, "atol": 1e-4},
}
DEFAULTS = {
    "threshold": 1.0,
    "soft_reset": False,
    "decay_input": True,
    "detach_reset": True,
    "surrogate": "sigmoid",
    "alpha": 4.0,
}


def currents(*shape, dtype=torch.float32):
    """Input currents that drive neurons over the threshold about every other step."""
    return (torch.randn(shape, dtype=torch.float64) * 2.0 + 0.5).to(dtype)


def run(function, x, leak, grad, **options):
    """Spikes, dL/dx, dL/dleak."""
    x = x.detach().requires_grad_()
    spikes = function(x, leak, **{**DEFAULTS, **options})
    inputs = [x] + ([leak] if isinstance(leak, torch.Tensor) and leak.requires_grad else [])
    grads = torch.autograd.grad(spikes, inputs, grad)
    return spikes.detach(), *grads


def check(x, leak=0.5, backend="compile", **options):
    grad = torch.randn(x.shape, dtype=x.dtype)
    reference_leak = leak if isinstance(leak, torch.Tensor) else torch.tensor(leak, dtype=membrane_dtype(x))
    expected = run(integrate_and_fire_reference, x, reference_leak, grad, **options)
    with set_lif_backend(backend):
        actual = run(integrate_and_fire, x, leak, grad, **options)
    assert actual[0].dtype == x.dtype
    assert torch.equal(actual[0], expected[0])
    if x.numel() > 100:
        assert 0.02 < actual[0].mean(dtype=torch.float32) < 0.98  # there is something to compare
    for got, wanted in zip(actual[1:], expected[1:], strict=True):
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted, **GRADIENT_TOLERANCE[x.dtype])
    return actual


@pytest.fixture
def compiled():
    """The keys of the kernels that run compiled from here on."""
    seen = set()

    class Entries(dict):
        def get(self, key, default=None):
            entry = super().get(key, default)
            if entry is not None and entry.run is not None:
                seen.add(key)
            return entry

    entries = Entries(fused._entries)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "_entries", entries)
        yield seen
    fused._entries.update(entries)


OPTIONS = list(itertools.product([False, True], [False, True], [False, True], ["sigmoid", "atan"]))


@pytest.mark.parametrize(("soft_reset", "decay_input", "detach_reset", "surrogate"), OPTIONS)
@pytest.mark.parametrize("backend", ["eager", "spikingjelly"])
@pytest.mark.parametrize("leak", [0.5, 0.3, "parameter"])
def test_all_options_in_float64(backend, leak, soft_reset, decay_input, detach_reset, surrogate):
    if leak == "parameter":
        leak = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    check(
        currents(5, 2, 3, 7, dtype=torch.float64),
        leak,
        backend,
        threshold=0.8,
        soft_reset=soft_reset,
        decay_input=decay_input,
        detach_reset=detach_reset,
        surrogate=surrogate,
        alpha=3.0,
    )


@pytest.mark.parametrize(
    "options",
    [
        {"soft_reset": True, "decay_input": False, "detach_reset": False, "surrogate": "atan", "alpha": 2.0},
        pytest.param({"detach_reset": False, "threshold": 0.7}, marks=pytest.mark.slow),
    ],
)
def test_compiled_options_in_float64(options):
    x = currents(3, 2, 3, 7, dtype=torch.float64)
    check(x, 0.3, **options)
    check(x, torch.tensor(0.4, dtype=torch.float64, requires_grad=True), **options)


def test_integrate_and_fire_neurons_do_not_leak():
    x = currents(4, 3, 50)
    for backend in ("eager", "spikingjelly"):
        check(x, 0.0, backend, decay_input=False)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("eager", torch.bfloat16),
        ("eager", torch.float16),
        ("compile", torch.bfloat16),
        pytest.param("compile", torch.float16, marks=pytest.mark.slow),
        ("spikingjelly", torch.bfloat16),
        ("spikingjelly", torch.float16),
    ],
)
def test_half_precision_keeps_the_potential_in_float32(backend, dtype):
    x = currents(4, 2, 5, 33, dtype=dtype)
    spikes = check(x, 0.5, backend)[0]
    in_float32 = integrate_and_fire_reference(x.float(), torch.tensor(0.5))
    assert torch.equal(spikes.float(), in_float32)


@pytest.mark.parametrize("backend", ["eager", "compile"])
@pytest.mark.parametrize(
    "shape", [(4, 2, 3, 5, 7), (4, 1, 8, 16, 16), (4, 1, 1, 1, 1), (4, 3), (4,), (4, 0, 3), (4, 2, 0, 5, 5), (1, 3, 5)]
)
def test_shapes(backend, shape):
    spikes, grad = check(currents(*shape), 0.5, backend)
    assert spikes.shape == grad.shape == shape


def test_one_time_step_compiled():
    check(currents(1, 2, 3, 5, 7))
    check(currents(1, 2, 3, 5, 7).expand(1, 2, 3, 5, 7))


def layouts():
    x = currents(8, 6, 5, 4)
    dense = {
        "contiguous": x.unflatten(0, (4, 2)),
        "channels last": x.contiguous(memory_format=torch.channels_last).unflatten(0, (4, 2)),
        "batch last": currents(4, 6, 5, 4, 2).permute(0, 4, 1, 2, 3),
        "inside a larger tensor": currents(9, 2, 6, 5, 4)[3:7],
    }
    other = {
        "every second step": currents(8, 2, 6, 5, 4)[::2],
        "a slice": currents(4, 2, 6, 5, 9)[..., 2:6],
        "batch before time": currents(2, 4, 6, 5, 4).transpose(0, 1),
        "backwards in time and space": currents(4, 2, 6, 5, 4).flip(0)[..., ::2],
        "expanded channels": currents(4, 2, 1, 5, 4).expand(4, 2, 6, 5, 4),
    }
    return dense, other


@pytest.mark.parametrize("backend", ["eager", "compile"])
def test_memory_formats(backend):
    dense, other = layouts()
    for name, x in dense.items():
        spikes, grad = check(x, 0.5, backend)
        assert spikes.stride() == x.stride(), name
        if backend == "compile":
            assert grad.stride() == x.stride(), name
    for name, x in other.items():
        spikes = check(x, 0.5, backend)[0]
        assert spikes.stride(0) == spikes[0].numel(), name


@pytest.mark.parametrize("backend", ["eager", "compile"])
def test_a_current_repeated_by_expand(backend, compiled):
    for shape in [(2, 6, 5, 4), (1, 3, 7, 7)]:
        step = currents(*shape).contiguous(memory_format=torch.channels_last)
        x = step.expand(4, *shape)
        spikes = check(x, 0.5, backend)[0]
        assert spikes[0].stride() == step.stride()
    if backend == "compile":
        assert all(key.constant for key in compiled)  # read once, not materialised
        assert {key.backward for key in compiled} == {False, True}


def test_gradients_in_any_memory_format():
    x = currents(4, 2, 6, 5, 4).requires_grad_()
    weight = torch.randn(8, 6, 5, 4).contiguous(memory_format=torch.channels_last).unflatten(0, (4, 2))
    grads = []
    for backend in ("eager", "compile"):
        with set_lif_backend(backend):
            spikes = integrate_and_fire(x, 0.5)
            grads.append(torch.autograd.grad((spikes * weight).sum(), x)[0])
            spikes = integrate_and_fire(x, 0.5)
            grads.append(torch.autograd.grad(spikes.sum(), x)[0])  # an expanded gradient
    torch.testing.assert_close(grads[2], grads[0])
    torch.testing.assert_close(grads[3], grads[1])


def test_compiled_spikes_equal_eager_ones_to_the_last(compiled):
    # Potentials within a rounding error of the threshold: were products not rounded before they are added (fused
    # multiply-add), or terms summed in another order, some of these neurons would fire differently.
    leak, threshold = torch.tensor(1 / 3), 0.7
    v = torch.rand(20_000) * 0.6
    x = torch.stack([v / leak, v + (threshold - v) / leak, *currents(2, 20_000)])
    spikes = {}
    for backend in ("eager", "compile"):
        with set_lif_backend(backend), torch.no_grad():
            spikes[backend] = integrate_and_fire(x, 1 / 3, threshold=threshold)
    assert compiled
    assert torch.equal(spikes["eager"], spikes["compile"])
    v = x[0] * leak
    rounded_once = (v.double() + (x[1] - v).double() * leak.double()).float() >= threshold
    assert (rounded_once != spikes["eager"][1].bool()).sum() > 100  # such differences would have been seen


@pytest.mark.parametrize("backend", ["eager", "compile"])
def test_nothing_is_saved_but_the_input(backend):
    x = currents(4, 2, 6, 5, 4).requires_grad_()
    packed = []
    with (
        set_lif_backend(backend),
        torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t),
    ):
        integrate_and_fire(x, 0.5)
    assert [t.data_ptr() for t in packed] == [x.data_ptr()]


@pytest.mark.parametrize("backend", ["eager", "compile"])
def test_spikes_may_be_modified_in_place(backend):
    x = currents(4, 2, 6, 5, 4).requires_grad_()
    with set_lif_backend(backend):
        spikes = integrate_and_fire(x, 0.5)
        spikes.mul_(3.0)
        grad = torch.autograd.grad(spikes.sum(), x)[0]
        wanted = torch.autograd.grad(integrate_and_fire(x, 0.5).sum(), x)[0]
    torch.testing.assert_close(grad, 3.0 * wanted)


def test_the_backward_pass_runs_on_the_backend_of_its_forward_pass(compiled):
    x = currents(4, 2, 6, 5, 4).requires_grad_()
    with set_lif_backend("compile"):
        spikes = integrate_and_fire(x, 0.5)
    with set_lif_backend("eager"):
        spikes.sum().backward()
    assert {key.backward for key in compiled} == {False, True}


@pytest.mark.parametrize("backend", ["auto", "compile"])
def test_second_derivatives(backend):
    x = currents(3, 4, dtype=torch.float64).requires_grad_()

    def first_derivative(function):
        leak = torch.tensor(0.5, dtype=torch.float64) if function is integrate_and_fire_reference else 0.5
        grad = torch.autograd.grad(function(x, leak).sum(), x, create_graph=True)[0]
        return torch.autograd.grad(grad.square().sum(), x)[0]

    with set_lif_backend(backend):
        torch.testing.assert_close(first_derivative(integrate_and_fire), first_derivative(integrate_and_fire_reference))


def test_transforms_and_fake_tensors_take_torch_ops(compiled):
    x = currents(4, 3, 5)
    expected = integrate_and_fire_reference(x, torch.tensor(0.5))
    with set_lif_backend("compile"):
        batched = torch.vmap(lambda x: integrate_and_fire(x, 0.5), in_dims=1, out_dims=1)(x)
        assert torch.equal(batched, expected)
        grad = torch.func.grad(lambda x: integrate_and_fire(x, 0.5).sum())(x)
        y = x.clone().requires_grad_()
        torch.testing.assert_close(
            grad, torch.autograd.grad(integrate_and_fire_reference(y, torch.tensor(0.5)).sum(), y)[0]
        )
        torch.func.jvp(lambda x: integrate_and_fire(x, 0.5), (x,), (torch.ones_like(x),))
        assert integrate_and_fire(x.to("meta"), 0.5).shape == x.shape
        with torch._subclasses.FakeTensorMode() as mode:
            assert integrate_and_fire(mode.from_tensor(x), 0.5).shape == x.shape
        for tracing_mode in ("real", "fake", "symbolic"):
            graph = make_fx(lambda x: integrate_and_fire(x, 0.5), tracing_mode=tracing_mode)(x)
            assert torch.equal(graph(-x), integrate_and_fire_reference(-x, torch.tensor(0.5)))  # nothing was baked in
        traced = torch.jit.trace(lambda x: integrate_and_fire(x, 0.5), x, check_trace=False)
        assert torch.equal(traced(-x), integrate_and_fire_reference(-x, torch.tensor(0.5)))
        scripted = torch.jit.script(LIF())
        assert torch.equal(scripted(x), expected)
    assert not compiled


def test_spikingjelly_says_what_it_cannot_do():
    x = currents(4, 3)
    with set_lif_backend("spikingjelly"):
        # Where nothing is computed, or it is for somebody else's graph, it is not asked.
        assert LIF(tau=1.0)(x.to("meta")).shape == x.shape
        with torch._subclasses.FakeTensorMode() as mode:
            assert LIF(tau=1.0)(mode.from_tensor(x)).shape == x.shape
        graph = make_fx(LIF(tau=1.0))(x)
        assert torch.equal(graph(-x), integrate_and_fire_reference(-x, torch.tensor(1.0)))
        with pytest.raises(ValueError, match="tau=1"):
            LIF(tau=1.0)(x)
        with pytest.raises(ValueError, match="leak=0"):
            integrate_and_fire(x, 0.0)
        assert integrate_and_fire(torch.zeros(4, 0, 3), 0.5).shape == (4, 0, 3)
        assert torch.equal(ParametricLIF()(x), integrate_and_fire_reference(x, torch.tensor(0.5)))


@pytest.fixture
def tiny():
    return timm.create_model("test_qkformer", num_classes=5).eval()


def test_backends_agree_on_a_model(tiny):
    # In float64: in float32 a neuron near its threshold may flip with how a convolution sums.
    tiny = tiny.double()
    x = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    with set_lif_backend("eager"):
        expected = tiny(x)
    with set_lif_backend("spikingjelly"):
        torch.testing.assert_close(tiny(x), expected)
    assert torch.equal(torch.jit.script(tiny)(x), expected)
