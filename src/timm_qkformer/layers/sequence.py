"""Images and event clips as sequences [T, B, C, H, W].

A static image is the same at every time step, so whatever comes before the first neuron runs on one step and is
broadcast afterwards: exact, and T times cheaper.
"""

from timm.layers import register_notrace_function
from torch import Tensor

__all__ = ["as_sequence", "count_time_steps"]


@register_notrace_function
def as_sequence(x: Tensor, in_chans: int, min_size: int) -> Tensor:
    """A batch of images [B, C, H, W] as [1, B, C, H, W], a batch of event clips [B, T, C, H, W] as [T, B, C, H, W].

    Raises:
        ValueError: For another rank, channels other than `in_chans`, no time step, or a side below `min_size` pixels.
    """
    if x.dim() == 4:
        x = x.unsqueeze(0)
    elif x.dim() == 5:
        x = x.transpose(0, 1)
    else:
        raise ValueError(
            f"input of shape {list(x.shape)} has {x.dim()} dimensions: give images [B, C, H, W] or event clips "
            "[B, T, C, H, W]"
        )
    T, _, C, H, W = x.shape
    if C != in_chans:
        raise ValueError(f"input has {C} channels, the model was created with in_chans={in_chans}")
    if T < 1:
        raise ValueError("input is an event clip [B, T, C, H, W] without a time step (T=0)")
    if H < min_size or W < min_size:
        raise ValueError(f"input of {H}x{W} pixels is too small: this model needs at least {min_size}x{min_size}")
    return x


@register_notrace_function
def count_time_steps(x: Tensor, time_steps: int) -> int:
    """Time steps to simulate for a model input: a clip's own T, `time_steps` for images."""
    return x.shape[1] if x.dim() == 5 else time_steps
