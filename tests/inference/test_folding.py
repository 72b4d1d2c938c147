"""Folded batch norms and 8-bit weights."""

import pytest
import timm.utils
import torch
from torch import nn

from timm_qkformer.inference.projection import Projection
from timm_qkformer.inference.weights import Folded, fold, quantise
from timm_qkformer.layers import ConvNorm
from tiny import lively

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
    steps, scale = quantise(weight)
    assert steps.dtype == torch.int8
    assert steps.abs().flatten(1).amax(1).tolist() == [127, 127, 127, 0, 127]
    error = (steps.double() * scale.double().view(-1, 1, 1, 1) - weight).abs().flatten(1).amax(1)
    assert (error <= scale * 0.5001).all()
    assert torch.equal(quantise(-weight)[0], -steps)


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


def test_frozen_batch_norms():
    unit = lively(ConvNorm(6, 4))
    x = spikes(2, 3, 3, 6)
    expected = convolve(unit, x)
    timm.utils.freeze(unit, ["bn"])
    assert not isinstance(unit.bn, nn.BatchNorm2d)
    torch.testing.assert_close(project(unit, torch.float64)(x.double()), expected, rtol=1e-12, atol=1e-12)


def test_batch_norms_without_parameters():
    unit = lively(ConvNorm(6, 4))
    with torch.no_grad():
        plain = nn.BatchNorm2d(4, affine=False).double().eval()
        plain.running_mean.copy_(unit.bn.running_mean)
    unit.bn = plain
    x = spikes(2, 3, 3, 6)
    torch.testing.assert_close(project(unit, torch.float64)(x.double()), convolve(unit, x), rtol=1e-12, atol=1e-12)
