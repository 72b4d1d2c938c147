"""How every model of this package is built: timm's builder, with what all of our models have in common."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Optional, TypeVar

from timm.models._builder import build_model_with_cfg, resolve_pretrained_cfg
from torch import nn

from ._weights import loading_weights

__all__ = ["create"]

ModelT = TypeVar("ModelT", bound=nn.Module)


def create(
    model_cls: type[ModelT],
    variant: str,
    pretrained: bool,
    filter_fn: Callable[[dict[str, Any], nn.Module], dict[str, Any]],
    tag_args: Optional[Mapping[str, Mapping[str, Any]]] = None,
    **kwargs: Any,
) -> ModelT:
    """Build a registered model, with its weights if `pretrained`.

    Args:
        model_cls: Class of the model.
        variant: Registered name, without a tag.
        pretrained: Load the weights of the pretrained tag.
        filter_fn: The model module's `checkpoint_filter_fn`.
        tag_args: Model arguments that belong to a pretrained tag, such as the time steps that its weights were
            trained with, by "variant.tag". They give way to arguments in `kwargs`.
        **kwargs: Arguments of the model and of timm's `build_model_with_cfg`.

    Raises:
        WeightsError: If the weights cannot be downloaded or read, with the other ways to have them.
    """
    cfg = resolve_pretrained_cfg(
        variant, kwargs.pop("pretrained_cfg", None), kwargs.pop("pretrained_cfg_overlay", None)
    )
    model_args = dict((tag_args or {}).get(f"{variant}.{cfg.tag}", {}), **kwargs)
    with loading_weights(variant, cfg, kwargs.get("cache_dir")) if pretrained else nullcontext():
        return build_model_with_cfg(
            model_cls,
            variant,
            pretrained,
            pretrained_cfg=cfg,  # timm resolves it once more, which changes nothing
            pretrained_filter_fn=filter_fn,
            feature_cfg={"out_indices": (0, 1, 2), "feature_cls": "getter"},
            **model_args,
        )
