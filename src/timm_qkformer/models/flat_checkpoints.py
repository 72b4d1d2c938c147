"""Checkpoints of the flat models' releases, which are named and ordered alike."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from ..layers import ConvNorm
from ..operators import Operator
from .base import SpikingTransformer
from .checkpoints import ADAPTABLE, CLASSIFIER, StateDict, rename_tensors, translate_tensors, unwrap_checkpoint
from .positions import HEAD, Stored, layer_norm, name_by_position, neuron_constants

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
    if tensors.keys() & model.state_dict().keys() - set(CLASSIFIER):
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
    order += [*around[1], *HEAD]
    tensors = rename_tensors(tensors, lambda name: spellings.get(name, name))
    tensors = name_by_position(tensors, model, order, linear=True)
    if take_constants is not None:
        tensors = take_constants(tensors)
    unused = {stored.name for stored in order if not stored.ours}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in unused}
    names = [(stored.name, stored.ours) for stored in order if stored.ours]
    return translate_tensors(tensors, model, names, ADAPTABLE, optional=CLASSIFIER, linear=True)


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
