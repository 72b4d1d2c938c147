"""What other libraries are told: target layers, adapters' modules, FX's leaves."""

import re

import pytest
import timm
import torch
from torch import nn

from timm_qkformer.models import ATTRIBUTION_LAYER, FX_LEAF_MODULES, PEFT_TARGET_MODULES
from tiny import images, tiny


@pytest.mark.parametrize("name", ["test_qkformer", "test_sdt"])
def test_adapters_go_to_convolutions_of_attention_and_mlp(name):
    modules = {path: m for path, m in tiny(name).named_modules() if re.fullmatch(PEFT_TARGET_MODULES, path)}
    assert all(isinstance(module, nn.Conv2d) for module in modules.values())
    assert {path.split(".")[-2] for path in modules} >= {"q", "k", "proj", "fc1", "fc2"}


def test_leaves_stay_one_node_each():
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model, x = tiny("test_qkformer_ms"), images(2)
    leaves = {"leaf_modules": list(FX_LEAF_MODULES)}
    extractor = extraction.create_feature_extractor(model, ["readout"], tracer_kwargs=leaves)
    assert torch.equal(extractor(x)["readout"], model.forward_features(x))


@pytest.mark.parametrize("name", ["test_qkformer", "test_qkformer_ms"])
def test_captum_attributes_to_each_sample(name):
    attr = pytest.importorskip("captum.attr")
    model, x = tiny(name), images(3)
    cam = attr.LayerGradCam(model, model.get_submodule(ATTRIBUTION_LAYER))
    maps = cam.attribute(x, target=torch.tensor([0, 1, 2]))
    assert maps.shape[:2] == (3, 1)
    one = cam.attribute(x[1:2], target=torch.tensor([1]))
    torch.testing.assert_close(maps[1:2], one, rtol=1e-9, atol=1e-12)


def test_grad_cam_draws_each_sample():
    grad_cam = pytest.importorskip("pytorch_grad_cam")
    targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")
    model, x = tiny("test_qkformer"), images(3)
    with grad_cam.GradCAM(model=model, target_layers=[model.get_submodule(ATTRIBUTION_LAYER)]) as cam:
        maps = cam(input_tensor=x, targets=[targets.ClassifierOutputTarget(k) for k in (0, 1, 2)])
        assert maps.shape == (3, 32, 32)
        one = cam(input_tensor=x[1:2], targets=[targets.ClassifierOutputTarget(1)])
    torch.testing.assert_close(torch.as_tensor(maps[1:2]), torch.as_tensor(one), rtol=1e-4, atol=1e-5)


def test_output_stride_is_kept_or_refused():
    for features_only in (False, True):
        timm.create_model("test_qkformer", output_stride=16, features_only=features_only)
        timm.create_model("qkformer_hst10_384", output_stride=16, features_only=features_only, device="meta")
        with pytest.raises(ValueError, match=r"output_stride=8: .* stride of 16"):
            timm.create_model("test_qkformer", output_stride=8, features_only=features_only)
    encoder = timm.create_model("test_qkformer", output_stride=8, features_only=True, out_indices=(0, 1))
    assert encoder.feature_info.reduction() == [4, 8]
