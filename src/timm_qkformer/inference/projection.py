"""Convolutions of deployed models: spikes and images in, input currents out, in the arithmetic of their input's dtype.

oneDNN runs them where it can, with weights in the layout that it likes best. That layout is made when it is first
needed and never saved: `state_dict`, copies and pickles hold plain tensors.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .derived import DerivedState
from .precision import has_onednn
from .weights import Folded, quantise

__all__ = ["Projection"]


class _Packed(NamedTuple):
    key: object  # what it was made of
    run: Callable[[Tensor], Tensor]


class Projection(DerivedState):
    """Convolution with its batch norm folded in, channels last: [N, H, W, C] to input currents [N, H', W', C'].

    Products are int8 x uint8 with int32 sums for uint8 input, bfloat16 with float32 sums for bfloat16 input, and of the
    input's own dtype otherwise. Currents are float32 for uint8 input and of the input's dtype otherwise.

    Args:
        folded: Convolutions of the same input, side by side in the result.
        stride, groups: Of the convolutions; the padding is half a kernel.
        dtype: That weights are kept in: float64, float32, bfloat16 or int8 (with one scale per output channel).
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
            weight, scale = quantise(weight)
        self.stride = stride
        self.groups = groups
        self.kernel_size = weight.shape[-1]
        self.register_buffer("weight", weight.to(dtype))
        self.register_buffer("bias", bias.to(torch.float64 if dtype == torch.float64 else torch.float32))
        self.register_buffer("scale", scale)

    @property
    def in_channels(self) -> int:
        return self.weight.shape[1] * self.groups

    @property
    def out_channels(self) -> int:
        return self.weight.shape[0]

    @property
    def is_matrix(self) -> bool:
        """Whether pixels, subsampled perhaps, are just multiplied by a matrix."""
        return self.kernel_size == 1 and self.groups == 1

    def forward(self, x: Tensor) -> Tensor:
        packed: _Packed | None = self.derived.get(x.dtype)
        key = tuple((tensor.data_ptr(), tensor._version) for tensor in (self.weight, self.bias))
        if packed is None or packed.key != key:
            packed = self.derived[x.dtype] = _Packed(key, self._pack(x))
        if self.is_matrix:
            if self.stride > 1:
                x = x[:, :: self.stride, :: self.stride]
            return packed.run(x.reshape(-1, x.shape[-1])).unflatten(0, x.shape[:-1])
        return packed.run(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()

    def _pack(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        with torch.inference_mode(False), torch.no_grad():
            if x.dtype == torch.uint8:
                return self._pack_int8(x)
            weight = self.weight.to(x.dtype)
            if self.scale is not None:
                weight = weight * self.scale.to(x.dtype).view(-1, 1, 1, 1)
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
