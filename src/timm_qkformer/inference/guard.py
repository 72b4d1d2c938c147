"""Where a deployed model must not run: under whoever records its operations, or gives tensors without numbers.

Its kernels write to memory that a recorder does not see, and weights are packed once for the machine at hand. A graph
recorded from it would hold whatever lay in that memory.
"""

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ..execution.policy import is_plain

# Dispatch modes under which operations are recorded or have no numbers; others (counters of operations) just watch.
_RECORDING = {"FakeTensorMode", "ProxyTorchDispatchMode", "FunctionalTensorMode", "PreDispatchSchemaCheckMode"}


def check_can_run(x: Any) -> None:
    """Refuse input on which a deployed model cannot compute here and now.

    Args:
        x: Images or event clips.

    Raises:
        RuntimeError: Under torch.export, torch.jit, ONNX exporters, FX, make_fx, torch.func, functionalization, and for
            fake or meta tensors.
    """
    found = _recorder(x)
    if found is not None:
        refuse(found)


def refuse(found: str) -> NoReturn:
    """Raise the one error of all tracers and exporters, `found` among them."""
    raise RuntimeError(
        f"a deployed model cannot be traced, exported or run without numbers ({found}): its kernels are compiled for "
        "this machine. Trace or export the original, the model that deploy() was called with"
    )


def _recorder(x: Any) -> str | None:
    if not isinstance(x, Tensor):
        return f"input of the type {type(x).__name__}"
    if torch.compiler.is_exporting():
        return "torch.export"
    if torch.jit.is_tracing():
        return "torch.jit.trace"
    if torch._C._are_functorch_transforms_active():
        return "torch.func"
    modes = {type(mode).__name__ for mode in _get_current_dispatch_mode_stack()}
    if modes & _RECORDING:
        return min(modes & _RECORDING)
    if torch._is_functional_tensor(x):
        return "functionalization"
    if x.is_meta or (not is_plain(x) and not _has_memory(x)):
        return f"{type(x).__name__} on {x.device}"
    return None


def _has_memory(x: Tensor) -> bool:
    """Whether a subclass of Tensor is one by name alone, such as torchvision's images."""
    if isinstance(x, FakeTensor):
        return False
    try:
        return x.data_ptr() != 0 or x.numel() == 0
    except RuntimeError:
        return False
