"""Modules that keep what they computed from their buffers."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

__all__ = ["DerivedState"]


class DerivedState(nn.Module):
    """Keeps values in `self.derived` until the buffers are moved, converted or loaded; neither copied nor saved."""

    def __init__(self) -> None:
        super().__init__()
        self.derived: dict[Any, Any] = {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DerivedState":
        self.derived = {}
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.derived = {}
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "derived": {}}
