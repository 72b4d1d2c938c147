"""Operations and energy: closed forms, counting by brute force, and other people's counters on the same model."""

import json
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from constant import Constant
from timm_qkformer.analysis import energy, firing_rates
from timm_qkformer.analysis.energy import AC_PJ, MAC_PJ
from timm_qkformer.layers import SpikingSelfAttention, set_lif_backend
from tiny import images, lively, tiny

MODELS = ("test_qkformer", "test_qkformer_ms", "test_maxformer")
PIXELS = 32
T = 4


def conv(out_chs, in_chs, kernel, side):
    return out_chs * in_chs * kernel**2 * side**2


def all_ones_sops():
    """SOP of `test_qkformer` at 32 px if every neuron always fires, layer by layer as the paper draws it."""
    stem = 1  # what the first embedding sees
    sops = 0
    x, width, side = stem, 8, PIXELS // 2
    for stage, blocks in enumerate((1, 1, 2)):
        chs, half = 16 * 2**stage, side // 2
        sops += x * conv(chs, width, 3, side)  # conv, then pooling
        sops += 1 * conv(chs, chs, 3, half)
        sops += x * conv(chs, width, 1, half)  # shortcut, strided
        x, width, side = 2, chs, half  # F(x) + shortcut
        tokens = side**2
        for _ in range(blocks):
            if stage < 2:
                sops += 2 * x * conv(chs, chs, 1, side)  # Q, K
                sops += 2 * tokens * chs  # their sum and mask
            else:
                sops += 3 * x * conv(chs, chs, 1, side)  # Q, K, V
                sops += 2 * tokens * chs * (chs // 4)  # K^T V, Q (K^T V), 4 heads
            sops += 1 * conv(chs, chs, 1, side)  # projection of X'
            x += 1  # X''
            sops += x * conv(4 * chs, chs, 1, side) + 1 * conv(chs, 4 * chs, 1, side)
            x += 1
    return T * sops


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_closed_form_of_silent_and_full_networks(value):
    model = timm.create_model("test_qkformer", neuron=partial(Constant, value), num_classes=10)
    result = energy(model, torch.randn(2, 3, PIXELS, PIXELS))
    macs = conv(8, 3, 3, PIXELS) + 64 * 10  # first convolution, once, and the classifier
    sops = value * all_ones_sops()
    assert (result.macs, result.sops) == (macs, sops)
    assert result.pj == pytest.approx(4.6 * macs + 0.9 * sops, rel=1e-12)
    assert result.ann_pj == pytest.approx(4.6 * result.flops, rel=1e-12)
    assert result.additions <= sops


def test_clips_take_the_first_convolution_at_every_step():
    model = timm.create_model("test_qkformer", neuron=partial(Constant, 0.0), num_classes=10, in_chans=2)
    result = energy(model, torch.rand(1, 6, 2, PIXELS, PIXELS))
    assert result.macs == 6 * conv(8, 2, 3, PIXELS) + 640
    assert result["stem.conv", "convolution"].steps == 6


@pytest.mark.parametrize("name", MODELS)
def test_flops_are_torchs(name):
    """torch counts two operations to a MAC, all time steps, and matrix products and convolutions alone."""
    model = tiny(name)
    x = images(1)
    result = energy(model, x)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), set_lif_backend("eager"):
        model(x)
    elementwise = ("sum of Q", "mask of K")
    ours = sum(2 * layer.flops * layer.steps for layer in result.layers if layer.operation not in elementwise)
    assert counter.get_total_flops() == ours


def brute_force(x, conv):
    """Every spike, once for each output it reaches."""
    ones = torch.ones_like(conv.weight)
    return F.conv2d(x, ones, None, conv.stride, conv.padding, conv.dilation, conv.groups).sum().item()


@pytest.mark.parametrize(
    "args",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": 1, "stride": 2},
        {"kernel_size": (5, 3), "padding": (2, 0), "dilation": (1, 2), "stride": (3, 1)},
        {"kernel_size": 7, "padding": 3, "groups": 6},
        {"kernel_size": 3, "groups": 2},
    ],
)
def test_additions_of_a_convolution(args):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.neuron = Constant()
            self.conv = nn.Conv2d(6, 12, **args)

        def forward(self, x):
            return self.conv(x)

    net = Net()
    x = torch.randint(0, 4, (3, 6, 11, 13)).float()
    layer = energy(net, x).layers[0]
    assert layer.additions * 3 == brute_force(x, net.conv)
    assert layer.flops == net.conv(x[:1]).numel() * net.conv.weight[0].numel()
    assert layer.rate == pytest.approx(x.mean().item(), rel=1e-6)
    assert layer.input == "spike sums"


def test_sums_of_spikes_are_that_many_additions():
    result = energy(tiny("test_qkformer"), images(2))
    rates = firing_rates(tiny("test_qkformer"), images(2))
    assert rates.samples == result.samples
    first = result["stages.0.blocks.0.attn.q.conv", "convolution"]
    assert first.input == "spike sums"
    # A 1x1 convolution has no border: each unit of a sum goes to each of the 16 outputs.
    assert first.additions == pytest.approx(first.sops, rel=1e-12)


def test_rates_are_those_of_the_neurons():
    model, x = tiny("test_qkformer"), images(3)
    rates, result = firing_rates(model, x), energy(model, x)
    inputs = {
        ("stages.0.embed.main.0.conv", "convolution"): "stem.neuron",
        ("stages.0.embed.main.1.conv", "convolution"): "stages.0.embed.main.0.neuron",
        ("stages.0.blocks.0.attn.proj.conv", "convolution"): "stages.0.blocks.0.attn.proj",
        ("stages.0.blocks.0.attn", "sum of Q"): "stages.0.blocks.0.attn.q.neuron",
        ("stages.0.blocks.0.attn", "mask of K"): "stages.0.blocks.0.attn.k.neuron",
        ("stages.1.blocks.0.mlp.fc2.conv", "convolution"): "stages.1.blocks.0.mlp.fc1.neuron",
        ("stages.2.blocks.1.attn", "K^T V"): "stages.2.blocks.1.attn.k.neuron",
        ("stages.2.blocks.1.attn", "Q (K^T V)"): "stages.2.blocks.1.attn.q.neuron",
    }
    for key, path in inputs.items():
        layer = result[key]
        assert layer.rate == pytest.approx(rates[path].mean, rel=1e-12), key
        assert layer.sops == pytest.approx(rates[path].mean * T * layer.flops, rel=1e-12)
        assert layer.pj == pytest.approx(layer.sops * AC_PJ)
    assert result["stem.conv", "convolution"].pj == result["stem.conv", "convolution"].flops * MAC_PJ


def test_additions_of_self_attention():
    model, x = tiny("test_qkformer"), images(2)
    result = energy(model, x)
    path = "stages.2.blocks.0.attn"
    kept = {}
    attention = model.get_submodule(path)
    assert isinstance(attention, SpikingSelfAttention)
    for name in "qkv":
        getattr(attention, name).register_forward_hook(lambda _m, _x, y, name=name: kept.update({name: y}))
    with torch.no_grad():
        model(x)
    q, k, v = (attention.split_heads(kept[name]) for name in "qkv")
    assert result[path, "K^T V"].additions * 2 == (v @ k.transpose(-2, -1)).sum().item()
    assert result[path, "Q (K^T V)"].additions * 2 == q.sum().item() * attention.head_dim


@pytest.mark.parametrize("name", MODELS)
def test_spikingjelly_counts_the_same(name):
    """spikingjelly 2.0 counts the additions of binary inputs as we do, K^T V and Q (K^T V) included. Sums of spikes are
    not binary: there it counts MACs where we count additions. It does not look at the sum of Q and the mask."""
    from spikingjelly.activation_based.op_counter import DispatchCounterMode, MACCounter, SynOpCounter

    model, x = tiny(name), images(1)
    result = energy(model, x)
    norms = [nn.BatchNorm2d]  # folded into the convolutions
    synops, macs = SynOpCounter(extra_ignore_modules=norms), MACCounter(extra_ignore_modules=norms)
    with DispatchCounterMode([synops, macs]), torch.no_grad(), set_lif_backend("eager"):
        model(x)

    def theirs(counter, path):
        counts = counter.get_counts().get(f"{type(model).__name__}.{path}", {})
        return sum(counts.values())

    explained = {"additions": 0.0, "macs": 0}
    for layer in result.layers:
        if layer.operation not in ("convolution", "linear"):
            continue
        if layer.input == "spikes":
            assert theirs(synops, layer.path) == layer.additions, layer
            assert theirs(macs, layer.path) == 0
        else:
            assert theirs(synops, layer.path) == 0
            assert theirs(macs, layer.path) == layer.flops * layer.steps
            if layer.input == "spike sums":
                explained["additions"] += layer.additions
                explained["macs"] += layer.flops * layer.steps
    attention = [layer for layer in result.layers if layer.operation in ("K^T V", "Q (K^T V)")]
    for path in {layer.path for layer in attention}:
        parts = sum(theirs(synops, f"{path}.{part}") for part in ("q", "k", "v", "proj"))
        assert theirs(synops, path) - parts == sum(layer.additions for layer in attention if layer.path == path)
    masks = sum(layer.additions for layer in result.layers if layer.operation in ("sum of Q", "mask of K"))
    assert synops.get_total() == result.additions - explained["additions"] - masks
    assert macs.get_total() == result.macs + explained["macs"]
    assert (explained["macs"] > 0) == (name == "test_qkformer")


@pytest.mark.parametrize("name", MODELS)
def test_batches_workers_and_order_change_nothing(name):
    model = lively(timm.create_model(name)).float()
    x = torch.randn(5, 3, 40, 40)
    dataset = TensorDataset(x, torch.arange(5))
    expected = json.dumps(energy(model, x).to_dict())
    for batch_size, workers, shuffle in ((1, 0, True), (2, 2, False), (5, 0, False)):
        loader = DataLoader(dataset, batch_size, shuffle=shuffle, num_workers=workers)
        assert json.dumps(energy(model, loader).to_dict()) == expected


def test_nothing_is_left_behind():
    model = tiny("test_qkformer").train()
    energy(model, images(1))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_other_costs():
    model, x = tiny("test_qkformer"), images(1)
    once = energy(model, x, mac_pj=1.0, ac_pj=0.0)
    assert once.pj == once.macs
    assert once.ann_pj == once.flops
    with pytest.raises(ValueError, match=r"ac_pj=-1\.0"):
        energy(model, x, ac_pj=-1.0)


def test_unknown_layers_are_not_left_out_silently():
    model = tiny("test_qkformer")
    model.head = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 7)).double()
    with pytest.raises(ValueError, match=r"head\.0 is a LayerNorm"):
        energy(model, images(1))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_real_inputs_are_macs():
    class Real(nn.Module):
        def __init__(self):
            super().__init__()
            self.neuron = Constant()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x):
            return self.conv(x)

    layer = energy(Real(), torch.cat([torch.ones(1, 3, 8, 8), torch.randn(1, 3, 8, 8)])).layers[0]
    assert (layer.input, layer.rate, layer.sops, layer.macs) == ("real numbers", None, 0.0, layer.flops)
