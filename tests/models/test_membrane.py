"""Models with membrane shortcuts, MS-QKFormer and Max-Former: equations, inputs, timm's interface, errors."""

import copy

import pytest
import timm
import torch
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2

from timm_qkformer.layers import LIF, ParametricLIF, SpikingNeuron
from timm_qkformer.models import MaxFormer, QKFormer
from tiny import images, tiny

NAMES = ["test_qkformer_ms", "test_maxformer"]

PARAMS = [
    ("qkformer_hst10_384_ms", QKFormer, 16_473_688),
    ("qkformer_hst10_512_ms", QKFormer, 29_079_336),
    ("qkformer_hst10_768_ms", QKFormer, 64_962_760),
    ("maxformer_10_384", MaxFormer, 16_237_240),
    ("maxformer_10_512", MaxFormer, 28_653_480),
    ("maxformer_10_768", MaxFormer, 63_992_200),  # the paper's 63.99 M
]


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.mark.parametrize(("name", "cls", "params"), PARAMS)
def test_parameter_counts(name, cls, params):
    model = timm.create_model(name, device="meta")
    assert type(model) is cls
    assert sum(p.numel() for p in model.parameters()) == params
    assert [info["reduction"] for info in model.feature_info] == [4, 8, 16]


def test_tiny_models_are_tiny(name):
    assert sum(p.numel() for p in timm.create_model(name).parameters()) < 500_000


@torch.inference_mode()
def test_shortcuts_join_membrane_potentials(name):
    """Eq. 17: a neuron in front of every weight layer, none after the addition."""
    model = tiny(name)
    lif, half = LIF(), LIF(v_threshold=0.5)
    x = images(2)

    def embed(x, layer):
        s = lif(x)
        return layer.main[1].currents(lif(layer.main[0].currents(s))) + layer.shortcut.currents(s)

    def mix(s, layer):
        if hasattr(layer, "dw"):
            return layer.dw.currents(s)
        q, k = (layer.split_heads(lif(unit.currents(s))) for unit in (layer.q, layer.k))
        if hasattr(layer, "v"):
            v = layer.split_heads(lif(layer.v.currents(s)))
            y = half(torch.einsum("tbhdn,tbhem,tbhdm->tbhen", q, v, k) * 0.125)
        else:
            y = half(q.sum(layer.sum_dim, keepdim=True)) * k
        return layer.proj.currents(y.flatten(2, 3).unflatten(3, s.shape[3:]))

    out = model.stem.currents(x[None]).expand(model.time_steps, -1, -1, -1, -1)
    for stage in model.stages:
        out = embed(out, stage.embed)
        for block in stage.blocks:
            out = out + mix(lif(out), block.attn)
            out = out + block.mlp.fc2.currents(lif(block.mlp.fc1.currents(lif(out))))
    torch.testing.assert_close(model.stages(model.stem(x, model.time_steps)), out, rtol=0, atol=1e-9)
    # The head: mean over space, LIF per step, Linear, mean over T.
    logits = model.head(lif(out.mean((3, 4)))).mean(0)
    assert not torch.equal(logits[0], logits[1])
    torch.testing.assert_close(model(x), logits, rtol=0, atol=1e-9)


@torch.inference_mode()
def test_features_average_to_firing_rates(name):
    model, x = tiny(name), images(3)
    features = model.forward_features(x)
    assert features.shape == (3, 64, 2, 2)
    torch.testing.assert_close(model.forward_head(features), model(x), rtol=0, atol=0)
    steps = model.stages(model.stem(x, 4))
    rate = LIF()(steps.mean((3, 4))).mean(0)
    assert 0 < rate.mean() < 1
    torch.testing.assert_close(features.mean((2, 3)), rate)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), rate)
    # Apart from the shift it is the mean potential.
    mean = steps.mean(0)
    torch.testing.assert_close(
        features - features.mean((2, 3), keepdim=True), mean - mean.mean((2, 3), keepdim=True), rtol=0, atol=1e-9
    )
    # Other pooling is relative to the rate.
    model.reset_classifier(7, "max")
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, rate + mean.amax((2, 3)) - mean.mean((2, 3)), rtol=0, atol=1e-9)


@pytest.mark.parametrize("neuron", ["lif", "if", "plif"])
@torch.inference_mode()
def test_a_sample_never_depends_on_its_batch_mates(name, neuron):
    model, x = tiny(name, neuron=neuron), images(4)
    alone = torch.cat([model(x[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(model(x), alone, rtol=0, atol=1e-9)
    torch.testing.assert_close(model(x.flip(0)).flip(0), alone, rtol=0, atol=1e-9)
    assert len(alone.unique(dim=0)) == 4


@torch.inference_mode()
def test_clips_and_time_steps(name):
    model, x = tiny(name), images(2)
    at_4 = model(x)
    clip = x[:, None].expand(-1, 4, -1, -1, -1)
    torch.testing.assert_close(model(clip), at_4)
    moving = torch.randn(2, 6, 3, 32, 32, dtype=torch.float64)
    answer = model(moving)
    model.set_time_steps(1)
    assert torch.equal(model(moving), answer)
    assert not torch.equal(model(moving.flip(1)), answer)  # the order of events matters
    assert not torch.equal(model(x), at_4)
    model.set_time_steps(4)
    assert torch.equal(model(x), at_4)


@pytest.mark.parametrize("size", [(16, 16), (17, 31), (20, 100)])
@torch.inference_mode()
def test_any_size(name, size):
    features = tiny(name).forward_features(images(1, size=size))
    assert features.shape == (1, 64, -(-size[0] // 16), -(-size[1] // 16))


@torch.inference_mode()
def test_intermediates_are_means_over_time(name):
    model, x = tiny(name), images(2)
    out = model.stem(x, 4)
    expected = []
    for stage in model.stages:
        out = stage(out)
        expected.append(out.mean(0))
    last, taps = model.forward_intermediates(x)
    assert torch.equal(last, model.forward_features(x))
    assert len(taps) == 3
    assert all(torch.equal(tap, want) for tap, want in zip(taps, expected, strict=True))
    last, taps = model.forward_intermediates(x, indices=[1], stop_early=True)
    assert torch.equal(last, expected[1])
    assert torch.equal(taps[0], expected[1])


@pytest.mark.parametrize("last", [1, 2])
@torch.inference_mode()
def test_pruned_models_have_no_head_neurons(name, last):
    model, x = tiny(name), images(2)
    _, taps = model.forward_intermediates(x)
    neurons = sum(isinstance(m, SpikingNeuron) for m in model.readout.modules())
    assert neurons == 1
    assert model.prune_intermediate_layers([0, last]) == [0, last]
    assert len(model.stages) == last + 1
    assert not any(isinstance(m, SpikingNeuron) for m in model.readout.modules())
    assert torch.equal(model.forward_features(x), taps[last])
    assert torch.equal(model(x), taps[last])
    model.reset_classifier(3, "avg")
    assert model.double()(x).shape == (2, 3)


def test_features_only(name):
    model = timm.create_model(name, features_only=True)
    assert model.feature_info.reduction() == [4, 8, 16]
    maps = model(torch.randn(1, 3, 64, 96))
    assert [tuple(m.shape) for m in maps] == [(1, 16, 16, 24), (1, 32, 8, 12), (1, 64, 4, 6)]
    model = timm.create_model(name, features_only=True, out_indices=(0, 1))
    model(torch.randn(2, 3, 32, 32))[-1].sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@torch.inference_mode()
def test_classifier_can_go_and_come(name):
    model, x = tiny(name), images(2)
    rates = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(0)
    assert torch.equal(model(x), rates)
    model.reset_classifier(0, "")
    assert torch.equal(model(x), model.forward_features(x))
    model.reset_classifier(5, "catavgmax")
    assert model(x).shape == (2, 5)
    assert model.head_hidden_size == 128


def test_fits_a_batch(name):
    """Gradients arrive everywhere, the head's neurons included, and are of use."""
    model = timm.create_model(name, num_classes=7, neuron="plif", drop_path_rate=0.1, drop_rate=0.1, proj_drop_rate=0.1)
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8) % 7
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-2, weight_decay=0.01)
    losses = []
    for _ in range(20):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None for p in model.parameters())
    assert model.readout.neuron.w.grad.abs() > 0
    assert losses[-1] < 0.7 * losses[0]


def test_grad_checkpointing_gives_the_same_gradients(name):
    model, x = tiny(name).train(), images(2)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(checkpointed, plain)


@torch.inference_mode()
def test_half_precision(name):
    model, x = tiny(name).float(), images(2).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
    model.bfloat16()
    features = model.forward_features(x.bfloat16())
    assert features.dtype == torch.bfloat16
    # The head's firing rates survive the rounding of the map: they are multiples of 1 / T.
    rates = features.double().mean((2, 3)) * model.time_steps
    assert (rates - rates.round()).abs().max() < 0.1
    assert 0 < rates.mean() < model.time_steps


@torch.inference_mode()
def test_scripts(name):
    model, x = tiny(name, neuron="plif"), images(2)
    scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(x), model(x), rtol=0, atol=1e-9)
    clip = torch.randn(2, 3, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(scripted(clip), model(clip), rtol=0, atol=1e-9)


def test_compiles_into_one_graph(name):
    model = tiny(name, time_steps=2, depths=(1, 0, 1))
    x = images(2)
    answer = torch.compile(model, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(answer, model(x))


@torch.inference_mode()
def test_copies(name):
    model, x = tiny(name), images(2)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    other = tiny(name)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


@torch.inference_mode()
def test_timms_folder_keeps_the_time_steps(name, tmp_path):
    model, x = tiny(name), images(2)
    model.set_time_steps(3)
    save_for_hf(model, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).double().eval()
    assert loaded.time_steps == 3
    torch.testing.assert_close(loaded(x), model(x))


def test_layer_decay_groups(name):
    model = timm.create_model(name, neuron="plif")
    optimizer = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.05, layer_decay=0.5)
    scales = {}
    names = {id(p): n for n, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for p in group["params"]:
            scales[names[id(p)]] = group["lr_scale"]
            assert (group["weight_decay"] == 0) == (p.ndim <= 1)
    order = ["stem.conv.weight", "stages.0.embed.neuron.w", "stages.0.blocks.0.neuron1.w"]
    order += ["stages.1.embed.main.0.conv.weight", "stages.2.blocks.0.mlp.fc1.conv.weight"]
    order += ["stages.2.blocks.1.neuron2.w", "head.weight"]
    values = [scales[n] for n in order]
    assert values == sorted(values)
    assert scales["readout.neuron.w"] == scales["head.weight"] == 1.0


def test_any_hierarchy_takes_membrane_shortcuts():
    for name, x in (("qkformer_hst4_384", images(2)), ("qkformer_hst2_256", images(2, 2))):
        kwargs = {"embed_dims": (16, 32, 64), "time_steps": 2}
        plain = tiny(name, **kwargs)
        model = tiny(name, membrane_shortcut=True, neuron="plif", **kwargs)
        assert plain.state_dict().keys() <= model.state_dict().keys()
        assert all(type(m) is ParametricLIF for m in model.modules() if isinstance(m, SpikingNeuron))
        torch.testing.assert_close(model.forward_head(model.forward_features(x)), model(x))
        assert model(x).shape == (2, 7)


@pytest.mark.parametrize("mixer", ["dwc3", "ssa", ("ssa", "dwc7", "dwc5")])
@torch.inference_mode()
def test_mixers(mixer):
    model = tiny("test_maxformer", mixer=mixer)
    x = images(2)
    assert not torch.equal(model(x)[0], model(x)[1])


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("test_maxformer", {"mixer": "dwc4"}, r"mixer='dwc4'.*dwc3.*dwc5.*dwc7.*ssa"),
        ("test_maxformer", {"mixer": ("ssa", "ssa")}, r"mixer=.*each of the 3 stages, not 2"),
        ("test_maxformer", {"num_heads": 5}, r"num_heads=5 must divide.*dim=64"),
        ("test_maxformer", {"time_steps": 0}, "time_steps=0"),
        ("test_qkformer_ms", {"batch_coupled": True}, "batch_coupled=True.*membrane_shortcut=True"),
        ("test_qkformer_ms", {"attn": "mha"}, "attn='mha'"),
    ],
)
def test_bad_arguments_are_named(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model(name, **kwargs)


def test_there_is_nothing_to_couple_in_max_former():
    with pytest.raises(TypeError, match="batch_coupled"):
        timm.create_model("test_maxformer", batch_coupled=True)
