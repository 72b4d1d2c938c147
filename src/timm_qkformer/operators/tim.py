"""Temporal interaction (TIM, arXiv 2401.11687): spiking self-attention whose queries remember earlier time steps."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, List, Optional, Tuple

import torch
import torch.fx
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from ..errors import check_number, check_whole, is_number
from ..execution.convolution import matmul
from ..layers.conv import unflatten
from ..neurons import LIF, NeuronLayer, SpikingNeuron
from ..neurons.spec import membrane_dtype
from ..neurons.state import carried_state, run_with_state
from .base import Operation, Operator, register_operator
from .ssa import SpikingSelfAttention

__all__ = ["TemporalInteraction", "TemporalInteractionAttention"]

torch.fx.wrap("_interact")  # one node in a graph of torch.fx: it goes over the time steps that there are

State = tuple[Tensor, Tensor | None, Tensor | None]

KERNEL = 5  # of the convolution, along the channels of a head


@register_notrace_module
class TemporalInteraction(nn.Module):
    """Queries q [T, B, heads, channels of a head, N] to z of the same shape, each step's with those before it:

        z[0] = q[0],  z[t] = O(alpha * I(conv(z[t - 1])) + (1 - alpha) * q[t])

    I and O are neurons with states of their own, at rest at t = 1. The convolution's channels are the N tokens; it
    slides along the channels of a head. It has weights for a fixed number of tokens. Another number gets them
    interpolated, as position embeddings are: over rows and columns if both are squares, else over the tokens in order.

    Args:
        tokens: Tokens N of the weights.
        alpha: Share of what earlier steps say.
        thresholds: Of I and of O.
        neuron_layer: Factory of the neurons.
    """

    if TYPE_CHECKING:  # TorchScript would take them for types of its own
        in_neuron: nn.Module
        out_neuron: nn.Module
        bias: Tensor

    def __init__(
        self,
        tokens: int = 16,
        alpha: float = 0.5,
        thresholds: Sequence[float] = (0.3, 0.5),
        neuron_layer: NeuronLayer = LIF,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.tokens, self.alpha = check_whole("tokens", tokens, 1), check_number("alpha", alpha, 0, 1)
        conv: Any = nn.Conv1d(self.tokens, self.tokens, KERNEL, **dd)  # for its way of starting
        self.weight, self.bias = conv.weight, conv.bias
        self.in_neuron = neuron_layer(v_threshold=thresholds[0], **dd)
        self.out_neuron = neuron_layer(v_threshold=thresholds[1], **dd)

    def weights(self, tokens: int) -> Tuple[Tensor, Tensor]:
        """Weights [N, N, 5] and bias [N] of the convolution for a number of tokens."""
        if tokens == self.tokens:
            return self.weight, self.bias
        side, own = int(tokens**0.5 + 0.5), int(self.tokens**0.5 + 0.5)  # as TorchScript knows it
        if side * side == tokens and own * own == self.tokens:
            line = _interpolation(side, own, self.weight)
            rows = torch.kron(line, line)
        else:
            rows = _interpolation(tokens, self.tokens, self.weight)
        weight = torch.einsum("no,oik,mi->nmk", rows, self.weight, rows) * (self.tokens / tokens)
        return weight, rows @ self.bias

    def convolve(self, z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """One step's [B, heads, channels, N] to input currents of I, of the same shape."""
        B, heads, _, _ = z.shape
        rows = z.flatten(0, 1).transpose(1, 2)  # [B * heads, N, channels]
        currents = F.conv1d(rows, weight.to(z.dtype), bias.to(z.dtype), padding=weight.shape[2] // 2)
        return unflatten(currents.transpose(1, 2), 0, [B, heads])

    def forward(self, q: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self.run_reference(q)
        return _interact(self, q)

    def run(self, q: Tensor, state: State | None = None, watched: bool = True) -> tuple[Tensor, State]:
        """z for more steps, and what the next ones need: the last z and the potentials of I and O, None at rest.

        Args:
            q: Queries of any number of steps.
            state: From the steps before; None at the first.
            watched: Whether hooks on the neurons see them fire.
        """
        steps = [] if state is not None else [q[0]]
        z, v_in, v_out = (q[0], None, None) if state is None else (state[0].to(q.dtype), *state[1:])
        weight, bias = self.weights(q.shape[4]) if len(q) > len(steps) else (self.weight, self.bias)
        for t in range(len(steps), len(q)):
            current = self.convolve(z, weight, bias).unsqueeze(0)
            remembered, v_in = _fire(self.in_neuron, current, v_in, watched)
            driven = self.alpha * remembered + (1 - self.alpha) * q[t : t + 1]
            fired, v_out = _fire(self.out_neuron, driven, v_out, watched)
            z = fired[0]
            steps.append(z)
        return torch.stack(steps), (z, v_in, v_out)

    def run_reference(self, q: Tensor) -> Tensor:
        """As `run`, from the first step, by the written-out recurrence; this is what TorchScript compiles."""
        weight, bias = self.weights(q.shape[4])
        z = q[0]
        steps: List[Tensor] = [z]
        v_in: Optional[Tensor] = None
        v_out: Optional[Tensor] = None
        for t in range(1, q.shape[0]):
            current = self.convolve(z, weight, bias).unsqueeze(0)
            remembered, v_in = self.in_neuron.run_reference(current, v_in)  # type: ignore[operator]
            fired, v_out = self.out_neuron.run_reference(  # type: ignore[operator]
                self.alpha * remembered + (1 - self.alpha) * q[t : t + 1], v_out
            )
            z = fired[0]
            steps.append(z)
        return torch.stack(steps)


def _interact(interaction: TemporalInteraction, q: Tensor) -> Tensor:
    """`interaction.run`, on from the state that `run_with_state` carries here and now."""
    carried = carried_state()
    before = None if carried is None else carried.take()
    z, last = interaction.run(q, None if before is None else (before[:, 0], before[:, 1], before[:, 2]))
    if carried is not None:
        rest = torch.zeros_like(last[0], dtype=membrane_dtype(q))
        carried.put(torch.stack([rest if part is None else part.to(rest.dtype) for part in last], 1))  # samples first
    return z


def _checked_thresholds(thresholds: Any, neurons: Sequence[Any]) -> list[float]:
    """Thresholds for three neurons, if they are that."""
    is_row = isinstance(thresholds, Sequence) and len(thresholds) == 3
    if not is_row or not all(map(is_number, thresholds)):
        raise ValueError(f"thresholds={thresholds!r} must be three numbers: of I, O and the neuron after attention")
    rest = max(getattr(neuron, "v_reset", None) or 0.0 for neuron in neurons)
    if not min(thresholds) > rest:
        raise ValueError(f"thresholds={thresholds!r} must be above the resting potential {rest}")
    return [float(threshold) for threshold in thresholds]


def _interpolation(size: int, own: int, like: Tensor) -> Tensor:
    """[size, own]: linear interpolation from `own` places to `size` of them."""
    ones = torch.eye(own, dtype=like.dtype, device=like.device).unsqueeze(0)
    return F.interpolate(ones, size=size, mode="linear", align_corners=False)[0].transpose(0, 1)


def _fire(neuron: nn.Module, x: Tensor, v: Tensor | None, watched: bool) -> tuple[Tensor, Tensor | None]:
    """What neurons fire for a step [1, ...], and their potential after it, None where they have none."""
    is_real = not isinstance(neuron, SpikingNeuron) or neuron.levels == "real"
    if isinstance(neuron, SpikingNeuron) and (torch.compiler.is_compiling() or not watched):
        spikes, after = neuron.run(x, v)
        return spikes, None if is_real else after
    spikes, state = run_with_state(neuron, x, state=None if is_real or v is None else (v,))
    return spikes, state[0] if state else None


@register_operator("tim")
class TemporalInteractionAttention(SpikingSelfAttention):
    """Spiking self-attention whose queries pass through `TemporalInteraction`:

        Z = TIM(Q),  X' = LIF(0.125 * Z (K^T V)),  X'' = LIF(BN(proj X'))

    The authors' code asks for thresholds of 0.3 (I), 0.5 (O) and 0.5 (X'), but its neurons ignore them and have 1: O,
    whose input never exceeds 1, then stays silent, and attention works at the first step alone. thresholds=(1, 1, 1)
    is what was released and, by all that is known, measured.

    Args:
        dim, num_heads: See `Operator`.
        tokens, alpha: See `TemporalInteraction`.
        thresholds: Of I, O and the neuron after attention.
        **kwargs: See `Operator`.
    """

    repeatable = (TemporalInteraction,)
    neuron_names = {"attn_neuron": "X'", "interaction.in_neuron": "I", "interaction.out_neuron": "O"}
    view_labels = dict(Operator.view_labels)
    views = Operator.views  # the queries that meet the keys are no input
    kernel = None  # type: ignore[assignment]
    couples_batch = False

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        tokens: int = 16,
        alpha: float = 0.5,
        thresholds: Sequence[float] = (0.3, 0.5, 0.5),
        neuron_layer: NeuronLayer = LIF,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        thresholds = _checked_thresholds(thresholds, [neuron_layer(**dd)] * 3)
        inner_args = {"attn_neuron": {"v_threshold": thresholds[2]}}
        super().__init__(dim, num_heads, neuron_layer=neuron_layer, inner_args=inner_args, **dd, **kwargs)
        self.interaction = TemporalInteraction(tokens, alpha, thresholds[:2], neuron_layer, **dd)

    def set_thresholds(self, thresholds: Sequence[float]) -> None:
        """Give I, O and the neuron after attention other thresholds.

        Raises:
            ValueError: For another number of them, or one that is not above the resting potential. No threshold is
                changed then.
        """
        neurons: Any = (self.interaction.in_neuron, self.interaction.out_neuron, self.attn_neuron)
        for neuron, threshold in zip(neurons, _checked_thresholds(thresholds, neurons), strict=True):
            neuron.v_threshold = threshold

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Heads are stored [channels, tokens], so (Z (K^T V))^T = (V K^T) Z.
        return self.attn_neuron(matmul(matmul(v, k.transpose(-2, -1)), self.interaction(q)) * self.scale)

    def operations(self, q: Tensor, k: Tensor, v: Tensor) -> Sequence[Operation]:
        z, _ = self.interaction.run(q, watched=False)
        counted = [*super().operations(z, k, v)]
        before = z[:-1]  # what the convolution takes; it leaves out what slides over a head's ends
        if len(before) > 0:
            channels, tokens = z.shape[3:]
            places = torch.arange(channels, device=z.device)
            taps = sum(((places + shift >= 0) & (places + shift < channels)).double() for shift in range(-2, 3))
            additions = float((before.abs().double().sum((0, 1, 2, 4)) * taps).sum()) * tokens
            counted.insert(0, Operation("temporal interaction", before, KERNEL * tokens, additions))
        return counted
