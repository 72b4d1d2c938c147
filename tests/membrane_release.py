"""A model's weights in the spelling and the order of the Max-Former authors' release, for tests of the way back."""

from torch import Tensor

from timm_qkformer.models._hst import HierarchicalSpikingTransformer

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


def membrane_release_state_dict(model: HierarchicalSpikingTransformer) -> dict[str, Tensor]:
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
