"""What the papers call a model's layers: QKFormer (arXiv 2403.16552), eq. 4 to 11 and its table of firing rates.

    Q, K, V           neurons of an operator's inputs
    A_t, A_c, ...     its inner neurons, by the names that it declares
    X'                what it gives and its projection takes: an inner neuron's spikes (SSA), or the product of some,
                      which no neuron of its own fires (a mask times K)
    X''               neuron after the projection
    SMLP layer 1, 2   neurons after the MLP's two layers

Membrane shortcuts have no neurons after the projection and the second MLP layer; theirs stand in front of the
sub-blocks ("attention input", "SMLP input"), the patch embeddings ("input") and the classifier ("head").
"""

import re
from dataclasses import dataclass

from torch import nn

from ..neurons import SpikingNeuron
from ..operators import Operator

_PLACE = re.compile(r"(?:^|\.)stages\.(\d+)\.(?:(embed|feedback)|blocks\.(\d+))(?:\.|$)")

_PLACES = {"stem": "stem", "readout": "head", "head": "head"}

# Ends of module paths and their names in the paper.
_NAMES: tuple[tuple[str, str], ...] = (
    (r"mlp\.fc1\.neuron", "SMLP layer 1"),
    (r"mlp\.fc2\.neuron", "SMLP layer 2"),
    (r"dw\.neuron", "DWC"),
    (r"neuron1", "attention input"),
    (r"more\.\d+\.neuron", "attention input"),
    (r"neuron2", "SMLP input"),
    (r"embed\.neuron", "input"),
    (r"embed\.main\.(\d+)\.neuron", "conv {}"),
    (r"embed\.shortcut\.neuron", "shortcut"),
    (r"feedback\.decoders\.(\d+)\.neuron", "decoder {}"),
    (r"embed\.position\.neuron", "position"),
    (r"embed\.position_input", "position input"),
    (r"stem\.neuron", "conv"),
    (r"readout\.neuron", "rate"),
)


@dataclass(frozen=True)
class SpikeLayer:
    """Where a model has spikes."""

    path: str  # name of the module
    name: str  # its name in the paper, see the module's first lines; the path where the paper has none
    # part of the model: "stem", "stage 1, embedding", "stage 1, block 1", "stage 3, feedback", "head" or "" elsewhere
    place: str
    stage: int | None  # number of the stage, from 1 as in the paper
    block: int | None  # number of the block in its stage, from 1
    is_neuron: bool  # whether the spikes are a neuron layer's output. An X' that no neuron fires is the module's input


def operator_layers(model: nn.Module) -> dict[str, Operator]:
    """A model's operators that have inputs, by module name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Operator) and module.inputs}


def inner_names(operator: Operator) -> dict[str, str]:
    """What papers call an operator's inner neurons, by the attributes that hold them."""
    return {name: operator.neuron_names.get(name, name) for name in operator.inner_neurons}


def spike_layers(model: nn.Module) -> dict[SpikeLayer, int]:
    """All neuron layers of a model, and every X' that no neuron fires.

    With each: how many dimensions of its spikes [T, B, channels..., positions...] number channels.
    """
    operators = operator_layers(model)
    names: dict[str, str] = {}
    inner: set[str] = set()
    for path, operator in operators.items():
        names |= {f"{path}.{name}.neuron": name.upper() for name in operator.inputs}
        names[f"{path}.{operator.output}.neuron"] = f"{operator.attended_name}'"
        names |= {f"{path}.{name}": called for name, called in operator.neuron_names.items()}
        for name, module in operator.inner_modules().items():
            inner |= {f"{path}.{name}.{part}".rstrip(".") for part, _ in module.named_modules()}
    layers = {}
    for path, module in model.named_modules():
        if isinstance(module, SpikingNeuron):
            layer = SpikeLayer(path, names.get(path) or _name(path), *place_of(path), is_neuron=True)
            # Inner neurons see [T, B, heads, channels of a head, tokens].
            layers[layer] = 2 if path in inner else 1
        elif path in operators and not fires_result(operators[path]):
            operator = operators[path]
            given = SpikeLayer(f"{path}.{operator.output}", operator.attended_name, *place_of(path), is_neuron=False)
            layers[given] = 1
    return layers


def fires_result(operator: Operator) -> bool:
    """Whether X' is what an inner neuron fires."""
    return operator.attended_name in operator.neuron_names.values()


def has_mask(operator: Operator) -> bool:
    """Whether inner neurons decide what is left of the operator's inputs."""
    return bool(operator.inner_neurons) and not fires_result(operator)


def _name(path: str) -> str:
    for pattern, name in _NAMES:
        match = re.search(rf"(?:^|\.){pattern}$", path)
        if match:
            return name.format(*(int(number) + 1 for number in match.groups()))
    return path


def place_of(path: str) -> tuple[str, int | None, int | None]:
    """Part of the model that a module belongs to, stage and block: see `SpikeLayer`."""
    match = _PLACE.search(path)
    if match is None:
        names = path.split(".")
        return next((place for name, place in _PLACES.items() if name in names), ""), None, None
    stage = int(match[1]) + 1
    if match[2] is not None:
        return f"stage {stage}, {'embedding' if match[2] == 'embed' else match[2]}", stage, None
    block = int(match[3]) + 1
    return f"stage {stage}, block {block}", stage, block
