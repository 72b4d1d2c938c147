"""Plain FX, torchvision's feature extraction, and inputs that are no floating-point images."""

import pytest
import timm
import torch
from torchvision.models.feature_extraction import create_feature_extractor

import tiny
from timm_qkformer import deploy

MODELS = [*((name, {}) for name in tiny.NAMES), ("test_qkformer_ms", {"neuron": "plif"})]


@pytest.mark.parametrize(("name", "options"), MODELS)
def test_fx_traces_once_for_every_size(name, options):
    model = tiny.tiny(name, **options)
    traced = torch.fx.symbolic_trace(model)
    C = model.in_chans
    for x in (torch.randn(2, C, 32, 32).double(), torch.randn(3, 2, C, 64, 32).double()):
        torch.testing.assert_close(traced(x), model(x), rtol=1e-12, atol=1e-12)
    last = f"stages.{len(model.stages) - 1}"
    extractor = create_feature_extractor(model, {last: "stage", "head": "logits"})
    found = extractor(x)
    torch.testing.assert_close(found["logits"], model(x), rtol=1e-12, atol=1e-12)
    assert found["stage"].dim() == 5


@pytest.mark.parametrize("feature_cls", ["hook", "fx", "list", "dict"])
def test_feature_classes_that_would_give_sequences_are_refused(feature_cls):
    with pytest.raises(ValueError, match=f"feature_cls='{feature_cls}' would give the stages' sequences"):
        timm.create_model("test_qkformer", features_only=True, feature_cls=feature_cls)
    maps = timm.create_model("test_qkformer", features_only=True, feature_cls="getter")(torch.randn(1, 3, 16, 16))
    assert all(x.dim() == 4 for x in maps)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.bool], ids=str)
@pytest.mark.parametrize("is_deployed", [False, True])
def test_integers_are_refused_by_name(dtype, is_deployed):
    model = timm.create_model("test_qkformer")
    model = deploy(model) if is_deployed else model
    for x in (torch.zeros(1, 3, 16, 16), torch.zeros(1, 2, 3, 16, 16)):
        with pytest.raises(ValueError, match=rf"input is {dtype}: give floating-point"):
            model(x.to(dtype))


def test_a_clip_of_other_channels_shows_both_layouts():
    model = timm.create_model("test_qkformer", in_chans=2)
    with pytest.raises(
        ValueError, match=r"\[4, 2, 3, 16, 16\].*\[B, T, C, H, W\].*\[T, B, C, H, W\].*transpose\(0, 1\)"
    ):
        model(torch.zeros(4, 2, 3, 16, 16))
