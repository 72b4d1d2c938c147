"""Which code runs the neurons: a setting of the process, of a block of code, or of the environment.

    set_lif_backend("compile")            for the whole process, all threads, from now on
    with set_lif_backend("eager"): ...    for this block, in this thread (or asyncio task) alone
    TIMM_QKFORMER_LIF_BACKEND=eager       what the process starts with; "auto" if unset

"auto" and "compile" are explained in `fused`; "eager" runs torch ops one after the other; "spikingjelly" runs
spikingjelly 2.0's operators. Nothing is stored in modules, so models pickle and copy as ever. Spikes are the same
whichever runs (but see `peers` on spikingjelly). A backward pass runs on the backend of its forward pass, in whatever
thread. Code that is being traced (torch.compile, torch.export, torch.jit, make_fx) or transformed (torch.func) takes
plain torch ops whatever the setting.
"""

import os
from contextvars import ContextVar, Token
from threading import Lock
from types import TracebackType

__all__ = ["BACKENDS", "ENVIRONMENT_VARIABLE", "current_lif_backend", "set_lif_backend"]

BACKENDS = ("auto", "eager", "compile", "spikingjelly")
ENVIRONMENT_VARIABLE = "TIMM_QKFORMER_LIF_BACKEND"


class set_lif_backend:  # noqa: N801, reads as a function and as a context manager, like torch.set_grad_enabled
    """Choose what runs the neurons: in the whole process, or as a context manager in one block of one thread.

    Args:
        backend: "auto", "eager", "compile" or "spikingjelly", see the module's first lines.

    Raises:
        ValueError: For another name.
    """

    def __init__(self, backend: str) -> None:
        global _newest
        self.backend = _check(backend, f"backend={backend!r}")
        self._outer: list[Token[str | None]] = []
        with _lock:
            self._older = _newest
            _newest = self

    def __enter__(self) -> "set_lif_backend":
        # What the constructor set for everyone was meant for this block.
        self._withdraw()
        self._outer.append(_of_block.set(self.backend))
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _of_block.reset(self._outer.pop())

    def _withdraw(self) -> None:
        # Another thread may have set a backend between our constructor and here: its setting stays.
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


def current_lif_backend() -> str:
    """The backend that a neuron called here and now runs on.

    Raises:
        ValueError: If the environment variable decides and names no backend.
    """
    of_block = _of_block.get()
    if of_block is not None:
        return of_block
    newest = _newest
    if newest is not None:
        return newest.backend
    name = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    return _check(name, f"environment variable {ENVIRONMENT_VARIABLE}={name!r}")


def _check(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} is unknown, choose one of {list(BACKENDS)}")
    return name


_lock = Lock()
_newest: set_lif_backend | None = None  # the process's setting, linked to those that it hides
_of_block: ContextVar[str | None] = ContextVar("lif_backend", default=None)
