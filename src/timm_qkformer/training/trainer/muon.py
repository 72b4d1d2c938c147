"""timm's Muon optimizers on CPUs without bfloat16 instructions.

Muon makes updates orthogonal by a few Newton-Schulz iterations, which timm computes in bfloat16: right on a GPU, but
torch's loops for CPUs that lack its instructions take 15 to 30 times as long as float32's products, a quarter of a
small model's step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from timm.optim import muon

from ...execution.convolution import cpu_multiplies


@contextmanager
def muon_precision(device: torch.device) -> Iterator[None]:
    """Within the block Muon iterates in float32 if this device's bfloat16 is slower, and as timm has it otherwise."""
    if device.type != "cpu" or cpu_multiplies(torch.bfloat16):
        yield
        return
    # The precision is an argument of the iteration alone, which no optimizer of timm's passes on.
    own = muon.zeropower_via_newtonschulz
    muon.zeropower_via_newtonschulz = partial(own, dtype=torch.float32)
    try:
        yield
    finally:
        muon.zeropower_via_newtonschulz = own
