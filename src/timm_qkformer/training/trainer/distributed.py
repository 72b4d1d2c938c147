"""The group of processes, and batch norm over the batches of all of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from timm.utils.distributed import init_distributed_device_so
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm

from ...devices import device_name, require_cuda, usable_device
from ...errors import first_line


@dataclass(frozen=True)
class Processes:
    """This process, and the group that it is part of."""

    device: torch.device
    rank: int = 0  # in the group; process 0 writes the files
    local_rank: int = 0  # on its machine
    world_size: int = 1  # number of processes
    distributed: bool = False  # whether there is a group

    @property
    def primary(self) -> bool:
        """Whether this is process 0."""
        return self.rank == 0

    def facts(self) -> dict[str, Any]:
        """What is saved of them among a run's settings, in train.py's names."""
        return {**vars(self), "device": str(self.device)}

    def from_primary(self, value: Any) -> Any:
        """Process 0's value, in every process."""
        if not self.distributed:
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values, src=0)
        return values[0]

    def of_all(self, value: Any) -> list[Any]:
        """Every process's value, by rank, in every process."""
        if not self.distributed:
            return [value]
        values = [None] * self.world_size
        torch.distributed.all_gather_object(values, value)
        return values

    def sum(self, value: float) -> float:
        """Sum over the processes, in float32."""
        if not self.distributed:
            return value
        total = torch.tensor([value], dtype=torch.float32, device=self.device)
        torch.distributed.all_reduce(total)
        return float(total)


@contextmanager
def join_processes(device: str) -> Iterator[Processes]:
    """Join the group that torchrun started, if it did; ValueError if the device is not there."""
    device = device_name(device)
    require_cuda(device)
    try:
        facts = init_distributed_device_so(device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r} cannot be used: {first_line(error)}") from error
    try:
        rank, joined = facts["global_rank"], usable_device(facts["device"])
        yield Processes(joined, rank, facts["local_rank"], facts["world_size"], facts["distributed"])
    finally:
        if facts["distributed"]:
            torch.distributed.destroy_process_group()


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
    """Let the model's batch norms use the batches of all processes; names of parameters and buffers stay.

    On a GPU that is timm's conversion to torch's SyncBatchNorm, on the CPU one to `CPUSyncBatchNorm`, which is a
    ValueError for timm's batch norms with an activation inside.
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
