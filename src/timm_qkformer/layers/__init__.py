"""Spiking layers: units of convolution, batch norm and neurons, embeddings, MLP, blocks, and the two ends of a network.

Tensors are [T, B, C, H, W] throughout; see each module's first lines for its equations.
"""

from .block import MixerLayer, SpikingBlock, SpikingBranch, SpikingStage
from .chain import PositionSpec, SpikingChain, UnitSpec
from .conv import ConvNorm, SpikingConv, output_range
from .drop import TimeDropout, TimeDropPath
from .ends import MeanReadout, MembraneReadout, as_sequence, count_time_steps
from .feedback import Feedback, FeedbackBlock, FeedbackSpec, FeedbackStage
from .mlp import SpikingMlp, get_mlp, mlp_names, register_mlp
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
    "PositionSpec",
    "SpikingBlock",
    "SpikingBranch",
    "SpikingChain",
    "SpikingConv",
    "SpikingMlp",
    "SpikingPatchEmbed",
    "SpikingStage",
    "SpikingStem",
    "TimeDropPath",
    "TimeDropout",
    "UnitSpec",
    "as_sequence",
    "count_time_steps",
    "get_mlp",
    "mlp_names",
    "output_range",
    "register_mlp",
]
