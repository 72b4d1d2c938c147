"""The hub's commands: what they print, and errors in one line."""

import pytest
import timm
import torch

from timm_qkformer.cli import main


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(timm.create_model("test_qkformer", num_classes=3).state_dict(), path)
    return path


def test_convert_says_what_it_recognised(checkpoint, tmp_path, capsys):
    assert (
        main(["convert", str(checkpoint), str(tmp_path / "out"), "--time-steps", "2", "--model", "test_qkformer"]) == 0
    )
    out = capsys.readouterr().out
    for words in ("plain weights", "md5 ", "model test_qkformer (num_classes=3, ", "T = 2 as given", "local-dir:"):
        assert words in out


def test_errors_are_one_line_and_status_2(checkpoint, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    for argv, words in [
        (["convert", str(checkpoint), str(tmp_path / "out")], "is not empty"),
        (["convert", str(tmp_path / "none.pth"), str(tmp_path / "new")], "there is no such file"),
        (["convert", str(checkpoint), str(tmp_path / "new"), "--time-steps", "0"], "time_steps=0"),
        (["verify", "qkformer_hst4_384", "--data", str(tmp_path)], "has no pretrained weights"),
        (["verify", "nonsense", "--data", str(tmp_path)], "nor a model that timm knows"),
        (["publish", str(tmp_path / "out"), "me/model"], "has no model.safetensors"),
    ]:
        assert main(argv) == 2
        err = capsys.readouterr().err
        assert err.startswith("timm-qkformer: error: ")
        assert words in err
        assert "Traceback" not in err


def test_interrupt_is_not_a_traceback(checkpoint, tmp_path, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("timm_qkformer.hub.convert", interrupted)
    assert main(["convert", str(checkpoint), str(tmp_path / "out")]) == 130
    assert "interrupted" in capsys.readouterr().err
