"""`checkpoint_filter_fn`: the release's spellings, strictness, and timm's adaptation of classes and channels."""

import re

import pytest
import timm
import torch

from release import release_state_dict
from timm_qkformer.models.qkformer import checkpoint_filter_fn


@pytest.fixture
def model():
    return timm.create_model("test_qkformer", num_classes=5).eval()


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("spelling", ["imagenet", "cifar"])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrap", [lambda sd: sd, lambda sd: {"model": sd, "epoch": 3}, lambda sd: {"state_dict": sd}])
def test_release_spellings(model, spelling, prefix, wrap):
    release = {prefix + k: v for k, v in release_state_dict(model, spelling).items()}
    assert equal(checkpoint_filter_fn(wrap(release), model), model.state_dict())


def test_own_state_dict_passes_unchanged(model):
    own = model.state_dict()
    assert equal(checkpoint_filter_fn(own, model), own)
    assert equal(checkpoint_filter_fn({"state_dict": own, "epoch": 1}, model), own)


NAMES = [
    "patch_embed1.proj_conv.weight",
    "patch_embed2.proj4_bn.running_var",
    "patch_embed3.proj_res_conv.weight",
    "stage1.0.tssa.q_bn.weight",
    "stage3.1.attn.proj_conv.bias",
    "stage2.0.mlp.fc1_bn.num_batches_tracked",
]


@pytest.mark.parametrize("name", [*NAMES, "head.weight"])
def test_a_missing_tensor_is_named(model, name):
    release = release_state_dict(model)
    del release[name]
    with pytest.raises(ValueError, match=f"missing: {re.escape(name)}"):
        checkpoint_filter_fn(release, model)


def test_a_missing_layer_is_named(model):
    release = {k: v for k, v in release_state_dict(model).items() if ".k_" not in k}
    with pytest.raises(ValueError, match=r"missing: stages\.0\.blocks\.0\.attn\.k\.conv\.weight"):
        checkpoint_filter_fn(release, model)


@pytest.mark.parametrize("name", ["stage1.7.tssa.q_bn.weight", "stage4.0.mlp.fc1_bn.bias", "pos_embed", "head.scale"])
def test_an_extra_tensor_is_named(model, name):
    release = release_state_dict(model) | {name: torch.zeros(3)}
    with pytest.raises(ValueError, match=re.escape(name)):
        checkpoint_filter_fn(release, model)


@pytest.mark.parametrize("name", NAMES)
def test_a_misshapen_tensor_is_named(model, name):
    release = release_state_dict(model)
    release[name] = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=rf"misshapen: {re.escape(name)} \[2, 3\] instead of \["):
        checkpoint_filter_fn(release, model)


def test_another_width_is_refused(model):
    wider = timm.create_model("test_qkformer", num_classes=5, embed_dims=(16, 32, 128))
    with pytest.raises(ValueError, match=r"does not fit this QKFormer; misshapen: .* and \d+ more"):
        checkpoint_filter_fn(release_state_dict(wider), model)


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ({}, "no tensors"),
        ({"model": {"a": "b"}}, "not tensors: a"),
        ({"epoch": 3, "optimizer": {}}, "not tensors: epoch, optimizer"),
    ],
)
def test_no_checkpoint_at_all(model, checkpoint, message):
    with pytest.raises(ValueError, match=message):
        checkpoint_filter_fn(checkpoint, model)


@pytest.fixture
def released_file(tmp_path):
    source = timm.create_model("test_qkformer").eval()
    path = tmp_path / "released.pth"
    torch.save({"model": release_state_dict(source), "epoch": 9}, path)
    return source, str(path)


@torch.inference_mode()
def test_loads_through_timm(released_file):
    source, path = released_file
    x = torch.randn(2, 3, 32, 32)
    overlay = {"file": path}
    loaded = timm.create_model("test_qkformer", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    assert torch.equal(loaded(x), source(x))

    other = timm.create_model("test_qkformer", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=11).eval()
    assert other(x).shape == (2, 11)
    assert torch.equal(other.forward_features(x), source.forward_features(x))

    headless = timm.create_model("test_qkformer", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0).eval()
    assert torch.equal(headless(x), source.forward_head(source.forward_features(x), pre_logits=True))

    grey = timm.create_model("test_qkformer", pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1).eval()
    torch.testing.assert_close(grey.stem.conv.weight, source.stem.conv.weight.sum(1, keepdim=True))

    features = timm.create_model("test_qkformer", pretrained=True, pretrained_cfg_overlay=overlay, features_only=True)
    torch.testing.assert_close(features.eval()(x)[-1], source.forward_features(x))


def test_a_wrong_number_of_classes_is_an_error_when_nobody_asked_for_it(tmp_path):
    path = tmp_path / "seven.pth"
    torch.save(release_state_dict(timm.create_model("test_qkformer", num_classes=7)), path)
    with pytest.raises(RuntimeError, match=r"head\.weight"):
        timm.create_model("test_qkformer", pretrained=True, pretrained_cfg_overlay={"file": str(path)})
