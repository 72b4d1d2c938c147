"""All neurons with all of their options, and the written-out recurrence that every way to run them answers to."""

import itertools
from functools import partial

import torch
from torch import Tensor

from timm_qkformer.neurons import IF, LIF, IntegerLIF, ParametricLIF, ReLUNeuron, integrate_and_fire_reference

T, B, C = 5, 3, 7
TAU, THRESHOLD, MAX_SPIKES = 1.7, 0.8, 3


class TernaryLIF(LIF):
    levels = "ternary"


class TernaryPLIF(ParametricLIF):
    levels = "ternary"


LAYERS = {
    "lif": partial(LIF, TAU),
    "if": IF,
    "plif": partial(ParametricLIF, TAU),
    "ternary": partial(TernaryLIF, TAU),
    "ternary plif": partial(TernaryPLIF, TAU),
    "integer": partial(IntegerLIF, MAX_SPIKES, TAU),
    "relu": ReLUNeuron,
}
RESETS = {"hard": 0.0, "shifted": -0.3, "soft": None}


def _cases():
    for kind in LAYERS:
        for reset, decay, detach, surrogate in itertools.product(
            RESETS, (True, False), (True, False), ("sigmoid", "atan", "box")
        ):
            options = {"v_reset": RESETS[reset], "detach_reset": detach, "surrogate": surrogate}
            name = f"{kind}-{reset}-{'decay' if decay else 'whole'}-{'detached' if detach else 'attached'}-{surrogate}"
            if kind != "if":
                options["decay_input"] = decay
            elif decay:
                continue
            yield ("relu", (kind, {})) if kind == "relu" else (name, (kind, options))


CASES: dict[str, tuple[str, dict]] = dict(_cases())
FORWARD = [case for case in CASES if case.endswith(("detached-sigmoid", "relu"))]  # each forward pass
_EACH_OPTION = ("detached-sigmoid", "attached-atan", "detached-box", "relu")
DIAGONAL = [case for case in CASES if case.endswith(_EACH_OPTION)]


def make(case: str, dtype: torch.dtype = torch.float64):
    kind, options = CASES[case]
    return LAYERS[kind](v_threshold=THRESHOLD, dtype=dtype, **options)


def reference(case: str, neuron, x: Tensor, v: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Spikes and potential, with every argument spelled out here."""
    kind, options = CASES[case]
    if kind == "relu":
        return torch.relu(x), x.new_empty(0)
    learned = "plif" in kind
    leak = 0.0 if kind == "if" else 1 / TAU
    return integrate_and_fire_reference(
        x,
        torch.sigmoid(neuron.w.to(torch.promote_types(x.dtype, torch.float32))).squeeze(0)
        if learned
        else torch.tensor(leak, dtype=torch.float64),
        THRESHOLD - (options["v_reset"] or 0.0),
        soft_reset=options["v_reset"] is None,
        decay_input=options.get("decay_input", False),
        levels=next((levels for levels in ("ternary", "integer") if levels in kind), "binary"),
        detach_reset=options["detach_reset"],
        surrogate=options["surrogate"],
        alpha={"sigmoid": 4.0, "atan": 2.0, "box": 1 / THRESHOLD if kind == "integer" else 1.0}[options["surrogate"]],
        max_spikes=MAX_SPIKES if kind == "integer" else 1,
        v=v,
    )


def currents(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Input currents that drive neurons over either threshold now and then."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, dtype=torch.float64, generator=generator) * 1.5 + 0.4).to(dtype)


def differentiate(run, neuron, x: Tensor, v: Tensor | None) -> tuple[list[Tensor], list[Tensor | None]]:
    """[spikes, potential] of `run(x, v)`, and the gradients of x, v and the neuron's parameters."""
    x = x.detach().clone().requires_grad_()
    v = None if v is None else v.detach().clone().requires_grad_()
    results = run(x, v)
    weights = torch.Generator().manual_seed(7)
    loss = sum((y * torch.randn(y.shape, dtype=y.dtype, generator=weights).to(y.device)).sum() for y in results)
    inputs = [x, *([] if v is None else [v]), *neuron.parameters()]
    grads = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [y.detach() for y in results], list(grads)


def assert_same(found, expected, dtype: torch.dtype = torch.float64) -> None:
    """Spikes and potentials to the bit, gradients to rounding."""
    assert [y.dtype for y in found[0]] == [y.dtype for y in expected[0]]
    assert all(torch.equal(a, b) for a, b in zip(found[0], expected[0], strict=True))
    for grad, wanted in zip(found[1], expected[1], strict=True):
        assert (grad is None) == (wanted is None)
        if grad is not None:
            torch.testing.assert_close(grad, wanted, **TOLERANCE[dtype])


TOLERANCE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-12},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-3},
    torch.float16: {"rtol": 2e-3, "atol": 2e-4},
}
