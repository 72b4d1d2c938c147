"""The golden cases: what the authors' release answers in float64, when the shared folder is there."""

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("TIMM_QKFORMER_SHARED", ROOT.parent / "shared"))

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "imagenet_10_384_t1": ("qkformer_hst10_384", {"time_steps": 1}),
    "imagenet_10_384_t4": ("qkformer_hst10_384", {}),
    "imagenet_10_384_t4_batch3_64px": ("qkformer_hst10_384", {}),
    "cifar10_4_384_t4_batch3": ("qkformer_hst4_384", {}),
    "cifar10dvs_2_256_t10": ("qkformer_hst2_256", {"num_classes": 10}),
}

# Membrane shortcuts; nothing there couples the samples of a batch.
MEMBRANE_CASES: dict[str, str] = {
    "ms_imagenet_10_384_t4": "qkformer_hst10_384_ms",
    "maxformer_imagenet_10_384_t4": "maxformer_10_384",
}

# Flat models; the arguments are what the case says of its configuration. Nothing there couples samples either.
FLAT_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "spikformer_cifar10_4_384_t4_batch3": ("spikformer_4_384", {}),
    "spikformer_cifar10dvs_2_256_t10": ("spikformer_2_256_dvs", {}),
    "spikformer_imagenet_8_384_t4": ("spikformer_8_384", {}),
    "spikformer_imagenet_8_384_t4_64px_batch3": ("spikformer_8_384", {}),
    "cml_spikformer_cifar10_4_384_t4": ("spikformer_4_384_cml", {}),
    "spikingformer_cifar100_4_384_t4": ("spikingformer_4_384", {"num_classes": 100, "num_heads": 8}),
    "spikingformer_cifar10_4_384_t4_batch3": ("spikingformer_4_384", {}),
    "spikingformer_cifar10dvs_2_256_t10": ("spikingformer_2_256_dvs", {}),
    "spikingformer_imagenet_8_384_t4": ("spikingformer_8_384", {}),
    "cml_spikingformer_cifar10_4_384_t4": ("spikingformer_4_384_cml", {}),
    "cml_spikingformer_cifar10dvs_2_256_t10": ("spikingformer_2_256_dvs_cml", {}),
    "cml_spikingformer_imagenet_8_384_t4": ("spikingformer_8_384_cml", {}),
    "sdt_cifar100_2_256_t4": ("sdt_2_256", {"num_classes": 100}),
    "sdt_cifar10_2_512_t4_batch3": ("sdt_2_512", {}),
    "sdt_cifar10dvs_2_256_t10": ("sdt_2_256_dvs", {}),
    "sdt_imagenet_8_384_t4": ("sdt_8_384", {}),
    "sdt_imagenet_8_384_t4_64px_batch3": ("sdt_8_384", {}),
}

ALL_CASES = CASES | {name: (model, {}) for name, model in MEMBRANE_CASES.items()} | FLAT_CASES


def recipe() -> ModuleType:
    path = SHARED / "golden" / "recipe.py"
    if not path.exists():
        pytest.skip(f"golden cases are not here: {path} does not exist")
    spec = importlib.util.spec_from_file_location("golden_recipe", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class GoldenCase:
    """A case's checkpoint, input and expected answers, as float64 tensors."""

    def __init__(self, name: str) -> None:
        make = recipe()
        case = json.loads((SHARED / "golden" / f"{name}.json").read_text())
        checkpoint = make.checkpoint(case["spec"], case["seed"])
        self.checkpoint = {k: torch.from_numpy(v.copy()) for k, v in checkpoint.items()}
        make_input = make.image_input if case["kind"] == "image" else make.event_input
        self.input = torch.from_numpy(make_input(tuple(case["input_shape"]), case["seed"]))
        self.one_by_one = torch.tensor(case["logits_one_by_one"], dtype=torch.float64)
        self.batched = torch.tensor(case["logits_batched"], dtype=torch.float64)
        self.firing_rates: dict[str, float] = case["firing_rates_first_sample"]
        self.first_pass = torch.tensor(case.get("logits_first_pass", []), dtype=torch.float64)
        self.params: int = case["params"] - case.get("params_unused", 0)
        self.time_steps: int = case["T"]


def create(case: str, checkpoint: dict[str, torch.Tensor], **kwargs: Any) -> nn.Module:
    """The case's model in float64, with a checkpoint in the release's names."""
    name, model_args = ALL_CASES[case]
    model = timm.create_model(name, **model_args, **kwargs).double().eval()
    model.load_state_dict(sys.modules[type(model).__module__].checkpoint_filter_fn(checkpoint, model), strict=True)
    return model
