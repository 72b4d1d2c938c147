"""run_with_state: potentials of whole modules as a value. Blocks of every operator: tests/contract."""

import pytest
import torch
from neuron_cases import DIAGONAL, currents, make
from torch import nn

from timm_qkformer.execution import execution_policy
from timm_qkformer.layers import SpikingConv, SpikingMlp
from timm_qkformer.neurons import LIF, run_with_state


@pytest.mark.parametrize("case", DIAGONAL)
def test_a_chain_in_pieces(case):
    module, x = nn.Sequential(make(case), nn.Linear(5, 5, dtype=torch.float64), make(case)), currents(6, 2, 5)
    whole, final = run_with_state(module, x)
    assert torch.equal(whole, module(x))
    assert len(final) == (0 if case == "relu" else 2)
    state, parts = None, []
    for part in x.split([1, 3, 2]):
        y, state = run_with_state(module, part, state=state)
        parts.append(y)
    assert torch.equal(torch.cat(parts), whole)
    assert all(torch.equal(a, b) for a, b in zip(state, final, strict=True))


@pytest.mark.parametrize("packed", [True, False])
def test_units_in_training_mode(packed):
    """With frozen statistics: those of a batch depend on all of its steps."""
    module, x = SpikingMlp(4, 8).double().train(), (torch.rand(6, 2, 4, 3, 3) < 0.5).double()
    for bn in (module.fc1.bn, module.fc2.bn):
        nn.init.constant_(bn.bias, 0.8)
        bn.eval()
    grads = []
    with execution_policy(packed=packed, neurons="eager"):
        for sizes in ([6], [2, 4]):
            module.zero_grad()
            state, parts = None, []
            for part in x.split(sizes):
                y, state = run_with_state(module, part, state=state)
                parts.append(y)
            (torch.cat(parts) * torch.linspace(-1, 1, y[0].numel()).view_as(y[0])).sum().backward()
            grads.append([torch.cat(parts).detach(), *(p.grad.clone() for p in module.parameters())])
    assert 0.05 < grads[0][0].mean() < 0.95
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_potentials_are_single_precision_at_least_and_detachable():
    neuron, x = LIF(), torch.randn(4, 2, 5).bfloat16().requires_grad_()
    _, (v,) = run_with_state(neuron, x)
    assert v.dtype == torch.float32
    assert v.requires_grad
    y, _ = run_with_state(neuron, x, state=(v.detach(),))
    assert y.dtype == torch.bfloat16
    assert torch.equal(neuron(x), run_with_state(neuron, x)[0])  # nothing stays behind


def test_an_error_leaves_no_state_behind():
    with pytest.raises(ZeroDivisionError):
        run_with_state(lambda: 1 // 0)
    x = torch.randn(4, 2, 5)
    assert torch.equal(LIF()(x), run_with_state(LIF(), x)[0])


def two():
    return nn.Sequential(LIF(), LIF())


@pytest.mark.parametrize(
    ("module", "state", "message"),
    [
        (two, [(2, 5)], "the state has 1 potentials and the module more neuron layers"),
        (two, [(2, 5)] * 3, "the state has 3 potentials, the module's neuron layers used 2"),
        (two, [(3, 5)] * 2, r"potential v of shape \[3, 5\]"),
        (lambda: SpikingConv(5, 5, batch_coupled=True), None, "batch_coupled=True"),
    ],
)
def test_other_states_and_modules_are_refused(module, state, message):
    x = torch.randn(4, 2, 5) if state else torch.randn(4, 2, 5, 1, 1)
    with pytest.raises(ValueError, match=message):
        run_with_state(module().eval(), x, state=state and tuple(torch.zeros(shape) for shape in state))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("export", ["compile", "compile in place", "compiled child", "script"])
def test_modules_that_carry_no_state_are_refused(export):
    """Their neurons would silently start from rest at every call."""
    module = two()
    if export == "compile in place":
        module.compile(backend="eager")
    elif export == "script":
        module = torch.jit.script(module)
    else:
        compiled = torch.compile(module, backend="eager")
        module = compiled if export == "compile" else nn.Sequential(LIF(), compiled)
    with pytest.raises(ValueError, match="compiled"):
        run_with_state(module, torch.randn(1, 2, 5))
