"""Operations and energy of a spiking network beside those of an ANN of the same architecture.

As the QKFormer paper (arXiv 2403.16552, appendix on energy) and Spikformer (arXiv 2209.15425) have it:

    SOP = rate * T * FLOP        synaptic operations of a layer: additions, one for each spike and connection
    E   = 4.6 pJ * FLOP(first convolution) + 0.9 pJ * sum of SOP
    E   = 4.6 pJ * sum of FLOP   of the ANN

FLOP counts multiply-accumulates (MACs) of one time step, zeros of the padding included; rate is the mean of the
layer's input. 4.6 pJ for a 32-bit floating-point MAC (multiplication 3.7, addition 0.9) and 0.9 pJ for an addition, in
45 nm at 0.9 V, are M. Horowitz's figures ("Computing's energy problem (and what we can do about it)", ISSCC 2014).

Convolutions and linear layers are counted here; operators (attention) declare an `Operation` for each thing that they
do with their inputs. Layers whose input is not whole numbers do MACs: the first convolution sees pixels, the classifier
means over time and space. A sum of three spikes counts as three additions, a negative spike as one. `additions` counts
what is really added, where borders, strides and K^T V leave some out. docs/analysis.md has the details.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import Feedback, SpikingBlock, SpikingStem
from ..models import SpikingTransformer
from ..neurons import SpikingNeuron
from ..operators import Operator
from .hooks import Data, Watch, bare_model, run_samples
from .names import operator_layers, place_of
from .notebook import html_table

MAC_PJ = 4.6  # Horowitz 2014, 45 nm: 32-bit floating-point multiplication 3.7 pJ and addition 0.9 pJ
AC_PJ = 0.9


@dataclass(frozen=True)
class LayerEnergy:
    """One operation of the network, numbers per sample."""

    path: str  # name of the module
    operation: str  # "convolution", "linear", or what an operator declares, such as "sum of Q"
    place: str  # part of the model, see `SpikeLayer`
    input: str  # "pixels", "means", "real numbers", "spikes" or "spike sums"
    flops: int  # MACs of one time step, which are those of an ANN's layer; of both passes with feedback
    steps: int  # how often that runs: T for spikes
    # mean of the input: spikes per element and time step, above 1 possible for sums. None where it is real
    rate: float | None
    sops: float  # synaptic operations, rate * steps * flops; 0 where the input is real
    additions: float  # additions that really take place, see the module's first lines
    macs: int  # MACs, steps * flops; 0 where the input is spikes
    pj: float  # energy in picojoules


@dataclass(frozen=True, repr=False)
class Energy:
    """Operations and energy of one sample, on average over the data."""

    layers: tuple[LayerEnergy, ...]  # operations in the order in which they run
    samples: int  # samples measured
    input_shape: tuple[int, ...]  # of a sample: [C, H, W], or [T, C, H, W] for event clips
    mac_pj: float  # energy of a MAC
    ac_pj: float  # of an addition
    flops: int = field(init=False)  # MACs of an ANN of the same architecture
    macs: int = field(init=False)  # MACs of the spiking network, in its layers with real inputs
    sops: float = field(init=False)  # synaptic operations
    additions: float = field(init=False)  # additions that really take place
    pj: float = field(init=False)  # energy of the spiking network in picojoules
    ann_pj: float = field(init=False)  # energy of the ANN

    def __post_init__(self) -> None:
        for total in ("flops", "macs", "sops", "additions", "pj"):
            object.__setattr__(self, total, sum(getattr(layer, total) for layer in self.layers))
        object.__setattr__(self, "ann_pj", self.flops * self.mac_pj)

    def __repr__(self) -> str:
        return (
            f"Energy({self.pj * 1e-9:.4g} mJ, {self.sops / 1e9:.4g} G SOP and {self.macs / 1e9:.4g} G MAC in "
            f"{len(self.layers)} operations; as an ANN {self.ann_pj * 1e-9:.4g} mJ)"
        )

    def _repr_html_(self) -> str:
        largest = sorted(self.layers, key=lambda layer: layer.pj, reverse=True)
        rows = [(e.path, e.operation, f"{e.sops / 1e6:.4g}", f"{e.pj * 1e-6:.4g}") for e in largest]
        return html_table(repr(self), ("layer", "operation", "10^6 SOP", "microjoules"), rows)

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
        ValueError: As `firing_rates`, and for layers that this module does not know how to count or operators that do
            not declare their operations.
    """
    for name, cost in (("mac_pj", mac_pj), ("ac_pj", ac_pj)):
        if not (isfinite(cost) and cost >= 0):
            raise ValueError(f"{name}={cost} must be a finite number of picojoules, not negative")
    model = bare_model(model)
    meter = EnergyMeter()
    return meter.result(*run_samples(model, data, [meter]), mac_pj, ac_pj)


@dataclass
class _Counts:
    """Counts of one operation over the samples, in whole numbers where its input is."""

    path: str
    operation: str
    flops: int  # of one time step
    elements: int  # of the input, at one time step
    real: str  # what the input is if it is never spikes
    steps: int = 0  # over all samples
    longest: int = 0  # run
    total: int = 0
    additions: int = 0
    largest: float = 0.0

    def add(self, x: Tensor, additions: Callable[[], int]) -> None:
        """A sample's input and, if it is whole numbers, its additions; if not, the operation is MACs from now on."""
        self.steps += len(x)
        self.longest = max(self.longest, len(x))
        if self.real:
            return
        largest = x.abs().max().item()
        if not torch.equal(x, x.round()) or largest > 2**24:  # from there on, all numbers are whole in float32
            self.real = "real numbers"
            return
        self.total += _whole_sum(x)
        self.additions += additions()
        self.largest = max(self.largest, largest)

    def result(self, samples: int, time_steps: int, mac_pj: float, ac_pj: float) -> LayerEnergy:
        """`time_steps`: T of the whole network, so that a layer that runs twice has two passes and not 2 T steps."""
        common = (self.path, self.operation, place_of(self.path)[0])
        passes = -(-self.steps // (samples * time_steps))
        flops, steps = passes * self.flops, self.steps // (samples * passes)
        if self.real:
            macs = steps * flops
            return LayerEnergy(*common, self.real, flops, steps, None, 0.0, 0.0, macs, macs * mac_pj)
        rate = self.total / (self.steps * self.elements)
        sops = rate * steps * flops
        spikes = "spike sums" if self.largest > 1 else "spikes"
        additions = self.additions / samples
        return LayerEnergy(*common, spikes, flops, steps, rate, sops, additions, 0, sops * ac_pj)


class EnergyMeter:
    """An instrument for `run_samples` that counts operations."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str], _Counts] = {}
        self._inputs: dict[str, dict[str, Tensor]] = {}  # of operators, until all of them are there

    def watches(self, model: nn.Module) -> Iterator[Watch]:
        """Which modules to hook: those that cost something."""
        real = _real_inputs(model)
        operators = operator_layers(model)
        inner = {f"{path}.{name}" for path, operator in operators.items() for name in operator.inner_modules()}
        for path, module in model.named_modules():
            if isinstance(module, nn.Conv2d):
                yield Watch(path, partial(self._convolve, path, module, real.get(module, "")), is_input=True)
            elif isinstance(module, nn.Linear):
                yield Watch(path, partial(self._multiply, path, module, real.get(module, "")), is_input=True)
            elif path in operators:
                for name in module.inputs:
                    yield Watch(f"{path}.{name}", partial(self._attend, path, module, name))
            elif isinstance(module, Feedback):
                yield Watch(path, partial(self._choose, path), is_input=True)
            elif path not in inner:  # operators declare what theirs do
                _check_known(path, module)

    def end_sample(self) -> None:
        """A sample has passed through the model."""
        self._inputs.clear()

    def result(self, samples: int, shape: list[int], mac_pj: float, ac_pj: float) -> Energy:
        """Operations and energy a sample, of all samples so far."""
        time_steps = max((counts.longest for counts in self._counts.values()), default=1)
        layers = tuple(counts.result(samples, time_steps, mac_pj, ac_pj) for counts in self._counts.values())
        return Energy(layers, samples, tuple(shape), mac_pj, ac_pj)

    def _count(
        self, path: str, operation: str, x: Tensor, flops: int, additions: Callable[[], int], real: str = ""
    ) -> None:
        key = (path, operation)
        if key not in self._counts:
            self._counts[key] = _Counts(path, operation, flops, x[0].numel(), real)
        self._counts[key].add(x, additions)

    def _convolve(self, path: str, conv: nn.Conv2d, real: str, x: Tensor) -> None:
        height, width = (_fan_out(path, conv, dim, x.shape[2 + dim]) for dim in range(2))
        positions = _outputs(conv, 0, x.shape[2]) * _outputs(conv, 1, x.shape[3])
        flops = conv.weight.numel() * positions

        def additions() -> int:
            at = x.abs().sum((0, 1), dtype=torch.float64).cpu()
            return round((height @ at @ width).item()) * (conv.out_channels // conv.groups)

        self._count(path, "convolution", x, flops, additions, real)

    def _multiply(self, path: str, linear: nn.Linear, real: str, x: Tensor) -> None:
        flops = x[0].numel() * linear.out_features
        self._count(path, "linear", x, flops, lambda: _whole_sum(x) * linear.out_features, real)

    def _choose(self, path: str, z: Tensor) -> None:
        """Feedback: two dot products with prompts, a norm and a weighted sum for each token."""
        self._count(path, "choice of tokens", z, 4 * z[0].numel(), lambda: 0, "real numbers")

    def _attend(self, path: str, operator: Operator, name: str, x: Tensor) -> None:
        """An input of an operator [T, 1, C, H, W]; with the last of them, what the operator does with all."""
        inputs = self._inputs.setdefault(path, {})
        inputs[name] = operator.split_input(name, x)
        if len(inputs) < len(operator.inputs):
            return
        tensors = [inputs[name] for name in operator.inputs]
        inputs.clear()
        for name, tensor, fan_out, additions in _operations(path, operator, tensors, operator.map_size(*x.shape[3:])):
            total = partial(int, additions) if additions is not None else lambda t=tensor, n=fan_out: _whole_sum(t) * n
            self._count(path, name, tensor, tensor[0].numel() * fan_out, total)


def _operations(path: str, operator: Operator, inputs: list[Tensor], size: tuple[int, ...]) -> Any:
    try:
        operations = operator.operations(*inputs, *size)
    except NotImplementedError:
        operations = []
    if not operations:
        raise ValueError(
            f"{path} is a {type(operator).__name__}, which declares no operations: energy leaves nothing out silently"
        )
    return operations


def _real_inputs(model: nn.Module) -> dict[nn.Module, str]:
    """Layers that never see spikes, and what they see."""
    real: dict[nn.Module, str] = {}
    for module in model.modules():
        if isinstance(module, SpikingStem):
            real[module.conv] = "pixels"
        elif isinstance(module, SpikingTransformer):
            real[module.get_classifier()] = "means"
    return real


def _check_known(path: str, module: nn.Module) -> None:
    if isinstance(module, SpikingBlock):
        for mixer in (module.attn, *(branch.mixer for branch in module.more)):
            if not isinstance(mixer, Operator):
                raise ValueError(
                    f"{path} has a {type(mixer).__name__}, no Operator: what it costs is not declared, and energy "
                    "leaves nothing out silently"
                )
    known = (SpikingNeuron, nn.modules.batchnorm._BatchNorm)
    if next(module.parameters(recurse=False), None) is not None and not isinstance(module, known):
        raise ValueError(
            f"{path} is a {type(module).__name__}: energy counts convolutions (Conv2d), linear layers, batch norm and "
            "this package's layers, and leaves nothing out silently"
        )


def _whole_sum(x: Tensor) -> int:
    return round(x.abs().sum(dtype=torch.float64).item())


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
