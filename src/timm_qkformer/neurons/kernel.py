"""What `compiled` has torch.compile make of neurons: code, operands to compile it with, Inductor's options."""

import re
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..execution.packing import Range, pack_chunks, parts_of_a_step
from .recurrence import Affine, fire_steps, gradient_steps, scale_and_shift
from .spec import NeuronSpec

# Elements of a step for which kernels are compiled: enough for Inductor to make use of all cores.
_TYPICAL_SIZE = 2**18
_TYPICAL_CHANNELS = 2**8

_CPU = torch.device("cpu")


class Key(NamedTuple):
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
    levels: str = "binary"
    max_spikes: int = 1
    state: bool = False  # potentials come in and go out
    packs: Range | None = None  # spikes go out packed, too; the input's steps are in parts, [T, parts, ...]


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
    """The width of vectors, stated, so that it is part of what names a kernel in Inductor's cache on disk.

    Otherwise, with torch 2.14, a process with ATEN_CPU_CAPABILITY=avx2 loads loops written for AVX-512, and half of the
    neurons are left out.
    """
    from torch._inductor.cpu_vec_isa import pick_vec_isa  # not at import: it takes seconds

    isa = pick_vec_isa()
    return {"cpp.simdlen": isa.bit_width()} if isa else {}


def unsplit(steps: int) -> dict[str, int]:
    """Keep Inductor from passing intermediate results of a computation of few steps through memory.

    It then writes the code of a result anew for each of its uses, three in every step, before it finds what is common.
    """
    if steps > _UNSPLIT_STEPS:
        return {}
    from torch._inductor import config  # not at import: it takes seconds

    names = ("realize_opcount_threshold", "realize_reads_threshold")
    return {name: 10_000 for name in names if hasattr(config, name)}


_UNSPLIT_STEPS = 4


def kernel_body(key: Key) -> Callable[..., Any]:
    """What is compiled: (x, leak, threshold) to spikes, or (grad_spikes, x, leak, threshold, alpha) to the gradients of
    x, leak and potential; with `key.affine`, scale and shift precede the leak; with `key.state`, the potential before
    the first step follows x (and the gradient of that after the last step follows it), and potentials are returned;
    with `key.packs`, packed spikes follow the spikes."""

    def steps_of(x: Tensor, affine: Sequence[Tensor]) -> Sequence[Tensor]:
        steps = [x] * key.steps if key.constant else x.unbind(0)
        return scale_and_shift(steps, Affine(*affine)) if affine else steps

    def spec_of(leak: Tensor, threshold: Tensor, alpha: Tensor | float = 1.0) -> NeuronSpec:
        flags = (key.soft_reset, key.decay_input, key.levels, key.detach_reset, key.surrogate)
        return NeuronSpec(leak, threshold, *flags, alpha, key.max_spikes)

    def forward(x: Tensor, *operands: Tensor) -> Any:
        v, operands = (operands[0], operands[1:]) if key.state else (None, operands)
        *affine, leak, threshold = operands
        if key.packs is not None:
            parts = [fire_steps(steps_of(part, affine), spec_of(leak, threshold))[0] for part in x.unbind(1)]
            chunks = [fired for step in zip(*parts, strict=True) for fired in step]  # in the order of memory
            return torch.stack([fired.to(x.dtype) for fired in chunks]), pack_chunks(chunks, key.packs)
        steps, v = fire_steps(steps_of(x, affine), spec_of(leak, threshold), v, key.state)
        spikes = torch.stack([fired.to(x.dtype) for fired in steps])
        return (spikes, v) if key.state else spikes

    def backward(grad_spikes: Tensor, x: Tensor, *operands: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        states, operands = (operands[:2], operands[2:]) if key.state else ((), operands)
        *affine, leak, threshold, alpha = operands
        spec = spec_of(leak, threshold, alpha)
        grads = gradient_steps(grad_spikes.unbind(0), steps_of(x, affine), spec, key.leak_gradient, *states)
        leak_shares = grads.leak
        if leak_shares is not None and key.row > 1:
            # Summed over rows only: a sum over everything would take a kernel of its own and read x again.
            leak_shares = leak_shares.sum(-1)
        grad_x = torch.stack([grad.to(x.dtype) for grad in grads.currents])
        return grad_x, leak_shares, grads.v if key.state else None

    body = backward if key.backward else forward
    # torch.compile keeps its cache and its limit of recompilations with the code object, and what it remembers of
    # sizes that changed with the code's name.
    code = body.__code__.replace(co_name="lif_" + re.sub(r"\W+", "_", "_".join(map(str, key))))
    return FunctionType(code, body.__globals__, code.co_name, body.__defaults__, body.__closure__)


def example_operands(key: Key, size: int = _TYPICAL_SIZE) -> list[Tensor]:
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

    def potential() -> Tensor:
        v = torch.zeros(shape, dtype=dtype, device=key.device)
        for dim in range(v.dim()):
            (torch._dynamo.mark_dynamic if dim == 0 else torch._dynamo.mark_static)(v, dim)
        return v

    if key.packs is not None:
        steps: tuple[int, ...] = (key.steps, parts_of_a_step(key.steps, key.packs))
    else:
        steps = () if key.constant else (key.steps,)
    x = sequence(steps)
    affine = [channels(), channels()] if key.affine else []
    if not key.backward:
        states = [potential()] if key.state else []
        return [x, *states, *affine, scalar(key.leak_device), scalar()]
    states = [potential(), potential()] if key.state else []
    return [sequence(), x, *states, *affine, scalar(key.leak_device), scalar(), scalar()]
