"""The execution policy: all that changes speed and memory, and no result.

    execution_policy(neurons="compile")              for the whole process, all threads, from now on
    with execution_policy(neurons="eager"): ...      for this block, in this thread (or asyncio task) alone
    TIMM_QKFORMER_EXECUTION="neurons=eager,packed=0" what the process starts with

Settings that are not named keep their value. Nothing is stored in modules, so models pickle and copy as ever. A
backward pass runs under the policy of its forward pass, in whatever thread. Code that is being traced (torch.compile,
torch.export, torch.jit, make_fx) or transformed (torch.func) takes plain torch operations whatever the policy.
"""

import os
from contextvars import ContextVar, Token
from functools import lru_cache
from threading import Lock
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

ENVIRONMENT_VARIABLE = "TIMM_QKFORMER_EXECUTION"

_CHOICES: dict[str, tuple[Any, ...]] = {
    "neurons": ("auto", "eager", "compile", "spikingjelly"),
    "kernels": ("auto", "always", "never"),
    "packed": (True, False),
}
_BOOLEANS = {"1": True, "true": True, "on": True, "0": False, "false": False, "off": False}

Changes = tuple[tuple[str, Any], ...]  # names and values, hashable


class Policy(NamedTuple):
    """How things run.

    Attributes:
        neurons: What runs the neurons. "eager": torch operations, one after the other. "compile": one kernel forwards
            and one backwards through torch.compile. "auto": eager until so much work is done that compiling pays.
            "spikingjelly": spikingjelly 2.0's operators.
        kernels: Whether this package's C++ kernels run on CPUs: event-driven convolutions and packing in training, and
            the fused operations of deployed models. "always" compiles them when first needed, "never" leaves them
            out. "auto" does so at once for deployed models, and in training once compiling pays.
        packed: Keep packed activations for the backward pass where a layer's input holds few whole numbers.
    """

    neurons: str = "auto"
    kernels: str = "auto"
    packed: bool = True


class execution_policy:  # noqa: N801, reads as a function and as a context manager, like torch.set_grad_enabled
    """Change the policy: in the whole process, or as a context manager in one block of one thread.

    Args:
        neurons, kernels, packed: See `Policy`; None leaves a setting as it is.

    Raises:
        ValueError: For a value that a setting does not have.
    """

    def __init__(self, neurons: str | None = None, kernels: str | None = None, packed: bool | None = None) -> None:
        global _newest
        given = {"neurons": neurons, "kernels": kernels, "packed": packed}
        for name, value in given.items():
            if value is not None:
                _check(name, value, f"{name}={value!r}")
        self.changes: Changes = tuple((name, value) for name, value in given.items() if value is not None)
        self._outer: list[Token[Changes]] = []
        with _lock:
            self._older = _newest
            _newest = self

    def __enter__(self) -> "execution_policy":
        # What the constructor set for everyone was meant for this block.
        self._withdraw()
        self._outer.append(_of_block.set(_of_block.get() + self.changes))
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _of_block.reset(self._outer.pop())

    def _withdraw(self) -> None:
        # Another thread may have set a policy between our constructor and here: its setting stays.
        global _newest
        with _lock:
            if _newest is self:
                _newest = self._older
                return
            setting = _newest
            while setting is not None:
                if setting._older is self:
                    setting._older = self._older
                    return
                setting = setting._older


def set_lif_backend(backend: str) -> execution_policy:
    """Short for `execution_policy(neurons=backend)`."""
    if backend not in _CHOICES["neurons"]:
        raise ValueError(f"backend={backend!r} is unknown, choose one of {list(_CHOICES['neurons'])}")
    return execution_policy(neurons=backend)


def current_policy() -> Policy:
    """The policy here and now.

    Raises:
        ValueError: If the environment variable names a setting or value that does not exist.
    """
    changes: Changes = _of_block.get()
    setting = _newest
    while setting is not None:
        changes = setting.changes + changes
        setting = setting._older
    return _resolve(os.environ.get(ENVIRONMENT_VARIABLE) or "", changes)


@lru_cache(maxsize=256)
def _resolve(environment: str, changes: Changes) -> Policy:
    return Policy(**(_parse(environment) | dict(changes)))


def _parse(text: str) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = part.partition("=")
        source = f"environment variable {ENVIRONMENT_VARIABLE}={text!r}: {part!r}"
        parsed = _BOOLEANS.get(value.lower(), value) if name == "packed" else value
        _check(name, parsed, source)
        settings[name] = parsed
    return settings


def _check(name: str, value: Any, source: str) -> None:
    if name not in _CHOICES:
        raise ValueError(f"{source} is no setting, choose from {list(_CHOICES)}")
    if value not in _CHOICES[name]:
        raise ValueError(f"{source} is unknown, choose one of {list(_CHOICES[name])}")


def is_plain(x: Tensor) -> bool:
    """Whether x is a tensor or parameter and no subclass."""
    return type(x) is Tensor or type(x) is torch.nn.Parameter


def under_dispatch_mode(x: Tensor) -> bool:
    """Whether x has no numbers of its own (fake and meta tensors, subclasses), or a mode sees every operation.

    Such modes are make_fx, FLOP counters, selective checkpointing and graphs being recorded; torch.func and
    functionalization wrap tensors that look like plain ones.
    """
    return (
        not is_plain(x)
        or x.is_meta
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._is_functional_tensor(x)
    )


_lock = Lock()
_newest: execution_policy | None = None  # the process's setting, linked to those before it
_of_block: ContextVar[Changes] = ContextVar("execution_policy", default=())
