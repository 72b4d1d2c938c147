"""Firing rates by hand; operations and energy: closed forms, brute force, other people's counters on the same model.

Against the releases' rates: tests/models/test_golden.py.
"""

from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from timm_qkformer.analysis import energy, firing_rates, record_spikes
from timm_qkformer.analysis.energy import AC_PJ, MAC_PJ
from timm_qkformer.execution import execution_policy
from timm_qkformer.neurons import LIF
from tiny import Constant, images, tiny

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
    with FlopCounterMode(display=False) as counter, torch.no_grad(), execution_policy(neurons="eager"):
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
    for lowest in (0, -3):  # sums of binary and of ternary spikes
        x = torch.randint(lowest, 4, (3, 6, 11, 13)).float()
        layer = energy(net, x).layers[0]
        assert layer.additions * 3 == brute_force(x.abs(), net.conv)
        assert layer.flops == net.conv(x[:1]).numel() * net.conv.weight[0].numel()
        assert layer.rate == pytest.approx(x.abs().mean().item(), rel=1e-6)
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


@pytest.mark.parametrize("name", MODELS)
def test_spikingjelly_counts_the_same(name):
    """spikingjelly 2.0 counts the additions of binary inputs as we do, K^T V and Q (K^T V) included. Sums of spikes are
    not binary: there it counts MACs where we count additions. It does not look at the sum of Q and the mask."""
    from spikingjelly.activation_based.op_counter import DispatchCounterMode, MACCounter, SynOpCounter

    model, x = tiny(name), images(1)
    result = energy(model, x)
    norms = [nn.BatchNorm2d]  # folded into the convolutions
    synops, macs = SynOpCounter(extra_ignore_modules=norms), MACCounter(extra_ignore_modules=norms)
    with DispatchCounterMode([synops, macs]), torch.no_grad(), execution_policy(neurons="eager"):
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
    model = tiny("test_qkformer")
    model.stages[1].blocks[0].attn.operations = lambda q, k: []
    with pytest.raises(ValueError, match=r"stages\.1\.blocks\.0\.attn is a QKChannelAttention, .* no operations"):
        energy(model, images(1))


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


class FirstChannel(Constant):
    """Always fires in channel 0, never in channel 1, at the first time step alone in the others."""

    def forward(self, x):
        spikes = torch.zeros_like(x)
        spikes[0] = 1.0
        spikes[:, :, 0] = 1.0
        spikes[:, :, 1] = 0.0
        return spikes


@pytest.mark.parametrize("name", MODELS)
def test_counts_as_one_counts_by_hand(name):
    model = tiny(name)
    x = images(4)
    rates = firing_rates(model, x)
    with record_spikes(model) as spikes, torch.no_grad():
        model(x)
    assert [layer.path for layer in rates.layers if layer.is_neuron] == list(spikes)
    assert (rates.samples, rates.input_shape, rates.time_steps) == (4, (3, 32, 32), 4)
    for path, fired in spikes.items():
        layer = rates[path]
        per_sample = fired.transpose(0, 1).flatten(2).mean(2)  # [B, T]
        assert layer.mean == pytest.approx(fired.mean().item(), abs=1e-12)
        assert layer.std == pytest.approx(per_sample.mean(1).std(correction=0).item(), abs=1e-12)
        assert layer.step_means == pytest.approx(per_sample.mean(0).tolist(), abs=1e-12)
        assert layer.step_stds == pytest.approx(per_sample.std(0, correction=0).tolist(), abs=1e-12)
        assert layer.neurons == fired[0, 0].numel()
    total = sum(fired.sum() for fired in spikes.values()) / sum(fired.numel() for fired in spikes.values())
    assert rates.mean == pytest.approx(total.item(), abs=1e-12)


def test_names_are_those_of_the_paper():
    rates = firing_rates(tiny("test_qkformer"), images(1))
    block = [(layer.name, layer.path.removeprefix("stages.0.blocks.0.")) for layer in rates.layers if layer.block == 1]
    assert block[:7] == [
        ("Q", "attn.q.neuron"),
        ("K", "attn.k.neuron"),
        ("A_t", "attn.attn_neuron"),
        ("X'", "attn.proj"),
        ("X''", "attn.proj.neuron"),
        ("SMLP layer 1", "mlp.fc1.neuron"),
        ("SMLP layer 2", "mlp.fc2.neuron"),
    ]
    names = {(layer.place, layer.name) for layer in rates.layers}
    assert {
        ("stem", "conv"),
        ("stage 1, embedding", "conv 2"),
        ("stage 1, embedding", "shortcut"),
        ("stage 2, block 1", "A_c"),
        ("stage 3, block 2", "V"),
        ("stage 3, block 2", "X'"),
    } <= names
    by_stage = rates.by_stage()
    assert by_stage["Q"][1] == rates["stages.0.blocks.0.attn.q.neuron"].mean
    last = [rates[f"stages.2.blocks.{i}.attn.q.neuron"].mean for i in range(2)]
    assert by_stage["Q"][3] == pytest.approx(sum(last) / 2)


@pytest.mark.parametrize("name", MODELS[1:])
def test_names_with_membrane_shortcuts(name):
    rates = firing_rates(tiny(name), images(1))
    names = {(layer.place, layer.name) for layer in rates.layers}
    assert {("stage 1, embedding", "input"), ("stage 3, block 1", "attention input"), ("head", "rate")} <= names
    assert not any(layer.name == "X''" for layer in rates.layers)


def test_dead_and_saturated_channels():
    model = timm.create_model("test_qkformer", neuron=FirstChannel)
    rates = firing_rates(model, torch.randn(2, 3, 32, 32))
    stem = rates["stem.neuron"]
    assert (stem.dead, stem.saturated, stem.channels) == ((1,), (0,), 8)
    assert stem.mean == pytest.approx((1.0 + 6 * 0.25) / 8)
    assert stem.step_means == pytest.approx((7 / 8, 1 / 8, 1 / 8, 1 / 8))
    assert rates["stages.0.blocks.0.attn.attn_neuron"].channels == 4  # heads
    assert rates["stages.2.blocks.0.attn.attn_neuron"].channels == 64
    assert rates["stages.0.blocks.0.attn.attn_neuron"].dead == (1,)


def test_one_sample_that_fires_revives_a_channel():
    model = nn.Sequential(LIF(tau=1.0))
    clips = torch.zeros(3, 2, 4, 5, 5).transpose(0, 1)  # what LIF takes: [T, B, C, H, W]
    rates = firing_rates(model, clips.transpose(0, 1).contiguous()[:, :1])
    assert rates.layers[0].dead == (0, 1, 2, 3)
    alive = torch.zeros(3, 1, 4, 5, 5)
    alive[2, 0, 3, 4, 4] = 2.0
    assert firing_rates(model, alive).layers[0].dead == (0, 1, 2)


def test_event_clips_bring_their_own_steps():
    model = tiny("test_qkformer", in_chans=2)
    clips = torch.rand(3, 6, 2, 32, 32, dtype=torch.float64)
    rates = firing_rates(model, clips)
    assert (rates.time_steps, rates.input_shape) == (6, (6, 2, 32, 32))
    assert len(rates["stem.neuron"].step_means) == 6
    with pytest.raises(ValueError, match=r"sample 3 of the data has shape \[5, 2, 32, 32\], those before it \[6,"):
        firing_rates(model, [clips, clips[:, :5]])


def test_backends_of_the_neurons_agree():
    model = tiny("test_qkformer")
    x = images(1)
    with execution_policy(neurons="eager"):
        eager = firing_rates(model, x)
    with execution_policy(neurons="spikingjelly"):
        assert firing_rates(model, x) == eager


def test_other_models_with_our_neurons():
    features = timm.create_model("test_qkformer", features_only=True)
    rates = firing_rates(features, torch.randn(1, 3, 32, 32))
    assert rates.layers[0].place == "stem"
    assert {layer.stage for layer in rates.layers} == {None, 1, 2, 3}


def test_a_layer_that_runs_twice_has_the_steps_of_both_runs():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.neuron = LIF()

        def forward(self, x):
            return self.neuron(self.neuron(x.transpose(0, 1)))

    clip = torch.tensor([2.0, 0.0]).view(1, 2, 1, 1, 1).expand(1, 2, 3, 4, 4)  # the second run gets 1, 0: too little
    (layer,) = firing_rates(Twice(), clip).layers
    assert layer.step_means == (1.0, 0.0, 0.0, 0.0)
    assert layer.mean == 0.25
