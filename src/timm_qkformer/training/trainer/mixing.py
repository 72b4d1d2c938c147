"""timm's FastCollateMixup with a switch that works."""

from typing import Any

import torch
from timm.data import FastCollateMixup

__all__ = ["SwitchableCollateMixup"]


class SwitchableCollateMixup(FastCollateMixup):
    """Mixup and CutMix while collating; `mixup_enabled` reaches the copies in the loader's workers, too.

    Workers live from epoch to epoch with a copy of the collate function. timm's switch is an attribute, which the
    copies keep as it was; here it lies in memory that the processes share.
    """

    def __init__(self, **kwargs: Any) -> None:
        self._enabled = torch.ones(1, dtype=torch.bool).share_memory_()
        super().__init__(**kwargs)

    @property
    def mixup_enabled(self) -> bool:
        """Whether batches are mixed. Set it between epochs: workers collate ahead."""
        return bool(self._enabled)

    @mixup_enabled.setter
    def mixup_enabled(self, enabled: bool) -> None:
        self._enabled.fill_(enabled)
