"""Strict translation of other code bases' checkpoints, shared by the models' `checkpoint_filter_fn`."""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import compress, product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..layers import ConvNorm
from ..operators import Operator
from .base import SpikingTransformer

StateDict = dict[str, Tensor]

MAXFORMER_CHECKPOINTS = "https://github.com/bic-L/MaxFormer/releases/download/checkpoints/"

# What a release calls the convolution and the batch norm of one of our units.
UnitNames = tuple[str, str]

_ADAPTABLE = {"stem.conv.weight": 1, "head.weight": 0, "head.bias": 0}
_HEAD = ("head.weight", "head.bias")

_SHOWN = 8  # names listed in an error before "and N more"


def unwrap_checkpoint(checkpoint: Mapping[str, Any]) -> StateDict:
    """The tensors of a checkpoint: plain, or under "model" or "state_dict", without DDP's "module." prefix.

    Raises:
        ValueError: If what is left is not a dict of tensors.
    """
    state_dict: Any = checkpoint
    for key in ("state_dict", "model"):
        if isinstance(state_dict, Mapping) and isinstance(state_dict.get(key), Mapping):
            state_dict = state_dict[key]
    if not isinstance(state_dict, Mapping) or not state_dict:
        raise ValueError("the checkpoint holds no tensors, neither at its top level nor under 'state_dict' or 'model'")
    strangers = [str(name) for name, value in state_dict.items() if not isinstance(value, Tensor)]
    if strangers:
        raise ValueError(f"the checkpoint is not a state dict, these entries are not tensors: {_listing(strangers)}")
    return {str(name).removeprefix("module."): value for name, value in state_dict.items()}


def rename_tensors(state_dict: StateDict, rename: Callable[[str], str | None]) -> StateDict:
    """Apply `rename` to every name.

    Raises:
        ValueError: Naming each tensor for which `rename` gives None, or that ends on another's name.
    """
    renamed: StateDict = {}
    source: dict[str, str] = {}
    unknown = []
    for name, tensor in state_dict.items():
        target = rename(name)
        if target is None:
            unknown.append(name)
        elif target in renamed:
            raise ValueError(f"the checkpoint holds {target} twice, as {source[target]} and as {name}")
        else:
            renamed[target] = tensor
            source[target] = name
    if unknown:
        raise ValueError(f"the checkpoint holds tensors this model does not know: {_listing(unknown)}")
    return renamed


def as_conv2d(state_dict: StateDict, linear: bool = False) -> StateDict:
    """Give 1x1 convolutions, which other code bases write as Conv1d or (`linear`) Linear, the shape of Conv2d."""
    flat = (2, 3) if linear else (3,)
    return {
        name: tensor[(..., *[None] * (4 - tensor.ndim))]
        if name.endswith("conv.weight") and tensor.ndim in flat
        else tensor
        for name, tensor in state_dict.items()
    }


def translate_tensors(
    state_dict: StateDict,
    model: nn.Module,
    names: Sequence[tuple[str, str]],
    adaptable: Mapping[str, int],
    optional: Collection[str] = (),
    linear: bool = False,
) -> StateDict:
    """Rename tensors by name where the names are known, else by their position, if count and every shape agree.

    Args:
        state_dict: The checkpoint's tensors, in its order.
        model: The model that is to load them.
        names: Pairs of the other code base's name and the model's own, in the order of the other's state dict.
        adaptable, optional: See `check_against_model`.
        linear: See `as_conv2d`.

    Raises:
        ValueError: If neither way fits, with what is wrong.
    """
    ours = dict(names)
    unknown = [name for name in state_dict if name not in ours]
    # The model's names in the order of the checkpoint's tensors, one list for each way that can be tried.
    ways = {}
    if not unknown:
        ways["by name"] = [ours[name] for name in state_dict]
    if len(state_dict) == len(names):
        ways["by position"] = list(ours.values())
    problems = {}
    for way, targets in ways.items():
        renamed = as_conv2d(dict(zip(targets, state_dict.values(), strict=True)), linear)
        original_names = {our: their for their, our in names} | dict(zip(targets, state_dict, strict=True))
        found = _compare(renamed, model, original_names, adaptable, optional)
        if not found:
            return renamed
        problems[way] = f"{way}, {'; '.join(found)}"
    if unknown and "by position" not in problems:
        problems["by position"] = (
            f"its names are not the release's ({_listing(unknown)}), and {len(state_dict)} tensors cannot be matched "
            f"by position with {len(names)}"
        )
    raise ValueError(f"the checkpoint does not fit this {type(model).__name__}: " + ". ".join(problems.values()))


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
    unknown = [name for name in tensors if name not in known and not _CONSTANT.fullmatch(name)]
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
            f"the checkpoint's names are not the release's ({_listing(unknown)}), and by position it may hold, besides "
            f"what this {type(model).__name__} needs, {ways}: name its tensors"
        )
    for names in found:
        return as_conv2d(dict(zip(names, tensors.values(), strict=True)), linear)
    expected = " or ".join(map(str, sorted(counts)))
    raise ValueError(
        f"the checkpoint does not fit this {type(model).__name__}: its names are not the release's "
        f"({_listing(unknown)}), and "
        + (". ".join(problems) or f"{len(tensors)} tensors cannot be matched by position with {expected}")
    )


def _misplaced(
    tensors: StateDict, file: Sequence[Stored], known: Collection[str], model: nn.Module, linear: bool
) -> list[str]:
    """What contradicts that a file's tensors are these, one by one."""
    pairs = list(zip(file, tensors.items(), strict=True))
    elsewhere = [name for stored, (name, _) in pairs if name in known and name != stored.name]
    problems = [f"in another's place: {_listing(elsewhere)}"] if elsewhere else []
    needed = as_conv2d({stored.ours: tensor for stored, (_, tensor) in pairs if stored.ours}, linear)
    names = {stored.ours: name for stored, (name, _) in pairs}
    problems += _compare(needed, model, names, _ADAPTABLE, _HEAD)
    misshapen = [
        f"{name} {list(tensor.shape)} as {stored.name}"
        for stored, (name, tensor) in pairs
        if not stored.ours and not _is_of_shape(tensor, stored.shape)
    ]
    return problems + ([f"misshapen: {_listing(misshapen)}"] if misshapen else [])


def _is_of_shape(tensor: Tensor, shape: Sequence[int | None]) -> bool:
    return tensor.ndim == len(shape) and all(n in (None, size) for n, size in zip(shape, tensor.shape, strict=True))


def check_against_model(
    state_dict: StateDict,
    model: nn.Module,
    original_names: Mapping[str, str],
    adaptable: Mapping[str, int],
    optional: Collection[str] = (),
) -> None:
    """Compare names and shapes with the model's.

    Args:
        state_dict: Tensors under the model's names.
        model: The model that is to load them.
        original_names: The checkpoint's own spelling of each name, for the error.
        adaptable: Tensors whose given dimension timm adapts after this filter (classes, input channels).
        optional: Names that the model need not have (a removed classifier).

    Raises:
        ValueError: Naming every missing, extra and misshapen tensor.
    """
    problems = _compare(state_dict, model, original_names, adaptable, optional)
    if problems:
        raise ValueError(f"the checkpoint does not fit this {type(model).__name__}; " + "; ".join(problems))


def _compare(
    state_dict: StateDict,
    model: nn.Module,
    original_names: Mapping[str, str],
    adaptable: Mapping[str, int],
    optional: Collection[str],
) -> list[str]:
    """What `check_against_model` complains about, missing, extra and misshapen tensors each in one line."""
    expected = model.state_dict()
    problems = []
    missing = [original_names.get(name, name) for name in expected if name not in state_dict]
    if missing:
        problems.append(f"missing: {_listing(missing)}")
    extra = [original_names.get(name, name) for name in state_dict if name not in expected and name not in optional]
    if extra:
        problems.append(f"extra: {_listing(extra)}")
    misshapen = []
    for name, tensor in state_dict.items():
        if name not in expected:
            continue
        found, wanted = list(tensor.shape), list(expected[name].shape)
        free = adaptable.get(name)
        if free is not None and len(found) == len(wanted):
            found[free] = wanted[free]
        if found != wanted and not (tensor.numel() == expected[name].numel() == 1):  # scalars have become vectors
            spelling = original_names.get(name, name)
            misshapen.append(f"{spelling} {list(tensor.shape)} instead of {list(expected[name].shape)}")
    if misshapen:
        problems.append(f"misshapen: {_listing(misshapen)}")
    return problems


def _listing(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def translate_release(
    tensors: StateDict, model: SpikingTransformer, embeddings: Sequence[Sequence[UnitNames]]
) -> StateDict:
    """Turn tensors of the Max-Former authors' release into the model's state dict; pass the model's own through.

    The release (github.com/bic-L/MaxFormer) also holds MS-QKFormer. Its models list their tensors patch embeddings
    first, then the stages' blocks, then the classifier. Some of its checkpoints are older than its code and spell the
    names in other ways; its own loader goes by position alone.

    Args:
        tensors: Tensors of a checkpoint.
        model: The model that is to load them, with its three stages.
        embeddings: The release's names of each patch embedding's units: the stem (first one only), the convolutions,
            the shortcut.

    Raises:
        ValueError: If the tensors fit the model neither by name nor by position.
    """
    if tensors.keys() & model.state_dict().keys() - set(_HEAD):
        return tensors
    names = []
    for (conv, bn), unit in _units(model, embeddings):
        module = model.get_submodule(unit)
        assert isinstance(module, ConvNorm)
        names += [(f"{conv}.{key}", f"{unit}.conv.{key}") for key in module.conv.state_dict()]
        names += [(f"{bn}.{key}", f"{unit}.bn.{key}") for key in module.bn.state_dict()]
    names += [(name, name) for name in _HEAD]
    return translate_tensors(tensors, model, names, _ADAPTABLE, optional=_HEAD)


def _units(model: SpikingTransformer, embeddings: Sequence[Sequence[UnitNames]]) -> Iterator[tuple[UnitNames, str]]:
    """The release's names and the path of every convolution with batch norm, in the order of the release."""
    stages: list[Any] = list(model.stages)
    for i, (stage, embedding) in enumerate(zip(stages, embeddings, strict=False), start=1):
        path = f"stages.{i - 1}.embed"
        units = [f"{path}.main.{j}" for j in range(len(stage.embed.main))] + [f"{path}.shortcut"]
        if i == 1:
            units.insert(0, "stem")
        for (conv, bn), unit in zip(embedding, units, strict=True):
            yield (f"patch_embed{i}.{conv}", f"patch_embed{i}.{bn}"), unit
    for i, stage in enumerate(stages, start=1):
        for j, block in enumerate(stage.blocks):
            theirs, ours = f"stage{i}.{j}", f"stages.{i - 1}.blocks.{j}"
            mixer: Operator = block.attn
            for unit in (*mixer.inputs, mixer.output):
                conv, bn = mixer.release_names(unit)
                yield (f"{theirs}.{conv}", f"{theirs}.{bn}"), f"{ours}.attn.{unit}"
            for unit in ("fc1", "fc2"):
                yield (f"{theirs}.mlp.{unit}_conv", f"{theirs}.mlp.{unit}_bn"), f"{ours}.mlp.{unit}"


# How releases may call one of our modules, with {} in place of "conv", "bn" or, for neurons, "lif" (or what stands
# there instead), and its path in the model or in a block.
Named = tuple[Sequence[str | Mapping[str, str]], str]


def block_parts(block: Any) -> Iterator[Named]:
    """The modules of a block as most releases call them, in their order."""
    mixer: Operator = block.attn
    for part in (*mixer.inputs, mixer.output):
        yield [f"attn.{part}_{{}}"], f"attn.{part}"
    for part, other in (("fc1", "mlp1"), ("fc2", "mlp2")):
        yield [f"mlp.{name}_{{}}" for name in (part, other)], f"mlp.{part}"


def norms_of_block(block: Any) -> tuple[list[Stored], list[Stored]]:
    """The LayerNorms that most releases declare in front of a block's attention and of its MLP, and never call."""
    dim = block.mlp.fc1.conv.in_channels
    return layer_norm("norm1", dim), layer_norm("norm2", dim)


def translate_flat(
    checkpoint: Mapping[str, Any],
    model: SpikingTransformer,
    stem: Sequence[Sequence[str]],
    parts: Callable[[Any], Iterable[Named | Stored]] = block_parts,
    around: tuple[Sequence[Stored], Sequence[Stored]] = ((), ()),
    take_constants: Callable[[StateDict], StateDict] | None = None,
) -> StateDict:
    """Turn a checkpoint of a flat model's release into the model's state dict; pass the model's own through.

    These releases call their parts `patch_embed.*`, `block.<i>.attn.*`, `block.<i>.mlp.*` and `head.*`, and list them
    in this order. 1x1 convolutions are Conv2d, Conv1d or Linear.

    Args:
        checkpoint: As `unwrap_checkpoint` takes it.
        model: The model that is to load it.
        stem: For each convolution before the blocks, how releases call it, its batch norm and its neurons, with {} in
            place of "conv", "bn" and "lif".
        parts: The modules of a block, in the release's order, and the tensors that releases hold and never use, which
            are dropped.
        around: More of these: in front of everything, and between the blocks and the classifier.
        take_constants: Gives the tensors, under the release's names, without the constants of BrainCog's neurons, and
            checks those. None: the release's neurons have none.

    Raises:
        ValueError: If the tensors fit the model neither by name nor by position.
    """
    tensors = unwrap_checkpoint(checkpoint)
    if tensors.keys() & model.state_dict().keys() - set(_HEAD):
        return tensors
    order: list[Stored] = list(around[0])
    spellings: dict[str, str] = {}
    for part in _flat_parts(model, stem, parts):
        if isinstance(part, Stored):
            order.append(part)
            continue
        given, path = part
        module = model.get_submodule(path)
        templates = sorted(given, key=lambda t: not any(name.startswith(_ends(t)) for name in tensors))
        layers = {"conv": ("conv", "linear"), "bn": ("bn",)} if isinstance(module, ConvNorm) else {"": ("lif",)}
        for layer, spelled in layers.items():
            own = f"{path}.{layer}" if layer else path
            if isinstance(module, ConvNorm) and layer == "bn" and isinstance(module.bn, nn.Identity):
                order += _idle_norm(module, templates[0])
            for key in model.get_submodule(own).state_dict():
                theirs = [t[layer] if isinstance(t, Mapping) else t.format(s) for t in templates for s in spelled]
                order.append(Stored(f"{theirs[0]}.{key}", f"{own}.{key}"))
                spellings |= {f"{name}.{key}": f"{theirs[0]}.{key}" for name in theirs}
        if take_constants is not None and isinstance(module, ConvNorm):
            order += neuron_constants(neuron_name(templates[0]))
    order += [*around[1], *(Stored(name, name) for name in _HEAD)]
    tensors = rename_tensors(tensors, lambda name: spellings.get(name, name))
    tensors = name_by_position(tensors, model, order, linear=True)
    if take_constants is not None:
        tensors = take_constants(tensors)
    unused = {stored.name for stored in order if not stored.ours}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in unused}
    names = [(stored.name, stored.ours) for stored in order if stored.ours]
    return translate_tensors(tensors, model, names, _ADAPTABLE, optional=_HEAD, linear=True)


def _idle_norm(module: ConvNorm, template: str | Mapping[str, str]) -> Iterator[Stored]:
    """The batch norm that a release declares behind a convolution and never calls."""
    name = template["bn"] if isinstance(template, Mapping) else template.format("bn")
    norm = nn.BatchNorm1d(module.conv.out_channels, device="meta")
    for key, tensor in norm.state_dict().items():
        yield Stored(f"{name}.{key}", shape=tuple(tensor.shape), kind="batch norms")


def neuron_name(template: str | Mapping[str, str]) -> str:
    """What a release calls the neurons of a module."""
    return template["lif"] if isinstance(template, Mapping) else template.format("lif")


def _ends(template: str | Mapping[str, str]) -> tuple[str, ...]:
    names = template.values() if isinstance(template, Mapping) else map(template.format, ("conv", "linear", "bn"))
    return tuple(f"{name}." for name in names)


def _flat_parts(
    model: SpikingTransformer, stem: Sequence[Sequence[str]], parts: Callable[[Any], Iterable[Named | Stored]]
) -> Iterator[Named | Stored]:
    """How releases call each module, in the release's order, and its path in the model; what they never use."""
    stage: Any = model.stages[0]
    units = ["stem", *(f"stages.0.embed.main.{i}" for i in range(len(stage.embed.main)))]
    if getattr(stage.embed, "position", None) is not None:
        units.append("stages.0.embed.position")
    for templates, unit in zip(stem, units, strict=True):
        names = [f"patch_embed.{template}" for template in templates]
        yield names, unit
        yield names, f"{unit}.neuron"
    for i, block in enumerate(stage.blocks):
        for part in parts(block):
            if isinstance(part, Stored):
                yield part._replace(name=f"block.{i}.{part.name}")
                continue
            inside, path = part
            yield [_below(f"block.{i}.", template) for template in inside], f"stages.0.blocks.{i}.{path}"


def _below(prefix: str, template: str | Mapping[str, str]) -> str | Mapping[str, str]:
    if isinstance(template, str):
        return prefix + template
    return {layer: prefix + name for layer, name in template.items()}


_CONSTANT = re.compile(r"(.*)\.(threshold|act_fun\.alpha)")


def take_thresholds(checkpoint: Mapping[str, Any]) -> tuple[StateDict, dict[str, float]]:
    """Tensors of a checkpoint of BrainCog's models without the constants that these keep in it, and the thresholds.

    A neuron's threshold and its surrogate's alpha are parameters there, without gradients. The stored threshold is the
    one that counts; alpha matters to training alone.

    Returns:
        The tensors, and the threshold of each neuron by its name in the checkpoint.
    """
    tensors, thresholds = {}, {}
    for name, tensor in unwrap_checkpoint(checkpoint).items():
        if m := _CONSTANT.fullmatch(name):
            if m[2] == "threshold":
                value = float(tensor)  # in single precision 0.3 is not what it was meant to be
                thresholds[m[1]] = value if tensor.dtype == torch.float64 else float(f"{value:.7g}")
        else:
            tensors[name] = tensor
    return tensors, thresholds


def without_constants(checkpoint: Mapping[str, Any], model: SpikingTransformer) -> StateDict:
    """Tensors of a checkpoint without the constants that STEP (github.com/Fancyssc/STEP) keeps in its own.

    Raises:
        ValueError: For thresholds other than the model's, 0.5 behind attention.
    """
    tensors, thresholds = take_thresholds(checkpoint)
    attention = {name: value for name, value in thresholds.items() if name.endswith(".attn_lif")}
    check_thresholds(attention, 0.5)
    others = {name: value for name, value in thresholds.items() if name not in attention}
    check_thresholds(others, float(getattr(model.stem.neuron, "v_threshold", 1.0)))
    return tensors


def check_thresholds(thresholds: Mapping[str, float], expected: float = 1.0) -> None:
    """Refuse a checkpoint whose neurons have other thresholds than the model's.

    Raises:
        ValueError: Naming those that differ.
    """
    others = [f"{name} {value:g}" for name, value in thresholds.items() if value != expected]
    if others:
        raise ValueError(
            f"the checkpoint's neurons have other thresholds than the model's {expected:g}: {_listing(others)}; create "
            "the model with neuron_args={'v_threshold': ...}"
        )
