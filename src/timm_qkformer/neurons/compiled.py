"""Neurons as one compiled kernel forwards and one backwards, through torch.compile. User's view: docs/execution.md.

A kernel reads its input once and writes its result once, and keeps nothing for the backward pass but the input. It
sees memory, not shapes: an input [T, ...] whose steps lie densely one behind the other, in whatever order of their
own dimensions (contiguous, channels last, ...), is viewed as [T, M]; a step repeated by `expand` is viewed as [M].
So one kernel serves every layer and every size. Thresholds, leaks and the surrogate's steepness are operands, not
constants; the number of steps, dtype, device and the kind of reset and surrogate (`Key`) are compiled in. Other
inputs are copied together first. Where a batch norm's scale and shift of each channel belong to the kernel (`Affine`),
the input is [T, M, C], channels last.

"compile" compiles a kernel when it is first asked for; "auto" once eager mode has processed so many elements instead of
it that compiling pays (`AUTO_BUDGET`, see `execution.budget`). Tensors too small to gain (`_MIN_ELEMENTS`) always run
in eager mode. Where torch.compile fails (no C++ compiler, no Triton), the process warns once and stays with eager mode.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from threading import RLock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..execution.budget import Budget
from ..execution.packing import Range, parts_of_a_step
from ..execution.policy import is_plain, under_dispatch_mode
from .kernel import Key, example_operands, inductor_options, kernel_body, unsplit
from .recurrence import Affine
from .spec import NeuronSpec, membrane_dtype

# Elements [T, ...] that "auto" lets eager mode process before it compiles the kernel. On a CPU eager mode loses about
# 10 ns an element and compiling takes 5 to 10 s; on a GPU it loses launches rather than bandwidth.
AUTO_BUDGET: dict[str, int] = {"cpu": 2**29, "cuda": 2**26}

# Steps that a kernel unrolls at most: compile time and registers grow with them, and beyond this Inductor splits it.
MAX_STEPS = 16

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# On CUDA, memory is viewed in rows of this many elements where it divides them: the compiler then knows that every
# step starts aligned and loads vectors.
_ROW = {"cpu": 1, "cuda": 16}

# Elements [T, ...] below which "auto" stays with eager mode: on a CPU, torch's operations run such sizes on one core
# and Inductor's kernels on all of them, which costs more than it gains.
_MIN_ELEMENTS = {"cpu": 2**15, "cuda": 0}

# Devices whose kernels pack the spikes that they make, and how many steps times parts of a step one may unroll for it.
# On CPUs a pass of its own, over what is still in the cache, takes a hundredth of a training step.
_PACKING_DEVICES = {"cuda"}
_MOST_PARTS = 32

_kernels: dict[Key, Callable[..., Any]] = {}
_budget = Budget(Key)
_compiling = RLock()
_no_compiler: set[str] = set()  # device types


def step_strides(x: Tensor) -> tuple[int, ...] | None:
    """Strides of one step of [T, ...] if its elements fill their memory without gaps or overlap, else None."""
    expected = 1
    dims = zip(x.stride()[1:], x.shape[1:], strict=True)
    for stride, size in sorted(dim for dim in dims if dim[1] != 1):
        if stride != expected:
            return None
        expected *= size
    return x.stride()[1:]


def like_steps(x: Tensor) -> Tensor:
    """Uninitialised memory for a result of the shape of [T, ...]: one step behind the other, each laid out as x's are
    if these are dense, contiguous otherwise."""
    strides = step_strides(x)
    if strides is None:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return torch.empty_strided(x.shape, (_step_size(x), *strides), dtype=x.dtype, device=x.device)


class Fired(NamedTuple):
    """Spikes, the potential after them if it is to be kept, and the spikes packed if the kernel has packed them."""

    spikes: Tensor
    potential: Tensor | None = None
    packed: Tensor | None = None


def compiled_spikes(
    x: Tensor,
    spec: NeuronSpec,
    backend: str,
    affine: Affine | None = None,
    v: Tensor | None = None,
    keep_state: bool = False,
    numbers: Range | None = None,
) -> Fired | None:
    """Spikes by a compiled kernel and, with `keep_state`, the potential after them; None where `backend` or the
    circumstances ask for eager mode.

    With `affine`, x is [T, M, C], contiguous, and becomes x * scale + shift first. With `numbers`, which spikes are
    then of, the kernel packs them as well where it can: the bytes of `execution.packing.pack`.
    """
    if not _can_compile(x, spec.leak, affine):
        return None
    x, strides = _dense(x)
    state = keep_state or v is not None
    key = _key(x, spec, backward=False, affine=affine is not None, state=state)
    if numbers is not None and affine is not None and _may_pack(x, numbers):
        key = key._replace(packs=numbers)
    run = _kernel(key, x.numel(), backend)
    if run is None:
        return None
    operands = [*(affine or ()), *_operands(spec.leak, spec.threshold, dtype=membrane_dtype(x))]
    layout = (_step_size(x), *strides)
    if state:
        spikes, potential = _call(run, key, [x, _step_of(v, x, strides)], operands)
        return Fired(alias(spikes, x.shape, layout), alias(potential, x.shape[1:], strides))
    if key.packs is not None:
        spikes, packed = _call(run, key, [x], operands)
        return Fired(alias(spikes, x.shape, layout), packed=alias(packed, (packed.numel(),), (1,)))
    return Fired(alias(_call(run, key, [x], operands), x.shape, layout))


def _may_pack(x: Tensor, numbers: Range) -> bool:
    T, M, _ = x.shape
    parts = parts_of_a_step(T, numbers)
    return x.device.type in _PACKING_DEVICES and M % parts == 0 and M > parts and T * parts <= _MOST_PARTS


def compiled_gradients(
    grad_spikes: Tensor,
    x: Tensor,
    spec: NeuronSpec,
    leak_gradient: bool,
    backend: str,
    affine: Affine | None = None,
    v: Tensor | None = None,
    grad_v: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
    """dL/dx, dL/dleak and dL/dv by a compiled kernel, or None where `backend` or the circumstances ask for eager mode.

    With `affine` as in `compiled_spikes`, and dL/dx with respect to the scaled and shifted x. `v` and `grad_v`: the
    potential before the first step and the gradient of that after the last.
    """
    if not _can_compile(x, spec.leak, affine) or not is_plain(grad_spikes):
        return None
    x, strides = _dense(x)
    state = v is not None or grad_v is not None
    key = _key(x, spec, backward=True, leak_gradient=leak_gradient, affine=affine is not None, state=state)
    run = _kernel(key, x.numel(), backend)
    if run is None:
        return None
    layout = (_step_size(x), *strides)
    if grad_spikes.stride() != layout:
        grad_spikes = torch.empty_strided(x.shape, layout, dtype=x.dtype, device=x.device).copy_(grad_spikes)
    operands = [*(affine or ()), *_operands(spec.leak, spec.threshold, spec.alpha, dtype=membrane_dtype(x))]
    states = [_step_of(tensor, x, strides) for tensor in (v, grad_v)] if state else []
    flat, leak_shares, flat_v = _call(run, key, [grad_spikes, x, *states], operands)
    grad_leak = leak_shares.sum() if leak_gradient else None
    return alias(flat, x.shape, layout), grad_leak, alias(flat_v, x.shape[1:], strides) if state else None


def _step_of(v: Tensor | None, x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """A potential, zero if None, in memory as a step of x is."""
    dtype = membrane_dtype(x)
    if v is None:
        return torch.empty_strided(x.shape[1:], strides, dtype=dtype, device=x.device).zero_()
    if v.dtype == dtype and v.stride() == strides:
        return v
    return torch.empty_strided(x.shape[1:], strides, dtype=dtype, device=x.device).copy_(v)


def _can_compile(x: Tensor, leak: float | Tensor, affine: Affine | None) -> bool:
    return (
        x.device.type in AUTO_BUDGET
        and x.dtype in _DTYPES
        and 1 <= x.shape[0] <= MAX_STEPS
        # torch.compile would make sizes 0 and 1 kernels of their own
        and (x[0].numel() > 1 if affine is None else min(x.shape[1:]) > 1)
        and not under_dispatch_mode(x)
        and (isinstance(leak, float) or (is_plain(leak) and leak.dim() == 0))
    )


def _step_size(x: Tensor) -> int:
    return x.numel() // x.shape[0]


def _dense(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """x with dense steps, one behind the other or all the same, and the strides within a step."""
    strides = step_strides(x)
    if strides is None:
        x = x.contiguous()
        return x, x.stride()[1:]
    if x.shape[0] > 1 and x.stride(0) != 0 and x.stride(0) != _step_size(x):
        x = like_steps(x).copy_(x)
    return x, strides


def _is_constant(x: Tensor) -> bool:
    return x.shape[0] > 1 and x.stride(0) == 0


def _flat(x: Tensor, key: Key) -> Tensor:
    """The memory of dense steps as [T, M], of a constant step as [M]; M in rows, if there are rows."""
    if key.packs is not None:
        T, M, channels = x.shape
        parts = parts_of_a_step(T, key.packs)
        return alias(x, (T, parts, M // parts, channels), (M * channels, M // parts * channels, channels, 1))
    if key.affine:
        return alias(x, x.shape, x.stride())
    shape, strides = _flat_step(_step_size(x), key)
    if not _is_constant(x):
        shape, strides = (x.shape[0], *shape), (_step_size(x), *strides)
    return alias(x, shape, strides)


def _flat_step(size: int, key: Key) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of one step of `size` elements, as the kernel sees it."""
    row = key.row
    return ((size,), (1,)) if row == 1 else ((size // row, row), (row, 1))


def alias(x: Tensor, shape: Sequence[int], strides: Sequence[int]) -> Tensor:
    """x's memory as another shape. Not a view: torch.compile guards on what views are views of, and autograd forbids
    to modify a view that comes out of a Function in place."""
    alias = torch.empty(0, dtype=x.dtype, device=x.device)
    return alias.set_(x.untyped_storage(), x.storage_offset(), shape, strides)


def _key(
    x: Tensor, spec: NeuronSpec, backward: bool, leak_gradient: bool = False, affine: bool = False, state: bool = False
) -> Key:
    row = 1 if affine else _ROW[x.device.type]
    key = Key(
        backward,
        x.shape[0],
        _is_constant(x),
        row if _step_size(x) % row == 0 and _step_size(x) > row else 1,
        x.dtype,
        x.device,
        spec.leak.device if isinstance(spec.leak, Tensor) else _CPU,
        spec.soft_reset,
        spec.decay_input,
        affine=affine,
        levels=spec.levels,
        max_spikes=spec.max_spikes,
        state=state,
    )
    if backward:
        key = key._replace(detach_reset=spec.detach_reset, surrogate=spec.surrogate, leak_gradient=leak_gradient)
    return key


_CPU = torch.device("cpu")


def _operands(*values: float | Tensor, dtype: torch.dtype) -> list[Tensor]:
    return [
        value.detach().to(dtype) if isinstance(value, Tensor) else _constant_operand(index, value, dtype)
        for index, value in enumerate(values)
    ]


@lru_cache(maxsize=256)
def _constant_operand(index: int, value: float, dtype: torch.dtype) -> Tensor:
    """One tensor for each value and operand: one tensor as two operands would be compiled once more."""
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device=_CPU)


def _call(run: Callable[..., Any], key: Key, sequences: Sequence[Tensor], operands: Sequence[Tensor]) -> Any:
    # torch.compile would compile once more for each of these states, though none changes the result.
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            return _call(run, key, sequences, operands)
    device_type = sequences[0].device.type
    if torch.is_autocast_enabled(device_type):
        with torch.autocast(device_type, enabled=False):
            return _call(run, key, sequences, operands)
    count = 2 if key.backward else 1  # potentials follow
    states = (alias(v, *_flat_step(v.numel(), key)) for v in sequences[count:])
    return run(*(_flat(x, key) for x in sequences[:count]), *states, *operands)


def _kernel(key: Key, elements: int, backend: str) -> Callable[..., Any] | None:
    """The compiled kernel; None if there is none and, by `backend`, should not be one yet."""
    device_type = key.device.type
    if backend == "eager" or device_type in _no_compiler:
        return None
    if backend == "auto" and elements < _MIN_ELEMENTS[device_type]:
        return None
    run = _kernels.get(key)
    if run is not None:
        return run
    if _is_capturing(key.device):
        return None
    if backend == "auto" and _budget.spend(key, elements, AUTO_BUDGET[device_type]):
        return None
    with _compiling:
        if key not in _kernels and device_type not in _no_compiler:
            try:
                _kernels[key] = _compile(key)
            except Exception as error:
                _no_compiler.add(device_type)
                warnings.warn(
                    f"spiking neurons run in eager mode on this machine's {device_type} because torch.compile does not "
                    f"work there, which costs speed but changes no result: {type(error).__name__}: {error}",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return _kernels.get(key)


def _is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured here: kernels that exist become part of it, but none can be compiled."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _compile(key: Key) -> Callable[..., Any]:
    options = inductor_options(key.device.type) | (unsplit(key.steps) if key.affine else {})
    run = torch.compile(kernel_body(key), fullgraph=True, options=options)
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(key.device.type, enabled=False):
        run(*example_operands(key))
    return run
