"""`checkpoint_filter_fn`: both releases' spellings, by name and by position, strictness, and timm's adaptation."""

import argparse
import logging
import re
import sys

import pytest
import timm
import torch

from golden import CASES, GoldenCase
from release import in_release_order, membrane_release_state_dict, release_state_dict
from timm_qkformer.models.positions import Stored, name_by_position

MEMBRANE = ["test_qkformer_ms", "test_maxformer"]
WRAPS = [lambda sd: sd, lambda sd: {"model": sd, "epoch": 3}, lambda sd: {"state_dict": sd}]


def small(name, **kwargs):
    return timm.create_model(name, **{"num_classes": 5, **kwargs}).eval()


@pytest.fixture
def plain():
    return small("test_qkformer")


@pytest.fixture(params=MEMBRANE)
def membrane(request):
    return small(request.param)


def checkpoint_filter(checkpoint, model):
    return sys.modules[type(model).__module__].checkpoint_filter_fn(checkpoint, model)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("spelling", ["imagenet", "cifar"])
def test_release_spellings(plain, spelling, prefix, wrap):
    release = {prefix + k: v for k, v in release_state_dict(plain, spelling).items()}
    assert equal(checkpoint_filter(wrap(release), plain), plain.state_dict())


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("names", ["known", "unknown", "sorted"])
def test_membrane_release_by_name_and_by_position(membrane, prefix, wrap, names):
    release = membrane_release_state_dict(membrane)
    if names == "unknown":
        release = {f"tensor_{i}": v for i, v in enumerate(release.values())}
    elif names == "sorted":
        release = dict(sorted(release.items()))
    release = {prefix + k: v for k, v in release.items()}
    assert equal(checkpoint_filter(wrap(release), membrane), membrane.state_dict())


@pytest.mark.parametrize("name", ["test_qkformer", *MEMBRANE])
def test_own_state_dict_passes_unchanged(name):
    model = small(name)
    own = model.state_dict()
    assert equal(checkpoint_filter(own, model), own)
    assert equal(checkpoint_filter({"state_dict": own, "epoch": 1}, model), own)
    if name in MEMBRANE:
        del own["stem.conv.weight"]  # for load_state_dict to complain about
        assert equal(checkpoint_filter(own, model), own)


@pytest.mark.parametrize("case", CASES)
def test_names_of_nobody_are_matched_by_position(case):
    name, args = CASES[case]
    checkpoint = GoldenCase(case).checkpoint
    model = timm.create_model(name, device="meta", **args)
    expected = checkpoint_filter(checkpoint, model)
    strange = {f"t{i}": tensor for i, tensor in enumerate(checkpoint.values())}
    assert equal(checkpoint_filter({"state_dict": {f"module.{k}": t for k, t in strange.items()}}, model), expected)
    with pytest.raises(ValueError, match=rf"{len(strange) - 1} tensors cannot be matched by position with"):
        checkpoint_filter({k: t for k, t in strange.items() if k != "t7"}, model)
    with pytest.raises(ValueError, match=r"by position, misshapen: t0 \[2, 3\] instead of"):
        checkpoint_filter({**strange, "t0": torch.zeros(2, 3)}, model)
    with pytest.raises(ValueError, match="by position, misshapen: "):
        checkpoint_filter(dict(reversed(strange.items())), model)


def test_another_order_than_the_releases_is_refused(plain):
    """The release's image models list all patch embeddings first, the package's own each with its blocks."""
    release = release_state_dict(plain)
    own = {f"t{i}": tensor for i, tensor in enumerate(release.values())}
    with pytest.raises(ValueError, match="by position, misshapen"):
        checkpoint_filter(own, plain)
    strange = {f"t{i}": tensor for i, tensor in enumerate(in_release_order(release).values())}
    assert equal(checkpoint_filter(strange, plain), plain.state_dict())


def test_embeddings_without_a_release_have_no_positions():
    model = timm.create_model("qkformer_hst3_192", device="meta")
    strange = {f"t{i}": tensor for i, tensor in enumerate(model.state_dict().values())}
    assert checkpoint_filter(strange, model) == strange  # for load_state_dict to complain about


def test_two_ways_to_match_positions_are_refused():
    model = torch.nn.Linear(3, 2)
    order = [Stored("a", "weight"), *(Stored(k, shape=(None,), kind=k) for k in ("b", "c")), Stored("d", "bias")]
    tensors = dict(zip("wxyz", (torch.zeros(2, 3), torch.zeros(4), torch.zeros(4), torch.zeros(2)), strict=True))
    assert list(name_by_position(tensors, model, order)) == list("abcd")
    del tensors["x"]
    with pytest.raises(ValueError, match="besides what this Linear needs, c or b: name its tensors"):
        name_by_position(tensors, model, order)
    assert list(name_by_position({"a": tensors["w"], "b": tensors["y"], "d": tensors["z"]}, model, order)) == list(
        "abd"
    )


NAMES = [
    "patch_embed1.proj_conv.weight",
    "patch_embed2.proj4_bn.running_var",
    "patch_embed3.proj_res_conv.weight",
    "stage1.0.tssa.q_bn.weight",
    "stage3.1.attn.proj_conv.bias",
    "stage2.0.mlp.fc1_bn.num_batches_tracked",
]


@pytest.mark.parametrize("name", [*NAMES, "head.weight"])
def test_a_missing_tensor_is_named(plain, name):
    release = release_state_dict(plain)
    del release[name]
    with pytest.raises(ValueError, match=f"missing: {re.escape(name)}"):
        checkpoint_filter(release, plain)


def test_a_missing_tensor_of_a_membrane_release_is_named(membrane):
    release = membrane_release_state_dict(membrane)
    del release["stage3.1.mlp.fc1_bn.running_var"]
    with pytest.raises(ValueError, match=r"by name, missing: stage3\.1\.mlp\.fc1_bn\.running_var"):
        checkpoint_filter(release, membrane)


def test_a_missing_layer_is_named(plain):
    release = {k: v for k, v in release_state_dict(plain).items() if ".k_" not in k}
    with pytest.raises(ValueError, match=r"missing: stages\.0\.blocks\.0\.attn\.k\.conv\.weight"):
        checkpoint_filter(release, plain)


@pytest.mark.parametrize("name", ["stage1.7.tssa.q_bn.weight", "stage4.0.mlp.fc1_bn.bias", "pos_embed", "head.scale"])
def test_an_extra_tensor_is_named(plain, name):
    with pytest.raises(ValueError, match=re.escape(name)):
        checkpoint_filter(release_state_dict(plain) | {name: torch.zeros(3)}, plain)


@pytest.mark.parametrize("name", ["stage3.9.mlp.fc1_conv.bias", "pos_embed"])
def test_an_extra_tensor_of_a_membrane_release_is_named(membrane, name):
    release = membrane_release_state_dict(membrane)
    count = len(release)
    with pytest.raises(ValueError, match=rf"{re.escape(name)}.*{count + 1} tensors cannot.* position with {count}"):
        checkpoint_filter(release | {name: torch.zeros(3)}, membrane)


@pytest.mark.parametrize("name", NAMES)
def test_a_misshapen_tensor_is_named(plain, name):
    release = release_state_dict(plain) | {name: torch.zeros(2, 3)}
    with pytest.raises(ValueError, match=rf"misshapen: {re.escape(name)} \[2, 3\] instead of \["):
        checkpoint_filter(release, plain)


@pytest.mark.parametrize("known", [True, False])
def test_a_misshapen_tensor_of_a_membrane_release_is_named(membrane, known):
    name = "stage3.1.attn.proj_conv.weight"
    release = membrane_release_state_dict(membrane) | {name: torch.zeros(2, 3)}
    if not known:
        release = {k.replace("stage", "layer"): v for k, v in release.items()}
        name = name.replace("stage", "layer")
    with pytest.raises(ValueError, match=rf"by position, misshapen: {re.escape(name)} \[2, 3\] instead of \[64, 64, 1"):
        checkpoint_filter(release, membrane)


def test_two_tensors_in_each_others_place_are_refused(membrane):
    """Position alone counts when names are unknown, so a shape out of place must not be glossed over."""
    values = list(membrane_release_state_dict(membrane).values())
    values[0], values[1] = values[1], values[0]
    with pytest.raises(ValueError, match=r"by position, misshapen: tensor_0 .*, tensor_1"):
        checkpoint_filter({f"tensor_{i}": v for i, v in enumerate(values)}, membrane)


@pytest.mark.parametrize(
    ("name", "spell", "message"),
    [
        ("test_qkformer", release_state_dict, r"does not fit this QKFormer; misshapen: .* and \d+ more"),
        *((n, membrane_release_state_dict, r"fit this \w+: by name, misshapen: .* and \d+ more") for n in MEMBRANE),
    ],
)
def test_another_width_is_refused(name, spell, message):
    with pytest.raises(ValueError, match=message):
        checkpoint_filter(spell(small(name, embed_dims=(16, 32, 128))), small(name))


def test_each_others_checkpoints_are_refused():
    ms, maxformer = map(small, MEMBRANE)
    for theirs, model in ((maxformer, ms), (ms, maxformer)):
        with pytest.raises(ValueError, match="cannot be matched by position"):
            checkpoint_filter(membrane_release_state_dict(theirs), model)


def test_models_without_membrane_shortcuts_refuse_their_release(plain):
    with pytest.raises(ValueError, match=r"MS-QKFormer.*qkformer_hst10_\*_ms"):
        checkpoint_filter(membrane_release_state_dict(small("test_qkformer_ms")), plain)


def test_names_of_qkformers_own_release_are_suspicious(caplog):
    """Older MS checkpoints may be spelled so, but so are the weights of models without membrane shortcuts."""
    ms = small("test_qkformer_ms")
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
    [
        ({}, "no tensors"),
        ({"model": {"a": "b"}}, "not tensors: a"),
        ({"epoch": 3, "optimizer": {}}, "not tensors: epoch, optimizer"),
    ],
)
def test_no_checkpoint_at_all(plain, checkpoint, message):
    with pytest.raises(ValueError, match=message):
        checkpoint_filter(checkpoint, plain)


@pytest.mark.parametrize(
    ("name", "known"), [("test_qkformer", True), *((n, known) for n in MEMBRANE for known in (True, False))]
)
@pytest.mark.parametrize("way", ["file", "url"])
@torch.inference_mode()
def test_loads_through_timm(name, known, way, tmp_path, monkeypatch):
    """A training checkpoint with its command line, as `pretrained=True` loads it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    source = timm.create_model(name).eval()
    release = (membrane_release_state_dict if name in MEMBRANE else release_state_dict)(source)
    if not known:
        release = {k.replace("_", "."): v for k, v in release.items()}
    path = tmp_path / "released.pth.tar"
    torch.save({"model": release, "epoch": 9, "args": argparse.Namespace(lr=1e-3, model=name)}, path)
    overlay = {way: str(path) if way == "file" else path.as_uri()}
    x = torch.randn(2, 3, 32, 32)

    def create(**kwargs):
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()

    assert torch.equal(create()(x), source(x))
    other = create(num_classes=11)
    assert other(x).shape == (2, 11)
    assert torch.equal(other.forward_features(x), source.forward_features(x))
    assert torch.equal(create(num_classes=0)(x), source.forward_head(source.forward_features(x), pre_logits=True))
    grey = create(in_chans=1)  # gives the currents that it gave as three equal channels
    torch.testing.assert_close(grey.stem.conv.weight, source.stem.conv.weight.sum(1, keepdim=True))
    maps = source.forward_intermediates(x, intermediates_only=True)
    torch.testing.assert_close(create(features_only=True)(x), maps)


def test_a_wrong_number_of_classes_is_an_error_when_nobody_asked_for_it(tmp_path):
    path = tmp_path / "seven.pth"
    torch.save(release_state_dict(small("test_qkformer", num_classes=7)), path)
    with pytest.raises(RuntimeError, match=r"head\.weight"):
        timm.create_model("test_qkformer", pretrained=True, pretrained_cfg_overlay={"file": str(path)})
