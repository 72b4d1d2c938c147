"""Pretrained configs: what is listed, what waits, and what a failure says without any network."""

import re

import pytest
import timm
import torch

from timm_qkformer.models._weights import PendingCfg, WeightsError

PENDING = {
    "qkformer_hst10_384.in1k": (224, 0.875),
    "qkformer_hst10_512.in1k": (224, 0.875),
    "qkformer_hst10_768.in1k": (224, 0.875),
    "qkformer_hst10_768.ft288_in1k": (288, 1.0),
    "qkformer_hst10_768.ft384_in1k": (384, 1.0),
}


def test_pending_weights_are_configured_but_not_listed():
    listed = timm.list_pretrained("*former*")
    for name, (size, crop) in PENDING.items():
        cfg = timm.get_pretrained_cfg(name)
        assert isinstance(cfg, PendingCfg)
        assert (cfg.hf_hub_id, cfg.input_size, cfg.crop_pct) == (f"timm-qkformer/{name}", (3, size, size), crop)
        assert cfg.pool_size == (size // 16, size // 16)
        assert cfg.interpolation == "bicubic"
        assert name not in listed
        assert name.split(".")[0] not in listed
        assert name.split(".")[0] in timm.list_models("qkformer*")


def test_everything_listed_has_an_address():
    ours = [n for n in timm.list_pretrained(["qkformer*", "maxformer*"]) if not timm.get_pretrained_cfg(n).file]
    assert {name.split(".")[0] for name in ours} == {
        "qkformer_hst10_384_ms",
        "qkformer_hst10_768_ms",
        "maxformer_10_384",
        "maxformer_10_512",
        "maxformer_10_768",
    }
    for name in ours:
        assert re.fullmatch(
            r"https://github\.com/bic-L/MaxFormer/releases/download/.+", timm.get_pretrained_cfg(name).url
        )


def test_default_tags_bring_the_evaluation_transform():
    model = timm.create_model("qkformer_hst10_768.ft384_in1k", device="meta")
    config = timm.data.resolve_model_data_config(model)
    assert (config["input_size"], config["crop_pct"], config["interpolation"]) == ((3, 384, 384), 1.0, "bicubic")
    default = timm.create_model("qkformer_hst10_768", device="meta")
    assert default.pretrained_cfg["tag"] == "in1k"


def test_models_without_weights_say_what_else_there_is():
    with pytest.raises(WeightsError, match="has no pretrained weights") as error:
        timm.create_model("test_qkformer", pretrained=True)
    for way in ("pretrained_cfg_overlay=dict(file=", "local-dir:FOLDER", "pretrained=False"):
        assert way in str(error.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "there is no such file"),
        (b"", "cannot be read as a checkpoint"),
        (b"<!DOCTYPE html>", "cannot be read as a checkpoint"),
        (b"PK\x03\x04" + bytes(100), "cannot be read as a checkpoint"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_that_cannot_be_read(content, reason, suffix, tmp_path):
    path = tmp_path / f"weights{suffix}"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(WeightsError, match=reason) as error:
        timm.create_model("test_qkformer", pretrained=True, pretrained_cfg_overlay={"file": str(path)})
    assert str(path) in str(error.value)
    assert error.value.__cause__ is not None


def test_files_with_code_are_not_run(tmp_path):
    class Touch:
        def __reduce__(self):
            return open, (str(tmp_path / "marker"), "w")

    torch.save({"model": Touch()}, tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match="cannot be read as a checkpoint"):
        timm.create_model(
            "test_qkformer", pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "weights.pth")}
        )
    assert not (tmp_path / "marker").exists()


def test_weights_that_do_not_fit_keep_their_own_error(tmp_path):
    torch.save({"head.weight": torch.zeros(3, 3)}, tmp_path / "weights.pth")
    with pytest.raises(RuntimeError, match="Missing key") as error:
        timm.create_model(
            "test_qkformer", pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "weights.pth")}
        )
    assert not isinstance(error.value, WeightsError)


def test_errors_that_the_caller_is_handling_are_not_ours():
    try:
        raise ConnectionError("of the caller")
    except ConnectionError:
        with pytest.raises(ValueError, match="time_steps=0"):
            timm.create_model("test_qkformer", pretrained=True, pretrained_cfg_overlay={"file": "x"}, time_steps=0)


def test_arguments_out_of_range_keep_their_own_error():
    with pytest.raises(ValueError, match="time_steps=0"):
        timm.create_model("test_qkformer", pretrained=True, pretrained_cfg_overlay={"file": "x"}, time_steps=0)
