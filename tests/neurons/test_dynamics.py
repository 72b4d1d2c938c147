"""Every neuron, option and way to run it against the written-out recurrence: spikes, potential, gradients.

Real compiled kernels are in test_compiled.py; here their bodies run in eager mode.
"""

import io
import itertools
import math
from typing import Tuple

import neuron_cases as cases
import pytest
import torch
from neuron_cases import (
    CASES,
    DIAGONAL,
    FORWARD,
    THRESHOLD,
    B,
    C,
    T,
    assert_same,
    currents,
    differentiate,
    make,
    reference,
)
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from timm_qkformer.execution import execution_policy
from timm_qkformer.inference import kernels
from timm_qkformer.neurons import LIF, IntegerLIF, NeuronSpec, compiled, integrate_and_fire, run_neurons
from timm_qkformer.neurons.recurrence import surrogate_derivative, surrogate_primitive
from timm_qkformer.neurons.spec import membrane_dtype


@pytest.fixture
def bodies(monkeypatch):
    """ "Compiles" kernels for free, into torch operations; yields their keys."""
    made = {}
    monkeypatch.setattr(compiled, "_kernels", made)
    monkeypatch.setattr(compiled, "_compile", compiled.kernel_body)
    return made


class Steps(nn.Module):
    """`run` of a neuron as a module's forward, for the tracer."""

    def __init__(self, neuron):
        super().__init__()
        self.neuron = neuron

    def forward(self, x, v):
        return self.neuron.run(x, v)


class ScriptedSteps(Steps):
    """`run_reference`, which TorchScript compiles."""

    def forward(self, x: torch.Tensor, v: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        return self.neuron.run_reference(x, v)


def potential(dtype=torch.float64):
    return 0.3 * currents(B, C, dtype=dtype, seed=5)


def textbook(x, v, kind, options):
    """The equations of a paper, one scalar at a time, with absolute potentials: shares no tensor code with ours."""
    rest = options["v_reset"] or 0.0
    leak = 0.0 if kind == "if" else 1 / cases.TAU
    spikes, after = torch.zeros_like(x), torch.zeros_like(v)
    for index in itertools.product(*map(range, v.shape)):
        u = float(v[index]) + rest
        for t in range(len(x)):
            i = float(x[(t, *index)])
            h = u + leak * (i - (u - rest)) if options.get("decay_input") else u - leak * (u - rest) + i
            s = float(h >= THRESHOLD) - float("ternary" in kind and h - rest <= rest - THRESHOLD)
            if kind == "integer":
                s = min(max(math.floor((h - rest) / (THRESHOLD - rest) + 0.5), 0), cases.MAX_SPIKES)
            spikes[(t, *index)] = s
            soft = h - s * THRESHOLD  # of neurons at rest at 0
            u = (soft if options["v_reset"] is None else rest) if s else h
        after[index] = u - rest
    return spikes, after


@pytest.mark.parametrize("case", FORWARD)
def test_the_reference_is_the_textbooks(case):
    x, v = currents(T, B, C), potential()
    spikes, after = reference(case, make(case), x, v)
    if case == "relu":
        assert torch.equal(spikes, x.clamp(min=0))
        return
    wanted, wanted_after = textbook(x, v, *CASES[case])
    assert torch.equal(spikes, wanted)
    found = set(spikes.unique().tolist())
    if "integer" in case:
        assert found - {3.0} == {0.0, 1.0, 2.0}  # three spikes are rare
    else:
        assert found == ({-1.0, 0.0, 1.0} if "ternary" in case else {0.0, 1.0})
    torch.testing.assert_close(after, wanted_after, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("start", ["rest", "potential"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "float"])
def test_eager_and_kernel_bodies(case, dtype, start, bodies):
    neuron, x = make(case, dtype), currents(T, B, C, dtype=dtype)
    v = None if start == "rest" else potential(dtype)
    expected = differentiate(lambda x, v: reference(case, neuron, x, v), neuron, x, v)
    for backend in ("eager", "compile"):
        with execution_policy(neurons=backend):
            found = differentiate(neuron.run, neuron, x, v)
            assert_same(found, expected, dtype)
            if start == "rest":
                spikes_only = differentiate(lambda x, _: [neuron(x)], neuron, x, None)
                wanted = differentiate(lambda x, _: reference(case, neuron, x)[:1], neuron, x, None)
                assert_same(spikes_only, wanted, dtype)
        assert bool(bodies) == (backend == "compile" and case != "relu")
    if case != "relu":
        assert {(key.backward, key.state) for key in bodies} >= {(False, True), (True, True)}
        assert all(grad.abs().sum() > 0 for grad in expected[1])


@pytest.mark.parametrize("case", DIAGONAL)
def test_spikingjelly(case):
    neuron, x, v = make(case), currents(T, B, C), potential()
    with execution_policy(neurons="spikingjelly"):
        if "ternary" in case or "integer" in case:
            with pytest.raises(ValueError, match=r"levels='(ternary|integer)'.*binary neurons alone"):
                neuron(x)
            return
        if "box" in case:
            with pytest.raises(ValueError, match=r"surrogate='box': .* has sigmoid and atan alone"):
                neuron(x)
            return
        found = [differentiate(neuron.run, neuron, x, start) for start in (None, v)]
    for (values, grads), start in zip(found, (None, v), strict=True):
        wanted, wanted_grads = differentiate(lambda x, v: reference(case, neuron, x, v), neuron, x, start)
        assert torch.equal(values[0], wanted[0])
        torch.testing.assert_close(values[1], wanted[1])  # it divides by tau
        for grad, expected in zip(grads, wanted_grads, strict=True):
            torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", FORWARD)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["double", "float", "bfloat16"])
def test_native_kernel(case, dtype, event_kernels):
    neuron, x = make(case, dtype), currents(T, B, C, dtype=dtype)
    with torch.no_grad():
        for v in (None, potential(membrane_dtype(x))):
            expected = reference(case, neuron, x, v)
            found = kernels.run(x, neuron.spec(membrane_dtype(x)), v)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("most", [1, 2, 9])
def test_native_kernel_of_any_number_of_spikes(most, event_kernels):
    neuron, x = IntegerLIF(most, v_threshold=0.3), currents(T, B, C, dtype=torch.float32)
    with torch.no_grad():
        expected = neuron.run_reference(x)
        found = kernels.run(x, neuron.spec(torch.float32))
    assert expected[0].max() == most
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("case", DIAGONAL)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("export", ["trace", "script"])
def test_exported_saved_and_loaded(case, export):
    """With other numbers, sizes and numbers of steps than it was exported with, where that can be."""
    neuron = make(case)
    module = torch.jit.script(ScriptedSteps(neuron)) if export == "script" else None
    if export == "trace":
        module = torch.jit.trace(Steps(neuron), (currents(T, B, C, seed=3), potential()), check_trace=False)
    file = io.BytesIO()
    torch.jit.save(module, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    x, v = currents(T, B + 1, C), 0.3 * currents(B + 1, C, seed=5)
    expected = differentiate(lambda x, v: reference(case, neuron, x, v), neuron, x, v)
    assert_same(differentiate(loaded, loaded, x, v), expected)


@pytest.mark.parametrize("case", DIAGONAL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "float"])
def test_steps_in_pieces_equal_one_call(case, dtype, bodies):
    neuron, x, start = make(case, dtype), currents(T, B, C, dtype=dtype), potential(dtype)

    def pieces(*sizes):
        def run(x, v):
            spikes = []
            for part in x.split(list(sizes)):
                out, v = neuron.run(part, v)
                spikes.append(out)
            return torch.cat(spikes), v

        return run

    for backend in ("eager", "compile"):
        with execution_policy(neurons=backend):
            for v in (None, start):
                whole = differentiate(neuron.run, neuron, x, v)
                for sizes in ([1] * T, [2, 3]):
                    assert_same(differentiate(pieces(*sizes), neuron, x, v), whole, dtype)  # values to the bit


@pytest.mark.parametrize("surrogate", ["sigmoid", "atan"])
def test_surrogates(surrogate):
    u = torch.linspace(-2, 2, 41, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(surrogate_primitive(u, surrogate, 3.0).sum(), u)
    torch.testing.assert_close(surrogate_derivative(u.detach(), surrogate, 3.0), grad)


@pytest.mark.parametrize("backend", ["eager", "compile", "spikingjelly"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "half"])
@pytest.mark.parametrize("case", ["plif-hard-decay-detached-sigmoid", "if-soft-whole-attached-atan"])
def test_half_precision_keeps_the_potential_in_float32(case, dtype, backend, bodies):
    neuron, x = make(case, dtype), currents(4, B, 33, dtype=dtype)
    with execution_policy(neurons=backend):
        (spikes, after), grads = differentiate(neuron.run, neuron, x, None)
    single = make(case, torch.float32)
    single.load_state_dict({name: value.float() for name, value in neuron.state_dict().items()})
    (wanted, wanted_after), wanted_grads = differentiate(
        lambda x, v: reference(case, single, x, v), single, x.float(), None
    )
    assert (spikes.dtype, after.dtype) == (dtype, torch.float32)
    assert torch.equal(spikes.float(), wanted)
    torch.testing.assert_close(after, wanted_after)
    assert {grad.dtype for grad in grads} == {dtype}
    # The loss's weights are drawn in each precision, so that gradients are compared by their size.
    assert all(0.5 < g.float().norm() / w.norm() < 2 for g, w in zip(grads, wanted_grads, strict=True))


SHAPES = [(4, 2, 3, 5, 7), (4, 1, 1, 1, 1), (4, 3), (4,), (4, 0, 3), (4, 2, 0, 5, 5), (1, 3, 5), (3, 1, 2)]


@pytest.mark.parametrize("backend", ["eager", "compile", "spikingjelly"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, backend, bodies):
    case = "plif-hard-decay-detached-sigmoid"
    neuron, x = make(case), currents(*shape)
    with execution_policy(neurons=backend):
        found = differentiate(neuron.run, neuron, x, None)
    expected = differentiate(lambda x, v: reference(case, neuron, x, v), neuron, x, None)
    for a, b in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


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
        "flipped": currents(4, 2, 6, 5, 4).flip(0)[..., ::2],
        "expanded channels": currents(4, 2, 1, 5, 4).expand(4, 2, 6, 5, 4),
        "one current for all steps": currents(1, 2, 6, 5, 4).expand(4, 2, 6, 5, 4),
    }
    return [(name, x, name in dense) for name, x in (dense | other).items()]


@pytest.mark.parametrize("backend", ["eager", "compile"])
@pytest.mark.parametrize(("name", "x", "is_dense"), layouts(), ids=[name for name, *_ in layouts()])
def test_memory_layouts(name, x, is_dense, backend, bodies):
    """Of input currents, potential and gradients; results are laid out as the input, one step behind the other."""
    spec = NeuronSpec(0.5, 0.8)
    case = "lif-soft-decay-attached-atan"
    neuron = make(case)
    contiguous, v = x.contiguous(), currents(*x.shape[1:], seed=2).transpose(-1, -2).contiguous().transpose(-1, -2)
    with execution_policy(neurons=backend):
        spikes = integrate_and_fire(x, spec)
        assert torch.equal(spikes, integrate_and_fire(contiguous, spec))
        assert spikes.stride(0) == spikes[0].numel()
        assert not is_dense or spikes.stride() == x.stride()
        found = neuron.run(x, v)
        assert all(torch.equal(a, b) for a, b in zip(found, neuron.run(contiguous, v.contiguous()), strict=True))
        weight = currents(*x.shape, seed=3).movedim(2, -1).contiguous().movedim(-1, 2)
        grads = []
        for given in (x, contiguous):
            leaf = given.detach().requires_grad_()
            out, after = neuron.run(leaf, v)
            grads.append(torch.autograd.grad((out * weight).sum() + after.sum(), leaf)[0])
    torch.testing.assert_close(*grads)
    if name == "one current for all steps" and backend == "compile":
        assert any(key.constant for key in bodies)  # read once, not materialised


@pytest.mark.parametrize("backend", ["eager", "compile"])
def test_nothing_is_saved_but_input_and_potential(backend, bodies):
    x, v = currents(4, 2, 60).requires_grad_(), currents(2, 60)
    spec, kept = NeuronSpec(0.5), []
    with (
        execution_policy(neurons=backend),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t),
    ):
        spikes = integrate_and_fire(x, spec)
        assert kept == [x.data_ptr()]
        run_neurons(x, spec, v)
    assert kept[1:] == [x.data_ptr(), v.data_ptr()]
    spikes.mul_(3.0)  # the result may be modified in place
    with execution_policy(neurons=backend):
        wanted = torch.autograd.grad(integrate_and_fire(x, spec).sum(), x)[0]
    torch.testing.assert_close(torch.autograd.grad(spikes.sum(), x)[0], 3.0 * wanted)


def test_the_backward_pass_runs_on_the_backend_of_its_forward_pass(bodies):
    x = currents(4, 2, 60).requires_grad_()
    with execution_policy(neurons="compile"):
        spikes = integrate_and_fire(x, NeuronSpec(0.5))
    with execution_policy(neurons="eager"):
        spikes.sum().backward()
    assert {key.backward for key in bodies} == {False, True}


@pytest.mark.parametrize("backend", ["eager", "compile"])
@pytest.mark.parametrize("name", ["lif-hard-decay-detached-sigmoid", "ternary-soft-decay-attached-atan"])
def test_second_derivatives(name, backend, bodies):
    """The backward pass is made of differentiable operations, so gradient penalties work."""
    neuron, x, v = make(name), currents(3, 4, 2).requires_grad_(), currents(4, 2, seed=5).requires_grad_()

    def second(run):
        spikes, after = run(x, v)
        grads = torch.autograd.grad(spikes.sum() + after.square().sum(), (x, v), create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), (x, v))

    with execution_policy(neurons=backend):
        found = second(neuron.run)
    for own, wanted in zip(found, second(lambda x, v: reference(name, neuron, x, v)), strict=True):
        torch.testing.assert_close(own, wanted)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("case", ["lif-hard-decay-detached-sigmoid", "ternary-soft-decay-attached-atan", "relu"])
def test_transforms_and_tracers_take_torch_operations(case, bodies):
    neuron, x = make(case), currents(4, 3, 5)
    expected = reference(case, neuron, x)[0]
    negative = reference(case, neuron, -x)[0]
    y = x.clone().requires_grad_()
    wanted = torch.autograd.grad(reference(case, neuron, y)[0].sum(), y)[0]
    for backend in ("compile", "spikingjelly"):
        with execution_policy(neurons=backend):
            assert torch.equal(torch.vmap(neuron, in_dims=1, out_dims=1)(x), expected)
            torch.testing.assert_close(torch.func.grad(lambda x: neuron(x).sum())(x), wanted)
            torch.func.jvp(neuron, (x,), (torch.ones_like(x),))
            assert neuron(x.to("meta")).shape == x.shape
            with torch._subclasses.FakeTensorMode() as mode:
                assert neuron(mode.from_tensor(x)).shape == x.shape
            for tracing_mode in ("real", "fake", "symbolic"):
                assert torch.equal(make_fx(neuron, tracing_mode=tracing_mode)(x)(-x), negative)  # nothing is baked in
    assert not bodies


@pytest.mark.parametrize("v", [torch.zeros(3), torch.zeros(2, 4), torch.zeros(2, 3, device="meta")])
def test_potentials_of_something_else_are_refused(v):
    with pytest.raises(ValueError, match=r"potential v of shape .* must be \[2, 3\]"):
        LIF().run(torch.zeros(4, 2, 3), v)


def test_what_spikingjelly_does_not_have():
    x = currents(4, 3)
    with execution_policy(neurons="spikingjelly"):
        with pytest.raises(ValueError, match="tau=1"):
            LIF(tau=1.0)(x)
        with pytest.raises(ValueError, match="leak=0"):
            integrate_and_fire(x, NeuronSpec(0.0))
