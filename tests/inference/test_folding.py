"""Folded batch norms, 8-bit weights, and models whose own weights are those that 8-bit inference has."""

import copy
import re

import pytest
import timm.utils
import torch
from torch import nn

import timm_qkformer
from timm_qkformer import quantize_weights
from timm_qkformer.inference.projection import Projection
from timm_qkformer.inference.weights import Folded, fold, quantize, to_bfloat16
from timm_qkformer.layers import ConvNorm
from tiny import images, lively, rounds_currents, tiny

UNITS = {
    "1x1": {"kernel_size": 1, "bias": True},
    "1x1, stride 4": {"kernel_size": 1, "stride": 4},
    "3x3": {"kernel_size": 3},
    "3x3, stride 2": {"kernel_size": 3, "stride": 2, "bias": True},
    "7x7 depth-wise": {"kernel_size": 7, "groups": 6, "bias": True},
}


@pytest.fixture(params=UNITS.values(), ids=UNITS)
def unit(request):
    return lively(ConvNorm(6, 12, **request.param))


def spikes(*shape, largest=3):
    return torch.randint(0, largest + 1, shape)


def convolve(unit, x):
    """[N, H, W, C] through the original, in float64."""
    with torch.no_grad():
        return unit(x.double().permute(0, 3, 1, 2)[None])[0].permute(0, 2, 3, 1)


def project(unit, dtype):
    return Projection([fold(unit, "unit")], unit.conv.stride[0], unit.conv.groups, dtype)


@pytest.mark.parametrize("size", [(9, 7), (8, 8), (1, 1)], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_a_projection_is_convolution_and_batch_norm(unit, dtype, tolerance, size):
    x = spikes(3, *size, 6)
    found = project(unit, dtype)(x.to(dtype))
    assert found.dtype == dtype
    assert found.is_contiguous()
    torch.testing.assert_close(found.double(), convolve(unit, x), rtol=tolerance, atol=tolerance)


def test_bfloat16_rounds_weights_and_currents_alone(unit):
    x = spikes(3, 9, 7, 6)
    projection = project(unit, torch.bfloat16)
    folded = fold(unit, "unit")
    rounded = Projection([Folded(folded.weight.bfloat16().double(), folded.bias)], projection.stride, projection.groups,
                         torch.float64)  # fmt: skip
    expected = rounded(x.double())
    assert not torch.allclose(expected, convolve(unit, x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(projection(x.float()).double(), expected, rtol=1e-5, atol=1e-5)
    currents = projection(x.bfloat16())
    assert currents.dtype == torch.bfloat16
    torch.testing.assert_close(currents.double(), expected, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("largest", [1, 129])
def test_int8_rounds_weights_alone(unit, largest):
    """Largest spike sums and largest weights included: nothing saturates on the way."""
    with torch.no_grad():
        unit.conv.weight[0] = unit.conv.weight[0].sign()  # every weight of the channel becomes +-127
    x = spikes(3, 9, 7, 6, largest=largest)
    x[0] = largest
    projection = project(unit, torch.int8)
    weight = projection.weight.double() * projection.scale.double().view(-1, 1, 1, 1)
    exact = Projection([Folded(weight, projection.bias.double())], projection.stride, projection.groups, torch.float64)
    expected = exact(x.double())
    currents = projection(x.to(torch.uint8))
    assert currents.dtype == torch.float32
    torch.testing.assert_close(currents.double(), expected, rtol=1e-5, atol=1e-5)
    # Where there are no 8-bit products, the same weights are multiplied in full precision.
    torch.testing.assert_close(projection(x.float()).double(), expected, rtol=1e-5, atol=1e-4)


def test_projections_of_the_same_input_lie_side_by_side():
    units = [lively(ConvNorm(6, 5)) for _ in range(3)]
    x = spikes(2, 3, 4, 6)
    joined = Projection([fold(unit, "unit") for unit in units], 1, 1, torch.float64)
    expected = torch.cat([convolve(unit, x) for unit in units], -1)
    torch.testing.assert_close(joined(x.double()), expected, rtol=1e-12, atol=1e-12)


def test_any_memory_layout_of_the_input(unit):
    x = spikes(3, 9, 7, 6).float()
    projection = project(unit, torch.float32)
    expected = projection(x)
    for other in (x.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0), torch.cat([x, x])[::2][:3]):
        torch.testing.assert_close(projection(other), projection(other.contiguous()))
    assert torch.equal(projection(x), expected)


def test_quantised_weights_are_within_half_a_step():
    weight = torch.randn(5, 3, 3, 3, dtype=torch.float64) * torch.tensor([1e-3, 1.0, 40.0, 0.0, 1.0]).view(-1, 1, 1, 1)
    steps, scale = quantize(weight)
    assert steps.dtype == torch.int8
    assert steps.abs().flatten(1).amax(1).tolist() == [127, 127, 127, 0, 127]
    error = (steps.double() * scale.double().view(-1, 1, 1, 1) - weight).abs().flatten(1).amax(1)
    assert (error <= scale * 0.5001).all()
    assert torch.equal(quantize(-weight)[0], -steps)


def test_packed_weights_follow_the_buffers():
    projection, other = (project(lively(ConvNorm(6, 4, 3)), torch.float32) for _ in range(2))
    x = spikes(1, 5, 5, 6).float()
    before = projection(x)
    projection.load_state_dict(other.state_dict())
    assert torch.equal(projection(x), other(x))
    assert not torch.equal(projection(x), before)
    projection.weight.zero_()
    assert torch.equal(projection(x), projection.bias.expand(1, 5, 5, 4))


def test_errors_name_the_layer():
    unit = ConvNorm(6, 4, 3)
    unit.bn = nn.GroupNorm(2, 4)
    with pytest.raises(TypeError, match=r"stages\.0\.q\.bn is a GroupNorm"):
        fold(unit, "stages.0.q")
    unit.bn = nn.BatchNorm2d(4, track_running_stats=False)
    with pytest.raises(ValueError, match=r"stages\.0\.q\.bn keeps no running statistics"):
        fold(unit, "stages.0.q")
    unit.bn = nn.BatchNorm2d(4)
    unit.conv = nn.Conv2d(6, 4, 3, padding=2, dilation=2)
    with pytest.raises(TypeError, match=r"stages\.0\.q\.conv is Conv2d.*dilation"):
        fold(unit, "stages.0.q")
    unit.conv = nn.Conv2d(6, 4, 3, padding=1)
    nn.init.constant_(unit.bn.weight, float("nan"))
    with pytest.raises(ValueError, match=r"stages\.0\.q: .*not finite"):
        fold(unit, "stages.0.q")


def frozen(unit):
    timm.utils.freeze(unit, ["bn"])
    assert not isinstance(unit.bn, nn.BatchNorm2d)


def without_parameters(unit):
    mean = unit.bn.running_mean
    unit.bn = nn.BatchNorm2d(4, affine=False).double().eval()
    unit.bn.running_mean.copy_(mean)


@pytest.mark.parametrize("change", [frozen, without_parameters])
def test_other_batch_norms(change):
    unit = lively(ConvNorm(6, 4))
    change(unit)
    x = spikes(2, 3, 3, 6)
    torch.testing.assert_close(project(unit, torch.float64)(x.double()), convolve(unit, x), rtol=1e-12, atol=1e-12)


MODELS = {
    "cifar": ("qkformer_hst4_384", {"embed_dims": (16, 32, 64), "depths": (1, 1, 1), "num_heads": 4}),
    "membrane": ("qkformer_hst10_384_ms", {"embed_dims": (16, 32, 64), "depths": (1, 1, 1), "num_heads": 4}),
    "maxformer": ("maxformer_10_384", {"embed_dims": (24, 48, 96), "depths": (1, 1, 1)}),
}


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def model(request):
    name, kwargs = request.param
    return tiny(name, **kwargs)


def units(model):
    return [unit for unit in model.stages.modules() if isinstance(unit, ConvNorm)]


def in_order(weights):
    """All values of all layers: of deployed models, some layers are joined."""
    return torch.cat([weight.flatten() for weight in weights]).sort().values


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_deploying_leaves_rounded_weights_as_they_are(model, precision):
    def error():
        deployed = timm_qkformer.deploy(model, precision)
        projections = [p for p in deployed.stages.modules() if isinstance(p, Projection)]
        ours = in_order(p.weight.double() * p.scale.double().view(-1, 1, 1, 1) for p in projections)
        theirs = in_order(fold(unit, "unit").weight for unit in units(model))
        return (ours - theirs).abs().max() / theirs.abs().max()

    assert error() > 1e-4
    quantize_weights(model)
    assert error() < 1e-6


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("products", ["events", "dense"])
@pytest.mark.parametrize("rounded", [True, False])
def test_a_rounded_model_answers_as_it_is_deployed(rounded, products, precision):
    torch.manual_seed(0)
    name, kwargs = MODELS["cifar"]
    model = tiny(name, **kwargs).float()
    if rounded:
        quantize_weights(model)
    x = images(8).float()
    deployed = timm_qkformer.deploy(model, precision, products)
    same = torch.equal(deployed.forward_features(x), model.forward_features(x))
    assert same == (rounded and not rounds_currents(precision, products))


def test_the_first_convolution_and_batch_norms_stay(model):
    before = copy.deepcopy(model.state_dict())
    quantize_weights(model)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    names = {name for name, unit in model.named_modules() if isinstance(unit, ConvNorm) and name != "stem"}
    assert changed == {f"{name}.conv.weight" for name in names}


def test_half_precision_holds_rounded_weights_and_they_round_to_themselves(model):
    quantize_weights(model)
    for unit in units(model):
        assert torch.equal(unit.conv.weight.half().double(), unit.conv.weight)
    once = copy.deepcopy(model.state_dict())
    quantize_weights(model)
    assert all(torch.equal(tensor, once[name]) for name, tensor in model.state_dict().items())


def test_weights_move_by_half_a_step_and_the_largest_by_a_sixteenth(model):
    unit = units(model)[0]
    with torch.no_grad():
        unit.conv.weight[0] = 0.0
    before = unit.conv.weight.detach().flatten(1).clone()
    quantize_weights(model)
    after = unit.conv.weight.detach().flatten(1)
    largest = before.abs().amax(1, keepdim=True)
    assert ((after - before).abs() <= largest / 16).all()
    inner = before.abs() < largest * 0.92
    assert ((after - before).abs()[inner] <= (largest / 127 * 0.54).expand_as(before)[inner]).all()
    assert not after[0].any()
    steps = after[1:] / after[1:].abs().amax(1, keepdim=True) * 127
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-9)


def test_bfloat16_takes_steps_only_where_all_weights_are_some():
    steps = torch.randint(-127, 128, (2, 5, 1, 1), dtype=torch.float64)
    steps[:, 0] = 127
    weight = steps * 0.0123
    weight[1, 1] += 0.004
    rounded, scale = to_bfloat16(weight)
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded[0].double(), steps[0])
    assert scale.tolist() == pytest.approx([0.0123, 1.0])
    assert torch.equal(rounded[1], weight[1].to(torch.bfloat16))


@pytest.mark.parametrize("groups", [1, 4])
def test_bfloat16_products_of_steps(groups):
    steps = torch.randint(-127, 128, (8, 8 // groups, 3, 3), dtype=torch.float64)
    steps[:, 0, 0, 0] = 127
    folded = Folded(steps * 0.0123, torch.randn(8, dtype=torch.float64))
    x = torch.randint(0, 4, (2, 6, 5, 8)).double()
    exact = Projection([folded], 1, groups, torch.float64)(x)
    found = Projection([folded], 1, groups, torch.bfloat16)(x.float())
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


def test_other_models_are_refused():
    with pytest.raises(TypeError, match="model is a Linear, expected a QKFormer or MaxFormer"):
        quantize_weights(nn.Linear(3, 3))


def test_weights_that_are_not_finite_are_refused_before_any_is_rounded(model):
    name = next(name for name, unit in model.named_modules() if unit is units(model)[-1])
    with torch.no_grad():
        model.get_submodule(name).conv.weight[0] = float("nan")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=rf"{re.escape(name)}\.conv\.weight has values that are not finite"):
        quantize_weights(model)
    after = model.state_dict()
    assert all(torch.equal(after[name].nan_to_num(), tensor.nan_to_num()) for name, tensor in before.items())
