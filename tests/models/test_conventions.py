"""What other libraries are told: target layers, adapters' modules, FX's leaves."""

import copy
import re

import pytest
import timm
import torch
from torch import nn

import timm_qkformer
from timm_qkformer.execution import execution_policy
from timm_qkformer.models import ATTRIBUTION_LAYER, FX_LEAF_MODULES, PEFT_TARGET_MODULES
from tiny import images, tiny


@pytest.mark.parametrize("name", ["test_qkformer", "test_sdt"])
def test_adapters_go_to_convolutions_of_attention_and_mlp(name):
    modules = {path: m for path, m in tiny(name).named_modules() if re.fullmatch(PEFT_TARGET_MODULES, path)}
    assert all(isinstance(module, nn.Conv2d) for module in modules.values())
    assert {path.split(".")[-2] for path in modules} >= {"q", "k", "proj", "fc1", "fc2"}


@pytest.mark.parametrize("name", ["test_qkformer", "test_sdt"])
def test_adapters_read_back_answer_as_trained(name, tmp_path):
    """With the batch norms' statistics, which move in training."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=PEFT_TARGET_MODULES, r=2, modules_to_save=["head", "bn"])
    base, x = tiny(name), images(4)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model.train()(x).square().sum().backward()
    optimizer.step()
    trained = model.eval()(x)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(again(x), trained, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(base(x), trained)
    torch.testing.assert_close(model.merge_and_unload()(x), trained, rtol=1e-9, atol=1e-9)


def test_leaves_stay_one_node_each():
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model, x = tiny("test_qkformer_ms"), images(2)
    leaves = {"leaf_modules": list(FX_LEAF_MODULES)}
    extractor = extraction.create_feature_extractor(model, ["readout"], tracer_kwargs=leaves)
    assert torch.equal(extractor(x)["readout"], model.forward_features(x))


@pytest.mark.parametrize("name", ["test_qkformer", "test_qkformer_ms"])
def test_attribution_at_the_readout_is_of_each_sample_alone(name):
    """As these libraries do it: the layer's output times its gradient, whose first dimension they take for samples."""
    model, x = tiny(name), images(3)

    def cam(x):
        kept = []
        layer = model.get_submodule(ATTRIBUTION_LAYER)
        with layer.register_forward_hook(lambda module, inputs, output: kept.append(output)):
            logits = model(x)
        (gradient,) = torch.autograd.grad(logits[:, 1].sum(), kept)
        return (gradient.mean((2, 3), keepdim=True) * kept[0]).sum(1)

    maps = cam(x)
    assert maps.shape[0] == len(x)
    assert maps.abs().amax((1, 2)).min() > 0
    torch.testing.assert_close(maps[1:2], cam(x[1:2]), rtol=1e-9, atol=1e-12)


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


DILATED = [
    ("test_qkformer", {"attn": "qkta"}, 8),
    ("test_qkformer_ms", {"attn": "qkta"}, 4),
    ("test_maxformer", {"mixer": "dwc3"}, 8),
    ("test_maxformer", {"mixer": "dwc5"}, 2),
    ("test_qkformer", {"attn": "qkta", "patch_embed": "events"}, 4),
    ("test_qkformer", {"attn": "qkta", "patch_embed": "sps_cifar"}, 1),
]


def twins(name, args, output_stride, **kwargs):
    """A model and, with the same weights, the one that keeps the output stride."""
    plain = tiny(name, time_steps=2, **args, **kwargs)
    dilated = timm.create_model(name, num_classes=7, time_steps=2, output_stride=output_stride, **args, **kwargs)
    dilated.double().eval().load_state_dict(plain.state_dict())
    return plain, dilated


@pytest.mark.parametrize(("name", "args", "output_stride"), DILATED)
def test_dilated_stages_compute_the_same_at_more_pixels(name, args, output_stride):
    """Where tokens do not mix over the whole map, every n-th pixel has what the plain model computes."""
    plain, dilated = twins(name, args, output_stride)
    x = images(2, size=(36, 27))
    whole, maps = plain.forward_intermediates(x)[1], dilated.forward_intermediates(x)[1]
    assert [info["reduction"] for info in dilated.feature_info][-1] == output_stride
    for there, here, before, now in zip(plain.feature_info, dilated.feature_info, whole, maps, strict=True):
        step = there["reduction"] // here["reduction"]
        assert list(now.shape[2:]) == [-(-side // here["reduction"]) for side in (36, 27)]
        assert before.count_nonzero() > 0
        torch.testing.assert_close(now[..., ::step, ::step], before, rtol=1e-9, atol=1e-9)


def test_dilated_models_step_train_and_script():
    model = twins("test_qkformer", {}, 8)[1]
    x = images(2)
    state = None
    for frame in (x, None):
        logits, state = model.step(frame, state)
    torch.testing.assert_close(logits, model(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x), rtol=1e-9, atol=1e-9)
    gradients = []
    for packed in (True, False):
        model.train().zero_grad()
        with execution_policy(packed=packed):
            model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)
    with pytest.raises(ValueError, match="output_stride"):
        timm_qkformer.deploy(model)


def test_output_stride_as_timms_features_have_it():
    for stride, reductions in ((32, [4, 8, 16]), (16, [4, 8, 16]), (8, [4, 8, 8])):
        encoder = timm.create_model("test_qkformer", output_stride=stride, features_only=True)
        assert encoder.feature_info.reduction() == reductions
        assert [64 // m.shape[-1] for m in encoder(torch.randn(1, 3, 64, 64))] == reductions
    timm_qkformer.deploy(timm.create_model("test_qkformer", output_stride=16))  # nothing is dilated
    for refused in (1, 0, True, 8.0):
        with pytest.raises(ValueError, match=r"output_stride=.* at least 2, the stride of the first convolution"):
            timm.create_model("test_qkformer", output_stride=refused)


@pytest.mark.parametrize(("output_stride", "reductions"), [(None, [4, 8, 16, 32, 64]), (16, [4, 8, 16, 16, 16])])
def test_pooled_levels_for_detectors(output_stride, reductions):
    args = {"pooled_levels": 2, "output_stride": output_stride, "features_only": True}
    encoder = timm.create_model("test_qkformer", **args)
    maps = encoder(torch.randn(1, 3, 64, 64))
    assert encoder.feature_info.reduction() == reductions
    assert [64 // m.shape[-1] for m in maps] == reductions
    assert torch.equal(maps[3], nn.functional.max_pool2d(maps[2], 3, reductions[3] // 16, 1))
    two = timm.create_model("test_qkformer", **args, out_indices=(1, 3))
    assert two.feature_info.reduction() == [8, reductions[3]]
    assert len(two(torch.randn(1, 3, 64, 64))) == 2
    assert timm.create_model("test_qkformer", **args, out_indices=(0,)).feature_info.reduction() == [4]


def test_levels_that_there_are_not():
    with pytest.raises(ValueError, match=r"3 feature maps; pooled_levels=1 adds"):
        timm.create_model("test_qkformer", features_only=True, out_indices=(0, 1, 2, 3))
    with pytest.raises(ValueError, match="pooled_levels=-1"):
        timm.create_model("test_qkformer", pooled_levels=-1)
