"""Batch norm over the batches of all processes, on the CPU, too."""

import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["CPUSyncBatchNorm", "synchronize_batch_norm"]


class CPUSyncBatchNorm(_BatchNorm):
    """What torch's SyncBatchNorm is for GPUs, with sums by a differentiable all-reduce.

    Mean and variance are those of all processes' samples, as one process with all of them would have, to rounding:
    two passes, first the mean, then the mean squared distance from it. The gradient takes into account that every
    process's samples enter into every other's.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalize [N, C, ...] over N and what follows C, of all processes in training mode."""
        if not (self.training and torch.distributed.is_initialized()):
            return super().forward(input)
        dims = [0, *range(2, input.ndim)]
        shape = [1, -1, *[1] * (input.ndim - 2)]
        x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        count = x.new_full((1,), x.numel() // x.shape[1])
        sums = all_reduce(torch.cat([x.sum(dims), count]))
        total = sums[-1].detach()
        mean = sums[:-1] / total
        centered = x - mean.view(shape)
        var = all_reduce(centered.square().sum(dims)) / total
        self._update_running_statistics(mean.detach(), var.detach(), total)
        y = centered * (var + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(input.dtype)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"CPUSyncBatchNorm needs [N, C, ...], got shape {list(input.shape)}")

    def _update_running_statistics(self, mean: Tensor, var: Tensor, total: Tensor) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        unbiased = var * (total / (total - 1))
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)


def synchronize_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """Let the model's batch norms use the batches of all processes.

    On a GPU that is timm's conversion to torch's SyncBatchNorm, on the CPU one to `CPUSyncBatchNorm`. The names of
    parameters and buffers stay.

    Raises:
        ValueError: If the model has batch norms of timm's with an activation inside, and the device is a CPU.
    """
    return convert_sync_batchnorm(model) if device.type == "cuda" else _for_cpu(model)


def _for_cpu(module: nn.Module) -> nn.Module:
    if isinstance(module, _BatchNorm):
        if type(module) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            raise ValueError(f"sync_bn: {type(module).__name__} cannot be synchronized on the CPU")
        new = CPUSyncBatchNorm(
            module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats
        )
        # The very tensors: whoever holds one keeps holding the model's.
        new._parameters, new._buffers = module._parameters, module._buffers
        return new.train(module.training)
    for name, child in module.named_children():
        module.add_module(name, _for_cpu(child))
    return module
