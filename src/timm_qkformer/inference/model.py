"""From a trained model to one that only runs, and runs fast, with the interface of the one that it was made from."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any, NoReturn

import torch
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..execution.packing import Range
from ..layers import ConvNorm, MeanReadout, MembraneReadout, as_sequence, count_time_steps
from ..models import SpikingTransformer
from ..models.stepping import StreamState, run_step
from .blocks import DeployedUnit
from .feedback import deployed_stage
from .guard import check_can_run, refuse
from .products import check_choices, choose, densities, projections
from .weights import PRECISIONS, PRODUCTS, check_sums, fits_bytes, spikes_dtype, weights_dtype

# Samples run together as long as the last stage has no more tokens [T, B, N] than this: enough to keep matrix products
# efficient, few enough to stay in the processor's cache.
_TOKENS = 1024

_ATTRIBUTES = ("pretrained_cfg", "default_cfg", "_model_args", "_traits")


class DeployedModel(nn.Module):
    """A spiking transformer for inference; see `deploy`, which makes them.

    Takes what the original takes: images [B, C, H, W], shown for `time_steps` steps, or event clips [B, T, C, H, W].
    No gradients, and nothing to trace or export: that takes the original. Saved by its `state_dict`, which fits
    whatever `deploy` makes of the same architecture at the same precision.

    Args:
        model: The original, which stays as it is.
        precision: "fp32", "bf16" or "int8".
        products: "auto", "events" or "dense", or what `products` of another such model says.
        images: Of which "auto" chooses by.

    Raises:
        TypeError, ValueError: See `deploy`.
    """

    def __init__(
        self,
        model: SpikingTransformer,
        precision: str,
        products: str | Mapping[str, str] = "auto",
        images: Tensor | None = None,
    ) -> None:
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
        self.stages = nn.ModuleList(deployed_stage(stage, f"stages.{i}", dtype) for i, stage in enumerate(stages))
        self.readout = deepcopy(model.readout).to(stem_dtype)
        self.global_pool = deepcopy(model.global_pool)
        self.head = deepcopy(model.head).to(stem_dtype)
        self.requires_grad_(False).zero_grad(set_to_none=True)
        self.eval()
        self.reduction: int = self.feature_info[len(stages) - 1]["reduction"]
        # Sequences that run across samples cannot be cut between them.
        self.batch_coupled = any(getattr(module, "batch_coupled", False) for module in self.modules())
        self.numbers = _numbers(stages, model.membrane_shortcut)
        for i, stage in enumerate(stages):
            asked = "events" if isinstance(products, Mapping) and "events" in products.values() else products
            check_sums(_numbers([stage], model.membrane_shortcut), f"stages.{i}", precision, str(asked))
        # Whether spikes are bytes, which convolutions may add up.
        self.events = fits_bytes(self.numbers) and stem_dtype == torch.float32 and products != "dense"
        self._set_products(self._choices(products, images))
        self._spikes_dtype()  # warns here rather than in the first batch

    def _choices(self, products: str | Mapping[str, str], images: Tensor | None) -> dict[str, str]:
        if isinstance(products, Mapping):
            return check_choices(self, products)
        if products != "auto" or not self.events or self.stem.projection.weight.device.type != "cpu":
            return dict.fromkeys(projections(self), "events" if self.events else "dense")
        if images is None:
            return choose(self, self.precision)
        self._set_products(dict.fromkeys(projections(self), "events"))
        return choose(self, self.precision, densities(self, images))

    def _set_products(self, choices: Mapping[str, str]) -> None:
        for name, layer in projections(self).items():
            layer.events = choices[name] == "events"
        self.events = self.events and "events" in choices.values()

    @property
    def products(self) -> dict[str, str]:
        """What each convolution does, "events" or "dense", by name; `deploy` takes it, too."""
        return {name: "events" if layer.events else "dense" for name, layer in projections(self).items()}

    def _spikes_dtype(self) -> torch.dtype:
        return spikes_dtype(self.precision, self.stem.projection.weight, self.events, self.numbers)

    # Of the original, unbound: they need nothing but what is here.
    set_time_steps = SpikingTransformer.set_time_steps
    get_classifier = SpikingTransformer.get_classifier

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
        """Stay in eval mode; RuntimeError for train mode, which a deployed model has not."""
        if mode:
            raise RuntimeError("a deployed model is for inference alone: train the model that it was made from")
        return super().train(False)

    def __prepare_scriptable__(self) -> NoReturn:
        refuse("torch.jit.script")  # which asks for this

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] or event clips [B, T, C, H, W] to logits [B, num_classes]."""
        if torch.compiler.is_exporting():
            check_can_run(x)
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
    def step(
        self, frame: Tensor | None, state: StreamState | None = None, donate: bool = False
    ) -> tuple[Tensor, StreamState]:
        """One time step, see `SpikingTransformer.step`; its state belongs to this precision."""
        if frame is not None:
            check_can_run(frame)
        spikes = self._spikes_dtype()

        def to_currents(frame: Tensor) -> Tensor:
            return self.stem.currents(self._stem_input(as_sequence(frame, self.in_chans, self.min_size)))[0]

        def to_maps(currents: Tensor) -> Tensor:
            x = self.stem.fire(currents.unsqueeze(0), spikes)
            for stage in self.stages:
                x = stage(x, spikes)
            return self._sequence(x)

        return run_step(self, (to_currents, to_maps), frame, state, donate)

    @torch.compiler.disable
    @torch.no_grad()
    def _maps(self, x: Tensor, take: list[int], stages: int) -> list[Tensor]:
        """The mean over T of each stage in `take`, then the features after `stages` stages: maps [B, C, H, W]."""
        check_can_run(x)
        sequence = as_sequence(x, self.in_chans, self.min_size)
        _, B, _, H, W = sequence.shape
        if B == 0:
            return [self._empty_map(i, H, W) for i in (*take, stages - 1)]
        time_steps = count_time_steps(x, self.time_steps)
        tokens = time_steps * -(-H // self.reduction) * -(-W // self.reduction)
        chunks = 1 if self.batch_coupled else -(-B // max(1, _TOKENS // tokens))
        maps = [self._run(part, time_steps, take, stages) for part in sequence.tensor_split(chunks, dim=1)]
        return [torch.cat(parts) if chunks > 1 else parts[0] for parts in zip(*maps, strict=True)]

    def _run(self, sequence: Tensor, time_steps: int, take: list[int], stages: int) -> list[Tensor]:
        """`_maps` of a few samples [T or 1, B, C, H, W]."""
        spikes = self._spikes_dtype()
        x = self.stem(self._stem_input(sequence), spikes, time_steps)
        maps = []
        for i, stage in enumerate(self.stages[:stages]):
            x = stage(x, spikes, i == 0 and self.stem.fires_periodically(len(sequence)))
            if i in take:
                maps.append(self._sequence(x).mean(0))
        maps.append(self.readout(self._sequence(x)) if stages == len(self.stages) else self._sequence(x).mean(0))
        return maps

    def _stem_input(self, sequence: Tensor) -> Tensor:
        """[T, B, C, H, W] to [T, B, H, W, C], in the stem's arithmetic."""
        if not sequence.is_floating_point():
            raise ValueError(
                f"input is {sequence.dtype}: give floating-point images or event clips, normalised as for training"
            )
        return sequence.permute(0, 1, 3, 4, 2).to(self.stem.projection.weight.dtype).contiguous()

    def _sequence(self, x: Tensor) -> Tensor:
        """Back to [T, B, C, H, W], in full precision."""
        return x.to(self.stem.projection.weight.dtype).permute(0, 1, 4, 2, 3)

    def _empty_map(self, stage: int, height: int, width: int) -> Tensor:
        info = self.feature_info[stage]
        size = (-(-side // info["reduction"]) for side in (height, width))
        return self.stem.projection.weight.new_empty(0, info["num_chs"], *size)


def _numbers(stages: list[Any], membrane_shortcut: bool) -> Range:
    """What convolutions take and shortcuts of spikes carry."""
    numbers = [Range(0, 1)]
    for stage in stages:
        units = [unit for unit in stage.modules() if isinstance(unit, ConvNorm)]
        # What decoders of feedback take first are real numbers, multiplied as such.
        feedback = list(getattr(stage, "feedback", nn.Module()).modules())
        numbers += [unit.input_range for unit in units if not (unit.input_range.is_real and unit in feedback)]
        if not membrane_shortcut:  # else shortcuts carry potentials
            numbers.append(stage.output_range)
    return Range(min(n.low for n in numbers), max(n.high for n in numbers))


def deploy(
    model: nn.Module,
    precision: str = "fp32",
    products: str | Mapping[str, str] = "auto",
    images: Tensor | None = None,
) -> DeployedModel:
    """Make a model for inference: the same answers in a fraction of the time.

    Batch norms are folded into the convolutions, tensors are channels last, and neurons run in kernels together with
    what lies next to them. The model takes what the original takes, has its `forward_features`, `forward_head` and
    `forward_intermediates`, and shares nothing with it.

    Args:
        model: Any model of this package, with any registered operators and neurons. In train mode or not: it is
            deployed as it would be in eval mode.
        precision: Arithmetic of all convolutions but the first, and of nothing else.
            "fp32": float32, or float64 for a model in float64. Equal to the original but for the order of sums.
            "bf16": weights rounded to bfloat16; spikes are exact.
            "int8": weights rounded to 8 bits, symmetric, one scale per output channel; spikes and their sums are exact,
            and so are the sums of products.
        products: What those convolutions do, on a CPU.
            "events": add a spike's weights to the outputs that see it. Silence costs nothing: the sparser the spikes,
            the faster. Currents are float32.
            "dense": multiply matrices of spikes, most of them zeros, and weights.
            "auto": for each convolution what this machine does faster, for the precision, the kernel, and the share of
            inputs that is not zero. Large models have that measured, once for a machine, in a second or two
            (`execution.calibration`).
            A mapping: what `products` of another deployed model says, on this machine or another. On other devices and
            in float64 products are dense.
        images: A batch [B, C, H, W] or event clips [B, T, C, H, W], prepared as for the model, that "auto" finds those
            shares by. Otherwise they are typical ones.

    Returns:
        The model, in eval mode, on the original's device.

    Raises:
        TypeError: For another kind of model, or a layer in it of which no deployed form is known, with its name.
        ValueError: For an unknown precision, weights that are not finite, or a network so deep that its sums of spikes
            do not fit 8-bit arithmetic.

    Warns:
        RuntimeWarning: Once, where the device has no arithmetic for the precision and another one stands in.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is unknown, choose one of {list(PRECISIONS)}")
    if not isinstance(products, Mapping) and products not in PRODUCTS:
        raise ValueError(f"products={products!r} is unknown, choose one of {list(PRODUCTS)}")
    if images is not None and products != "auto":
        raise ValueError(f'images are what products="auto" chooses by, and products={products!r}: give one of them')
    if not isinstance(model, SpikingTransformer):
        raise TypeError(
            f"model is a {type(model).__name__}, expected a QKFormer or MaxFormer, without a wrapper around it (take "
            "`.module` of a DistributedDataParallel, `._orig_mod` of what torch.compile returns)"
        )
    # Not as inference tensors: load_state_dict could not write to them later.
    with torch.inference_mode(False), torch.no_grad():
        return DeployedModel(model, precision, products, images)
