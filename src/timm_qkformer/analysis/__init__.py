"""Instruments that look into a model while it runs, without changing it."""

from .attention import AttentionRecord, attention_layers, record_attention
from .complexity import attention_complexity, parameter_counts
from .energy import Energy, LayerEnergy, energy
from .memory import attention_memory, peak_memory
from .raster import neuron_layers, pick_neurons, record_layer
from .rates import FiringRates, LayerRates, firing_rates
from .recording import record_spikes

__all__ = [
    "AttentionRecord",
    "Energy",
    "FiringRates",
    "LayerEnergy",
    "LayerRates",
    "attention_complexity",
    "attention_layers",
    "attention_memory",
    "energy",
    "firing_rates",
    "neuron_layers",
    "parameter_counts",
    "peak_memory",
    "pick_neurons",
    "record_attention",
    "record_layer",
    "record_spikes",
]
