"""Run a model over data, sample by sample, for instruments that watch its layers and keep sums, never spikes.

Every sample runs alone: in float32 a convolution's last bit depends on the size of its batch, one flipped spike spreads
through the layers behind it, and then the rates of a data set would depend on how it was batched.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, nullcontext
from typing import Any, Optional, Protocol, Union, cast

import torch
from timm.utils.model import unwrap_model
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset
from torch.utils.hooks import RemovableHandle

from ..layers import MembraneReadout, SpikingConv, SpikingNeuron

__all__ = ["Data", "Instrument", "as_samples", "bare_model", "inference", "observe"]

# A batch of images [B, C, H, W] or event clips [B, T, C, H, W], or an iterable of such batches, of single images
# [C, H, W], or of tuples that begin with one of these, as loaders and data sets yield them.
Data = Union[Tensor, Iterable[Any], Dataset[Any]]


class Instrument(Protocol):
    """Watches layers through hooks while samples run one after the other."""

    def attach(self, model: nn.Module) -> Iterator[RemovableHandle]:
        """Put hooks on the model, one after the other; who asks for them removes them."""

    def end_sample(self) -> None:
        """Called after every sample's forward pass."""


def bare_model(model: nn.Module) -> nn.Module:
    """The module inside the wrappers of `torch.compile`, DistributedDataParallel, DataParallel and timm's ModelEma.

    Raises:
        ValueError: For something whose neurons cannot be looked at: what is no module, TorchScript, an exported or
            deployed program, or any other model without neurons of this package.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}, not a torch.nn.Module")
    bare: nn.Module = unwrap_model(model)
    if isinstance(bare, torch.jit.ScriptModule):
        raise ValueError(
            "the model is a TorchScript module, which keeps no layers to look into: give the model it was made from"
        )
    # A deployed model with membrane shortcuts keeps the neurons of its readout as they were, and those alone.
    inside = {id(part) for module in bare.modules() if isinstance(module, MembraneReadout) for part in module.modules()}
    if not any(isinstance(module, SpikingNeuron) and id(module) not in inside for module in bare.modules()):
        raise ValueError(
            f"{type(bare).__name__} has no neurons of this package to look at. If it was exported or deployed, give "
            "the model it was made from"
        )
    return bare


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients and no compiled code, which skips hooks; at the end every module is as it was.

    Coupled neurons (`batch_coupled`) see samples one by one here, and then they are as good as uncoupled.
    """
    modes = [(module, module.training) for module in model.modules()]
    coupled = [module for module, _ in modes if isinstance(module, SpikingConv) and module.batch_coupled]
    compiled = any(module._compiled_call_impl is not None or hasattr(module, "_orig_mod") for module, _ in modes)
    try:
        for module, _ in modes:
            module.training = False
        for layer in coupled:
            layer.batch_coupled = False
        with torch.no_grad(), torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        for module, training in modes:
            module.training = training
        for layer in coupled:
            layer.batch_coupled = True


def observe(
    model: nn.Module,
    data: Data,
    instruments: Sequence[Instrument],
    on_sample: Optional[Callable[[Tensor], None]] = None,
) -> tuple[int, list[int]]:
    """Run every sample of the data, alone, in eval mode, and let the instruments watch.

    The model comes out as it went in: its mode, its hooks and its weights, also after an error. Hooks of the user's
    stay and are called.

    Args:
        model: What `bare_model` returns.
        data: Batches, see `Data`. All samples must have one shape.
        instruments: Watchers.
        on_sample: Called with every sample, a batch of one, before it runs.

    Returns:
        How many samples there were, and their shape without the batch dimension.

    Raises:
        ValueError: For no samples, samples of unequal shape, values that are not finite, or something that is no batch.
    """
    _check_weights(model)
    handles: list[RemovableHandle] = []
    count, shape = 0, None
    try:
        for instrument in instruments:
            for handle in instrument.attach(model):  # not all at once: the next one may fail
                handles.append(handle)
        with inference(model):
            for x in as_samples(data, model):
                if shape is not None and x.shape[1:] != shape:
                    raise ValueError(
                        f"sample {count} of the data has shape {list(x.shape[1:])}, those before it {list(shape)}: "
                        "rates of unequal shapes cannot be put together, measure each shape on its own"
                    )
                if not bool(torch.isfinite(x).all()):
                    raise ValueError(f"sample {count} of the data has NaN or infinite values")
                count, shape = count + 1, x.shape[1:]
                if on_sample is not None:
                    on_sample(x)
                model(x)
                for instrument in instruments:
                    instrument.end_sample()
    finally:
        for handle in handles:
            handle.remove()
    if shape is None:
        raise ValueError("the data is empty: there is not one sample to measure")
    return count, list(shape)


def as_samples(data: Data, model: nn.Module) -> Iterator[Tensor]:
    """Every sample of the data as a batch of one, on the model's device and in its dtype.

    Raises:
        ValueError: For something that is no batch.
    """
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        data = map(data.__getitem__, range(len(cast(Sized, data))))  # not all of them can be iterated over
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise ValueError(
            f"data is a {type(data).__name__}; give a tensor, or an iterable of tensors or (input, target)"
        )
    for index, item in enumerate([data] if isinstance(data, Tensor) else data):
        batch = item[0] if isinstance(item, (tuple, list)) and len(item) > 0 else item
        if not isinstance(batch, Tensor):
            raise ValueError(
                f"batch {index} of the data holds a {type(batch).__name__}; it must be a tensor or a tuple (input, ...)"
            )
        if batch.dim() == 3:
            batch = batch.unsqueeze(0)
        if batch.dim() not in (4, 5) or not batch.is_floating_point():
            raise ValueError(
                f"batch {index} of the data is {batch.dtype} of shape {list(batch.shape)}; it must be floating-point "
                "images [B, C, H, W], normalised as for the model, or event clips [B, T, C, H, W]"
            )
        for i in range(len(batch)):
            yield batch[i : i + 1].to(like.device, like.dtype)


def _check_weights(model: nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"the model's {name} has NaN or infinite values: neurons that it drives would stay silent")
