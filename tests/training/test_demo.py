"""The demo, shortened; and, marked slow, as users run it."""

import pytest
from PIL import Image

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from timm_qkformer.training.demo import run_demo


def test_short_demo(tmp_path, capsys):
    result = run_demo(tmp_path / "new" / "folder", epochs=1)
    out = capsys.readouterr().out
    assert "true   predicted  confidence" in out
    assert f"{result.photographs / 100 * 40:.0f} of 40 photographs of CIFAR-10's test set right" in out
    assert result.photographs > 70  # chance is 10
    assert f"accuracy on 360 held-out digits: {result.digits:.1f} %" in out
    assert result.digits > 30
    assert 0 < result.firing_rate < 1
    assert result.images_per_second > 0
    for path in result.pictures:
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            assert picture.width > 500
            assert len(picture.convert("L").getcolors(256)) > 50
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["digits.png", "photographs.png"]


@pytest.mark.slow
def test_demo_reads_digits(tmp_path):
    assert run_demo(tmp_path).digits >= 95.0
