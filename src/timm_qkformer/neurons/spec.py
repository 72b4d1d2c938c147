"""What a layer of neurons does, in one value: `NeuronSpec`. The recurrence, the compiled and the native kernels,
deployment and analysis all read it.

Equations, for t = 1..T, with the membrane potential measured from rest (``V[0] = 0`` unless it is given), ``leak`` =
1 / tau (0: perfect integrator) and ``threshold`` = V_th - V_reset:

    charge   H[t] = V[t-1] + leak * (X[t] - V[t-1])      if decay_input
             H[t] = V[t-1] - leak * V[t-1] + X[t]        otherwise
    fire     S[t] = 1 if H[t] >= threshold else 0        levels "binary"
             S[t] = sign(H[t]) if |H[t]| >= threshold else 0         "ternary"
    reset    V[t] = 0 if the neuron fired else H[t]      hard
             V[t] = H[t] - threshold * S[t]              soft

Neurons of the levels "real" are rectifiers without a potential: S[t] = max(X[t], 0).

Measuring from rest makes a non-zero V_reset a mere shift of the threshold. In the backward pass dS/dH is the derivative
of the surrogate p at the distance u from a threshold, of both thresholds for ternary neurons; with ``detach_reset`` the
S in the reset counts as a constant.

    sigmoid  p(u) = 1 / (1 + exp(-alpha u))            p'(u) = alpha p (1 - p)
    atan     p(u) = atan(pi / 2 alpha u) / pi + 1/2    p'(u) = alpha / 2 / (1 + (pi / 2 alpha u)^2)

Potentials are float32 for half-precision inputs and have the input's own precision otherwise.

Source: Fang et al., "Incorporating Learnable Membrane Time Constant to Enhance Learning of Spiking Neural Networks"
(arXiv 2007.05785), eq. 1 to 5 and 9; QKFormer (arXiv 2403.16552), eq. 1 to 3, whose surrogate is the sigmoid with
alpha = 4; ternary and real levels: A2OS2A (arXiv 2503.00226). The surrogates are those of spikingjelly.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..execution.packing import BINARY, REAL, TERNARY, Range

# What neurons of each kind of levels put out.
LEVELS: dict[str, Range] = {"binary": BINARY, "ternary": TERNARY, "real": REAL}

DEFAULT_ALPHA: dict[str, float] = {"sigmoid": 4.0, "atan": 2.0}


class NeuronSpec(NamedTuple):
    """What the dynamics of a layer's neurons depend on; symbols as in the module's first lines.

    `leak`, `threshold` and `alpha` may be tensors without dimensions. The last three matter to training alone.
    """

    leak: Any  # float | Tensor
    threshold: Any = 1.0  # float | Tensor
    soft_reset: bool = False
    decay_input: bool = True
    levels: str = "binary"
    detach_reset: bool = True
    surrogate: str = "sigmoid"
    alpha: Any = 4.0  # float | Tensor

    @property
    def range(self) -> Range:
        """What such neurons put out."""
        return LEVELS[self.levels]


def membrane_dtype(x: Tensor) -> torch.dtype:
    """Precision of potentials and of spike counts for spikes of x's dtype: never below float32."""
    if x.dtype == torch.float16 or x.dtype == torch.bfloat16:
        return torch.float32
    return x.dtype
