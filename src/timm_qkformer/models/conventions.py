"""What other libraries ask for by name, said once: layers for attribution, for adapters, and FX's leaves; and what
`features_only` can give."""

from typing import Any

from ..layers import MembraneReadout
from ..neurons import SpikingNeuron
from ..operators.tim import TemporalInteraction

# Target layer of class activation maps (captum's LayerGradCam, pytorch-grad-cam): it puts out the map [B, C, H, W] that
# the classifier pools. Stages and what is in them put out sequences [T, B, C, H, W], whose first dimension these
# libraries take for samples, without a word.
ATTRIBUTION_LAYER = "readout"

# For peft's `target_modules`: the 1x1 convolutions of attention and MLPs, as a pattern of whole names.
PEFT_TARGET_MODULES = r".*\.blocks\.\d+\.(attn\.\w+|mlp\.fc[12])\.conv"

# For tracers of torch.fx: what decides by numbers or runs a loop over time, to be kept as one node.
FX_LEAF_MODULES = (SpikingNeuron, MembraneReadout, TemporalInteraction)

_FEATURE_CLASSES = ("getter", "FeatureGetterNet")  # of timm, that ask the model rather than its modules


def check_features_only(levels: int, feature_cls: Any, out_indices: Any) -> None:
    """Refuse arguments of `features_only=True` that would give sequences, or maps that there are not.

    Args:
        levels: Feature maps of the model, pooled ones among them.
        feature_cls, out_indices: timm's arguments.

    Raises:
        ValueError: With what to ask for instead.
    """
    if getattr(feature_cls, "__name__", str(feature_cls).lower()) not in _FEATURE_CLASSES:
        raise ValueError(
            f"feature_cls={feature_cls!r} would give the stages' sequences [T, B, C, H, W]: leave it out, "
            "features_only=True then gives their means over T, maps [B, C, H, W]"
        )
    missing = max(out_indices, default=0) + 1 - levels if isinstance(out_indices, (list, tuple)) else 0
    if missing > 0:
        raise ValueError(
            f"out_indices={tuple(out_indices)!r}: the model has {levels} feature maps; pooled_levels={missing} adds "
            "what is missing, by max pooling of the last one"
        )
