"""Watch modules while a model runs. The model comes out as it went in: mode, hooks, weights, also after an error.

`run_samples` runs data for instruments that keep sums and never spikes; `capture` runs one batch and keeps what some
modules return. `watching` puts the hooks of both.

`run_samples` runs every sample alone: in float32 a convolution's last bit depends on the size of its batch, one flipped
spike spreads through the layers behind it, and then the rates of a data set would depend on how it was batched.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from timm.utils.model import unwrap_model
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from ..layers import MembraneReadout, SpikingConv
from ..neurons import SpikingNeuron

CALIBRATION_SAMPLES = 16  # enough for `recalibrated_norms`

# A batch of images [B, C, H, W] or event clips [B, T, C, H, W], or an iterable of such batches, of single images
# [C, H, W], or of tuples that begin with one of these, as loaders and data sets yield them.
Data = Tensor | Iterable[Any] | Dataset[Any]


class Watch(NamedTuple):
    """What to call with the tensor that a module returns or, with `is_input`, takes first."""

    path: str
    see: Callable[[Tensor], None]
    is_input: bool = False


class Instrument(Protocol):
    """Watches modules while samples run one after the other."""

    def watches(self, model: nn.Module) -> Iterator[Watch]:
        """What to watch in this model."""

    def end_sample(self) -> None:
        """Called after every sample's forward pass."""


@contextmanager
def watching(model: nn.Module, watches: Iterable[Watch]) -> Iterator[None]:
    """Forward hooks for the length of a block. Hooks of the user's stay and are called first."""
    handles = []
    try:
        for path, see, is_input in watches:  # not all at once: the next one may fail
            module = model.get_submodule(path)
            if is_input:
                handles.append(module.register_forward_pre_hook(lambda _module, args, see=see: see(args[0].detach())))
            else:
                handles.append(module.register_forward_hook(lambda _module, _args, y, see=see: see(y.detach())))
        yield
    finally:
        for handle in handles:
            handle.remove()


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


def run_samples(
    model: nn.Module, data: Data, instruments: Sequence[Instrument], on_sample: Callable[[Tensor], None] | None = None
) -> tuple[int, list[int]]:
    """Run every sample of the data, alone, in eval mode, and let the instruments watch.

    Args:
        model: What `bare_model` returns.
        data: Batches, see `Data`. All samples must have one shape.
        instruments: Watchers.
        on_sample: Called with every sample, a batch of one, before it runs.

    Returns:
        How many samples there were, and their shape without the batch dimension.

    Raises:
        ValueError: For no samples, samples of unequal shape, values or weights that are not finite, or something that
            is no batch.
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"the model's {name} has NaN or infinite values: neurons that it drives would stay silent")
    count, shape = 0, None
    watches = (watch for instrument in instruments for watch in instrument.watches(model))
    with watching(model, watches), inference(model):
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
    if shape is None:
        raise ValueError("the data is empty: there is not one sample to measure")
    return count, list(shape)


def as_samples(data: Data, model: nn.Module) -> Iterator[Tensor]:
    """Every sample as a batch of one, on the model's device and in its dtype; ValueError for what is no batch."""
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


def capture(model: nn.Module, x: Tensor, outputs: Sequence[str], inputs: Sequence[str] = ()) -> dict[str, Tensor]:
    """Run a batch in eval mode and keep what some modules return or take.

    Args:
        model: Any model with neurons of this package, wrapped or compiled too, see `bare_model`.
        x: Images [B, C, H, W] or event clips [B, T, C, H, W], on any device.
        outputs: Names of modules, each of which is called once and returns a tensor.
        inputs: Names of modules whose first input is kept instead.

    Returns:
        The tensors by name, on the model's device.

    Raises:
        ValueError: For an input that holds NaN or infinite values, an empty batch, an unknown name, or a module that
            did not run.
    """
    model = bare_model(model)
    if x.dim() not in (4, 5):
        raise ValueError(f"x of shape {list(x.shape)} is neither images [B, C, H, W] nor event clips [B, T, C, H, W]")
    if len(x) == 0:
        raise ValueError(f"x of shape {list(x.shape)} is an empty batch")
    if not bool(torch.isfinite(x).all()):
        raise ValueError("x holds NaN or infinite values")
    modules = dict(model.named_modules())
    names = [*outputs, *inputs]
    if unknown := [name for name in names if name not in modules]:
        raise ValueError(f"{type(model).__name__} has no layer {unknown[0]!r}")
    like = next(model.parameters(), x)
    found: dict[str, Tensor] = {}
    watches = [_keep(found, name, i >= len(outputs)) for i, name in enumerate(names)]
    with watching(model, watches), inference(model):
        model(x.to(like.device, like.dtype))
    if silent := [name for name in names if name not in found]:
        raise ValueError(f"layer {silent[0]!r} of {type(model).__name__} did not run for this input")
    return found


def _keep(found: dict[str, Tensor], path: str, is_input: bool = False) -> Watch:
    return Watch(path, lambda x: found.__setitem__(path, x), is_input)


@contextmanager
def record_spikes(model: nn.Module, suffix: str = "") -> Iterator[dict[str, Tensor]]:
    """Record what the neurons fire in the forward passes of a `with` block.

    A later forward pass replaces what an earlier one left.

    Args:
        model: Any model with neurons of this package.
        suffix: Record only the neurons whose module name ends so, such as "attn_neuron".

    Yields:
        Spikes [T, B, ...] by the neuron's module name, in firing order, filled as the model runs.
    """
    spikes: dict[str, Tensor] = {}
    neurons = (name for name, module in model.named_modules() if isinstance(module, SpikingNeuron))
    with watching(model, [_keep(spikes, name) for name in neurons if name.endswith(suffix)]):
        yield spikes


def neuron_layers(model: nn.Module) -> list[str]:
    """Module names of a model's neurons, such as "stages.0.blocks.0.mlp.fc1.neuron", in the model's order."""
    return [name for name, module in bare_model(model).named_modules() if isinstance(module, SpikingNeuron)]


def record_layer(model: nn.Module, x: Tensor, layer: str) -> NDArray[np.bool_]:
    """Run a batch and record one layer of neurons: bool [T, B, ...], mostly [T, B, C, H, W].

    Args:
        model, x: See `capture`.
        layer: Name from `neuron_layers`.

    Raises:
        ValueError: If there is no layer of neurons of that name, or the input cannot be run.
    """
    known = neuron_layers(model)
    if layer not in known:
        raise ValueError(f"layer={layer!r} is no layer of neurons; there are {len(known)}: {', '.join(known[:4])}, ...")
    spikes: NDArray[np.bool_] = capture(model, x, [layer])[layer].bool().cpu().numpy()
    return spikes


def pick_neurons(
    spikes: NDArray[np.bool_], sample: int = 0, limit: int = 128
) -> tuple[NDArray[np.bool_], NDArray[np.int_], int]:
    """Spike trains of at most `limit` evenly spaced neurons of a layer, for a sample of what `record_layer` gave.

    Returns:
        The spike trains, bool [neurons, T]; the index of each neuron in its layer, counted as the array is stored
        (channel by channel, row by row); how many neurons the layer has.
    """
    trains = spikes[:, sample].reshape(len(spikes), -1).T
    rows = np.unique(np.linspace(0, len(trains) - 1, min(len(trains), limit)).round().astype(int))
    return trains[rows], rows, len(trains)


@contextmanager
def recalibrated_norms(model: nn.Module, batches: Sequence[Tensor]) -> Iterator[None]:
    """For the length of a block, batch norms with the statistics of these batches instead of their own.

    For untrained models, whose statistics are those of no data: currents stay far below the threshold and hardly a
    neuron fires. The former statistics are back after the block.
    """
    model = bare_model(model)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    former = [(norm, {k: v.clone() for k, v in norm.state_dict().items()}, norm.momentum) for norm in norms]
    try:
        with inference(model):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the plain mean over all batches
                norm.training = True
            like = next(model.parameters())
            for batch in batches:
                model(batch.to(like.device, like.dtype))
        yield
    finally:
        for norm, state, momentum in former:
            norm.load_state_dict(state)
            norm.momentum = momentum
