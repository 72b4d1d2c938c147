"""Parity with the authors' releases, in float64: logits, coupled logits, every neuron's firing rate, and deployed."""

import pytest
import torch

from golden import ALL_CASES, CASES, FLAT_CASES, MEMBRANE_CASES, GoldenCase, create
from timm_qkformer import deploy
from timm_qkformer.analysis import firing_rates

TOLERANCE = {"rtol": 0.0, "atol": 1e-9}


# One of each kind by default; the rest takes minutes.
QUICK = {
    "spikformer_imagenet_8_384_t4_64px_batch3",
    "cml_spikformer_cifar10_4_384_t4",
    "spikingformer_cifar10_4_384_t4_batch3",
    "cml_spikingformer_cifar10dvs_2_256_t10",
    "sdt_cifar100_2_256_t4",
}
# Of the hierarchical models, those whose smaller siblings are tried by default.
LARGE = {"imagenet_10_384_t4", "cifar10_4_384_t4_batch3"}


def _cases():
    for name in ALL_CASES:
        yield pytest.param(name, marks=[pytest.mark.slow] if name in (FLAT_CASES.keys() | LARGE) - QUICK else [])


@pytest.mark.parametrize("name", list(_cases()))
@torch.inference_mode()
def test_agrees_with_the_release(name):
    golden = GoldenCase(name)
    model = create(name, golden.checkpoint)
    assert sum(p.numel() for p in model.parameters()) == golden.params

    # The batch in one call gives what each sample gives alone.
    logits = model(golden.input)
    torch.testing.assert_close(logits, golden.one_by_one, **TOLERANCE)
    torch.testing.assert_close(model.forward_head(model.forward_features(golden.input)), logits, rtol=0.0, atol=0.0)
    torch.testing.assert_close(deploy(model)(golden.input), golden.one_by_one, **TOLERANCE)

    torch.testing.assert_close(model(golden.input[:1]), golden.one_by_one[:1], **TOLERANCE)
    # Neurons fire in the order in which the release's do; its names differ.
    layers = firing_rates(model, golden.input[:1]).layers
    means = [layer.mean for layer in layers if layer.is_neuron]
    assert means == pytest.approx(list(golden.firing_rates.values()), abs=1e-9)
    assert all(layer.std == 0.0 for layer in layers)

    if name in CASES:
        model = create(name, golden.checkpoint, batch_coupled=True)
        torch.testing.assert_close(model(golden.input), golden.batched, **TOLERANCE)
        torch.testing.assert_close(deploy(model)(golden.input), golden.batched, **TOLERANCE)
        if len(golden.input) > 1:
            assert not torch.allclose(golden.batched, golden.one_by_one, atol=1e-3)
    else:  # nothing there couples the samples of a batch
        torch.testing.assert_close(golden.batched, golden.one_by_one, **TOLERANCE)
        assert golden.input.dim() == 5 or model.time_steps == golden.time_steps


@torch.inference_mode()
def test_pooling_in_attention_agrees_with_the_release():
    """One sample, one call: all of this case is in the slow tests."""
    golden = GoldenCase("sdt_cifar10dvs_2_256_t10")
    logits = create("sdt_cifar10dvs_2_256_t10", golden.checkpoint)(golden.input[:1])
    torch.testing.assert_close(logits, golden.one_by_one[:1], **TOLERANCE)


@pytest.mark.parametrize("how", ["older", "shuffled", "sorted"])
@pytest.mark.parametrize("name", MEMBRANE_CASES)
def test_loads_by_position_whatever_the_names_and_by_name_whatever_the_order(name, how):
    checkpoint = GoldenCase(name).checkpoint
    names = list(checkpoint)
    if how == "older":  # what changed between the release's versions is not known: any spelling must do
        names = [name.replace("stage", "block_").replace("embed", "patch").replace("_bn", ".norm") for name in names]
    elif how == "shuffled":
        names = [names[i] for i in torch.randperm(len(names)).tolist()]
    other = dict(zip(names, checkpoint.values(), strict=True))
    if how == "sorted":
        other = dict(sorted(checkpoint.items()))
    assert list(other) != list(checkpoint)
    loaded = create(name, other).state_dict()
    for key, tensor in create(name, checkpoint).state_dict().items():
        assert torch.equal(tensor, loaded[key]), key
