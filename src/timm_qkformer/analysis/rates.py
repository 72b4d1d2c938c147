"""Firing rates: how often neurons fire, by layer and time step, over a data set.

A layer's rate for one sample and time step is the share of its neurons that fire. Reported are mean and standard
deviation of that over the samples. Spikes are counted in whole numbers, so the result depends neither on the order of
the samples nor on how they are batched, and nothing is kept but the counts.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from math import prod, sqrt
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .names import SpikeSource, spike_sources
from .running import Data, bare_model, observe

__all__ = ["PAPER_RATES", "FiringRates", "LayerRates", "RateMeter", "firing_rates"]

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
class LayerRates:
    """How often one layer fires.

    Attributes:
        path, name, place, stage, block, is_neuron: See `SpikeSource`.
        neurons: Neurons of the layer, for one sample.
        channels: Its channels; heads for A_t.
        mean: Spikes per neuron and time step, between 0 and 1.
        std: Standard deviation over the samples (population; 0 for one sample) of each one's mean over time.
        step_means: Mean at each of the T time steps.
        step_stds: Standard deviation over the samples at each time step.
        dead: Channels that never fired, anywhere, for any sample.
        saturated: Channels that fired everywhere, at every time step, for all samples.
    """

    path: str
    name: str
    place: str
    stage: Optional[int]
    block: Optional[int]
    is_neuron: bool
    neurons: int
    channels: int
    mean: float
    std: float
    step_means: tuple[float, ...]
    step_stds: tuple[float, ...]
    dead: tuple[int, ...]
    saturated: tuple[int, ...]


@dataclass(frozen=True)
class FiringRates:
    """Firing rates of a model's layers, in the order in which they fire.

    Attributes:
        layers: Neuron layers and, where the paper has it, X'.
        samples: Samples measured.
        input_shape: Of a sample: [C, H, W], or [T, C, H, W] for event clips.
        time_steps: Time steps T.
        mean: Spikes per neuron and time step, of all neurons of the model.
    """

    layers: tuple[LayerRates, ...]
    samples: int
    input_shape: tuple[int, ...]
    time_steps: int
    mean: float = field(init=False)

    def __post_init__(self) -> None:
        neurons = [layer for layer in self.layers if layer.is_neuron]
        fired = sum(layer.mean * layer.neurons for layer in neurons)
        object.__setattr__(self, "mean", fired / sum(layer.neurons for layer in neurons))

    def __getitem__(self, path: str) -> LayerRates:
        """The neuron layer of this module name; "....attn.proj" for X'."""
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
    samples, shape = observe(model, data, [meter])
    return meter.result(samples, shape)


class RateMeter:
    """An instrument for `observe` that counts spikes."""

    def __init__(self) -> None:
        self._sample: dict[SpikeSource, tuple[Tensor, int]] = {}
        self._counts: dict[SpikeSource, _Counts] = {}

    def attach(self, model: nn.Module) -> Iterator[RemovableHandle]:
        for source in spike_sources(model):
            module = model.get_submodule(source.path)
            if source.is_neuron:
                yield module.register_forward_hook(self._on_output(source))
            else:
                yield module.register_forward_pre_hook(self._on_input(source))

    def _on_output(self, source: SpikeSource) -> Any:
        def hook(_module: nn.Module, _inputs: Any, spikes: Tensor) -> None:
            self._count(source, spikes)

        return hook

    def _on_input(self, source: SpikeSource) -> Any:
        def hook(_module: nn.Module, inputs: Any) -> None:
            self._count(source, inputs[0])

        return hook

    def _count(self, source: SpikeSource, spikes: Tensor) -> None:
        if source in self._sample:
            raise ValueError(f"{source.path} runs more than once in a forward pass, its rate would be ambiguous")
        channels = prod(spikes.shape[2 : 2 + source.channel_dims])
        flat = spikes.detach().reshape(len(spikes), channels, -1)  # of a batch of one: [T, channels, positions]
        per_channel = flat.sum(2, dtype=torch.float64)  # exact: whole numbers far below 2^53
        self._sample[source] = (per_channel, flat.shape[2])

    def end_sample(self) -> None:
        for source, (fired, positions) in self._sample.items():
            if source not in self._counts:
                self._counts[source] = _Counts(fired.shape[0], fired.shape[1], positions)
            self._counts[source].add(fired.cpu().to(torch.int64))
        self._sample.clear()

    def result(self, samples: int, shape: list[int]) -> FiringRates:
        layers = tuple(counts.result(source, samples) for source, counts in self._counts.items())
        return FiringRates(layers, samples, tuple(shape), len(layers[0].step_means))


class _Counts:
    """Spikes of a layer over the samples, in whole numbers."""

    def __init__(self, time_steps: int, channels: int, positions: int) -> None:
        self.positions = positions
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

    def result(self, source: SpikeSource, samples: int) -> LayerRates:
        time_steps = len(self.sums) - 1
        channels = len(self.per_channel)
        neurons = channels * self.positions
        means, stds = [], []
        for t, (total, squares) in enumerate(zip(self.sums, self.squares, strict=True)):
            size = neurons * (time_steps if t == time_steps else 1)
            means.append(total / (samples * size))
            # The variance times samples^2 is a whole number: nothing cancels.
            stds.append(sqrt(samples * squares - total * total) / (samples * size))
        full = samples * time_steps * self.positions
        return LayerRates(
            source.path,
            source.name,
            source.place,
            source.stage,
            source.block,
            source.is_neuron,
            neurons,
            channels,
            means.pop(),
            stds.pop(),
            tuple(means),
            tuple(stds),
            tuple((self.per_channel == 0).nonzero().flatten().tolist()),
            tuple((self.per_channel == full).nonzero().flatten().tolist()),
        )
