"""What is minimised: a criterion on the model's answer, or what the model itself declares.

A model that has a method `training_loss(x, target, criterion)` is trained with that instead of `criterion(model(x),
target)`: SpiLiFormer weighs the answers of two passes. timm's train.py knows nothing of it.
"""

from typing import Any

from timm.task import ClassificationTask
from timm.utils import unwrap_model
from torch import Tensor, nn


class ModelTask(ClassificationTask):
    """timm's classification task, with the model's own `training_loss` where it declares one."""

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Images or clips and labels (or soft targets) to {"loss": loss}, and "output" where the model is asked."""
        model: Any = unwrap_model(self.trainable_module)
        if not declares_loss(model):
            result: dict[str, Tensor] = super().forward(input, target)
            return result
        usual = model.__dict__.get("forward")

        def restore() -> None:
            model.__dict__.pop("forward", None)
            if usual is not None:
                model.__dict__["forward"] = usual

        def forward(x: Tensor) -> Any:
            restore()  # the loss may run the model
            return model.training_loss(x, target, self.criterion)

        # Through the wrapper's own forward pass: DistributedDataParallel prepares the gradients' exchange in it.
        model.__dict__["forward"] = forward
        try:
            return {"loss": self.trainable_module(input)}
        finally:
            restore()


def declares_loss(model: nn.Module) -> bool:
    """Whether a model has a training loss of its own."""
    return callable(getattr(model, "training_loss", None))


def require_compilable(model: nn.Module) -> None:
    """ValueError for a model whose loss cannot run compiled."""
    if declares_loss(model):
        raise ValueError(
            f"torchcompile: {type(model).__name__} declares a training loss of its own, which runs another way through "
            "the model than the compiled one; leave torchcompile out (neurons are compiled all the same)"
        )
