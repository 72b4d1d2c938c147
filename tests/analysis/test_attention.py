"""What is recorded of the attention is what happened in it, where it happened, and the model does not notice."""

import numpy as np
import pytest
import torch
from planted import GREEN, RED, SIZE, planted_image, planted_model
from torch import nn

from timm_qkformer.analysis import attention_layers, record_attention, record_layer
from timm_qkformer.analysis.capture import settle_norms
from timm_qkformer.analysis.raster import neuron_layers, pick_neurons
from timm_qkformer.layers import QKTokenAttention
from tiny import images, tiny


def expected(places):
    mask = np.zeros(SIZE, bool)
    for row, column in places:
        mask[row, column] = True
    return mask


def hooks(model):
    return sum(len(m._forward_hooks) for m in model.modules())


def test_a_planted_token_mask_is_found_where_it_was_planted():
    (record,) = record_attention(planted_model(), planted_image())
    assert (record.name, record.kind, record.heads, record.time_steps) == ("stages.0.blocks.0.attn", "qkta", 2, 3)
    assert record.mask.shape == (3, 1, 2, 1, *SIZE)
    for t in range(3):
        assert np.array_equal(record.mask[t, 0, 0, 0], expected(RED))
        assert np.array_equal(record.mask[t, 0, 1, 0], expected(GREEN))
        assert np.array_equal(record.q[t, 0, 0, 1], expected(RED))
        assert record.k[t].all()
        assert np.array_equal(record.attended[t, 0, 1, 0], expected(GREEN))
    assert np.array_equal(record.token_values()[:, 0, 0], np.stack([expected(RED)] * 3))


def test_a_planted_channel_mask():
    (record,) = record_attention(planted_model("qkca"), planted_image(green=[]))
    assert record.kind == "qkca"
    assert record.mask.shape == (3, 1, 2, 2, 1, 1)
    assert np.array_equal(record.channel_values()[1, 0], [[1, 1], [0, 0]])
    assert record.attended[:, 0, 0].all()
    assert not record.attended[:, 0, 1].any()


def test_attention_received_in_self_attention():
    (record,) = record_attention(planted_model("ssa"), planted_image())
    assert record.mask is None
    # Every key is (1, 1) in both heads; 3 of 96 queries are (1, 1) in head 1, 1 of 96 in head 2; the scale is 1/8.
    assert np.allclose(record.token_values()[0, 0, 0], 3 * 2 / 96 / 8)
    assert np.allclose(record.token_values()[0, 0, 1], 1 * 2 / 96 / 8)


def test_self_attention_against_the_whole_matrix():
    model = tiny("test_qkformer", attn="ssa")
    record = record_attention(model, images(2))[0]
    q, k = (x.reshape(*x.shape[:4], -1).astype(float) for x in (record.q, record.k))
    weights = 0.125 * np.swapaxes(q, -1, -2) @ k  # [T, B, heads, queries, keys]
    received = weights.mean(3).reshape(record.token_values().shape)
    assert received.max() > 0
    assert np.allclose(record.token_values(), received, atol=1e-6)


@pytest.mark.parametrize("name", ["test_qkformer", "test_qkformer_ms"])
def test_masks_and_keys_give_what_the_projection_takes(name):
    model = tiny(name, attn=("qkta", "qkca", "qkta"))
    taken = {}
    for layer, module in model.named_modules():
        if isinstance(module, QKTokenAttention):
            module.proj.register_forward_pre_hook(lambda _m, x, layer=layer: taken.__setitem__(layer, x[0].numpy()))
    records = record_attention(model, images(2))
    assert [r.kind for r in records] == ["qkta", "qkca", "qkta", "qkta"]
    for record in records:
        attended = record.attended
        assert np.array_equal(attended, record.mask & record.k)
        assert np.array_equal(attended.reshape(taken[record.name].shape), taken[record.name].astype(bool))
        assert attended.any()
        assert not attended.all()


def test_clips_bring_their_own_time_steps():
    model = tiny("test_qkformer", in_chans=2)
    record = record_attention(model, torch.rand(2, 6, 2, 32, 48, dtype=torch.float64), ["stages.0.blocks.0.attn"])[0]
    assert record.mask.shape == (6, 2, 4, 1, 8, 12)


def test_samples_do_not_depend_on_their_batch_mates():
    model, x = tiny("test_qkformer"), images(3)
    together = record_attention(model, x)
    alone = record_attention(model, x[1:2])
    for a, b in zip(together, alone, strict=True):
        assert np.array_equal(a.attended[:, 1:2], b.attended)


def test_the_model_comes_out_as_it_went_in():
    model, x = tiny("test_qkformer").train(), images()
    model.stages[1].eval()
    modes = {name: m.training for name, m in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.stem.register_forward_hook(lambda *_: None)
    record_attention(model, x)
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert hooks(model) == 1
    with pytest.raises(ValueError, match="5 channels"):
        record_attention(model, images(chans=5))
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert hooks(model) == 1


def test_wrapped_and_compiled_models_are_looked_at_below_the_wrapper():
    model, x = tiny("test_qkformer"), images(1)
    plain = record_attention(model, x)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(x)  # compiled before there are hooks
    for wrapped in (compiled, nn.DataParallel(model)):
        for a, b in zip(plain, record_attention(wrapped, x), strict=True):
            assert a.name == b.name
            assert np.array_equal(a.attended, b.attended)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(0, 3, 32, 32), "empty batch"),
        (torch.zeros(3, 32, 32), "neither images"),
        (torch.full((1, 3, 32, 32), torch.nan), "NaN"),
    ],
)
def test_input_that_cannot_be_drawn(x, message):
    with pytest.raises(ValueError, match=message):
        record_attention(tiny("test_qkformer"), x)


def test_models_and_layers_without_attention():
    with pytest.raises(ValueError, match="no neurons of this package"):
        record_attention(nn.Conv2d(3, 3, 1), images())
    model = tiny("test_maxformer", mixer="dwc3")
    with pytest.raises(ValueError, match="no Q-K or spiking self-attention"):
        record_attention(model, images())
    with pytest.raises(ValueError, match=r"'stem' is no attention layer; there are stages\.0\.blocks\.0\.attn"):
        record_attention(tiny("test_qkformer"), images(), ["stem"])
    assert attention_layers(tiny("test_qkformer")) == {
        "stages.0.blocks.0.attn": "qkta",
        "stages.1.blocks.0.attn": "qkca",
        "stages.2.blocks.0.attn": "ssa",
        "stages.2.blocks.1.attn": "ssa",
    }


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


def test_settled_norms_wake_an_untrained_model_and_are_put_back():
    import timm

    model, x = timm.create_model("test_qkformer", num_classes=7), images().float()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = record_attention(model, x)[0].q.mean()
    with settle_norms(model, [x[:1], x[1:]]):
        within = record_attention(model, x)[0].q.mean()
    assert within > 10 * before
    assert within > 0.01
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(m.momentum == 0.1 for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    with pytest.raises(KeyError), settle_norms(model, [x]):
        raise KeyError
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
