"""Top-down feedback: a stage that runs twice, the second time with what its first answer suggests.

SpiLiFormer (arXiv 2503.15986), feedback inhibition. The first pass through the blocks gives tokens z. Two learned
prompts p_1 and p_2 choose and suppress among them, and a chain of decoders turns what is left into spikes, a feedback
for each block, which the block's operator adds to the input of its values (`Operator.fed`) in the second pass:

    z' = gain * (z m_1 - z m_2),  m_i = clamp(cos(z, p_i), 0, 1) over the channels of each token
    f_1 = LIF(BN(W z')),  f_2 = LIF(BN(W f_1)),  ...

Neurons start from rest in each pass; the second pass's result counts.
"""

from collections.abc import Sequence
from typing import Any, List, NamedTuple, Optional, Tuple

import torch
import torch.fx
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from ..execution.packing import REAL
from ..execution.recompute import checkpoint_once
from ..neurons import LIF, NeuronLayer
from ..neurons.spec import membrane_dtype
from ..neurons.state import carried_state
from .block import SpikingBlock, SpikingStage
from .conv import SpikingConv, unflatten

torch.fx.wrap("choose_tokens")  # one node in a graph of torch.fx: it builds shapes from ranks


class FeedbackSpec(NamedTuple):
    """How the last stage feeds back to itself.

    Attributes:
        gain: What z' is multiplied by.
        last_first: Let the chain of decoders run from the last block's to the first block's.
        norm_first: Let decoders normalise what they take, LIF(W BN(x)), instead of what they give.
        misread: Reproduce the release's CIFAR-10 model, which reads the spikes of a decoder, a matrix [tokens,
            channels] for each step, as [channels, tokens] without transposing it.
    """

    gain: float = 1.0
    last_first: bool = False
    norm_first: bool = False
    misread: bool = False


class NormConv(SpikingConv):
    """LIF(W BN(x)): `SpikingConv` of 1x1 with the batch norm in front."""

    def __init__(self, dim: int, **kwargs: Any) -> None:
        super().__init__(dim, dim, **kwargs)

    def currents(self, x: Tensor) -> Tensor:
        T, B, _, _, _ = x.shape
        return unflatten(self.conv(self.bn(x.flatten(0, 1))), 0, [T, B])


def choose_tokens(z: Tensor, prompt: Tensor, other: Tensor, gain: float, dim: int) -> Tensor:
    """z' of this module's first lines, for tokens whose channels are dimension `dim` of z.

    In float32 at least: in float16 what keeps `F.normalize` from dividing by 0 is 0 itself, and tokens may be silent.
    """
    given = z.dtype
    full = membrane_dtype(z)
    z, prompt, other = z.to(full), prompt.to(full), other.to(full)
    directions = F.normalize(z, dim=dim)
    shape = [1] * z.dim()
    shape[dim] = -1
    chosen = (directions * F.normalize(prompt, dim=0).view(shape)).sum(dim, keepdim=True).clamp(0.0, 1.0)
    suppressed = (directions * F.normalize(other, dim=0).view(shape)).sum(dim, keepdim=True).clamp(0.0, 1.0)
    return ((z * chosen - z * suppressed) * gain).to(given)


class Feedback(nn.Module):
    """Tokens z [T, B, C, H, W] after the last block to spikes of the same shape for each block, first block first.

    Args:
        dim: Channels.
        blocks: Number of blocks.
        spec: How; see `FeedbackSpec`.
        neuron_layer: Factory of the neurons.
    """

    def __init__(
        self,
        dim: int,
        blocks: int,
        spec: FeedbackSpec,
        neuron_layer: NeuronLayer = LIF,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.gain, self.last_first, self.misread = float(spec.gain), spec.last_first, spec.misread
        self.prompt = nn.Parameter(torch.randn(dim, **dd))
        self.prompt_2 = nn.Parameter(torch.randn(dim, **dd))
        decoders: List[nn.Module] = []
        numbers = REAL
        for _ in range(blocks):
            args: dict[str, Any] = {"neuron_layer": neuron_layer, "input_range": numbers, **dd}
            decoder = NormConv(dim, **args) if spec.norm_first else SpikingConv(dim, dim, **args)
            trunc_normal_(decoder.conv.weight, std=0.02)
            numbers = decoder.output_range
            decoders.append(decoder)
        self.decoders = nn.ModuleList(decoders)  # in the order in which the chain runs

    def forward(self, z: Tensor) -> List[Tensor]:
        x = choose_tokens(z, self.prompt, self.prompt_2, self.gain, 2)
        feedback = []
        for decoder in self.decoders:
            x = decoder(x)
            if self.misread:
                tokens_first = x.flatten(3).transpose(2, 3)
                x = tokens_first.reshape(x.shape)
            feedback.append(x)
        if self.last_first:
            feedback.reverse()
        return feedback


class FeedbackBlock(SpikingBlock):
    """`SpikingBlock` that passes feedback [T, B, C, H, W], if there is any, on to its first token mixer."""

    def forward(self, x: Tensor, feedback: Optional[Tensor] = None) -> Tensor:
        x = x + self.drop_path(self.attn(self.neuron1(x), feedback))
        for branch in self.more:
            x = x + self.drop_path(branch(x))
        return x + self.drop_path(self.mlp(self.neuron2(x)))


class FeedbackStage(SpikingStage):
    """`SpikingStage` that runs its blocks twice: [T, B, C, H, W] to [T, B, C', H', W'] of the second pass.

    Args:
        embed: The embedding.
        blocks: `FeedbackBlock`s, one or more, whose token mixers take feedback.
        feedback: What the first pass gives for the second.

    Raises:
        ValueError: For a block whose token mixer has nothing to take feedback with.
    """

    def __init__(self, embed: nn.Module, blocks: Sequence[nn.Module], feedback: Feedback) -> None:
        super().__init__(embed, blocks)
        for block in blocks:
            mixer: Any = block.attn
            if not getattr(mixer, "fed", ()):
                raise ValueError(f"{type(mixer).__name__} takes no feedback: it must declare `fed`, as fb_lidiff does")
        self.feedback = feedback

    def passes(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        """What comes out of the first pass and of the second."""
        if not torch.jit.is_scripting():
            if self.grad_checkpointing and carried_state() is None:  # potentials are to be taken once
                return self._recomputed(x)
        x = self.embed(x)
        first = self.blocks(x)
        feedback = self.feedback(first)
        for i, block in enumerate(self.blocks):
            x = block(x, feedback[i])
        return first, x

    def _recomputed(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        x = first = checkpoint_once(self.embed, x)
        for block in self.blocks:
            first = checkpoint_once(block, first)
        for block, feedback in zip(self.blocks, self.feedback(first), strict=True):
            x = checkpoint_once(block, x, feedback)
        return first, x

    def forward(self, x: Tensor) -> Tensor:
        return self.passes(x)[1]
