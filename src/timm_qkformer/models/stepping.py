"""One time step after the other, with the state as a value: `model.step(frame, state)` of every model.

    logits, state = model.step(frames[0])
    logits, state = model.step(frames[1], state)        # the logits of both frames

After T steps the logits are those of one call with a clip of these frames, to the last bit where the arithmetic of both
is the same, and so are the gradients: a step is the network on a sequence of one frame, whose neurons continue
(`neurons.run_with_state`) and whose readout adds up.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from ..neurons import membrane_dtype
from ..neurons.state import State, modules_of, run_with_state


@dataclass(frozen=True)
class StreamState:
    """What a model knows after some steps of a batch: a value that is never changed, and a pytree of tensors.

    Dimension 0 of every tensor is that of samples. Two samples of one batch may have seen different numbers of steps.

    Attributes:
        potentials: Membrane potentials in the order in which neurons fire.
        sums: What the readout has added up.
        currents: Input currents of the first neurons at the last step [B, C, H, W], for a frame that is shown again.
        steps: Steps that each sample has seen [B], int64.
        model: Of which model, input size and arithmetic this is the state.
    """

    potentials: State
    sums: State
    currents: Tensor
    steps: Tensor
    model: str

    @property
    def batch_size(self) -> int:
        """Samples."""
        return len(self.steps)

    def map(self, function: Callable[[Tensor], Tensor]) -> "StreamState":
        """This state with `function` of each of its tensors."""
        return replace(
            self,
            potentials=tuple(map(function, self.potentials)),
            sums=tuple(map(function, self.sums)),
            currents=function(self.currents),
            steps=function(self.steps),
        )

    def to(self, device: Any) -> "StreamState":
        """On another device."""
        return self.map(lambda tensor: tensor.to(device))

    def detach(self) -> "StreamState":
        """Cut off from the steps before: gradients end here (truncated backpropagation through time)."""
        return self.map(Tensor.detach)

    def select(self, samples: Any, donate: bool = False) -> "StreamState":
        """Of some samples: a mask [B], indices, or a slice.

        Args:
            samples: Which, and in which order.
            donate: This state is not used again, and the new one may take its memory.

        Raises:
            IndexError: For samples that there are not.
        """
        if isinstance(samples, int):
            raise TypeError(f"samples={samples} must be a mask, indices or a slice: [{samples}] is this sample alone")
        if isinstance(samples, slice):
            return self.map(lambda tensor: tensor[samples])
        indices = torch.arange(len(self.steps), device=self.steps.device)[_as_index(samples, self.steps.device)]
        if donate and bool((indices[1:] > indices[:-1]).all()):
            moves = [(to, place) for to, place in enumerate(indices.tolist()) if to != place]
            return self.map(lambda tensor: _move_up(tensor, moves, indices))
        return self.map(lambda tensor: tensor.index_select(0, indices))

    @staticmethod
    def cat(states: Sequence["StreamState"]) -> "StreamState":
        """One batch of several, which may have seen different numbers of steps.

        Raises:
            ValueError: For no state, or states of different models.
        """
        states = list(states)
        if not states:
            raise ValueError("states is empty: give at least one")
        for state in states[1:]:
            _require_same(states[0].model, state.model)
        leaves = zip(*(_leaves(state) for state in states), strict=True)
        return _from_leaves([torch.cat(tensors) for tensors in leaves], _context(states[0]))

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors by name, and `model`: for `torch.save`, or safetensors with `model` as metadata."""
        named = {f"potentials.{i}": tensor for i, tensor in enumerate(self.potentials)}
        named |= {f"sums.{i}": tensor for i, tensor in enumerate(self.sums)}
        return {**named, "currents": self.currents, "steps": self.steps, "model": self.model}

    @staticmethod
    def from_state_dict(state: Mapping[str, Any]) -> "StreamState":
        """The state that `state_dict` was made of.

        Raises:
            ValueError: If something is missing or is no tensor.
        """
        parts: dict[str, list[Tensor]] = {"potentials": [], "sums": []}
        for name, found in parts.items():
            while f"{name}.{len(found)}" in state:
                found.append(state[f"{name}.{len(found)}"])
        count = sum(map(len, parts.values())) + 3
        missing = [name for name in ("currents", "steps", "model") if name not in state]
        if missing or len(state) != count or not parts["sums"]:
            raise ValueError(f"this is no state of a model: it needs {missing or 'potentials, sums, currents, steps'}")
        tensors = [*parts["potentials"], *parts["sums"], state["currents"], state["steps"]]
        if not all(isinstance(tensor, Tensor) for tensor in tensors) or not isinstance(state["model"], str):
            raise ValueError("this is no state of a model: its entries must be tensors, `model` a string")
        return _from_leaves(tensors, (len(parts["potentials"]), state["model"]))


def _move_up(tensor: Tensor, moves: Sequence[tuple[int, int]], indices: Tensor) -> Tensor:
    """Rows `indices`, which rise, moved to the front of the same memory where that is simple."""
    if tensor.requires_grad or not tensor.is_cpu or not tensor.is_contiguous():
        return tensor.index_select(0, indices)
    rows = tensor.unbind(0)
    for to, place in moves:
        rows[to].copy_(rows[place])
    return tensor[: len(indices)]


def _as_index(samples: Any, device: torch.device) -> Any:
    if not isinstance(samples, Sequence):
        return samples
    tensor = torch.as_tensor(samples, device=device)
    return tensor.long() if tensor.numel() == 0 else tensor


def _leaves(state: StreamState) -> list[Tensor]:
    return [*state.potentials, *state.sums, state.currents, state.steps]


def _context(state: StreamState) -> tuple[int, str]:
    return len(state.potentials), state.model


def _from_leaves(leaves: Any, context: tuple[int, str]) -> StreamState:
    count, model = context
    *tensors, currents, steps = leaves
    return StreamState(tuple(tensors[:count]), tuple(tensors[count:]), currents, steps, model)


_pytree.register_pytree_node(
    StreamState,
    lambda state: (_leaves(state), _context(state)),
    _from_leaves,
    serialized_type_name="timm_qkformer.StreamState",
    to_dumpable_context=list,
    from_dumpable_context=tuple,
)
torch.serialization.add_safe_globals([StreamState])


def run_step(
    model: Any,
    parts: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]],
    frame: Tensor | None,
    state: StreamState | None,
    donate: bool,
) -> tuple[Tensor, StreamState]:
    """`step` of a plain or a deployed model.

    Args:
        model: The model, whose `readout` and `forward_head` are used.
        parts: From a frame [B, C, H, W] to currents of the first neurons, samples first; from those to what the readout
            takes [1, B, C', H', W'].
        frame: [B, C, H, W]; None: the frame of the step before.
        state: Of the steps before; None at rest.
        donate: The state is not used again.
    """
    to_currents, to_maps = parts
    _check(model, frame, state)
    if frame is None:
        assert state is not None
        currents, name = state.currents, _describe(model, state.model.rpartition(_FRAMES)[2])
    else:
        # Whether it is the frame of the step before cannot be known: its memory may have been written to by others, or
        # be that of a tensor which is no more.
        currents, name = to_currents(frame), describe(model, frame)
    if state is not None:
        _require_same(name, state.model)
        if len(currents) != state.batch_size:
            raise ValueError(
                f"frame has {len(currents)} samples, the state {state.batch_size}: cut it with state.select, or join "
                "states with StreamState.cat"
            )
        _check_tensors(state, currents, model.readout)

    def run(currents: Tensor, sums: list[Tensor]) -> list[Tensor]:
        added: list[Tensor] = model.readout.add(to_maps(currents), sums)
        return added

    before = None if state is None else state.potentials
    sums, potentials = run_with_state(
        _Part(model, run), currents, [] if state is None else list(state.sums), state=before, donate=donate
    )
    if state is not None and [t.shape for t in sums] != [t.shape for t in state.sums]:
        found, expected = ([list(t.shape) for t in tensors] for tensors in (state.sums, sums))
        raise ValueError(f"the state's sums have the shapes {found}, the model's {expected}")
    steps = torch.zeros(len(currents), dtype=torch.int64, device=currents.device) if state is None else state.steps
    after = StreamState(potentials, tuple(sums), currents, steps + 1, name)
    logits: Tensor = model.forward_head(model.readout.finish(sums, after.steps).to(sums[0].dtype))
    return logits, after


class _Part(nn.Module):
    """A part of a model's work, as a module: `run_with_state` looks through the model."""

    def __init__(self, model: nn.Module, run: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self.run = run

    def forward(self, *inputs: Any) -> Any:
        return self.run(*inputs)


_FRAMES = ", frames "


def describe(model: Any, frame: Tensor) -> str:
    """A model and its input, as states remember them: class, arithmetic, width and depth, size and dtype of frames."""
    size = "x".join(str(side) for side in frame.shape[1:])
    return _describe(model, f"{size}, {str(frame.dtype).removeprefix('torch.')}")


# What was said of models, and which modules they had then: asked at every step.
_descriptions: WeakKeyDictionary[nn.Module, tuple[Sequence[nn.Module], str]] = WeakKeyDictionary()


def _describe(model: Any, frames: str) -> str:
    parts = modules_of(model)
    known, description = _descriptions.get(model, ((), ""))
    if len(known) != len(parts) or not all(map(operator.is_, known, parts)):
        description = _describe_parts(model)
        _descriptions[model] = parts, description
    return f"{description}{_FRAMES}{frames}"


def _describe_parts(model: Any) -> str:
    shapes = [tuple(t.shape) for part in (model.stem, model.stages) for t in part.state_dict().values()]
    neurons = sum(hasattr(part, "spec") for part in model.modules())
    precision = getattr(model, "precision", None)
    kind = type(model).__name__ if precision is None else f"deployed in {precision}"
    return f"{kind}, {neurons} layers of neurons, {len(shapes)} tensors ({crc32(repr(shapes).encode()):08x})"


def _check(model: Any, frame: Tensor | None, state: StreamState | None) -> None:
    if state is not None and not isinstance(state, StreamState):
        raise TypeError(f"state is a {type(state).__name__}: give what the step before returned, or None at rest")
    if frame is None and state is None:
        raise ValueError("frame=None shows the frame of the step before, and there is none: give the first one")
    if frame is not None and not isinstance(frame, Tensor):
        raise TypeError(f"frame is a {type(frame).__name__}: give a tensor [B, C, H, W]")
    if frame is not None and frame.dim() != 4:
        raise ValueError(
            f"frame of shape {list(frame.shape)}: give one time step [B, C, H, W], clip[:, t] of a clip [B, T, C, H, W]"
        )
    # A state of such a model cannot be, so that one look is enough.
    if state is None and any(getattr(part, "batch_coupled", False) for part in model.modules()):
        raise ValueError("batch_coupled=True: samples that influence each other cannot run step by step")


def _check_tensors(state: StreamState, currents: Tensor, readout: Any) -> None:
    """Refuse what cannot follow `currents`: a state may come from a file, or have been cast, cut or moved by hand."""
    if len(state.sums) != readout.num_sums:
        raise ValueError(f"the state has {len(state.sums)} sums, the model's readout adds up {readout.num_sums}")
    potentials = membrane_dtype(currents)
    expected = [potentials] * (len(state.potentials) + len(state.sums)) + [currents.dtype, torch.int64]
    for tensor, dtype in zip(_leaves(state), expected, strict=True):
        found = (tensor.dtype, len(tensor) if tensor.dim() else 0, tensor.device)
        # Currents of the step before are of no use where a frame is given; autocast may have rounded them.
        if found != (dtype, state.batch_size, currents.device) and tensor is not state.currents:
            raise ValueError(
                f"the state has a tensor of shape {list(tensor.shape)}, {tensor.dtype} on {tensor.device}, where "
                f"{dtype} of {state.batch_size} samples on {currents.device} is expected: give it as `step` returned "
                "it, or moved with state.to(device)"
            )


def _require_same(expected: str, found: str) -> None:
    if expected != found:
        raise ValueError(f"the state belongs to another model or input: it is of {found}; expected {expected}")
