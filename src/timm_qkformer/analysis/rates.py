"""Firing rates: how often neurons fire, by layer and time step, over a data set.

A layer's rate for one sample and time step is the share of its neurons that fire; of neurons that may fire several
times in a step (`max_spikes`), the share of the spikes that there could be. Reported are mean and standard
deviation of that over the samples. A layer that runs several times in a forward pass (a stage with feedback runs twice,
some neurons step by step) has the steps of all its runs, one run after the other. Spikes are counted in whole numbers,
so the result depends neither on the order of the samples nor on how they are batched, and nothing is kept but the
counts.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from math import prod, sqrt
from typing import Any

import torch
from torch import Tensor, nn

from ..neurons import SpikingNeuron
from .hooks import Data, Watch, bare_model, run_samples
from .names import SpikeLayer, spike_layers
from .notebook import html_table

# As published for HST-10-768 on ImageNet-1k at 224 px (arXiv 2403.16552, table of firing rates in QKFormer blocks), by
# name and stage. The blocks of stage 3 are not in the table.
PAPER_RATES: dict[str, dict[int, float]] = {
    "Q": {1: 0.0432, 2: 0.0231},
    "K": {1: 0.1784, 2: 0.0847},
    "A_t": {1: 0.3477, 2: 0.2655},
    "X'": {1: 0.0832, 2: 0.0350},
    "X''": {1: 0.1478, 2: 0.0577},
    "SMLP layer 1": {1: 0.0518, 2: 0.0246},
    "SMLP layer 2": {1: 0.2733, 2: 0.1869},
}


@dataclass(frozen=True)
class LayerRates(SpikeLayer):
    """How often one layer fires."""

    neurons: int  # neurons of the layer, for one sample
    channels: int  # its channels; heads for a mask of tokens
    mean: float  # spikes per neuron and time step, between 0 and 1: over `max_spikes` where that is not 1
    std: float  # standard deviation over the samples (population; 0 for one sample) of each one's mean over time
    step_means: tuple[float, ...]  # mean at each of the T time steps
    step_stds: tuple[float, ...]  # standard deviation over the samples at each time step
    dead: tuple[int, ...]  # channels that never fired, anywhere, for any sample
    saturated: tuple[int, ...]  # channels that fired everywhere, as often as they could, for all samples


@dataclass(frozen=True, repr=False)
class FiringRates:
    """Firing rates of a model's layers, in the order in which they fire."""

    layers: tuple[LayerRates, ...]  # neuron layers and, where the paper has it, X'
    samples: int  # samples measured
    input_shape: tuple[int, ...]  # of a sample: [C, H, W], or [T, C, H, W] for event clips
    time_steps: int  # time steps T
    mean: float = field(init=False)  # spikes per neuron and time step, of all neurons of the model

    def __post_init__(self) -> None:
        neurons = [layer for layer in self.layers if layer.is_neuron]
        fired = sum(layer.mean * layer.neurons for layer in neurons)
        object.__setattr__(self, "mean", fired / sum(layer.neurons for layer in neurons))

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.input_shape))
        return (
            f"FiringRates(mean {self.mean:.4f} of {len(self.layers)} layers, {self.samples} samples of {shape}, "
            f"T = {self.time_steps})"
        )

    def _repr_html_(self) -> str:
        rows = [(layer.path, layer.name, f"{layer.mean:.4f}", f"{layer.std:.4f}") for layer in self.layers]
        return html_table(repr(self), ("layer", "name", "rate", "standard deviation"), rows)

    def __getitem__(self, path: str) -> LayerRates:
        """The neuron layer of this module name; "....attn.proj" for an X' that no neuron fires."""
        for layer in self.layers:
            if layer.path == path:
                return layer
        raise KeyError(f"no layer {path!r}; there are {', '.join(layer.path for layer in self.layers)}")

    def by_stage(self) -> dict[str, dict[int, float]]:
        """The paper's table: for each name, such as "Q", the mean rate of a stage's blocks by the stage's number."""
        found: dict[str, dict[int, list[float]]] = {}
        for layer in self.layers:
            if layer.stage is not None and layer.block is not None:
                found.setdefault(layer.name, {}).setdefault(layer.stage, []).append(layer.mean)
        return {
            name: {stage: sum(rates) / len(rates) for stage, rates in stages.items()} for name, stages in found.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the attributes, layers as a list of their attributes."""
        return asdict(self)


def firing_rates(model: nn.Module, data: Data) -> FiringRates:
    """Measure the firing rates of all neuron layers over a data set.

    The model runs in eval mode, without gradients, one sample after the other, and comes out as it went in. What
    torch.compile made of it is bypassed, since compiled code skips hooks; wrappers such as DistributedDataParallel are
    looked through.

    Args:
        model: Any model with neurons of this package.
        data: Images [B, C, H, W] or event clips [B, T, C, H, W], prepared as for the model: a tensor, or an iterable
            such as a data loader of tensors or of (input, target) pairs. One pass is made; memory does not grow.

    Raises:
        ValueError: For a model without neurons that can be watched or with weights that are not finite, no samples,
            samples of unequal shape, or values that are not finite.
    """
    model = bare_model(model)
    meter = RateMeter()
    return meter.result(*run_samples(model, data, [meter]))


class RateMeter:
    """An instrument for `run_samples` that counts spikes."""

    def __init__(self) -> None:
        self._sample: dict[SpikeLayer, tuple[Tensor, int, int]] = {}
        self._counts: dict[SpikeLayer, _Counts] = {}

    def watches(self, model: nn.Module) -> Iterator[Watch]:
        """Which modules to hook: neurons, and operators whose result fires."""
        for layer, channel_dims in spike_layers(model).items():
            neuron = model.get_submodule(layer.path)
            most = neuron.max_spikes if isinstance(neuron, SpikingNeuron) else 1
            yield Watch(layer.path, partial(self._count, layer, channel_dims, most), is_input=not layer.is_neuron)

    def _count(self, layer: SpikeLayer, channel_dims: int, most: int, spikes: Tensor) -> None:
        channels = prod(spikes.shape[2 : 2 + channel_dims])
        flat = spikes.reshape(len(spikes), channels, -1)  # of a batch of one: [T, channels, positions]
        fired = torch.count_nonzero(flat, dim=2) if most == 1 else flat.sum(2, dtype=torch.float64).long()
        if layer in self._sample:
            fired = torch.cat([self._sample[layer][0], fired])
        self._sample[layer] = (fired, flat.shape[2], most)

    def end_sample(self) -> None:
        """A sample has passed through the model."""
        for layer, (fired, positions, most) in self._sample.items():
            if layer not in self._counts:
                self._counts[layer] = _Counts(fired.shape[0], fired.shape[1], positions, most)
            self._counts[layer].add(fired.cpu())
        self._sample.clear()

    def result(self, samples: int, shape: list[int]) -> FiringRates:
        """Firing rates of all samples so far."""
        layers = tuple(counts.result(layer, samples) for layer, counts in self._counts.items())
        return FiringRates(layers, samples, tuple(shape), len(layers[0].step_means))


class _Counts:
    """Spikes of a layer over the samples, in whole numbers."""

    def __init__(self, time_steps: int, channels: int, positions: int, most: int) -> None:
        self.positions = positions
        self.most = most  # spikes of a neuron in a step
        self.per_channel = torch.zeros(channels, dtype=torch.int64)
        # Python's integers do not overflow. The last entry is that of all steps together.
        self.sums = [0] * (time_steps + 1)
        self.squares = [0] * (time_steps + 1)

    def add(self, fired: Tensor) -> None:
        """Spikes of one sample [T, channels]."""
        self.per_channel += fired.sum(0)
        steps = fired.sum(1).tolist()
        for t, count in enumerate([*steps, sum(steps)]):
            self.sums[t] += count
            self.squares[t] += count * count

    def result(self, layer: SpikeLayer, samples: int) -> LayerRates:
        time_steps = len(self.sums) - 1
        neurons = len(self.per_channel) * self.positions
        means, stds = [], []
        for t, (total, squares) in enumerate(zip(self.sums, self.squares, strict=True)):
            size = neurons * self.most * (time_steps if t == time_steps else 1)
            means.append(total / (samples * size))
            # The variance times samples^2 is a whole number: nothing cancels.
            stds.append(sqrt(samples * squares - total * total) / (samples * size))
        full = samples * time_steps * self.positions * self.most
        return LayerRates(
            **vars(layer),
            neurons=neurons,
            channels=len(self.per_channel),
            mean=means.pop(),
            std=stds.pop(),
            step_means=tuple(means),
            step_stds=tuple(stds),
            dead=tuple((self.per_channel == 0).nonzero().flatten().tolist()),
            saturated=tuple((self.per_channel == full).nonzero().flatten().tolist()),
        )
