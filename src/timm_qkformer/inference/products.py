"""Which convolutions of a deployed model add spikes up, event by event, and which multiply matrices.

Each chooses by what this machine was measured to do faster (`execution.calibration`) for its precision, its kernel, and
the share of its inputs that is not zero: that of images given to `deploy`, or a typical one. It never depends on what
the model is shown later, so that a sample's answer does not depend on others.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..execution.calibration import DENSITIES, BreakEven, Timed, break_even
from ..neurons import NeuronSpec
from .projection import Projection
from .weights import Folded, weights_dtype

TYPICAL_DENSITY = 0.2  # of trained models: 0.1 to 0.4
ALWAYS = BreakEven(float(10**9))
NEVER = BreakEven(0.0)

_BIG = 2**22  # weights of a model from which choices are worth a second of measuring
# Spikes [T, B, H, W, C] that are timed, and C', by the side of the kernel: narrow and large as in early stages, where
# dense products' currents leave the cache before neurons see them, and wide and small as in late ones.
_TIMED = {
    1: (((4, 1, 56, 56, 96), 192), ((4, 1, 14, 14, 768), 768)),
    3: (((4, 1, 56, 56, 96), 192), ((4, 1, 14, 14, 384), 384)),
}


def projections(model: nn.Module) -> dict[str, Projection]:
    """The convolutions of a deployed model's stages, by name."""
    found = model.get_submodule("stages").named_modules()
    return {f"stages.{name}": module for name, module in found if isinstance(module, Projection)}


def choose(model: nn.Module, precision: str, densities: Mapping[str, float] | None = None) -> dict[str, str]:
    """For each convolution "events" or "dense".

    Args:
        model: The deployed model.
        precision: "fp32", "bf16" or "int8".
        densities: Share of each convolution's inputs that is not zero.
    """
    layers = projections(model)
    may_measure = sum(layer.weight.numel() for layer in layers.values()) >= _BIG
    choices = {}
    for name, layer in layers.items():
        density = TYPICAL_DENSITY if densities is None else densities.get(name, TYPICAL_DENSITY)
        even = _break_even(precision, layer.kernel_size, may_measure)
        adds = layer.groups == 1 and even.holds(density, layer.weight[0].numel())
        choices[name] = "events" if adds else "dense"
    return choices


def check_choices(model: nn.Module, choices: Mapping[str, Any]) -> dict[str, str]:
    """Choices as a caller gives them, one for each convolution.

    Raises:
        ValueError: For a name that the model lacks, one that is missing, or a value that is neither.
    """
    names = set(projections(model))
    if set(choices) != names:
        off = sorted(set(map(str, choices)) ^ names)[0]
        raise ValueError(f"products: {off!r} is {'missing' if off in names else 'no convolution of this model'}")
    for name, choice in choices.items():
        if choice not in ("events", "dense"):
            raise ValueError(f'products[{name!r}]={choice!r} must be "events" or "dense"')
    return dict(choices)


def densities(model: Any, images: Tensor) -> dict[str, float]:
    """Share of each convolution's inputs that is not zero while the model, set to "events", sees these images."""
    layers = projections(model)
    for layer in layers.values():
        layer.seen = []
    try:
        model(images)
        return {name: sum(layer.seen) / len(layer.seen) for name, layer in layers.items() if layer.seen}
    finally:
        for layer in layers.values():
            layer.seen = None


def _break_even(precision: str, side: int, may_measure: bool) -> BreakEven:
    typical = NEVER if _has_matrix_unit(precision) else ALWAYS
    if not may_measure or side not in _TIMED:
        return typical
    kind = f"deployed {precision}, {side}x{side}"
    return break_even(kind, typical, lambda: [_timed(*sizes, precision, side) for sizes in _TIMED[side]])


def _has_matrix_unit(precision: str) -> bool:
    """Whether this processor has AMX for a precision."""
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # older torch has none
    return bool(capabilities.get({"bf16": "amx_bf16", "int8": "amx_int8"}.get(precision, "")))


def _timed(shape: tuple[int, ...], outputs: int, precision: str, side: int) -> Timed:
    """A convolution and the neurons behind it, as deployed models run them."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, shape[-1], side, side, dtype=torch.float64, generator=generator)
    noise = torch.rand(shape, generator=generator)
    inputs = [(noise < density).to(torch.uint8) for density in DENSITIES]
    neuron = NeuronSpec(leak=0.5)
    runs = []
    for adds in (True, False):
        layer = Projection([Folded(weight, weight.new_zeros(outputs))], 1, 1, weights_dtype(precision, torch.float32))
        layer.events = adds
        runs.append([partial(layer.fire, x, neuron, torch.uint8) for x in inputs])
    return Timed(weight[0].numel(), runs[0], runs[1][0])
