"""Spiking layers: units of convolution, batch norm and neurons, embeddings, MLP, blocks, and the two ends of a network.

Tensors are [T, B, C, H, W] throughout; see each module's first lines for its equations.
"""

from .block import MixerLayer, SpikingBlock, SpikingBranch, SpikingStage
from .conv import ConvNorm, SpikingConv, output_range
from .drop import TimeDropout, TimeDropPath
from .ends import MeanReadout, MembraneReadout, as_sequence, count_time_steps
from .feedback import Feedback, FeedbackBlock, FeedbackSpec, FeedbackStage
from .mlp import SpikingMlp
from .patch_embed import SpikingPatchEmbed, SpikingStem

__all__ = [
    "ConvNorm",
    "Feedback",
    "FeedbackBlock",
    "FeedbackSpec",
    "FeedbackStage",
    "MeanReadout",
    "MembraneReadout",
    "MixerLayer",
    "SpikingBlock",
    "SpikingBranch",
    "SpikingConv",
    "SpikingMlp",
    "SpikingPatchEmbed",
    "SpikingStage",
    "SpikingStem",
    "TimeDropPath",
    "TimeDropout",
    "as_sequence",
    "count_time_steps",
    "output_range",
]
