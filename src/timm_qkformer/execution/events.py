"""Convolutions of spikes by adding weights up, event by event, and the weights' gradients.

The kernels are in events.cpp and event_gradients.cpp.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .memory import fresh
from .native import INT, POINTER, THREADS, function, may_run, neuron_operand

_ARITHMETIC = {torch.float32: torch.float32, torch.bfloat16: torch.float32, torch.int8: torch.int8}
_TILES = (64, 32, 16)  # output channels
MOST_CHANNELS = 2**16  # that 16 bits can name
_MOST_STEPS = 64  # whose sums the kernel keeps in the cache together
LEAST_OUTPUTS = _TILES[-1]  # a whole number of which the gradient takes
_LEAST_TASKS = 16  # that the gradient is divided into, for as many threads
_CHUNK = 256  # pixels of a chunk in event_gradients.cpp, about

# Input, weights, bias, scale; M, H, W, C, C', side, stride, width of a tile
_CONVOLUTION: list[Any] = [*[POINTER] * 4, *[INT] * 8]
_OPERANDS: dict[str, list[Any]] = {
    "convolve": [*_CONVOLUTION, INT, POINTER, POINTER, THREADS],
    "convolve_fire": [*_CONVOLUTION, INT, POINTER, POINTER, INT, POINTER, INT, POINTER, POINTER, THREADS],
    "weight_gradient": [POINTER, POINTER, *[INT] * 8, POINTER, THREADS],
}
# The functions of each file, for weights or gradients of these types
_FUNCTIONS: dict[str, dict[str, list[Any]]] = {
    file: {f"{name}_{dtype}": _OPERANDS[name] for name in names for dtype in dtypes}
    for file, names, dtypes in (
        ("events.cpp", ("convolve", "convolve_fire"), ("float32", "int8")),
        ("event_gradients.cpp", ("weight_gradient",), ("float32", "bfloat16")),
    )
}


def _kernel(name: str, dtype: torch.dtype) -> Callable[..., None] | None:
    name, file = _place(name, dtype)
    return function(name, __package__, file, _FUNCTIONS[file])


@lru_cache
def _place(name: str, dtype: torch.dtype) -> tuple[str, str]:
    """A function's name for this dtype, and its file."""
    name += f"_{str(dtype).removeprefix('torch.')}"
    return name, next(file for file, functions in _FUNCTIONS.items() if name in functions)


def can_run(x: Tensor) -> bool:
    """Whether there are kernels for spikes x here and now; compiles them if they may run and none are there yet."""
    return may_run(x) and _kernel("convolve", torch.float32) is not None


def can_train(x: Tensor) -> bool:
    """Whether there are kernels for the weights' gradients, too."""
    return can_run(x) and _kernel("weight_gradient", torch.float32) is not None


def first_spikes(x: Tensor) -> Tensor:
    """Of spikes [T, ...] of neurons that fire at every k-th step, each with its k, the first of each neuron.

    So do neurons with a hard reset whose input is the same at every step. What a layer behind them adds up at step t is
    what it adds up for the first spikes of all steps that divide t, and those are fewer.
    """
    first = x.clone()
    fired = x[0].clone()
    for step, spikes in zip(first[1:], x[1:], strict=True):
        torch.gt(spikes, fired, out=step)
        fired |= spikes
    return first


def weight_gradient(x: Tensor, grad: Tensor, out: Tensor) -> None:
    """Gradient of a convolution's weights. It has stride 1 and a padding of half a kernel.

    Args:
        x: Spikes or spike sums as bytes, [M, H, W, C], contiguous.
        grad: Gradient of the currents in float32 or bfloat16, [M, H, W, C'], contiguous; C' a multiple of 16.
        out: The result, [C', C, k, k], in any dtype, contiguous or in channels-last memory.
    """
    outputs, C, side, _ = out.shape
    width = next(width for width in _TILES if outputs % width == 0)
    tiles = outputs // width
    parts = min(-(-x.numel() // C // _CHUNK), -(-_LEAST_TASKS // tiles))
    sums = torch.empty(parts, tiles, side**2, C, width, dtype=torch.float32, device=x.device)
    kernel = _kernel("weight_gradient", grad.dtype)
    assert kernel is not None
    operands = (*x.shape, outputs, side, width, parts, sums.data_ptr(), torch.get_num_threads())
    kernel(x.data_ptr(), grad.data_ptr(), *operands)
    out.unflatten(0, (tiles, width)).flatten(3).copy_(sums.sum(0).permute(0, 3, 2, 1))


class EventWeights:
    """Weights in tiles [C' / width, k k, C, width]; C' is padded where no width divides it.

    Args:
        weight: Float32, bfloat16 or int8, [C', C, k, k].
        bias: Float32, [C'].
        scale: Of the weights, [C'] in float32, or None.
        stride: Of the convolution; the padding is half a kernel.
    """

    def __init__(self, weight: Tensor, bias: Tensor, scale: Tensor | None, stride: int) -> None:
        self.arithmetic = _ARITHMETIC[weight.dtype]
        self.outputs, channels, self.side, _ = weight.shape
        self.stride = stride
        self.width = next(width for width in _TILES if self.outputs % width == 0 or width == _TILES[-1])
        padding = -self.outputs % self.width
        weight, bias = weight.to(self.arithmetic), bias.float()
        if scale is not None and self.arithmetic == torch.float32:
            weight, scale = weight * scale.view(-1, 1, 1, 1), None
        padded = F.pad(weight, (0, 0, 0, 0, 0, 0, 0, padding))
        tiles = padded.view(-1, self.width, channels, self.side**2).permute(0, 3, 2, 1)
        if self.arithmetic == torch.int8:  # a channel of the tile's first half beside one of its second, all above zero
            tiles = tiles.unflatten(3, (2, -1)).transpose(3, 4).flatten(3).to(torch.int16).add(128).to(torch.uint8)
        self.tiles = tiles.contiguous()
        self.bias = F.pad(bias, (0, padding))
        self.padded = self.outputs + padding
        self.scale = torch.ones_like(self.bias) if scale is None else F.pad(scale.float(), (0, padding))

    @staticmethod
    def take(weight: Tensor, x: Tensor) -> bool:
        """Whether there are kernels for weights [C', C, k, k] of this kind and spikes x, here and now."""
        if weight.dtype not in _ARITHMETIC or x.dtype != torch.uint8 or weight.shape[1] > MOST_CHANNELS:
            return False
        return can_run(x)

    def currents(self, x: Tensor, periods: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
        """Spikes [M, H, W, C] to input currents [M, H', W', C'] in float32 or, rounded, in bfloat16.

        With `periods` above one, at most 64, M is T B with this T, and the neurons are those of `first_spikes`.
        """
        if periods > 1:
            x = first_spikes(x.unflatten(0, (periods, -1))).flatten(0, 1)
        x, stride = self._needed(x)
        out = fresh((*x.shape[:1], *self._size(x, stride), self.padded), dtype)
        kernel = _kernel("convolve", self.arithmetic)
        assert kernel is not None
        results = (out.data_ptr(), None) if dtype == torch.float32 else (None, out.data_ptr())
        kernel(*self._operands(x, stride), periods, *results, torch.get_num_threads())
        return out[..., : self.outputs].contiguous()

    def can_fire(self, steps: int) -> bool:
        """Whether neurons may follow in the same kernel."""
        return self.can_add_periods(steps) and self.padded == self.outputs

    def can_add_periods(self, steps: int) -> bool:
        """Whether `currents` may make use of periods."""
        return steps <= _MOST_STEPS

    def fire(
        self, x: Tensor, neuron: Any, sums: Tensor | None, before: Tensor | None = None, after: Tensor | None = None
    ) -> Tensor:
        """Spikes [T, B, H, W, C] to those of the neurons that follow, [T, B, H', W', C'], or `sums` with them added.

        `neuron` is the `NeuronSpec` of the neurons, which continue from the potentials `before` and leave theirs in
        `after`: float32 [B, H', W', C'], contiguous, perhaps the same tensor.
        Steps of `sums` may lie anywhere; each is contiguous.
        """
        T, B = x.shape[:2]
        images, stride = self._needed(x.flatten(0, 1))
        size = self._size(images, stride)
        out = sums if sums is not None else images.new_empty(T, B, *size, self.outputs)
        target = out.data_ptr(), out.stride(0)
        kernel = _kernel("convolve_fire", self.arithmetic)
        assert kernel is not None
        potentials = (None if v is None else v.data_ptr() for v in (before, after))
        operands = (*((None, 0) if sums is None else target), *target, *potentials, torch.get_num_threads())
        kernel(*self._operands(images, stride), T, neuron_operand(neuron), *operands)
        return out

    def _needed(self, x: Tensor) -> tuple[Tensor, int]:
        """Contiguous, without pixels that a 1x1 convolution strides over, and the stride that remains."""
        if self.side == 1 and self.stride > 1:
            return x[:, :: self.stride, :: self.stride].contiguous(), 1
        return x.contiguous(), self.stride

    def fired_shape(self, x: Tensor) -> tuple[int, ...]:
        """[B, H', W', C'], of one step of what `fire` gives for spikes [T, B, H, W, C]."""
        B, H, W = x.shape[1:4]
        return B, (H - 1) // self.stride + 1, (W - 1) // self.stride + 1, self.outputs

    def _size(self, x: Tensor, stride: int) -> tuple[int, int]:
        _, H, W, _ = x.shape
        return (H - 1) // stride + 1, (W - 1) // stride + 1

    def _operands(self, x: Tensor, stride: int) -> tuple[int, ...]:
        tensors = (tensor.data_ptr() for tensor in (x, self.tiles, self.bias, self.scale))
        return *tensors, *x.shape, self.padded, self.side, stride, self.width
