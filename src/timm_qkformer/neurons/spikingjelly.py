"""spikingjelly's neurons behind this package's modules: to compare with, and for its CUDA kernels.

spikingjelly 2.0 divides by tau where this package multiplies by 1 / tau. For tau = 2, 4, ... that is the same to the
last bit; otherwise a potential within a rounding error of the threshold may fire in one and not in the other.
"""

import torch
from torch import Tensor

from .spec import NeuronSpec, membrane_dtype

_HERE = 'the neuron backend "spikingjelly"'


def spikingjelly_integrate_and_fire(x: Tensor, spec: NeuronSpec, v: Tensor | None) -> tuple[Tensor, Tensor]:
    """`dynamics.run_neurons` by spikingjelly's multi-step operators for IF, LIF and parametric LIF nodes.

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
            f'{_HERE} needs spikingjelly 2.0 or newer: pip install "spikingjelly>=2.0.0", or choose another backend '
            'with timm_qkformer.execution.execution_policy(neurons="auto")'
        ) from error
    if spec.levels != "binary":
        raise ValueError(f'levels={spec.levels!r}: {_HERE} has binary neurons alone, choose "auto"')
    surrogates = {"sigmoid": Sigmoid, "atan": ATan}
    if spec.surrogate not in surrogates:
        raise ValueError(f'surrogate={spec.surrogate!r}: {_HERE} has sigmoid and atan alone, choose "auto"')
    if isinstance(spec.leak, float):
        if spec.leak == 1.0:
            raise ValueError(f'tau=1.0: {_HERE} has no neurons with tau <= 1, choose "auto"')
        if spec.leak == 0.0 and spec.decay_input:
            raise ValueError(f"leak=0.0 with decay_input=True: {_HERE} has no neurons without input")

    surrogate = surrogates[spec.surrogate](alpha=spec.alpha)
    dtype = membrane_dtype(x)
    v = torch.zeros(x.shape[1:], dtype=dtype, device=x.device) if v is None else v.to(dtype)
    rest = (spec.threshold, None if spec.soft_reset else 0.0, surrogate, spec.detach_reset)
    if isinstance(spec.leak, Tensor):
        spikes, v = plif_multi_step(x, v, torch.logit(spec.leak), spec.decay_input, *rest)[:2]
    elif spec.leak == 0.0:
        spikes, v = if_multi_step(x, v, *rest)[:2]
    else:
        spikes, v = lif_multi_step(x, v, 1.0 / spec.leak, spec.decay_input, *rest)[:2]
    assert v is not None
    return spikes.to(x.dtype), v
