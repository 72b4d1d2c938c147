"""A model that attends to where the input's pixels are bright: head 1 to red ones, head 2 to green ones."""

import torch
from torch import Tensor, nn

from timm_qkformer.models.qkformer import QKFormer

SIZE = (8, 12)
RED = [(1, 2), (1, 3), (5, 10)]  # (row, column)
GREEN = [(6, 1)]
DRIVE = 8.0  # far above every threshold


def planted_model(attn: str = "qkta") -> nn.Module:
    """In the first stage's block: Q fires at red pixels in head 1 and at green ones in head 2, K and V everywhere."""
    model = QKFormer(
        patch_embed="cifar", embed_dims=(4, 4, 4), depths=(1, 0, 0), num_heads=2, attn=attn, num_classes=3, time_steps=3
    ).eval()
    stage = model.stages[0]
    layer = stage.blocks[0].attn
    with torch.no_grad():
        for conv in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
            conv.weight.zero_()
        for colour in (0, 1):
            model.stem.conv.weight[colour, colour, 1, 1] = DRIVE
            for channel in (2 * colour, 2 * colour + 1):
                stage.embed.main[0].conv.weight[channel, colour, 1, 1] = DRIVE
        layer.q.conv.weight[:, :, 0, 0] = DRIVE * torch.eye(4)
        for always in (layer.k, *([layer.v] if attn == "ssa" else [])):
            always.bn.bias.fill_(DRIVE)
    return model


def planted_image(red: list[tuple[int, int]] = RED, green: list[tuple[int, int]] = GREEN) -> Tensor:
    """[1, 3, H, W], 0 but for the given pixels."""
    image = torch.zeros(1, 3, *SIZE)
    for colour, places in enumerate((red, green)):
        for row, column in places:
            image[0, colour, row, column] = 1.0
    return image
