"""Parity with the authors' release, in float64: logits, coupled logits and every neuron's firing rate."""

import pytest
import timm
import torch

from golden import CASES, GoldenCase
from timm_qkformer.layers import SpikingNeuron
from timm_qkformer.models.qkformer import QKFormer, checkpoint_filter_fn

TOLERANCE = {"rtol": 0.0, "atol": 1e-9}


@pytest.fixture(params=sorted(CASES))
def case(request):
    return request.param, GoldenCase(request.param)


def create(name: str, golden: GoldenCase, **kwargs) -> QKFormer:
    model_name, model_args = CASES[name]
    model = timm.create_model(model_name, **model_args, **kwargs).double().eval()
    model.load_state_dict(checkpoint_filter_fn(golden.checkpoint, model), strict=True)
    assert sum(p.numel() for p in model.parameters()) == golden.params
    return model


@torch.inference_mode()
def test_agrees_with_the_release(case):
    name, golden = case
    model = create(name, golden)

    # The batch in one call gives what each sample gives alone.
    torch.testing.assert_close(model(golden.input), golden.one_by_one, **TOLERANCE)

    rates: dict[str, float] = {}
    for path, module in model.named_modules():
        if isinstance(module, SpikingNeuron):
            module.register_forward_hook(lambda _m, _i, spikes, path=path: rates.update({path: spikes.mean().item()}))
    first = model(golden.input[:1])
    torch.testing.assert_close(first, golden.one_by_one[:1], **TOLERANCE)
    # Neurons fire in the order in which the release's do; its names differ.
    assert list(rates.values()) == pytest.approx(list(golden.firing_rates.values()), abs=1e-9)
    del model

    coupled = create(name, golden, batch_coupled=True)
    torch.testing.assert_close(coupled(golden.input), golden.batched, **TOLERANCE)
    if len(golden.input) > 1:
        assert not torch.allclose(golden.batched, golden.one_by_one, atol=1e-3)
