"""Deployed models against those that they were made from."""

import copy
import os
import pickle
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import timm_qkformer
from timm_qkformer.execution import execution_policy
from timm_qkformer.inference import projection as projection_module
from timm_qkformer.inference import weights as weights_module
from timm_qkformer.neurons import LIF, ParametricLIF, SpikingNeuron
from tiny import images, rounds_currents, tiny

MODELS = {
    "sew": ("test_qkformer", {}),
    "sew, ssa everywhere": ("test_qkformer", {"attn": "ssa", "neuron": "if"}),
    "sew, cifar": ("test_qkformer", {"patch_embed": "cifar", "neuron": "plif"}),
    "sew, events": ("test_qkformer", {"patch_embed": "events", "in_chans": 2, "depths": (0, 1, 1)}),
    "sew, batch coupled": ("test_qkformer", {"batch_coupled": True}),
    "ms": ("test_qkformer_ms", {"neuron": "plif"}),
    "ms, cifar, qkca": ("test_qkformer_ms", {"patch_embed": "cifar", "attn": "qkca"}),
    "ms, events": ("test_qkformer_ms", {"patch_embed": "events", "in_chans": 2}),
    "maxformer": ("test_maxformer", {}),
    "maxformer, other mixers": ("test_maxformer", {"mixer": ("ssa", "dwc3", "dwc5")}),
}
PRECISIONS = ["fp32", "bf16", "int8"]


def make(kind="sew", **kwargs):
    name, model_args = MODELS[kind]
    return tiny(name, **{**model_args, **kwargs})


@pytest.fixture(params=MODELS)
def kind(request):
    return request.param


@pytest.fixture(params=["sew", "ms, cifar, qkca", "maxformer"])
def one_of_each(request):
    return request.param


@pytest.fixture(autouse=True)
def _warn_again(monkeypatch):
    monkeypatch.setattr(weights_module, "_warned", set())


def deploy(model, precision="fp32", products="auto"):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="precision=")  # this machine may lack the arithmetic
        return timm_qkformer.deploy(model, precision, products)


def assert_same(deployed, model, x):
    """Spike for spike: sums of spikes are equal; potentials and logits to within the rounding of float64."""
    with torch.no_grad():
        expected = model.forward_features(x)
        logits = model(x)
    found = deployed.forward_features(x)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    if isinstance(model.stem.neuron, SpikingNeuron):  # sums of spikes, not potentials
        assert torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-11)
    torch.testing.assert_close(deployed(x), logits, rtol=0.0, atol=1e-11)
    torch.testing.assert_close(deployed.forward_head(found), logits, rtol=0.0, atol=1e-11)
    return expected


@pytest.mark.parametrize(
    ("batch", "size", "steps"), [(3, (32, 32), 4), (1, (37, 45), 4), (2, (19, 16), 1), (2, (16, 21), 17)], ids=str
)
def test_equals_the_plain_model_in_float64(kind, batch, size, steps):
    model = make(kind, time_steps=steps)
    x = images(batch, model.in_chans, size)
    features = assert_same(deploy(model), model, x)
    assert steps == 1 or features.abs().mean() > 0.01  # spikes arrive at the end


def test_clips_bring_their_own_time_steps_and_kernels_change_nothing(kind):
    model = make(kind)
    clip = torch.randn(2, 6, model.in_chans, 32, 27, dtype=torch.float64)
    assert_same(deploy(model), model, clip)
    with execution_policy(kernels="never"):
        assert_same(deploy(model), model, clip)


def test_any_memory_layout(kind):
    model = make(kind)
    deployed = deploy(model)
    x = images(2, model.in_chans, (24, 32))
    assert_same(deployed, model, x.contiguous(memory_format=torch.channels_last))
    assert_same(deployed, model, x.transpose(2, 3))
    assert_same(deployed, model, torch.cat([x, x], 3)[:, :, 1:20, 1::2])
    assert_same(deployed, model, torch.randn(6, 2, model.in_chans, 16, 16, dtype=torch.float64).transpose(0, 1))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_empty_batches(kind, precision):
    model = make(kind)
    deployed = deploy(model, precision)
    for x in (images(0, model.in_chans, (37, 45)), torch.zeros(0, 5, model.in_chans, 16, 33, dtype=torch.float64)):
        one = x.new_zeros(1, *x.shape[1:])
        assert deployed.forward_features(x).shape == (0, *deployed.forward_features(one).shape[1:])
        assert deployed(x).shape == (0, 7)
        assert deployed(x).dtype == deployed(one).dtype


def test_batches_are_cut_into_chunks_without_a_trace(kind, monkeypatch):
    model = make(kind)
    x = images(5, model.in_chans)
    monkeypatch.setattr("timm_qkformer.inference.model._TOKENS", 1)  # one sample at a time
    monkeypatch.setattr("timm_qkformer.inference.blocks.CHUNK", 4 * 128 * 3)  # three tokens at a time
    assert_same(deploy(model), model, x)


def test_intermediates(kind):
    model = make(kind)
    deployed = deploy(model)
    x = images(2, model.in_chans)
    for kwargs in ({}, {"indices": [0, 2]}, {"indices": [1], "stop_early": True}, {"indices": 2}):
        with torch.no_grad():
            expected, expected_maps = model.forward_intermediates(x, **kwargs)
        found, maps = deployed.forward_intermediates(x, **kwargs)
        torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-11)
        torch.testing.assert_close(maps, expected_maps, rtol=0.0, atol=1e-11)
        only = deployed.forward_intermediates(x, **kwargs, intermediates_only=True)
        torch.testing.assert_close(only, expected_maps, rtol=0.0, atol=1e-11)
    with pytest.raises(ValueError, match="output_fmt='NLC'"):
        deployed.forward_intermediates(x, output_fmt="NLC")


def test_pruned_models_and_models_without_a_classifier(kind):
    model = make(kind)
    x = images(2, model.in_chans)
    model.reset_classifier(0)
    assert_same(deploy(model), model, x)
    model.prune_intermediate_layers([1])
    assert len(model.stages) == 2
    assert_same(deploy(model), model, x)
    assert deploy(model)(x[:0]).shape == (0, *model(x).shape[1:])


@pytest.mark.parametrize("reset", [None, 0.1])
def test_neurons_of_every_kind(reset):
    model = make("ms", neuron=partial(LIF, tau=3.0, v_threshold=0.8, v_reset=reset, decay_input=False))
    assert_same(deploy(model), model, images())
    model = make("sew", neuron=partial(ParametricLIF, init_tau=1.5, v_reset=reset))
    assert_same(deploy(model), model, images())


# Low precision


def similarity(a, b):
    return F.cosine_similarity(a.double().flatten(), b.double().flatten(), 0).item()


@pytest.mark.parametrize("products", ["events", "dense"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_low_precision_rounds_weights_alone(kind, precision, products):
    """The model whose weights are those rounded ones, in float64, is the yardstick: nothing else was lost."""
    model = make(kind)
    x = images(2, model.in_chans)
    exact, deployed = deploy(model), deploy(model.float(), precision, products)
    rounded = {}
    for name, module in deployed.named_modules():
        if isinstance(module, projection_module.Projection):
            weight = module.weight.double()
            if module.scale is not None:
                weight = weight * module.scale.double().view(-1, 1, 1, 1)
            rounded |= {f"{name}.weight": weight, f"{name}.bias": module.bias.double()}
    rest = {name: tensor.double() for name, tensor in deployed.state_dict().items() if not name.endswith("scale")}
    original = exact.forward_features(x)
    exact.load_state_dict(rest | rounded)
    expected, found = exact.forward_features(x), deployed.forward_features(x.float())
    assert found.dtype == torch.float32
    assert similarity(found, expected) > (0.9 if rounds_currents(precision, products) else 0.995)
    assert similarity(found, original) > 0.8
    assert (precision == "fp32") == (similarity(expected, original) > 0.9999)


def test_bfloat16_arithmetic(kind, monkeypatch):
    """Where there are no instructions for it, torch emulates bfloat16: slow, but the same roundings."""
    monkeypatch.setattr("timm_qkformer.inference.model.spikes_dtype", lambda *_: torch.bfloat16)
    model = make(kind).float()
    x = images(2, model.in_chans, (24, 32)).float()
    with torch.no_grad():
        expected = model.forward_features(x)
    found = deploy(model, "bf16").forward_features(x)
    assert found.dtype == torch.float32
    assert similarity(found, expected) > 0.8
    with execution_policy(kernels="never"):
        assert similarity(deploy(model, "bf16").forward_features(x), found) > 0.9999


def test_int8_sums_of_spikes_reach_their_bound_and_no_further():
    """Every neuron always fires."""
    model = make("sew", depths=(1, 2, 3)).float()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.zeros_(module.weight)
            nn.init.constant_(module.bias, 4.0)
    deployed = deploy(model, "int8")
    _, maps = deployed.forward_intermediates(images(1).float())
    assert [(m.min().item(), m.max().item()) for m in maps] == [(4, 4), (6, 6), (8, 8)]


def test_int8_refuses_sums_of_spikes_that_could_overflow():
    model = timm.create_model("test_qkformer", depths=(1, 1, 64))
    with pytest.raises(ValueError, match=r"stages\.2 can reach 130, 8-bit arithmetic is exact up to 129"):
        deploy(model, "int8")
    with pytest.raises(ValueError, match=r'products="events": sums of spikes in stages\.2 can reach 130'):
        deploy(model, "fp32", "events")
    assert not deploy(model, "bf16").events
    deploy(timm.create_model("test_qkformer_ms", depths=(1, 1, 64)), "int8")  # potentials add up, not spikes


@pytest.mark.parametrize(("precision", "said"), [("bf16", "no bfloat16 arithmetic"), ("int8", "no 8-bit arithmetic")])
def test_without_the_arithmetic_full_precision_stands_in_after_one_warning(monkeypatch, precision, said):
    model = make().float()
    expected = deploy(model, precision, "dense").forward_features(images().float())
    monkeypatch.setattr(weights_module, "_warned", set())
    monkeypatch.setattr(weights_module, "has_onednn", lambda *_: False)
    with pytest.warns(RuntimeWarning, match=f'precision="{precision}": {said} on this cpu') as caught:
        deployed = timm_qkformer.deploy(model, precision, "dense")
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = deployed.forward_features(images().float())
        timm_qkformer.deploy(model, precision, "dense")
        timm_qkformer.deploy(model, precision, "events")  # nothing to warn of
    assert found.shape == expected.shape
    torch.manual_seed(0)
    x = images().float()
    again = deploy(model, precision, "dense").forward_features(x)
    assert similarity(deployed.forward_features(x), again) == pytest.approx(1.0)


def test_without_onednn_the_same_answers(one_of_each, monkeypatch):
    model = make(one_of_each).float()
    x = images(2, model.in_chans).float()
    expected = deploy(model, products="dense").forward_features(x)
    monkeypatch.setattr(projection_module, "has_onednn", lambda *_: False)
    assert similarity(deploy(model, products="dense").forward_features(x), expected) > 0.999


# A module like others


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_original_is_left_untouched(one_of_each, precision):
    model = make(one_of_each).float().train()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = copy.deepcopy(model.state_dict())
    x = images(2, model.in_chans).float()
    model.eval()
    with torch.no_grad():
        expected = model(x)
    model.train()
    deployed = deploy(model, precision)
    deployed(x)
    with torch.no_grad():
        for tensor in deployed.state_dict().values():
            tensor.zero_()
    assert model.training
    assert all(p.requires_grad and p.grad is not None for p in model.parameters())
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_saved_and_loaded(one_of_each, precision, tmp_path):
    model = make(one_of_each).float()
    x = images(2, model.in_chans).float()
    deployed = deploy(model, precision)
    expected = deployed(x)
    path = tmp_path / "deployed.pt"
    torch.save(deployed.state_dict(), path)
    fresh = deploy(make(one_of_each).float(), precision)
    assert not torch.equal(fresh(x), expected)
    fresh.load_state_dict(torch.load(path, weights_only=True))
    assert torch.equal(fresh(x), expected)
    with torch.inference_mode():
        other = deploy(make(one_of_each).float(), precision)
        other(x)
        other.load_state_dict(deployed.state_dict())
        assert torch.equal(other(x), expected)


def test_learned_time_constants_are_saved():
    plif = partial(ParametricLIF, init_tau=1.3)
    deployed, fresh = (deploy(make(neuron=neuron).float()) for neuron in (plif, "plif"))
    x = images().float()
    deployed(x)
    fresh(x)  # the neurons have been asked for their time constants
    fresh.load_state_dict(deployed.state_dict())
    assert torch.equal(fresh(x), deployed(x))
    assert fresh.stages[0].embed.main[0].neuron.spec.leak == pytest.approx(1 / 1.3)


def test_files_of_versions_with_attention_neurons_elsewhere():
    """Before operators were declared in one place, all of an operator's neurons were in one list."""
    model = make(attn=("qkta", "qkca", "ssa"), neuron=partial(ParametricLIF, init_tau=1.3))
    state, x = deploy(model).state_dict(), images()
    inputs = {"qkta": 2, "qkca": 2, "ssa": 3}
    for i, stage in enumerate(model.stages):
        for j, block in enumerate(stage.blocks):
            path = f"stages.{i}.blocks.{j}.attn"
            leak = state.pop(f"{path}.core.attn_neuron.leak")
            state[f"{path}.neurons.{inputs[block.attn.operator_name]}.leak"] = leak
    fresh = deploy(make(attn=("qkta", "qkca", "ssa"), neuron="plif"))
    fresh.load_state_dict(state)
    assert torch.equal(fresh(x), deploy(model)(x))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_of_low_precision_are_small(precision):
    model = make().float()
    size = sum(t.numel() * t.element_size() for t in deploy(model, precision).state_dict().values())
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 4)
    per_weight = {"fp32": 4, "bf16": 2, "int8": 1}[precision]
    assert weights * per_weight <= size < weights * per_weight * 1.3 + 8000


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ["sew", "ms"])
def test_copies_and_threads(precision, kind):
    deployed = deploy(make(kind).float(), precision)
    xs = [images(1 + i % 2).float() for i in range(4)]
    fresh = copy.deepcopy(deployed)  # not packed yet
    expected = [deployed(x) for x in xs]  # packs its weights
    copies = [copy.deepcopy(deployed), pickle.loads(pickle.dumps(deployed))]
    for tensor in deployed.state_dict().values():
        tensor.zero_()
    with ThreadPoolExecutor(len(xs)) as pool:
        for model in (fresh, *copies):
            assert all(map(torch.equal, pool.map(model, xs), expected))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_keeps_its_dtypes(precision):
    deployed = deploy(make().float(), precision)
    x = images().float()
    expected = deployed(x)
    for change in (torch.nn.Module.half, torch.nn.Module.bfloat16, torch.nn.Module.double):
        with pytest.raises(RuntimeError, match=rf"keeps its arithmetic, {precision} with potentials in torch\.float32"):
            change(deployed)
    dtypes = {name: tensor.dtype for name, tensor in deployed.state_dict().items()}
    assert torch.equal(deployed.float().to("cpu", torch.float32)(x), expected)
    assert {name: tensor.dtype for name, tensor in deployed.state_dict().items()} == dtypes
    assert deployed.to("meta").stem.projection.bias.is_meta


def test_does_not_depend_on_torch_defaults():
    """In a process of its own: another default device or dtype must not reach the kernels' operands."""
    code = """
import torch
from torch.nn import functional as F
import tiny
from timm_qkformer import deploy
from timm_qkformer.execution.convolution import _event_products, _event_weight_gradient

torch.set_num_threads(1)
model, x = tiny.tiny("test_qkformer").float(), torch.rand(2, 3, 32, 32)
models = [deploy(model, precision) for precision in ("fp32", "bf16", "int8")]
expected = [deployed(x) for deployed in models]
spikes, weight = torch.randint(0, 2, (2, 8, 5, 5)).float(), torch.randn(16, 8, 3, 3)
products, grad = F.conv2d(spikes, weight, padding=1), torch.randn(2, 16, 5, 5)
gradient = torch.nn.grad.conv2d_weight(spikes, weight.shape, grad, padding=1)
for dtype, device in ((torch.bfloat16, "cpu"), (torch.float64, "cpu"), (torch.float32, "meta")):
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    for deployed, wanted in zip(models, expected):
        assert torch.equal(deployed(x), wanted)
    torch.testing.assert_close(_event_products(spikes, weight, None, 1), products)
    rows = spikes.to(torch.uint8).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(_event_weight_gradient(rows, grad, weight), gradient)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_hooks_of_the_head_come_along():
    model, seen = make(), []
    model.head.register_forward_hook(lambda *_: seen.append("head"))
    model.stages[0].register_forward_hook(lambda *_: seen.append("stage"))
    deploy(model)(images())
    assert seen == ["head"]


def test_attributes_of_the_original():
    model = make("sew", global_pool="max", drop_rate=0.3)
    deployed = deploy(model)
    for name in ("num_classes", "num_features", "head_hidden_size", "in_chans", "time_steps", "feature_info"):
        assert getattr(deployed, name) == getattr(model, name)
    assert deployed.pretrained_cfg == model.pretrained_cfg
    assert timm.data.resolve_model_data_config(deployed) == timm.data.resolve_model_data_config(model)
    assert torch.equal(deployed.get_classifier().weight, model.get_classifier().weight)
    x = images()
    with torch.no_grad():
        features = model.forward_features(x)
        assert torch.equal(deployed.forward_head(features, pre_logits=True), model.forward_head(features, True))
    deployed.set_time_steps(2)
    assert model.time_steps == 4
    model.set_time_steps(2)
    assert_same(deployed, model, x)
    with pytest.raises(ValueError, match="time_steps=0"):
        deployed.set_time_steps(0)
    assert not any(isinstance(m, SpikingNeuron) for m in deployed.modules())


def test_is_for_inference_alone():
    deployed = deploy(make())
    assert not deployed.training
    assert deployed.eval() is deployed
    with pytest.raises(RuntimeError, match="inference alone"):
        deployed.train()
    x = images().requires_grad_()
    assert not deployed(x).requires_grad
    assert not any(p.requires_grad for p in deployed.parameters())
    assert not deployed(images()).is_inference()


def test_runs_inside_a_compiled_function():
    deployed = deploy(make())
    x = images()
    compiled = torch.compile(lambda x: deployed(x) * 2, backend="eager")
    assert torch.equal(compiled(x), deployed(x) * 2)


# Errors


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"precision='fp16' is unknown, choose one of \['fp32', 'bf16', 'int8'\]"):
        timm_qkformer.deploy(make(), "fp16")
    with pytest.raises(ValueError, match=r"products='sparse' is unknown, choose one of \['auto', 'events', 'dense'\]"):
        timm_qkformer.deploy(make(), products="sparse")
    with pytest.raises(TypeError, match="model is a Linear, expected a QKFormer or MaxFormer"):
        timm_qkformer.deploy(nn.Linear(1, 1))
    with pytest.raises(TypeError, match="model is a FeatureGetterNet"):
        timm_qkformer.deploy(timm.create_model("test_qkformer", features_only=True))
    for place, layer, said in [
        ("stages.1.blocks.0.attn", nn.Conv2d(1, 1, 1), r"stages\.1\.blocks\.0\.attn is a Conv2d.*no deployed form"),
        ("stages.1.blocks.0.mlp", nn.Identity(), r"stages\.1\.blocks\.0\.mlp is a Identity, expected a SpikingMlp"),
        ("stages.0.embed.main.0.neuron", nn.ReLU(), r"stages\.0\.embed\.main\.0\.neuron is a ReLU"),
        ("stages.0.embed.main.0", nn.ReLU(), r"stages\.0\.embed\.main\.0 is a ReLU, expected a SpikingConv"),
        ("stages.0.blocks.0.attn.q.neuron", nn.Identity(), r"attn\.q\.neuron is nn\.Identity, expected neurons"),
        ("stages.0.embed", nn.Identity(), r"stages\.0\.embed is a Identity"),
        ("stages.0.blocks.0", nn.Identity(), r"stages\.0\.blocks\.0 is a Identity, expected a SpikingBlock"),
        ("stem.pool", nn.AvgPool2d(3, 2, 1), r"stem\.pool is AvgPool2d"),
        ("readout", nn.Identity(), "readout is a Identity"),
    ]:
        model = make()
        parent, _, child = place.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
        with pytest.raises(TypeError, match=said):
            timm_qkformer.deploy(model)


def test_inputs_that_do_not_fit():
    deployed = deploy(make())
    with pytest.raises(ValueError, match="too small"):
        deployed(images(1, 3, (8, 32)))
    with pytest.raises(ValueError, match="in_chans=3"):
        deployed(images(1, 1))
    with pytest.raises(ValueError, match=r"input is torch\.uint8"):
        deployed(images().to(torch.uint8))


def test_deploy_is_imported_when_it_is_used():
    code = (
        "import sys, timm_qkformer\n"
        "print('timm_qkformer.inference' in sys.modules)\n"
        "print(callable(timm_qkformer.deploy), 'deploy' in dir(timm_qkformer))\n"
        "from timm_qkformer import deploy\n"
        "try: timm_qkformer.nothing\n"
        "except AttributeError as error: print(error)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split("\n")[:3] == ["False", "True True", "module 'timm_qkformer' has no attribute 'nothing'"]


@pytest.mark.parametrize(("saved", "loaded"), [("bf16", "int8"), ("int8", "bf16"), ("int8", "fp32"), ("fp32", "int8")])
def test_the_state_of_another_precision_is_refused(saved, loaded):
    model = tiny("test_qkformer")
    state = timm_qkformer.deploy(model, saved).state_dict()
    other = timm_qkformer.deploy(model, loaded)
    with pytest.raises(RuntimeError, match=r"weight is torch\.\w+, this model was deployed with torch\.\w+"):
        other.load_state_dict(state, strict=False)
