"""Functions that run again in the backward pass instead of keeping what that needs.

`checkpoint_once` is gradient checkpointing of a module: it keeps the module's input. `call_packed` keeps the inputs of
a function packed, for what has few whole numbers on its way in. In both the second run takes the execution policy and
the autocast state of the first one, whatever thread it runs in.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from .packing import SharedInput, refuse_second_derivatives, unpack
from .policy import current_policy, execution_policy


class _Once:
    """A module whose first call counts; later calls repeat it.

    Checkpointing runs a layer's forward pass again in the backward pass. That pass would move the batch norms' running
    statistics and count the batch once more, so it moves copies of them; it normalises by the batch's statistics as the
    first one did. Dropout and stochastic depth draw the same masks again (`torch.utils.checkpoint` restores the random
    state).
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.policy = current_policy()
        self.called = False

    def __call__(self, *inputs: Tensor) -> Tensor:
        if not self.called:
            self.called = True
            return self.module(*inputs)
        module = _with_statistics_of_its_own(self.module)
        with execution_policy(*self.policy):
            return module(*inputs)


def _with_statistics_of_its_own(module: nn.Module) -> nn.Module:
    """The same module on the same parameters, whose batch norms move copies of the running statistics.

    Other threads may train or save the module meanwhile, so nothing in it is touched.
    """
    twin = module.__new__(type(module))
    twin.__dict__ = module.__dict__.copy()
    twin._modules = {
        name: None if child is None else _with_statistics_of_its_own(child) for name, child in module._modules.items()
    }
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        twin._buffers = {name: None if value is None else value.clone() for name, value in module._buffers.items()}
    return twin


def checkpoint_once(module: nn.Module, *inputs: Tensor) -> Tensor:
    """`module(*inputs)`, computed again in the backward pass instead of keeping what that needs."""
    if torch.compiler.is_compiling():  # the compiler repeats operations, not side effects
        return checkpoint(module, *inputs)
    return checkpoint(_Once(module), *inputs)


def call_packed(
    function: Callable[..., Tensor], inputs: Sequence[SharedInput], parameters: Sequence[Tensor] = ()
) -> Tensor:
    """`function` of the inputs' tensors, keeping them packed, and run again in the backward pass.

    Args:
        function: Of tensors [T, B, C, H, W]; without side effects and random numbers.
        inputs: Those that cannot be packed are kept as they are.
        parameters: What else the function depends on and is to be differentiated by.
    """
    tensors = [shared.x for shared in inputs]
    result: Tensor = _CallPacked.apply(function, inputs, *tensors, *parameters)
    return result


class _CallPacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], inputs: Sequence[SharedInput], *tensors: Tensor) -> Tensor:
        packed = [shared.packed for shared in inputs]
        ctx.packed = [None if part is None else part._replace(data=part.data.new_empty(0)) for part in packed]
        x = tensors[0]
        ctx.function, ctx.policy, ctx.dtypes = function, current_policy(), [x.dtype for x in tensors[: len(inputs)]]
        ctx.shapes = [x.shape for x in tensors[: len(inputs)]]
        device_type = x.device.type
        ctx.autocast = (device_type, torch.get_autocast_dtype(device_type), torch.is_autocast_enabled(device_type))
        # Parameters as they are: what hooks of checkpointing or offloading give back is not what `function` depends on.
        ctx.parameters = tensors[len(inputs) :]
        kept = zip(packed, tensors, strict=False)
        ctx.save_for_backward(*(x if part is None else part.data for part, x in kept))
        return function(*tensors[: len(inputs)])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        kept = zip(ctx.packed, ctx.saved_tensors, ctx.dtypes, ctx.shapes, strict=True)
        inputs = [
            (data if part is None else unpack(part._replace(data=data), dtype).view(shape)).detach().requires_grad_()
            for part, data, dtype, shape in kept
        ]
        needed = [
            tensor for tensor, need in zip((*inputs, *ctx.parameters), ctx.needs_input_grad[2:], strict=True) if need
        ]
        with execution_policy(*ctx.policy):
            with torch.enable_grad(), torch.autocast(*ctx.autocast):
                result = ctx.function(*inputs)
            # As torch asks for: each gradient in the precision of its operation, not in autocast's.
            with torch.autocast(ctx.autocast[0], enabled=False):
                grads = iter(torch.autograd.grad(result, needed, grad_outputs, allow_unused=True))
        return None, None, *(next(grads) if need else None for need in ctx.needs_input_grad[2:])
