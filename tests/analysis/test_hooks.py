"""What hooks see is what happened, however the data come, and the model is left as it was."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.data import create_loader
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import timm_qkformer
from timm_qkformer.analysis import (
    energy,
    firing_rates,
    neuron_layers,
    peak_memory,
    pick_neurons,
    recalibrated_norms,
    record_attention,
    record_layer,
    record_spikes,
)
from timm_qkformer.layers import MembraneReadout, SpikingConv, SpikingStem
from tiny import images, lively, tiny

MODELS = ("test_qkformer", "test_qkformer_ms", "test_maxformer")


class Small(nn.Module):
    """Two layers of neurons."""

    def __init__(self):
        super().__init__()
        self.stem = SpikingStem(3, 64)
        self.conv = SpikingConv(64, 64)

    def forward(self, x):
        return self.conv(self.stem(x, 4)).mean((0, 3, 4))


def state(model):
    """What must not change: modes, hooks, weights and statistics."""
    hooks = [(m.training, list(m._forward_hooks), list(m._forward_pre_hooks)) for m in model.modules()]
    return hooks, {name: tensor.tolist() for name, tensor in model.state_dict().items()}


def numbers(model, data, measure=firing_rates):
    return json.dumps(measure(model, data).to_dict())


@pytest.mark.parametrize("suffix", ["", "attn_neuron"])
def test_records_what_the_neurons_fire(suffix):
    model, x = timm.create_model("test_qkformer").eval(), torch.randn(2, 3, 32, 32)
    before = state(model)
    with record_spikes(model, suffix) as spikes, torch.no_grad():
        model(x)
    assert set(spikes) == {name for name in neuron_layers(model) if name.endswith(suffix)}
    if not suffix:
        assert next(iter(spikes)) == "stem.neuron"
        assert torch.equal(spikes["stem.neuron"], model.stem(x, 4))
    assert state(model) == before
    with pytest.raises(ValueError, match="channels"), record_spikes(model):
        model(torch.randn(1, 5, 32, 32))
    assert state(model) == before


@pytest.mark.parametrize("look", [firing_rates, energy, record_attention, peak_memory])
def test_the_model_comes_out_as_it_went_in(look):
    model = tiny("test_qkformer", drop_path_rate=0.5).train()
    model.stem.bn.eval()  # as frozen batch norms are
    before = state(model)
    look(model, images(1))
    assert state(model) == before
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="5 channels"):
        look(model, images(1, chans=5))
    assert state(model) == before


def test_training_mode_changes_no_number():
    model, x = tiny("test_qkformer", drop_path_rate=0.5, proj_drop_rate=0.5), images(2)
    assert numbers(model, x) == numbers(model.train(), x)


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


@pytest.mark.parametrize("measure", [firing_rates, energy])
@pytest.mark.parametrize("name", MODELS)
def test_batches_workers_and_order_change_nothing(name, measure):
    model = lively(timm.create_model(name)).float()  # float32: there, a batch's size does change a sample's spikes
    x = torch.randn(7, 3, 40, 40)
    dataset = TensorDataset(x, torch.arange(7))
    expected = numbers(model, x, measure)
    assert expected == numbers(model, list(x), measure)
    assert expected == numbers(model, dataset, measure)
    assert expected == numbers(model, (batch for batch in x.split(3)), measure)
    for batch_size, workers, shuffle in ((1, 0, False), (3, 0, True), (4, 2, True), (7, 1, False)):
        loader = DataLoader(dataset, batch_size, shuffle=shuffle, num_workers=workers)
        assert expected == numbers(model, loader, measure), (batch_size, workers, shuffle)


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


def scripted(model):
    return torch.jit.script(model)


def exported(model):
    return torch.export.export(Small().eval(), (torch.randn(2, 3, 16, 16),)).module()


def readout_alone(model):
    return nn.Sequential(nn.Conv2d(3, 8, 3), MembraneReadout())


BLACK = torch.zeros(1, 3, 32, 32)


@pytest.mark.parametrize(
    ("spoil", "data", "message"),
    [
        (scripted, BLACK, "TorchScript module"),
        (exported, BLACK, "no neurons of this package"),
        (lambda model: model.head, BLACK, "Linear has no neurons of this package"),
        (timm_qkformer.deploy, BLACK, r"no neurons of this package .* deployed, give"),
        (readout_alone, BLACK, "no neurons of this package to look at"),
        (lambda model: "model", BLACK, "model is a str"),
        (lambda model: model, [], "the data is empty"),
        (lambda model: model, torch.zeros(0, 3, 32, 32), "the data is empty"),
        (lambda model: model, torch.zeros(2, 32), r"float32 of shape \[2, 32\]"),
        (lambda model: model, torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "uint8 .* floating-point"),
        (lambda model: model, 3, "data is a int"),
        (lambda model: model, {"images": BLACK}, "data is a dict"),
        (lambda model: model, [{"images": BLACK}], "batch 0 of the data holds a dict"),
        (lambda model: model, [BLACK, "images"], "batch 1 of the data holds a str"),
        (lambda model: model, torch.zeros(2, 3, 32, 32).index_fill(0, torch.tensor(1), torch.nan), "sample 1 .* NaN"),
        (lambda model: model, torch.full((1, 3, 32, 32), torch.inf), "sample 0 of the data has NaN or infinite"),
        (lambda model: model, [BLACK, torch.zeros(1, 3, 64, 64)], "sample 1 of the data has shape"),
    ],
)
def test_refusals_name_the_reason(spoil, data, message):
    model = timm.create_model("test_qkformer").eval()
    spoiled = spoil(model)
    with pytest.raises(ValueError, match=message):
        firing_rates(spoiled, data)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(0, 3, 32, 32), "empty batch"),
        (torch.zeros(3, 32, 32), "neither images"),
        (torch.full((1, 3, 32, 32), torch.nan), "NaN"),
    ],
)
def test_batches_that_cannot_be_captured(x, message):
    with pytest.raises(ValueError, match=message):
        record_attention(tiny("test_qkformer"), x)


def test_weights_that_are_not_finite_are_refused():
    model = timm.create_model("test_qkformer")
    with torch.no_grad():
        model.stages[1].blocks[0].mlp.fc1.conv.weight[0] = torch.nan
    with pytest.raises(ValueError, match=r"stages\.1\.blocks\.0\.mlp\.fc1\.conv\.weight has NaN"):
        firing_rates(model, torch.zeros(1, 3, 32, 32))


def test_spike_trains_of_a_layer():
    model, x = tiny("test_qkformer"), images(2)
    spikes = record_layer(model, x, "stem.neuron")
    with torch.no_grad():
        fired = model.stem(x, 4).numpy().astype(bool)
    assert np.array_equal(spikes, fired)
    trains, rows, total = pick_neurons(spikes, sample=1, limit=10)
    assert total == fired[0, 1].size
    assert (rows[0], rows[-1], len(rows)) == (0, total - 1, 10)
    for train, row in zip(trains, rows, strict=True):
        assert np.array_equal(train, [step[1].flat[row] for step in fired])
    everything, _, _ = pick_neurons(spikes, limit=10**6)
    assert everything.shape == (total, 4)
    assert "stages.0.blocks.0.mlp.fc1.neuron" in neuron_layers(model)
    with pytest.raises(ValueError, match="layer='stem' is no layer of neurons"):
        record_layer(model, x, "stem")


def test_recalibrated_norms_wake_an_untrained_model_and_are_put_back():
    model, x = timm.create_model("test_qkformer", num_classes=7), images().float()
    before = state(model)
    silent = record_attention(model, x)[0].inputs["q"].mean()
    with recalibrated_norms(model, [x[:1], x[1:]]):
        within = record_attention(model, x)[0].inputs["q"].mean()
    assert within > 10 * silent
    assert within > 0.01
    assert state(model) == before
    assert all(m.momentum == 0.1 for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    with pytest.raises(KeyError), recalibrated_norms(model, [x]):
        raise KeyError
    assert state(model) == before
