"""A model's weights in the spelling of the authors' release, for tests of the way back."""

from torch import Tensor

from timm_qkformer.models import QKFormer


def release_state_dict(model: QKFormer, spelling: str = "imagenet") -> dict[str, Tensor]:
    """Spell a model's state dict as the release's "imagenet" or "cifar" code does: `patch_embed1.proj_conv`, ..."""
    ssa, mlp = {"imagenet": ("attn", "fc"), "cifar": ("ssa", "mlp")}[spelling]
    out = {}
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        if parts[0] == "stem":
            out[f"patch_embed1.proj_{parts[1]}.{parts[2]}"] = tensor
        elif parts[0] == "stages" and parts[2] == "embed":
            stage = int(parts[1])
            if parts[3] == "shortcut":
                unit, rest = "proj_res", parts[4:]
            else:
                unit, rest = f"proj{int(parts[4]) + (1 if stage == 0 else 3)}", parts[5:]
            out[f"patch_embed{stage + 1}.{unit}_{rest[0]}.{rest[1]}"] = tensor
        elif parts[0] == "stages":
            stage, block, kind, unit, layer, rest = int(parts[1]), parts[3], *parts[4:8]
            if kind == "attn":
                attn = model.stages[stage].blocks[int(block)].attn
                kind = ssa if hasattr(attn, "v") else "tssa"
                if layer == "conv" and rest == "weight":
                    tensor = tensor.squeeze(-1)  # Conv1d there
            else:
                unit = unit.replace("fc", mlp)
            out[f"stage{stage + 1}.{block}.{kind}.{unit}_{layer}.{rest}"] = tensor
        else:
            out[name] = tensor
    return out
