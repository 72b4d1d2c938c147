"""Explicit state for whole modules: the membrane potentials of all neurons go in and come out, as a value.

    y, state = run_with_state(block, x[:1])            # the first time step, from rest
    y, state = run_with_state(block, x[1:2], state)    # the next one, on from there

This is to neurons what `torch.func.functional_call` is to parameters. Nothing is stored in modules. Time steps in
pieces give what one call with all of them gives, gradients included; a state is a tuple of tensors in the order in
which the neurons fire, so it moves, saves and stacks as tensors do.
"""

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

State = tuple[Tensor, ...]


class Carried:
    """The potentials of one call: those before it, handed out in order, and those after it.

    The first dimension of each is that of samples, so that a state can be cut and joined; neurons without a potential
    put nothing. Those before it may be written on where they were `donated`.
    """

    def __init__(self, before: State | None, donated: bool = False) -> None:
        self.before = before
        self.donated = donated
        self.after: list[Tensor] = []

    def take(self) -> Tensor | None:
        """The potential of the next neurons; None at rest."""
        if self.before is None:
            return None
        if len(self.after) >= len(self.before):
            raise ValueError(
                f"the state has {len(self.before)} potentials and the module more neuron layers: it belongs to another "
                "module"
            )
        return self.before[len(self.after)]

    def fits(self, *shapes: Sequence[int]) -> bool:
        """Whether the next potentials, if they are not at rest, have these shapes."""
        if self.before is None:
            return True
        start = len(self.after)
        return [v.shape for v in self.before[start : start + len(shapes)]] == [torch.Size(shape) for shape in shapes]

    def put(self, v: Tensor) -> None:
        """Their potential after the call."""
        self.after.append(v)


_carried: ContextVar[Carried | None] = ContextVar("carried_state", default=None)


def carried_state() -> Carried | None:
    """The potentials that neurons called here and now continue from; None: each call starts from rest."""
    return None if torch.compiler.is_dynamo_compiling() else _carried.get()


def run_with_state(
    module: nn.Module, *inputs: Any, state: State | None = None, donate: bool = False
) -> tuple[Any, State]:
    """Call a module whose neurons continue from `state`.

    Args:
        module: Any module with neurons of this package.
        *inputs: Its inputs; sequences [T, B, ...] may hold any number of steps.
        state: What the previous call returned; None at rest.
        donate: The state is not used again, and its memory may hold the next one: without gradients that is faster.

    Returns:
        The module's result, and the potentials after it.

    Raises:
        ValueError: For a state of another module or batch, or a module that cannot run in pieces, such as what
            torch.export gives.
    """
    _refuse_compiled_parts(module)
    carried = Carried(state, donate)
    token = _carried.set(carried)
    try:
        result = module(*inputs)
    finally:
        _carried.reset(token)
    if not carried.after and _is_graph(module):
        raise ValueError(
            "no neuron of the module carries a state: what torch.export made of a model starts from rest at each call. "
            "Give the module as it was before"
        )
    if state is not None and len(state) != len(carried.after):
        raise ValueError(
            f"the state has {len(state)} potentials, the module's neuron layers used {len(carried.after)}: it belongs "
            "to another module"
        )
    return result, tuple(carried.after)


def _is_graph(module: Any) -> bool:
    return isinstance(module, nn.Module) and any(isinstance(part, torch.fx.GraphModule) for part in module.modules())


def modules_of(module: nn.Module) -> list[nn.Module]:
    """A module and all within it, once for each place: several times as fast as `modules()`, for use at every step."""
    found = [module]
    for part in found:
        if children := part._modules:
            found += [child for child in children.values() if child is not None]
    return found


def _refuse_compiled_parts(module: Any) -> None:
    """Code that torch.compile or TorchScript compiled starts from rest at every call, and does not say so."""
    if not isinstance(module, nn.Module) or not any(map(_is_compiled, modules_of(module))):
        return
    name = next(name for name, part in module.named_modules() if _is_compiled(part))
    raise ValueError(f"{name or 'the module'} is compiled and carries no state: give the module as it was before")


def _is_compiled(part: nn.Module) -> bool:
    if "_orig_mod" in part._modules or part.__dict__.get("_compiled_call_impl") is not None:
        return True
    return isinstance(part, torch.jit.ScriptModule)
