"""How many bytes of tensors are alive at once while code runs, on any device.

A `TorchDispatchMode` sees every operation that reaches a kernel. It notes the storages that come out, asks before the
next one which of them are gone, and keeps the largest sum. That is what the algorithm needs, whatever the allocator's
rounding and caching: a byte count that is the same on every machine. What it does not see is memory that a kernel
takes and gives back within one operation, such as a matrix library's buffers.
"""

from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["LiveTensors"]


class LiveTensors(TorchDispatchMode):
    """Context manager that measures the peak of what tensors made inside it take.

    Neurons have to run in eager mode inside (`set_lif_backend("eager")`): compiled code is one operation.

    Args:
        existing: Tensors that were there before and do not count, should an operation return them.

    Attributes:
        peak: Most bytes alive at once so far.
    """

    def __init__(self, existing: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.peak = 0
        self._existing = {StorageWeakRef(tensor.untyped_storage()).cdata for tensor in existing}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Optional[dict[str, Any]] = None
    ) -> Any:
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                reference = StorageWeakRef(storage)
                if reference.cdata not in self._existing:
                    self._alive[reference.cdata] = (reference, storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return out
