"""Instruments that look into a model while it runs, without changing it."""

from .recording import firing_rates, record_spikes

__all__ = ["firing_rates", "record_spikes"]
