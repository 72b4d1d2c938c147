"""One pass over labelled data."""

import time
from dataclasses import dataclass
from typing import Any, Callable, ContextManager, Optional

import torch
from timm.task import ClassificationEvaluator, evaluation_sample_limit
from timm.utils import unwrap_model
from torch import Tensor, nn

from ...analysis import firing_rates
from ...data.images import readable
from ...layers import SpikingNeuron

__all__ = ["Evaluation", "evaluate", "mean_firing_rate"]

_RATE_SAMPLES = 32  # the firing rate is that of so many samples: one small forward pass


@dataclass(frozen=True)
class Evaluation:
    """What a pass measured.

    Attributes:
        loss: Mean cross-entropy per sample.
        top1: Percent of samples whose class came first.
        top5: Percent of samples whose class was among the first five.
        samples: How many there were, of all processes.
        samples_per_second: Loading included, of all processes.
        firing_rate: Mean over the neuron layers, spikes per neuron and time step; None for models without any.
    """

    loss: float
    top1: float
    top5: float
    samples: int
    samples_per_second: float
    firing_rate: Optional[float]


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Any,
    device: torch.device,
    autocast: Callable[[], ContextManager[Any]],
    dtype: Optional[torch.dtype] = None,
    channels_last: bool = False,
    distributed: bool = False,
    on_batch: Optional[Callable[[int], None]] = None,
) -> Evaluation:
    """Classify every sample once; the result does not depend on how they are batched or shared out.

    Args:
        model: In any mode, left in eval mode.
        batches: Loader of images [B, C, H, W] or clips [B, T, C, H, W], and class indices [B].
        device: The model's.
        autocast: Factory of the context of a forward pass.
        dtype: The model's, if not float32.
        channels_last: Give images in that memory format.
        distributed: Add up over the processes of the group.
        on_batch: Called after each batch with its number of samples.
    """
    model.eval()
    evaluator = ClassificationEvaluator(device=device, max_samples=evaluation_sample_limit(batches))
    rate = None
    start = time.perf_counter()
    for index, (x, target) in enumerate(readable(batches)):
        x, target = x.to(device=device, dtype=dtype), target.to(device=device)
        if channels_last and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        with autocast():
            output = model(x)
            if isinstance(output, (tuple, list)):
                output = output[0]
            evaluator.update(output, target)
            if index == 0:
                rate = mean_firing_rate(unwrap_model(model), x[:_RATE_SAMPLES])
        if on_batch is not None:
            on_batch(len(x))
    metrics = evaluator.compute(distributed)
    counts = evaluator.counts.clone()
    if distributed:
        torch.distributed.all_reduce(counts)
    samples = int(counts[0])
    seconds = max(time.perf_counter() - start, 1e-9)
    return Evaluation(metrics["loss"], metrics["top1"], metrics["top5"], samples, samples / seconds, rate)


def mean_firing_rate(model: nn.Module, x: Tensor) -> Optional[float]:
    """Spikes per neuron and time step, over all neurons; None without neurons."""
    if not any(isinstance(module, SpikingNeuron) for module in model.modules()):
        return None
    return firing_rates(model, x).mean
