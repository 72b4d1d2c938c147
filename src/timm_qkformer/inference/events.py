"""Convolutions of spikes by adding weights up, event by event: what events.cpp computes, for one projection."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .native import event_kernel, neuron_operand
from .neurons import NeuronSpec

__all__ = ["EventWeights"]

_ARITHMETIC = {torch.float32: torch.float32, torch.bfloat16: torch.float32, torch.int8: torch.int16}
_TILES = (64, 32, 16)  # output channels
_MOST_CHANNELS = 2**16  # that 16 bits can name
_MOST_STEPS = 64  # whose sums the kernel keeps in the cache together


class EventWeights:
    """Weights in tiles [C' / width, k k, C, width]; C' is padded where no width divides it.

    Args:
        weight: Float32, bfloat16 or int8, [C', C, k, k].
        bias: Float32, [C'].
        scale: Of int8 weights, [C'].
        stride: Of the convolution; the padding is half a kernel.
    """

    def __init__(self, weight: Tensor, bias: Tensor, scale: Tensor | None, stride: int) -> None:
        self.arithmetic = _ARITHMETIC[weight.dtype]
        self.outputs, channels, self.side, _ = weight.shape
        self.stride = stride
        self.width = next(width for width in _TILES if self.outputs % width == 0 or width == _TILES[-1])
        padding = -self.outputs % self.width
        padded = F.pad(weight.to(self.arithmetic), (0, 0, 0, 0, 0, 0, 0, padding))
        self.tiles = padded.view(-1, self.width, channels, self.side**2).permute(0, 3, 2, 1).contiguous()
        self.bias = F.pad(bias, (0, padding))
        self.scale = torch.ones_like(self.bias) if scale is None else F.pad(scale, (0, padding))

    @staticmethod
    def take(weight: Tensor, x: Tensor) -> bool:
        """Whether there are kernels for weights [C', C, k, k] of this kind and spikes x, here and now."""
        if weight.dtype not in _ARITHMETIC or x.dtype != torch.uint8 or weight.shape[1] > _MOST_CHANNELS:
            return False
        return event_kernel("convolve", _ARITHMETIC[weight.dtype], x) is not None

    def currents(self, x: Tensor) -> Tensor:
        """Spikes [M, H, W, C] to input currents [M, H', W', C'] in float32."""
        x, stride = self._needed(x)
        out = torch.empty(*x.shape[:1], *self._size(x, stride), len(self.bias), device=x.device)
        kernel = event_kernel("convolve", self.arithmetic, x)
        assert kernel is not None
        kernel(*self._operands(x, stride), out.data_ptr(), torch.get_num_threads())
        return out[..., : self.outputs].contiguous()

    def can_fire(self, steps: int) -> bool:
        """Whether neurons may follow in the same kernel."""
        return steps <= _MOST_STEPS and len(self.bias) == self.outputs

    def fire(self, x: Tensor, neuron: NeuronSpec, sums: Tensor | None) -> Tensor:
        """Spikes [T, B, H, W, C] to those of the neurons that follow, [T, B, H', W', C'], or `sums` with them added.

        Steps of `sums` may lie anywhere; each is contiguous.
        """
        T, B = x.shape[:2]
        images, stride = self._needed(x.flatten(0, 1))
        size = self._size(images, stride)
        out = sums if sums is not None else images.new_empty(T, B, *size, self.outputs)
        place = out.data_ptr(), out.stride(0)
        kernel = event_kernel("convolve_fire", self.arithmetic, images)
        assert kernel is not None
        operands = (*((None, 0) if sums is None else place), *place, torch.get_num_threads())
        kernel(*self._operands(images, stride), T, neuron_operand(neuron), *operands)
        return out

    def _needed(self, x: Tensor) -> tuple[Tensor, int]:
        """Contiguous, without pixels that a 1x1 convolution strides over, and the stride that remains."""
        if self.side == 1 and self.stride > 1:
            return x[:, :: self.stride, :: self.stride].contiguous(), 1
        return x.contiguous(), self.stride

    def _size(self, x: Tensor, stride: int) -> tuple[int, int]:
        _, H, W, _ = x.shape
        return (H - 1) // stride + 1, (W - 1) // stride + 1

    def _operands(self, x: Tensor, stride: int) -> tuple[int, ...]:
        tensors = (tensor.data_ptr() for tensor in (x, self.tiles, self.bias, self.scale))
        return *tensors, *x.shape, len(self.bias), self.side, stride, self.width
