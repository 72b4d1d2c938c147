"""A model for inference alone, with the interface of the one that it was made from."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..layers import MeanReadout, MembraneReadout, as_sequence, count_time_steps
from ..models._hst import HierarchicalSpikingTransformer
from .blocks import DeployedStage, DeployedUnit
from .precision import adds_events, spikes_dtype, weights_dtype
from .projection import Projection

__all__ = ["DeployedModel"]

# Samples run together as long as the last stage has no more tokens [T, B, N] than this: enough to keep matrix products
# efficient, few enough to stay in the processor's cache.
_TOKENS = 1024

# The largest sum of spikes in 8-bit arithmetic. Processors without int8 dot products add pairs of products up in 16
# bits, saturating: 2 * 129 * 127 is the most that fits.
_MAX_SUM = 129

_ATTRIBUTES = ("pretrained_cfg", "default_cfg", "_model_args", "_traits")


class DeployedModel(nn.Module):
    """A hierarchical spiking transformer for inference; see `deploy`, which makes them.

    Takes what the original takes: images [B, C, H, W], shown for `time_steps` steps, or event clips [B, T, C, H, W].
    No gradients. Saved by its `state_dict`, which fits whatever `deploy` makes of the same architecture at the same
    precision.

    Args:
        model: The original, which stays as it is.
        precision: "fp32", "bf16" or "int8".
        products: "auto", "events" or "dense".

    Raises:
        TypeError, ValueError: See `deploy`.
    """

    def __init__(self, model: HierarchicalSpikingTransformer, precision: str, products: str) -> None:
        super().__init__()
        if type(model.readout) not in (MeanReadout, MembraneReadout):
            raise TypeError(f"readout is a {type(model.readout).__name__}, expected MeanReadout or MembraneReadout")
        stem_dtype = torch.float64 if model.stem.conv.weight.dtype == torch.float64 else torch.float32
        dtype = weights_dtype(precision, stem_dtype)
        self.precision = precision
        self.time_steps = model.time_steps
        self.min_size = model.stem.min_size
        self.feature_info: list[dict[str, Any]] = deepcopy(model.feature_info)
        for name in _ATTRIBUTES:
            if hasattr(model, name):
                setattr(self, name, deepcopy(getattr(model, name)))
        self.in_chans, self.num_classes = model.in_chans, model.num_classes
        self.num_features, self.head_hidden_size = model.num_features, model.head_hidden_size

        stages: list[Any] = list(model.stages)
        self.stem = DeployedUnit(model.stem, "stem", stem_dtype)
        self.stages = nn.ModuleList(DeployedStage(stage, f"stages.{i}", dtype) for i, stage in enumerate(stages))
        self.readout = deepcopy(model.readout).to(stem_dtype)
        self.global_pool = deepcopy(model.global_pool)
        self.head = deepcopy(model.head).to(stem_dtype)
        self.requires_grad_(False).zero_grad(set_to_none=True)
        self.eval()
        self.reduction: int = self.feature_info[len(stages) - 1]["reduction"]
        # Sequences that run across samples cannot be cut between them.
        self.batch_coupled = any(getattr(module, "batch_coupled", False) for module in self.modules())
        fits = self._sums_fit(precision, products)
        self.events = fits and stem_dtype == torch.float32 and adds_events(products, precision)
        for module in self.stages.modules():
            if isinstance(module, Projection):
                module.events = self.events
        spikes_dtype(precision, self.stem.projection.weight, self.events)  # warns here rather than in the first batch

    def _sums_fit(self, precision: str, products: str) -> bool:
        """Whether a byte holds all sums of spikes."""
        largest = 1
        for i, stage in enumerate(self.stages):
            assert isinstance(stage, DeployedStage)
            largest = stage.largest_sum(largest)
            if largest > _MAX_SUM and (precision == "int8" or products == "events"):
                asked = 'precision="int8"' if precision == "int8" else 'products="events"'
                raise ValueError(
                    f"{asked}: sums of spikes in stages.{i} can reach {largest}, 8-bit arithmetic is exact up to "
                    f'{_MAX_SUM}: use "bf16" or "fp32" with products="auto"'
                )
        return largest <= _MAX_SUM

    # Of the original, unbound: they need nothing but what is here.
    set_time_steps = HierarchicalSpikingTransformer.set_time_steps
    get_classifier = HierarchicalSpikingTransformer.get_classifier

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DeployedModel":
        bias = self.stem.projection.bias
        wanted = fn(bias[:0]).dtype
        if wanted != bias.dtype:
            raise RuntimeError(
                f"a deployed model keeps its arithmetic, {self.precision} with potentials in {bias.dtype}, and cannot "
                f"become {wanted}: deploy the original again, with another precision or as model.double()"
            )

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)  # .float() is for the bias alone

        super()._apply(move, recurse)
        return self

    def train(self, mode: bool = True) -> "DeployedModel":
        if mode:
            raise RuntimeError("a deployed model is for inference alone: train the model that it was made from")
        return super().train(False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] or event clips [B, T, C, H, W] to logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] or event clips [B, T, C, H, W] to a feature map [B, C', H', W'], as the original's."""
        return self._maps(x, [], len(self.stages))[-1]

    @torch.no_grad()
    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Feature map [B, C', H', W'] to logits [B, num_classes] (features [B, C'] with `pre_logits`)."""
        x = self.global_pool(x)
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Forward features that also returns the stages' maps; arguments and results are the original's."""
        if output_fmt != "NCHW":
            raise ValueError(f'output_fmt={output_fmt!r} must be "NCHW"')
        take, last = feature_take_indices(len(self.stages), indices)
        stages = last + 1 if stop_early or intermediates_only else len(self.stages)
        *intermediates, features = self._maps(x, take, stages)
        return intermediates if intermediates_only else (features, intermediates)

    @torch.compiler.disable
    @torch.no_grad()
    def _maps(self, x: Tensor, take: list[int], stages: int) -> list[Tensor]:
        """The mean over T of each stage in `take`, then the features after `stages` stages: maps [B, C, H, W]."""
        if not x.is_floating_point():
            raise ValueError(
                f"input is {x.dtype}: give floating-point images or event clips, normalised as for training"
            )
        sequence = as_sequence(x, self.in_chans, self.min_size)
        _, B, _, H, W = sequence.shape
        if B == 0:
            return [self._empty_map(i, H, W) for i in (*take, stages - 1)]
        time_steps = count_time_steps(x, self.time_steps)
        tokens = time_steps * -(-H // self.reduction) * -(-W // self.reduction)
        portions = 1 if self.batch_coupled else -(-B // max(1, _TOKENS // tokens))
        maps = [self._run(part, time_steps, take, stages) for part in sequence.tensor_split(portions, dim=1)]
        return [torch.cat(parts) if portions > 1 else parts[0] for parts in zip(*maps, strict=True)]

    def _run(self, sequence: Tensor, time_steps: int, take: list[int], stages: int) -> list[Tensor]:
        """`_maps` of a few samples [T or 1, B, C, H, W]."""
        weight = self.stem.projection.weight
        spikes = spikes_dtype(self.precision, weight, self.events)
        x = sequence.permute(0, 1, 3, 4, 2).to(weight.dtype).contiguous()
        x = self.stem(x, spikes, time_steps)
        maps = []
        for i, stage in enumerate(self.stages[:stages]):
            x = stage(x, spikes, i == 0 and self.stem.fires_periodically(len(sequence)))
            if i in take:
                maps.append(self._sequence(x).mean(0))
        maps.append(self.readout(self._sequence(x)) if stages == len(self.stages) else self._sequence(x).mean(0))
        return maps

    def _sequence(self, x: Tensor) -> Tensor:
        """Back to [T, B, C, H, W], in full precision."""
        return x.to(self.stem.projection.weight.dtype).permute(0, 1, 4, 2, 3)

    def _empty_map(self, stage: int, height: int, width: int) -> Tensor:
        info = self.feature_info[stage]
        size = (-(-side // info["reduction"]) for side in (height, width))
        return self.stem.projection.weight.new_empty(0, info["num_chs"], *size)
