"""Spiking layers. Tensors are [T, B, C, H, W] throughout; see each module's first lines for its equations."""

from .attention import QKChannelAttention, QKTokenAttention, SpikingSelfAttention
from .backend import current_lif_backend, set_lif_backend
from .conv import ConvNorm, SpikingConv
from .counts import add_counts, move_note
from .drop import TimeDropout, TimeDropPath
from .dynamics import integrate_and_fire, integrate_and_fire_reference
from .lean import is_lean_training, lean_training
from .mixer import SpikingDepthwiseConv
from .mlp import SpikingMlp
from .neurons import IF, LIF, ParametricLIF, SpikingNeuron, get_neuron_layer
from .patch_embed import SpikingPatchEmbed, SpikingStem
from .readout import MeanReadout, MembraneReadout
from .recompute import checkpoint_once
from .sequence import as_sequence, count_time_steps

__all__ = [
    "IF",
    "LIF",
    "ConvNorm",
    "MeanReadout",
    "MembraneReadout",
    "ParametricLIF",
    "QKChannelAttention",
    "QKTokenAttention",
    "SpikingConv",
    "SpikingDepthwiseConv",
    "SpikingMlp",
    "SpikingNeuron",
    "SpikingPatchEmbed",
    "SpikingSelfAttention",
    "SpikingStem",
    "TimeDropPath",
    "TimeDropout",
    "add_counts",
    "as_sequence",
    "checkpoint_once",
    "count_time_steps",
    "current_lif_backend",
    "get_neuron_layer",
    "integrate_and_fire",
    "integrate_and_fire_reference",
    "is_lean_training",
    "lean_training",
    "move_note",
    "set_lif_backend",
]
