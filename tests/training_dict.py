"""Training checkpoints as the authors' ImageNet code saves them, and the keys of timm's train.py."""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

KEYS_FILE = Path(__file__).with_name("training") / "train_py_keys.txt"
TRAIN_PY_KEYS = {line for line in KEYS_FILE.read_text().splitlines() if line and not line.startswith("#")}


def training_checkpoint(state_dict: dict[str, Tensor], **args: Any) -> dict[str, Any]:
    """What the release's ImageNet training saves: model, AdamW's state, epoch, loss scaler and command line."""
    parameters = [
        nn.Parameter(value.clone())
        for name, value in state_dict.items()
        if value.is_floating_point() and "running" not in name
    ]
    optimizer = torch.optim.AdamW(
        [{"params": parameters[::2], "lr_scale": 1.0}, {"params": parameters[1::2]}], lr=6e-4, betas=(0.9, 0.95)
    )
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    scaler = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}
    namespace = argparse.Namespace(
        **{
            "batch_size": 64,
            "epochs": 200,
            "model": "QKFormer_10_384",
            "time_step": 4,
            "input_size": 224,
            "finetune": "",
            "clip_grad": None,
            "cutmix_minmax": None,
            "blr": 6e-4,
            "distributed": True,
            "dist_url": "env://",
            **args,
        }
    )
    return {
        "model": state_dict,
        "optimizer": optimizer.state_dict(),
        "epoch": 199,
        "scaler": {**scaler, "_growth_tracker": 1},
        "args": namespace,
    }
