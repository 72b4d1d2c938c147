"""How far the backend "auto" is from compiling: for a resumed process to compile where the first one would have.

Gradients of fused and eager neurons, and of convolutions event by event and dense, agree to rounding only. So a
training run that is taken up again repeats its numbers to the bit if they change over at the same call, and that
follows from the work done before.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from . import event_training, fused

__all__ = ["fusion_progress", "resume_fusion"]

_DTYPE, _DEVICE = "torch.dtype ", "torch.device "  # prefixes of values that are neither numbers nor plain text
_EVENTS = {"kernel": "events"}


def fusion_progress() -> list[dict[str, Any]]:
    """For each kind of kernel, what it is and how much work has been done in its stead.

    Numbers and text only, for a checkpoint.
    """
    with fused._counting:
        neurons = [{"work": entry.work, **_encoded(key)} for key, entry in fused._entries.items()]
    return [*neurons, {"work": event_training.work_done(), **_EVENTS}]


def resume_fusion(progress: Sequence[Mapping[str, Any]]) -> None:
    """Count on from what `fusion_progress` gave in another process; kernels that this version lacks are left out."""
    for kernel in progress:
        fields = {name: _decoded(value) for name, value in kernel.items() if name != "work"}
        if fields == _EVENTS:
            event_training.resume_work(int(kernel["work"]))
        elif set(fields) == set(fused._Key._fields):
            with fused._counting:
                fused._entries.setdefault(fused._Key(**fields), fused._Entry()).work = int(kernel["work"])


def _encoded(key: fused._Key) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return _DTYPE + str(value).removeprefix("torch.")
        return _DEVICE + str(value) if isinstance(value, torch.device) else value

    return {name: plain(value) for name, value in key._asdict().items()}


def _decoded(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(_DTYPE):
        return getattr(torch, value.removeprefix(_DTYPE))
    if isinstance(value, str) and value.startswith(_DEVICE):
        return torch.device(value.removeprefix(_DEVICE))
    return value
