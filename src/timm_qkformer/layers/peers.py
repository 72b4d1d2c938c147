"""spikingjelly's neurons behind this package's modules: to compare with, and for its CUDA kernels.

spikingjelly 2.0 divides by tau where this package multiplies by 1 / tau. For tau = 2, 4, ... that is the same to the
last bit; otherwise a potential within a rounding error of the threshold may fire in one and not in the other.
"""

import torch
from torch import Tensor

from .recurrence import Dynamics, membrane_dtype

__all__ = ["spikingjelly_integrate_and_fire"]


def spikingjelly_integrate_and_fire(x: Tensor, leak: float | Tensor, dynamics: Dynamics) -> Tensor:
    """`dynamics.integrate_and_fire` by spikingjelly's multi-step operators for IF, LIF and parametric LIF nodes.

    `x` must not be empty.

    Raises:
        ImportError: Without spikingjelly 2.0.
        ValueError: For a neuron that spikingjelly does not have.
    """
    try:
        from spikingjelly.activation_based.functional import if_multi_step, lif_multi_step, plif_multi_step
        from spikingjelly.activation_based.surrogate import ATan, Sigmoid
    except ImportError as error:
        raise ImportError(
            'the LIF backend "spikingjelly" needs spikingjelly 2.0 or newer: pip install "spikingjelly>=2.0.0", or '
            'choose another backend with timm_qkformer.layers.set_lif_backend("auto")'
        ) from error
    if isinstance(leak, float):
        if leak == 1.0:
            raise ValueError('tau=1.0: the LIF backend "spikingjelly" has no neurons with tau <= 1, choose "auto"')
        if leak == 0.0 and dynamics.decay_input:
            raise ValueError(
                'leak=0.0 with decay_input=True: the LIF backend "spikingjelly" has no neurons without input'
            )

    surrogate = {"sigmoid": Sigmoid, "atan": ATan}[dynamics.surrogate](alpha=dynamics.alpha)
    v = torch.zeros(x.shape[1:], dtype=membrane_dtype(x), device=x.device)
    v_reset = None if dynamics.soft_reset else 0.0
    rest = (dynamics.threshold, v_reset, surrogate, dynamics.detach_reset)
    if isinstance(leak, Tensor):
        spikes = plif_multi_step(x, v, torch.logit(leak), dynamics.decay_input, *rest)[0]
    elif leak == 0.0:
        spikes = if_multi_step(x, v, *rest)[0]
    else:
        spikes = lif_multi_step(x, v, 1.0 / leak, dynamics.decay_input, *rest)[0]
    return spikes.to(x.dtype)
