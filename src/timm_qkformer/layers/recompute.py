"""Gradient checkpointing that computes a layer twice and counts it once.

Checkpointing drops a layer's activations and runs its forward pass again in the backward pass. As it stands, the second
pass moves the batch norms' running statistics once more and counts the batch once more. Here the second pass
moves copies of them; it normalises by the batch's statistics as the first one did. Dropout and stochastic depth draw
the same masks again (`torch.utils.checkpoint` restores the random state), and the neurons' backend, the lean path and
what was known of the input's counts are those of the first pass, whatever thread the second one runs in.
"""

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
        module = _with_statistics_of_its_own(self.module)
        with set_lif_backend(self.backend), lean_training(self.is_lean):
            return module(x)


def _with_statistics_of_its_own(module: nn.Module) -> nn.Module:
    """The same module on the same parameters, whose batch norms move copies of the running statistics.

    Other threads may train or save the module meanwhile, so nothing in it is touched.
    """
    twin = module.__new__(type(module))
    twin.__dict__ = module.__dict__.copy()
    twin._modules = {
        name: None if child is None else _with_statistics_of_its_own(child) for name, child in module._modules.items()
    }
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        twin._buffers = {name: None if value is None else value.clone() for name, value in module._buffers.items()}
    return twin


def checkpoint_once(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)`, computed again in the backward pass instead of keeping what that needs."""
    if torch.compiler.is_compiling():  # the compiler repeats operations, not side effects
        return checkpoint(module, x)
    return checkpoint(_Once(module, x), x)
