"""Parity of MS-QKFormer and Max-Former with their authors' release, in float64: logits and every neuron's firing rate,
with the release's names, with older ones, and with names that belong to other tensors.
"""

import sys

import pytest
import timm
import torch

from golden import MEMBRANE_CASES, GoldenCase
from timm_qkformer.layers import SpikingNeuron

TOLERANCE = {"rtol": 0.0, "atol": 1e-9}


@pytest.fixture(params=sorted(MEMBRANE_CASES), scope="module")
def case(request):
    return MEMBRANE_CASES[request.param], GoldenCase(request.param)


def load(model_name, checkpoint):
    model = timm.create_model(model_name).double().eval()
    model.load_state_dict(sys.modules[type(model).__module__].checkpoint_filter_fn(checkpoint, model), strict=True)
    return model


@torch.inference_mode()
def test_agrees_with_the_release(case):
    model_name, golden = case
    model = load(model_name, golden.checkpoint)
    assert sum(p.numel() for p in model.parameters()) == golden.params
    assert model.time_steps == golden.time_steps

    # The batch in one call gives what each sample gives alone, here and there.
    torch.testing.assert_close(golden.batched, golden.one_by_one, **TOLERANCE)
    logits = model(golden.input)
    torch.testing.assert_close(logits, golden.batched, **TOLERANCE)
    torch.testing.assert_close(model.forward_head(model.forward_features(golden.input)), logits, rtol=0.0, atol=0.0)

    rates: dict[str, float] = {}
    for path, module in model.named_modules():
        if isinstance(module, SpikingNeuron):
            module.register_forward_hook(lambda _m, _i, spikes, path=path: rates.update({path: spikes.mean().item()}))
    for i in reversed(range(len(golden.input))):
        rates.clear()
        torch.testing.assert_close(model(golden.input[i : i + 1]), golden.one_by_one[i : i + 1], **TOLERANCE)
    # The first sample's neurons fire in the order in which the release's do; its names differ.
    assert list(rates.values()) == pytest.approx(list(golden.firing_rates.values()), abs=1e-9)


def other_names(checkpoint, how):
    names = list(checkpoint)
    if how == "older":  # what changed between the release's versions is not known: any spelling must do
        names = [name.replace("stage", "block_").replace("embed", "patch").replace("_bn", ".norm") for name in names]
    else:
        names = [names[i] for i in torch.randperm(len(names)).tolist()]
    assert names != list(checkpoint)
    return dict(zip(names, checkpoint.values(), strict=True))


@pytest.mark.parametrize("how", ["older", "shuffled"])
def test_loads_by_position_whatever_the_names(case, how):
    model_name, golden = case
    by_name = load(model_name, golden.checkpoint).state_dict()
    by_position = load(model_name, other_names(golden.checkpoint, how)).state_dict()
    for name, tensor in by_name.items():
        assert torch.equal(tensor, by_position[name]), name


def test_loads_by_name_whatever_the_order(case):
    model_name, golden = case
    by_name = load(model_name, golden.checkpoint).state_dict()
    for name, tensor in load(model_name, dict(sorted(golden.checkpoint.items()))).state_dict().items():
        assert torch.equal(tensor, by_name[name]), name
