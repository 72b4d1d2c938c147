"""Pictures to look at where the user gives none."""

from torch import Tensor, cat

from ..inputs import ModelInputs

__all__ = ["photographs"]

_TILES = 2  # rows of tiles that a photograph is cut into


def photographs(inputs: ModelInputs) -> Tensor:
    """Square tiles of the two photographs that scikit-learn ships, as the model takes images: [B, C, H, W].

    Raises:
        ValueError: If the model takes events.
    """
    from PIL import Image
    from sklearn.datasets import load_sample_images

    tiles = []
    for photograph in load_sample_images().images:
        side = photograph.shape[0] // _TILES
        for top in range(0, photograph.shape[0] - side + 1, side):
            for left in range(0, photograph.shape[1] - side + 1, side):
                tile = Image.fromarray(photograph[top : top + side, left : left + side])
                tiles.append(inputs.image(tile, "a photograph"))
    return cat(tiles)
