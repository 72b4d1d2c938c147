"""Attention, patch embedding, MLP and the drop layers."""

from functools import partial

import pytest
import torch

import tiny
from timm_qkformer.layers import (
    LIF,
    ParametricLIF,
    QKChannelAttention,
    QKTokenAttention,
    SpikingConv,
    SpikingMlp,
    SpikingPatchEmbed,
    SpikingSelfAttention,
    SpikingStem,
    TimeDropout,
    TimeDropPath,
)

T, B, C, H, W = 3, 2, 16, 5, 4
ATTENTIONS = [QKTokenAttention, QKChannelAttention, SpikingSelfAttention]


def spike_sums(*shape):
    return torch.randint(0, 3, shape).double()


# Single layers need a stronger drive than whole models to fire.
lively = partial(tiny.lively, bias=(0.5, 2.0))


def is_binary(x):
    return torch.equal(x, (x != 0).to(x.dtype))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_attention_equals_the_papers_equations(attention):
    """Written with loops over samples, heads and tokens, on [N, D] matrices as the paper has them."""
    heads = 4
    layer = lively(attention(C, heads))
    x = spike_sums(T, B, C, H, W)
    out = layer(x)
    assert out.shape == x.shape
    assert is_binary(out)
    assert 0 < out.mean() < 1

    q, k = layer.q(x), layer.k(x)
    v = layer.v(x) if attention is SpikingSelfAttention else None
    lif = LIF(v_threshold=0.5)
    mixed = torch.zeros_like(x)
    for b in range(B):
        for h in range(heads):
            channels = slice(h * C // heads, (h + 1) * C // heads)
            q_bh, k_bh = (z[:, b, channels].flatten(2).transpose(1, 2) for z in (q, k))  # [T, N, D]
            if attention is QKTokenAttention:
                y = lif(q_bh.sum(2))[:, :, None] * k_bh
            elif attention is QKChannelAttention:
                y = lif(q_bh.sum(1))[:, None, :] * k_bh
            else:
                v_bh = v[:, b, channels].flatten(2).transpose(1, 2)
                scores = torch.einsum("tnd,tmd->tnm", q_bh, k_bh)  # Q K^T first, to differ from the layer
                y = lif(torch.einsum("tnm,tmd->tnd", scores, v_bh) * 0.125)
            mixed[:, b, channels] = y.transpose(1, 2).unflatten(2, (H, W))
    assert torch.equal(out, layer.proj(mixed))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_attention_is_not_scrambled_by_non_square_maps(attention):
    """Attention sees a set of tokens, so transposing the map transposes the answer."""
    layer = lively(attention(C, 2))
    x = spike_sums(T, B, C, 6, 3)
    assert torch.equal(layer(x.transpose(3, 4)), layer(x).transpose(3, 4))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_attention_trains(attention):
    layer = attention(C, 4, neuron_layer=ParametricLIF).double()
    layer(spike_sums(T, B, C, H, W)).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    assert layer.q.conv.weight.grad.abs().sum() > 0


def test_token_counts_are_exact_in_half_precision():
    """A head of 768 channels counts to 768; bfloat16 alone counts to 256."""
    layer = QKTokenAttention(768, 1).bfloat16().eval()
    seen = []
    layer.attn_neuron.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    layer.q.neuron.register_forward_hook(lambda _m, _a, out: torch.ones_like(out))
    layer(torch.ones(1, 1, 768, 2, 2, dtype=torch.bfloat16))
    assert seen[0].unique().tolist() == [768.0]


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_heads_must_divide_the_width(attention):
    with pytest.raises(ValueError, match=r"num_heads=5 must divide.*dim=16"):
        attention(C, 5)


def test_batch_coupled_neuron_integrates_over_the_batch():
    coupled = lively(SpikingConv(C, C, batch_coupled=True))
    x = spike_sums(T, B, C, H, W)
    sequence = coupled.currents(x).flatten(0, 1)  # [T * B, ...] as if it were all time
    assert torch.equal(coupled(x), LIF()(sequence).unflatten(0, (T, B)))
    coupled.batch_coupled = False
    assert torch.equal(coupled(x)[:, 1:], coupled(x[:, 1:]))


@pytest.mark.parametrize(
    ("pools", "stride"), [((True, False), 2), ((False, True), 2), ((False,), 1), ((True, True), 4)]
)
@pytest.mark.parametrize("size", [(8, 8), (9, 6), (7, 13)])
def test_patch_embed(pools, stride, size):
    layer = lively(SpikingPatchEmbed(6, 10, pools, hidden_chs=5))
    x = spike_sums(T, B, 6, *size)
    out = layer(x)
    assert layer.stride == stride
    assert out.shape == (T, B, 10, -(-size[0] // stride), -(-size[1] // stride))
    assert set(out.unique().tolist()) <= {0.0, 1.0, 2.0}
    y = x
    for i, pool in enumerate(pools):  # conv, BN, perhaps pool, LIF: in this order
        unit = layer.main[i]
        currents = torch.stack([unit.bn(unit.conv(y[t])) for t in range(T)])
        if pool:
            currents = torch.stack([torch.nn.functional.max_pool2d(c, 3, 2, 1) for c in currents])
        y = LIF()(currents)
    assert torch.equal(out, y + layer.shortcut(x))


def test_patch_embed_without_shortcut():
    layer = lively(SpikingPatchEmbed(6, 10, (True,), shortcut=False))
    x = spike_sums(T, B, 6, 8, 8)
    assert torch.equal(layer(x), layer.main(x))


def test_patch_embed_needs_a_convolution():
    with pytest.raises(ValueError, match="pools"):
        SpikingPatchEmbed(6, 10, ())


def test_stem_convolves_a_static_image_once():
    stem = lively(SpikingStem(3, 8, pool=True))
    shapes = []
    stem.conv.register_forward_hook(lambda _m, args, _out: shapes.append(tuple(args[0].shape)))
    image = torch.randn(B, 3, 8, 6, dtype=torch.float64)
    out = stem(image, 4)
    clip = image[:, None].expand(-1, 4, -1, -1, -1)
    assert torch.equal(stem(clip, 99), out)
    assert out.shape == (4, B, 8, 4, 3)
    assert shapes == [(B, 3, 8, 6), (4 * B, 3, 8, 6)]


def test_stem_trains_alike_on_a_static_image_and_its_repetition():
    image = torch.randn(B, 3, 8, 6, dtype=torch.float64)
    grads = []
    for x in (image, image[:, None].expand(-1, 4, -1, -1, -1)):
        torch.manual_seed(1)
        stem = SpikingStem(3, 8).double()
        stem(x, 4).sum().backward()
        grads.append(stem.conv.weight.grad)
    torch.testing.assert_close(*grads)


def test_mlp():
    mlp = lively(SpikingMlp(C, 32))
    x = spike_sums(T, B, C, H, W)
    hidden = LIF()(torch.stack([mlp.fc1.bn(mlp.fc1.conv(x_t)) for x_t in x]))
    expected = LIF()(torch.stack([mlp.fc2.bn(mlp.fc2.conv(h_t)) for h_t in hidden]))
    assert torch.equal(mlp(x), expected)


def test_drop_path_drops_samples_not_time_steps():
    drop = TimeDropPath(0.5).train()
    out = drop(torch.ones(4, 256, 3, 2, 2))
    per_sample = out.transpose(0, 1).flatten(1)
    assert torch.equal(per_sample.amin(1), per_sample.amax(1))
    assert set(per_sample.unique().tolist()) == {0.0, 2.0}
    assert 0.3 < (per_sample[:, 0] > 0).float().mean() < 0.7
    assert torch.equal(drop.eval()(out), out)


def test_dropout_shares_one_mask_over_time():
    drop = TimeDropout(0.25).train()
    out = drop(torch.ones(4, 8, 3, 16, 16))
    assert torch.equal(out, out[:1].expand_as(out))
    assert out.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert 0.2 < (out == 0).float().mean() < 0.3
    assert torch.equal(drop.eval()(out), out)
    with pytest.raises(ValueError, match=r"p=1\.5"):
        TimeDropout(1.5)
