"""What membrane shortcuts and Max-Former add to the layers: currents out, strides, pooled shortcuts, readout."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from timm_qkformer.layers import (
    LIF,
    MeanReadout,
    MembraneReadout,
    QKChannelAttention,
    QKTokenAttention,
    SpikingDepthwiseConv,
    SpikingMlp,
    SpikingPatchEmbed,
    SpikingSelfAttention,
    SpikingStem,
)
from tiny import lively

T, B, C, H, W = 3, 2, 16, 6, 4


def spikes(*shape):
    return torch.randint(0, 2, shape).double()


@pytest.mark.parametrize(
    "make",
    [
        lambda **kw: QKTokenAttention(C, 4, **kw),
        lambda **kw: QKChannelAttention(C, 4, **kw),
        lambda **kw: SpikingSelfAttention(C, 4, **kw),
        lambda **kw: SpikingMlp(C, 32, **kw),
        lambda **kw: SpikingDepthwiseConv(C, 5, **kw),
    ],
)
def test_membrane_branches_end_with_the_last_neurons_input(make):
    plain, membrane = lively(make()), lively(make(membrane_shortcut=True))
    membrane.load_state_dict(plain.state_dict())
    x = spikes(T, B, C, H, W)
    currents = membrane(x)
    assert currents.unique().numel() > 2
    assert torch.equal(LIF()(currents), plain(x))


@pytest.mark.parametrize("kernel_size", [3, 5, 7])
def test_depthwise_conv_mixes_no_channels(kernel_size):
    layer = lively(SpikingDepthwiseConv(C, kernel_size, membrane_shortcut=True))
    assert layer.dw.conv.weight.shape == (C, 1, kernel_size, kernel_size)
    x = spikes(T, B, C, H, W)
    changed = x.clone()
    changed[:, :, 3] = 1 - changed[:, :, 3]
    difference = (layer(changed) - layer(x)).abs().sum((0, 1, 3, 4))
    assert difference.nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("kernel_size", [0, 4])
def test_depthwise_kernels_are_odd(kernel_size):
    with pytest.raises(ValueError, match=f"kernel_size={kernel_size} must be odd"):
        SpikingDepthwiseConv(C, kernel_size)


@pytest.mark.parametrize("size", [(8, 8), (9, 6), (7, 13)])
def test_max_formers_embeddings(size):
    """Strides in place of pooling, pooling in place of the shortcut's stride; the same sizes either way."""
    x = torch.randn(T, B, 6, *size, dtype=torch.float64)
    s = LIF()(x)
    half = [-(-side // 2) for side in size]

    def bn(unit, y):
        return F.batch_norm(y, unit.bn.running_mean, unit.bn.running_var, unit.bn.weight, unit.bn.bias)

    pooled = lively(SpikingPatchEmbed(6, 10, pool_shortcut=True, membrane_shortcut=True))
    unit = pooled.shortcut
    shortcut = F.max_pool2d(bn(unit, F.conv2d(s.flatten(0, 1), unit.conv.weight)), 3, 2, 1).unflatten(0, (T, B))
    first, second = pooled.main
    assert torch.equal(pooled(x), second.currents(LIF()(first.currents(s))) + shortcut)
    assert list(pooled(x).shape) == [T, B, 10, *half]

    strided = lively(SpikingPatchEmbed(6, 10, strided=True, membrane_shortcut=True))
    first, second = strided.main
    currents = bn(first, F.conv2d(s.flatten(0, 1), first.conv.weight, stride=2, padding=1)).unflatten(0, (T, B))
    assert torch.equal(strided(x), second.currents(LIF()(currents)) + strided.shortcut.currents(s))
    assert list(strided(x).shape) == [T, B, 10, *half]


@pytest.mark.parametrize("pools", [(False,), (True, True)])
def test_pooled_shortcuts_halve_once(pools):
    with pytest.raises(ValueError, match=rf"pool_shortcut=True halves the size once.*halve it {sum(pools)} times"):
        SpikingPatchEmbed(6, 10, pools, pool_shortcut=True)


def test_a_stem_without_neurons_gives_the_same_currents_at_every_step():
    stem = lively(SpikingStem(3, 8, stride=2, neuron_layer=nn.Identity))
    x = torch.randn(B, 3, 9, 8, dtype=torch.float64)
    out = stem(x, 5)
    assert out.shape == (5, B, 8, 5, 4)
    assert torch.equal(out, out[:1].expand_as(out))
    assert out.unique().numel() > 2


def test_readouts():
    x = torch.randn(4, B, C, H, W, dtype=torch.float64) + 1
    assert torch.equal(MeanReadout()(x), x.mean(0))
    rate = LIF()(x.mean((3, 4))).mean(0)
    assert 0 < rate.mean() < 1
    out = MembraneReadout()(x)
    torch.testing.assert_close(out.mean((2, 3)), rate)
    torch.testing.assert_close(out - out[..., :1, :1], x.mean(0) - x.mean(0)[..., :1, :1])


def test_the_readout_averages_in_single_precision():
    """1,024 positions at 1.0: a running sum in bfloat16 would stop at 256, far below the threshold."""
    x = torch.ones(8, 1, 1, 32, 32, dtype=torch.bfloat16) * 2
    out = MembraneReadout()(x)
    assert out.dtype == torch.bfloat16
    assert out.float().mean() == 1.0  # charged to the threshold at every step


def test_the_readouts_gradient_reaches_the_potentials():
    x = torch.randn(4, B, C, H, W, dtype=torch.float64, requires_grad=True)
    MembraneReadout()(x).mean((2, 3)).sum().backward()
    # Through the surrogate of the neurons alone: the shifted mean cancels, so all positions of a channel share it.
    assert torch.allclose(x.grad, x.grad[..., :1, :1].expand_as(x))
    assert x.grad.abs().sum() > 0
