"""Neurons as one compiled kernel forwards and one backwards, through torch.compile. User's view: docs/lif.md.

A kernel reads its input once and writes its result once, and keeps nothing for the backward pass but the input. It
sees memory, not shapes: an input [T, ...] whose steps lie densely one behind the other, in whatever order of their
own dimensions (contiguous, channels last, ...), is viewed as [T, M]; a step repeated by `expand` is viewed as [M].
So one kernel serves every layer and every size. Thresholds, leaks and the surrogate's steepness are operands, not
constants; the number of steps, dtype, device and the kind of reset and surrogate (`_Key`) are compiled in. Other
inputs are copied together first. Where a batch norm's scale and shift of each channel belong to the kernel (`Affine`),
the input is [T, M, C], channels last.

When does compiling pay? "compile" compiles a kernel when it is first asked for. "auto" keeps count, for each kernel,
of the elements that eager mode has processed in its stead, and compiles once they exceed `AUTO_BUDGET` for the
device: about the time that compiling takes. So a short run never waits for a compiler, and a long one waits once,
no longer than it has spent in eager mode already. Tensors too small to gain (`_MIN_ELEMENTS`) always run in eager
mode. The count does not depend on the clock: the same calls compile at the same place. Where torch.compile fails (no
C++ compiler, no Triton), the process warns once and stays with eager mode.
"""

import re
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from threading import Lock, RLock
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .recurrence import Affine, Dynamics, fire_steps, gradient_steps, membrane_dtype, scale_and_shift

__all__ = [
    "AUTO_BUDGET",
    "MAX_STEPS",
    "alias",
    "fused_gradients",
    "fused_spikes",
    "is_watched",
    "like_steps",
    "step_strides",
]

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

# Elements of a step for which kernels are compiled: enough for Inductor to make use of all cores.
_TYPICAL_SIZE = 2**18
_TYPICAL_CHANNELS = 2**8


class _Key(NamedTuple):
    """What is compiled into a kernel."""

    backward: bool
    steps: int
    constant: bool  # one step's current, given at every step
    row: int
    dtype: torch.dtype
    device: torch.device
    leak_device: torch.device
    soft_reset: bool
    decay_input: bool
    # Backward kernels only:
    detach_reset: bool = True
    surrogate: str = ""
    leak_gradient: bool = False
    # Both:
    affine: bool = False  # each channel's current is scaled and shifted first


class _Entry:
    """A kernel, perhaps not compiled yet."""

    def __init__(self) -> None:
        self.work = 0  # elements that eager mode processed in its stead
        self.run: Callable[..., Any] | None = None


_entries: dict[_Key, _Entry] = {}
_counting = Lock()
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


def fused_spikes(
    x: Tensor, leak: float | Tensor, dynamics: Dynamics, backend: str, affine: Affine | None = None
) -> Tensor | None:
    """Spikes by a compiled kernel, or None where `backend` or the circumstances ask for eager mode.

    With `affine`, x is [T, M, C], contiguous, and becomes x * scale + shift first.
    """
    if not _can_fuse(x, leak, affine):
        return None
    x, strides = _dense(x)
    key = _key(x, leak, dynamics, backward=False, affine=affine is not None)
    run = _kernel(key, x.numel(), backend)
    if run is None:
        return None
    operands = [*(affine or ()), *_operands(leak, dynamics.threshold, dtype=membrane_dtype(x))]
    flat = _call(run, key, [x], operands)
    return alias(flat, x.shape, (_step_size(x), *strides))


def fused_gradients(
    grad_spikes: Tensor,
    x: Tensor,
    leak: float | Tensor,
    dynamics: Dynamics,
    leak_gradient: bool,
    backend: str,
    affine: Affine | None = None,
) -> tuple[Tensor, Tensor | None] | None:
    """dL/dx and dL/dleak by a compiled kernel, or None where `backend` or the circumstances ask for eager mode.

    With `affine` as in `fused_spikes`, and dL/dx with respect to the scaled and shifted x.
    """
    if not _can_fuse(x, leak, affine) or not _is_plain(grad_spikes):
        return None
    x, strides = _dense(x)
    key = _key(x, leak, dynamics, backward=True, leak_gradient=leak_gradient, affine=affine is not None)
    run = _kernel(key, x.numel(), backend)
    if run is None:
        return None
    layout = (_step_size(x), *strides)
    if grad_spikes.stride() != layout:
        grad_spikes = torch.empty_strided(x.shape, layout, dtype=x.dtype, device=x.device).copy_(grad_spikes)
    operands = [*(affine or ()), *_operands(leak, dynamics.threshold, dynamics.alpha, dtype=membrane_dtype(x))]
    flat, leak_shares = _call(run, key, [grad_spikes, x], operands)
    return alias(flat, x.shape, layout), leak_shares.sum() if leak_gradient else None


def _is_plain(x: Tensor) -> bool:
    return type(x) is Tensor or type(x) is torch.nn.Parameter


def is_watched(x: Tensor) -> bool:
    """Whether x has no numbers of its own (fake and meta tensors, subclasses), or somebody watches every operation.

    Modes that do: make_fx, FLOP counters, selective checkpointing, graphs being recorded.
    """
    return not _is_plain(x) or x.is_meta or torch._C._len_torch_dispatch_stack() > 0


def _can_fuse(x: Tensor, leak: float | Tensor, affine: Affine | None) -> bool:
    return (
        x.device.type in AUTO_BUDGET
        and x.dtype in _DTYPES
        and 1 <= x.shape[0] <= MAX_STEPS
        # torch.compile would make sizes 0 and 1 kernels of their own
        and (x[0].numel() > 1 if affine is None else min(x.shape[1:]) > 1)
        and not is_watched(x)
        and (isinstance(leak, float) or (_is_plain(leak) and leak.dim() == 0))
        and not (x.is_cuda and torch.cuda.is_current_stream_capturing())
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


def _flat(x: Tensor, key: _Key) -> Tensor:
    """The memory of dense steps as [T, M], of a constant step as [M]; M in rows, if there are rows."""
    if key.affine:
        return alias(x, x.shape, x.stride())
    size, row = _step_size(x), key.row
    shape, strides = ((size,), (1,)) if row == 1 else ((size // row, row), (row, 1))
    if not _is_constant(x):
        shape, strides = (x.shape[0], *shape), (size, *strides)
    return alias(x, shape, strides)


def alias(x: Tensor, shape: Sequence[int], strides: Sequence[int]) -> Tensor:
    """x's memory as another shape. Not a view: torch.compile guards on what views are views of, and autograd forbids
    to modify a view that comes out of a Function in place."""
    alias = torch.empty(0, dtype=x.dtype, device=x.device)
    return alias.set_(x.untyped_storage(), x.storage_offset(), shape, strides)


def _key(
    x: Tensor,
    leak: float | Tensor,
    dynamics: Dynamics,
    backward: bool,
    leak_gradient: bool = False,
    affine: bool = False,
) -> _Key:
    row = 1 if affine else _ROW[x.device.type]
    key = _Key(
        backward,
        x.shape[0],
        _is_constant(x),
        row if _step_size(x) % row == 0 and _step_size(x) > row else 1,
        x.dtype,
        x.device,
        leak.device if isinstance(leak, Tensor) else _CPU,
        dynamics.soft_reset,
        dynamics.decay_input,
        affine=affine,
    )
    if backward:
        key = key._replace(
            detach_reset=dynamics.detach_reset, surrogate=dynamics.surrogate, leak_gradient=leak_gradient
        )
    return key


_CPU = torch.device("cpu")


def _operands(*values: float | Tensor, dtype: torch.dtype) -> list[Tensor]:
    return [
        value.detach().to(dtype) if isinstance(value, Tensor) else _constant_operand(place, value, dtype)
        for place, value in enumerate(values)
    ]


@lru_cache(maxsize=256)
def _constant_operand(place: int, value: float, dtype: torch.dtype) -> Tensor:
    """One tensor for each value and place: torch.compile would compile once more for the same tensor in two places."""
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device=_CPU)


def _call(run: Callable[..., Any], key: _Key, sequences: Sequence[Tensor], operands: Sequence[Tensor]) -> Any:
    # torch.compile would compile once more for each of these states, though none changes the result.
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            return _call(run, key, sequences, operands)
    device_type = sequences[0].device.type
    if torch.is_autocast_enabled(device_type):
        with torch.autocast(device_type, enabled=False):
            return _call(run, key, sequences, operands)
    return run(*(_flat(x, key) for x in sequences), *operands)


def _kernel(key: _Key, elements: int, backend: str) -> Callable[..., Any] | None:
    """The compiled kernel; None if there is none and, by `backend`, should not be one yet."""
    device_type = key.device.type
    if backend == "eager" or device_type in _no_compiler:
        return None
    if backend == "auto" and elements < _MIN_ELEMENTS[device_type]:
        return None
    entry = _entries.get(key)
    if entry is not None and entry.run is not None:
        return entry.run
    with _counting:
        entry = _entries.setdefault(key, _Entry())
        entry.work += elements
        if backend == "auto" and entry.work <= AUTO_BUDGET[device_type]:
            return None
    with _compiling:
        if entry.run is None and device_type not in _no_compiler:
            try:
                entry.run = _compile(key)
            except Exception as error:
                _no_compiler.add(device_type)
                warnings.warn(
                    f"spiking neurons run unfused on this machine's {device_type} because torch.compile does not work "
                    f"there, which costs speed but changes no result: {type(error).__name__}: {error}",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return entry.run


def _compile(key: _Key) -> Callable[..., Any]:
    options = inductor_options(key.device.type) | (_unsplit() if key.affine and key.steps <= _UNSPLIT_STEPS else {})
    run = torch.compile(kernel_body(key), fullgraph=True, options=options)
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(key.device.type, enabled=False):
        run(*example_operands(key))
    return run


def inductor_options(device_type: str) -> dict[str, str | int | bool | Callable[..., Any]]:
    """What Inductor is told beyond its defaults."""
    from torch._inductor import config  # not at import: it takes seconds

    # Products are rounded before they are added, as in eager mode: no fused multiply-add, the same spikes.
    if device_type == "cpu":
        return {"cpp.enable_floating_point_contract_flag": "off", **_vector_bits()}
    options = {
        "emulate_precision_casts": True,
        # Each step's result is stored where it belongs. By default each element of the whole result would be computed
        # on its own, with all the steps before it, and intermediate potentials would go through memory.
        "max_pointwise_cat_inputs": 0,
        "max_complex_pointwise_cat_inputs": 0,
    }
    return {name: value for name, value in options.items() if hasattr(config, name)}


def _vector_bits() -> dict[str, int]:
    """The width of vectors, said aloud, so that it is part of what names a kernel in Inductor's cache on disk.

    Else, with torch 2.14, a process with ATEN_CPU_CAPABILITY=avx2 takes up loops written for AVX-512, and half of the
    neurons are left out.
    """
    from torch._inductor.cpu_vec_isa import pick_vec_isa  # not at import: it takes seconds

    isa = pick_vec_isa()
    return {"cpp.simdlen": isa.bit_width()} if isa else {}


def _unsplit() -> dict[str, int]:
    """Keep Inductor from passing intermediate results of a long computation through memory.

    It then writes the code of a result anew for each of its uses, three in every step, before it finds what is common.
    """
    from torch._inductor import config  # not at import: it takes seconds

    names = ("realize_opcount_threshold", "realize_reads_threshold")
    return {name: 10_000 for name in names if hasattr(config, name)}


_UNSPLIT_STEPS = 4


def kernel_body(key: _Key) -> Callable[..., Any]:
    """What is compiled: (x, leak, threshold) to spikes, or (grad_spikes, x, leak, threshold, alpha) to gradients; with
    `key.affine`, scale and shift follow x."""

    def steps_of(x: Tensor, affine: Sequence[Tensor]) -> Sequence[Tensor]:
        steps = [x] * key.steps if key.constant else x.unbind(0)
        return scale_and_shift(steps, Affine(*affine)) if affine else steps

    def forward(x: Tensor, *operands: Tensor) -> Tensor:
        *affine, leak, threshold = operands
        dynamics = Dynamics(threshold, key.soft_reset, key.decay_input, True, "", 1.0)
        return torch.stack([fired.to(x.dtype) for fired in fire_steps(steps_of(x, affine), leak, dynamics)])

    def backward(grad_spikes: Tensor, x: Tensor, *operands: Tensor) -> tuple[Tensor, Tensor | None]:
        *affine, leak, threshold, alpha = operands
        dynamics = Dynamics(threshold, key.soft_reset, key.decay_input, key.detach_reset, key.surrogate, alpha)
        steps = steps_of(x, affine)
        grads, leak_shares = gradient_steps(grad_spikes.unbind(0), steps, leak, dynamics, key.leak_gradient)
        if leak_shares is not None and key.row > 1:
            # Summed over rows only: a sum over everything would take a kernel of its own and read x again.
            leak_shares = leak_shares.sum(-1)
        return torch.stack([grad.to(x.dtype) for grad in grads]), leak_shares

    body = backward if key.backward else forward
    # torch.compile keeps its cache and its limit of recompilations with the code object, and what it remembers of
    # sizes that changed with the code's name.
    code = body.__code__.replace(co_name="lif_" + re.sub(r"\W+", "_", "_".join(map(str, key))))
    return FunctionType(code, body.__globals__, code.co_name, body.__defaults__, body.__closure__)


def example_operands(key: _Key, size: int = _TYPICAL_SIZE) -> list[Tensor]:
    """Operands for `kernel_body(key)` with `size` elements a step, a size that torch.compile is to leave open."""
    shape: tuple[int, ...] = (size,) if key.row == 1 else (size // key.row, key.row)
    if key.affine:
        shape = (size // _TYPICAL_CHANNELS, _TYPICAL_CHANNELS)
    dtype = torch.float64 if key.dtype == torch.float64 else torch.float32

    def scalar(device: torch.device = _CPU) -> Tensor:
        return torch.zeros((), dtype=dtype, device=device)

    def sequence(steps: tuple[int, ...] = (key.steps,)) -> Tensor:
        x = torch.zeros((*steps, *shape), dtype=key.dtype, device=key.device)
        for dim in range(x.dim()):
            is_open = dim == len(steps) or (key.affine and dim > len(steps))
            mark = torch._dynamo.mark_dynamic if is_open else torch._dynamo.mark_static
            mark(x, dim)
        return x

    def channels() -> Tensor:
        x = torch.zeros(_TYPICAL_CHANNELS, dtype=dtype, device=key.device)
        torch._dynamo.mark_dynamic(x, 0)
        return x

    x = sequence(()) if key.constant else sequence()
    affine = [channels(), channels()] if key.affine else []
    if not key.backward:
        return [x, *affine, scalar(key.leak_device), scalar()]
    return [sequence(), x, *affine, scalar(key.leak_device), scalar(), scalar()]
