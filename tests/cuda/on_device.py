"""A training step on a device, and how two of them are compared."""

import copy

import torch
from torch import Tensor, nn

from timm_qkformer.execution import execution_policy

FLOAT64 = {"rtol": 1e-9, "atol": 1e-11}


class Step:
    """Output, gradients and buffers of one forward and backward pass on a copy of a module.

    Args:
        module: Left as it is.
        x: Input.
        autocast: Precision of autocast, if any.
        policy: See `execution_policy`.
    """

    def __init__(self, module: nn.Module, x: Tensor, autocast: torch.dtype | None = None, **policy: object) -> None:
        module = copy.deepcopy(module).train()
        x = x.detach().clone().requires_grad_()
        half = torch.autocast(x.device.type, autocast, enabled=autocast is not None)
        with execution_policy(**policy):
            with half:
                out = module(x * 1.0)
            weight = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
            (out * weight.to(out)).sum().backward()
        self.out = out.detach()
        self.grads = {"input": x.grad, **{name: p.grad for name, p in module.named_parameters()}}
        self.buffers = dict(module.named_buffers())

    def assert_close_to(self, other: "Step", **tolerance: float) -> None:
        for own, wanted in ((self.grads, other.grads), (self.buffers, other.buffers)):
            assert own.keys() == wanted.keys()
            for name, tensor in wanted.items():
                said = f"{name}: {{}}"
                torch.testing.assert_close(
                    own[name], tensor, **tolerance, msg=lambda text, said=said: said.format(text)
                )


def cosine(a: Tensor, b: Tensor) -> float:
    return torch.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0).item()
