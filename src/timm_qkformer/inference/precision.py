"""What "fp32", "bf16" and "int8" mean on the device at hand."""

import warnings

import torch
from torch import Tensor

__all__ = ["PRECISIONS", "PRODUCTS", "adds_events", "has_onednn", "spikes_dtype", "weights_dtype"]

PRECISIONS = ("fp32", "bf16", "int8")
PRODUCTS = ("auto", "events", "dense")

_warned: set[str] = set()


def weights_dtype(precision: str, full: torch.dtype) -> torch.dtype:
    """What weights are stored in; `full`: float32, or float64 for a model in float64."""
    return {"fp32": full, "bf16": torch.bfloat16, "int8": torch.int8}[precision]


def adds_events(products: str, precision: str) -> bool:
    """Whether convolutions on CPUs add the weights of spikes up, event by event, rather than multiply matrices.

    "auto" does, unless this machine has matrix units (AMX) for the precision. It is a matter of the machine and never
    of the data, so that a sample's answer does not depend on others.
    """
    matrix_unit = {"bf16": "amx_bf16", "int8": "amx_int8"}.get(precision, "")
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # older torch has none
    has_unit = bool(capabilities.get(matrix_unit))
    return products == "events" or (products == "auto" and not has_unit)


def spikes_dtype(precision: str, like: Tensor, events: bool = False) -> torch.dtype:
    """What spikes are stored in, which decides the arithmetic of the convolutions that take them.

    For events, which CPUs add up, bytes. For dense products, what is multiplied: where the device has no arithmetic for
    the precision, weights keep their values and products are taken in full precision, that of the tensor `like`; the
    first time, a warning says so.
    """
    device = like.device
    if events and device.type == "cpu":
        return torch.uint8
    if precision == "bf16":
        if has_onednn(torch.bfloat16, device) or (device.type == "cuda" and torch.cuda.is_bf16_supported(False)):
            return torch.bfloat16
        _warn_once(
            f'precision="bf16": no bfloat16 arithmetic on this {device.type}, so weights rounded to bfloat16 are '
            f"multiplied in {str(like.dtype).removeprefix('torch.')}: no less exact, no faster than fp32"
        )
    if precision == "int8":
        if has_onednn(torch.uint8, device):
            return torch.uint8
        _warn_once(
            f'precision="int8": no 8-bit arithmetic on this {device.type}, so 8-bit weights are multiplied in '
            f"{str(like.dtype).removeprefix('torch.')}: the same values, no faster than fp32"
        )
    return like.dtype


def has_onednn(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN multiplies matrices of this dtype here (uint8: with int8), and not just by emulation."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.uint8:
        return "onednn" in torch.backends.quantized.supported_engines
    return dtype == torch.float32


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)
