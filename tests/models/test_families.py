"""What single families have: the equations of membrane shortcuts, firing-rate maps, embeddings, our small model."""

import pytest
import timm
import torch

from timm_qkformer.neurons import IF, LIF
from tiny import NAMES, images, tiny


@pytest.fixture(params=["test_qkformer_ms", "test_maxformer"])
def name(request):
    return request.param


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
        q, k = (layer.split(lif(unit.currents(s)), layer.num_heads) for unit in (layer.q, layer.k))
        if hasattr(layer, "v"):
            v = layer.split(lif(layer.v.currents(s)), layer.num_heads)
            y = half(torch.einsum("tbhdn,tbhem,tbhdm->tbhen", q, v, k) * 0.125)
        else:
            y = half(q.sum(4 if layer.operator_name == "qkca" else 3, keepdim=True)) * k
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


@pytest.mark.parametrize("family", NAMES)
def test_no_sample_at_all(family):
    model = tiny(family)
    channels, size, _ = model.default_cfg["input_size"]
    assert model(images(0, channels, (size, size))).shape == (0, 7)


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


@torch.inference_mode()
def test_half_precision(name):
    model = tiny(name).bfloat16()
    features = model.forward_features(images(2).bfloat16())
    assert features.dtype == torch.bfloat16
    # The head's firing rates survive the rounding of the map: they are multiples of 1 / T.
    rates = features.double().mean((2, 3)) * model.time_steps
    assert (rates - rates.round()).abs().max() < 0.1
    assert 0 < rates.mean() < model.time_steps


@torch.inference_mode()
def test_features_are_firing_rates():
    model, x = tiny("test_qkformer"), images(2)
    features = model.forward_features(x)
    steps = model.stages(model.stem(x, 4))  # [T, B, C, H, W], integer spike sums
    assert torch.equal(steps, steps.round())
    torch.testing.assert_close(features, steps.mean(0))
    torch.testing.assert_close(model.forward_head(features), model(x))
    per_step = torch.stack([model.head(step.mean((2, 3))) for step in steps])  # the paper's head
    torch.testing.assert_close(per_step.mean(0), model(x))


def test_the_model_for_one_cpu_fires_early_unless_asked_not_to():
    def thresholds(**kwargs):
        model = timm.create_model("qkformer_hst3_192", device="meta", **kwargs)
        neurons = {name: m for name, m in model.named_modules() if isinstance(m, LIF | IF)}
        return {m.v_threshold for name, m in neurons.items() if not name.endswith("attn_neuron")}

    assert thresholds() == thresholds(neuron="if") == {0.5}
    assert thresholds(neuron_args={}) == {1.0}


def test_attention_of_integer_neurons_has_thresholds_within_their_sums():
    def thresholds(**kwargs):
        model = timm.create_model("qkformer_hst2_224", device="meta", **kwargs)
        return [m.v_threshold for name, m in model.named_modules() if name.endswith("attn_neuron")]

    assert thresholds() == thresholds(neuron="ilif") == [20.0, 128.0]
    assert thresholds(neuron="lif") == [0.5, 0.5]
    assert thresholds(operator_args={"ssa": {"scale": 0.25}}) == [0.5, 0.5]


def test_the_stem_for_few_spikes_is_as_wide_as_the_first_stage():
    model = timm.create_model("qkformer_hst2_224", num_classes=10, device="meta")
    assert model.stem.conv.out_channels == 96
    assert sum(p.numel() for p in model.parameters()) == 1_881_066


@torch.inference_mode()
def test_small_images_keep_16_x_16_tokens_in_the_first_stage():
    model = timm.create_model("qkformer_hst3_192", num_classes=10).eval()
    assert sum(p.numel() for p in model.parameters()) == 1_238_050
    assert [info["reduction"] for info in model.feature_info] == [2, 4, 8]
    maps = model.forward_intermediates(torch.randn(1, 3, 32, 32), intermediates_only=True)
    assert [tuple(x.shape[1:]) for x in maps] == [(48, 16, 16), (96, 8, 8), (192, 4, 4)]


@torch.inference_mode()
def test_blocks_have_their_own_mixers_heads_and_ratios():
    attn = ("qkta+dwc3", "qkca", ["ssa", "qkta+ssa"])
    model = tiny("test_qkformer", attn=attn, num_heads=(2, [8], [4, 2]), mlp_ratio=(1.0, 2, [3.0, 1.5]))
    blocks = [block for stage in model.stages for block in stage.blocks]
    mixers = [[block.attn, *(branch.mixer for branch in block.more)] for block in blocks]
    assert [[m.operator_name for m in of_block] for of_block in mixers] == [
        ["qkta", "dwc3"], ["qkca"], ["ssa"], ["qkta", "ssa"]
    ]  # fmt: skip
    assert [of_block[0].num_heads for of_block in mixers] == [2, 8, 4, 2]
    assert [block.mlp.fc1.conv.out_channels for block in blocks] == [16, 64, 192, 96]
    assert not torch.equal(*model(images(2)))
