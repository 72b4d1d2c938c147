"""A release's file tensor by tensor: how it is read where its names are unknown, by position."""

from collections.abc import Collection, Sequence
from itertools import compress, product
from typing import NamedTuple

from torch import Tensor, nn

from .checkpoints import ADAPTABLE, CLASSIFIER, CONSTANT, StateDict, as_conv2d, listing, misfits_of


class Stored(NamedTuple):
    """A tensor of a release's file.

    Attributes:
        name: What it is called from then on: the release's name, or the model's own.
        ours: The model's name; "" for what the model does without, to which the others apply.
        shape: None: any number.
        kind: A file holds all tensors of a kind, or none.
    """

    name: str
    ours: str = ""
    shape: tuple[int | None, ...] = ()
    kind: str = ""


HEAD = tuple(Stored(name, name) for name in CLASSIFIER)


def layer_norm(name: str, dim: int, kind: str = "layer norms") -> list[Stored]:
    """A LayerNorm that a release declares and never calls."""
    return [Stored(f"{name}.{key}", shape=(dim,), kind=kind) for key in ("weight", "bias")]


def neuron_constants(neuron: str) -> list[Stored]:
    """What a neuron of BrainCog keeps in a checkpoint, see `take_thresholds`."""
    return [Stored(f"{neuron}.{key}", kind="constants") for key in ("threshold", "act_fun.alpha")]


def name_by_position(tensors: StateDict, model: nn.Module, order: Sequence[Stored], linear: bool = False) -> StateDict:
    """Name the tensors of a release's file whose names are unknown, by their position.

    Nothing is skipped: what the model does without must stand in its place, too, in its shape.

    Args:
        tensors: The checkpoint's tensors, in its order. If all their names are those of `order`, they stay as they are.
        model: The model that is to load them.
        order: All that the release's files hold, in their order.
        linear: See `as_conv2d`.

    Raises:
        ValueError: If nothing fits, or more than one way does.
    """
    known = {stored.name for stored in order}
    unknown = [name for name in tensors if name not in known and not CONSTANT.fullmatch(name)]
    if not unknown:
        return tensors
    kinds = list(dict.fromkeys(stored.kind for stored in order if stored.kind))
    found: dict[tuple[str, ...], set[str]] = {}
    counts: set[int] = set()
    problems: list[str] = []
    for choice in product((False, True), repeat=len(kinds)):
        held = {"", *compress(kinds, choice)}
        file = [stored for stored in order if stored.kind in held]
        counts.add(len(file))
        if len(file) == len(tensors):
            misfits = _misplaced(tensors, file, known, model, linear)
            if misfits:
                problems.append("by position, " + "; ".join(misfits))
            else:
                found[tuple(stored.name for stored in file)] = held - {""}
    if len(found) > 1:
        ways = " or ".join(", ".join(sorted(held)) or "nothing more" for held in found.values())
        raise ValueError(
            f"the checkpoint's names are not the release's ({listing(unknown)}), and by position it may hold, besides "
            f"what this {type(model).__name__} needs, {ways}: name its tensors"
        )
    for names in found:
        return as_conv2d(dict(zip(names, tensors.values(), strict=True)), linear)
    expected = " or ".join(map(str, sorted(counts)))
    raise ValueError(
        f"the checkpoint does not fit this {type(model).__name__}: its names are not the release's "
        f"({listing(unknown)}), and "
        + (". ".join(problems) or f"{len(tensors)} tensors cannot be matched by position with {expected}")
    )


def _misplaced(
    tensors: StateDict, file: Sequence[Stored], known: Collection[str], model: nn.Module, linear: bool
) -> list[str]:
    """What contradicts that a file's tensors are these, one by one."""
    pairs = list(zip(file, tensors.items(), strict=True))
    elsewhere = [name for stored, (name, _) in pairs if name in known and name != stored.name]
    problems = [f"in another's place: {listing(elsewhere)}"] if elsewhere else []
    needed = as_conv2d({stored.ours: tensor for stored, (_, tensor) in pairs if stored.ours}, linear)
    names = {stored.ours: name for stored, (name, _) in pairs}
    problems += misfits_of(needed, model, names, ADAPTABLE, CLASSIFIER)
    misshapen = [
        f"{name} {list(tensor.shape)} as {stored.name}"
        for stored, (name, tensor) in pairs
        if not stored.ours and not _is_of_shape(tensor, stored.shape)
    ]
    return problems + ([f"misshapen: {listing(misshapen)}"] if misshapen else [])


def _is_of_shape(tensor: Tensor, shape: Sequence[int | None]) -> bool:
    return tensor.ndim == len(shape) and all(n in (None, size) for n, size in zip(shape, tensor.shape, strict=True))
