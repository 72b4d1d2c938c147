"""Training for 8 bits: the loss is that of rounded weights, and its gradient moves the weights themselves."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Optional

import torch
from timm.utils import unwrap_model
from torch import nn

from ...inference import round_weights

__all__ = ["rounded_weights"]


@contextmanager
def rounded_weights(model: nn.Module, optimizer: Optional[torch.optim.Optimizer] = None) -> Iterator[None]:
    """Within the block the model's weights are rounded (`timm_qkformer.round_weights`), afterwards what they were.

    That is a straight-through estimator: gradients at the rounded weights stand for those at the weights.

    Args:
        model: A QKFormer or Max-Former, or a wrapper around it.
        optimizer: It may take a step within the block. Right before, the weights are put back.
    """
    weights = list(model.parameters())
    originals = [weight.detach().clone() for weight in weights]
    rounded = True

    @torch.no_grad()
    def put_back(*_: Any) -> None:
        nonlocal rounded
        if rounded:
            for weight, original in zip(weights, originals, strict=True):
                weight.copy_(original)
        rounded = False

    # timm's Lookahead does not run hooks, what it wraps does.
    stepping: Any = getattr(optimizer, "_base_optimizer", optimizer)
    hook = stepping.register_step_pre_hook(put_back) if stepping is not None else None
    try:
        round_weights(unwrap_model(model))
        yield
    finally:
        put_back()
        if hook is not None:
            hook.remove()
