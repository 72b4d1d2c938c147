"""Spike trains of single neurons."""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from ..layers import SpikingNeuron
from .capture import capture_outputs
from .running import bare_model

__all__ = ["neuron_layers", "pick_neurons", "record_layer"]


def neuron_layers(model: nn.Module) -> list[str]:
    """Module names of a model's neurons, such as "stages.0.blocks.0.mlp.fc1.neuron", in the model's order."""
    return [name for name, module in bare_model(model).named_modules() if isinstance(module, SpikingNeuron)]


def record_layer(model: nn.Module, x: Tensor, layer: str) -> NDArray[np.bool_]:
    """Run a batch and record one layer of neurons: bool [T, B, ...], mostly [T, B, C, H, W].

    Args:
        model: Any model with neurons of this package; handled as by `record_attention`.
        x: Images [B, C, H, W] or event clips [B, T, C, H, W].
        layer: Name from `neuron_layers`.

    Raises:
        ValueError: If there is no layer of neurons of that name, or the input cannot be run.
    """
    known = neuron_layers(model)
    if layer not in known:
        raise ValueError(f"layer={layer!r} is no layer of neurons; there are {len(known)}: {', '.join(known[:4])}, ...")
    spikes: NDArray[np.bool_] = capture_outputs(model, x, [layer])[layer].bool().cpu().numpy()
    return spikes


def pick_neurons(spikes: NDArray[np.bool_], sample: int = 0, limit: int = 128) -> tuple[NDArray, NDArray, int]:
    """Spike trains of evenly spaced neurons of a layer, for `draw_raster`.

    Args:
        spikes: From `record_layer`, [T, B, ...].
        sample: Which of the batch.
        limit: At most so many neurons.

    Returns:
        The spike trains, bool [neurons, T]; the index of each neuron in its layer, counted as the array is stored
        (channel by channel, row by row); how many neurons the layer has.
    """
    trains = spikes[:, sample].reshape(len(spikes), -1).T
    rows = np.unique(np.linspace(0, len(trains) - 1, min(len(trains), limit)).round().astype(int))
    return trains[rows], rows, len(trains)
