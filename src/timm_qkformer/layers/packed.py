"""How units run while a model trains with packed activations: the same values and gradients, a third of the memory.

What autograd keeps of a unit conv, BN, [pool], LIF is the convolution's input, the batch norm's, the pooling's with
64-bit indices, and the neurons': five bytes or more where one would do. Here

    convolution   keeps its input packed, 1 to 8 bits an element, where that holds few whole numbers
    BN + LIF      keep the convolution's output alone (`neurons.normed`)
    max pooling   keeps four bits for each output (`execution.convolution`), between the two nothing else
    operators     keep their inputs packed and run again in the backward pass (`operators.base`)

Units take this path by themselves while they train, and their plain code wherever they must: under torch.compile,
export, FX, TorchScript and torch.func, with modules replaced, hooked or parametrised, in inference, with spikingjelly's
neurons, and where `execution_policy(packed=False)` asks for it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_globals

from ..execution.convolution import DEVICES, convolve, max_pool
from ..execution.packing import SharedInput
from ..execution.policy import current_policy, under_dispatch_mode
from ..neurons.modules import SpikingNeuron
from ..neurons.normed import norm_and_fire
from ..neurons.spec import membrane_dtype
from ..neurons.state import carried_state


def is_active(module: nn.Module, x: Tensor) -> bool:
    """Whether `module`, called with x here and now, is to save memory for a backward pass."""
    return (
        torch.is_grad_enabled()
        and module.training
        and type(x) is Tensor  # no FX proxies, which answer nothing
        and x.is_floating_point()
        and x.device.type in DEVICES
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and not _hooked_globally()
        and not under_dispatch_mode(x)  # last: code that is being compiled cannot ask
        and (policy := current_policy()).packed
        and policy.neurons != "spikingjelly"
    )


def is_unhooked(module: nn.Module) -> bool:
    """Whether calling `module` runs its class's `forward` and nothing else: no hook wants to see it."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _hooked_globally()
        or "forward" in vars(module)
    )


def _hooked_globally() -> bool:
    """Whether somebody wants to see the calls of all modules."""
    return bool(
        module_globals._global_forward_hooks
        or module_globals._global_forward_pre_hooks
        or module_globals._global_backward_hooks
        or module_globals._global_backward_pre_hooks
    )


def currents(unit: Any, shared: SharedInput) -> Tensor:
    """`ConvNorm.currents`: convolution, batch norm, pooling."""
    y = unit.bn(_convolved(unit.conv, shared))
    return _pool(unit.pool, y).unflatten(0, shared.x.shape[:2])


def pooled(pool: nn.Module, x: Tensor) -> Tensor:
    """`SpikingConv.pooled` on spikes [T, B, C, H, W]."""
    return _pool(pool, x.flatten(0, 1)).unflatten(0, x.shape[:2])


def spikes(unit: Any, shared: SharedInput) -> Tensor:
    """`SpikingConv.forward`."""
    pools = _is_plain_pool(unit.pool)
    is_one_step = pools or (type(unit.pool) is nn.Identity and is_unhooked(unit.pool))
    if not is_one_step or unit.batch_coupled or carried_state() is not None:
        return unit.fire(currents(unit, shared))
    y = _convolved(unit.conv, shared)
    if _norm_fires(unit.bn, unit.neuron, y):
        return unit.pooled(norm_and_fire(y, unit.bn, unit.neuron.spec(membrane_dtype(y)), len(shared.x), pools))
    return unit.fire(_pool(unit.pool, unit.bn(y)).unflatten(0, shared.x.shape[:2]))


def run_unit(unit: Any, shared: SharedInput) -> Tensor:
    """`unit(shared.x)`, by `spikes` where that is what the call would do."""
    from .conv import SpikingConv  # which imports this module

    if type(unit) is SpikingConv and is_unhooked(unit) and unit.training and unit.input_range == shared.numbers:
        return spikes(unit, shared)
    result: Tensor = unit(shared.x)
    return result


def embed(module: Any, x: Tensor) -> Tensor:
    """`SpikingPatchEmbed` after its neuron: the input of both branches is packed once."""
    shared = SharedInput(x, module.input_range)
    if type(module.main) is nn.Sequential and is_unhooked(module.main):
        y = run_unit(module.main[0], shared)
        for unit in module.main[1:]:
            y = unit(y)
    else:
        y = module.main(x)
    return y if module.shortcut is None else y + run_unit(module.shortcut, shared)


def _pool(pool: nn.Module, x: Tensor) -> Tensor:
    return max_pool(x) if _is_plain_pool(pool) else pool(x)


def _convolved(conv: Any, shared: SharedInput) -> Tensor:
    return convolve(conv, shared) if _is_plain_conv(conv) else conv(shared.x.flatten(0, 1))


def _is_plain_conv(module: nn.Module) -> bool:
    """Whether `convolve` may take a convolution's place."""
    return (
        type(module) is nn.Conv2d
        and is_unhooked(module)
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


def _is_plain_pool(module: nn.Module) -> bool:
    """Whether `max_pool` may take a pooling's place."""
    if type(module) is not nn.MaxPool2d or not is_unhooked(module):
        return False
    sides = (_both(value) for value in (module.kernel_size, module.stride, module.padding, module.dilation))
    return (*sides, module.ceil_mode, module.return_indices) == ((3, 3), (2, 2), (1, 1), (1, 1), False, False)


def _both(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _norm_fires(bn: nn.Module, neuron: nn.Module, y: Tensor) -> bool:
    """Whether `norm_and_fire` may take the place of these two modules on y [T * B, C, H, W]."""
    return (
        type(bn) is nn.BatchNorm2d
        and is_unhooked(bn)
        and bn.weight is not None
        and bn.bias is not None
        and bn.weight.dtype == membrane_dtype(y)
        and y.numel() > y.shape[1]
        and isinstance(neuron, SpikingNeuron)
        and type(neuron).forward is SpikingNeuron.forward
        and is_unhooked(neuron)
        and neuron.levels != "real"
    )
