"""Accuracy of a classifier: the loop, the result and the report that `verify`, `validate` and training share."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from timm.task import ClassificationEvaluator
from torch import Tensor, nn

from ..data.images import readable


@dataclass(frozen=True)
class Evaluation:
    """What a pass over labelled data measured."""

    loss: float  # mean cross-entropy per sample
    top1: float  # percent of samples whose class came first
    top5: float  # percent of samples whose class was among the first five
    samples: int  # of all processes
    samples_per_second: float  # of all processes
    firing_rate: float | None = None  # mean over the neuron layers, spikes per neuron and time step; None if unknown


@torch.inference_mode()
def classify_batches(
    passes: Sequence[tuple[Callable[[Tensor], Any], ClassificationEvaluator]],
    batches: Any,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
) -> Iterator[Tensor]:
    """Classify every sample once in each pass; the counts do not depend on how samples are batched or shared out.

    Args:
        passes: What classifies inputs, and what counts its answers.
        batches: Loader of images [B, C, H, W] or clips [B, T, C, H, W], and class indices [B].
        device: Where inputs go.
        autocast: Factory of the context of a forward pass.
        dtype: Of the inputs, if not float32.
        channels_last: Give images in that memory format.

    Yields:
        The inputs of each batch, when its answers have been counted.
    """
    for x, target in readable(batches):
        x = x.to(device=device, dtype=dtype)
        if channels_last and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        for classify, evaluator in passes:
            with autocast():
                output = classify(x)
                if isinstance(output, (tuple, list)):
                    output = output[0]
                evaluator.update(output, target.to(output.device))
        yield x


def report(
    measured: Evaluation, net: nn.Module, config: Mapping[str, Any], batch_size: int, device: torch.device, **facts: Any
) -> dict[str, Any]:
    """The result of `verify` and `validate`: what was measured, on what, and `facts` that only one of them knows."""
    return {
        **facts,
        "samples": measured.samples,
        "top1": measured.top1,
        "top5": measured.top5,
        "loss": None if math.isnan(measured.loss) else measured.loss,
        "firing_rate": measured.firing_rate,
        "images_per_second": measured.samples_per_second,
        "batch_size": batch_size,
        "input_size": list(config["input_size"]),
        "time_steps": getattr(net, "time_steps", None),
        "parameters": sum(p.numel() for p in net.parameters()),
        "device": str(device),
    }
