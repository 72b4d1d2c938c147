"""Run a model once, as it is used for inference, and keep what some of its layers returned."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .running import inference, plain_model

__all__ = ["capture_outputs", "plain_model"]


def capture_outputs(model: nn.Module, x: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """What the named modules return for a batch. The model is left as it was, also by an error.

    Args:
        model: Any model; wrappers are taken off, and it runs in eval mode whatever its mode.
        x: Input batch of the model, on any device.
        names: Names of submodules, each of which is called once and returns a tensor.

    Returns:
        The tensors by name, in the order of `names`, on the model's device.

    Raises:
        ValueError: For an input that holds NaN or infinite values, an empty batch, an unknown name, or a module that
            did not run.
    """
    model = plain_model(model)
    _check_input(x)
    modules = dict(model.named_modules())
    unknown = [name for name in names if name not in modules]
    if unknown:
        raise ValueError(f"{type(model).__name__} has no layer {unknown[0]!r}")
    parameter = next(model.parameters(), x)
    outputs: dict[str, Tensor] = {}
    handles = []
    try:
        for name in names:

            def keep(_module: nn.Module, _args: Any, output: Tensor, name: str = name) -> None:
                outputs[name] = output.detach()

            handles.append(modules[name].register_forward_hook(keep))
        with inference(model):
            model(x.to(parameter.device))
    finally:
        for handle in handles:
            handle.remove()
    silent = [name for name in names if name not in outputs]
    if silent:
        raise ValueError(f"layer {silent[0]!r} of {type(model).__name__} did not run for this input")
    return {name: outputs[name] for name in names}


def _check_input(x: Tensor) -> None:
    if x.dim() not in (4, 5):
        raise ValueError(f"x of shape {list(x.shape)} is neither images [B, C, H, W] nor event clips [B, T, C, H, W]")
    if len(x) == 0:
        raise ValueError(f"x of shape {list(x.shape)} is an empty batch")
    if not bool(torch.isfinite(x).all()):
        raise ValueError("x holds NaN or infinite values")
