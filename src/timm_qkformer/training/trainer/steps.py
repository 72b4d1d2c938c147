"""Training for every T: time steps drawn for each batch, and a loss of each step by itself (TET).

Mixed time steps (arXiv 2503.17394) let one set of weights serve at several T. Temporal efficient training (TET, Deng et
al. 2022, arXiv 2202.11946) asks for the right answer at each step rather than of their mean alone; its second term
pulls all logits to a constant, so that none of them strays far.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

import torch
from timm.utils import unwrap_model
from torch import Tensor, nn

from ...models import SpikingTransformer
from ...neurons import run_with_state
from .settings import Settings
from .task import ModelTask, declares_loss


def check_steps(settings: Settings, model: nn.Module) -> None:
    """See that a model can be trained over its time steps as the settings ask (ValueError)."""
    for name in ("time_steps_random", "tet"):
        if getattr(settings, name) is not None and not isinstance(model, SpikingTransformer):
            raise ValueError(f"{name}={getattr(settings, name)!r}: model {settings.model} has no time steps")
    if settings.tet and declares_loss(model):
        raise ValueError(f"tet={settings.tet}: {type(model).__name__} declares a training loss of its own")
    if settings.time_steps_random is not None and settings.is_events:
        high, T = settings.time_steps_random[1], int(model.time_steps)  # type: ignore[arg-type]
        if high > T:
            raise ValueError(f"time_steps_random={settings.time_steps_random}: clips have no more than T = {T} frames")


def drawn_time_steps(settings: Settings, epoch: int, index: int) -> int | None:
    """T of a batch of an epoch, both from 0; None where it is the model's.

    It follows from the seed and the batch's number alone: the same in all processes, and after a run was resumed. No
    generator is drawn from, so that all other random numbers stay what they were.
    """
    if settings.time_steps_random is None:
        return None
    low, high = settings.time_steps_random
    if epoch < settings.time_steps_random_from:
        return 1
    digest = sha256(f"time steps {settings.seed} {epoch} {index}".encode()).digest()
    return low + int.from_bytes(digest, "big") % (high - low + 1)


@contextmanager
def shown_for(model: nn.Module, x: Tensor, time_steps: int | None) -> Iterator[Tensor]:
    """Within the block the model shows images for so many steps; of clips [B, T, ...] the first frames are given.

    What the model says of itself, and checkpoints hold, stays its own T.
    """
    if time_steps is None:
        yield x
        return
    inner: Any = unwrap_model(model)
    own = inner.time_steps
    inner.time_steps = time_steps
    try:
        yield x[:, :time_steps] if x.dim() == 5 else x
    finally:
        inner.time_steps = own


def step_logits(model: Any, sequence: Tensor) -> Tensor:
    """Logits of each step by itself, [T, B, K], of what a model's readout takes, [T, B, C, H, W].

    With average pooling their mean over T are the model's logits. Dropout before the classifier draws for each step.
    """
    maps, state = [], None
    for x in sequence.split(1):  # neurons of the readout go on, its mean is of this step alone
        y, state = run_with_state(model.readout, x, state=state)
        maps.append(y)
    logits: Tensor = model.forward_head(torch.cat(maps))
    return logits.unflatten(0, (len(maps), -1))


class StepsTask(ModelTask):
    """A task whose loss is that of the mean over T, and `weight` of it TET's.

    TET's is (1 - decay) of the mean of each step's loss and `decay` (lambda) of the logits' mean square distance from
    1.
    """

    def __init__(self, weight: float, decay: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.weight = weight
        self.decay = decay

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        model: Any = unwrap_model(self.trainable_module)
        sequences: list[Tensor] = []
        hook = model.readout.register_forward_pre_hook(lambda module, args: sequences.append(args[0]))
        try:
            output = self.trainable_module(input)
        finally:
            hook.remove()
        logits = step_logits(model, sequences[-1])
        own = torch.stack([self.criterion(of_step, target) for of_step in logits]).mean()
        if self.decay:
            own = (1.0 - self.decay) * own + self.decay * (logits - 1.0).square().mean()
        loss = (1.0 - self.weight) * self.criterion(output, target) + self.weight * own
        return {"loss": loss, "output": output}
