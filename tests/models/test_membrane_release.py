"""Checkpoints of the Max-Former authors' release: by name, by position, strictness, and timm's adaptation."""

import argparse
import logging
import re
import sys

import pytest
import timm
import torch

from membrane_release import membrane_release_state_dict
from release import release_state_dict

NAMES = ["test_qkformer_ms", "test_maxformer"]


@pytest.fixture(params=NAMES)
def model(request):
    return timm.create_model(request.param, num_classes=5).eval()


def checkpoint_filter(checkpoint, model):
    return sys.modules[type(model).__module__].checkpoint_filter_fn(checkpoint, model)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrap", [lambda sd: sd, lambda sd: {"model": sd, "epoch": 3}, lambda sd: {"state_dict": sd}])
@pytest.mark.parametrize("names", ["known", "unknown", "sorted"])
def test_by_name_and_by_position(model, prefix, wrap, names):
    release = membrane_release_state_dict(model)
    if names == "unknown":
        release = {f"tensor_{i}": v for i, v in enumerate(release.values())}
    elif names == "sorted":
        release = dict(sorted(release.items()))
    release = {prefix + k: v for k, v in release.items()}
    assert equal(checkpoint_filter(wrap(release), model), model.state_dict())


def test_own_state_dict_passes_unchanged(model):
    own = model.state_dict()
    assert equal(checkpoint_filter(own, model), own)
    assert equal(checkpoint_filter({"state_dict": own, "epoch": 1}, model), own)
    del own["stem.conv.weight"]  # for load_state_dict to complain about
    assert equal(checkpoint_filter(own, model), own)


def test_a_missing_tensor_is_named(model):
    release = membrane_release_state_dict(model)
    del release["stage3.1.mlp.fc1_bn.running_var"]
    with pytest.raises(ValueError, match=r"by name, missing: stage3\.1\.mlp\.fc1_bn\.running_var"):
        checkpoint_filter(release, model)


@pytest.mark.parametrize("name", ["stage3.9.mlp.fc1_conv.bias", "pos_embed"])
def test_an_extra_tensor_is_named(model, name):
    release = membrane_release_state_dict(model)
    count = len(release)
    with pytest.raises(ValueError, match=rf"{re.escape(name)}.*{count + 1} tensors cannot.* position with {count}"):
        checkpoint_filter(release | {name: torch.zeros(3)}, model)


@pytest.mark.parametrize("known", [True, False])
def test_a_misshapen_tensor_is_named(model, known):
    release = membrane_release_state_dict(model)
    name = "stage3.1.attn.proj_conv.weight"
    release[name] = torch.zeros(2, 3)
    if not known:
        release = {k.replace("stage", "layer"): v for k, v in release.items()}
        name = name.replace("stage", "layer")
    with pytest.raises(ValueError, match=rf"by position, misshapen: {re.escape(name)} \[2, 3\] instead of \[64, 64, 1"):
        checkpoint_filter(release, model)


def test_two_tensors_in_each_others_place_are_refused(model):
    """Position alone counts when names are unknown, so a shape out of place must not be glossed over."""
    values = list(membrane_release_state_dict(model).values())
    values[0], values[1] = values[1], values[0]
    with pytest.raises(ValueError, match=r"by position, misshapen: tensor_0 .*, tensor_1"):
        checkpoint_filter({f"tensor_{i}": v for i, v in enumerate(values)}, model)


def test_another_width_is_refused(model):
    wider = timm.create_model(model.pretrained_cfg["architecture"], num_classes=5, embed_dims=(16, 32, 128))
    with pytest.raises(ValueError, match=r"does not fit this \w+: by name, misshapen: .* and \d+ more"):
        checkpoint_filter(membrane_release_state_dict(wider), model)


def test_each_others_checkpoints_are_refused():
    ms, maxformer = (timm.create_model(name) for name in NAMES)
    with pytest.raises(ValueError, match="cannot be matched by position"):
        checkpoint_filter(membrane_release_state_dict(maxformer), ms)
    with pytest.raises(ValueError, match="cannot be matched by position"):
        checkpoint_filter(membrane_release_state_dict(ms), maxformer)


def test_models_without_membrane_shortcuts_refuse_it():
    ms, plain = timm.create_model("test_qkformer_ms"), timm.create_model("test_qkformer")
    with pytest.raises(ValueError, match=r"MS-QKFormer.*qkformer_hst10_\*_ms"):
        checkpoint_filter(membrane_release_state_dict(ms), plain)


def test_names_of_qkformers_own_release_are_suspicious(caplog):
    """Older MS checkpoints may be spelled so, but so are the weights of models without membrane shortcuts."""
    ms = timm.create_model("test_qkformer_ms")
    by_name = membrane_release_state_dict(ms)
    names = [n.replace("proj_conv1", "proj1_conv").replace("proj_bn1", "proj1_bn") for n in by_name]
    names = [n.replace("proj_conv2", "proj2_conv").replace("proj_bn2", "proj2_bn") for n in names]
    names = [n.replace("rpe_", "proj_res_") for n in names]
    assert set(names) - {n.replace("tssa", "attn") for n in release_state_dict(ms)} == set()
    with caplog.at_level(logging.WARNING):
        assert equal(checkpoint_filter(by_name, ms), ms.state_dict())
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert equal(checkpoint_filter(dict(zip(names, by_name.values(), strict=True)), ms), ms.state_dict())
    assert "without membrane shortcuts" in caplog.text


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [({}, "no tensors"), ({"model": {"a": "b"}}, "not tensors: a"), ({"epoch": 3}, "not tensors: epoch")],
)
def test_no_checkpoint_at_all(model, checkpoint, message):
    with pytest.raises(ValueError, match=message):
        checkpoint_filter(checkpoint, model)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_loads_through_timm(name, known, tmp_path, monkeypatch):
    """A training checkpoint with its command line, by url, as `pretrained=True` does."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    source = timm.create_model(name).eval()
    release = membrane_release_state_dict(source)
    if not known:
        release = {k.replace("_", "."): v for k, v in release.items()}
    path = tmp_path / "released.pth.tar"
    torch.save({"model": release, "epoch": 9, "args": argparse.Namespace(lr=1e-3, model=name)}, path)
    overlay = {"url": path.as_uri()}
    x = torch.randn(2, 3, 32, 32)

    def create(**kwargs):
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()

    assert torch.equal(create()(x), source(x))
    other = create(num_classes=11)
    assert other(x).shape == (2, 11)
    assert torch.equal(other.forward_features(x), source.forward_features(x))
    headless = create(num_classes=0)
    assert torch.equal(headless(x), source.forward_head(source.forward_features(x), pre_logits=True))
    grey = create(in_chans=1)
    torch.testing.assert_close(grey.stem.conv.weight, source.stem.conv.weight.sum(1, keepdim=True))
    features = create(features_only=True)(x)
    torch.testing.assert_close(features[0], source.forward_intermediates(x, intermediates_only=True)[0])
