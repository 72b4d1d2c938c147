"""When compiling a kernel pays: counts of the work that slower code did while the kernel did not exist.

Under "auto" a kernel is compiled once the work that it would have done exceeds a budget, which takes about as long as
compiling. So a short run never waits for a compiler, and a long one waits no longer than it has lost already. Counts
do not depend on the clock: the same calls compile at the same place. Gradients of fast and slow code agree to rounding
only, so a training run saves the counts (`state_dict`) and a resumed one starts from them: it changes over at the same
call and repeats its numbers to the bit. So it does with what this machine was measured to do faster (`calibration`).
"""

from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any

import torch

from . import calibration

_CALIBRATION = "calibration"
_DTYPE, _DEVICE = "torch.dtype ", "torch.device "  # prefixes of values that are neither numbers nor plain text


class Budget:
    """Work done by slower code, by kind of kernel.

    Args:
        key_type: A NamedTuple type whose instances name the kernels.
    """

    def __init__(self, key_type: Any) -> None:
        self.key_type = key_type
        self.work: dict[Any, int] = {}
        self._lock = Lock()
        _budgets.append(self)

    def spend(self, key: Any, amount: int, limit: int) -> bool:
        """Count work of slower code; False once the limit is exceeded and a kernel should do it."""
        with self._lock:
            self.work[key] = self.work.get(key, 0) + amount
            return self.work[key] <= limit

    def load(self, fields: Mapping[str, Any], work: int) -> bool:
        """Set the count of one kernel; False if the fields are not those of this budget's keys."""
        needed = set(self.key_type._fields) - set(self.key_type._field_defaults)
        if not needed <= set(fields) <= set(self.key_type._fields):
            return False
        with self._lock:
            self.work[self.key_type(**fields)] = work
        return True


_budgets: list[Budget] = []


def state_dict() -> list[dict[str, Any]]:
    """For each kind of kernel, what it is and how much work slower code has done; then this machine's calibration.

    Numbers and text alone.
    """
    work = [
        {"work": work, **{name: _encoded(value) for name, value in key._asdict().items()}}
        for budget in _budgets
        for key, work in list(budget.work.items())
    ]
    return work + [{"work": 0, _CALIBRATION: name, **value} for name, value in calibration.state_dict().items()]


def load_state_dict(state: Sequence[Mapping[str, Any]]) -> None:
    """Continue from what `state_dict` gave in another process; kernels that this version lacks are left out."""
    calibration.load_state_dict({str(entry[_CALIBRATION]): entry for entry in state if _CALIBRATION in entry})
    for kernel in state:
        fields = {name: _decoded(value) for name, value in kernel.items() if name != "work"}
        any(budget.load(fields, int(kernel["work"])) for budget in _budgets)


def _encoded(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return _DTYPE + str(value).removeprefix("torch.")
    return _DEVICE + str(value) if isinstance(value, torch.device) else value


def _decoded(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(_DTYPE):
        return getattr(torch, value.removeprefix(_DTYPE))
    if isinstance(value, str) and value.startswith(_DEVICE):
        return torch.device(value.removeprefix(_DEVICE))
    return value
