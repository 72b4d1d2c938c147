"""Pretrained tags: what they point at, and the model arguments that come with them."""

import pickle
from pathlib import Path

import pytest
import timm
import torch
from timm.models import PretrainedCfg

from timm_qkformer.models._weights import WeightsError

RELEASE = "https://github.com/bic-L/MaxFormer/releases/download/checkpoints/"

# Asset and time steps of every public file, the default tag of each model first.
PUBLIC = {
    "qkformer_hst10_384_ms.t4_in1k": ("ms_qk_10-384_T4.pth.tar", 4),
    "qkformer_hst10_768_ms.t1_in1k": ("ms_qk_10-768_T1.pth.tar", 1),
    "maxformer_10_384.t4_in1k": ("10-384-T4.pth.tar", 4),
    "maxformer_10_512.t4_in1k": ("10-512-T4.pth.tar", 4),
    "maxformer_10_512.t1_in1k": ("10-512-T1.pth.tar", 1),
    "maxformer_10_768.t4_in1k": ("10-768-T4.pth.tar", 4),
    "maxformer_10_768.t1_in1k": ("10-768-T1.pth.tar", 1),
}


@pytest.mark.parametrize("tag", PUBLIC)
def test_public_weights(tag):
    asset, steps = PUBLIC[tag]
    assert tag in timm.list_pretrained()
    model = timm.create_model(tag, device="meta")
    assert model.time_steps == steps
    cfg = model.pretrained_cfg
    assert cfg["url"] == RELEASE + asset
    assert cfg["input_size"] == (3, 224, 224)
    assert (cfg["crop_pct"], cfg["interpolation"]) == (224 / 256, "bicubic")
    assert cfg["mean"] == (0.485, 0.456, 0.406)
    assert cfg["std"] == (0.229, 0.224, 0.225)
    assert cfg["origin_url"] == "https://github.com/bic-L/MaxFormer"
    assert "arXiv:2505.18608" in cfg["paper_ids"]
    assert "license" not in cfg  # the release states none


def test_default_tags():
    defaults = {}
    for tag in PUBLIC:
        defaults.setdefault(tag.split(".")[0], tag.split(".")[1])
    for name, tag in defaults.items():
        model = timm.create_model(name, device="meta")
        assert model.pretrained_cfg["tag"] == tag
        assert f".{tag[:2]}_" in f".{tag}"
        assert model.time_steps == int(tag[1])


def test_only_downloadable_weights_are_listed():
    assert timm.models.get_pretrained_cfg("qkformer_hst10_512_ms").tag == "untrained"
    assert not any("untrained" in name for name in timm.list_pretrained("*former*"))


def test_the_caller_has_the_last_word_on_time_steps():
    assert timm.create_model("maxformer_10_768.t1_in1k", device="meta", time_steps=3).time_steps == 3
    assert timm.create_model("maxformer_10_768", pretrained_cfg="t1_in1k", device="meta").time_steps == 1


def test_configs_of_ones_own():
    own = {"num_classes": 5, "input_size": (1, 64, 64), "tag": "mine"}
    for cfg in (own, PretrainedCfg(**own)):
        model = timm.create_model("test_maxformer", pretrained_cfg=cfg)
        assert (model.num_classes, model.in_chans, model.time_steps) == (5, 1, 4)
        assert model.pretrained_cfg["tag"] == "mine"


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_checkpoint_that_would_run_code_does_not(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    marker, path = tmp_path / "marker", tmp_path / "harmful.pth.tar"
    state_dict = timm.create_model("test_maxformer").state_dict()
    torch.save({"model": state_dict, "args": Harmful(marker)}, path)
    with pytest.raises(WeightsError, match="Weights only") as refusal:
        timm.create_model("test_maxformer", pretrained=True, pretrained_cfg_overlay={"url": path.as_uri()})
    assert isinstance(refusal.value.__cause__, pickle.UnpicklingError)
    assert not marker.exists()
