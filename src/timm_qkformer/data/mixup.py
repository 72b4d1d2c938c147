"""timm's Mixup for event clips."""

from timm.data import Mixup
from torch import Tensor

__all__ = ["EventMixup"]


class EventMixup(Mixup):
    """Mixup and CutMix of clips [B, T, C, H, W]; arguments and random numbers (numpy's) are timm's.

    timm's own slices dimensions 2 and 3 of a batch, rows and columns of images but channels and rows of clips. Here T
    and C are folded for the call, so that one box or one weight holds for all steps of a clip. With mixup alone both
    return the same.
    """

    def __call__(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Mix a batch.

        Args:
            x: Clips [B, T, C, H, W], floating point, B even. Changed in place where contiguous, as timm does.
            target: Class indices [B].

        Returns:
            The mixed clips and the soft targets [B, num_classes].
        """
        if x.ndim != 5:
            raise ValueError(f"EventMixup needs clips [B, T, C, H, W], got shape {list(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"EventMixup needs clips of floating point numbers, got {x.dtype}")
        if x.shape[0] % 2:
            raise ValueError(f"EventMixup needs an even batch size, got {x.shape[0]}")
        mixed, target = super().__call__(x.flatten(1, 2), target)
        return mixed.view(x.shape), target
