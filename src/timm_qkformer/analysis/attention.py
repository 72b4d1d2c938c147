"""What the attention of a model does with a batch: its inputs, its inner neurons' spikes, and what is left of them.

The names are those that operators declare, for QKFormer's (arXiv 2403.16552) those of eq. 7 to 10 and Fig. 3. The
arrays are plain numpy arrays, to be drawn by `drawing` or processed by anything else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from numpy.typing import NDArray
from torch import Tensor, nn

from ..execution import BINARY, Range
from ..layers import output_range
from ..operators import Operator
from .hooks import bare_model, capture
from .names import has_mask, inner_names, operator_layers, place_of
from .notebook import html_table

Array = NDArray[Any]


class AttentionViews(NamedTuple):
    """How much things count, by time step and head, as the operator declares it."""

    tokens: Array  # float32 [T, B, heads, H, W]
    channels: Array  # float32 [T, B, heads, channels of a head]


@dataclass(frozen=True, repr=False)
class AttentionRecord:
    """One attention layer's spikes for one batch."""

    name: str  # module name of the layer, such as "stages.0.blocks.0.attn"
    operator: str  # registered name of what it does, such as "ssa"
    # its inputs by name, such as "q": [T, B, heads, channels of a head, H, W], bool if they are spikes
    inputs: dict[str, Array]
    # spikes of its inner neurons, by their names in the paper, such as "A_t": likewise, with 1 in place of what was
    # summed over
    inner: dict[str, Array]
    result: Array  # what its projection takes, X' in the paper: shaped as the inputs
    result_name: str  # its name in the paper
    views: AttentionViews  # how much each token and each channel counts
    labels: Mapping[str, str]  # what the numbers of each view are, in words
    main_view: str  # the view that says most

    def __repr__(self) -> str:
        arrays = ", ".join([*self.inputs, *self.inner])
        return f"AttentionRecord({self.name}: {self.operator} with {arrays}, {list(self.result.shape)})"

    def _repr_html_(self) -> str:
        arrays = {**self.inputs, **self.inner, self.result_name: self.result}
        rows = [(name, list(array.shape), f"{float(array.mean()):.4f}") for name, array in arrays.items()]
        return html_table(repr(self), ("array", "shape", "mean"), rows)

    @property
    def time_steps(self) -> int:
        """Time steps T."""
        return self.result.shape[0]

    @property
    def heads(self) -> int:
        """Number of heads."""
        return self.result.shape[2]

    @property
    def mask(self) -> tuple[str, Array] | None:
        """Name and spikes of the inner neurons that keep or drop tokens or channels; None if there are none."""
        for name, spikes in self.inner.items():
            sizes = zip(spikes.shape, self.result.shape, strict=True)
            if name != self.result_name and all(own in (1, full) for own, full in sizes):
                return name, spikes
        return None


def attention_layers(model: nn.Module) -> dict[str, str]:
    """What a model's attention layers are, such as "ssa", by module name, in the model's order."""
    return {name: layer.operator_name for name, layer in operator_layers(bare_model(model)).items()}


def select_layers(model: nn.Module, stage: int | None = None, block: int | None = None) -> dict[str, Operator]:
    """Attention layers by name, of one stage or block (counted from 1).

    Without either, those with a mask or, in a model without any, every attention layer. ValueError if there are none.
    """
    layers = _layers(bare_model(model))
    if stage is None and block is None:
        return {name: layer for name, layer in layers.items() if has_mask(layer)} or layers
    places = {name: place_of(name)[1:] for name in layers}
    chosen = {
        name: layers[name] for name, place in places.items() if stage in (None, place[0]) and block in (None, place[1])
    }
    if not chosen:
        given = (f"{key}={value}" for key, value in (("stage", stage), ("block", block)) if value is not None)
        raise ValueError(
            f"{' and '.join(given)} (counted from 1) has no attention layer; there are {', '.join(layers)}"
        )
    return chosen


def record_attention(model: nn.Module, x: Tensor, layers: Sequence[str] | None = None) -> list[AttentionRecord]:
    """Run a batch and record what its attention layers do.

    The model runs in eval mode and is left as it was, also by an error. A compiled or DDP-wrapped model is looked at
    below the wrapper.

    Args:
        model: Any model with attention layers of this package.
        x: Images [B, C, H, W] or event clips [B, T, C, H, W].
        layers: Names from `attention_layers`; None for all.

    Raises:
        ValueError: If the model has no attention, no layer of such a name, or the input cannot be run.
    """
    plain = bare_model(model)
    known = _layers(plain)
    unknown = [name for name in layers or () if name not in known]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no attention layer; there are {', '.join(known)}")
    names = list(known if layers is None else layers)
    parts = [f"{name}.{part}" for name in names for part in (*known[name].inputs, *known[name].inner_neurons)]
    found = capture(plain, x, parts, [f"{name}.{known[name].output}" for name in names])
    return [_record(name, known[name], found) for name in names]


def _layers(model: nn.Module) -> dict[str, Operator]:
    layers = operator_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no attention to look into")
    return layers


def _record(name: str, layer: Operator, found: Mapping[str, Tensor]) -> AttentionRecord:
    result = found[f"{name}.{layer.output}"]
    H, W = result.shape[3:]
    split = layer.split(result, layer.num_heads)
    inputs = {part: layer.split_input(part, found[f"{name}.{part}"]) for part in layer.inputs}
    inner = {part: found[f"{name}.{part}"] for part in layer.inner_neurons}
    views = layer.views(inputs, inner, split)
    held = {part: output_range(getattr(layer, part)) for part in (*inputs, *inner)}
    return AttentionRecord(
        name,
        layer.operator_name,
        {part: _array(x, held[part], H, W) for part, x in inputs.items()},
        {called: _array(inner[part], held[part], H, W) for part, called in inner_names(layer).items()},
        _array(split, getattr(layer, layer.output).input_range, H, W),
        layer.attended_name,
        AttentionViews(views.tokens.float().unflatten(-1, (H, W)).cpu().numpy(), views.channels.float().cpu().numpy()),
        layer.view_labels,
        layer.main_view,
    )


def _array(x: Tensor, held: Range, H: int, W: int) -> Array:
    """[..., tokens or 1] to [..., H or 1, W or 1]; bool if it holds spikes."""
    x = x.unflatten(-1, (H, W) if x.shape[-1] == H * W else (x.shape[-1], 1))
    array: Array = (x.bool() if held[:2] == BINARY[:2] else x.float()).cpu().numpy()
    return array
