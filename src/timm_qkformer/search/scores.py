"""Scores of untrained networks, the higher the better.

    flops    multiply-accumulates of a time step in 10^9, plus `pattern_weight` divided by the pattern score: AutoST's
             (arXiv 2307.00293), whose default weight is 0
    naswot   log |K| of the patterns of activity, K_ij = elements in which samples i and j agree (Mellor et al.,
             "Neural Architecture Search without Training", arXiv 2006.04647), here of all spikes of all neurons
    spikes   the same with the disagreements of each layer divided by those that its firing rate leads to expect,
             since sparse patterns agree mostly in silence (Kim et al., "Neural Architecture Search for Spiking Neural
             Networks", arXiv 2201.10355, sparsity-aware Hamming distance)

Batch norms take the statistics of the batch, as at the start of training: with those of an untrained network hardly a
neuron fires.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..analysis.hooks import Watch, bare_model, inference, recalibrated_norms, watching
from ..models import SpikingTransformer
from ..neurons import SpikingNeuron


def flops(model: SpikingTransformer, x: Tensor) -> float:
    """Multiply-accumulates of one sample and time step."""
    steps = model.time_steps
    model.set_time_steps(1)
    try:
        with FlopCounterMode(display=False) as counter, inference(model):
            model(x[:1] if x.dim() == 4 else x[:1, :1])
    finally:
        model.set_time_steps(steps)
    return counter.get_total_flops() / 2


def naswot(model: SpikingTransformer, x: Tensor) -> float:
    """log |K| of a batch's spike patterns."""
    return _log_determinant(_agreements(model, x, lambda apart, spikes: apart))


def spikes(model: SpikingTransformer, x: Tensor) -> float:
    """log |K| with disagreements relative to those expected at each layer's firing rate."""

    def relative(apart: Tensor, spikes: Tensor) -> Tensor:
        rate = spikes.mean()
        expected = 2 * rate * (1 - rate)
        return apart * (0.5 / expected) if expected > 0 else apart

    return _log_determinant(_agreements(model, x, relative))


def _agreements(model: SpikingTransformer, x: Tensor, distance: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """K [B, B]: elements of all neurons' spikes less the distances of samples, layer by layer."""
    K = torch.zeros(len(x), len(x), dtype=torch.float64, device=x.device)

    def see(fired: Tensor) -> None:
        codes = fired.transpose(0, 1).flatten(1).ne(0).float()  # [B, T * neurons]
        both = codes @ codes.T
        ones = codes.sum(1)
        apart = (ones[:, None] + ones[None, :] - 2 * both).double()
        K.add_(codes.shape[1] - distance(apart, codes))

    neurons = [name for name, module in bare_model(model).named_modules() if isinstance(module, SpikingNeuron)]
    with recalibrated_norms(model, [x]), inference(model), watching(model, [Watch(name, see) for name in neurons]):
        model(x)
    return K


def _log_determinant(K: Tensor) -> float:
    sign, value = torch.linalg.slogdet(K)
    return float(value) if sign != 0 else -float("inf")


SCORES: dict[str, Callable[[SpikingTransformer, Tensor], float]] = {
    "flops": lambda model, x: flops(model, x) / 1e9,
    "naswot": naswot,
    "spikes": spikes,
}


def score_model(model: nn.Module, x: Tensor, score: str = "flops", pattern_weight: float = 0.0) -> float:
    """Score an untrained model.

    Args:
        model: A model of this package.
        x: A batch of images or event clips, of 2 samples or more.
        score: One of `SCORES`.
        pattern_weight: AutoST's ld, for "flops".

    Raises:
        ValueError: For an unknown score, a weight for another one, or a batch that is too small.
        TypeError: For another kind of model.
    """
    if score not in SCORES:
        raise ValueError(f"score={score!r} is unknown, choose one of {sorted(SCORES)}")
    if pattern_weight and score != "flops":
        raise ValueError(f"pattern_weight={pattern_weight} belongs to score='flops', not to {score!r}")
    if len(x) < 2:
        raise ValueError(f"x has {len(x)} samples: patterns are compared among 2 or more")
    if not isinstance(model, SpikingTransformer):
        raise TypeError(f"model is a {type(model).__name__}, expected a model of this package")
    with torch.no_grad():
        value = SCORES[score](model, x)
        return value + pattern_weight / naswot(model, x) if pattern_weight else value
