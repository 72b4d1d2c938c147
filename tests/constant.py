"""Neurons that do as they are told."""

import torch

from timm_qkformer.layers import SpikingNeuron


class Constant(SpikingNeuron):
    """Neurons that fire as they are told, not as they are driven."""

    def __init__(self, value=1.0, v_threshold=1.0, device=None, dtype=None):
        super().__init__(v_threshold)
        self.value = value

    def forward(self, x):
        return torch.full_like(x, self.value)
