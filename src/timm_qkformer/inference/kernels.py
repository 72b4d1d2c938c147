"""Neurons, pooling and operators of deployed models: by a fused kernel where there is one, else in torch operations.

Tensors are channels last, [T, B, N, C] or [T, B, H, W, C]. Input currents are contiguous within a step, C last; a step
may lie anywhere behind the one before it, or all steps at the same address (`expand`). `dtype` is that of the spikes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..execution.libraries import TYPES
from ..execution.memory import fresh
from ..execution.native import DOUBLE, INT, POINTER, THREADS, function, may_run, neuron_operand
from ..neurons import NeuronSpec, integrate_and_fire, membrane_dtype, run_neurons
from ..neurons.state import Carried, carried_state
from ..operators import NativeKernel

# (currents, spikes), as the C++ sources spell them
_TYPES: dict[tuple[torch.dtype, ...], str] = {
    tuple(getattr(torch, name) for name in types.partition(",")[0].split("_")): types for types in TYPES
}

_OWN: dict[str, list[Any]] = {
    "fire": [POINTER, INT, POINTER, INT, POINTER, INT, INT, INT, *[POINTER] * 3, THREADS],
    "pool_fire": [POINTER, INT, POINTER, *[INT] * 5, *[POINTER] * 3, THREADS],
}
_OPERATOR: list[Any] = [POINTER, POINTER, *[INT] * 5, DOUBLE, *[POINTER] * 3, THREADS]


def _kernel(
    source: tuple[str, str], functions: dict[str, list[Any]], name: str, x: Tensor, dtype: torch.dtype
) -> Callable[..., None] | None:
    """A kernel for these currents and spikes; None where torch operations have to do.

    That is: on other devices, where the execution policy leaves kernels out, for nothing to compute, and, after one
    warning, on machines that cannot compile it.
    """
    types = _TYPES.get((x.dtype, dtype))
    if types is None or not may_run(x):
        return None
    suffix = types.split(",")[0]
    typed = {f"{each}_{suffix}": operands for each, operands in functions.items()}
    return function(f"{name}_{suffix}", *source, typed, f"KERNEL({types})\n")


def _own(name: str, x: Tensor, neuron: NeuronSpec, dtype: torch.dtype) -> Callable[..., None] | None:
    return None if neuron.levels == "real" else _kernel((__package__, "kernels.cpp"), _OWN, name, x, dtype)


def fire(
    x: Tensor, neuron: NeuronSpec, dtype: torch.dtype, sums: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """Spikes of input currents x [T, ...], starting from rest or on from the state that is carried.

    Args:
        x: Input currents.
        neuron: The neurons.
        dtype: Of the result, if `out` is not given.
        sums: Spike sums of x's shape and the result's dtype that the spikes are added to.
        out: Where the result goes, `sums` for instance.
    """
    if out is None:
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
    kernel = _own("fire", x, neuron, out.dtype)
    carried = carried_state() if neuron.levels != "real" else None
    if carried is not None and not carried.fits(x.shape[1:]):
        kernel = None  # `run_neurons` says what is wrong
    if kernel is None or not all(_has_dense_steps(tensor) for tensor in (x, sums, out)):
        if carried is None:
            spikes = integrate_and_fire(x, neuron)
        else:
            spikes, v = run_neurons(x, neuron, carried.take())
            carried.put(v)
        out.copy_(spikes if sums is None else sums + spikes)
    else:
        _fire(kernel, x, neuron, sums, out, *potentials(carried, x.shape[1:], membrane_dtype(x)))
    return out


def potentials(
    carried: Carried | None, shape: Sequence[int], dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """What a kernel reads, the next neurons' potential (None at rest), and what it is to write, that after the call.

    The same tensor where the state is the call's to write on. Without a carried state there is neither.
    """
    if carried is None:
        return None, None
    before = carried.take()
    before = None if before is None else before.to(dtype).contiguous()
    after = before if before is not None and carried.donated else fresh(shape, dtype)
    carried.put(after)
    return before, after


def run(x: Tensor, neuron: NeuronSpec, v: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`neurons.run_neurons` by the same kernel: spikes of x's dtype [T, ...] and the potential [...] after them."""
    kernel = _own("fire", x, neuron, x.dtype)
    if kernel is None or not _has_dense_steps(x) or (v is not None and v.shape != x.shape[1:]):
        return run_neurons(x, neuron, v)  # which refuses a potential of another shape
    before = None if v is None else v.to(membrane_dtype(x)).contiguous()
    out, after = torch.empty(x.shape, dtype=x.dtype), torch.empty(x.shape[1:], dtype=membrane_dtype(x))
    _fire(kernel, x, neuron, None, out, before, after)
    return out, after


def _fire(
    kernel: Callable[..., None],
    x: Tensor,
    neuron: NeuronSpec,
    sums: Tensor | None,
    out: Tensor,
    before: Tensor | None,
    after: Tensor | None,
) -> None:
    kernel(
        *(x.data_ptr(), x.stride(0)),
        *((None, 0) if sums is None else (sums.data_ptr(), sums.stride(0))),
        *(out.data_ptr(), out.stride(0)),
        *(x.shape[0], x[0].numel(), neuron_operand(neuron)),
        *(_address(before), _address(after), torch.get_num_threads()),
    )


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _has_dense_steps(x: Tensor | None) -> bool:
    return x is None or x[0].is_contiguous()


def max_pool(x: Tensor) -> Tensor:
    """3x3 max pooling of stride 2: [T, B, H, W, C] to [T, B, ceil(H / 2), ceil(W / 2), C]."""
    if not x.is_floating_point():  # torch numbers the elements of an image in the image's own dtype
        return _max_of_three(_max_of_three(x, 2), 3)
    pooled = F.max_pool2d(x.flatten(0, 1).permute(0, 3, 1, 2), kernel_size=3, stride=2, padding=1)
    return pooled.permute(0, 2, 3, 1).unflatten(0, x.shape[:2])


def _max_of_three(x: Tensor, dim: int) -> Tensor:
    """Of every second element along a dimension and its two neighbours, the largest."""
    even, odd = x.movedim(dim, 0)[::2], x.movedim(dim, 0)[1::2]
    out = even.clone()
    torch.maximum(out[: len(odd)], odd, out=out[: len(odd)])
    torch.maximum(out[1:], odd[: len(out) - 1], out=out[1:])
    return out.movedim(0, dim).contiguous()


def pool_fire(x: Tensor, neuron: NeuronSpec, dtype: torch.dtype) -> Tensor:
    """Spikes of max-pooled currents: x [T, B, H, W, C] to [T, B, ceil(H / 2), ceil(W / 2), C]."""
    T, B, H, W, C = x.shape
    kernel = _own("pool_fire", x, neuron, dtype)
    size = (B, (H + 1) // 2, (W + 1) // 2, C)
    carried = carried_state()
    if kernel is None or not _has_dense_steps(x) or (carried is not None and not carried.fits(size)):
        return fire(max_pool(x), neuron, dtype)
    before, after = potentials(carried, size, membrane_dtype(x))
    out = torch.empty(T, *size, dtype=dtype, device=x.device)
    operands = (neuron_operand(neuron), _address(before), _address(after), torch.get_num_threads())
    kernel(x.data_ptr(), x.stride(0), out.data_ptr(), T, B, H, W, C, *operands)
    return out


def operator_kernel(
    declared: NativeKernel, x: Tensor, inputs: int, heads: int, neurons: Sequence[NeuronSpec], dtype: torch.dtype
) -> Tensor | None:
    """Fused currents x [T, B, N, inputs * C] of an operator's inputs to what its `attend` gives, [T, B, N, C].

    None where there is no kernel for these types, here and now.
    """
    if any(neuron.levels != "binary" for neuron in neurons):
        return None
    kernel = _kernel((declared.package, declared.file), {declared.name: _OPERATOR}, declared.name, x, dtype)
    if kernel is None:
        return None
    x = x.contiguous()
    out = torch.empty(*x.shape[:3], x.shape[3] // inputs, dtype=dtype, device=x.device)
    _, B, N, C = out.shape
    shapes: list[tuple[int, ...]] = [(B, N, C)] * inputs
    shapes += [(B, heads, channels or C // heads, tokens or N) for channels, tokens in declared.inner]
    carried = carried_state()
    if carried is not None and not carried.fits(*shapes):
        return None
    kept = [potentials(carried, shape, membrane_dtype(x)) for shape in shapes]  # till the kernel is done
    before, after = (_addresses(tensors) for tensors in zip(*kept, strict=True))
    operands = (heads, declared.scale, neuron_operand(*neurons), before, after, torch.get_num_threads())
    kernel(x.data_ptr(), out.data_ptr(), *out.shape, *operands)
    return out


def _addresses(tensors: Sequence[Tensor | None]) -> Any:
    """An array of pointers; None for no tensors."""
    found = [tensor.data_ptr() for tensor in tensors if tensor is not None]
    return (POINTER * len(found))(*found) if found else None
