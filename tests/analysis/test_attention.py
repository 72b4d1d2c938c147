"""What is recorded of the attention is what happened in it, and the model does not notice.

An operator from outside of the package is named, counted, recorded and drawn by what it declares.
"""

import numpy as np
import pytest
import torch
from planted import GREEN, RED, SIZE, planted_image, planted_model
from torch import nn

from timm_qkformer.analysis import attention_complexity, attention_layers, energy, firing_rates, record_attention
from timm_qkformer.analysis.attention import select_layers
from timm_qkformer.operators import Operation, Operator, base, register_operator
from tiny import images, tiny


def expected(places):
    mask = np.zeros(SIZE, bool)
    for row, column in places:
        mask[row, column] = True
    return mask


def test_a_planted_token_mask_is_found_where_it_was_planted():
    (record,) = record_attention(planted_model(), planted_image())
    assert (record.name, record.operator, record.heads, record.time_steps) == ("stages.0.blocks.0.attn", "qkta", 2, 3)
    name, mask = record.mask
    assert name == "A_t"
    assert mask.shape == (3, 1, 2, 1, *SIZE)
    for t in range(3):
        assert np.array_equal(mask[t, 0, 0, 0], expected(RED))
        assert np.array_equal(mask[t, 0, 1, 0], expected(GREEN))
        assert np.array_equal(record.inputs["q"][t, 0, 0, 1], expected(RED))
        assert record.inputs["k"][t].all()
        assert np.array_equal(record.result[t, 0, 1, 0], expected(GREEN))
    assert np.array_equal(record.views.tokens[:, 0, 0], np.stack([expected(RED)] * 3))
    assert repr(record) == "AttentionRecord(stages.0.blocks.0.attn: qkta with q, k, A_t, [3, 1, 2, 2, 8, 12])"


def test_a_planted_channel_mask():
    (record,) = record_attention(planted_model("qkca"), planted_image(green=[]))
    assert record.operator == "qkca"
    assert record.inner["A_c"].shape == (3, 1, 2, 2, 1, 1)
    assert np.array_equal(record.views.channels[1, 0], [[1, 1], [0, 0]])
    assert record.result[:, 0, 0].all()
    assert not record.result[:, 0, 1].any()


def test_attention_received_in_self_attention():
    (record,) = record_attention(planted_model("ssa"), planted_image())
    assert record.mask is None
    # Every key is (1, 1) in both heads; 3 of 96 queries are (1, 1) in head 1, 1 of 96 in head 2; the scale is 1/8.
    assert np.allclose(record.views.tokens[0, 0, 0], 3 * 2 / 96 / 8)
    assert np.allclose(record.views.tokens[0, 0, 1], 1 * 2 / 96 / 8)


def test_self_attention_against_the_whole_matrix():
    model = tiny("test_qkformer", attn="ssa")
    record = record_attention(model, images(2))[0]
    q, k = (x.reshape(*x.shape[:4], -1).astype(float) for x in (record.inputs["q"], record.inputs["k"]))
    weights = 0.125 * np.swapaxes(q, -1, -2) @ k  # [T, B, heads, queries, keys]
    received = weights.mean(3).reshape(record.views.tokens.shape)
    assert received.max() > 0
    assert np.allclose(record.views.tokens, received, atol=1e-6)


@pytest.mark.parametrize("name", ["test_qkformer", "test_qkformer_ms"])
def test_masks_and_keys_give_what_the_projection_takes(name):
    model, x = tiny(name, attn=("qkta", "qkca", "qkta")), images(2)
    rates, records = firing_rates(model, x), record_attention(model, x)
    assert [r.operator for r in records] == ["qkta", "qkca", "qkta", "qkta"]
    for record in records:
        assert np.array_equal(record.result, record.mask[1] & record.inputs["k"])
        assert 0.0 < record.result.mean() < record.inputs["k"].mean()
        assert rates[f"{record.name}.proj"].mean == pytest.approx(record.result.mean())


def test_clips_bring_their_own_time_steps():
    model = tiny("test_qkformer", in_chans=2)
    record = record_attention(model, torch.rand(2, 6, 2, 32, 48, dtype=torch.float64), ["stages.0.blocks.0.attn"])[0]
    assert record.inner["A_t"].shape == (6, 2, 4, 1, 8, 12)


def test_models_and_layers_without_attention():
    with pytest.raises(ValueError, match="no neurons of this package"):
        record_attention(nn.Conv2d(3, 3, 1), images())
    model = tiny("test_maxformer", mixer="dwc3")
    with pytest.raises(ValueError, match="MaxFormer has no attention to look into"):
        record_attention(model, images())
    with pytest.raises(ValueError, match=r"'stem' is no attention layer; there are stages\.0\.blocks\.0\.attn"):
        record_attention(tiny("test_qkformer"), images(), ["stem"])
    assert attention_layers(tiny("test_qkformer")) == {
        "stages.0.blocks.0.attn": "qkta",
        "stages.1.blocks.0.attn": "qkca",
        "stages.2.blocks.0.attn": "ssa",
        "stages.2.blocks.1.attn": "ssa",
    }


def test_layers_by_stage_and_block():
    model = tiny("test_qkformer")
    assert list(select_layers(model)) == ["stages.0.blocks.0.attn", "stages.1.blocks.0.attn"]
    assert list(select_layers(model, stage=3)) == ["stages.2.blocks.0.attn", "stages.2.blocks.1.attn"]
    assert list(select_layers(model, block=2)) == ["stages.2.blocks.1.attn"]
    with pytest.raises(ValueError, match=r"stage=1 and block=2 \(counted from 1\) has no attention layer"):
        select_layers(model, stage=1, block=2)
    only_ssa = tiny("test_maxformer")
    assert list(select_layers(only_ssa)) == list(attention_layers(only_ssa))


class Both(Operator):
    """X' = A * B: a spike where both inputs have one. No neurons of its own."""

    inputs = ("a", "b")
    attended_name = "AB"

    def attend(self, a, b):
        return a * b

    def attended_range(self, a, b):
        return a.times(b)

    def operations(self, a, b):
        return [Operation("A and B", a, 1, float((a * b).sum()))]


@pytest.fixture(autouse=True, scope="module")
def _registered():
    register_operator("both")(Both)
    yield
    base._OPERATORS.pop("both")  # other tests run over all that are registered


@pytest.fixture
def model():
    return tiny("test_qkformer", attn="both", depths=(1, 0, 0))


def test_names_and_rates(model):
    rates, (record,) = firing_rates(model, images(2)), record_attention(model, images(2) * 0)
    path = "stages.0.blocks.0.attn"
    assert [layer.name for layer in rates.layers if layer.path.startswith(path)] == ["A", "B", "AB", "AB'"]
    assert not rates[f"{path}.proj"].is_neuron
    assert (record.operator, list(record.inputs), record.mask) == ("both", ["a", "b"], None)
    assert record.result.dtype == bool


def test_blocks_of_several_mixers():
    x = images(1)
    model = tiny("test_qkformer", attn="both+dwc3", depths=(1, 0, 0))
    names = {layer.path: layer.name for layer in firing_rates(model, x).layers}
    assert names["stages.0.blocks.0.attn.proj"] == "AB"
    assert names["stages.0.blocks.0.more.0.mixer.dw.neuron"] == "DWC"
    assert [record.name for record in record_attention(model, x)] == ["stages.0.blocks.0.attn"]
    assert energy(model, x)["stages.0.blocks.0.more.0.mixer.dw.conv", "convolution"].sops > 0


def test_complexity():
    (found,) = (item for item in attention_complexity((8, 16), (8, 16)) if item.kind == "BOTH")
    assert all(count.operations == count.tokens * count.dim for count in found.counts)


def test_default_views_are_drawn_without_a_mask(model):
    pytest.importorskip("matplotlib")
    from timm_qkformer.analysis.drawing import draw_attention
    from timm_qkformer.analysis.inputs import input_pictures

    x = images(1)
    (record,) = record_attention(model, x)
    assert np.allclose(record.views.tokens, record.result.mean(3))
    assert list(draw_attention([record], input_pictures(x))) == [record.name]


def test_a_mixer_that_is_no_operator_is_refused(model):
    model.stages[0].blocks[0].attn = nn.Sequential(nn.Identity())
    with pytest.raises(ValueError, match=r"stages\.0\.blocks\.0 has a Sequential, no Operator"):
        energy(model, images(1))
