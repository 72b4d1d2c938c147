"""The state of every random number generator that training draws from, as plain values."""

import random
from typing import Any, Optional

import numpy as np
import torch
from torch import Tensor

__all__ = ["RandomState", "random_state", "restore_random_state"]

# Bytes, numbers and None only, which a pipe carries cheaply. A checkpoint has tensors in place of bytes.
RandomState = dict[str, Any]


def random_state(device: Optional[torch.device] = None) -> RandomState:
    """State of the generators of torch, numpy and random in this process, and of a CUDA device if one is given."""
    _, keys, position, has_gauss, gauss = np.random.get_state()
    version, words, python_gauss = random.getstate()
    return {
        "torch": _bytes(torch.get_rng_state()),
        "numpy": np.asarray(keys).tobytes(),
        "numpy_position": int(position),
        "numpy_gauss": float(gauss) if has_gauss else None,
        "python": np.asarray(words, dtype=np.uint32).tobytes(),
        "python_version": version,
        "python_gauss": python_gauss,
        "cuda": _bytes(torch.cuda.get_rng_state(device)) if device is not None and device.type == "cuda" else None,
    }


def restore_random_state(state: RandomState, device: Optional[torch.device] = None) -> None:
    """Continue all generators where `random_state` saw them."""
    torch.set_rng_state(_tensor(state["torch"]))
    gauss = state["numpy_gauss"]
    keys = np.frombuffer(_raw(state["numpy"]), dtype=np.uint32)
    np.random.set_state(("MT19937", keys, state["numpy_position"], int(gauss is not None), gauss or 0.0))
    words = tuple(np.frombuffer(_raw(state["python"]), dtype=np.uint32).tolist())
    random.setstate((state["python_version"], words, state["python_gauss"]))
    if state["cuda"] is not None and device is not None and device.type == "cuda":
        torch.cuda.set_rng_state(_tensor(state["cuda"]), device)


def _bytes(state: Tensor) -> bytes:
    return state.numpy().tobytes()


def _raw(state: bytes | Tensor) -> bytes:
    return _bytes(state) if isinstance(state, Tensor) else state


def _tensor(state: bytes | Tensor) -> Tensor:
    return torch.frombuffer(bytearray(_raw(state)), dtype=torch.uint8)
