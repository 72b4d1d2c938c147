"""SpiLiFormer: Enhancing Spiking Transformers with Lateral Inhibition.

Paper: https://arxiv.org/abs/2503.15986 (ICCV 2025)
Authors' weights: https://huggingface.co/KirinZheng/SpiLiFormer

QKFormer's hierarchy whose attention inhibits: in the first two stages two groups of queries inhibit each other, and the
last stage runs twice, the second time with feedback from what it answered first (`layers.feedback`).
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Optional, Tuple, Union

from timm.models._registry import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..errors import check_choice, check_number
from ..layers import FeedbackSpec, FeedbackStage
from ..operators import feedback_operators
from .architecture import Architecture, hierarchy
from .base import IMAGENET_CFG, SpikingTransformer
from .checkpoints import StateDict, unwrap_checkpoint
from .loading import create
from .positions import HEAD, Stored, name_by_position
from .qkformer import (
    EMBEDDINGS,
    ReleaseNames,
    filter_by_names,
    has_unknown_names,
    release_order,
    stored_unit,
    with_own_embedding,
)

# What the release's three versions do differently between the passes.
FEEDBACKS = {
    "imagenet": FeedbackSpec(),
    "cifar10": FeedbackSpec(last_first=True, misread=True),
    "cifar100": FeedbackSpec(gain=2.0, last_first=True, norm_first=True),
}


class SpiLiFormer(SpikingTransformer):
    """Hierarchical spiking transformer with lateral inhibition; the last stage runs twice.

    Takes images [B, C, H, W], shown for `time_steps` steps, or event clips [B, T, C, H, W], which bring their own T.
    Each forward pass starts from rest, and no sample sees its batch mates. The answer is that of the second pass;
    `forward_passes` gives both.

    Args:
        patch_embed: Downsampling: "imagenet" (stride 16), "cifar" (stride 4), "events" (16) or "small" (8), or one of
            these as SPS, see `QKFormer`.
        attn: Token mixer, a registered operator; one, one per stage, or for a stage one per block. Those of the last
            stage must take feedback, as "fb_lidiff" and "a2os2a" do: `attn=("qkta", "qkta", "fb_lidiff")`.
        embed_dims: Width of each stage.
        depths: Blocks in each stage.
        num_heads: Attention heads, as `attn`.
        mlp_ratio: MLP width relative to the stage's, as `attn`.
        feedback: The release's version of what lies between the passes: "imagenet", "cifar10" or "cifar100".
        batch_coupled: Reproduce the release's last stage, in which samples influence their batch mates (its published
            accuracies were measured so). Off, each sample is on its own.
        **kwargs: `in_chans`, `num_classes`, `global_pool`, `time_steps`, `neuron`, `neuron_args`, `operator_args`,
            `drop_rate`, `proj_drop_rate`, `drop_path_rate`, `device` and `dtype`, see `SpikingTransformer`.

    Raises:
        ValueError: For an unknown embedding or feedback, operators that take none, or another argument outside its
            range.
    """

    def __init__(
        self,
        patch_embed: str = "imagenet",
        attn: Union[str, Sequence[Any]] = ("ff_lidiff", "ff_lidiff", "fb_lidiff"),
        embed_dims: Sequence[int] = (192, 384, 768),
        depths: Sequence[int] = (1, 2, 7),
        num_heads: Union[int, Sequence[Any]] = 12,
        mlp_ratio: Union[float, Sequence[Any]] = 4.0,
        feedback: str = "imagenet",
        batch_coupled: bool = False,
        **kwargs: Any,
    ) -> None:
        check_choice("patch_embed", patch_embed, EMBEDDINGS)
        check_choice("feedback", feedback, FEEDBACKS)
        embedding, options = EMBEDDINGS[patch_embed], {"batch_coupled": batch_coupled}
        skeleton = hierarchy(embedding, embed_dims, depths, num_heads, mlp_ratio, ("attn", attn), options, False)
        _check_feedback(attn, skeleton)
        super().__init__(skeleton._replace(feedback=FEEDBACKS[feedback]), **kwargs)
        self.embedding = patch_embed

    def forward_passes(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        """Images [B, C, H, W] or event clips [B, T, C, H, W] to the logits of the first pass and of the second."""
        stages = list(self.stages)
        last = stages.pop()
        assert isinstance(last, FeedbackStage)
        x = self.stem(x, self.time_steps)
        for stage in stages:
            x = stage(x)
        first, second = last.passes(x)
        return self.forward_head(self.readout(first)), self.forward_head(self.readout(second))

    def training_loss(
        self, x: Tensor, target: Tensor, criterion: Callable[[Tensor, Tensor], Tensor], beta: float = 0.8
    ) -> Tensor:
        """(1 - beta) criterion(first pass) + beta criterion(second pass), which the authors minimise.

        Raises:
            ValueError: For a `beta` outside of 0 to 1.
        """
        check_number("beta", beta, 0, 1)
        first, second = self.forward_passes(x)
        return (1 - beta) * criterion(first, target) + beta * criterion(second, target)


def _check_feedback(attn: Any, skeleton: Architecture) -> None:
    """Refuse operators of the last stage that take no feedback, with what to write in their place."""
    taking = feedback_operators()
    for block in skeleton.stages[-1].blocks:
        name = block.mixers[0].operator
        if name.lower() not in taking:
            first = (attn, attn) if isinstance(attn, str) else ("ff_lidiff", "ff_lidiff")
            raise ValueError(
                f"attn={attn!r}: {name!r} takes no feedback, and the last stage's operators must, as "
                f"{' and '.join(taking)} do: give one for each stage, such as attn={(*first, 'fb_lidiff')!r}"
            )


_PROMPT = re.compile(r"prompt(?:_2)?")
_DECODER = re.compile(r"(?:decoder\.0|decoder_stage_3)\.(\d+)\.decoder_(linear|bn)\.(\w+)")


_RELEASED = ("imagenet", "cifar")  # embeddings; the release's event models are others


def _feedback(model: SpikingTransformer) -> str:
    return f"stages.{len(model.stages) - 1}.feedback"


def _places(model: SpikingTransformer) -> list[int]:
    """Which of the model's decoders each of the release's is, which numbers them by block."""
    last: Any = model.stages[-1]
    count = len(last.blocks)
    return [count - 1 - i if last.feedback.last_first else i for i in range(count)]


class _ReleaseNames(ReleaseNames):
    """QKFormer's names and those of the feedback, whose decoders the release numbers by block."""

    def __init__(self, names: Sequence[str], model: SpikingTransformer) -> None:
        super().__init__(names, model)
        self.feedback = _feedback(model)
        self.places = _places(model)

    def __call__(self, name: str) -> Optional[str]:
        if _PROMPT.fullmatch(name):
            return f"{self.feedback}.{name}"
        if m := _DECODER.fullmatch(name):
            if int(m[1]) >= len(self.places):
                return None
            layer = {"linear": "conv", "bn": "bn"}[m[2]]
            return f"{self.feedback}.decoders.{self.places[int(m[1])]}.{layer}.{m[3]}"
        return super().__call__(name)


def _order(model: SpikingTransformer) -> Iterator[Stored]:
    """The release's tensors in its order, under the model's names: prompts first, decoders last, each norm first."""
    feedback = _feedback(model)
    for name in ("prompt", "prompt_2"):
        yield Stored(f"{feedback}.{name}", f"{feedback}.{name}")
    yield from (stored for stored in release_order(model) if stored.ours)  # STEP has no SpiLiFormer
    yield from HEAD
    for place in _places(model):
        yield from stored_unit(model, f"{feedback}.decoders.{place}", ("bn", "conv"))


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> StateDict:
    """Turn a checkpoint of the authors' release into this module's state dict; pass our own through unchanged.

    Takes plain state dicts and training checkpoints ("model" or "state_dict"), with or without DDP's "module."
    prefix, in the authors' ImageNet and CIFAR spellings or, where no name is known, by position. The number of classes
    and of input channels may differ from the model's: timm adapts those two afterwards.

    Raises:
        ValueError: Naming every missing, extra or misshapen tensor.
    """
    tensors = unwrap_checkpoint(state_dict)
    assert isinstance(model, SpiLiFormer)
    if model.embedding in _RELEASED and has_unknown_names(tensors, model):
        return name_by_position(tensors, model, list(_order(model)), linear=True)
    if not any(name.startswith("patch_embed") for name in tensors):
        return tensors
    matrices = {k: v[..., None] if _DECODER.fullmatch(k) and v.ndim == 2 else v for k, v in tensors.items()}
    return filter_by_names(matrices, model, _ReleaseNames(list(tensors), model))


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        **IMAGENET_CFG,
        "paper_ids": "arXiv:2503.15986",
        "paper_name": "SpiLiFormer: Enhancing Spiking Transformers with Lateral Inhibition",
        "origin_url": "https://huggingface.co/KirinZheng/SpiLiFormer",
        **kwargs,
    }


def _released(name: str, size: int = 224) -> dict[str, Any]:
    """Config of one of the authors' ImageNet checkpoints. Their accuracies were measured with coupled neurons, see
    `batch_coupled`. Evaluated as QKFormer's: resized to size / crop_pct, 224 / 256 up to 224 pixels and all above."""
    return _cfg(
        hf_hub_id="KirinZheng/SpiLiFormer",
        hf_hub_filename=f"checkpoint_spiliformer_{name}.pth",
        input_size=(3, size, size),
        pool_size=(size // 16, size // 16),
        crop_pct=0.875 if size <= 224 else 1.0,
    )


_CIFAR10: dict[str, Any] = {"num_classes": 10, "input_size": (3, 32, 32), "pool_size": (8, 8), "crop_pct": 1.0}

default_cfgs = generate_default_cfgs(
    {
        "spiliformer_10_768.t4_in1k": _released("T4_224"),  # published 85.82 %
        "spiliformer_10_768.t1_in1k": _released("T1_224"),  # 81.54 %
        "spiliformer_10_768.t4_ft288_in1k": _released("T4_288", 288),  # 86.62 %
        "spiliformer_10_768.t4_ft384_in1k": _released("T4_384", 384),  # 86.66 %
        "spiliformer_4_384.untrained": _cfg(**_CIFAR10),
        "test_spiliformer.untrained": _cfg(input_size=(3, 64, 64), pool_size=(4, 4), crop_pct=1.0),
    }
)

# Time steps that a tag's weights were trained with; the model has them, too, unless the caller asks for others.
_TAG_ARGS = {
    "spiliformer_10_768.t1_in1k": {"time_steps": 1},
    "spiliformer_10_768.t4_in1k": {"time_steps": 4},
    "spiliformer_10_768.t4_ft288_in1k": {"time_steps": 4},
    "spiliformer_10_768.t4_ft384_in1k": {"time_steps": 4},
}


def _create_spiliformer(
    variant: str, pretrained: bool, own: Mapping[str, Any], given: Mapping[str, Any]
) -> SpiLiFormer:
    args = with_own_embedding(own, given)
    return create(SpiLiFormer, variant, pretrained, checkpoint_filter_fn, _TAG_ARGS, **args)


@register_model
def spiliformer_10_768(pretrained: bool = False, **kwargs: Any) -> SpiLiFormer:
    """SpiLiFormer-10-768 for ImageNet: 69.10 M parameters, T = 4."""
    return _create_spiliformer("spiliformer_10_768", pretrained, {}, kwargs)


@register_model
def spiliformer_4_384(pretrained: bool = False, **kwargs: Any) -> SpiLiFormer:
    """SpiLiFormer-4-384 for CIFAR: 7.00 M parameters with 10 classes, T = 4.

    The release feeds back in another way for CIFAR-100 than for CIFAR-10: so does this model with 100 classes, unless
    `feedback` says which.
    """
    model_args = {
        "patch_embed": "cifar",
        "embed_dims": (96, 192, 384),
        "depths": (1, 1, 2),
        "num_heads": 8,
        "feedback": "cifar100" if kwargs.get("num_classes") == 100 else "cifar10",
    }
    return _create_spiliformer("spiliformer_4_384", pretrained, model_args, kwargs)


@register_model
def test_spiliformer(pretrained: bool = False, **kwargs: Any) -> SpiLiFormer:
    """A tiny SpiLiFormer, for tests."""
    model_args = {"embed_dims": (16, 32, 64), "depths": (1, 1, 2), "num_heads": 4}
    return _create_spiliformer("test_spiliformer", pretrained, model_args, kwargs)
