"""Random hooks and replacements on the modules of a model, and its gradients with and without packing."""

import copy
import random
from types import MethodType

import torch
from torch import nn

from timm_qkformer.execution import execution_policy
from timm_qkformer.neurons import LIF, SpikingNeuron


class Scaled(nn.Module):
    """A module whose output is scaled: no spikes any more."""

    def __init__(self, module, factor):
        super().__init__()
        self.module, self.factor = module, factor

    def forward(self, *inputs):
        return self.module(*inputs) * self.factor


class Noisy(nn.Module):
    """A module and noise from torch's generator behind it: running it twice is not running it once."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *inputs):
        y = self.module(*inputs)
        return y + torch.rand(y.shape, dtype=y.dtype) * 0.3  # unlike rand_like's, the same for any memory format


class Counting(LIF):
    """Neurons with a forward of their own."""

    def forward(self, x):
        return super().forward(x) * 0.5 + 0.25


def _scale(module, inputs, output):
    return output * 0.6


def _shift(module, inputs):
    return (inputs[0] * 0.7 + 0.1, *inputs[1:])


def _gradient(module, grad_inputs, grad_outputs):
    return tuple(None if grad is None else grad * 0.5 for grad in grad_inputs)


def _weaker(module, *inputs):
    return type(module).forward(module, *inputs) * 0.8


def _watch(module, inputs, output):
    return None


def disturb(model, path, rng):
    """Hook or replace one module; returns what was done."""
    module = model.get_submodule(path)
    parent, _, name = path.rpartition(".")
    kinds = ["scale", "shift", "watch", "backward", "replace", "noise", "forward"]
    if isinstance(module, SpikingNeuron):
        kinds += ["levels", "neuron"]
    kind = rng.choice(kinds)
    if kind == "scale":
        module.register_forward_hook(_scale)
    elif kind == "shift":
        module.register_forward_pre_hook(_shift)
    elif kind == "watch":
        module.register_forward_hook(_watch)
    elif kind == "backward":
        module.register_full_backward_hook(_gradient)
    elif kind == "forward":
        module.forward = MethodType(_weaker, module)  # a method, so that copies of the model have their own
    else:
        new = {
            "replace": lambda: Scaled(module, 0.6),
            "noise": lambda: Noisy(module),
            "levels": lambda: nn.ReLU(),
            "neuron": lambda: Counting(v_threshold=0.5),
        }[kind]()
        setattr(model.get_submodule(parent), name, new)
    return f"{kind} {path}"


def candidates(model):
    """Modules that one may hook: those that take and give one tensor, and are called."""
    return [name for name, module in model.named_modules() if name and not isinstance(module, nn.ModuleList)]


def gradients(model, x, packed):
    """Of one training step on a copy."""
    model = copy.deepcopy(model).train()
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    torch.manual_seed(0)
    with execution_policy(packed=packed, neurons="eager"):
        y = model(x)
        (y * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {"logits": y.detach(), "input": x.grad, **grads}


def largest_difference(model, x):
    """Between packed and plain gradients, relative to each one's largest; inf where one alone is missing.

    Those of biases in front of a batch norm are zero but for rounding, which other gradients measure.
    """
    ours = gradients(model, x, True)
    first = _difference(gradients(model, x, False), ours)
    if first < 1e-8 or x.dim() != 4:
        return first
    # Of equal pixels in a pooling window torch picks another one in the memory format in which packed units work.
    return _difference(gradients(model, x.contiguous(memory_format=torch.channels_last), False), ours)


def _difference(plain, ours):
    least = 1e-6 * max(float(grad.abs().max()) for grad in plain.values() if grad is not None)
    worst = 0.0
    for name, wanted in plain.items():
        found = ours[name]
        if (wanted is None) != (found is None):
            return float("inf")
        if wanted is not None and not torch.equal(wanted, found):
            worst = max(worst, float((wanted - found).abs().max() / wanted.abs().max().clamp_min(least)))
    return worst


def shuffled(seed):
    return random.Random(seed)
