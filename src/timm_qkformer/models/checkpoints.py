"""Strict translation of other code bases' checkpoints, shared by the models' `checkpoint_filter_fn`."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import ConvNorm
from ..operators import Operator
from .base import SpikingTransformer

StateDict = dict[str, Tensor]

MAXFORMER_CHECKPOINTS = "https://github.com/bic-L/MaxFormer/releases/download/checkpoints/"

# What a release calls the convolution and the batch norm of one of our units.
UnitNames = tuple[str, str]

ADAPTABLE = {"stem.conv.weight": 1, "head.weight": 0, "head.bias": 0}
CLASSIFIER = ("head.weight", "head.bias")

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
        raise ValueError(f"the checkpoint is not a state dict, these entries are not tensors: {listing(strangers)}")
    return {str(name).removeprefix("module."): value for name, value in state_dict.items()}


def in_float32(state_dict: StateDict) -> StateDict:
    """Half-precision tensors in float32: for other input channels timm adds weights up, and would round the sums."""
    halves = (torch.float16, torch.bfloat16)
    return {name: tensor.float() if tensor.dtype in halves else tensor for name, tensor in state_dict.items()}


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
        raise ValueError(f"the checkpoint holds tensors this model does not know: {listing(unknown)}")
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
        found = misfits_of(renamed, model, original_names, adaptable, optional)
        if not found:
            return renamed
        problems[way] = f"{way}, {'; '.join(found)}"
    if unknown and "by position" not in problems:
        problems["by position"] = (
            f"its names are not the release's ({listing(unknown)}), and {len(state_dict)} tensors cannot be matched "
            f"by position with {len(names)}"
        )
    raise ValueError(f"the checkpoint does not fit this {type(model).__name__}: " + ". ".join(problems.values()))


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
    problems = misfits_of(state_dict, model, original_names, adaptable, optional)
    if problems:
        raise ValueError(f"the checkpoint does not fit this {type(model).__name__}; " + "; ".join(problems))


def misfits_of(
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
        problems.append(f"missing: {listing(missing)}")
    extra = [original_names.get(name, name) for name in state_dict if name not in expected and name not in optional]
    if extra:
        problems.append(f"extra: {listing(extra)}")
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
        problems.append(f"misshapen: {listing(misshapen)}")
    return problems


def listing(names: list[str]) -> str:
    """The first names, for an error, and how many more there are."""
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
    if tensors.keys() & model.state_dict().keys() - set(CLASSIFIER):
        return tensors
    names = []
    for (conv, bn), unit in _units(model, embeddings):
        module = model.get_submodule(unit)
        assert isinstance(module, ConvNorm)
        names += [(f"{conv}.{key}", f"{unit}.conv.{key}") for key in module.conv.state_dict()]
        names += [(f"{bn}.{key}", f"{unit}.bn.{key}") for key in module.bn.state_dict()]
    names += [(name, name) for name in CLASSIFIER]
    return translate_tensors(tensors, model, names, ADAPTABLE, optional=CLASSIFIER)


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


CONSTANT = re.compile(r"(.*)\.(threshold|act_fun\.alpha)")


def take_thresholds(checkpoint: Mapping[str, Any]) -> tuple[StateDict, dict[str, float]]:
    """Tensors of a checkpoint of BrainCog's models without the constants that these keep in it, and the thresholds.

    A neuron's threshold and its surrogate's alpha are parameters there, without gradients. The stored threshold is the
    one that counts; alpha matters to training alone.

    Returns:
        The tensors, and the threshold of each neuron by its name in the checkpoint.
    """
    tensors, thresholds = {}, {}
    for name, tensor in unwrap_checkpoint(checkpoint).items():
        if m := CONSTANT.fullmatch(name):
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
            f"the checkpoint's neurons have other thresholds than the model's {expected:g}: {listing(others)}; create "
            "the model with neuron_args={'v_threshold': ...}"
        )
