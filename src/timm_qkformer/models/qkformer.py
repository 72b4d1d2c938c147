"""QKFormer: Hierarchical Spiking Transformer using Q-K Attention.

Paper: https://arxiv.org/abs/2403.16552 (NeurIPS 2024)
Authors' code: https://github.com/zhouchenlin2096/QKFormer

Q-K attention where there are many tokens, spiking self-attention where there are few, in a hierarchy of three stages.
"qkformer_*" add activations (spikes), "qkformer_*_ms" add membrane potentials, the paper's eq. 17.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional, Union

from timm.models._registry import generate_default_cfgs, register_model
from torch import nn

from ..errors import check_choice
from .architecture import Embedding, EmbedSpec, hierarchy
from .base import CIFAR10_CFG, EVENTS_CFG, IMAGENET_CFG, SpikingTransformer
from .checkpoints import (
    ADAPTABLE,
    CLASSIFIER,
    MAXFORMER_CHECKPOINTS,
    StateDict,
    UnitNames,
    as_conv2d,
    check_against_model,
    rename_tensors,
    translate_release,
    unwrap_checkpoint,
    without_constants,
)
from .flat_checkpoints import block_parts, neuron_name
from .loading import PendingCfg, create
from .positions import HEAD, Stored, name_by_position, neuron_constants

_logger = logging.getLogger(__name__)

SPEDS = {
    # strides 2 | 4, 8, 16
    "imagenet": Embedding(True, (EmbedSpec((True, False)), EmbedSpec((True, False)), EmbedSpec((True, False)))),
    # strides 1 | 1, 2, 4
    "cifar": Embedding(False, (EmbedSpec((False,)), EmbedSpec((False, True)), EmbedSpec((False, True)))),
    # strides 1 | 2, 4, 8
    "small": Embedding(False, (EmbedSpec((True,)), EmbedSpec((True, False)), EmbedSpec((True, False)))),
    # strides 2 | 2, 4, 8. What the stem's few spikes lose of a pixel is lost to all: it has twice the channels.
    "early": Embedding(True, (EmbedSpec((False,)), EmbedSpec((True, False)), EmbedSpec((True, False))), stem_ratio=1.0),
    # strides 1 | 2, 8, 16
    "events": Embedding(
        False,
        (
            EmbedSpec((True,), shortcut=False),
            EmbedSpec((True, True), hidden_ratio=0.5),
            EmbedSpec((False, True)),
        ),
    ),
}


# The same strides as Spikformer's SPS has them.
_SPS = {f"sps_{name}": embedding._replace(plain=True) for name, embedding in SPEDS.items()}

EMBEDDINGS = {**SPEDS, **_SPS, "sps": _SPS["sps_cifar"]}


def with_own_embedding(own: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a registered model: its own, and above them the caller's, whose "sps" has the strides of its own
    embedding."""
    args = {**own, **given}
    if given.get("patch_embed") == "sps":
        args["patch_embed"] = f"sps_{own.get('patch_embed', 'imagenet')}"
    return args


class QKFormer(SpikingTransformer):
    """Hierarchical spiking transformer (HST) with Q-K attention.

    Takes images [B, C, H, W], shown for `time_steps` steps, or event clips [B, T, C, H, W], which bring their own T.
    Each forward pass starts from rest, and no sample sees its batch mates.

    Args:
        patch_embed: Downsampling: "imagenet" (stride 16), "cifar" (stride 4), "events" (stride 16); ours, for small
            images on little hardware, "small" (stride 8) and "early" (the same, halved in the stem already, which is
            twice as wide); or "sps_" before one of these, its convolutions as Spikformer's SPS has them, without
            shortcuts, in the paper's Table 4 (which says no more: the form is ours). "sps" is "sps_cifar" here;
            `timm.create_model` takes it for that of the model's own embedding.
        attn: Token mixer, a registered operator: "qkta", "qkca", "ssa", ...; one, one per stage, or for a stage one per
            block. "a+b" is a block of two.
        embed_dims: Width of each stage.
        depths: Blocks in each stage.
        num_heads: Attention heads, as `attn`.
        mlp_ratio: MLP width relative to the stage's, as `attn`.
        membrane_shortcut: Residual connections between membrane potentials (paper, eq. 17) instead of spike sums. The
            head then has neurons of its own, see `forward_features`.
        batch_coupled: Reproduce the release's self-attention, in which samples influence their batch mates (its
            published accuracies were measured so). Off, each sample is on its own. Not with `membrane_shortcut`.
        **kwargs: `in_chans`, `num_classes`, `global_pool`, `time_steps`, `neuron`, `neuron_args`, `operator_args`,
            `drop_rate`, `proj_drop_rate`, `drop_path_rate`, `device` and `dtype`, see `SpikingTransformer`.

    Raises:
        ValueError: For an unknown embedding or operator, or another argument outside its range.
    """

    def __init__(
        self,
        patch_embed: str = "imagenet",
        attn: Union[str, Sequence[Any]] = ("qkta", "qkta", "ssa"),
        embed_dims: Sequence[int] = (96, 192, 384),
        depths: Sequence[int] = (1, 2, 7),
        num_heads: Union[int, Sequence[Any]] = 6,
        mlp_ratio: Union[float, Sequence[Any]] = 4.0,
        membrane_shortcut: bool = False,
        batch_coupled: bool = False,
        **kwargs: Any,
    ) -> None:
        check_choice("patch_embed", patch_embed, EMBEDDINGS)
        options = {"batch_coupled": batch_coupled}
        operators = ("attn", attn)
        embedding = EMBEDDINGS[patch_embed]
        super().__init__(
            hierarchy(embedding, embed_dims, depths, num_heads, mlp_ratio, operators, options, membrane_shortcut),
            **kwargs,
        )
        self.embedding = patch_embed


_RELEASE_EMBED = re.compile(r"patch_embed(\d)\.proj(\d*)_(conv|bn)\.(\w+)")
_RELEASE_SHORTCUT = re.compile(r"patch_embed(\d)\.proj_res_(conv|bn)\.(\w+)")
_RELEASE_ATTN = re.compile(r"stage(\d)\.(\d+)\.(?:tssa|ssa|attn)\.([qkv]|proj)_(conv|bn)\.(\w+)")
_RELEASE_MLP = re.compile(r"stage(\d)\.(\d+)\.mlp\.(?:fc|mlp)([12])_(conv|bn)\.(\w+)")
_STEP_MLP = re.compile(r"(stage\d\.\d+\.mlp\.fc)_(conv|bn)([12])(\.\w+)")


class ReleaseNames:
    """The release's tensor names in terms of ours: ImageNet, CIFAR and event spellings.

    STEP (github.com/Fancyssc/STEP) has the CIFAR release's names but for those in its MLPs.

    The release numbers only the stages that have blocks, counts the event models' first pooling to the stem, and
    numbers convolutions within an embedding with gaps; so what counts is each one's position in the order.
    """

    def __init__(self, names: Sequence[str], model: SpikingTransformer) -> None:
        found = {m.group(1, 2) for m in map(_RELEASE_EMBED.fullmatch, names) if m}
        order = sorted(found, key=lambda found: (found[0], int(found[1] or 0)))
        convs = ["stem"]
        model_stages: list[Any] = list(model.stages)
        for i, stage in enumerate(model_stages):
            convs += [f"stages.{i}.embed.main.{j}" for j in range(len(stage.embed.main))]
        self.convs = dict(zip(order, convs, strict=False))  # leftovers are reported by name
        shortcuts = [i for i, stage in enumerate(model_stages) if stage.embed.shortcut is not None]
        self.shortcuts = {str(n + 1): f"stages.{i}.embed.shortcut" for n, i in enumerate(shortcuts)}
        stages = [i for i, stage in enumerate(model_stages) if len(stage.blocks) > 0]
        self.stages = {str(n + 1): f"stages.{i}.blocks" for n, i in enumerate(stages)}

    def __call__(self, name: str) -> Optional[str]:
        if name in CLASSIFIER:
            return name
        name = _STEP_MLP.sub(r"\1\3_\2\4", name)
        if m := _RELEASE_EMBED.fullmatch(name):
            unit, rest = self.convs.get((m[1], m[2])), f"{m[3]}.{m[4]}"
        elif m := _RELEASE_SHORTCUT.fullmatch(name):
            unit, rest = self.shortcuts.get(m[1]), f"{m[2]}.{m[3]}"
        elif m := _RELEASE_ATTN.fullmatch(name):
            unit, rest = self.stages.get(m[1]), f"{m[2]}.attn.{m[3]}.{m[4]}.{m[5]}"
        elif m := _RELEASE_MLP.fullmatch(name):
            unit, rest = self.stages.get(m[1]), f"{m[2]}.mlp.fc{m[3]}.{m[4]}.{m[5]}"
        else:
            return None
        return f"{unit}.{rest}" if unit else None

    def spelling(self, names: Iterable[str], model: SpikingTransformer) -> dict[str, str]:
        """The release's spelling of our names, also of those missing from `names` if any of their unit is there."""
        original = {self(name) or name: name for name in names}
        units = {}
        for ours, theirs in original.items():
            if ours.count(".") > 1:
                unit, layer, rest = ours.rsplit(".", 2)
                units[unit] = theirs.removesuffix(f"_{layer}.{rest}")
        for ours in model.state_dict().keys() - original.keys():
            unit, *ending = ours.rsplit(".", 2)
            if unit in units:
                original[ours] = f"{units[unit]}_{'.'.join(ending)} ({ours})"
        return original


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> StateDict:
    """Turn a checkpoint of the authors' release into this module's state dict; pass our own through unchanged.

    Takes plain state dicts and training checkpoints ("model" or "state_dict"), with or without DDP's "module."
    prefix, by name or, where no name is known, by position: the authors' ImageNet, CIFAR and event spellings or, for a
    model with membrane shortcuts, the ImageNet checkpoints of the Max-Former authors. STEP's CIFAR checkpoints are
    taken, too; the thresholds that they hold must be the model's. The number of classes and of input channels may
    differ from the model's: timm adapts those two afterwards.

    Raises:
        ValueError: Naming every missing, extra or misshapen tensor.
    """
    assert isinstance(model, QKFormer)
    tensors = unwrap_checkpoint(state_dict)
    if model.embedding in RELEASED and not model.membrane_shortcut and has_unknown_names(tensors, model):
        tensors = name_by_position(tensors, model, [*release_order(model, RELEASED[model.embedding]), *HEAD])
    tensors = without_constants(tensors, model)
    if model.membrane_shortcut:
        return _filter_membrane(tensors, model)
    if not any(name.startswith("patch_embed") for name in tensors):
        return tensors
    if any(name.startswith("patch_embed1.rpe_") for name in tensors):
        raise ValueError(
            "these are weights of MS-QKFormer, whose shortcuts join membrane potentials: create a qkformer_hst10_*_ms "
            "model, or any other with membrane_shortcut=True"
        )
    return filter_by_names(tensors, model, ReleaseNames(list(tensors), model))


# Embeddings of which there are checkpoints, and whether each stands in front of its stage's blocks, as the event models
# have it, not in front of all blocks.
RELEASED = {"imagenet": False, "cifar": False, "events": True}


def has_unknown_names(tensors: StateDict, model: SpikingTransformer) -> bool:
    """Whether a checkpoint's names are neither the model's nor a release's; the classifier's says nothing."""
    known = model.state_dict().keys() - set(CLASSIFIER)
    return not any(name in known or name.startswith("patch_embed") for name in tensors)


def release_order(model: SpikingTransformer, in_turn: bool = False) -> Iterator[Stored]:
    """The release's tensors in its order but for the classifier's, under the model's names, and STEP's constants.

    Args:
        model: The model.
        in_turn: See `RELEASED`.
    """
    stages: list[Any] = list(model.stages)
    embeddings: list[list[Stored]] = []
    blocks: list[list[Stored]] = []
    for i, stage in enumerate(stages):
        path = f"stages.{i}.embed"
        units = [*(["stem"] if i == 0 else []), *(f"{path}.main.{j}" for j in range(len(stage.embed.main)))]
        if getattr(stage.embed, "shortcut", None) is not None:
            units.append(f"{path}.shortcut")
        embeddings.append([s for unit in units for s in (*stored_unit(model, unit), *neuron_constants(unit))])
        blocks.append([])
        for j, block in enumerate(stage.blocks):
            path = f"stages.{i}.blocks.{j}"
            for (template, *_), unit in block_parts(block):
                if unit == f"attn.{block.attn.output}":
                    blocks[i] += neuron_constants(f"{path}.attn.attn_lif")
                blocks[i] += [
                    *stored_unit(model, f"{path}.{unit}"),
                    *neuron_constants(f"{path}.{neuron_name(template)}"),
                ]
    if in_turn:
        parts = [part for pair in zip(embeddings, blocks, strict=True) for part in pair]
    else:
        parts = embeddings + blocks
    for part in parts:
        yield from part


def stored_unit(model: nn.Module, path: str, layers: Sequence[str] = ("conv", "bn")) -> Iterator[Stored]:
    """The tensors of a convolution with batch norm, under the model's names."""
    for layer in layers:
        for key in model.get_submodule(f"{path}.{layer}").state_dict():
            yield Stored(f"{path}.{layer}.{key}", f"{path}.{layer}.{key}")


def filter_by_names(tensors: StateDict, model: SpikingTransformer, names: ReleaseNames) -> StateDict:
    """The tensors of a release as the model's, strictly by their names.

    Raises:
        ValueError: Naming every missing, extra or misshapen tensor.
    """
    renamed = as_conv2d(rename_tensors(tensors, names))
    original_names = names.spelling(tensors, model)
    check_against_model(
        renamed,
        model,
        original_names,
        adaptable=ADAPTABLE,
        optional=CLASSIFIER,
    )
    return renamed


_MEMBRANE_LATER_EMBED: tuple[UnitNames, ...] = (
    ("proj3_conv", "proj3_bn"),
    ("proj4_conv", "proj4_bn"),
    ("proj_res_conv", "proj_res_bn"),
)
_MEMBRANE_EMBEDS: tuple[tuple[UnitNames, ...], ...] = (
    (
        ("proj_conv", "proj_bn"),
        ("proj_conv1", "proj_bn1"),
        ("proj_conv2", "proj_bn2"),
        ("rpe_conv", "rpe_bn"),
    ),
    _MEMBRANE_LATER_EMBED,
    _MEMBRANE_LATER_EMBED,
)


def _filter_membrane(tensors: StateDict, model: QKFormer) -> StateDict:
    """`checkpoint_filter_fn` for models with membrane shortcuts, whose tensors are shaped as those without."""
    if model.embedding != "imagenet":  # the release has none of the others
        return tensors
    sew_names = ReleaseNames(list(tensors), model)
    if all(sew_names(name) is not None for name in tensors):
        _logger.warning(
            "The checkpoint's names are those of QKFormer's release. If it was trained without membrane shortcuts, "
            "load it into a model without them: here its tensors fit, but its weights do not."
        )
    return translate_release(tensors, model, _MEMBRANE_EMBEDS)


def _cfg(url: str = "", **kwargs: Any) -> dict[str, Any]:
    return {
        "url": url,
        **IMAGENET_CFG,
        "paper_ids": "arXiv:2403.16552",
        "paper_name": "QKFormer: Hierarchical Spiking Transformer using Q-K Attention",
        "origin_url": "https://github.com/zhouchenlin2096/QKFormer",
        **kwargs,
    }


def _pending(model_and_tag: str, size: int = 224) -> PendingCfg:
    """Config of one of the authors' ImageNet checkpoints, which nobody has uploaded yet.

    Their evaluation resizes to size / crop_pct and crops the centre, 224 / 256 up to 224 pixels and all above.
    Their accuracies were measured with coupled neurons, see `batch_coupled`. The release states no licence.
    """
    return PendingCfg(
        **_cfg(
            hf_hub_id=f"timm-qkformer/{model_and_tag}",
            hf_hub_filename="model.safetensors",
            input_size=(3, size, size),
            pool_size=(size // 16, size // 16),
            crop_pct=0.875 if size <= 224 else 1.0,
        )
    )


def _shipped(model_and_tag: str, **kwargs: Any) -> dict[str, Any]:
    """Config of weights that come with the package, in half precision; see docs/weights.md."""
    return _cfg(
        file=str(Path(__file__).parent / "weights" / f"{model_and_tag}.safetensors"),
        license="apache-2.0",
        **kwargs,
    )


def _membrane_cfg(asset: str) -> dict[str, Any]:
    """Config of a checkpoint from the Max-Former authors' release, which states no licence."""
    return _cfg(
        MAXFORMER_CHECKPOINTS + asset,
        paper_ids=("arXiv:2403.16552", "arXiv:2505.18608"),
        origin_url="https://github.com/bic-L/MaxFormer",
    )


_CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

default_cfgs = generate_default_cfgs(
    {
        "qkformer_hst10_384.in1k": _pending("qkformer_hst10_384.in1k"),
        "qkformer_hst10_512.in1k": _pending("qkformer_hst10_512.in1k"),
        "qkformer_hst10_768.in1k": _pending("qkformer_hst10_768.in1k"),
        "qkformer_hst10_768.ft288_in1k": _pending("qkformer_hst10_768.ft288_in1k", 288),
        "qkformer_hst10_768.ft384_in1k": _pending("qkformer_hst10_768.ft384_in1k", 384),
        "qkformer_hst4_384.untrained": _cfg(**CIFAR10_CFG),
        "qkformer_hst3_192.cifar10": _shipped(
            "qkformer_hst3_192.cifar10",
            label_names=_CIFAR10_CLASSES,
            notes=("anytime: confidence 0.7971, T = 4",),  # chosen on training images, see docs/streaming.md
            **{**CIFAR10_CFG, "pool_size": (4, 4)},
        ),
        "qkformer_hst2_224.cifar10": _shipped(
            "qkformer_hst2_224.cifar10",
            label_names=_CIFAR10_CLASSES,
            **{**CIFAR10_CFG, "pool_size": (4, 4)},
        ),
        "qkformer_hst3_128.nmnist": _shipped(
            "qkformer_hst3_128.nmnist",
            **{**EVENTS_CFG, "input_size": (2, 34, 34), "pool_size": (3, 3)},
        ),
        "qkformer_hst2_256.untrained": _cfg(**EVENTS_CFG),
        "qkformer_hst10_384_ms.t4_in1k": _membrane_cfg("ms_qk_10-384_T4.pth.tar"),
        "qkformer_hst10_512_ms.untrained": _cfg(),
        "qkformer_hst10_768_ms.t1_in1k": _membrane_cfg("ms_qk_10-768_T1.pth.tar"),
        "test_qkformer.digits": _shipped(
            "test_qkformer.digits",
            label_names=tuple("0123456789"),
            **{**CIFAR10_CFG, "pool_size": (2, 2), "mean": (0.3, 0.3, 0.3), "std": (0.35, 0.35, 0.35)},
        ),
        "test_qkformer_ms.untrained": _cfg(input_size=(3, 64, 64), pool_size=(4, 4), crop_pct=1.0),
    }
)

# Time steps that a tag's weights were trained with; the model has them, too, unless the caller asks for others.
_TAG_ARGS = {
    "qkformer_hst10_384_ms.t4_in1k": {"time_steps": 4},
    "qkformer_hst10_768_ms.t1_in1k": {"time_steps": 1},
}


def _create_qkformer(variant: str, pretrained: bool, own: Mapping[str, Any], given: Mapping[str, Any]) -> QKFormer:
    args = with_own_embedding(own, given)
    return create(QKFormer, variant, pretrained, checkpoint_filter_fn, _TAG_ARGS, **args)


_HST10_384: dict[str, Any] = {"embed_dims": (96, 192, 384), "num_heads": 6, "depths": (1, 2, 7)}
_HST10_512: dict[str, Any] = {"embed_dims": (128, 256, 512), "num_heads": 8, "depths": (1, 2, 7)}
_HST10_768: dict[str, Any] = {"embed_dims": (192, 384, 768), "num_heads": 12, "depths": (1, 2, 7)}
_TEST: dict[str, Any] = {
    "embed_dims": (16, 32, 64),
    "depths": (1, 1, 2),
    "num_heads": 4,
    "attn": ("qkta", "qkca", "ssa"),
}


@register_model
def qkformer_hst10_384(pretrained: bool = False, **kwargs: Any) -> QKFormer:
    """HST-10-384 for ImageNet: 16.47 M parameters, T = 4."""
    return _create_qkformer("qkformer_hst10_384", pretrained, _HST10_384, kwargs)


@register_model
def qkformer_hst10_512(pretrained: bool = False, **kwargs: Any) -> QKFormer:
    """HST-10-512 for ImageNet: 29.08 M parameters, T = 4."""
    return _create_qkformer("qkformer_hst10_512", pretrained, _HST10_512, kwargs)


@register_model
def qkformer_hst10_768(pretrained: bool = False, **kwargs: Any) -> QKFormer:
    """HST-10-768 for ImageNet: 64.96 M parameters, T = 4."""
    return _create_qkformer("qkformer_hst10_768", pretrained, _HST10_768, kwargs)


@register_model
def qkformer_hst4_384(pretrained: bool = False, **kwargs: Any) -> QKFormer:
    """HST-4-384 for CIFAR: 6.71 M parameters with 10 classes, T = 4."""
    model_args = {"patch_embed": "cifar", "embed_dims": (96, 192, 384), "depths": (1, 1, 2), "num_heads": 8}
    return _create_qkformer("qkformer_hst4_384", pretrained, model_args, kwargs)


@register_model
def qkformer_hst2_256(pretrained: bool = False, **kwargs: Any) -> QKFormer:
    """HST-2-256 for event cameras: 1.50 M parameters with 10 classes, T = 16.

    The first stage has no blocks. The release's DVS128 Gesture model has `mlp_ratio=4` and 11 classes.
    """
    model_args = {
        "patch_embed": "events",
        "embed_dims": (32, 128, 256),
        "depths": (0, 1, 1),
        "num_heads": 16,
        "mlp_ratio": 1.0,
        "time_steps": 16,
    }
    return _create_qkformer("qkformer_hst2_256", pretrained, model_args, kwargs)


@register_model
def qkformer_hst10_384_ms(pretrained: bool = False, **kwargs: Any) -> QKFormer:
    """HST-10-384 for ImageNet with membrane shortcuts: 16.47 M parameters, T = 4."""
    model_args = dict(_HST10_384, membrane_shortcut=True)
    return _create_qkformer("qkformer_hst10_384_ms", pretrained, model_args, kwargs)


@register_model
def qkformer_hst10_512_ms(pretrained: bool = False, **kwargs: Any) -> QKFormer:
    """HST-10-512 for ImageNet with membrane shortcuts: 29.08 M parameters, T = 4."""
    model_args = dict(_HST10_512, membrane_shortcut=True)
    return _create_qkformer("qkformer_hst10_512_ms", pretrained, model_args, kwargs)


@register_model
def qkformer_hst10_768_ms(pretrained: bool = False, **kwargs: Any) -> QKFormer:
    """HST-10-768 for ImageNet with membrane shortcuts: 64.96 M parameters, T = 1 as its weights have."""
    model_args = dict(_HST10_768, membrane_shortcut=True)
    return _create_qkformer("qkformer_hst10_768_ms", pretrained, model_args, kwargs)


@register_model
def qkformer_hst3_192(pretrained: bool = False, **kwargs: Any) -> QKFormer:
    """HST-3-192 for CIFAR on one CPU: 1.24 M parameters with 10 classes, T = 4. Ours, not the paper's.

    16 x 16 tokens in the first stage, where the paper's HST-4-384 has 32 x 32. Neurons fire at half the paper's
    threshold: trained with one or two time steps, most would keep silent at first, and learn slowly.
    """
    model_args = {
        "patch_embed": "small",
        "embed_dims": (48, 96, 192),
        "depths": (1, 1, 1),
        "num_heads": 4,
        "neuron_args": {"v_threshold": 0.5, "surrogate": "atan"},
    }
    return _create_qkformer("qkformer_hst3_192", pretrained, model_args, kwargs)


@register_model
def qkformer_hst2_224(pretrained: bool = False, **kwargs: Any) -> QKFormer:
    """HST-2-224 for CIFAR on one CPU: 1.88 M parameters with 10 classes. Ours, not the paper's.

    Wide convolutions where the paper has more blocks: in hours on a CPU they learn more, see docs/results.md. I-LIF
    neurons: one time step of up to four spikes, where the others have four steps. Those of attention sum up many times
    the spikes that binary ones would, and have thresholds above which they tell tokens apart. Another `neuron` has its
    own usual thresholds.
    """
    model_args = {
        "patch_embed": "early",
        "embed_dims": (96, 160, 224),
        "depths": (0, 1, 1),
        "num_heads": 4,
        "mlp_ratio": 2.0,
        "neuron": "ilif",
        "time_steps": 1,
    }
    if kwargs.get("neuron", "ilif") == "ilif":
        attn_neurons = {name: {"attn_neuron": {"v_threshold": th}} for name, th in (("qkta", 20.0), ("ssa", 128.0))}
        model_args["neuron_args"] = {"v_threshold": 1.2}
        model_args["operator_args"] = {name: {"inner_args": args} for name, args in attn_neurons.items()}
    return _create_qkformer("qkformer_hst2_224", pretrained, model_args, kwargs)


@register_model
def qkformer_hst3_128(pretrained: bool = False, **kwargs: Any) -> QKFormer:
    """HST-3-128 for small pictures of event cameras: 0.56 M parameters, T = 8. Ours, not the paper's."""
    model_args = {"embed_dims": (32, 64, 128), "depths": (1, 1, 1), "num_heads": 4, "time_steps": 8}
    return _create_qkformer("qkformer_hst3_128", pretrained, model_args, kwargs)


@register_model
def test_qkformer(pretrained: bool = False, **kwargs: Any) -> QKFormer:
    """A tiny HST with every kind of layer, for tests; its weights know scikit-learn's handwritten digits."""
    return _create_qkformer("test_qkformer", pretrained, _TEST, kwargs)


@register_model
def test_qkformer_ms(pretrained: bool = False, **kwargs: Any) -> QKFormer:
    """A tiny HST with membrane shortcuts and every kind of layer, for tests."""
    model_args = dict(_TEST, membrane_shortcut=True)
    return _create_qkformer("test_qkformer_ms", pretrained, model_args, kwargs)
