"""Gradient checkpointing that computes a layer twice and counts it once.

Checkpointing drops a layer's activations and runs its forward pass again in the backward pass. As it stands, the second
pass moves the batch norms' running statistics once more and counts the batch once more. Here the second pass
leaves them alone; it normalises by the batch's statistics as the first one did. Dropout and stochastic depth draw the
same masks again (`torch.utils.checkpoint` restores the random state), and the neurons' backend, the lean path and what
was known of the input's counts are those of the first pass, whatever thread the second one runs in.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from .backend import current_lif_backend, set_lif_backend
from .counts import counts_bound, note_counts
from .lean import is_lean_training, lean_training

__all__ = ["checkpoint_once"]


class _Once:
    """A module that is called once in earnest; later calls repeat it."""

    def __init__(self, module: nn.Module, x: Tensor) -> None:
        self.module = module
        self.bound = counts_bound(x)
        self.backend = current_lif_backend()
        self.is_lean = is_lean_training()
        self.called = False

    def __call__(self, x: Tensor) -> Tensor:
        if not self.called:
            self.called = True
            return self.module(x)
        if self.bound is not None:
            note_counts(x, self.bound)
        with set_lif_backend(self.backend), lean_training(self.is_lean), _running_statistics_kept(self.module):
            return self.module(x)


@contextmanager
def _running_statistics_kept(module: nn.Module) -> Iterator[None]:
    """Let the batch norms that are in training mode normalise by the batch without updating anything.

    With a momentum of 0 the running statistics are overwritten by themselves. Not to pass them at all would change what
    is saved for the backward pass, which must be the same in both passes.
    """
    norms = [
        (norm, norm.momentum, norm.num_batches_tracked)
        for norm in module.modules()
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.training and norm.track_running_stats
    ]
    for norm, _, _ in norms:
        norm.momentum = 0.0
        norm.num_batches_tracked = None
    try:
        yield
    finally:
        for norm, momentum, batches in norms:
            norm.momentum = momentum
            norm.num_batches_tracked = batches


def checkpoint_once(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)`, computed again in the backward pass instead of keeping what that needs."""
    if torch.compiler.is_compiling():  # the compiler repeats operations, not side effects
        return checkpoint(module, x)
    return checkpoint(_Once(module, x), x)
