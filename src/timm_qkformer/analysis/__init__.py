"""Instruments that look into a model while it runs, without changing it."""

from .complexity import attention_complexity, parameter_counts
from .energy import Energy, LayerEnergy, energy
from .memory import attention_memory, peak_memory
from .rates import FiringRates, LayerRates, firing_rates
from .recording import record_spikes

__all__ = [
    "Energy",
    "FiringRates",
    "LayerEnergy",
    "LayerRates",
    "attention_complexity",
    "attention_memory",
    "energy",
    "firing_rates",
    "parameter_counts",
    "peak_memory",
    "record_spikes",
]
