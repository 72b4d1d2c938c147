"""Instruments that look into a model while it runs, without changing it. User's view: docs/analysis.md, pictures.md."""

from .attention import AttentionRecord, attention_layers, record_attention
from .complexity import attention_complexity, parameter_counts
from .energy import Energy, LayerEnergy, energy
from .hooks import neuron_layers, pick_neurons, recalibrated_norms, record_layer, record_spikes
from .memory import attention_memory, peak_memory
from .profile import Profile, profile
from .rates import FiringRates, LayerRates, firing_rates

__all__ = [
    "AttentionRecord",
    "Energy",
    "FiringRates",
    "LayerEnergy",
    "LayerRates",
    "Profile",
    "attention_complexity",
    "attention_layers",
    "attention_memory",
    "energy",
    "firing_rates",
    "neuron_layers",
    "parameter_counts",
    "peak_memory",
    "pick_neurons",
    "profile",
    "recalibrated_norms",
    "record_attention",
    "record_layer",
    "record_spikes",
]
