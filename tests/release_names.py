"""Our checkpoints in the authors' spelling: the inverse of `checkpoint_filter_fn` for the ImageNet release."""

import argparse
import re
from typing import Any

import torch
from torch import Tensor, nn

_CONVS = {
    "stem": "patch_embed1.proj",
    "stages.0.embed.main.0": "patch_embed1.proj1",
    "stages.0.embed.main.1": "patch_embed1.proj2",
    "stages.1.embed.main.0": "patch_embed2.proj3",
    "stages.1.embed.main.1": "patch_embed2.proj4",
    "stages.2.embed.main.0": "patch_embed3.proj3",
    "stages.2.embed.main.1": "patch_embed3.proj4",
}


def release_name(name: str) -> str:
    """One of our names as the release's ImageNet code spells it."""
    unit, _, rest = name.rpartition(".conv.") if ".conv." in name else name.rpartition(".bn.")
    kind = "conv" if ".conv." in name else "bn"
    if unit in _CONVS:
        return f"{_CONVS[unit]}_{kind}.{rest}"
    if m := re.fullmatch(r"stages\.(\d)\.embed\.shortcut", unit):
        return f"patch_embed{int(m[1]) + 1}.proj_res_{kind}.{rest}"
    if m := re.fullmatch(r"stages\.(\d)\.blocks\.(\d+)\.attn\.(\w+)", unit):
        attention = "attn" if m[1] == "2" else "tssa"
        return f"stage{int(m[1]) + 1}.{m[2]}.{attention}.{m[3]}_{kind}.{rest}"
    if m := re.fullmatch(r"stages\.(\d)\.blocks\.(\d+)\.mlp\.fc([12])", unit):
        return f"stage{int(m[1]) + 1}.{m[2]}.mlp.fc{m[3]}_{kind}.{rest}"
    return name


def release_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A model's tensors as the release stores them: its names, and Conv1d for q, k, v and proj."""
    tensors = {}
    for name, value in model.state_dict().items():
        if ".attn." in name and name.endswith("conv.weight"):
            value = value.squeeze(-1)
        tensors[release_name(name)] = value.detach().clone()
    return tensors


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
