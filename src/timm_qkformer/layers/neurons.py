"""Spiking neurons: modules that hold hyper-parameters and call the functional core in `dynamics`.

They keep no state. A call maps input currents [T, B, ...] to spikes [T, B, ...], starting from rest, so there is
nothing to reset between batches and one module may serve several threads.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Optional, Union

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from .counts import note_counts
from .dynamics import integrate_and_fire, integrate_and_fire_reference
from .recurrence import Dynamics, membrane_dtype
from .surrogate import DEFAULT_ALPHA

__all__ = ["IF", "LIF", "NEURONS", "NeuronLayer", "ParametricLIF", "SpikingNeuron", "get_neuron_layer"]


class SpikingNeuron(nn.Module):
    """What IF, LIF and parametric LIF share: threshold, reset and surrogate.

    Args:
        v_threshold: Firing threshold of the membrane potential.
        v_reset: Potential at rest and after a spike (hard reset). None: rest at 0 and subtract `v_threshold` on a
            spike (soft reset).
        decay_input: Let the input current decay with the potential.
        detach_reset: Keep the reset out of the backward pass.
        surrogate: "sigmoid" or "atan".
        alpha: Steepness of the surrogate. None: 4 for the sigmoid, 2 for atan.
    """

    def __init__(
        self,
        v_threshold: float = 1.0,
        v_reset: Optional[float] = 0.0,
        decay_input: bool = True,
        detach_reset: bool = True,
        surrogate: str = "sigmoid",
        alpha: Optional[float] = None,
    ) -> None:
        super().__init__()
        rest = 0.0 if v_reset is None else float(v_reset)
        if not (math.isfinite(v_threshold) and math.isfinite(rest) and v_threshold > rest):
            raise ValueError(
                f"v_threshold={v_threshold} must be finite and above the resting potential {rest} (v_reset={v_reset})"
            )
        if surrogate not in DEFAULT_ALPHA:
            raise ValueError(f"surrogate={surrogate!r} is unknown, choose one of {sorted(DEFAULT_ALPHA)}")
        alpha = DEFAULT_ALPHA[surrogate] if alpha is None else alpha
        if not (math.isfinite(alpha) and alpha > 0):
            raise ValueError(f"alpha={alpha} must be a positive number")
        self.v_threshold = float(v_threshold)
        self.v_reset = None if v_reset is None else float(v_reset)
        self.decay_input = decay_input
        self.detach_reset = detach_reset
        self.surrogate = surrogate
        self.alpha = float(alpha)

    @property
    def threshold(self) -> float:
        """The threshold as the dynamics have it: measured from rest."""
        return self.v_threshold - (0.0 if self.v_reset is None else self.v_reset)

    @property
    def soft_reset(self) -> bool:
        """Whether a spike subtracts the threshold."""
        return self.v_reset is None

    def _fire(self, x: Tensor, leak: Union[Tensor, float]) -> Tensor:
        if not x.is_floating_point() or x.dim() < 1 or x.shape[0] < 1:
            raise ValueError(
                "a neuron needs floating-point input currents [T, B, ...] with at least one time step, "
                f"got {x.dtype} of shape {list(x.shape)}"
            )
        return note_counts(integrate_and_fire(x, leak, *self.dynamics()), 1)  # type: ignore[arg-type]

    def dynamics(self) -> Dynamics:
        """The hyper-parameters as the functional core has them, without the leak."""
        return Dynamics(
            self.threshold, self.soft_reset, self.decay_input, self.detach_reset, self.surrogate, self.alpha
        )

    def leak_at(self, dtype: torch.dtype) -> Union[Tensor, float]:
        """1 / tau for potentials of `dtype`."""
        raise NotImplementedError

    def _fire_scripted(self, x: Tensor, leak: Tensor) -> Tensor:
        # TorchScript knows no autograd.Function: there the reference runs.
        return integrate_and_fire_reference(
            x,
            leak,
            self.threshold,
            self.soft_reset,
            self.decay_input,
            self.detach_reset,
            self.surrogate,
            self.alpha,
        )

    def extra_repr(self) -> str:
        return (
            f"v_threshold={self.v_threshold}, v_reset={self.v_reset}, decay_input={self.decay_input}, "
            f"detach_reset={self.detach_reset}, surrogate={self.surrogate}, alpha={self.alpha}"
        )


@register_notrace_module
class LIF(SpikingNeuron):
    """Leaky integrate-and-fire neurons with a fixed membrane time constant.

    Args:
        tau: Membrane time constant in time steps, at least 1 (1: the potential is the input).
        v_threshold, v_reset, decay_input, detach_reset, surrogate, alpha: See `SpikingNeuron`.
        device, dtype: Taken as by every layer; there are no parameters that they could apply to.

    Raises:
        ValueError: For a `tau` below 1 or any hyper-parameter outside its range.
    """

    def __init__(
        self,
        tau: float = 2.0,
        v_threshold: float = 1.0,
        v_reset: Optional[float] = 0.0,
        decay_input: bool = True,
        detach_reset: bool = True,
        surrogate: str = "sigmoid",
        alpha: Optional[float] = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(v_threshold, v_reset, decay_input, detach_reset, surrogate, alpha)
        _check_tau("tau", tau, minimum=1.0)
        self.tau = float(tau)

    @property
    def leak(self) -> float:
        """1 / tau."""
        return 1.0 / self.tau

    def forward(self, x: Tensor) -> Tensor:
        """Input currents [T, B, ...] to spikes [T, B, ...]."""
        if torch.jit.is_scripting():
            return self._fire_scripted(x, torch.tensor(self.leak, dtype=torch.float64))
        return self._fire(x, self.leak)

    def leak_at(self, dtype: torch.dtype) -> float:
        return self.leak

    def extra_repr(self) -> str:
        return f"tau={self.tau}, {super().extra_repr()}"


@register_notrace_module
class IF(SpikingNeuron):
    """Integrate-and-fire neurons: the potential sums the input currents and never leaks.

    Args:
        v_threshold, v_reset, detach_reset, surrogate, alpha: See `SpikingNeuron`.
        device, dtype: Taken as by every layer; there are no parameters that they could apply to.
    """

    def __init__(
        self,
        v_threshold: float = 1.0,
        v_reset: Optional[float] = 0.0,
        detach_reset: bool = True,
        surrogate: str = "sigmoid",
        alpha: Optional[float] = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(v_threshold, v_reset, False, detach_reset, surrogate, alpha)

    def forward(self, x: Tensor) -> Tensor:
        """Input currents [T, B, ...] to spikes [T, B, ...]."""
        if torch.jit.is_scripting():
            return self._fire_scripted(x, torch.tensor(0.0, dtype=torch.float64))
        return self._fire(x, 0.0)

    def leak_at(self, dtype: torch.dtype) -> float:
        return 0.0


@register_notrace_module
class ParametricLIF(SpikingNeuron):
    """Leaky integrate-and-fire neurons that learn one membrane time constant per layer.

    1 / tau = sigmoid(w), so tau stays above 1 whatever the optimizer does to the parameter `w`
    (arXiv 2007.05785, eq. 9).

    Args:
        init_tau: Initial membrane time constant in time steps, above 1.
        v_threshold, v_reset, decay_input, detach_reset, surrogate, alpha: See `SpikingNeuron`.
        device, dtype: Of the parameter.

    Raises:
        ValueError: For an `init_tau` of at most 1 or any hyper-parameter outside its range.
    """

    def __init__(
        self,
        init_tau: float = 2.0,
        v_threshold: float = 1.0,
        v_reset: Optional[float] = 0.0,
        decay_input: bool = True,
        detach_reset: bool = True,
        surrogate: str = "sigmoid",
        alpha: Optional[float] = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(v_threshold, v_reset, decay_input, detach_reset, surrogate, alpha)
        _check_tau("init_tau", init_tau, minimum=math.nextafter(1.0, 2.0))
        self.init_tau = float(init_tau)
        self.w = nn.Parameter(torch.empty((), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.w, -math.log(self.init_tau - 1.0))

    def leak_at(self, dtype: torch.dtype) -> Tensor:
        return torch.sigmoid(self.w.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Input currents [T, B, ...] to spikes [T, B, ...]."""
        if torch.jit.is_scripting():
            return self._fire_scripted(x, self.leak_at(membrane_dtype(x)))
        return self._fire(x, self.leak_at(membrane_dtype(x)))

    def extra_repr(self) -> str:
        return f"init_tau={self.init_tau}, {super().extra_repr()}"


def _check_tau(name: str, tau: float, minimum: float) -> None:
    if not (math.isfinite(tau) and tau >= minimum):
        bound = "at least 1" if minimum == 1.0 else "above 1"
        raise ValueError(f"{name}={tau} must be a finite number of time steps, {bound}")


# Called as layer(v_threshold=..., device=..., dtype=...).
NeuronLayer = Callable[..., nn.Module]

NEURONS: dict[str, NeuronLayer] = {"lif": LIF, "if": IF, "plif": ParametricLIF}


def get_neuron_layer(neuron: Union[str, NeuronLayer], args: Optional[Mapping[str, Any]] = None) -> NeuronLayer:
    """Resolve "lif", "if" or "plif"; a class or a `functools.partial` of one passes through.

    Args:
        neuron: Name or layer.
        args: Arguments of the layer, such as {"v_threshold": 0.5}.

    Raises:
        ValueError: For an unknown name, or arguments that the layer does not take.
    """
    if isinstance(neuron, str) and neuron not in NEURONS:
        raise ValueError(f"neuron={neuron!r} is unknown, choose one of {sorted(NEURONS)}")
    layer = NEURONS[neuron] if isinstance(neuron, str) else neuron
    if not args:
        return layer
    try:
        layer = partial(layer, **args)
        layer()
    except (TypeError, ValueError) as error:
        raise ValueError(f"neuron_args={args!r}: {error}") from error
    return layer
