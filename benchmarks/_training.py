"""What the benchmarks of training share: a training step, and what it keeps for its backward pass."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_qkformer.execution import execution_policy


@contextmanager
def counting_what_is_kept(model: nn.Module) -> Iterator[list[int]]:
    """Yields the bytes of each piece of memory that autograd keeps for the backward pass, parameters aside."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}  # kept as views, too
    kept: dict[int, Tensor] = {}  # by address; the tensors stay, so that no address is used twice
    sizes: list[int] = []

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        address = storage.data_ptr()
        if address not in parameters and address not in kept:
            kept[address] = x
            sizes.append(storage.nbytes())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield sizes


class TrainingStep:
    """Forward pass, cross-entropy, backward pass and AdamW, each call on the same batch.

    Args:
        model: Maps `images` to logits.
        images, labels: The batch.
        half: bfloat16 autocast.
        neurons, kernels, packed: See `execution_policy`.
        stateful: The model has stateful neurons of spikingjelly, to be reset before each forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        half: bool = False,
        neurons: str = "auto",
        kernels: str = "auto",
        packed: bool = True,
        stateful: bool = False,
    ) -> None:
        self.model = model.train()
        self.images, self.labels = images, labels
        self.half, self.stateful = half, stateful
        self.policy = {"neurons": neurons, "kernels": kernels, "packed": packed}
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def loss(self) -> Tensor:
        if self.stateful:
            from spikingjelly.activation_based import functional

            functional.reset_net(self.model)
        half = torch.autocast(self.images.device.type, torch.bfloat16, enabled=self.half)
        with execution_policy(**self.policy), half:
            return F.cross_entropy(self.model(self.images), self.labels)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        loss = self.loss()
        with execution_policy(**self.policy):
            loss.backward()
        self.optimizer.step()

    def megabytes_kept(self) -> float:
        """MB (10^6 bytes) that one image's forward pass keeps for the backward pass."""
        with counting_what_is_kept(self.model) as sizes:
            self.loss()
        return sum(sizes) / len(self.images) / 1e6


def batch(size: int, side: int, channels: int = 3, classes: int = 10, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Random images and labels."""
    images = torch.randn(size, channels, side, side, device=device)
    return images, torch.randint(0, classes, (size,), device=device)
