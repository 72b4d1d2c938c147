"""Images as files hold them: 16-bit grey keeps its grey values."""

import numpy as np
import pytest
from PIL import Image

from timm_qkformer.data.images import ImageDataset, UnreadableImageError, open_image


@pytest.mark.parametrize("mode", ["RGB", "L", None])
def test_16_bit_grey_is_scaled(mode, tmp_path):
    values = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "x.png")
    image = np.asarray(open_image(tmp_path / "x.png", mode))
    assert (image if image.ndim == 2 else image[..., 0]).tolist() == [[0, 0, 1, 1, 128, 255]]


def test_grey_of_unknown_range_is_refused_by_name(tmp_path):
    Image.fromarray(np.full((2, 2), 0.5, np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(np.full((2, 2), 1 << 20, np.int32)).save(tmp_path / "deep.tif")
    for name, message in (("float.tif", "floating-point"), ("deep.tif", "more than 16 bits")):
        with pytest.raises(UnreadableImageError, match=rf"{name} is not a readable image: .*{message}"):
            open_image(tmp_path / name, "RGB")


def test_skipping_gives_the_next_image(tmp_path, caplog):
    (tmp_path / "broken.png").write_bytes(b"no image")
    Image.fromarray(np.full((2, 2), 65535, np.uint16)).save(tmp_path / "deep.png")
    samples = [(str(tmp_path / "broken.png"), 0), (str(tmp_path / "deep.png"), 1)]
    image, target = ImageDataset(samples, "RGB", skip=True)[0]
    assert (image.getpixel((0, 0)), target) == ((255, 255, 255), 1)
    assert "broken.png is not a readable image" in caplog.text
    with pytest.raises(UnreadableImageError, match="broken"):
        ImageDataset(samples[:1], "RGB", skip=True)[0]
