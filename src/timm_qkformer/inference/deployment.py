"""From a trained model to one that only runs, and runs fast."""

import torch
from torch import nn

from ..models._hst import HierarchicalSpikingTransformer
from .model import DeployedModel
from .precision import PRECISIONS, PRODUCTS

__all__ = ["deploy"]


def deploy(model: nn.Module, precision: str = "fp32", products: str = "auto") -> DeployedModel:
    """Make a model for inference: the same answers in a fraction of the time.

    Batch norms are folded into the convolutions, tensors are channels last, and neurons run in kernels together with
    what lies next to them. The model takes what the original takes, has its `forward_features`, `forward_head` and
    `forward_intermediates`, and shares nothing with it.

    Args:
        model: A QKFormer or Max-Former, with any embedding, attention, kind of shortcut and neurons of this package. In
            train mode or not: it is deployed as it would be in eval mode.
        precision: Arithmetic of all convolutions but the first, and of nothing else.
            "fp32": float32, or float64 for a model in float64. Equal to the original but for the order of sums.
            "bf16": weights rounded to bfloat16; spikes are exact.
            "int8": weights rounded to 8 bits, symmetric, one scale per output channel; spikes and their sums are exact,
            and so are the sums of products.
        products: What those convolutions do, on a CPU.
            "events": add a spike's weights to the outputs that see it. Silence costs nothing: the sparser the spikes,
            the faster. Currents are float32.
            "dense": multiply matrices of spikes, most of them zeros, and weights.
            "auto": events, except where a processor has matrix units (AMX) for the precision. On other devices and in
            float64 products are dense.

    Returns:
        The model, in eval mode, on the original's device.

    Raises:
        TypeError: For another kind of model, or a layer in it of which no deployed form is known, with its name.
        ValueError: For an unknown precision, weights that are not finite, or a network so deep that its sums of spikes
            do not fit 8-bit arithmetic.

    Warns:
        RuntimeWarning: Once, where the device has no arithmetic for the precision and another one stands in.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is unknown, choose one of {list(PRECISIONS)}")
    if products not in PRODUCTS:
        raise ValueError(f"products={products!r} is unknown, choose one of {list(PRODUCTS)}")
    if not isinstance(model, HierarchicalSpikingTransformer):
        raise TypeError(
            f"model is a {type(model).__name__}, expected a QKFormer or MaxFormer, without a wrapper around it (take "
            "`.module` of a DistributedDataParallel, `._orig_mod` of what torch.compile returns)"
        )
    # Not as inference tensors: load_state_dict could not write to them later.
    with torch.inference_mode(False), torch.no_grad():
        return DeployedModel(model, precision, products)
