"""Surrogate gradients: smooth stand-ins for the step function, used in the backward pass alone.

With u = H - V_th, the distance of the membrane potential from the threshold:

    sigmoid  p(u) = 1 / (1 + exp(-alpha u))            p'(u) = alpha p (1 - p)
    atan     p(u) = atan(pi / 2 alpha u) / pi + 1/2    p'(u) = alpha / 2 / (1 + (pi / 2 alpha u)^2)

The sigmoid with alpha = 4 is the one of the QKFormer release; both follow spikingjelly's definitions.
"""

import math

import torch
from torch import Tensor

__all__ = ["DEFAULT_ALPHA", "surrogate_derivative", "surrogate_primitive"]

DEFAULT_ALPHA: dict[str, float] = {"sigmoid": 4.0, "atan": 2.0}


def surrogate_primitive(u: Tensor, surrogate: str, alpha: float) -> Tensor:
    """p(u): its derivative under autograd is the surrogate gradient."""
    if surrogate == "sigmoid":
        return torch.sigmoid(alpha * u)
    return torch.atan(math.pi / 2 * alpha * u) / math.pi + 0.5


def surrogate_derivative(u: Tensor, surrogate: str, alpha: float | Tensor) -> Tensor:
    """p'(u), written out."""
    if surrogate == "sigmoid":
        p = torch.sigmoid(alpha * u)
        return alpha * p * (1.0 - p)
    return alpha / 2 / (1.0 + (math.pi / 2 * alpha * u).square())
