"""What other libraries ask for by name, said once: layers for attribution, for adapters, and FX's leaves."""

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


def check_output_stride(feature_info: Any, output_stride: int | None) -> None:
    """What segmentation libraries ask of an encoder: that its last map is not coarser than `output_stride` pixels.

    Args:
        feature_info: timm's, of a model or of what `features_only=True` makes of it.
        output_stride: As timm's models take it; None for whatever the model has.

    Raises:
        ValueError: For one that the model does not keep: no stage is dilated.
    """
    if output_stride is None:
        return
    of_net = getattr(feature_info, "reduction", None)
    reductions = of_net() if of_net is not None else [info["reduction"] for info in feature_info]
    if output_stride < max(reductions):
        raise ValueError(
            f"output_stride={output_stride!r}: the model's last map has a stride of {max(reductions)}, and no stage is "
            f"dilated; take one that ends sooner, or out_indices up to a stride of {output_stride} (there are "
            f"{list(reductions)})"
        )
