"""The demo, shortened; and, marked slow, as users run it."""

import pytest
from PIL import Image

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from timm_qkformer.training.demo import run_demo


def test_short_demo(tmp_path, capsys):
    result = run_demo(tmp_path / "new" / "folder", epochs=1)
    out = capsys.readouterr().out
    assert "true  predicted  confidence" in out
    assert f"accuracy on 360 held-out digits: {result.accuracy:.1f} %" in out
    assert result.accuracy > 15  # chance is 10
    assert 0 < result.firing_rate < 1
    assert result.images_per_second > 0
    with Image.open(result.picture) as picture:
        assert picture.format == "PNG"
        assert picture.width > 500
        assert len(picture.convert("L").getcolors(256)) > 50
    assert [p.name for p in result.picture.parent.iterdir()] == ["digits.png"]


@pytest.mark.slow
def test_demo_reads_digits(tmp_path):
    assert run_demo(tmp_path).accuracy >= 95.0
