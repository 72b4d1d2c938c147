"""`visualize` and `reproduce` as they are typed; `paper` is what `reproduce` was called before."""

import pytest
from PIL import Image

from event_files import random_events, write_atis
from timm_qkformer import cli

pytest.importorskip("matplotlib")


@pytest.fixture
def photo(tmp_path):
    Image.new("RGB", (70, 70), (200, 100, 50)).save(tmp_path / "cat.jpg")
    return tmp_path / "cat.jpg"


def test_visualize_says_that_weights_are_random_and_names_its_files(photo, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["visualize", "test_qkformer", str(photo), "--random", "--output", str(out), "--stage", "1"]
    command += ["--time-steps", "2"]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "has random weights (seed 0)" in printed
    assert [
        f"wrote {out / name}" for name in ("cat-stage1-block1-tokens.png", "cat-query-key.png", "cat-raster.png")
    ] == (printed.splitlines()[1:])
    assert cli.main(command) == 2
    assert "exist already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stage", "7"], "stage=7 (counted from 1) has no attention layer"),
        (["--model-kwargs", "in_chans"], "--model-kwargs in_chans: give KEY=VALUE"),
        (["--checkpoint", "missing.pth"], "missing.pth: there is no such file"),
    ],
)
def test_visualize_refuses_in_one_line(photo, tmp_path, capsys, options, message):
    assert cli.main(["visualize", "test_qkformer", str(photo), "--output", str(tmp_path / "out"), *options]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_pretrained_weights_that_cannot_be_had(photo, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the variable is read at import
    assert cli.main(["visualize", "qkformer_hst10_384", str(photo)]) == 2
    assert "--random" in capsys.readouterr().err


def test_matplotlib_is_an_extra(photo, capsys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["visualize", "test_qkformer", str(photo)]) == 2
    assert "pip install 'timm-qkformer[analysis]'" in capsys.readouterr().err


def test_reproduce_in_a_hurry(photo, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["reproduce", "--quick", "--model", "test_qkformer", "--data", str(photo), "--output", str(out)]
    assert cli.main(command) == 0
    assert f"wrote {out / 'paper.md'}" in capsys.readouterr().out
    page = (out / "paper.md").read_text()
    assert "`timm-qkformer reproduce --model test_qkformer --data cat.jpg --quick`" in page
    assert "1 files of cat.jpg" in page
    assert str(tmp_path) not in page


@pytest.mark.slow
def test_reproduce_takes_the_model_that_suits_the_data(photo, tmp_path):
    write_atis(tmp_path / "wave.bin", random_events(300))
    out = tmp_path / "out"
    cases = (
        (photo, "qkformer_hst3_192.cifar10", []),
        (tmp_path / "wave.bin", "qkformer_hst3_128.nmnist", ["--sensor-size", "34", "34"]),
    )
    for data, model, more in cases:
        command = ["paper", "--quick", "--data", str(data), *more]
        assert cli.main([*command, "--output", str(out / model)]) == 0
        page = (out / model / "paper.md").read_text()
        assert model in page
        assert f"`timm-qkformer reproduce --data {data.name} {' '.join([*more, '--quick'])}`" in page
