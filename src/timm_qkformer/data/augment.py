"""Augmentations of event clips: one random transform of space, the same at every time step, and mixup."""

import math
from collections.abc import Callable, Sequence

import torch
from timm.data import Mixup
from torch import Tensor


def translate(clip: Tensor, dx: int, dy: int) -> Tensor:
    """Shift a clip [T, C, H, W] by dx columns and dy rows; what leaves is lost, zeros come in."""
    height, width = clip.shape[-2:]
    if abs(dx) >= width or abs(dy) >= height:
        return torch.zeros_like(clip)
    out = roll(clip, dx, dy)
    out[..., : max(dx, 0)] = 0
    out[..., width + min(dx, 0) :] = 0
    out[..., : max(dy, 0), :] = 0
    out[..., height + min(dy, 0) :, :] = 0
    return out


def roll(clip: Tensor, dx: int, dy: int) -> Tensor:
    """Shift a clip [T, C, H, W] by dx columns and dy rows; what leaves on one side comes back on the other."""
    return clip.roll((dy, dx), dims=(-2, -1))


def shear_x(clip: Tensor, shear: float) -> Tensor:
    """Shear a clip [T, C, H, W] along its rows about its centre by `shear` radians, nearest neighbour."""
    from torchvision.transforms.functional import affine

    return affine(clip, angle=0.0, translate=[0, 0], scale=1.0, shear=[math.degrees(shear), 0.0])


def rotate(clip: Tensor, degrees: float) -> Tensor:
    """Rotate a clip [T, C, H, W] counter-clockwise about its centre, nearest neighbour, zeros where nothing was."""
    from torchvision.transforms.functional import rotate as rotate_image

    return rotate_image(clip, degrees)


def cutout(clip: Tensor, scale: tuple[float, float] = (0.001, 0.11)) -> Tensor:
    """Erase a random square of a clip [T, C, H, W]; its share of the area is drawn from `scale`."""
    from torchvision.transforms import RandomErasing

    return RandomErasing(p=1.0, scale=scale, ratio=(1.0, 1.0))(clip)


# Operation and largest magnitude. Translations are whole pixels, towards zero.
_OPERATIONS: dict[str, tuple[Callable[[Tensor, float], Tensor], float]] = {
    "identity": (lambda clip, _: clip, 0.0),
    "shear_x": (shear_x, 0.3),
    "translate_x": (lambda clip, m: translate(clip, int(m), 0), 5.0),
    "translate_y": (lambda clip, m: translate(clip, 0, int(m)), 5.0),
    "rotate": (rotate, 30.0),
    "cutout": (lambda clip, _: cutout(clip), 0.0),
    "roll_x": (lambda clip, m: roll(clip, int(m), 0), 5.0),
    "roll_y": (lambda clip, m: roll(clip, 0, int(m)), 5.0),
}
RELEASE_AUGMENTATIONS = ("identity", "shear_x", "translate_x", "translate_y", "rotate", "cutout")


class EventAugment:
    """Flip a clip [T, C, H, W] at random, then apply one operation, drawn evenly, at a random strength.

    The defaults are what the release trains CIFAR10-DVS and DVS128 Gesture with (its `SNNAugmentWide` after
    `RandomHorizontalFlip`, per clip): TrivialAugment (arXiv 2103.10158) over `RELEASE_AUGMENTATIONS`, strengths up to
    0.3 rad of shear, 5 pixels, 30 degrees, or a square of 0.1 to 11 % of the area. "roll_x" and "roll_y", shifts that
    wrap around, can be had besides. Random numbers are torch's.

    For DVS128 Gesture the flip swaps the gestures of the left and the right arm, which are classes of their own. The
    release flips all the same; `flip_prob=0` does not.

    Args:
        flip_prob: Probability of a horizontal flip.
        operations: Names to draw from; empty for the flip alone.
        bins: Strengths are drawn from this many evenly spaced ones between minus and plus the largest.
    """

    def __init__(
        self, flip_prob: float = 0.5, operations: Sequence[str] = RELEASE_AUGMENTATIONS, bins: int = 31
    ) -> None:
        unknown = [name for name in operations if name not in _OPERATIONS]
        if unknown:
            raise ValueError(f"operations={unknown} are unknown, expected some of {', '.join(_OPERATIONS)}")
        if not 0 <= flip_prob <= 1:
            raise ValueError(f"flip_prob={flip_prob} needs to lie between 0 and 1")
        if bins < 2:
            raise ValueError(f"bins={bins} needs to be at least 2")
        self.flip_prob = flip_prob
        self.operations = tuple(operations)
        self.bins = bins

    def __call__(self, clip: Tensor) -> Tensor:
        """Return an augmented clip of the same shape [T, C, H, W]; the one given is left as it is."""
        if clip.ndim != 4:
            raise ValueError(f"EventAugment needs a clip [T, C, H, W], got shape {list(clip.shape)}")
        if torch.rand(1) < self.flip_prob:
            clip = clip.flip(-1)
        if not self.operations:
            return clip
        operation, largest = _OPERATIONS[self.operations[int(torch.randint(len(self.operations), (1,)))]]
        position = int(torch.randint(self.bins, (1,)))
        return operation(clip, largest * (2 * position / (self.bins - 1) - 1))

    def __repr__(self) -> str:
        return f"EventAugment(flip_prob={self.flip_prob}, operations={self.operations}, bins={self.bins})"


class EventMixup(Mixup):
    """Mixup and CutMix of clips [B, T, C, H, W]; arguments and random numbers (numpy's) are timm's.

    timm's own slices dimensions 2 and 3 of a batch, rows and columns of images but channels and rows of clips. Here T
    and C are folded for the call, so that one box or one weight holds for all steps of a clip. With mixup alone both
    return the same.
    """

    def __call__(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Apply mixup or CutMix to a batch.

        Args:
            x: Clips [B, T, C, H, W], floating point, B even. Changed in place where contiguous, as timm does.
            target: Class indices [B].

        Returns:
            The new clips and the soft targets [B, num_classes].
        """
        if x.ndim != 5:
            raise ValueError(f"EventMixup needs clips [B, T, C, H, W], got shape {list(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"EventMixup needs clips of floating point numbers, got {x.dtype}")
        if x.shape[0] % 2:
            raise ValueError(f"EventMixup needs an even batch size, got {x.shape[0]}")
        mixed, target = super().__call__(x.flatten(1, 2), target)
        return mixed.view(x.shape), target
