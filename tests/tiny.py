"""Tiny models and inputs in float64, lively enough that their deeper neurons fire."""

import timm
import torch
from torch import Tensor, nn

from timm_qkformer.inference.weights import has_onednn
from timm_qkformer.neurons import SpikingNeuron

# The tiny model of each family.
NAMES = [
    name
    for name in timm.list_models("test_*")
    if timm.models.model_entrypoint(name).__module__.startswith("timm_qkformer")
]


class Constant(SpikingNeuron):
    """Neurons that fire as they are told, not as they are driven."""

    def __init__(self, value=1.0, v_threshold=1.0, device=None, dtype=None):
        super().__init__(v_threshold)
        self.value = value

    def forward(self, x):
        return torch.full_like(x, self.value)


def lively(module: nn.Module, bias: tuple[float, float] = (0.2, 1.2)) -> nn.Module:
    """Scale up the batch norms, draw their biases from a range, and turn to float64 and eval mode."""
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 1.0, 2.0)
            nn.init.uniform_(m.bias, *bias)
            m.running_mean.normal_(0, 0.2)
            m.running_var.uniform_(0.5, 1.5)
    return module.double().eval()


def tiny(name: str, **kwargs) -> nn.Module:
    return lively(timm.create_model(name, **{"num_classes": 7, **kwargs}))


def images(batch: int = 3, chans: int = 3, size: tuple[int, int] = (32, 32)) -> Tensor:
    return torch.randn(batch, chans, *size, dtype=torch.float64)


def rounds_currents(precision: str, products: str) -> bool:
    """Whether a deployed model rounds currents, besides weights: where the processor multiplies bfloat16, it does."""
    return (precision, products) == ("bf16", "dense") and has_onednn(torch.bfloat16, torch.device("cpu"))
