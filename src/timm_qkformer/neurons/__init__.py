"""Spiking neurons: one description (`NeuronSpec`), the written-out recurrence, its backends, and the modules."""

from .dynamics import fire_neurons, integrate_and_fire, run_neurons
from .modules import (
    IF,
    LIF,
    IntegerLIF,
    NeuronLayer,
    ParametricLIF,
    ReLUNeuron,
    SpikingNeuron,
    get_neuron_layer,
    neuron_names,
    register_neuron,
)
from .recurrence import integrate_and_fire_reference
from .spec import NeuronSpec, membrane_dtype
from .state import State, run_with_state

__all__ = [
    "IF",
    "LIF",
    "IntegerLIF",
    "NeuronLayer",
    "NeuronSpec",
    "ParametricLIF",
    "ReLUNeuron",
    "SpikingNeuron",
    "State",
    "fire_neurons",
    "get_neuron_layer",
    "integrate_and_fire",
    "integrate_and_fire_reference",
    "membrane_dtype",
    "neuron_names",
    "register_neuron",
    "run_neurons",
    "run_with_state",
]
