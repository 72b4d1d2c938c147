"""Pretrained configs: what is listed, what waits, failures without a network; and fine-tuning from weights."""

import pickle
from pathlib import Path

import pytest
import timm
import torch
from timm.models import PretrainedCfg
from timm.optim import create_optimizer_v2

from timm_qkformer.models.loading import PendingCfg, WeightsError
from timm_qkformer.models.qkformer import QKFormer
from tiny import tiny

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


def test_the_caller_has_the_last_word_on_time_steps():
    assert timm.create_model("maxformer_10_768.t1_in1k", device="meta", time_steps=3).time_steps == 3
    assert timm.create_model("maxformer_10_768", pretrained_cfg="t1_in1k", device="meta").time_steps == 1


def test_configs_of_ones_own():
    own = {"num_classes": 5, "input_size": (1, 64, 64), "tag": "mine"}
    for cfg in (own, PretrainedCfg(**own)):
        model = timm.create_model("test_maxformer", pretrained_cfg=cfg)
        assert (model.num_classes, model.in_chans, model.time_steps) == (5, 1, 4)
        assert model.pretrained_cfg["tag"] == "mine"


def load_file(path, **kwargs):
    return timm.create_model("test_qkformer", pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **kwargs)


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
    assert timm.get_pretrained_cfg("qkformer_hst10_512_ms").tag == "untrained"
    ours = [n for n in timm.list_pretrained(["qkformer*", "maxformer*"]) if not timm.get_pretrained_cfg(n).file]
    assert {name.split(".")[0] for name in ours} == {tag.split(".")[0] for tag in PUBLIC}
    assert all(timm.get_pretrained_cfg(name).url.startswith(RELEASE) for name in ours)


def test_default_tags_bring_the_evaluation_transform():
    model = timm.create_model("qkformer_hst10_768.ft384_in1k", device="meta")
    config = timm.data.resolve_model_data_config(model)
    assert (config["input_size"], config["crop_pct"], config["interpolation"]) == ((3, 384, 384), 1.0, "bicubic")
    default = timm.create_model("qkformer_hst10_768", device="meta")
    assert default.pretrained_cfg["tag"] == "in1k"


def test_models_without_weights_say_what_else_there_is():
    with pytest.raises(WeightsError, match="has no pretrained weights") as error:
        timm.create_model("test_maxformer", pretrained=True)
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
        load_file(path)
    assert str(path) in str(error.value)
    assert error.value.__cause__ is not None


def test_weights_that_do_not_fit_keep_their_own_error(tmp_path):
    torch.save({"head.weight": torch.zeros(3, 3)}, tmp_path / "weights.pth")
    with pytest.raises(RuntimeError, match="Missing key") as error:
        load_file(tmp_path / "weights.pth")
    assert not isinstance(error.value, WeightsError)


def test_errors_that_the_caller_is_handling_are_not_ours():
    try:
        raise ConnectionError("of the caller")
    except ConnectionError:
        with pytest.raises(ValueError, match="time_steps=0"):
            load_file("x", time_steps=0)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model and the file that has its weights."""
    torch.manual_seed(6)
    model = tiny("test_qkformer", num_classes=10).float()
    assert model(torch.randn(1, 3, 64, 64)).count_nonzero() == 10
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save(model.state_dict(), path)
    return model, {"file": str(path), "num_classes": 10}


def pretrained(source, **kwargs) -> QKFormer:
    return timm.create_model("test_qkformer", pretrained=True, pretrained_cfg_overlay=source[1], **kwargs)


def assert_same_tensors(model, source, but):
    mine, theirs = model.state_dict(), source[0].state_dict()
    assert mine.keys() == theirs.keys()
    for name in mine:
        if name not in but:
            torch.testing.assert_close(mine[name], theirs[name], rtol=0.0, atol=0.0)


@pytest.mark.parametrize("in_chans", [1, 2, 4, 6])
def test_other_channels_adapt_the_first_convolution(source, in_chans):
    model = pretrained(source, num_classes=10, in_chans=in_chans)
    assert_same_tensors(model, source, but=("stem.conv.weight",))
    assert model.stem.conv.weight.shape[1] == in_chans
    assert model(torch.randn(1, in_chans, 64, 64)).shape == (1, 10)


@pytest.mark.parametrize(("size", "time_steps"), [(96, 1), (288, 2), (384, 6)])
def test_other_sizes_and_time_steps_need_nothing(source, size, time_steps):
    model = pretrained(source, num_classes=10, time_steps=time_steps).eval()
    assert_same_tensors(model, source, but=())
    source[0].eval().set_time_steps(time_steps)
    x = torch.randn(1, 3, size, size)
    with torch.inference_mode():
        features = model.forward_features(x)
        assert features.shape == (1, 64, size // 16, size // 16)
        torch.testing.assert_close(model.forward_head(features), source[0](x))
    source[0].set_time_steps(4)


def test_weights_can_be_fine_tuned(source):
    """A few steps with layer decay at another size, class count and T bring the loss down."""
    torch.manual_seed(7)
    model = pretrained(source, num_classes=4, time_steps=2, in_chans=1)
    optimizer = create_optimizer_v2(model, "adamw", lr=5e-3, weight_decay=0.0, layer_decay=0.8)
    images, targets = torch.randn(4, 1, 80, 80), torch.arange(4)
    losses = []
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
