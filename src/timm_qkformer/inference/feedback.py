"""The deployed form of `layers.FeedbackStage`: blocks that run twice, and the feedback between the passes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import Feedback, FeedbackStage
from ..layers.feedback import NormConv, choose_tokens
from .blocks import DeployedStage, DeployedUnit
from .neurons import DeployedNeuron
from .projection import Projection
from .weights import Folded


class _NormDecoder(nn.Module):
    """`NormConv`: the batch norm goes into the convolution behind it. W (g x + s) = (W g) x + W s."""

    def __init__(self, decoder: NormConv, name: str, dtype: torch.dtype) -> None:
        super().__init__()
        bn: Any = decoder.bn
        gain = torch.rsqrt(bn.running_var.double() + bn.eps) * bn.weight.detach().double()
        shift = bn.bias.detach().double() - bn.running_mean.double() * gain
        weight = decoder.conv.weight.detach().double()
        folded = Folded(weight * gain[None, :, None, None], weight.flatten(1) @ shift)
        self.projection = Projection([folded], 1, 1, dtype)
        self.neuron = DeployedNeuron(decoder.neuron, f"{name}.neuron")

    def forward(self, x: Tensor, spikes: torch.dtype) -> Tensor:
        return self.projection.fire(x, self.neuron.spec, spikes)


class DeployedFeedback(nn.Module):
    """`Feedback`: tokens [T, B, H, W, C] after the last block to spikes of the same shape for each block."""

    prompt: Tensor
    prompt_2: Tensor

    def __init__(self, feedback: Feedback, name: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.gain, self.last_first, self.misread = feedback.gain, feedback.last_first, feedback.misread
        full = torch.promote_types(feedback.prompt.dtype, torch.float32)
        self.register_buffer("prompt", feedback.prompt.detach().to(full, copy=True))
        self.register_buffer("prompt_2", feedback.prompt_2.detach().to(full, copy=True))
        decoders: Sequence[Any] = list(feedback.decoders)
        self.decoders = nn.ModuleList(
            (_NormDecoder if type(decoder) is NormConv else DeployedUnit)(decoder, f"{name}.decoders.{i}", dtype)
            for i, decoder in enumerate(decoders)
        )

    def forward(self, z: Tensor, spikes: torch.dtype) -> list[Tensor]:
        x = choose_tokens(z.to(self.prompt.dtype), self.prompt, self.prompt_2, self.gain, z.dim() - 1)
        feedback = []
        for decoder in self.decoders:
            x = decoder(x, spikes)
            if self.misread:
                channels_first = x.flatten(2).unflatten(2, (x.shape[4], -1))
                x = channels_first.transpose(2, 3).reshape(x.shape)
            feedback.append(x)
        return feedback[::-1] if self.last_first else feedback


class DeployedFeedbackStage(DeployedStage):
    """`FeedbackStage`: [T, B, H, W, C] to [T, B, H', W', C'] of the second pass."""

    def __init__(self, stage: FeedbackStage, name: str, dtype: torch.dtype) -> None:
        super().__init__(stage, name, dtype)
        self.feedback = DeployedFeedback(stage.feedback, f"{name}.feedback", dtype)

    def forward(self, x: Tensor, spikes: torch.dtype, periodic: bool = False) -> Tensor:
        x = self.embed(x, spikes, periodic).contiguous()
        first = x.clone()
        for block in self.blocks:
            block(first, spikes)
        for block, feedback in zip(self.blocks, self.feedback(first, spikes), strict=True):
            block(x, spikes, feedback)
        return x


def deployed_stage(stage: nn.Module, name: str, dtype: torch.dtype) -> DeployedStage:
    """The deployed form of a stage of any kind.

    Raises:
        TypeError: For another module.
    """
    return (DeployedFeedbackStage if isinstance(stage, FeedbackStage) else DeployedStage)(stage, name, dtype)  # type: ignore[arg-type]
