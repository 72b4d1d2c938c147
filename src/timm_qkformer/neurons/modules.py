"""Spiking neurons: modules that hold hyper-parameters and call the functional core in `dynamics`.

They keep no state. A call maps input currents [T, B, ...] to spikes [T, B, ...], starting from rest, so there is
nothing to reset between batches and one module may serve several threads. Whoever needs the membrane potential passes
it in and gets it back: `SpikingNeuron.run`, or `run_with_state` for all neurons of a module.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Optional, Tuple, TypeVar

import torch
import torch.fx
from timm.layers import register_notrace_module
from torch import Tensor, nn

from ..errors import check_choice, check_name, check_whole
from ..execution.packing import Range
from .dynamics import fire_neurons, run_neurons
from .recurrence import integrate_and_fire_reference
from .spec import DEFAULT_ALPHA, LEVELS, NeuronSpec, membrane_dtype, spike_range

# One node each in a graph of torch.fx: they decide by dtype and shape.
for _name in ("_checked", "fire_neurons", "membrane_dtype"):
    torch.fx.wrap(_name)

# Called as layer(v_threshold=..., device=..., dtype=...).
NeuronLayer = Callable[..., nn.Module]

_NEURONS: dict[str, NeuronLayer] = {}

LayerT = TypeVar("LayerT", bound=type[nn.Module])


def register_neuron(name: str) -> Callable[[LayerT], LayerT]:
    """Class decorator: make a neuron layer known by a name, for `create_model(..., neuron=name)`, recipes and commands.

    The class derives from `SpikingNeuron`, or from LIF, IF or ParametricLIF and differs in its `levels`, for instance.

    Raises:
        ValueError: For a name that another class has.
        TypeError: For a class that is no `SpikingNeuron`, or names levels that there are not.
    """

    check_name("neuron", name)

    def register(cls: LayerT) -> LayerT:
        if not issubclass(cls, SpikingNeuron):
            raise TypeError(f"neuron {name!r}: {cls.__name__} must derive from timm_qkformer.neurons.SpikingNeuron")
        if cls.levels not in LEVELS:
            raise TypeError(f"neuron {name!r}: levels={cls.levels!r} is unknown, choose one of {LEVELS}")
        known = _NEURONS.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"neuron {name!r} is registered already, as {known}")
        _NEURONS[name] = cls
        register_notrace_module(cls)
        return cls

    return register


def neuron_names() -> list[str]:
    """Names of the registered neurons."""
    return sorted(_NEURONS)


def get_neuron_layer(neuron: str | NeuronLayer, args: Mapping[str, Any] | None = None) -> NeuronLayer:
    """Resolve a registered name such as "lif", "if" or "plif"; a class or a `functools.partial` of one passes through.

    Args:
        neuron: Name or layer.
        args: Arguments of the layer, such as {"v_threshold": 0.5}.

    Raises:
        ValueError: For an unknown name, or arguments that the layer does not take.
    """
    if not callable(neuron):
        check_choice("neuron", neuron, _NEURONS)
    layer = _NEURONS[neuron] if isinstance(neuron, str) else neuron
    if not args:
        return layer
    try:
        layer = partial(layer, **args)
        layer()
    except (TypeError, ValueError) as error:
        raise ValueError(f"neuron_args={args!r}: {error}") from error
    return layer


class SpikingNeuron(nn.Module):
    """What all neurons share: threshold, reset, surrogate and levels.

    A subclass gives the leak (`leak_at`) and may put out other `levels` than "binary".

    Args:
        v_threshold: Firing threshold of the membrane potential.
        v_reset: Potential at rest and after a spike (hard reset). None: rest at 0 and subtract `v_threshold` on a
            spike (soft reset).
        decay_input: Let the input current decay with the potential.
        detach_reset: Keep the reset out of the backward pass.
        surrogate: "sigmoid", "atan" or "box".
        alpha: Steepness of the surrogate. None: 4 for the sigmoid, 2 for atan, 1 for the box.
        device, dtype: Taken as by every layer; there are no parameters that they could apply to.
    """

    levels: str = "binary"
    max_spikes: int = 1

    def __init__(
        self,
        v_threshold: float = 1.0,
        v_reset: Optional[float] = 0.0,
        decay_input: bool = True,
        detach_reset: bool = True,
        surrogate: str = "sigmoid",
        alpha: Optional[float] = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        rest = 0.0 if v_reset is None else float(v_reset)
        if not (math.isfinite(v_threshold) and math.isfinite(rest) and v_threshold > rest):
            raise ValueError(
                f"v_threshold={v_threshold} must be finite and above the resting potential {rest} (v_reset={v_reset})"
            )
        check_choice("surrogate", surrogate, DEFAULT_ALPHA)
        alpha = DEFAULT_ALPHA[surrogate] if alpha is None else alpha
        if not (math.isfinite(alpha) and alpha > 0):
            raise ValueError(f"alpha={alpha} must be a positive number")
        # Of the instance, where TorchScript looks.
        self.levels = self.levels
        self.max_spikes = self.max_spikes
        self.output_range: Range = spike_range(self.levels, self.max_spikes)
        self.v_threshold = float(v_threshold)
        self.v_reset = None if v_reset is None else float(v_reset)
        self.decay_input = decay_input
        self.detach_reset = detach_reset
        self.surrogate = surrogate
        self.alpha = float(alpha)

    def leak_at(self, dtype: torch.dtype) -> Tensor | float:
        """1 / tau for potentials of `dtype`; a tensor if it is learned."""
        raise NotImplementedError

    def spec(self, dtype: torch.dtype) -> NeuronSpec:
        """The hyper-parameters as the dynamics have them, for potentials of `dtype`."""
        rest = 0.0 if self.v_reset is None else self.v_reset
        flags = (self.v_reset is None, self.decay_input, self.levels, self.detach_reset)
        backward = (self.surrogate, self.alpha)
        return NeuronSpec(self.leak_at(dtype), self.v_threshold - rest, *flags, *backward, self.max_spikes)

    def forward(self, x: Tensor) -> Tensor:
        """Input currents [T, B, ...] to spikes [T, B, ...], starting from rest unless a state is carried."""
        if torch.jit.is_scripting():
            return self.run_reference(x)[0]
        return fire_neurons(_checked(x), self.spec(membrane_dtype(x)))

    def run(self, x: Tensor, v: Optional[Tensor] = None) -> Tuple[Tensor, Tensor]:
        """Input currents [T, B, ...] and the potential [B, ...] before them, None at rest, to spikes and potential.

        T steps one at a time equal one call with T. See `dynamics.run_neurons`.
        """
        return run_neurons(_checked(x), self.spec(membrane_dtype(x)), v)

    def run_reference(self, x: Tensor, v: Optional[Tensor] = None) -> Tuple[Tensor, Tensor]:
        """As `run`, by the written-out recurrence under autograd; this is what TorchScript compiles."""
        rest = 0.0 if self.v_reset is None else self.v_reset
        return integrate_and_fire_reference(
            x,
            self._scripted_leak(membrane_dtype(x)),
            self.v_threshold - rest,
            self.v_reset is None,
            self.decay_input,
            self.levels,
            self.detach_reset,
            self.surrogate,
            self.alpha,
            self.max_spikes,
            v,
        )

    def _scripted_leak(self, dtype: torch.dtype) -> Tensor:
        # Not torch.tensor: in TorchScript that rounds to single precision first.
        return torch.full((), self.leak_at(dtype), dtype=torch.float64)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        return (
            f"v_threshold={self.v_threshold}, v_reset={self.v_reset}, decay_input={self.decay_input}, "
            f"detach_reset={self.detach_reset}, surrogate={self.surrogate}, alpha={self.alpha}"
        )


@register_neuron("lif")
class LIF(SpikingNeuron):
    """Leaky integrate-and-fire neurons with a fixed membrane time constant.

    Args:
        tau: Membrane time constant in time steps, at least 1 (1: the potential is the input).
        **kwargs: `v_threshold`, `v_reset`, `decay_input`, `detach_reset`, `surrogate`, `alpha`, `device` and `dtype`,
            see `SpikingNeuron`.

    Raises:
        ValueError: For a `tau` below 1 or any hyper-parameter outside its range.
    """

    def __init__(self, tau: float = 2.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _check_tau("tau", tau, minimum=1.0)
        self.tau = float(tau)

    def leak_at(self, dtype: torch.dtype) -> float:
        return 1.0 / self.tau

    def extra_repr(self) -> str:
        return f"tau={self.tau}, {super().extra_repr()}"


@register_neuron("if")
class IF(SpikingNeuron):
    """Integrate-and-fire neurons: the potential sums the input currents and never leaks.

    Args:
        **kwargs: `v_threshold`, `v_reset`, `detach_reset`, `surrogate`, `alpha`, `device` and `dtype`, see
            `SpikingNeuron`.
    """

    def __init__(self, **kwargs: Any) -> None:
        if "decay_input" in kwargs:
            raise TypeError("IF neurons take no decay_input: without a leak there is nothing to decay")
        super().__init__(decay_input=False, **kwargs)

    def leak_at(self, dtype: torch.dtype) -> float:
        return 0.0


@register_neuron("plif")
class ParametricLIF(SpikingNeuron):
    """Leaky integrate-and-fire neurons that learn one membrane time constant per layer.

    1 / tau = sigmoid(w), so tau stays above 1 whatever the optimizer does to the parameter `w`
    (arXiv 2007.05785, eq. 9).

    Args:
        init_tau: Initial membrane time constant in time steps, above 1.
        device, dtype: Of the parameter.
        **kwargs: `v_threshold`, `v_reset`, `decay_input`, `detach_reset`, `surrogate` and `alpha`, see `SpikingNeuron`.

    Raises:
        ValueError: For an `init_tau` of at most 1 or any hyper-parameter outside its range.
    """

    def __init__(self, init_tau: float = 2.0, device: Any = None, dtype: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _check_tau("init_tau", init_tau, minimum=math.nextafter(1.0, 2.0))
        self.init_tau = float(init_tau)
        self.w = nn.Parameter(torch.empty(1, device=device, dtype=dtype))  # FSDP shards no scalars
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set w to what the initial time constant means."""
        nn.init.constant_(self.w, -math.log(self.init_tau - 1.0))

    def leak_at(self, dtype: torch.dtype) -> Tensor:
        return torch.sigmoid(self.w.to(dtype)).squeeze(0)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        # Files of earlier versions, and of spikingjelly, have a scalar.
        w = state_dict.get(f"{prefix}w")
        if isinstance(w, Tensor) and w.dim() == 0:
            state_dict[f"{prefix}w"] = w.view(1)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _scripted_leak(self, dtype: torch.dtype) -> Tensor:
        return self.leak_at(dtype)

    def extra_repr(self) -> str:
        return f"init_tau={self.init_tau}, {super().extra_repr()}"


@register_neuron("ilif")
class IntegerLIF(LIF):
    """I-LIF: leaky neurons that may fire several times in a time step (arXiv 2407.20708; arXiv 2411.16061).

    The potential is rounded to a number of spikes, 0 to `max_spikes`. A convolution of it is the sum of so many
    convolutions of single spikes: one step stands for `max_spikes` steps of neurons that fire once in each, at the
    price of one in training.

    Args:
        max_spikes: Spikes in a time step at most; D in the papers.
        tau: Membrane time constant in time steps, at least 1.
        v_threshold: What a spike stands for, and takes from the potential; the first comes at half of it.
        v_reset, decay_input, surrogate: Of `SpikingNeuron`; here by default a soft reset, an input that does not decay,
            and the box.
        alpha: None: one over the threshold for the box: the gradient is that, from 0 to `max_spikes` thresholds, as in
            the papers.
        **kwargs: `detach_reset`, `device` and `dtype`, see `SpikingNeuron`.

    Raises:
        ValueError: For any hyper-parameter outside its range.
    """

    levels = "integer"

    def __init__(
        self,
        max_spikes: int = 4,
        tau: float = 2.0,
        v_threshold: float = 1.0,
        v_reset: Optional[float] = None,
        decay_input: bool = False,
        surrogate: str = "box",
        alpha: Optional[float] = None,
        **kwargs: Any,
    ) -> None:
        self.max_spikes = check_whole("max_spikes", max_spikes, 1)
        if alpha is None and surrogate == "box" and v_threshold > 0:
            alpha = 1.0 / v_threshold
        super().__init__(
            tau,
            v_threshold=v_threshold,
            v_reset=v_reset,
            decay_input=decay_input,
            surrogate=surrogate,
            alpha=alpha,
            **kwargs,
        )

    def extra_repr(self) -> str:
        return f"max_spikes={self.max_spikes}, {super().extra_repr()}"


@register_neuron("relu")
class ReLUNeuron(SpikingNeuron):
    """Rectifiers in place of neurons: max(x, 0), real numbers, without a potential (A2OS2A, arXiv 2503.00226).

    It takes the arguments of `SpikingNeuron` as every neuron layer does; none of them matters.
    """

    levels = "real"

    def leak_at(self, dtype: torch.dtype) -> float:
        return 1.0

    def extra_repr(self) -> str:
        return ""


def _check_tau(name: str, tau: float, minimum: float) -> None:
    if not (math.isfinite(tau) and tau >= minimum):
        bound = "at least 1" if minimum == 1.0 else "above 1"
        raise ValueError(f"{name}={tau} must be a finite number of time steps, {bound}")


def _checked(x: Tensor) -> Tensor:
    if torch.jit.is_tracing():  # a trace would hold this check for a constant, and says so
        return x
    if not x.is_floating_point() or x.dim() < 1 or x.shape[0] < 1:
        raise ValueError(
            "a neuron needs floating-point input currents [T, B, ...] with at least one time step, "
            f"got {x.dtype} of shape {list(x.shape)}"
        )
    return x
