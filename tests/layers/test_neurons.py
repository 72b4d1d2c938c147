"""Neurons: spikes and gradients against the written-out recurrence and against spikingjelly's nodes, in float64."""

import copy
import itertools
import pickle

import pytest
import torch
from torch.autograd import gradcheck

from timm_qkformer.layers import (
    IF,
    LIF,
    ParametricLIF,
    get_neuron_layer,
    integrate_and_fire,
    integrate_and_fire_reference,
)

T, B, C = 5, 3, 7

OPTIONS = [
    {"v_reset": v_reset, "decay_input": decay_input, "detach_reset": detach, "surrogate": surrogate}
    for v_reset, decay_input, detach, surrogate in itertools.product(
        (0.0, -0.3, None), (True, False), (True, False), ("sigmoid", "atan")
    )
]


def option_id(options):
    return ",".join(f"{k}={v}" for k, v in options.items())


def currents(requires_grad=True):
    x = 1.5 * torch.randn(T, B, C, dtype=torch.float64) + 0.6
    return x.requires_grad_(requires_grad)


def create(kind, options):
    """One of our neurons with the given options, as far as it has them."""
    if kind == "if":
        return IF(**{k: v for k, v in options.items() if k != "decay_input"}).double()
    if kind == "lif":
        return LIF(tau=1.7, **options).double()
    return ParametricLIF(init_tau=1.7, **options).double()


def run(neuron, x, weight):
    spikes = neuron(x)
    params = list(neuron.parameters())
    grads = torch.autograd.grad((spikes * weight).sum(), [x, *params])
    return spikes.detach(), grads


def plain_python(x, leak, v_threshold, v_reset, decay_input):
    """The textbook equations, one scalar at a time, with absolute potentials: no tensor code shared with ours."""
    spikes = torch.zeros_like(x)
    for index in itertools.product(*(range(n) for n in x.shape[1:])):
        rest = 0.0 if v_reset is None else v_reset
        v = rest
        for t in range(x.shape[0]):
            i = float(x[(t, *index)])
            h = v + leak * (i - (v - rest)) if decay_input else v - leak * (v - rest) + i
            fired = h >= v_threshold
            spikes[(t, *index)] = float(fired)
            v = (h - v_threshold if v_reset is None else v_reset) if fired else h
    return spikes


@pytest.mark.parametrize("kind", ["lif", "if", "plif"])
@pytest.mark.parametrize("options", OPTIONS, ids=option_id)
def test_gradients_equal_autograd_of_the_recurrence(kind, options):
    neuron = create(kind, options)
    x, weight = currents(), torch.randn(T, B, C, dtype=torch.float64)
    spikes, grads = run(neuron, x, weight)

    leak = {"lif": torch.tensor(1 / 1.7, dtype=torch.float64), "if": torch.tensor(0.0, dtype=torch.float64)}.get(kind)
    if kind == "plif":
        leak = torch.sigmoid(neuron.w)
    reference = integrate_and_fire_reference(
        x,
        leak,
        threshold=1.0 - (options["v_reset"] or 0.0),
        soft_reset=options["v_reset"] is None,
        decay_input=options["decay_input"] and kind != "if",
        detach_reset=options["detach_reset"],
        surrogate=options["surrogate"],
        alpha=neuron.alpha,
    )
    expected = torch.autograd.grad((reference * weight).sum(), [x, *neuron.parameters()])
    assert torch.equal(spikes, reference)
    assert 0 < spikes.mean() < 1
    for grad, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=1e-12)
        assert grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["lif", "if", "plif"])
@pytest.mark.parametrize("options", OPTIONS, ids=option_id)
def test_spikes_equal_the_textbook_equations(kind, options):
    neuron = create(kind, options)
    x = currents(requires_grad=False)
    leak = {"lif": 1 / 1.7, "if": 0.0, "plif": 1 / 1.7}[kind]
    decay_input = options["decay_input"] and kind != "if"
    expected = plain_python(x, leak, 1.0, options["v_reset"], decay_input)
    assert torch.equal(neuron(x), expected)


@pytest.mark.parametrize("kind", ["lif", "if", "plif"])
@pytest.mark.parametrize("options", OPTIONS, ids=option_id)
def test_agrees_with_spikingjelly(kind, options):
    from spikingjelly.activation_based import neuron as sj
    from spikingjelly.activation_based import surrogate as sj_surrogate

    ours = create(kind, options)
    surrogate = {"sigmoid": sj_surrogate.Sigmoid, "atan": sj_surrogate.ATan}[options["surrogate"]](alpha=ours.alpha)
    args = {
        "v_threshold": 1.0,
        "v_reset": options["v_reset"],
        "detach_reset": options["detach_reset"],
        "surrogate_function": surrogate,
        "step_mode": "m",
    }
    if kind == "if":
        theirs = sj.IFNode(**args)
    elif kind == "lif":
        theirs = sj.LIFNode(tau=1.7, decay_input=options["decay_input"], **args)
    else:
        theirs = sj.ParametricLIFNode(init_tau=1.7, decay_input=options["decay_input"], **args)
    theirs = theirs.double()

    x, weight = currents(), torch.randn(T, B, C, dtype=torch.float64)
    spikes, grads = run(ours, x, weight)
    expected_spikes, expected_grads = run(theirs, x, weight)
    assert torch.equal(spikes, expected_spikes)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, wanted.reshape(grad.shape), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("surrogate", ["sigmoid", "atan"])
def test_surrogate_derivative_is_the_primitives(surrogate):
    from timm_qkformer.layers.surrogate import surrogate_derivative, surrogate_primitive

    u = torch.linspace(-2, 2, 41, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(surrogate_primitive(u, surrogate, 3.0).sum(), u)
    torch.testing.assert_close(surrogate_derivative(u.detach(), surrogate, 3.0), grad)
    assert gradcheck(lambda v: surrogate_primitive(v, surrogate, 3.0), (u,))


def test_defaults_are_the_releases():
    lif = LIF()
    assert (lif.tau, lif.v_threshold, lif.v_reset, lif.decay_input, lif.detach_reset) == (2.0, 1.0, 0.0, True, True)
    assert (lif.surrogate, lif.alpha) == ("sigmoid", 4.0)
    assert LIF(surrogate="atan").alpha == 2.0


def test_keeps_no_state():
    lif, x = LIF(), torch.randn(4, 2, 3)
    first = lif(x)
    lif(torch.randn(4, 5, 3) + 1)
    assert torch.equal(lif(x), first)
    assert list(LIF().state_dict()) == []
    assert list(ParametricLIF().state_dict()) == ["w"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["lif", "if", "plif"])
def test_membrane_is_float32_in_half_precision(kind, dtype):
    # Steps so small that a half-precision membrane would lose them near the threshold.
    x = torch.full((256, 1, 4), 2.0**-8 if kind == "if" else 1.0, dtype=dtype)
    options = {"v_threshold": 1.0 if kind == "if" else 0.9999}
    neuron = {"if": IF, "lif": LIF, "plif": ParametricLIF}[kind](**options).to(dtype)
    spikes = neuron(x)
    assert spikes.dtype == dtype
    assert torch.equal(spikes.float(), neuron.float()(x.float()))
    assert spikes.sum() > 0


def test_half_precision_gradient():
    x = torch.randn(4, 2, 8).bfloat16()
    grads = []
    for dtype in (torch.bfloat16, torch.float32):
        v = x.clone().to(dtype).requires_grad_()
        LIF()(v).sum().backward()
        grads.append(v.grad)
    assert grads[0].dtype == torch.bfloat16
    torch.testing.assert_close(grads[0].float(), grads[1], rtol=1e-2, atol=1e-3)


def test_autocast_keeps_spikes():
    x = torch.randn(4, 2, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        spikes = LIF()(x)
    assert torch.equal(spikes, LIF()(x))


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 3), (4, 0, 5), (3, 2, 5, 7, 3)])
def test_shapes(shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    spikes = ParametricLIF().double()(x)
    assert spikes.shape == x.shape
    spikes.sum().backward()
    assert x.grad.shape == x.shape


def test_strided_and_expanded_inputs():
    dense = torch.randn(4, 6, 5, 2, dtype=torch.float64)
    for x in (dense.transpose(1, 3), dense[:, ::2], dense[:1].expand(4, -1, -1, -1), dense.flip(0)):
        assert torch.equal(LIF()(x), LIF()(x.contiguous()))


def test_expanded_input_sums_its_gradient():
    still = torch.randn(1, 2, 3, dtype=torch.float64, requires_grad=True)
    moving = still.detach().repeat(4, 1, 1).requires_grad_()
    LIF()(still.expand(4, -1, -1)).sum().backward()
    LIF()(moving).sum().backward()
    torch.testing.assert_close(still.grad, moving.grad.sum(0, keepdim=True))


def test_parametric_tau_learns():
    neuron = ParametricLIF(init_tau=3.0)
    assert 1 / torch.sigmoid(neuron.w).item() == pytest.approx(3.0)
    x = 2 * torch.rand(8, 4, 16)
    optimizer = torch.optim.SGD(neuron.parameters(), lr=1.0)
    before = neuron(x).mean()
    for _ in range(20):
        optimizer.zero_grad()
        (-neuron(x).mean()).backward()
        optimizer.step()
    assert neuron(x).mean() > before


@pytest.mark.parametrize("kind", ["lif", "if", "plif"])
def test_copies_and_scripts(kind):
    neuron, x = create(kind, OPTIONS[0]), currents(requires_grad=False)
    assert torch.equal(copy.deepcopy(neuron)(x), neuron(x))
    assert torch.equal(pickle.loads(pickle.dumps(neuron))(x), neuron(x))
    assert torch.equal(torch.jit.script(neuron)(x), neuron(x))
    half = x.to(torch.bfloat16)
    assert torch.equal(torch.jit.script(neuron.float())(half), neuron(half))


def test_hyper_parameters_may_be_changed():
    x = 3 * torch.rand(4, 2, 5)
    neuron = LIF()
    neuron.tau, neuron.v_threshold, neuron.v_reset = 1.5, 0.3, None
    assert "tau=1.5, v_threshold=0.3, v_reset=None" in repr(neuron)
    assert torch.equal(neuron(x), LIF(1.5, 0.3, None)(x))
    assert not torch.equal(neuron(x), LIF()(x))
    neuron.v_reset = -0.5
    assert torch.equal(neuron(x), LIF(1.5, 0.3, -0.5)(x))


def test_factory_kwargs():
    assert ParametricLIF(device="meta").w.is_meta
    assert ParametricLIF(dtype=torch.float64).w.dtype == torch.float64
    assert LIF(device="meta")(torch.empty(4, 2, device="meta")).shape == (4, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LIF(tau=0.5), "tau=0.5"),
        (lambda: LIF(tau=float("nan")), "tau=nan"),
        (lambda: ParametricLIF(init_tau=1.0), "init_tau=1.0"),
        (lambda: LIF(v_threshold=0.0), "v_threshold=0.0"),
        (lambda: LIF(v_threshold=1.0, v_reset=1.0), "v_reset=1.0"),
        (lambda: LIF(surrogate="relu"), r"surrogate='relu'.*atan.*sigmoid"),
        (lambda: LIF(alpha=0.0), "alpha=0.0"),
        (lambda: get_neuron_layer("izhikevich"), r"neuron='izhikevich'.*if.*lif.*plif"),
        (lambda: get_neuron_layer("lif", {"v_treshold": 0.5}), r"neuron_args={'v_treshold': 0.5}: .*v_treshold"),
        (lambda: get_neuron_layer("if", {"tau": 2.0}), r"neuron_args={'tau': 2.0}: .*tau"),
        (lambda: get_neuron_layer("lif", {"tau": 0.5}), r"neuron_args={'tau': 0.5}: tau=0.5 must be"),
        (lambda: LIF()(torch.ones(4, 2, dtype=torch.int64)), "int64"),
        (lambda: LIF()(torch.ones(0, 2)), r"\[0, 2\]"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_second_derivative_of_the_surrogate():
    """The backward pass is made of differentiable operations, so gradient penalties work."""
    x = currents()
    for function in (integrate_and_fire, integrate_and_fire_reference):
        leak = torch.tensor(0.4, dtype=torch.float64)
        (grad,) = torch.autograd.grad(function(x, leak).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), x)
        if function is integrate_and_fire:
            first = second
    torch.testing.assert_close(first, second)
