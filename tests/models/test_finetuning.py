"""Fine-tuning from weights: other classes, channels, sizes and time steps, and layer-wise learning rates."""

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2

from timm_qkformer.models.qkformer import QKFormer
from tiny import tiny


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


def test_other_classes_take_a_new_classifier(source):
    model = pretrained(source, num_classes=5)
    assert_same_tensors(model, source, but=("head.weight", "head.bias"))
    assert model.head.weight.shape == (5, 64)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 5)


def test_no_classes_leave_the_features(source):
    model = pretrained(source, num_classes=0).eval()
    images = torch.randn(2, 3, 64, 64)
    expected = source[0].eval().forward_head(source[0].forward_features(images), pre_logits=True)
    torch.testing.assert_close(model(images), expected)


@pytest.mark.parametrize("in_chans", [1, 2, 4, 6])
def test_other_channels_adapt_the_first_convolution(source, in_chans):
    model = pretrained(source, num_classes=10, in_chans=in_chans)
    assert_same_tensors(model, source, but=("stem.conv.weight",))
    assert model.stem.conv.weight.shape[1] == in_chans
    if in_chans == 1:  # a grey image gives the currents that it gave as three equal channels
        weight = source[0].stem.conv.weight.sum(1, keepdim=True)
        torch.testing.assert_close(model.stem.conv.weight, weight)
    assert model(torch.randn(1, in_chans, 64, 64)).shape == (1, 10)


@pytest.mark.parametrize("size", [96, 288, 384])
def test_other_sizes_need_nothing(source, size):
    model = pretrained(source, num_classes=10).eval()
    assert_same_tensors(model, source, but=())
    with torch.inference_mode():
        features = model.forward_features(torch.randn(1, 3, size, size))
        assert features.shape == (1, 64, size // 16, size // 16)
        assert model.forward_head(features).shape == (1, 10)


@pytest.mark.parametrize("time_steps", [1, 2, 6])
def test_other_time_steps_need_nothing(source, time_steps):
    model = pretrained(source, num_classes=10, time_steps=time_steps).eval()
    assert_same_tensors(model, source, but=())
    source[0].eval().set_time_steps(time_steps)
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(model(images), source[0](images))
    source[0].set_time_steps(4)


@pytest.mark.parametrize("name", ["test_qkformer", "test_qkformer_ms", "test_maxformer"])
def test_layer_decay_lowers_the_learning_rate_towards_the_input(name):
    model = timm.create_model(name, num_classes=10)
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.5)
    scale = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            scale[names.pop(id(parameter))] = group["lr_scale"]
            assert group["weight_decay"] == (0.0 if parameter.ndim <= 1 else 0.05)
    assert not names  # every parameter once
    depth = ["stem.", "stages.0.blocks.0.", "stages.1.blocks.0.", "stages.2.blocks.0.", "stages.2.blocks.1.", "head."]
    scales = [{value for name, value in scale.items() if name.startswith(prefix)} for prefix in depth]
    assert all(len(values) == 1 for values in scales)  # a block learns at one rate
    flat = [values.pop() for values in scales]
    assert flat == sorted(flat)
    assert len(set(flat)) == len(flat)
    assert flat[-1] == 1.0
    embeds = [{value for name, value in scale.items() if name.startswith(f"stages.{i}.embed.")} for i in range(3)]
    assert all(len(values) == 1 for values in embeds)


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
