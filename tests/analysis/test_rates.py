"""Firing rates: equal to the release's and to counting by hand, whatever the batches, and the model stays as it was."""

import json
import os
import sys
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from timm.data import create_loader
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import timm_qkformer
from constant import Constant
from golden import CASES, MEMBRANE_CASES, GoldenCase
from timm_qkformer.analysis import firing_rates, record_spikes
from timm_qkformer.layers import LIF, MembraneReadout, SpikingConv, SpikingStem, set_lif_backend
from tiny import images, lively, tiny

MODELS = ("test_qkformer", "test_qkformer_ms", "test_maxformer")


class FirstChannel(Constant):
    """Always fires in channel 0, never in channel 1, at the first time step alone in the others."""

    def forward(self, x):
        spikes = torch.zeros_like(x)
        spikes[0] = 1.0
        spikes[:, :, 0] = 1.0
        spikes[:, :, 1] = 0.0
        return spikes


class Small(nn.Module):
    """Two layers of neurons."""

    def __init__(self):
        super().__init__()
        self.stem = SpikingStem(3, 64)
        self.conv = SpikingConv(64, 64)

    def forward(self, x):
        return self.conv(self.stem(x, 4)).mean((0, 3, 4))


def state(model):
    return [(m.training, list(m._forward_hooks.values()), list(m._forward_pre_hooks.values())) for m in model.modules()]


@pytest.mark.parametrize("name", sorted({**CASES, **MEMBRANE_CASES}))
def test_agrees_with_the_release(name):
    golden = GoldenCase(name)
    model_name, model_args = CASES[name] if name in CASES else (MEMBRANE_CASES[name], {})
    model = timm.create_model(model_name, **model_args).double()
    load = sys.modules[type(model).__module__].checkpoint_filter_fn
    model.load_state_dict(load(golden.checkpoint, model), strict=True)
    rates = firing_rates(model, golden.input[:1])
    neurons = [layer.mean for layer in rates.layers if layer.is_neuron]
    assert neurons == pytest.approx(list(golden.firing_rates.values()), abs=1e-9)
    assert rates.samples == 1
    assert all(layer.std == 0.0 for layer in rates.layers)


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


def test_masked_keys():
    model = tiny("test_qkformer")
    x = images(2)
    rates = firing_rates(model, x)
    with record_spikes(model) as spikes, torch.no_grad():
        model(x)
    for path in ("stages.0.blocks.0.attn", "stages.1.blocks.0.attn"):
        k = spikes[f"{path}.k.neuron"]
        mask = spikes[f"{path}.attn_neuron"]  # [T, B, heads, 1, tokens] or [T, B, heads, channels, 1]
        masked = mask * k.flatten(3).unflatten(2, [4, -1])
        layer = rates[f"{path}.proj"]
        assert not layer.is_neuron
        assert layer.mean == pytest.approx(masked.mean().item(), abs=1e-12)
        assert 0.0 < layer.mean < rates[f"{path}.k.neuron"].mean


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


def numbers(model, data):
    return json.dumps(firing_rates(model, data).to_dict())


@pytest.mark.parametrize("name", MODELS)
def test_batches_workers_and_order_change_nothing(name):
    model = lively(timm.create_model(name)).float()  # float32: there, a batch's size does change a sample's spikes
    x = torch.randn(7, 3, 40, 40)
    dataset = TensorDataset(x, torch.arange(7))
    expected = numbers(model, x)
    assert expected == numbers(model, list(x))
    assert expected == numbers(model, dataset)
    assert expected == numbers(model, (batch for batch in x.split(3)))
    for batch_size, workers, shuffle in ((1, 0, False), (3, 0, True), (4, 2, True), (7, 1, False)):
        loader = DataLoader(dataset, batch_size, shuffle=shuffle, num_workers=workers)
        assert expected == numbers(model, loader), (batch_size, workers, shuffle)


class Pictures(torch.utils.data.Dataset):
    def __init__(self, count):
        self.count, self.transform = count, None

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        from PIL import Image

        pixels = torch.randint(0, 256, (40, 40, 3), generator=torch.Generator().manual_seed(index), dtype=torch.uint8)
        return self.transform(Image.fromarray(pixels.numpy())), index


@pytest.mark.parametrize("prefetch", [False, True])
def test_loaders_of_timm(prefetch):
    model = lively(timm.create_model("test_qkformer")).float()
    args = {"input_size": (3, 32, 32), "num_workers": 0, "device": torch.device("cpu"), "use_prefetcher": prefetch}
    results = {numbers(model, create_loader(Pictures(5), batch_size=size, **args)) for size in (1, 2, 5)}
    assert len(results) == 1
    assert json.loads(results.pop())["samples"] == 5


def test_event_clips_bring_their_own_steps():
    model = tiny("test_qkformer", in_chans=2)
    clips = torch.rand(3, 6, 2, 32, 32, dtype=torch.float64)
    rates = firing_rates(model, clips)
    assert (rates.time_steps, rates.input_shape) == (6, (6, 2, 32, 32))
    assert len(rates["stem.neuron"].step_means) == 6
    with pytest.raises(ValueError, match=r"sample 3 of the data has shape \[5, 2, 32, 32\], those before it \[6,"):
        firing_rates(model, [clips, clips[:, :5]])


def test_memory_does_not_grow():
    model = Small()
    resident = []

    def stream():
        for i in range(1000):
            if i % 100 == 0:
                resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
            yield torch.randn(1, 3, 16, 16)

    if not os.path.exists("/proc/self/statm"):
        pytest.skip("needs /proc")
    rates = firing_rates(model, stream())
    assert rates.samples == 1000
    # One image's spikes are 0.5 MB here: keeping them would take 450 MB from the second entry to the last.
    assert len(resident) == 10
    assert resident[-1] - resident[1] < 40 * 2**20


def test_a_users_hooks_stay_and_are_called():
    model = tiny("test_qkformer")
    calls = []
    model.stem.register_forward_hook(lambda *_: calls.append("stem"))
    model.stages[0].blocks[0].attn.q.neuron.register_forward_hook(lambda _m, _x, out: torch.ones_like(out))
    before = state(model)
    rates = firing_rates(model, images(2))
    assert state(model) == before
    assert calls == ["stem", "stem"]
    assert rates["stages.0.blocks.0.attn.q.neuron"].mean == 1.0  # what the layers behind it see


def test_hooks_and_mode_are_put_back_after_an_error():
    model = tiny("test_qkformer").train()
    model.stages[1].eval()
    before = state(model)
    with pytest.raises(ValueError, match="channels"):
        firing_rates(model, [images(1), images(1, chans=5)[:, :5]][1:])
    assert state(model) == before


def test_training_mode_is_left_and_put_back():
    model = tiny("test_qkformer", drop_path_rate=0.5, proj_drop_rate=0.5)
    x = images(2)
    expected = numbers(model, x)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    model.stem.bn.eval()  # as frozen batch norms are
    before = state(model)
    assert numbers(model, x) == expected
    assert state(model) == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("how", ["function", "method", "part"])
def test_compiled_models(how):
    model = Small().eval()
    x = torch.randn(2, 3, 16, 16)
    expected = numbers(model, x)
    if how == "function":
        compiled = torch.compile(model, backend="eager")
    elif how == "method":
        compiled = model
        compiled.compile(backend="eager")
    else:
        compiled = model
        model.conv = torch.compile(model.conv, backend="eager")
    with torch.no_grad():
        compiled(x)  # compile before there are hooks
    rates = firing_rates(compiled, x)
    assert [layer.mean for layer in rates.layers] == [layer["mean"] for layer in json.loads(expected)["layers"]]
    assert [layer.name for layer in rates.layers] == ["conv", rates.layers[1].path]


def test_wrapped_models(tmp_path):
    model = tiny("test_qkformer")
    x = images(1)
    expected = numbers(model, x)
    assert numbers(nn.DataParallel(model), x) == expected
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        assert numbers(nn.parallel.DistributedDataParallel(model), x) == expected
    finally:
        torch.distributed.destroy_process_group()
    assert numbers(timm.utils.ModelEmaV3(model), x) == expected


def test_coupled_neurons_are_measured_per_sample():
    model = tiny("test_qkformer", batch_coupled=True)
    x = images(3)
    rates = numbers(model, x)
    assert model.stages[2].blocks[0].attn.proj.batch_coupled
    for module in model.modules():
        if hasattr(module, "batch_coupled"):
            module.batch_coupled = False
    assert numbers(model, x) == rates


def test_backends_of_the_neurons_agree():
    model = tiny("test_qkformer")
    x = images(1)
    with set_lif_backend("eager"):
        eager = numbers(model, x)
    with set_lif_backend("spikingjelly"):
        assert numbers(model, x) == eager


def test_other_models_with_our_neurons():
    features = timm.create_model("test_qkformer", features_only=True)
    rates = firing_rates(features, torch.randn(1, 3, 32, 32))
    assert rates.layers[0].place == "stem"
    assert {layer.stage for layer in rates.layers} == {None, 1, 2, 3}


def scripted(model):
    return torch.jit.script(model)


def exported(model):
    return torch.export.export(Small().eval(), (torch.randn(2, 3, 16, 16),)).module()


@pytest.mark.parametrize(
    ("spoil", "data", "message"),
    [
        (scripted, torch.zeros(1, 3, 32, 32), "TorchScript module"),
        (exported, torch.zeros(1, 3, 32, 32), "no neurons of this package"),
        (lambda model: model.head, torch.zeros(1, 3, 32, 32), "Linear has no neurons of this package"),
        (lambda model: "model", torch.zeros(1, 3, 32, 32), "model is a str"),
        (lambda model: model, [], "the data is empty"),
        (lambda model: model, torch.zeros(0, 3, 32, 32), "the data is empty"),
        (lambda model: model, torch.zeros(2, 32), r"float32 of shape \[2, 32\]"),
        (lambda model: model, torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "uint8 .* floating-point"),
        (lambda model: model, 3, "data is a int"),
        (lambda model: model, {"images": torch.zeros(1, 3, 32, 32)}, "data is a dict"),
        (lambda model: model, [{"images": torch.zeros(1, 3, 32, 32)}], "batch 0 of the data holds a dict"),
        (lambda model: model, [torch.zeros(1, 3, 32, 32), "images"], "batch 1 of the data holds a str"),
        (lambda model: model, torch.zeros(2, 3, 32, 32).index_fill(0, torch.tensor(1), torch.nan), "sample 1 .* NaN"),
        (lambda model: model, torch.full((1, 3, 32, 32), torch.inf), "sample 0 of the data has NaN or infinite"),
        (lambda model: model, [torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 64, 64)], "sample 1 of the data has shape"),
    ],
)
def test_refusals_name_the_reason(spoil, data, message):
    model = timm.create_model("test_qkformer").eval()
    spoiled = spoil(model)
    with pytest.raises(ValueError, match=message):
        firing_rates(spoiled, data)


@pytest.mark.parametrize("name", MODELS)
def test_deployed_models_are_refused(name):
    deploy = getattr(timm_qkformer, "deploy", None)
    if deploy is None:
        pytest.skip("this version has no timm_qkformer.deploy")
    deployed = deploy(timm.create_model(name).eval(), precision="fp32")
    with pytest.raises(ValueError, match=r"no neurons of this package .* deployed, give"):
        firing_rates(deployed, torch.zeros(1, 3, 32, 32))


def test_neurons_of_a_readout_alone_are_none():
    with pytest.raises(ValueError, match="no neurons of this package to look at"):
        firing_rates(nn.Sequential(nn.Conv2d(3, 8, 3), MembraneReadout()), torch.zeros(1, 3, 32, 32))


def test_weights_that_are_not_finite_are_refused():
    model = timm.create_model("test_qkformer")
    with torch.no_grad():
        model.stages[1].blocks[0].mlp.fc1.conv.weight[0] = torch.nan
    with pytest.raises(ValueError, match=r"stages\.1\.blocks\.0\.mlp\.fc1\.conv\.weight has NaN"):
        firing_rates(model, torch.zeros(1, 3, 32, 32))


def test_a_layer_that_runs_twice_is_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.neuron = LIF()

        def forward(self, x):
            return self.neuron(self.neuron(x.transpose(0, 1)))

    with pytest.raises(ValueError, match="neuron runs more than once"):
        firing_rates(Twice(), torch.zeros(1, 2, 3, 4, 4))


def test_silent_and_full_networks():
    for value in (0.0, 1.0):
        model = timm.create_model("test_qkformer_ms", neuron=partial(Constant, value))
        rates = firing_rates(model, torch.randn(2, 3, 32, 32))
        assert rates.mean == value
        everywhere = [layer.dead if value == 0.0 else layer.saturated for layer in rates.layers]
        assert everywhere == [tuple(range(layer.channels)) for layer in rates.layers]
