"""Strict translation of other code bases' checkpoints, shared by the models' `checkpoint_filter_fn`."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

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


def conv1d_to_conv2d(state_dict: StateDict) -> StateDict:
    """Give 1x1 convolutions over tokens, which other code bases write as Conv1d, the shape of our Conv2d."""
    return {
        name: tensor.unsqueeze(-1) if name.endswith("conv.weight") and tensor.ndim == 3 else tensor
        for name, tensor in state_dict.items()
    }


def translate_tensors(
    state_dict: StateDict,
    model: nn.Module,
    names: Sequence[tuple[str, str]],
    adaptable: Mapping[str, int],
    optional: Collection[str] = (),
) -> StateDict:
    """Rename tensors by name where the names are known, else by their position, if count and every shape agree.

    Args:
        state_dict: The checkpoint's tensors, in its order.
        model: The model that is to load them.
        names: Pairs of the other code base's name and the model's own, in the order of the other's state dict.
        adaptable, optional: See `check_against_model`.

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
        renamed = conv1d_to_conv2d(dict(zip(targets, state_dict.values(), strict=True)))
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
