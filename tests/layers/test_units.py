"""Units, attention, MLP, embeddings, drop layers, stem and readout against the papers' equations.

Every operator with every neuron: tests/contract.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

import tiny
from timm_qkformer.execution import BINARY, REAL, counts
from timm_qkformer.layers import (
    ConvNorm,
    MembraneReadout,
    SpikingBlock,
    SpikingConv,
    SpikingMlp,
    SpikingPatchEmbed,
    SpikingStem,
    TimeDropout,
    TimeDropPath,
    as_sequence,
    count_time_steps,
    output_range,
)
from timm_qkformer.neurons import LIF, ReLUNeuron
from timm_qkformer.operators import get_operator

T, B, C, H, W = 3, 2, 16, 5, 4
ATTENTIONS = ["qkta", "qkca", "ssa"]


def spike_sums(*shape):
    return torch.randint(0, 3, shape).double()


# Single layers need a stronger drive than whole models to fire.
lively = partial(tiny.lively, bias=(0.5, 2.0))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_attention_equals_the_papers_equations(attention):
    """Written with loops over samples, heads and tokens, on [N, D] matrices; the map is not square."""
    heads = 4
    layer = lively(get_operator(attention)(C, heads))
    x = spike_sums(T, B, C, H, W)
    out = layer(x)
    assert out.shape == x.shape
    assert out.unique().tolist() == [0.0, 1.0]

    q, k = layer.q(x), layer.k(x)
    v = layer.v(x) if attention == "ssa" else None
    lif = LIF(v_threshold=0.5)
    attended = torch.zeros_like(x)
    for b in range(B):
        for h in range(heads):
            channels = slice(h * C // heads, (h + 1) * C // heads)
            q_bh, k_bh = (z[:, b, channels].flatten(2).transpose(1, 2) for z in (q, k))  # [T, N, D]
            if attention == "qkta":
                y = lif(q_bh.sum(2))[:, :, None] * k_bh
            elif attention == "qkca":
                y = lif(q_bh.sum(1))[:, None, :] * k_bh
            else:
                v_bh = v[:, b, channels].flatten(2).transpose(1, 2)
                scores = torch.einsum("tnd,tmd->tnm", q_bh, k_bh)  # Q K^T first, to differ from the layer
                y = lif(torch.einsum("tnm,tmd->tnd", scores, v_bh) * 0.125)
            attended[:, b, channels] = y.transpose(1, 2).unflatten(2, (H, W))
    assert torch.equal(out, layer.proj(attended))


def test_token_counts_are_exact_in_half_precision():
    """A head of 768 channels counts to 768; bfloat16 alone counts to 256."""
    layer = get_operator("qkta")(768, 1).bfloat16().eval()
    seen = []
    layer.attn_neuron.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    layer.q.neuron.register_forward_hook(lambda _m, _a, out: torch.ones_like(out))
    layer(torch.ones(1, 1, 768, 2, 2, dtype=torch.bfloat16))
    assert seen[0].unique().tolist() == [768.0]


@pytest.mark.parametrize("name", [*ATTENTIONS, "dwc5", "mlp"])
def test_membrane_branches_end_with_the_last_neurons_input(name):
    make = partial(SpikingMlp, C, 32) if name == "mlp" else partial(get_operator(name), C)
    plain, membrane = lively(make()), lively(make(membrane_shortcut=True))
    membrane.load_state_dict(plain.state_dict())
    x = spike_sums(T, B, C, H, W)
    currents = membrane(x)
    assert currents.unique().numel() > 2
    assert torch.equal(LIF()(currents), plain(x))


@pytest.mark.parametrize("kernel_size", [3, 5, 7])
def test_depthwise_conv_mixes_no_channels(kernel_size):
    layer = lively(get_operator(f"dwc{kernel_size}")(C, membrane_shortcut=True))
    assert layer.dw.conv.weight.shape == (C, 1, kernel_size, kernel_size)
    x = spike_sums(T, B, C, H, W)
    changed = x.clone()
    changed[:, :, 3] = 1 - changed[:, :, 3]
    difference = (layer(changed) - layer(x)).abs().sum((0, 1, 3, 4))
    assert difference.nonzero().flatten().tolist() == [3]


def test_batch_coupled_neuron_integrates_over_the_batch():
    coupled = lively(SpikingConv(C, C, batch_coupled=True))
    x = spike_sums(T, B, C, H, W)
    sequence = coupled.currents(x).flatten(0, 1)  # [T * B, ...] as if it were all time
    assert torch.equal(coupled(x), LIF()(sequence).unflatten(0, (T, B)))
    assert coupled(x[:, :0]).shape == (T, 0, C, H, W)
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
            currents = torch.stack([F.max_pool2d(c, 3, 2, 1) for c in currents])
        y = LIF()(currents)
    assert torch.equal(out, y + layer.shortcut(x))


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


@pytest.mark.parametrize("membrane_shortcut", [False, True])
def test_ranges_follow_from_the_network(membrane_shortcut):
    args = {"membrane_shortcut": membrane_shortcut}
    embed = SpikingPatchEmbed(6, C, **args)
    assert embed.output_range == (REAL if membrane_shortcut else counts(2))
    block = SpikingBlock(C, [get_operator("qkta"), get_operator("dwc3")], input_range=embed.output_range, **args)
    assert block.attn.q.input_range == block.attn.k.input_range == (BINARY if membrane_shortcut else counts(2))
    assert block.more[0].mixer.dw.input_range == (BINARY if membrane_shortcut else counts(3))
    assert block.mlp.fc1.input_range == (BINARY if membrane_shortcut else counts(4))
    assert block.attn.proj.input_range == block.mlp.fc2.input_range == BINARY
    assert block.output_range == (REAL if membrane_shortcut else counts(5))
    real = SpikingBlock(C, [get_operator("ssa")], neuron_layer=ReLUNeuron, **args)
    assert real.mlp.fc2.input_range.is_real
    assert output_range(torch.nn.ReLU()) == output_range(ConvNorm(3, 3)) == REAL


def test_dropout_and_stochastic_depth_make_ranges_real_in_training():
    for options in ({"proj_drop": 0.1}, {"drop_path": 0.1}):
        block = SpikingBlock(C, [get_operator("qkta")], **options)
        assert block.mlp.fc1.input_range == counts(2).dropped()
        assert block.mlp.fc2.input_range.bits == 1  # within the branch spikes are spikes
        assert block.output_range == counts(3).dropped()


def test_images_and_clips():
    image, clip = torch.rand(B, 3, 8, 6), torch.rand(B, 5, 3, 8, 6)
    assert torch.equal(as_sequence(image, 3, 1), image[None])
    assert torch.equal(as_sequence(clip, 3, 6), clip.transpose(0, 1))
    assert (count_time_steps(image, 4), count_time_steps(clip, 4)) == (4, 5)


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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SpikingPatchEmbed(6, 10, ()), r"pools=\(\) is empty"),
        (lambda: SpikingPatchEmbed(6, 10, (False,), pool_shortcut=True), "pool_shortcut=True halves.*halve it 0 times"),
        (lambda: SpikingPatchEmbed(6, 10, (True,) * 2, pool_shortcut=True), "pool_shortcut=True.*halve it 2 times"),
        (lambda: get_operator("dwc3")(C, kernel_size=0), "kernel_size=0 must be a whole number of at least 1"),
        (lambda: get_operator("dwc3")(C, kernel_size=4), "kernel_size=4 must be odd"),
        *((lambda name=name: get_operator(name)(C, 5), "num_heads=5 must divide.*dim=16") for name in ATTENTIONS),
    ],
)
def test_layers_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()
