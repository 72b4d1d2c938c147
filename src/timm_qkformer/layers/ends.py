"""Where a network begins and ends: images and event clips as sequences [T, B, C, H, W], and sequences as feature maps
[B, C, H, W], where timm's interface begins.

A static image is the same at every time step, so whatever comes before the first neuron runs on one step and is
broadcast afterwards: exact, and T times cheaper.
"""

from typing import Any, List, Optional

import torch.fx
from timm.layers import register_notrace_function, register_notrace_module
from torch import Tensor, nn

from ..neurons import LIF, NeuronLayer, membrane_dtype

torch.fx.wrap("membrane_dtype")
torch.fx.wrap("_add_steps")
torch.fx.wrap("_count_steps")


@register_notrace_function
def as_sequence(x: Tensor, in_chans: int, min_size: int) -> Tensor:
    """A batch of images [B, C, H, W] as [1, B, C, H, W], a batch of event clips [B, T, C, H, W] as [T, B, C, H, W].

    Raises:
        ValueError: For integers, another rank, channels other than `in_chans`, no time step, or a side below `min_size`
            pixels.
    """
    if not x.is_floating_point():
        raise ValueError(
            f"input is {x.dtype}: give floating-point images or event clips (x.float()), normalised as for training"
        )
    given = list(x.shape)
    if x.dim() == 4:
        x = x.unsqueeze(0)
    elif x.dim() == 5:
        x = x.transpose(0, 1)
    else:
        raise ValueError(
            f"input of shape {given} has {x.dim()} dimensions: give images [B, C, H, W] or event clips [B, T, C, H, W]"
        )
    if not torch.jit.is_scripting():
        if torch.jit.is_tracing():  # a trace would hold these checks for constants, and says so
            return x
    T, _, C, H, W = x.shape
    if C != in_chans:
        raise ValueError(
            f"input has {C} channels, the model was created with in_chans={in_chans}: of shape {given} it was taken as "
            "images [B, C, H, W] or event clips [B, T, C, H, W]. Clips laid out [T, B, C, H, W], as spikingjelly has "
            "them, need x.transpose(0, 1) first"
        )
    if T < 1:
        raise ValueError("input is an event clip [B, T, C, H, W] without a time step (T=0)")
    if H < min_size or W < min_size:
        raise ValueError(f"input of {H}x{W} pixels is too small: this model needs at least {min_size}x{min_size}")
    return x


@register_notrace_function
def count_time_steps(x: Tensor, time_steps: int) -> int:
    """Time steps to simulate for a model input: a clip's own T, `time_steps` for images."""
    return x.shape[1] if x.dim() == 5 else time_steps


class MeanReadout(nn.Module):
    """Mean over T: for spikes or sums of spikes, the firing-rate map.

    Steps are added up one after the other, so that a sequence read step by step (`add`, then `finish`) gives the map of
    one that is read in one call (`forward`) to the last bit.
    """

    num_sums: int = 1

    def add(self, x: Tensor, sums: List[Tensor]) -> List[Tensor]:
        """Sums of the steps before, none at first, and of more steps [T, B, C, H, W]."""
        return [_add_steps(x, sums[0] if len(sums) > 0 else None)]

    def finish(self, sums: List[Tensor], steps: Tensor) -> Tensor:
        """The map [B, C, H, W] of sums over `steps`, one number [1] or [B]."""
        return sums[0] / steps.to(sums[0].dtype).view(-1, 1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Spikes, sums of spikes or potentials [T, B, C, H, W] to their mean [B, C, H, W]."""
        sums = self.add(x, [])
        return self.finish(sums, _count_steps(x)).to(x.dtype)


@register_notrace_module
class MembraneReadout(nn.Module):
    """Readout of membrane potentials through neurons, one per channel, that see their mean over space.

    A model with membrane shortcuts ends with: mean over space, LIF per step, Linear, mean over T. The last two
    commute, so what the classifier needs is each neuron's firing rate,

        rate = mean over T of LIF(mean over space of X[t])        [B, C]

    and the map returned is the mean of X over T, shifted in each sample and channel so that its mean over space is
    that rate. Average pooling of the map gives the rate, and classifying it gives the model's own logits. Other
    pooling is taken relative to it: the maximum, for one, is rate + (max - mean over space) of the mean potential.

    `add` and `finish` are those of `MeanReadout`; the neurons' potentials are a matter of `run_with_state`.

    Args:
        neuron_layer: Factory of the neurons.
    """

    num_sums: int = 2

    def __init__(self, neuron_layer: NeuronLayer = LIF, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.neuron = neuron_layer(device=device, dtype=dtype)

    def add(self, x: Tensor, sums: List[Tensor]) -> List[Tensor]:
        """Sums of the steps before, none at first, and of more steps [T, B, C, H, W]."""
        spikes = self.neuron(x.mean((3, 4), keepdim=True, dtype=membrane_dtype(x)))
        first = len(sums) == 0
        return [_add_steps(x, None if first else sums[0]), _add_steps(spikes, None if first else sums[1])]

    def finish(self, sums: List[Tensor], steps: Tensor) -> Tensor:
        """The shifted map [B, C, H, W] of sums over `steps`, one number [1] or [B]."""
        count = steps.to(sums[0].dtype).view(-1, 1, 1, 1)
        mean, rate = sums[0] / count, sums[1] / count
        return mean + (rate - mean.mean((2, 3), keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        """Membrane potentials [T, B, C, H, W] to the shifted map [B, C, H, W]."""
        sums = self.add(x, [])
        return self.finish(sums, _count_steps(x)).to(x.dtype)


def _add_steps(x: Tensor, total: Optional[Tensor]) -> Tensor:
    """Steps [T, ...] and the total before them, added up in order, in float32 at least."""
    dtype = membrane_dtype(x)
    steps = x.unbind(0)
    summed = steps[0].to(dtype)
    if total is not None:
        summed = total + summed
    for step in steps[1:]:
        summed = summed + step.to(dtype)
    return summed


@register_notrace_function
def _count_steps(x: Tensor) -> Tensor:
    """T of steps [T, ...], as [1]; by unbinding them, which fixes T in a trace as the neurons do."""
    return torch.full([1], len(x.unbind(0)), device=x.device)
