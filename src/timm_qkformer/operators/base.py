"""What a token mixer declares, and what follows from it.

An operator is one class in one file. It says which projections of the block's input it takes, how it combines their
spikes (`attend`), what comes out (`attended_range`), and what that costs (`operations`). Everything else derives:

    the plain layer       projections, `attend`, output projection; TorchScript, FX, export, torch.func
    packed training       the inputs are kept packed, `attend` runs again in the backward pass
    deployment            one fused projection, then the operator's `kernel` if it has one, else `attend`
    state                 `attend` with fewer steps: its neurons continue (`neurons.run_with_state`)
    analysis              firing rates and names, operations and energy, complexity, `views` for pictures

docs/architecture.md has a worked example.
"""

import linecache
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Optional, TypeVar

import torch
import torch.fx
from timm.layers import register_notrace_function
from torch import Tensor, nn

from ..errors import check_name
from ..execution.packing import BINARY, Range, SharedInput
from ..execution.recompute import call_packed
from ..layers import packed
from ..layers.conv import SpikingConv, output_range, unflatten
from ..layers.drop import TimeDropout
from ..neurons import LIF, NeuronLayer, SpikingNeuron
from ..neurons.spec import membrane_dtype
from ..neurons.state import carried_state

torch.fx.wrap("membrane_dtype")

CHANNELS, TOKENS = 3, 4  # dimensions of [T, B, heads, channels of a head, tokens]


class Operation(NamedTuple):
    """One kind of addition or multiplication that an operator does, for what it was given.

    Attributes:
        name: What to call it in tables.
        spikes: What sets it off, [T, B, ...]: each non-zero element costs `fan_out` additions.
        fan_out: Operations that one element takes part in, at one time step.
        additions: Those that really take place, in all of [T, B]; None: the sum of |spikes| times `fan_out`.
    """

    name: str
    spikes: Tensor
    fan_out: int
    additions: float | None = None


class Views(NamedTuple):
    """What pictures draw of an operator, by kind of view, as it counts or keeps each token and each channel.

    Attributes:
        tokens: [T, B, heads, tokens].
        channels: [T, B, heads, channels of a head].
    """

    tokens: Tensor
    channels: Tensor


class NativeKernel(NamedTuple):
    """An operator's kernel in C++ for deployment, from fused currents to what `attend` gives.

    Attributes:
        package, file: Where its source is; it defines the macro KERNEL(SUFFIX, X, S), which exports
            `NAME_SUFFIX(const X* currents, S* out, Int T, Int B, Int N, Int C, Int heads, double scale,
            const Neuron* neurons, const V* const* before, V* const* after, int threads)` for neurons of all inputs,
            then the inner ones, and their potentials, of type V = Membrane<X>::type (common.cpp, `Potentials`).
        name: NAME.
        inner: What the inner neurons see in each head: 1 or, for all of them, None channels; likewise tokens.
            Potentials are [B, N, C] of inputs and [B, heads, channels, tokens] of inner neurons.
        scale: Passed on to it.
    """

    package: str
    file: str
    name: str
    inner: Sequence[tuple[int | None, int | None]]
    scale: float = 1.0


@register_notrace_function
def sum_channels(spikes: Tensor) -> Tensor:
    """Spikes of each token: [T, B, heads, channels, tokens] to [T, B, heads, 1, tokens], in float32 at least."""
    return spikes.sum(3, keepdim=True, dtype=membrane_dtype(spikes))


@register_notrace_function
def sum_tokens(spikes: Tensor) -> Tensor:
    """Spikes of each channel: [T, B, heads, channels, tokens] to [T, B, heads, channels, 1], in float32 at least."""
    return spikes.sum(4, keepdim=True, dtype=membrane_dtype(spikes))


class Operator(nn.Module):
    """Base of all token mixers: spikes or spike sums [T, B, C, H, W] to spikes of the same shape, for any H and W.

    With `membrane_shortcut` the last neuron is left out and the result is its input currents BN(proj X'), which a
    membrane shortcut adds up (QKFormer, arXiv 2403.16552, eq. 17).

    A subclass declares, as class attributes and methods:

    inputs: Names of its projections, LIF(BN(W x)), in the order of `attend`'s arguments. An operator without any takes
        x itself through `output`.
    input_shape(name): Heads of one of them and channels of each head; by default `num_heads` that make up `dim`.
    input_neuron(name, layer): Its neurons; by default those of the model.
    fed: Inputs, the last ones, that also take the feedback of a `layers.FeedbackStage`, LIF(BN(W (x + f))).
    inner_neurons: Its other neurons and their arguments.
    repeatable: Types of its other inner modules that draw no random numbers and leave nothing behind, so that packed
        training may run them twice.
    output: Name of the unit that ends it.
    attend(*inputs): From spikes [T, B, heads, channels of a head, tokens] of each input to what the output projection
        takes, in all `dim` channels. Without random numbers.
    needs_map: Whether `attend` and `operations` want to know where tokens are: both then take H and W, too, after the
        inputs, and token number y * W + x is the one at (y, x).
    attended_range(*ranges): What `attend` puts out, from what its inputs hold.
    operations(*inputs): What it costs, from what `attend` is given.
    views(inputs, inner, attended): What pictures draw; tensors by the names of inputs and inner neurons.
    kernel: Its kernel in C++, if there is one; `native_kernel` says so of this instance. Checked against `attend` by
        the contract suite.
    tokens_are_independent: Whether `attend` treats each token on its own, so that deployment may run them in chunks.
    neuron_names, attended_name: What papers call its inner neurons and the result of `attend`.
    main_view, view_labels: The kind of view that says most, and what the numbers of each are, in words.
    couples_batch: Whether the QKFormer release couples samples in its last neuron, see `SpikingConv`.
    built_last: Inputs that are built behind all else, where earlier versions had them: optimizers know parameters by
        position, and a seed gives the weights that it gave.

    Args:
        dim: Channels of the stage.
        num_heads: Heads, a divisor of `dim`.
        proj_drop: Dropout at the end, one mask for all time steps.
        qkv_bias: Give the inputs' projections a bias, which their batch norms make superfluous.
        proj_bias: Give the output's projection one.
        inner_args: Arguments of inner neurons, by their names, in place of those that the operator declares.
        neuron_layer: Factory of the neurons.
        membrane_shortcut: Return input currents instead of spikes.
        batch_coupled: Reproduce the release's coupling, where there is one.
        input_range: What x may hold.

    Raises:
        ValueError: For heads that do not divide `dim`, `inner_args` of no inner neuron, or `batch_coupled` together
            with `membrane_shortcut`.
    """

    operator_name: str = ""
    inputs: ClassVar[tuple[str, ...]] = ()
    fed: ClassVar[tuple[str, ...]] = ()
    inner_neurons: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    repeatable: ClassVar[tuple[type[nn.Module], ...]] = ()
    output: ClassVar[str] = "proj"
    needs_map: ClassVar[bool] = False
    kernel: ClassVar[NativeKernel | None] = None
    tokens_are_independent: ClassVar[bool] = False
    neuron_names: ClassVar[Mapping[str, str]] = {}
    attended_name: ClassVar[str] = "X'"
    main_view: ClassVar[str] = "tokens"
    view_labels: ClassVar[Mapping[str, str]] = {
        "tokens": "spikes in $X'$: mean of the head's channels",
        "channels": "spikes in $X'$: mean of the tokens",
    }
    couples_batch: ClassVar[bool] = False
    built_last: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        proj_drop: float = 0.0,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        inner_args: Mapping[str, Mapping[str, Any]] | None = None,
        neuron_layer: NeuronLayer = LIF,
        membrane_shortcut: bool = False,
        batch_coupled: bool = False,
        input_range: Range = BINARY,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads != 0:
            raise ValueError(f"num_heads={num_heads} must divide the width of the stage, dim={dim}")
        if batch_coupled and self.couples_batch and membrane_shortcut:
            raise ValueError(
                "batch_coupled=True couples the attention's last neuron, which membrane_shortcut=True leaves out: "
                "use one of them"
            )
        if inner_args and (unknown := [name for name in inner_args if name not in self.inner_neurons]):
            raise ValueError(f"inner_args={inner_args!r}: {unknown[0]!r} is none of {list(self.inner_neurons)}")
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.input_range = input_range
        layers = {name: self.input_neuron(name, neuron_layer) for name in self.inputs}
        ranges = {name: input_range.plus(BINARY) if name in self.fed else input_range for name in self.inputs}

        def build(names: Iterable[str]) -> None:
            for name in names:
                heads, head_dim = self.input_shape(name)
                args: dict[str, Any] = {"bias": qkv_bias, "input_range": ranges[name], "neuron_layer": layers[name]}
                setattr(self, f"{name}_heads", heads)
                setattr(self, name, SpikingConv(dim, heads * head_dim, **args, **dd))

        build(name for name in self.inputs if name not in self.built_last)
        for name, args in self.inner_neurons.items():
            setattr(self, name, neuron_layer(**{**args, **(inner_args or {}).get(name, {})}, **dd))
        last_layer = nn.Identity if membrane_shortcut else neuron_layer
        coupled = batch_coupled and self.couples_batch
        held = self.attended_range(*(output_range(layer(**dd)) for layer in layers.values())) if layers else input_range
        args = {"bias": proj_bias, "input_range": held, "neuron_layer": last_layer, "batch_coupled": coupled}
        setattr(self, self.output, self.output_unit(dim, **args, **dd))
        build(self.built_last)
        self.proj_drop = TimeDropout(proj_drop)
        self.output_range = output_range(getattr(self, self.output)).dropped(proj_drop > 0)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "forward" not in cls.__dict__:
            cls.forward = _forward(cls)

    def input_shape(self, name: str) -> tuple[int, int]:
        """See the class's docstring."""
        return self.num_heads, self.head_dim

    def input_neuron(self, name: str, layer: NeuronLayer) -> NeuronLayer:
        """See the class's docstring."""
        return layer

    def output_unit(self, dim: int, **args: Any) -> SpikingConv:
        """The unit that ends the operator: by default LIF(BN(W X')), 1x1."""
        return SpikingConv(dim, dim, **args)

    def native_kernel(self) -> NativeKernel | None:
        """See the class's docstring."""
        return self.kernel

    def split(self, x: Tensor, heads: int) -> Tensor:
        """[T, B, C, H, W] to [T, B, heads, C / heads, H * W]."""
        return unflatten(x.flatten(3), 2, [heads, x.shape[2] // heads])

    def split_input(self, name: str, x: Tensor) -> Tensor:
        """What the neurons of an input fire, [T, B, C, H, W], as `attend` takes it."""
        return self.split(x, self.input_shape(name)[0])

    def map_size(self, H: int, W: int) -> tuple[int, ...]:
        """What `attend` and `operations` take after the inputs of a map of this size."""
        return (H, W) if self.needs_map else ()

    def merge(self, x: Tensor, H: int, W: int) -> Tensor:
        """[T, B, heads, C / heads, H * W] to [T, B, C, H, W]."""
        return unflatten(x.flatten(2, 3), 3, [H, W])

    def attend(self, *inputs: Any, **options: Any) -> Tensor:
        """See the class's docstring."""
        raise NotImplementedError(f"operator {type(self).__name__} declares no attend")

    def attended_range(self, *inputs: Any, **options: Any) -> Range:
        """See the class's docstring."""
        raise NotImplementedError(f"operator {type(self).__name__} declares no attended_range")

    def operations(self, *inputs: Any, **options: Any) -> Sequence[Operation]:
        """See the class's docstring."""
        raise NotImplementedError(f"operator {type(self).__name__} declares no operations: their energy is unknown")

    def release_names(self, unit: str) -> tuple[str, str]:
        """What the authors' releases call the convolution and the batch norm of one of its units, below the block."""
        return f"attn.{unit}_conv", f"attn.{unit}_bn"

    def views(self, inputs: Mapping[str, Tensor], inner: Mapping[str, Tensor], attended: Tensor) -> Views:
        """By default, how much of each token and of each channel is left in X'."""
        return Views(attended.float().mean(CHANNELS), attended.float().mean(TOKENS))

    def inner_modules(self) -> dict[str, nn.Module]:
        """What belongs to `attend`: all but the projections and the dropout."""
        outer = {*self.inputs, self.output, "proj_drop"}
        return {name: module for name, module in self.named_children() if name not in outer}

    def run_packed(self, x: Tensor, feedback: Tensor | None = None) -> Tensor:
        """The forward pass with packed activations: inputs are packed once, and `attend` runs again backwards."""
        if not self.inputs:
            return x
        _, _, _, H, W = x.shape
        shared = SharedInput(x, self.input_range)
        fed = SharedInput(x if feedback is None else x + feedback, self.input_range.plus(BINARY))
        units = [getattr(self, name) for name in self.inputs]
        takes = [fed if name in self.fed else shared for name in self.inputs]
        spikes = [packed.run_unit(unit, taken) for unit, taken in zip(units, takes, strict=True)]

        def attend(*inputs: Tensor) -> Tensor:
            split = map(self.split_input, self.inputs, inputs)
            return self.merge(self.attend(*split, *self.map_size(H, W)), H, W)

        inner = list(self.inner_modules().values())
        kept = [SharedInput(s, output_range(unit)) for s, unit in zip(spikes, units, strict=True)]
        if _may_run_again(inner, self.repeatable) and any(part.packed is not None for part in kept):
            own = [*self.parameters(recurse=False), *(p for module in inner for p in module.parameters())]
            parameters = [p for p in own if p.requires_grad]
            return call_packed(attend, kept, parameters)
        return attend(*spikes)


# Whose forward pass draws no random numbers and leaves nothing behind.
_REPEATABLE = (
    *(nn.Identity, nn.Sequential, nn.ModuleList, nn.ModuleDict),
    *(nn.Conv1d, nn.Conv2d, nn.Linear, nn.LayerNorm, nn.GroupNorm),
    *(nn.AvgPool1d, nn.AvgPool2d, nn.MaxPool1d, nn.MaxPool2d, nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid),
)


def _may_run_again(inner: Sequence[nn.Module], repeatable: tuple[type[nn.Module], ...]) -> bool:
    """Whether running `attend` twice is running it once: no state, no hooks, and modules that are known to allow it.

    Somebody may have put a dropout, a batch norm or a counter in a neuron's place.
    """
    parts = [part for module in inner for part in module.modules()]
    return carried_state() is None and all(
        packed.is_unhooked(part)
        and (
            type(part) in (*_REPEATABLE, *repeatable)
            or (isinstance(part, SpikingNeuron) and type(part).forward is SpikingNeuron.forward)
        )
        for part in parts
    )


def _forward(cls: type[Operator]) -> Callable[..., Tensor]:
    """`forward` of an operator, written out for its inputs: TorchScript compiles no loop over attributes."""
    taken = {name: "fed" if name in cls.fed else "x" for name in cls.inputs}
    if cls.inputs:
        spikes = ", ".join(f"self.split(self.{name}({what}), self.{name}_heads)" for name, what in taken.items())
        size = ", x.shape[3], x.shape[4]"
        attended = f"self.merge(self.attend({spikes}{size if cls.needs_map else ''}){size})"
    else:
        attended = "x"
    more, given, feed = "", "", ""
    if cls.fed:
        more, given = ", feedback: Optional[Tensor] = None", ", feedback"
        feed = "    fed = x if feedback is None else x + feedback\n"
    source = f"""def forward(self, x: Tensor{more}) -> Tensor:
    if not torch.jit.is_scripting():
        if packed.is_active(self, x):
            return self.proj_drop(self.{cls.output}(self.run_packed(x{given})))
{feed}    return self.proj_drop(self.{cls.output}({attended}))
"""
    file = f"<forward of {cls.__module__}.{cls.__qualname__}>"
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)  # where inspect finds it
    scope: dict[str, Any] = {
        "torch": torch,
        "Optional": Optional,
        "Tensor": Tensor,
        "packed": packed,
        "__name__": cls.__module__,
    }
    exec(compile(source, file, "exec"), scope)
    forward: Callable[..., Tensor] = scope["forward"]
    forward.__doc__ = "Spikes or spike sums [T, B, C, H, W] to spikes of the same shape, or input currents."
    forward.__qualname__ = f"{cls.__qualname__}.forward"
    forward.is_derived = True  # type: ignore[attr-defined]
    return forward


class _Registered(NamedTuple):
    cls: type[Operator]
    options: Mapping[str, Any]


_OPERATORS: dict[str, _Registered] = {}

OperatorT = TypeVar("OperatorT", bound=type[Operator])


def register_operator(name: str, **options: Any) -> Callable[[OperatorT], OperatorT]:
    """Class decorator: make an operator known by a name, for `create_model(..., attn=name)`, recipes and commands.

    Args:
        name: Its name.
        **options: Arguments of the class that go with this name.

    Raises:
        TypeError: For a class that is no `Operator`, or leaves out what it must declare, with its name.
        ValueError: For a name that another class has.
    """

    check_name("operator", name)

    def register(cls: OperatorT) -> OperatorT:
        if not (isinstance(cls, type) and issubclass(cls, Operator)):
            raise TypeError(f"operator {name!r}: {cls!r} must derive from timm_qkformer.operators.Operator")
        needed = ["operations", *(["attend", "attended_range"] if cls.inputs else [])]
        missing = [part for part in needed if getattr(cls, part, None) is getattr(Operator, part, None)]
        if missing:
            raise TypeError(f"operator {name!r}: {cls.__name__} must declare {' and '.join(missing)}")
        if name != name.lower():
            raise ValueError(f"operator {name!r}: registered names are lower case")
        known = _OPERATORS.get(name)
        if known is not None and (known.cls.__module__, known.cls.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"operator {name!r} is registered already, as {known.cls}")
        _OPERATORS[name] = _Registered(cls, options)
        return cls

    return register


def operator_names() -> list[str]:
    """Names of the registered operators."""
    return sorted(_OPERATORS)


def feedback_operators() -> list[str]:
    """Names of those that take the feedback of a `layers.FeedbackStage`."""
    return sorted(name for name, known in _OPERATORS.items() if known.cls.fed)


def get_operator(name: str) -> Callable[..., Operator]:
    """Factory of a registered operator, called as the class `Operator` is; capitals, as papers write them, will do.

    Raises:
        ValueError: For an unknown name.
    """
    known = name.lower() if isinstance(name, str) else ""
    if known not in _OPERATORS:
        raise ValueError(f"operator {name!r} is unknown, choose from {operator_names()}")

    def build(*args: Any, **kwargs: Any) -> Operator:
        cls, options = _OPERATORS[known]
        operator = cls(*args, **{**options, **kwargs})
        operator.operator_name = known
        return operator

    return build
