"""Read the spikes of a model's neurons through forward hooks."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..layers import SpikingNeuron

__all__ = ["record_spikes"]


@contextmanager
def record_spikes(model: nn.Module, suffix: str = "") -> Iterator[dict[str, Tensor]]:
    """Record what the neurons fire in the forward passes of a `with` block.

    The hooks are gone when the block ends, also by an error. A later forward pass replaces what an earlier one left.

    Args:
        model: Any model with neurons of this package.
        suffix: Record only the neurons whose module name ends so, such as "attn_neuron".

    Yields:
        Spikes [T, B, ...] by the neuron's module name, in firing order, filled as the model runs.
    """
    spikes: dict[str, Tensor] = {}
    handles = []

    def hook_for(name: str) -> "torch.utils.hooks.RemovableHandle":
        def hook(_module: nn.Module, _args: object, output: Tensor) -> None:
            spikes[name] = output.detach()

        return model.get_submodule(name).register_forward_hook(hook)

    try:
        for name, module in model.named_modules():
            if isinstance(module, SpikingNeuron) and name.endswith(suffix):
                handles.append(hook_for(name))
        yield spikes
    finally:
        for handle in handles:
            handle.remove()
