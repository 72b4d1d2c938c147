"""`timm-qkformer doctor`: what this machine has, and which kernels run on it."""

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .output import add_json, show


def add_doctor(parser: argparse.ArgumentParser) -> None:
    add_json(parser, "what it finds")


def doctor(args: argparse.Namespace) -> None:
    from ..execution.native import INSTALL

    found = findings()
    lines = []
    for name, value in found.items():
        if name == "sources":
            several = len(set(value.values())) > 1
            lines += [f"  {file:<20} {origin}" for file, origin in value.items() if several]
            lines += [f"{'':<12} {INSTALL}"] if "none" in value.values() else []
        elif name == "calibration":
            lines += [
                "events are faster than dense products below so many spikes an input element, see docs/execution.md:"
            ]
            lines += [
                f"  {kind:<45} {most:.2f} - {overhead:.0f} / additions" for kind, (most, overhead) in value.items()
            ]
            lines += [] if value else ["  not measured yet: a large model does, when it is deployed or trained"]
        elif value is not None:
            lines.append(f"{name:<12} {value}")
    show(args, found, "\n".join(lines))


def findings() -> dict[str, Any]:
    """What runs are made of here; no kernel is compiled to find out.

    `kernels` says where the C++ kernels come from: "prebuilt x86-64-v3", say, "built here" or "none"; `sources` says so
    for each source. `calibration` is what was measured here, see `execution.calibration`.
    """
    import torch

    from ..devices import device_name, processor_name
    from ..execution import calibration, compiler, current_policy, native, prebuilt

    sources = native.provenance()
    origins = ", ".join(sorted(set(sources.values())))
    policy = current_policy()
    return {
        "versions": ", ".join(f"{name} {_version_of(name)}" for name in ("timm-qkformer", "timm", "torch")),
        "python": platform.python_version(),
        "processor": ", ".join(
            (processor_name(), torch.backends.cpu.get_cpu_capability(), f"{torch.get_num_threads()} threads")
        ),
        "device": device_name(),
        "policy": ", ".join(f"{name}={value}" for name, value in policy._asdict().items()),
        "kernels": origins if policy.kernels != "never" else f"never, says the policy ({origins})",
        "sources": sources,
        "levels": ", ".join(level.name for level in prebuilt.levels()) or None,
        "compiler": compiler.compiler_path(),
        "kept in": str(compiler.cache_folder()),
        "calibration": {kind: list(even) for kind, even in sorted(calibration.known().items())},
    }


def _version_of(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"
