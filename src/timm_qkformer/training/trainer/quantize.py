"""Training for 8 bits: the loss is that of quantized weights, and its gradient moves the weights themselves."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.utils import unwrap_model
from torch import nn

from ...inference import quantize_weights
from ...models import SpikingTransformer


def require_quantizable(model: nn.Module, name: str) -> None:
    """Refuse a model that `quantize_weights` does not know; ValueError naming the model and its kind."""
    if not isinstance(model, SpikingTransformer):
        kind = type(model).__name__
        raise ValueError(f"quantize_weights=True: model {name} is a {kind}, expected a QKFormer or MaxFormer")


@contextmanager
def quantized_weights(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Iterator[None]:
    """Within the block the model's weights are quantized (`timm_qkformer.quantize_weights`), afterwards what they were.

    That is a straight-through estimator: gradients at the quantized weights stand for those at the weights.

    Args:
        model: A QKFormer or Max-Former, or a wrapper around it.
        optimizer: It may take a step within the block. Right before, the weights are restored.
    """
    weights = list(model.parameters())
    originals = [weight.detach().clone() for weight in weights]
    quantized = True

    @torch.no_grad()
    def restore(*_: Any) -> None:
        nonlocal quantized
        if quantized:
            for weight, original in zip(weights, originals, strict=True):
                weight.copy_(original)
        quantized = False

    # timm's Lookahead does not run hooks, what it wraps does.
    stepping: Any = getattr(optimizer, "_base_optimizer", optimizer)
    hook = stepping.register_step_pre_hook(restore) if stepping is not None else None
    try:
        quantize_weights(unwrap_model(model))
        yield
    finally:
        restore()
        if hook is not None:
            hook.remove()
