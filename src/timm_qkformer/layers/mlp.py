"""Spiking MLP: QKFormer (arXiv 2403.16552), eq. 4 to 6, and eq. 17 with membrane shortcuts; and how others join it."""

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from ..errors import check_choice, check_name
from ..execution.packing import BINARY, Range
from ..neurons import LIF, NeuronLayer
from .conv import SpikingConv
from .drop import TimeDropout

_MLPS: dict[str, type["SpikingMlp"]] = {}

MlpT = TypeVar("MlpT", bound=type["SpikingMlp"])


def register_mlp(name: str) -> Callable[[MlpT], MlpT]:
    """Class decorator: make a kind of MLP known by a name, for `BlockSpec.mlp`.

    Raises:
        TypeError: For a class that is no `SpikingMlp`.
        ValueError: For a name that another class has.
    """

    check_name("mlp", name)

    def register(cls: MlpT) -> MlpT:
        if not issubclass(cls, SpikingMlp):
            raise TypeError(f"MLP {name!r}: {cls.__name__} must derive from timm_qkformer.layers.SpikingMlp")
        known = _MLPS.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"MLP {name!r} is registered already, as {known}")
        _MLPS[name] = cls
        return cls

    return register


def mlp_names() -> list[str]:
    """Names of the registered kinds of MLP."""
    return sorted(_MLPS)


def get_mlp(name: str) -> type["SpikingMlp"]:
    """A registered kind of MLP.

    Raises:
        ValueError: For an unknown name.
    """
    check_choice("mlp", name, _MLPS)
    return _MLPS[name]


class SpikingMlp(nn.Module):
    """LIF BN fc2 mix(LIF BN fc1), both 1x1 convolutions with bias: [T, B, C, H, W] to spikes of the same shape.

    Plainly, `mix` is nothing. A subclass that puts something there builds it in `build_mixer`, which says what fc2
    takes, and applies it in `mix`; packed training, deployment (where `mix` runs as it is), state and analysis follow.

    Args:
        dim: Channels of input and output.
        hidden_dim: Channels in between.
        drop: Dropout after the second layer, one mask for all time steps.
        neuron_layer: Factory of the neurons.
        membrane_shortcut: Leave out the last neuron and return its input currents, which a membrane shortcut adds up.
        input_range: What the input may hold.
    """

    mixes: ClassVar[bool] = False  # whether `mix` does anything
    parts: ClassVar[int] = 1  # equal parts that `mix` splits the hidden layer into

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        drop: float = 0.0,
        neuron_layer: NeuronLayer = LIF,
        membrane_shortcut: bool = False,
        input_range: Range = BINARY,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        last_layer = nn.Identity if membrane_shortcut else neuron_layer
        self.fc1 = SpikingConv(dim, hidden_dim, bias=True, input_range=input_range, neuron_layer=neuron_layer, **dd)
        mixed_dim, spikes = self.build_mixer(hidden_dim, self.fc1.output_range, neuron_layer, **dd)
        self.fc2 = SpikingConv(mixed_dim, dim, bias=True, input_range=spikes, neuron_layer=last_layer, **dd)
        self.drop = TimeDropout(drop)
        self.output_range = self.fc2.output_range.dropped(drop > 0)

    def build_mixer(self, hidden_dim: int, hidden: Range, neuron_layer: NeuronLayer, **dd: Any) -> tuple[int, Range]:
        """Build what `mix` needs; how many channels it puts out for `hidden_dim`, and what they may hold."""
        return hidden_dim, hidden

    def mix(self, x: Tensor) -> Tensor:
        """What the hidden layer fires, [T, B, hidden_dim, H, W], to what fc2 takes."""
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.mix(self.fc1(x))))


register_mlp("mlp")(SpikingMlp)
