"""What a layer of neurons does, in one value: `NeuronSpec`. The recurrence, the compiled and the native kernels,
deployment and analysis all read it.

Equations, for t = 1..T, with the membrane potential measured from rest (``V[0] = 0`` unless it is given), ``leak`` =
1 / tau (0: perfect integrator) and ``threshold`` = V_th - V_reset:

    charge   H[t] = V[t-1] + leak * (X[t] - V[t-1])      if decay_input
             H[t] = V[t-1] - leak * V[t-1] + X[t]        otherwise
    fire     S[t] = 1 if H[t] >= threshold else 0        levels "binary"
             S[t] = sign(H[t]) if |H[t]| >= threshold else 0         "ternary"
             S[t] = min(max(floor(H[t] / threshold + 1 / 2), 0), max_spikes)  "integer"
    reset    V[t] = 0 if the neuron fired else H[t]      hard
             V[t] = H[t] - threshold * S[t]              soft

Neurons of the levels "real" are rectifiers without a potential: S[t] = max(X[t], 0).

Measuring from rest makes a non-zero V_reset a mere shift of the threshold. In the backward pass dS/dH is the derivative
of the surrogate p at the distance u from a threshold, added up over the two of ternary neurons and the ``max_spikes``
thresholds of integer ones, (k - 1/2) threshold; with ``detach_reset`` the S in the reset counts as a constant.

    sigmoid  p(u) = 1 / (1 + exp(-alpha u))            p'(u) = alpha p (1 - p)
    atan     p(u) = atan(pi / 2 alpha u) / pi + 1/2    p'(u) = alpha / 2 / (1 + (pi / 2 alpha u)^2)
    box      p(u) = min(max(alpha u + 1/2, 0), 1)      p'(u) = alpha where |u| <= 1 / (2 alpha), else 0

Potentials are float32 for half-precision inputs and have the input's own precision otherwise.

Source: Fang et al., "Incorporating Learnable Membrane Time Constant to Enhance Learning of Spiking Neural Networks"
(arXiv 2007.05785), eq. 1 to 5 and 9; QKFormer (arXiv 2403.16552), eq. 1 to 3, whose surrogate is the sigmoid with
alpha = 4; ternary and real levels: A2OS2A (arXiv 2503.00226); integer levels: I-LIF (arXiv 2407.20708), with a soft
reset and the box. Sigmoid and atan are spikingjelly's.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..execution.packing import BINARY, REAL, TERNARY, Range

_RANGES: dict[str, Range] = {"binary": BINARY, "ternary": TERNARY, "real": REAL}
LEVELS = sorted((*_RANGES, "integer"))

DEFAULT_ALPHA: dict[str, float] = {"sigmoid": 4.0, "atan": 2.0, "box": 1.0}


def spike_range(levels: str, max_spikes: int) -> Range:
    """What neurons of a kind of levels put out."""
    return Range(0, max_spikes) if levels == "integer" else _RANGES[levels]


class NeuronSpec(NamedTuple):
    """What the dynamics of a layer's neurons depend on; symbols as in the module's first lines.

    `leak`, `threshold` and `alpha` may be tensors without dimensions. `detach_reset`, `surrogate` and `alpha` matter
    to training alone.
    """

    leak: Any  # float | Tensor
    threshold: Any = 1.0  # float | Tensor
    soft_reset: bool = False
    decay_input: bool = True
    levels: str = "binary"
    detach_reset: bool = True
    surrogate: str = "sigmoid"
    alpha: Any = 4.0  # float | Tensor
    max_spikes: int = 1  # in a step, of integer levels

    @property
    def range(self) -> Range:
        """What such neurons put out."""
        return spike_range(self.levels, self.max_spikes)


def membrane_dtype(x: Tensor) -> torch.dtype:
    """Precision of potentials and of spike counts for spikes of x's dtype: never below float32."""
    if x.dtype == torch.float16 or x.dtype == torch.bfloat16:
        return torch.float32
    return x.dtype
