"""Registered models from a table: entry points for timm that differ in a name, a line of text and default arguments."""

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from timm.models import model_entrypoint
from timm.models._registry import register_model
from torch import nn

from .loading import create


class Variant(NamedTuple):
    """A registered model: what its docstring says, its arguments unless the caller gives others, pixels of events."""

    text: str
    args: Mapping[str, Any]
    input_size: int | None = None


def register_variants(
    module: str,
    model_cls: type[nn.Module],
    filter_fn: Callable[[dict[str, Any], nn.Module], dict[str, Any]],
    variants: Mapping[str, Variant],
    stages: Callable[[Mapping[str, Any]], int] = lambda args: 1,
) -> None:
    """Register every variant with timm, as `register_model` does for a function written out.

    `neuron_args` of a variant are those of its default neurons: they do not go with another `neuron`.

    Args:
        module: `__name__` of the paper's module, which has its `default_cfgs` by now.
        model_cls: Class of the models.
        filter_fn: The module's `checkpoint_filter_fn`.
        variants: By registered name.
        stages: How many feature maps a model with these arguments has.
    """
    for name, variant in variants.items():
        setattr(
            sys.modules[module], name, register_model(_entry_point(module, name, model_cls, filter_fn, variant, stages))
        )


def _entry_point(
    module: str,
    name: str,
    model_cls: type[nn.Module],
    filter_fn: Callable[[dict[str, Any], nn.Module], dict[str, Any]],
    variant: Variant,
    stages: Callable[[Mapping[str, Any]], int],
) -> Callable[..., nn.Module]:
    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        defaults = dict(variant.args)
        if kwargs.get("neuron", "lif") != "lif":
            defaults.pop("neuron_args", None)
        args = {**defaults, **kwargs}
        return create(model_cls, name, pretrained, filter_fn, stages=stages(args), **args)

    build.__name__ = build.__qualname__ = name
    build.__module__ = module
    build.__doc__ = variant.text
    build.defaults = {**_defaults(model_cls), **variant.args}  # type: ignore[attr-defined]
    return build


def _defaults(model_cls: type[nn.Module]) -> dict[str, Any]:
    parameters = inspect.signature(model_cls.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def default_args(name: str) -> Mapping[str, Any]:
    """Arguments of a model that `register_variants` registered, where none are given; empty for other models."""
    known: Mapping[str, Any] = getattr(model_entrypoint(name), "defaults", {})
    return known
