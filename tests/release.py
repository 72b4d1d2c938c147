"""A model's weights in the spelling and the order of the authors' releases, for tests of the way back."""

from torch import Tensor

from timm_qkformer.models import SpikingTransformer


def release_state_dict(model: SpikingTransformer, spelling: str = "imagenet") -> dict[str, Tensor]:
    """Spell a model's state dict as the release's "imagenet" or "cifar" code does: `patch_embed1.proj_conv`, ..."""
    ssa, mlp = {"imagenet": ("attn", "fc"), "cifar": ("ssa", "mlp")}[spelling]
    out = {}
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        if "feedback" in parts:
            continue
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


def in_release_order(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Patch embeddings first, then blocks, and v before proj, as image models of the release have them."""

    def place(name: str) -> tuple[int, list[str], bool, int]:
        group = next(
            i for i, prefix in enumerate(("patch_embed", ("stage", "block"), "head")) if name.startswith(prefix)
        )
        parts = name.split(".")
        attention = group == 1 and parts[2] != "mlp"
        return group, parts[:2] * (group == 1), not attention, "qkvp".index(parts[3][0]) if attention else 0

    return {name: tensors[name] for name in sorted(tensors, key=place)}


def spiliformer_release_state_dict(model: SpikingTransformer, spelling: str = "imagenet") -> dict[str, Tensor]:
    """Spell a SpiLiFormer's state dict as its release does, prompts first and decoders last."""
    names = {"imagenet": "decoder.0", "cifar": "decoder_stage_3"}
    feedback = f"stages.{len(model.stages) - 1}.feedback"
    own = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(feedback)}
    out = {name: own.pop(f"{feedback}.{name}") for name in ("prompt", "prompt_2")}
    out |= release_state_dict(model, spelling)
    count = len(model.stages[-1].blocks)
    for name, tensor in own.items():
        place, layer, rest = name.removeprefix(f"{feedback}.decoders.").split(".")
        number = count - 1 - int(place) if model.stages[-1].feedback.last_first else int(place)
        layer = {"conv": "linear", "bn": "bn"}[layer]
        tensor = tensor[:, :, 0, 0] if layer == "linear" else tensor
        out[f"{names[spelling]}.{number}.decoder_{layer}.{rest}"] = tensor
    return out


BN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
EMBEDS = {
    "QKFormer": (
        ("proj_{}", "proj_{}1", "proj_{}2", "rpe_{}"),
        ("proj3_{}", "proj4_{}", "proj_res_{}"),
        ("proj3_{}", "proj4_{}", "proj_res_{}"),
    ),
    "MaxFormer": (
        ("embed1.embed_{}", "embed2.embed_{}", "embed3.embed_{}", "embed4.embed_{}"),
        ("max_embed1.embed_{}", "embed1.embed_{}", "max_embed2.embed_{}"),
        ("max_embed1.embed_{}", "embed1.embed_{}", "max_embed2.embed_{}"),
    ),
}
MIXERS = (("conv5", "conv5_bn"), ("conv", "conv_bn"))  # of Max-Former's first two stages


def membrane_release_state_dict(model: SpikingTransformer) -> dict[str, Tensor]:
    """Spell a state dict as the Max-Former authors' release does."""
    out: dict[str, Tensor] = {}

    def put(conv, bn, unit, tokens=False):
        weight = unit.conv.weight.detach()
        out[f"{conv}.weight"] = weight.squeeze(-1) if tokens else weight  # Conv1d there
        if unit.conv.bias is not None:
            out[f"{conv}.bias"] = unit.conv.bias.detach()
        for key in BN:
            out[f"{bn}.{key}"] = getattr(unit.bn, key).detach()

    for i, (stage, names) in enumerate(zip(model.stages, EMBEDS[type(model).__name__], strict=True)):
        units = [model.stem] * (i == 0) + [*stage.embed.main, stage.embed.shortcut]
        for name, unit in zip(names, units, strict=True):
            put(f"patch_embed{i + 1}.{name.format('conv')}", f"patch_embed{i + 1}.{name.format('bn')}", unit)
    for i, stage in enumerate(model.stages):
        for j, block in enumerate(stage.blocks):
            path = f"stage{i + 1}.{j}"
            if hasattr(block.attn, "dw"):
                conv, bn = MIXERS[i]
                put(f"{path}.mixer.{conv}", f"{path}.mixer.{bn}", block.attn.dw)
            else:
                for unit in ("q", "k", "v", "proj"):
                    if hasattr(block.attn, unit):
                        put(f"{path}.attn.{unit}_conv", f"{path}.attn.{unit}_bn", getattr(block.attn, unit), True)
            for unit in ("fc1", "fc2"):
                put(f"{path}.mlp.{unit}_conv", f"{path}.mlp.{unit}_bn", getattr(block.mlp, unit))
    out["head.weight"], out["head.bias"] = model.head.weight.detach(), model.head.bias.detach()
    return out
