"""Operations and energy of a spiking network beside those of an ANN of the same architecture.

As the QKFormer paper (arXiv 2403.16552, appendix on energy) and Spikformer (arXiv 2209.15425) have it:

    SOP = rate * T * FLOP        synaptic operations of a layer: additions, one for each spike and connection
    E   = 4.6 pJ * FLOP(first convolution) + 0.9 pJ * sum of SOP
    E   = 4.6 pJ * sum of FLOP   of the ANN

FLOP counts multiply-accumulates (MACs) of one time step, zeros of the padding included; rate is the mean of the
layer's input. 4.6 pJ for a 32-bit floating-point MAC (multiplication 3.7, addition 0.9) and 0.9 pJ for an addition, in
45 nm at 0.9 V, are M. Horowitz's figures ("Computing's energy problem (and what we can do about it)", ISSCC 2014).

What is counted how:

- The first convolution (`SpikingStem`) sees pixels: MACs, once for an image, T times for an event clip. The classifier
  sees means over time and space: MACs, once. MACs also for any other layer whose input is not made of whole numbers.
- Sums of spikes, which shortcuts make, are whole numbers. One of 3 is counted as three additions.
- Batch norm folds into convolutions and is not counted, nor are biases, the neurons' own dynamics, the additions of
  shortcuts, and pooling.
- QKTA and QKCA: every spike of Q is one addition to the attention vector, every spike of K one operation of the mask.
- SSA: K^T V, counted by the rate of K, and Q (K^T V), counted by that of Q. The scale, a power of two, is not.

SOP takes every input for equally connected. Near a border a 3x3 convolution connects it to fewer outputs, a strided 1x1
convolution connects some to none, and K^T V adds only where both spike. `additions` counts what is really added.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..layers import QKTokenAttention, SpikingNeuron, SpikingSelfAttention, SpikingStem
from ..models._hst import HierarchicalSpikingTransformer
from .names import place_of
from .running import Data, bare_model, observe

__all__ = ["AC_PJ", "MAC_PJ", "Energy", "EnergyMeter", "LayerEnergy", "energy"]

MAC_PJ = 4.6  # Horowitz 2014, 45 nm: 32-bit floating-point multiplication 3.7 pJ and addition 0.9 pJ
AC_PJ = 0.9


@dataclass(frozen=True)
class LayerEnergy:
    """One operation of the network, numbers per sample.

    Attributes:
        path: Name of the module.
        operation: "convolution", "linear", "sum of Q", "mask of K", "K^T V" or "Q (K^T V)".
        place: Part of the model, see `SpikeSource`.
        input: "pixels", "means", "real numbers", "spikes" or "spike sums".
        flops: MACs of one time step, which are those of an ANN's layer.
        steps: How often that runs: T for spikes.
        rate: Mean of the input: spikes per element and time step, above 1 possible for sums. None where it is real.
        sops: Synaptic operations, rate * steps * flops; 0 where the input is real.
        additions: Additions that really take place, see the module's first lines.
        macs: MACs, steps * flops; 0 where the input is spikes.
        pj: Energy in picojoules.
    """

    path: str
    operation: str
    place: str
    input: str
    flops: int
    steps: int
    rate: Optional[float]
    sops: float
    additions: float
    macs: int
    pj: float


@dataclass(frozen=True)
class Energy:
    """Operations and energy of one sample, on average over the data.

    Attributes:
        layers: Operations in the order in which they run.
        samples: Samples measured.
        input_shape: Of a sample: [C, H, W], or [T, C, H, W] for event clips.
        flops: MACs of an ANN of the same architecture.
        macs: MACs of the spiking network, in its layers with real inputs.
        sops: Synaptic operations.
        additions: Additions that really take place.
        pj: Energy of the spiking network in picojoules.
        ann_pj: Energy of the ANN.
        mac_pj, ac_pj: Energy of a MAC and of an addition.
    """

    layers: tuple[LayerEnergy, ...]
    samples: int
    input_shape: tuple[int, ...]
    flops: int
    macs: int
    sops: float
    additions: float
    pj: float
    ann_pj: float
    mac_pj: float
    ac_pj: float

    def __getitem__(self, key: tuple[str, str]) -> LayerEnergy:
        """The operation of this module name and kind."""
        for layer in self.layers:
            if (layer.path, layer.operation) == key:
                return layer
        raise KeyError(f"no operation {key!r}; there are {[(layer.path, layer.operation) for layer in self.layers]}")

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the attributes, layers as a list of their attributes."""
        return asdict(self)


def energy(model: nn.Module, data: Data, mac_pj: float = MAC_PJ, ac_pj: float = AC_PJ) -> Energy:
    """Count a model's operations over a data set and what energy they take, see the module's first lines.

    The model runs as in `firing_rates`.

    Args:
        model: A model made of this package's layers, convolutions, linear layers and batch norm.
        data: Images or event clips, see `firing_rates`.
        mac_pj: Energy of a multiply-accumulate in picojoules.
        ac_pj: Energy of an addition.

    Raises:
        ValueError: As `firing_rates`, and for layers that this module does not know how to count.
    """
    for name, cost in (("mac_pj", mac_pj), ("ac_pj", ac_pj)):
        if not (isfinite(cost) and cost >= 0):
            raise ValueError(f"{name}={cost} must be a finite number of picojoules, not negative")
    model = bare_model(model)
    meter = EnergyMeter()
    samples, shape = observe(model, data, [meter])
    return meter.result(samples, shape, mac_pj, ac_pj)


@dataclass
class _Operation:
    """Counts of one operation over the samples, in whole numbers where its input is."""

    path: str
    name: str
    flops: int
    steps: int
    elements: int  # of the input, at one time step
    real: str = ""  # what the input is if it is never spikes
    total: int = 0
    additions: int = 0
    largest: float = 0.0

    def result(self, samples: int, mac_pj: float, ac_pj: float) -> LayerEnergy:
        place = place_of(self.path)[0]
        if self.real:
            macs = self.steps * self.flops
            return LayerEnergy(
                self.path, self.name, place, self.real, self.flops, self.steps, None, 0.0, 0.0, macs, macs * mac_pj
            )
        rate = self.total / (samples * self.steps * self.elements)
        sops = rate * self.steps * self.flops
        spikes = "spike sums" if self.largest > 1 else "spikes"
        additions = self.additions / samples
        return LayerEnergy(
            self.path, self.name, place, spikes, self.flops, self.steps, rate, sops, additions, 0, sops * ac_pj
        )


class EnergyMeter:
    """An instrument for `observe` that counts operations."""

    def __init__(self) -> None:
        self._operations: dict[tuple[str, str], _Operation] = {}
        self._seen: set[tuple[str, str]] = set()
        self._keys: dict[str, Tensor] = {}  # of SSA, until its values fire

    def attach(self, model: nn.Module) -> Iterator[RemovableHandle]:
        real = _real_inputs(model)
        for path, module in model.named_modules():
            if isinstance(module, nn.Conv2d):
                yield module.register_forward_pre_hook(self._conv_hook(path, real.get(module, "")))
            elif isinstance(module, nn.Linear):
                yield module.register_forward_pre_hook(self._linear_hook(path, real.get(module, "")))
            elif isinstance(module, (QKTokenAttention, SpikingSelfAttention)):
                yield from self._attend(path, module)
            else:
                _check_known(path, module)

    def end_sample(self) -> None:
        self._seen.clear()
        self._keys.clear()

    def result(self, samples: int, shape: list[int], mac_pj: float, ac_pj: float) -> Energy:
        layers = tuple(operation.result(samples, mac_pj, ac_pj) for operation in self._operations.values())
        flops = sum(layer.flops for layer in layers)
        return Energy(
            layers,
            samples,
            tuple(shape),
            flops,
            sum(layer.macs for layer in layers),
            sum(layer.sops for layer in layers),
            sum(layer.additions for layer in layers),
            sum(layer.pj for layer in layers),
            flops * mac_pj,
            mac_pj,
            ac_pj,
        )

    def _operation(self, path: str, name: str, flops: int, steps: int, elements: int, real: str = "") -> _Operation:
        key = (path, name)
        if key in self._seen:
            raise ValueError(f"{path} runs more than once in a forward pass, its energy would be ambiguous")
        self._seen.add(key)
        if key not in self._operations:
            self._operations[key] = _Operation(path, name, flops, steps, elements, real)
        return self._operations[key]

    def _conv_hook(self, path: str, real: str) -> Callable[..., None]:
        def hook(conv: nn.Conv2d, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach()
            fan_out = [_fan_out(path, conv, dim, x.shape[2 + dim]) for dim in range(2)]
            outputs = [_outputs(conv, dim, x.shape[2 + dim]) for dim in range(2)]
            positions = outputs[0] * outputs[1] * conv.kernel_size[0] * conv.kernel_size[1]
            flops = conv.out_channels * conv.in_channels // conv.groups * positions
            operation = self._operation(path, "convolution", flops, len(x), x[0].numel(), real)
            if not operation.real and _count(operation, x):
                at = x.sum((0, 1), dtype=torch.float64).cpu()
                reached = (fan_out[0] @ at @ fan_out[1]).item()
                operation.additions += round(reached) * (conv.out_channels // conv.groups)

        return hook

    def _linear_hook(self, path: str, real: str) -> Callable[..., None]:
        def hook(linear: nn.Linear, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach()
            flops = x[0].numel() * linear.out_features
            operation = self._operation(path, "linear", flops, len(x), x[0].numel(), real)
            if not operation.real and _count(operation, x):
                operation.additions += _whole_sum(x) * linear.out_features

        return hook

    def _attend(self, path: str, attention: Any) -> Iterator[RemovableHandle]:
        """Hooks on the Q, K and V of an attention, spikes [T, 1, C, H, W]."""
        head_dim: int = attention.head_dim

        def tokens(x: Tensor) -> Tensor:
            """Spikes of each head's tokens [T, 1, heads, tokens]."""
            return attention.split_heads(x).sum(3, dtype=torch.float64)

        def counter(name: str, fan_out: int) -> Callable[..., None]:
            def hook(_module: nn.Module, _inputs: Any, x: Tensor) -> None:
                elements = x[0].numel()
                operation = self._operation(path, name, elements * fan_out, len(x), elements)
                if _count(operation, x):
                    operation.additions += _whole_sum(x) * fan_out

            return hook

        def keys(_module: nn.Module, _inputs: Any, x: Tensor) -> None:
            operation = self._operation(path, "K^T V", x[0].numel() * head_dim, len(x), x[0].numel())
            if _count(operation, x):
                self._keys[path] = tokens(x)

        def values(_module: nn.Module, _inputs: Any, x: Tensor) -> None:
            if path in self._keys:
                both = (self._keys.pop(path) * tokens(x)).sum()
                self._operations[path, "K^T V"].additions += round(both.item())

        if isinstance(attention, QKTokenAttention):
            yield attention.q.register_forward_hook(counter("sum of Q", 1))
            yield attention.k.register_forward_hook(counter("mask of K", 1))
        else:
            yield attention.q.register_forward_hook(counter("Q (K^T V)", head_dim))
            yield attention.k.register_forward_hook(keys)
            yield attention.v.register_forward_hook(values)


def _real_inputs(model: nn.Module) -> dict[nn.Module, str]:
    """Layers that never see spikes, and what they see."""
    real: dict[nn.Module, str] = {}
    for module in model.modules():
        if isinstance(module, SpikingStem):
            real[module.conv] = "pixels"
        elif isinstance(module, HierarchicalSpikingTransformer):
            real[module.get_classifier()] = "means"
    return real


def _check_known(path: str, module: nn.Module) -> None:
    known = (SpikingNeuron, nn.modules.batchnorm._BatchNorm)
    if next(module.parameters(recurse=False), None) is not None and not isinstance(module, known):
        raise ValueError(
            f"{path} is a {type(module).__name__}: energy counts convolutions (Conv2d), linear layers, batch norm and "
            "this package's layers, and leaves nothing out silently"
        )


def _count(operation: _Operation, x: Tensor) -> bool:
    """Add a sample's spikes; False, and from now on real, if they are no whole numbers."""
    low, high = (bound.item() for bound in torch.aminmax(x))
    if low < 0 or not torch.equal(x, x.round()):
        operation.real = "real numbers"
        return False
    operation.total += _whole_sum(x)
    operation.largest = max(operation.largest, high)
    return True


def _whole_sum(x: Tensor) -> int:
    return round(x.sum(dtype=torch.float64).item())


def _outputs(conv: nn.Conv2d, dim: int, size: int) -> int:
    """Side of a convolution's output."""
    reach = conv.dilation[dim] * (conv.kernel_size[dim] - 1) + 1
    return (size + 2 * int(conv.padding[dim]) - reach) // conv.stride[dim] + 1


def _fan_out(path: str, conv: nn.Conv2d, dim: int, size: int) -> Tensor:
    """How many outputs each place along a dimension of the input is connected to: float64 [size]."""
    if isinstance(conv.padding, str) or conv.padding_mode != "zeros":
        raise ValueError(
            f"{path} has padding={conv.padding!r} and padding_mode={conv.padding_mode!r}; energy knows padding by a "
            "number of zeros"
        )
    first = torch.arange(_outputs(conv, dim, size)) * conv.stride[dim] - conv.padding[dim]
    taps = torch.arange(conv.kernel_size[dim]) * conv.dilation[dim]
    places = (first[:, None] + taps).flatten()
    inside = places[(places >= 0) & (places < size)]
    return torch.bincount(inside, minlength=size).double()
