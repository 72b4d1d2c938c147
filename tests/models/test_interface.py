"""What all models share: inputs, T, timm's interface, training, export, errors.

Operators, neurons and shortcuts are gone through by the contract suite, in tests/contract.
"""

import math
import re
from functools import partial

import pytest
import timm
import torch
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2

from timm_qkformer import deploy
from timm_qkformer.hub.infer import architectures
from timm_qkformer.layers import SpikingConv, SpikingMlp, register_mlp
from timm_qkformer.models import (
    Architecture,
    BlockSpec,
    ChainSpec,
    EmbedSpec,
    MaxFormer,
    MixerSpec,
    PositionSpec,
    QKFormer,
    SpikingTransformer,
    StageSpec,
    UnitSpec,
)
from timm_qkformer.neurons import IF, LIF, ParametricLIF, SpikingNeuron, run_with_state
from tiny import images, lively
from tiny import tiny as tiny_model

NAMES = ["test_qkformer", "test_qkformer_ms", "test_maxformer"]

PARAMS = [
    ("qkformer_hst10_384", {}, QKFormer, 16_473_688),
    ("qkformer_hst10_512", {}, QKFormer, 29_079_336),
    ("qkformer_hst10_768", {}, QKFormer, 64_962_760),
    ("qkformer_hst4_384", {}, QKFormer, 6_706_234),
    ("qkformer_hst4_384", {"num_classes": 100}, QKFormer, 6_740_884),
    ("qkformer_hst2_256", {}, QKFormer, 1_504_138),
    ("qkformer_hst2_256", {"num_classes": 11, "mlp_ratio": 4.0}, QKFormer, 1_999_371),
    ("qkformer_hst10_384_ms", {}, QKFormer, 16_473_688),
    ("qkformer_hst10_512_ms", {}, QKFormer, 29_079_336),
    ("qkformer_hst10_768_ms", {}, QKFormer, 64_962_760),
    ("maxformer_10_384", {}, MaxFormer, 16_237_240),
    ("maxformer_10_512", {}, MaxFormer, 28_653_480),
    ("maxformer_10_768", {}, MaxFormer, 63_992_200),  # the paper's 63.99 M
]


@pytest.fixture(params=NAMES)
def tiny(request):
    return partial(tiny_model, request.param)


@pytest.mark.parametrize(("name", "kwargs", "cls", "params"), PARAMS)
def test_parameter_counts_are_the_papers(name, kwargs, cls, params):
    model = timm.create_model(name, device="meta", **kwargs)
    assert type(model) is cls
    assert sum(p.numel() for p in model.parameters()) == params


@pytest.mark.parametrize("name", architectures())
def test_configs_name_the_first_convolution_and_the_classifier(name):
    model = timm.create_model(name, device="meta")
    config, parameters = model.pretrained_cfg, model.state_dict()
    assert f"{config['first_conv']}.weight" in parameters
    assert f"{config['classifier']}.weight" in parameters
    for key in ("num_classes", "input_size", "pool_size", "crop_pct", "interpolation", "mean", "std"):
        assert config[key], key


def test_parameters_keep_their_order():
    """Optimizers know them by position, in checkpoints of earlier versions, too."""
    model = timm.create_model("test_qkformer", neuron="plif")
    layers = [name.split(".")[5] for name, _ in model.named_parameters() if "stages.2.blocks.0.attn" in name]
    assert list(dict.fromkeys(layers)) == ["q", "k", "attn_neuron", "proj", "v"]


@torch.inference_mode()
def test_clips_and_time_steps(tiny):
    model, x = tiny(), images(2)
    assert model(images(0)).shape == (0, 7)
    at_4 = model(x)
    still = x[:, None].expand(-1, 4, -1, -1, -1)
    torch.testing.assert_close(model(still), at_4)
    moving = torch.randn(2, 6, 3, 32, 32, dtype=torch.float64)
    answer = model(moving)
    model.set_time_steps(7)
    assert torch.equal(model(moving), answer)
    assert not torch.equal(model(moving.flip(1)), answer)  # the order of events matters
    assert not torch.equal(model(x), at_4)
    other = tiny(time_steps=7)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    model.set_time_steps(4)
    assert torch.equal(model(x), at_4)


@pytest.mark.parametrize("size", [(16, 16), (17, 31), (20, 100)])
@torch.inference_mode()
def test_any_size(tiny, size):
    features = tiny().forward_features(images(1, size=size))
    assert features.shape == (1, 64, -(-size[0] // 16), -(-size[1] // 16))


@torch.inference_mode()
def test_intermediates_are_means_over_time(tiny):
    model, x = tiny(), images(2)
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
def test_pruned_models_have_no_head_neurons(tiny, last):
    model, x = tiny(), images(2)
    taps = model.forward_intermediates(x, intermediates_only=True)
    assert model.prune_intermediate_layers([0, last]) == [0, last]
    assert len(model.stages) == last + 1
    assert not any(isinstance(m, SpikingNeuron) for m in model.readout.modules())
    assert torch.equal(model.forward_features(x), taps[last])
    assert torch.equal(model(x), taps[last])
    model.reset_classifier(3, "avg")
    assert model.double()(x).shape == (2, 3)


@pytest.mark.parametrize("name", NAMES)
def test_features_only(name):
    model = timm.create_model(name, features_only=True)
    assert model.feature_info.reduction() == [4, 8, 16]
    assert model.feature_info.channels() == [16, 32, 64]
    maps = model(torch.randn(1, 3, 64, 96))
    assert [tuple(m.shape) for m in maps] == [(1, 16, 16, 24), (1, 32, 8, 12), (1, 64, 4, 6)]
    model = timm.create_model(name, features_only=True, out_indices=(0, 1))
    model(torch.randn(2, 3, 32, 32))[-1].sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "catavgmax"])
@torch.inference_mode()
def test_classifiers_go_and_come(tiny, pool):
    model, x = tiny(global_pool=pool), images(2)
    assert model(x).shape == (2, 7)
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled)
    model.reset_classifier(0, "")
    assert torch.equal(model(x), features)
    model.reset_classifier(5, "catavgmax")
    assert model(x).shape == (2, 5)
    assert model.head_hidden_size == 128


@pytest.mark.parametrize("name", NAMES)
def test_fits_a_batch(name):
    """Gradients arrive everywhere, the head's neurons included, and are of use."""
    model = timm.create_model(name, num_classes=7, neuron="plif", drop_path_rate=0.1, drop_rate=0.1, proj_drop_rate=0.1)
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8) % 7
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-2, weight_decay=0.01)
    losses = []
    for _ in range(25):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(p.grad.abs() > 0 for p in model.readout.parameters())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("neuron", ["lif", "plif"])
def test_grad_checkpointing_gives_the_same_gradients(tiny, neuron):
    model, x = tiny(drop_path_rate=0.5, neuron=neuron).train(), images(2)
    grads = []
    for enable in (False, True):
        torch.manual_seed(1)
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(checkpointed, plain)


@pytest.mark.parametrize("name", NAMES)
def test_layer_decay_lowers_the_learning_rate_towards_the_input(name):
    model = timm.create_model(name, neuron="plif")
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.5)
    scale = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            scale[names.pop(id(parameter))] = group["lr_scale"]
            assert group["weight_decay"] == (0.0 if parameter.ndim <= 1 else 0.05)
    assert not names  # every parameter once
    depth = ["stem.", "stages.0.blocks.0.", "stages.1.blocks.0.", "stages.2.blocks.0.", "stages.2.blocks.1.", "head."]
    parts = [*depth, *(f"stages.{i}.embed." for i in range(3))]
    scales = [{value for name, value in scale.items() if name.startswith(part)} for part in parts]
    assert all(len(values) == 1 for values in scales)  # a block, or an embedding, learns at one rate
    flat = [values.pop() for values in scales[: len(depth)]]
    assert flat == sorted(set(flat))
    assert flat[-1] == 1.0
    assert scale.get("readout.neuron.w", 1.0) == 1.0


def test_drop_path_rates_rise_over_the_blocks(tiny):
    model = tiny(drop_path_rate=0.3)
    rates = [b.drop_path.drop.drop_prob if i else 0.0 for i, b in enumerate(b for s in model.stages for b in s.blocks)]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


@pytest.mark.parametrize("train", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(
    "tiny", [NAMES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:])], indirect=True
)
def test_compiles_into_one_graph(tiny, train):
    model, x = tiny(time_steps=2, depths=(1, 0, 1)).train(train), images(2)
    model(x)  # moves running statistics before both
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = model(x)
    model.load_state_dict(state)
    answer = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(answer, expected)
    if train:
        answer.sum().backward()
        assert all(p.grad is not None for p in model.parameters())


@pytest.mark.slow
@torch.no_grad()
def test_compiles_with_inductor(tiny):
    model, x = tiny(time_steps=2, depths=(1, 0, 1)).float(), images(2).float()
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "tiny", [NAMES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:])], indirect=True
)
def test_exports_for_any_batch_and_scripts_for_clips(tiny):
    model, x = tiny(neuron="plif"), images(2)
    batch = torch.export.Dim("batch", min=1, max=16)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module()
    scripted = torch.jit.script(model)
    for inputs in (x, images(1)):
        torch.testing.assert_close(program(inputs), model(inputs), rtol=0, atol=1e-9)
        torch.testing.assert_close(scripted(inputs), model(inputs), rtol=0, atol=1e-9)
    clip = torch.randn(2, 3, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(scripted(clip), model(clip), rtol=0, atol=1e-9)


@torch.inference_mode()
def test_timms_folder_keeps_the_time_steps(tiny, tmp_path):
    model, x = tiny(), images(2)
    model.set_time_steps(3)
    save_for_hf(model, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).double().eval()
    assert loaded.time_steps == 3
    torch.testing.assert_close(loaded(x), model(x))


@pytest.mark.parametrize(("neuron", "cls"), [("lif", LIF), ("if", IF), ("plif", ParametricLIF)])
def test_neuron_argument(tiny, neuron, cls):
    model = tiny(neuron=neuron)
    neurons = [m for m in model.modules() if isinstance(m, SpikingNeuron)]
    assert len(neurons) > 20
    assert all(type(m) is cls for m in neurons)
    assert {m.v_threshold for n, m in model.named_modules() if n.endswith("attn_neuron")} == {0.5}
    learned = sum(name.endswith(".w") for name, _ in model.named_parameters())
    assert learned == (len(neurons) if neuron == "plif" else 0)


def test_neuron_layers_and_arguments_of_ones_own(tiny):
    model = tiny(neuron=partial(LIF, tau=1.5, surrogate="atan"))
    assert {(m.tau, m.surrogate) for m in model.modules() if isinstance(m, LIF)} == {(1.5, "atan")}
    model = tiny(neuron="plif", neuron_args={"init_tau": 3.0, "v_threshold": 0.25})
    neurons = {name: m for name, m in model.named_modules() if isinstance(m, ParametricLIF)}
    assert {m.init_tau for m in neurons.values()} == {3.0}
    assert {m.v_threshold for name, m in neurons.items() if not name.endswith("attn_neuron")} == {0.25}
    assert {m.v_threshold for name, m in neurons.items() if name.endswith("attn_neuron")} == {0.5}


# Architectures that no paper has


def block(mixers, heads=2, ratio=2.0):
    return BlockSpec(tuple(MixerSpec(name, heads) for name in mixers.split("+")), ratio)


@register_mlp("halves")
class Halves(SpikingMlp):
    """One half of the hidden channels, convolved depth-wise, masks the other."""

    mixes = True

    def build_mixer(self, hidden_dim, hidden, neuron_layer, **dd):
        half = hidden_dim // 2
        self.dw = SpikingConv(half, half, 3, groups=half, input_range=hidden, neuron_layer=neuron_layer, **dd)
        return half, hidden.times(self.dw.output_range)

    def mix(self, x):
        u, gate = x.chunk(2, dim=2)
        return self.dw(u) * gate


STAGES = {
    "one": (StageSpec(16, EmbedSpec((True, False)), (block("qkta"), block("ssa", 4, 1.5))),),
    "no block": (StageSpec(16, EmbedSpec((True,)), ()),),
    "chains": (
        StageSpec(
            16,
            ChainSpec((UnitSpec(12, "spikes"), UnitSpec(16, "currents")), PositionSpec()),
            (BlockSpec((MixerSpec("ssa", 4, {"qkv_bias": True, "scale": 0.25}),), mlp="halves"),),
        ),
        StageSpec(16, ChainSpec((UnitSpec(16), UnitSpec(16, "currents"))), (block("qkca"),)),
    ),
    "chains of currents": (
        StageSpec(16, ChainSpec((UnitSpec(16, "currents", fires=False),), PositionSpec(True, False)), (block("ssa"),)),
        StageSpec(24, ChainSpec((UnitSpec(24, fires=False),), PositionSpec(False, False), True), (block("qkca"),)),
    ),
    "four": (
        StageSpec(16, EmbedSpec((False, True)), (block("qkta+dwc3"),)),
        StageSpec(16, EmbedSpec((False,), shortcut=False), (block("dwc5"), block("qkca+ssa", 8, 3.0))),
        StageSpec(32, EmbedSpec((True, True), hidden_ratio=0.5), ()),
        StageSpec(24, EmbedSpec((True,), strided=True), (block("ssa+qkta+dwc7", 3), block("dwc3+dwc3"))),
    ),
}


@pytest.mark.parametrize("membrane_shortcut", [False, True])
@pytest.mark.parametrize("neuron", ["plif", "relu"])
@pytest.mark.parametrize("stages", STAGES.values(), ids=STAGES)
@torch.inference_mode()
def test_any_architecture(stages, neuron, membrane_shortcut):
    chains = isinstance(stages[0].embed, ChainSpec)
    stem = UnitSpec(8, "spikes") if chains else UnitSpec(8, fires=not membrane_shortcut, stride=2)
    architecture = Architecture(stem, stages, membrane_shortcut, membrane_shortcut)
    model = lively(SpikingTransformer(architecture, num_classes=5, neuron=neuron, time_steps=3))
    clip = torch.randn(2, 3, 3, 33, 40, dtype=torch.float64)
    expected = model(clip)
    scale = max(1.0, expected.abs().max().item())
    scripted = (
        [torch.jit.script(model)] if neuron == "plif" else []
    )  # takes long; the contract suite scripts the others
    for form in (deploy(model), *scripted):
        torch.testing.assert_close(form(clip) / scale, expected / scale, rtol=0, atol=1e-9)
    body = torch.nn.Sequential(*model.stages)
    x = model.stem(clip, 1)
    state, steps = None, []
    for step in x.split(1):
        out, state = run_with_state(body, step, state=state)
        steps.append(out)
    torch.testing.assert_close(torch.cat(steps), body(x), rtol=1e-12, atol=1e-9)
    assert [info["num_chs"] for info in model.feature_info] == [stage.dim for stage in stages]
    assert [m.shape[1] for m in model.forward_intermediates(clip)[1]] == [stage.dim for stage in stages]


def test_no_stage_is_refused():
    with pytest.raises(ValueError, match="architecture has no stages"):
        SpikingTransformer(Architecture(UnitSpec(8), ()))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 32, 32), r"\[3, 32, 32\].*3 dimensions.*\[B, C, H, W\].*\[B, T, C, H, W\]"),
        ((1, 1, 1, 3, 32, 32), "6 dimensions"),
        ((2, 1, 32, 32), "1 channels.*in_chans=3"),
        ((2, 4, 2, 32, 32), "2 channels.*in_chans=3"),
        ((2, 0, 3, 32, 32), "T=0"),
        ((2, 3, 15, 32), "15x32 pixels is too small.*16x16"),
    ],
)
def test_bad_input_is_named(shape, message):
    with pytest.raises(ValueError, match=message):
        tiny_model("test_qkformer")(torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        *(
            ("test_qkformer", kwargs, message)
            for kwargs, message in [
                ({"attn": "mha"}, r"attn='mha'.*qkca.*qkta.*ssa"),
                ({"attn": "qkta+"}, r"attn='qkta\+'.*'' is unknown"),
                ({"attn": ("ssa", "ssa")}, r"attn=.*each of the 3 stages, not 2"),
                ({"attn": ("ssa", "ssa", ["ssa"])}, r"attn=.*each of the stage's 2 blocks"),
                ({"depths": (1, 1)}, r"depths=\(1, 1\).*3 stages"),
                ({"depths": (1, -1, 1)}, r"depths=\(1, -1, 1\).*below 0"),
                ({"depths": (1, 1, 1.5)}, r"depths=\(1, 1, 1.5\) must be whole numbers"),
                ({"mlp_ratio": 0}, "mlp_ratio=0 leaves no MLP"),
                ({"mlp_ratio": (1, 1, -1.0)}, "leaves no MLP"),
                ({"drop_path_rate": 1.5}, r"drop_path_rate=1\.5 must be a number between 0 and 1"),
                ({"drop_rate": -0.1}, r"drop_rate=-0\.1 must be a number between 0 and 1"),
                ({"proj_drop_rate": 2}, "proj_drop_rate=2 must be a number between 0 and 1"),
                ({"num_heads": 5}, r"num_heads=5 must divide.*dim=16"),
                ({"num_heads": (1, 0, 1)}, r"num_heads=\(1, 0, 1\) must be whole numbers"),
                ({"neuron": "swish"}, "neuron='swish'"),
                ({"time_steps": 0}, "time_steps=0"),
                ({"time_steps": 2.5}, r"time_steps=2\.5"),
                ({"patch_embed": "vit"}, r"patch_embed='vit'.*cifar.*events.*imagenet"),
                ({"embed_dims": (1, 2, 4)}, r"embed_dims=\(1, 2, 4\).*below 2"),
                ({"attn": 0}, "attn=0: operator 0 is unknown"),
                ({"attn": ("ssa", "ssa", None)}, "attn=.*operator None is unknown"),
                ({"mlp_ratio": (1, None, 1)}, r"mlp_ratio=\(1, None, 1\) leaves no MLP"),
                ({"mlp_ratio": True}, "mlp_ratio=True leaves no MLP"),
                ({"drop_rate": "x"}, "drop_rate='x' must be a number"),
                ({"drop_path_rate": math.nan}, "drop_path_rate=nan must be a number"),
                ({"in_chans": 1.5}, r"in_chans=1\.5 must be a whole number of at least 1"),
                ({"in_chans": 0}, "in_chans=0 must be a whole number of at least 1"),
                ({"num_classes": "x"}, "num_classes='x' must be a whole number"),
                ({"num_classes": -1}, "num_classes=-1 must be a whole number"),
                ({"output_stride": "x"}, "output_stride='x'"),
                ({"global_pool": "mean"}, "global_pool='mean'"),
                ({"neuron": 5}, "neuron=5 is unknown"),
                ({"neuron_args": {"surrogate": ["atan"]}}, r"surrogate=\['atan'\] is unknown"),
                ({"patch_embed": ["cifar"]}, r"patch_embed=\['cifar'\] is unknown"),
            ]
        ),
        ("test_maxformer", {"mixer": "dwc4"}, r"mixer='dwc4'.*dwc3.*dwc5.*dwc7.*ssa"),
        ("test_maxformer", {"mixer": ("ssa", "ssa")}, r"mixer=.*each of the 3 stages, not 2"),
        ("test_maxformer", {"num_heads": 5}, r"num_heads=5 must divide.*dim=64"),
        ("test_qkformer_ms", {"batch_coupled": True}, "batch_coupled=True.*membrane_shortcut=True"),
        ("test_spiliformer", {"feedback": ["cifar10"]}, r"feedback=\['cifar10'\] is unknown.*cifar100"),
        *(
            (name, {"scale": scale}, f"scale={scale!r} must be a finite number")
            for name in ("test_spikformer", "test_tim", "test_semm")
            for scale in (math.nan, math.inf, "x", True)
        ),
        *(("test_tim", {"tokens": n}, f"tokens={n!r} must be a whole number of at least 1") for n in (2.5, "x", True)),
        *(("test_tim", {"alpha": a}, f"alpha={a!r} must be a number between 0 and 1") for a in ("x", math.nan, True)),
        *(
            ("test_tim", {"thresholds": value}, rf"thresholds={re.escape(repr(value))} must be three numbers")
            for value in (0.5, "abc", (1, 1), (1, 1, math.inf), (1, 1, None), (1, 1, True))
        ),
        ("test_tim", {"thresholds": (1, 1, 0)}, r"thresholds=\(1, 1, 0\) must be above the resting potential"),
        *(("test_semm", {"expert_dim": n}, f"expert_dim={n!r} must be a whole number") for n in (1.5, "x", True)),
        ("test_semm", {"mlp_ratio": 35 / 32}, r"mlp_ratio=1\.09375 gives an MLP of 35 hidden.*split into 2"),
        ("test_autost", {"mlp_ratio": [2, None]}, "mlp_ratio=.*None.* leaves no MLP"),
        ("test_spikformer", {"pools": 11}, "pools=11 must be four digits"),
        ("test_spikformer", {"pools": ["0", "0", "1", "1"]}, "pools=.* must be four digits"),
        ("test_a2os2a", {"operator_args": 5}, "operator_args=5 must be a mapping"),
        ("test_a2os2a", {"operator_args": {"a2os2a": 5}}, "operator_args=.*'a2os2a': 5.* must be a mapping"),
        ("test_a2os2a", {"operator_args": {"nope": {}}}, "operator_args=.*'nope' is unknown, choose from.*a2os2a"),
        (
            "test_qkformer",
            {"operator_args": {"ssa": {"num_heads": 2}}},
            "sets 'num_heads'.*give num_heads= to the model",
        ),
        ("test_maxformer", {"operator_args": {"ssa": {"proj_drop": 0.1}}}, "give proj_drop_rate= to the model"),
        ("test_sdt", {"operator_args": {"sdsa": {"input_range": 2}}}, "sets 'input_range'.*leave it out"),
        ("test_qkformer", {"operator_args": []}, r"operator_args=\[\] must be a mapping"),
        ("test_a2os2a", {"operator_args": {5: {}}}, "operator_args=.*operator 5 is unknown"),
        ("test_a2os2a", {"operator_args": {"a2os2a": {"value_neuron": 5}}}, "value_neuron=5 must be"),
        ("test_a2os2a", {"operator_args": {"a2os2a": {"attn_threshold": "x"}}}, "attn_threshold='x' must be"),
        (
            "test_sdt",
            {"attn": "dwc3", "operator_args": {"dwc3": {"kernel_size": 2.5}}},
            r"kernel_size=2\.5 must be a whole number",
        ),
    ],
)
def test_bad_arguments_are_named(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model(name, **kwargs)


@pytest.mark.parametrize(
    ("name", "argument"), [("test_qkformer", "not_an_argument"), ("test_maxformer", "batch_coupled")]
)
def test_unknown_arguments_are_refused(name, argument):
    with pytest.raises(TypeError, match=argument):
        timm.create_model(name, **{argument: True})
