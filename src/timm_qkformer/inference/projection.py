"""Convolutions of deployed models: spikes and images in, input currents out.

Spikes as bytes run event by event (execution/events.py), everything else as dense products in the arithmetic of its
dtype, by oneDNN where it can. Both want weights in a layout of their own. That layout is made when it is first needed
and never saved: `state_dict`, copies and pickles hold plain tensors.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..execution.events import EventWeights
from ..neurons import NeuronSpec
from ..neurons.state import carried_state
from . import kernels
from .neurons import DerivedState
from .weights import Folded, has_onednn, quantize, to_bfloat16


class _Packed(NamedTuple):
    key: object  # what they were made of
    weights: Any


class Projection(DerivedState):
    """Convolution with its batch norm folded in, channels last: [N, H, W, C] to input currents [N, H', W', C'].

    Spikes as bytes (uint8) are added up event by event if `events`, in float32 or, for int8 weights, in integers; else
    they are multiplied with int8 weights where oneDNN does that. Other input is multiplied in its own dtype. Currents
    are float32 for spikes as bytes and of the input's dtype otherwise.

    Args:
        folded: Convolutions of the same input, side by side in the result.
        stride, groups: Of the convolutions; the padding is half a kernel.
        dtype: That weights are kept in: float64, float32, bfloat16 or int8, these two with one scale per output
            channel.
    """

    weight: Tensor
    bias: Tensor
    scale: Tensor | None

    def __init__(self, folded: Sequence[Folded], stride: int, groups: int, dtype: torch.dtype) -> None:
        super().__init__()
        weight = torch.cat([part.weight for part in folded])
        bias = torch.cat([part.bias for part in folded])
        scale = None
        if dtype == torch.int8:
            weight, scale = quantize(weight)
        elif dtype == torch.bfloat16:
            weight, scale = to_bfloat16(weight)
        self.stride = stride
        self.groups = groups
        self.events = False  # whether spikes as bytes are added up event by event
        self.seen: list[float] | None = None  # densities of inputs, while `products.densities` asks for them
        self.kernel_size = weight.shape[-1]
        self.register_buffer("weight", weight.to(dtype))
        self.register_buffer("bias", bias.to(torch.float64 if dtype == torch.float64 else torch.float32))
        self.register_buffer("scale", scale)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        errors: Any,
    ) -> None:
        found = state_dict.get(f"{prefix}weight")
        coded = (torch.int8, torch.bfloat16)  # with a scale that makes numbers of them; copying would round them anew
        if found is not None and found.dtype != self.weight.dtype and {found.dtype, self.weight.dtype} & {*coded}:
            errors.append(
                f"{prefix}weight is {found.dtype}, this model was deployed with {self.weight.dtype}: a state dict fits "
                "the precision that it was saved in. Load it into such a model, or deploy the original again."
            )
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    @property
    def in_channels(self) -> int:
        """Channels that it takes."""
        return self.weight.shape[1] * self.groups

    @property
    def out_channels(self) -> int:
        """Channels that it returns."""
        return self.weight.shape[0]

    @property
    def is_matrix(self) -> bool:
        """Whether pixels, subsampled perhaps, are just multiplied by a matrix."""
        return self.kernel_size == 1 and self.groups == 1

    def forward(self, x: Tensor, periods: int = 1) -> Tensor:
        events = self._event_weights(x)
        if events is not None:
            return events.currents(x, periods if events.can_add_periods(periods) else 1)
        if x.dtype == torch.uint8 and not self._multiplies_bytes(x):
            return self._multiply(x.to(self._multiplied_as(x))).to(self.bias.dtype)
        return self._multiply(x)

    def _multiply(self, x: Tensor) -> Tensor:
        """Dense products, in the arithmetic of x's dtype."""
        run: Callable[[Tensor], Tensor] = self._packed(x.dtype, lambda: self._pack(x))
        if self.is_matrix:
            if self.stride > 1:
                x = x[:, :: self.stride, :: self.stride]
            return run(x.reshape(-1, x.shape[-1])).unflatten(0, x.shape[:-1])
        return run(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()

    def fire(self, x: Tensor, neuron: NeuronSpec, dtype: torch.dtype, sums: Tensor | None = None) -> Tensor:
        """Neurons after the convolution: [T, B, H, W, C] to spikes [T, B, H', W', C'], in one kernel if there is one.

        Args:
            x: Spikes or, H left out, spikes of tokens.
            neuron: The neurons.
            dtype: Of the result.
            sums: Spike sums of the result's shape and dtype, to which the spikes are added in place.
        """
        pixels = x if x.dim() == 5 else x.unsqueeze(2)
        events = self._event_weights(pixels)
        dense_steps = sums is None or sums[0].is_contiguous()
        carried = carried_state()
        if events is not None and dtype == torch.uint8 and dense_steps and events.can_fire(x.shape[0]):
            shape = events.fired_shape(pixels)
            shape = shape if x.dim() == 5 else (shape[0], *shape[2:])
            if carried is None or carried.fits(shape):
                spikes = events.fire(pixels, neuron, sums, *kernels.potentials(carried, shape, torch.float32))
                return spikes if sums is not None or x.dim() == 5 else spikes.squeeze(2)
        return kernels.fire(self.currents(x), neuron, dtype, sums=sums, out=sums)

    def currents(self, x: Tensor, periodic: bool = False) -> Tensor:
        """[T, B, H, W, C] or, for tokens, [T, B, N, C] to input currents, likewise.

        `periodic` spikes are those of neurons that fire at every k-th step, see `execution.events.first_spikes`.
        """
        images = x.flatten(0, 1)
        if x.dim() == 4:
            return self(images.unsqueeze(1)).squeeze(1).unflatten(0, x.shape[:2])
        return self(images, x.shape[0] if periodic else 1).unflatten(0, x.shape[:2])

    def _packed(self, way: object, pack: Callable[[], Any]) -> Any:
        """What `pack` makes of the weights, kept until they change."""
        weight, bias = self.weight, self.bias
        if weight.is_inference() or bias.is_inference():  # a copy made or loaded in inference mode counts no changes
            with torch.inference_mode(False):
                weight, bias = self.weight, self.bias = weight.clone(), bias.clone()
        packed: _Packed | None = self.derived.get(way)
        key = weight.data_ptr(), weight._version, bias.data_ptr(), bias._version
        if packed is None or packed.key != key:
            with torch.inference_mode(False), torch.no_grad():
                packed = self.derived[way] = _Packed(key, pack())
        return packed.weights

    def _event_weights(self, x: Tensor) -> EventWeights | None:
        if self.seen is not None:
            self.seen.append(x.count_nonzero().item() / x.numel())
        if not self.events or self.groups > 1 or not EventWeights.take(self.weight, x):
            return None
        weights: EventWeights = self._packed(
            "events", lambda: EventWeights(self.weight, self.bias, self.scale, self.stride)
        )
        return weights

    def _multiplied_as(self, x: Tensor) -> torch.dtype:
        """What spikes as bytes become where bytes are not multiplied."""
        is_half = self.weight.dtype == torch.bfloat16 and has_onednn(torch.bfloat16, x.device)
        return torch.bfloat16 if is_half else self.bias.dtype

    def _multiplies_bytes(self, x: Tensor) -> bool:
        return self.weight.dtype == torch.int8 and has_onednn(torch.uint8, x.device)

    def _pack(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        if x.dtype == torch.uint8:
            return self._pack_int8(x)
        weight = self.weight.to(torch.promote_types(x.dtype, self.bias.dtype))  # rounded to x's once scaled
        if self.scale is not None:
            weight = weight * self.scale.view(-1, 1, 1, 1)
        weight = weight.to(x.dtype)
        if has_onednn(x.dtype, x.device):
            return self._pack_onednn(x, weight)
        return self._plain(weight, self.bias.to(x.dtype))

    def _plain(self, weight: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
        if self.is_matrix:
            weight = weight.flatten(1)
            return lambda x: F.linear(x, weight, bias)
        weight = weight.contiguous(memory_format=torch.channels_last)
        return lambda x: F.conv2d(x, weight, bias, self.stride, self.kernel_size // 2, 1, self.groups)

    def _conv_args(self) -> tuple[list[int], list[int], list[int], int]:
        """Padding, stride, dilation, groups."""
        return [self.kernel_size // 2] * 2, [self.stride] * 2, [1, 1], self.groups

    def _pack_onednn(self, x: Tensor, weight: Tensor) -> Callable[[Tensor], Tensor]:
        ops, bias = torch.ops.mkldnn, self.bias.to(x.dtype)
        if self.is_matrix:
            rows = x.numel() // x.shape[-1]
            matrix = ops._reorder_linear_weight(weight.flatten(1).contiguous(), rows)
            return lambda x: ops._linear_pointwise(x, matrix, bias, "none", [], "")
        args = self._conv_args()
        kernel = ops._reorder_convolution_weight(weight, *args, [x.shape[i] for i in (0, 3, 1, 2)])
        return lambda x: ops._convolution_pointwise(x, kernel, bias, *args, "none", [], "")

    def _pack_int8(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        ops, scale, bias = torch.ops.onednn, self.scale, self.bias
        assert scale is not None, "spikes of one byte need weights of one byte"
        zeros = torch.zeros_like(scale, dtype=torch.int32)
        spikes: tuple[float, int] = (1.0, 0)  # scale and zero point: they are what they are
        result: tuple[Any, ...] = (1.0, 0, torch.float32, "none", [], "")
        if self.is_matrix:
            matrix = ops.qlinear_prepack(self.weight.flatten(1), [x.numel() // x.shape[-1], x.shape[-1]])
            return lambda x: ops.qlinear_pointwise(x, *spikes, matrix, scale, zeros, bias, *result)
        padding, stride, dilation, groups = self._conv_args()
        shape = [x.shape[i] for i in (0, 3, 1, 2)]
        kernel = ops.qconv_prepack(self.weight, scale, *spikes, stride, padding, dilation, groups, shape)
        args = (stride, padding, dilation, groups)
        return lambda x: ops.qconv_pointwise(x, *spikes, kernel, scale, zeros, bias, *args, *result)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"groups={self.groups}, dtype={self.weight.dtype}"
        )
