"""Which device a command runs on. Only `errors` is below: nothing else of the package is imported here."""

import platform
from pathlib import Path

import torch

from .errors import first_line

AUTO = "auto"  # cuda if there is one, else cpu


def device_name(name: str | None = AUTO) -> str:
    """The device that a name stands for: for "auto" and None "cuda" if PyTorch can use one, else "cpu"."""
    if name is None or name == AUTO:
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def usable_device(name: str | None = AUTO) -> torch.device:
    """The device of this name; ValueError if it is not there."""
    name = device_name(name)
    require_cuda(name)
    try:
        torch.empty(1, device=name)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"device={name!r} cannot be used: {first_line(error)}") from error
    return torch.device(name)


def require_cuda(name: str) -> None:
    """ValueError if a CUDA device is asked for and PyTorch has none."""
    if name.partition(":")[0] == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name!r} is not available here; --device cpu is")


def processor_name() -> str:
    """What the processor calls itself, or its kind of machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
