"""The models' contract beyond timm's own test suite: inputs, isolation of samples, T, copies, compilation, errors."""

import copy
import pickle
import threading
from functools import partial

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2

from timm_qkformer.layers import IF, LIF, ParametricLIF, SpikingNeuron
from tiny import images
from tiny import tiny as tiny_model

PARAMS = [
    ("qkformer_hst10_384", {}, 16_473_688),
    ("qkformer_hst10_512", {}, 29_079_336),
    ("qkformer_hst10_768", {}, 64_962_760),
    ("qkformer_hst4_384", {}, 6_706_234),
    ("qkformer_hst4_384", {"num_classes": 100}, 6_740_884),
    ("qkformer_hst2_256", {}, 1_504_138),
    ("qkformer_hst2_256", {"num_classes": 11, "mlp_ratio": 4.0}, 1_999_371),
]


tiny = partial(tiny_model, "test_qkformer")


@pytest.mark.parametrize(("name", "kwargs", "params"), PARAMS)
def test_parameter_counts_are_the_papers(name, kwargs, params):
    model = timm.create_model(name, device="meta", **kwargs)
    assert sum(p.numel() for p in model.parameters()) == params


def test_tiny_model_is_tiny():
    assert sum(p.numel() for p in timm.create_model("test_qkformer").parameters()) < 500_000


@pytest.mark.parametrize("attn", ["qkta", "qkca", "ssa", ("qkca", "ssa", "qkta")])
@pytest.mark.parametrize("neuron", ["lif", "if", "plif"])
@torch.inference_mode()
def test_a_sample_never_depends_on_its_batch_mates(attn, neuron):
    model = tiny(attn=attn, neuron=neuron)
    x = images(4)
    alone = torch.cat([model(x[i : i + 1]) for i in range(4)])
    assert torch.equal(model(x), alone)
    assert torch.equal(model(x.flip(0)).flip(0), alone)
    assert len(alone.unique(dim=0)) == 4


@torch.inference_mode()
def test_batch_coupled_is_the_releases_behaviour():
    state = tiny().state_dict()
    free, coupled = tiny(), tiny(batch_coupled=True)
    free.load_state_dict(state)
    coupled.load_state_dict(state)
    x = images(3)
    assert torch.equal(coupled(x[:1]), free(x[:1]))
    assert not torch.allclose(coupled(x), free(x))


@torch.inference_mode()
def test_threads_share_a_model():
    model = tiny()
    inputs = [images(2) for _ in range(2)]
    expected = [model(x) for x in inputs]
    answers: list[list[torch.Tensor]] = [[], []]

    @torch.inference_mode()
    def work(i):
        for _ in range(8):
            answers[i].append(model(inputs[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert len(answers[i]) == 8
        assert all(torch.equal(answer, expected[i]) for answer in answers[i])


@torch.inference_mode()
def test_a_still_clip_is_an_image():
    model, x = tiny(), images(2)
    clip = x[:, None].expand(-1, 4, -1, -1, -1)
    assert torch.equal(model(clip), model(x))
    assert torch.equal(model.forward_features(clip), model.forward_features(x))


@torch.inference_mode()
def test_clips_bring_their_own_time_steps():
    model = tiny()
    clip = torch.randn(2, 6, 3, 32, 32, dtype=torch.float64)
    answer = model(clip)
    model.set_time_steps(1)
    assert torch.equal(model(clip), answer)
    assert not torch.equal(model(clip.flip(1)), answer)  # the order of events matters


@torch.inference_mode()
def test_time_steps_change_in_one_call():
    model, x = tiny(), images(2)
    at_4 = model(x)
    model.set_time_steps(7)
    at_7 = model(x)
    assert not torch.equal(at_7, at_4)
    other = tiny(time_steps=7)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), at_7)
    model.set_time_steps(4)
    assert torch.equal(model(x), at_4)


@pytest.mark.parametrize("size", [(16, 16), (17, 31), (48, 32), (20, 100)])
@torch.inference_mode()
def test_any_size(size):
    model = tiny()
    features = model.forward_features(images(1, size=size))
    assert features.shape == (1, 64, -(-size[0] // 16), -(-size[1] // 16))


@pytest.mark.parametrize("name", ["qkformer_hst4_384", "qkformer_hst2_256"])
@torch.inference_mode()
def test_odd_sizes_of_the_other_embeddings(name):
    model = timm.create_model(name, time_steps=1, embed_dims=(16, 32, 64)).eval()
    stride = model.feature_info[-1]["reduction"]
    size = (stride * 2 + 1, stride * 3 - 1)
    features = model.forward_features(torch.randn(1, model.in_chans, *size))
    assert features.shape[-2:] == (3, 3)


@torch.inference_mode()
def test_features_are_firing_rates():
    model, x = tiny(), images(2)
    features = model.forward_features(x)
    steps = model.stages(model.stem(x, 4))  # [T, B, C, H, W], integer spike sums
    assert torch.equal(steps, steps.round())
    torch.testing.assert_close(features, steps.mean(0))
    torch.testing.assert_close(model.forward_head(features), model(x))
    per_step = torch.stack([model.head(step.mean((2, 3))) for step in steps])  # the paper's head
    torch.testing.assert_close(per_step.mean(0), model(x))


def test_features_only():
    model = timm.create_model("qkformer_hst10_384", features_only=True, time_steps=1)
    assert model.feature_info.reduction() == [4, 8, 16]
    assert model.feature_info.channels() == [96, 192, 384]
    maps = model(torch.randn(1, 3, 64, 96))
    assert [tuple(m.shape) for m in maps] == [(1, 96, 16, 24), (1, 192, 8, 12), (1, 384, 4, 6)]
    model = timm.create_model("test_qkformer", features_only=True, out_indices=(0, 1))
    model(torch.randn(2, 3, 32, 32))[-1].sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(("neuron", "cls"), [("lif", LIF), ("if", IF), ("plif", ParametricLIF)])
def test_neuron_argument(neuron, cls):
    model = tiny(neuron=neuron)
    neurons = [m for m in model.modules() if isinstance(m, SpikingNeuron)]
    assert len(neurons) > 20
    assert all(type(m) is cls for m in neurons)
    assert {m.v_threshold for n, m in model.named_modules() if n.endswith("attn_neuron")} == {0.5}
    assert sum(n.endswith("neuron.w") for n, _ in model.named_parameters()) == (len(neurons) if neuron == "plif" else 0)


def test_neuron_layers_of_ones_own():
    model = tiny(neuron=partial(LIF, tau=1.5, surrogate="atan"))
    assert {(m.tau, m.surrogate) for m in model.modules() if isinstance(m, LIF)} == {(1.5, "atan")}


def test_arguments_of_the_neurons():
    model = tiny(neuron="plif", neuron_args={"init_tau": 3.0, "v_threshold": 0.25})
    neurons = {name: m for name, m in model.named_modules() if isinstance(m, ParametricLIF)}
    assert {m.init_tau for m in neurons.values()} == {3.0}
    assert {m.v_threshold for name, m in neurons.items() if not name.endswith("attn_neuron")} == {0.25}
    assert {m.v_threshold for name, m in neurons.items() if name.endswith("attn_neuron")} == {0.5}


def test_the_model_for_one_cpu_fires_early_unless_asked_not_to():
    def thresholds(**kwargs):
        model = timm.create_model("qkformer_hst3_192", device="meta", **kwargs)
        neurons = {name: m for name, m in model.named_modules() if isinstance(m, LIF | IF)}
        return {m.v_threshold for name, m in neurons.items() if not name.endswith("attn_neuron")}

    assert thresholds() == thresholds(neuron="if") == {0.5}
    assert thresholds(neuron_args={}) == {1.0}


@torch.inference_mode()
def test_small_images_keep_16_x_16_tokens_in_the_first_stage():
    model = timm.create_model("qkformer_hst3_192", num_classes=10).eval()
    assert sum(p.numel() for p in model.parameters()) == 1_238_050
    assert [info["reduction"] for info in model.feature_info] == [2, 4, 8]
    maps = model.forward_intermediates(torch.randn(1, 3, 32, 32), intermediates_only=True)
    assert [tuple(x.shape[1:]) for x in maps] == [(48, 16, 16), (96, 8, 8), (192, 4, 4)]


@torch.inference_mode()
def test_copies():
    model, x = tiny(neuron="plif"), images(2)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    other = tiny(neuron="plif")
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), expected)


def test_fits_a_batch():
    """Gradients arrive everywhere and are of use."""
    model = timm.create_model(
        "test_qkformer", num_classes=7, drop_path_rate=0.05, drop_rate=0.05, proj_drop_rate=0.05
    ).train()
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8) % 7
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-2, weight_decay=0.01)
    losses = []
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None for p in model.parameters())
    assert losses[-1] < 0.7 * losses[0]


def test_grad_checkpointing_gives_the_same_gradients():
    x = images(2)
    grads = []
    for enable in (False, True):
        torch.manual_seed(0)
        model = tiny(drop_path_rate=0.5).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(1)
        model(x).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_autocast_and_half_precision():
    model, x = tiny().float(), images(2).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(x)
    assert logits.dtype == torch.bfloat16
    logits.float().sum().backward()
    assert model.stem.conv.weight.grad.dtype == torch.float32
    assert model.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_layer_decay_groups():
    model = timm.create_model("test_qkformer")
    optimizer = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.05, layer_decay=0.5)
    scales = {}
    names = {id(p): n for n, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for p in group["params"]:
            scales[names[id(p)]] = group["lr_scale"]
            assert (group["weight_decay"] == 0) == (p.ndim <= 1)
    order = ["stem.conv.weight", "stages.0.blocks.0.attn.q.conv.weight", "stages.1.embed.main.0.conv.weight"]
    order += ["stages.2.blocks.0.mlp.fc1.conv.weight", "stages.2.blocks.1.mlp.fc1.conv.weight", "head.weight"]
    values = [scales[name] for name in order]
    assert values == sorted(values)
    assert len(set(values)) == len(values)
    assert scales["head.weight"] == 1.0


def test_drop_path_rates_rise_over_the_blocks():
    model = tiny(drop_path_rate=0.3)
    rates = [b.drop_path.drop.drop_prob if i else 0.0 for i, b in enumerate(b for s in model.stages for b in s.blocks)]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


@pytest.mark.parametrize("train", [False, True])
def test_compiles_into_one_graph(train):
    model = timm.create_model("test_qkformer", time_steps=2, depths=(1, 0, 1), attn=("qkta", "qkca", "ssa"))
    model.train(train)
    x = torch.randn(2, 3, 32, 32)
    state = copy.deepcopy(model.state_dict())
    expected = model(x)
    model.load_state_dict(state)
    answer = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(answer, expected)
    if train:
        answer.sum().backward()
        assert all(p.grad is not None for p in model.parameters())


@pytest.mark.slow
@torch.no_grad()
def test_compiles_with_inductor():
    model = timm.create_model("test_qkformer", time_steps=2, depths=(1, 0, 1)).eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-4, atol=1e-4)


def test_exports():
    model, x = tiny(), images(2)
    batch = torch.export.Dim("batch", min=1, max=16)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module()
    assert torch.equal(program(x), model(x))
    one = images(1)
    assert torch.equal(program(one), model(one))


@torch.inference_mode()
def test_scripts():
    model, x = tiny(neuron="plif"), images(2)
    scripted = torch.jit.script(model)
    assert torch.equal(scripted(x), model(x))
    clip = torch.randn(2, 3, 3, 32, 32, dtype=torch.float64)
    assert torch.equal(scripted(clip), model(clip))


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "catavgmax"])
@torch.inference_mode()
def test_global_pool(pool):
    model, x = tiny(global_pool=pool), images(2)
    assert model(x).shape == (2, 7)
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, model.head_hidden_size)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    model.reset_classifier(0, "")
    assert torch.equal(model(x), model.forward_features(x))


@torch.inference_mode()
@pytest.mark.parametrize("batch_coupled", [False, True])
def test_empty_batch(batch_coupled):
    assert tiny(batch_coupled=batch_coupled)(images(0)).shape == (0, 7)


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
        tiny()(torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"attn": "mha"}, r"attn='mha'.*qkca.*qkta.*ssa"),
        ({"attn": ("ssa", "ssa")}, r"attn=.*each of the 3 stages, not 2"),
        ({"depths": (1, 1)}, r"depths=\(1, 1\).*3 stages"),
        ({"depths": (1, -1, 1)}, r"depths=\(1, -1, 1\).*below 0"),
        ({"depths": (1, 1, 1.5)}, r"depths=\(1, 1, 1.5\) must be whole numbers"),
        ({"mlp_ratio": 0}, "mlp_ratio=0 leaves an MLP without a channel"),
        ({"mlp_ratio": (1, 1, -1.0)}, "leaves an MLP without a channel"),
        ({"drop_path_rate": 1.5}, r"drop_path_rate=1\.5 must be a probability"),
        ({"drop_rate": -0.1}, r"drop_rate=-0\.1 must be a probability"),
        ({"proj_drop_rate": 2}, "proj_drop_rate=2 must be a probability"),
        ({"num_heads": 5}, r"num_heads=5 must divide.*dim=16"),
        ({"neuron": "relu"}, "neuron='relu'"),
        ({"time_steps": 0}, "time_steps=0"),
        ({"time_steps": 2.5}, r"time_steps=2\.5"),
        ({"patch_embed": "vit"}, r"patch_embed='vit'.*cifar.*events.*imagenet"),
        ({"embed_dims": (1, 2, 4)}, r"embed_dims=\(1, 2, 4\).*below 2"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("test_qkformer", **kwargs)


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match="not_an_argument"):
        timm.create_model("test_qkformer", not_an_argument=1)
