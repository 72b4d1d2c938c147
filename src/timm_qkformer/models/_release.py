"""Checkpoints of the Max-Former authors' release (github.com/bic-L/MaxFormer), which also holds MS-QKFormer.

Its models list their tensors patch embeddings first, then the stages' blocks, then the classifier. Some of its
checkpoints are older than its code and spell the names in other ways; its own loader goes by position alone.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from ..layers import SpikingDepthwiseConv
from ..layers.conv import ConvNorm
from ._checkpoint import StateDict, translate_tensors
from ._hst import HierarchicalSpikingTransformer

__all__ = ["CHECKPOINTS_URL", "UnitNames", "translate_release"]

CHECKPOINTS_URL = "https://github.com/bic-L/MaxFormer/releases/download/checkpoints/"

# What the release calls the convolution and the batch norm of one of our units.
UnitNames = tuple[str, str]

_ADAPTABLE = {"stem.conv.weight": 1, "head.weight": 0, "head.bias": 0}
_HEAD = ("head.weight", "head.bias")


def translate_release(
    tensors: StateDict, model: HierarchicalSpikingTransformer, embeddings: Sequence[Sequence[UnitNames]]
) -> StateDict:
    """Turn tensors of the release into the model's state dict; pass the model's own through.

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


def _units(
    model: HierarchicalSpikingTransformer, embeddings: Sequence[Sequence[UnitNames]]
) -> Iterator[tuple[UnitNames, str]]:
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
            if isinstance(block.attn, SpikingDepthwiseConv):
                conv = "conv5" if block.attn.dw.conv.kernel_size == (7, 7) else "conv"
                yield (f"{theirs}.mixer.{conv}", f"{theirs}.mixer.{conv}_bn"), f"{ours}.attn.dw"
            else:
                for unit in ("q", "k", "v", "proj"):
                    if hasattr(block.attn, unit):
                        yield (f"{theirs}.attn.{unit}_conv", f"{theirs}.attn.{unit}_bn"), f"{ours}.attn.{unit}"
            for unit in ("fc1", "fc2"):
                yield (f"{theirs}.mlp.{unit}_conv", f"{theirs}.mlp.{unit}_bn"), f"{ours}.mlp.{unit}"
