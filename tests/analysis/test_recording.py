"""Recording spikes leaves the model as it was and reports what the neurons fired."""

import pytest
import timm
import torch

from timm_qkformer.analysis import record_spikes
from timm_qkformer.layers import SpikingNeuron


def hooks(model):
    return sum(len(m._forward_hooks) for m in model.modules())


@pytest.fixture
def model():
    return timm.create_model("test_qkformer").eval()


def test_records_what_the_neurons_fire(model):
    x = torch.randn(2, 3, 32, 32)
    with record_spikes(model) as spikes, torch.no_grad():
        model(x)
    assert set(spikes) == {n for n, m in model.named_modules() if isinstance(m, SpikingNeuron)}
    assert next(iter(spikes)) == "stem.neuron"
    assert torch.equal(spikes["stem.neuron"], model.stem(x, 4))
    assert hooks(model) == 0


def test_records_by_suffix(model):
    with record_spikes(model, "attn_neuron") as spikes, torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    assert len(spikes) == 4
    assert all(name.endswith("attn_neuron") for name in spikes)


def test_hooks_are_gone_after_an_error(model):
    with pytest.raises(ValueError, match="channels"), record_spikes(model):
        model(torch.randn(1, 5, 32, 32))
    assert hooks(model) == 0
