"""Run a batch through a model and keep what some of its layers returned."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .running import bare_model, inference

__all__ = ["SETTLING", "capture_outputs", "settle_norms"]

SETTLING = 16  # samples that are enough for `settle_norms`


def capture_outputs(model: nn.Module, x: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """What the named modules return for a batch, in eval mode. The model is left as it was, also by an error.

    Args:
        model: Any model with neurons of this package, wrapped or compiled too, see `bare_model`.
        x: Input batch of the model, on any device.
        names: Names of submodules, each of which is called once and returns a tensor.

    Returns:
        The tensors by name, in the order of `names`, on the model's device.

    Raises:
        ValueError: For an input that holds NaN or infinite values, an empty batch, an unknown name, or a module that
            did not run.
    """
    model = bare_model(model)
    _check_input(x)
    modules = dict(model.named_modules())
    unknown = [name for name in names if name not in modules]
    if unknown:
        raise ValueError(f"{type(model).__name__} has no layer {unknown[0]!r}")
    like = next(model.parameters(), x)
    outputs: dict[str, Tensor] = {}
    handles = []

    def keep_as(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            outputs[name] = output.detach()

        return hook

    try:
        for name in names:
            handles.append(modules[name].register_forward_hook(keep_as(name)))
        with inference(model):
            model(x.to(like.device, like.dtype))
    finally:
        for handle in handles:
            handle.remove()
    silent = [name for name in names if name not in outputs]
    if silent:
        raise ValueError(f"layer {silent[0]!r} of {type(model).__name__} did not run for this input")
    return {name: outputs[name] for name in names}


@contextmanager
def settle_norms(model: nn.Module, batches: Sequence[Tensor]) -> Iterator[None]:
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


def _check_input(x: Tensor) -> None:
    if x.dim() not in (4, 5):
        raise ValueError(f"x of shape {list(x.shape)} is neither images [B, C, H, W] nor event clips [B, T, C, H, W]")
    if len(x) == 0:
        raise ValueError(f"x of shape {list(x.shape)} is an empty batch")
    if not bool(torch.isfinite(x).all()):
        raise ValueError("x holds NaN or infinite values")
