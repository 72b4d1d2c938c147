"""What is exported: a model as a function of plain tensors, and what its inputs and outputs are called and sized.

    clip    images [B, C, H, W] or event clips [B, T, C, H, W] to logits; T is fixed
    step    a frame [B, C, H, W] and the state to logits and the next state

A state at rest is zeros. How large each of its tensors is depends on the batch and the frame; `dims` says how, in
names: "height_8" is ceil(height / 8), "tokens_8" is height_8 * width_8.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..layers import as_sequence
from ..models import SpikingTransformer, StreamState
from ..neurons import run_with_state
from ..operators.tim import TemporalInteraction

Dims = tuple[str | int, ...]


class Port(NamedTuple):
    """An input or output of a graph: its name, its dimensions (a number, or a name of one that varies), its dtype."""

    name: str
    dims: Dims
    dtype: str = "float32"


class Graph(NamedTuple):
    """A module of plain tensors, ready to be recorded."""

    module: nn.Module
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    example: tuple[Tensor, ...]

    @property
    def state(self) -> tuple[Port, ...]:
        """The inputs that are state."""
        return self.inputs[1:]


class StepGraph(nn.Module):
    """`model.step` with the state as plain tensors: potentials, sums of the readout, steps."""

    def __init__(self, model: SpikingTransformer, potentials: int) -> None:
        super().__init__()
        self.model = model
        self.potentials = potentials

    def forward(self, frame: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        stem, readout = self.model.stem, self.model.readout
        currents = stem.currents(as_sequence(frame, stem.in_chs, stem.min_size))
        *sums, steps = state[self.potentials :]
        steps = steps + 1
        rest = _AfterStem(self.model)
        added, potentials = run_with_state(rest, currents, sums, state=state[: self.potentials])
        logits = self.model.forward_head(readout.finish(added, steps).to(added[0].dtype))  # type: ignore[operator]
        return (logits, *potentials, *added, steps)


class _AfterStem(nn.Module):
    """From the first neurons' currents [1, B, C, H, W] to the readout's sums, as a module for `run_with_state`."""

    def __init__(self, model: SpikingTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, currents: Tensor, sums: list[Tensor]) -> list[Tensor]:
        model = self.model
        added: list[Tensor] = model.readout.add(model.stages(model.stem.fire(currents)), sums)  # type: ignore[operator]
        return added


def clip_graph(model: SpikingTransformer, size: tuple[int, int]) -> Graph:
    """The whole model: images, or clips of `model.time_steps` steps for models of two channels, to logits."""
    H, W = size
    shape = (2, *([model.time_steps] if takes_clips(model) else []), model.in_chans, H, W)
    free: tuple[str | int, ...] = (H, W) if has_fixed_size(model) else ("height", "width")
    dims: Dims = ("batch", *shape[1:-2], *free)
    ports = (Port("clip" if takes_clips(model) else "image", dims),)
    return Graph(model, ports, (_logits(model),), (torch.randn(shape),))


def step_graph(model: SpikingTransformer, size: tuple[int, int]) -> Graph:
    """One step: a frame and the state to logits and the next state.

    Raises:
        ValueError: For a model whose first step is unlike the others, so that no state is the one at rest.
    """
    frame = torch.randn(2, model.in_chans, *size)
    logits, state = model.step(frame)
    leaves = _leaves(state)
    graph = StepGraph(model, len(state.potentials)).eval()  # exporters set the model to the mode that they find
    zeros = tuple(torch.zeros_like(leaf) for leaf in leaves)
    found = graph(frame, *zeros)[0]
    if has_fixed_size(model) or not torch.allclose(found, logits, rtol=1e-5, atol=1e-5):
        raise ValueError("this model's first step is unlike the others (temporal interaction): export it as a clip")
    names = [f"potential_{i}" for i in range(len(state.potentials))] + [f"sum_{i}" for i in range(len(state.sums))]
    dtypes = [str(leaf.dtype).removeprefix("torch.") for leaf in leaves]
    ports = tuple(map(Port, [*names, "steps"], _state_dims(model), dtypes))
    inputs = (Port("frame", ("batch", model.in_chans, "height", "width")), *ports)
    outputs = (_logits(model), *(port._replace(name=f"next_{port.name}") for port in ports))
    return Graph(graph, inputs, outputs, (frame, *zeros))


def takes_clips(model: SpikingTransformer) -> bool:
    """Whether it is a model for event cameras, which have two channels."""
    return model.in_chans == 2


def has_fixed_size(model: nn.Module) -> bool:
    """Whether weights belong to the tokens of one size, so that a graph is of this size."""
    return any(isinstance(part, TemporalInteraction) for part in model.modules())


def initial_state(metadata: Mapping[str, Any], batch: int, height: int, width: int) -> dict[str, NDArray[Any]]:
    """The state at rest of an exported step, by the names of its inputs.

    Args:
        metadata: What `read_metadata` gives.
        batch, height, width: Of the frames to come.

    Raises:
        ValueError: For metadata of a graph that is no step.
    """
    if not metadata.get("state"):
        raise ValueError("the graph has no state: it is no step, give it a whole input")
    return {
        port["name"]: np.zeros([_size(dim, batch, height, width) for dim in port["dims"]], port["dtype"])
        for port in metadata["state"]
    }


def _size(dim: str | int, batch: int, height: int, width: int) -> int:
    if isinstance(dim, int):
        return dim
    kind, _, reduction = dim.partition("_")
    factor = int(reduction or 1)
    rows, columns = -(-height // factor), -(-width // factor)
    return {"batch": batch, "height": rows, "width": columns, "tokens": rows * columns}[kind]


def _logits(model: SpikingTransformer) -> Port:
    return Port("logits", ("batch", model.num_classes))


def _leaves(state: StreamState) -> list[Tensor]:
    return [*state.potentials, *state.sums, state.steps]


def _state_dims(model: SpikingTransformer) -> list[Dims]:
    """How large each tensor of a state is, from states of two batches and sizes."""
    least = model.stem.min_size
    probes = ((2, 4 * least, 6 * least), (3, 5 * least, 8 * least))
    found = []
    for batch, height, width in probes:
        state = model.step(torch.zeros(batch, model.in_chans, height, width))[1]
        found.append([tuple(leaf.shape) for leaf in _leaves(state)])
    factors = [2**i for i in range(least.bit_length())]
    names = ["batch", *(f"{kind}_{factor}" for factor in factors for kind in ("height", "width", "tokens"))]

    def name(sizes: tuple[int, int]) -> str | int:
        if sizes[0] == sizes[1]:
            return sizes[0]
        for dim in names:
            if tuple(_size(dim, *probe) for probe in probes) == sizes:
                return dim
        raise ValueError(f"a state has sizes {sizes} for inputs {probes}, which follow no rule that is known")

    shapes: Sequence[Any] = list(zip(*found, strict=True))
    return [tuple(name(sizes) for sizes in zip(*pair, strict=True)) for pair in shapes]
