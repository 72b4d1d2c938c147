"""Models whose own weights are those that 8-bit inference has."""

import copy
import re

import pytest
import torch
from torch import nn

import timm_qkformer
from timm_qkformer import round_weights
from timm_qkformer.inference.projection import Projection
from timm_qkformer.inference.weights import Folded, fold, to_bfloat16
from timm_qkformer.layers import ConvNorm
from tiny import images, rounds_currents, tiny

MODELS = {
    "cifar": ("qkformer_hst4_384", {"embed_dims": (16, 32, 64), "depths": (1, 1, 1), "num_heads": 4}),
    "membrane": ("qkformer_hst10_384_ms", {"embed_dims": (16, 32, 64), "depths": (1, 1, 1), "num_heads": 4}),
    "maxformer": ("maxformer_10_384", {"embed_dims": (24, 48, 96), "depths": (1, 1, 1)}),
}


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def model(request):
    name, kwargs = request.param
    return tiny(name, **kwargs)


def units(model):
    return [unit for unit in model.stages.modules() if isinstance(unit, ConvNorm)]


def in_order(weights):
    """All values of all layers: of deployed models, some layers are joined."""
    return torch.cat([weight.flatten() for weight in weights]).sort().values


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_deploying_leaves_rounded_weights_as_they_are(model, precision):
    def error():
        deployed = timm_qkformer.deploy(model, precision)
        projections = [p for p in deployed.stages.modules() if isinstance(p, Projection)]
        ours = in_order(p.weight.double() * p.scale.double().view(-1, 1, 1, 1) for p in projections)
        theirs = in_order(fold(unit, "unit").weight for unit in units(model))
        return (ours - theirs).abs().max() / theirs.abs().max()

    assert error() > 1e-4
    round_weights(model)
    assert error() < 1e-6


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("products", ["events", "dense"])
@pytest.mark.parametrize("rounded", [True, False])
def test_a_rounded_model_answers_as_it_is_deployed(rounded, products, precision):
    torch.manual_seed(0)
    name, kwargs = MODELS["cifar"]
    model = tiny(name, **kwargs).float()
    if rounded:
        round_weights(model)
    x = images(8).float()
    deployed = timm_qkformer.deploy(model, precision, products)
    same = torch.equal(deployed.forward_features(x), model.forward_features(x))
    assert same == (rounded and not rounds_currents(precision, products))


def test_the_first_convolution_and_batch_norms_stay(model):
    before = copy.deepcopy(model.state_dict())
    round_weights(model)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    names = {name for name, unit in model.named_modules() if isinstance(unit, ConvNorm) and name != "stem"}
    assert changed == {f"{name}.conv.weight" for name in names}


def test_half_precision_holds_rounded_weights_and_they_round_to_themselves(model):
    round_weights(model)
    for unit in units(model):
        assert torch.equal(unit.conv.weight.half().double(), unit.conv.weight)
    once = copy.deepcopy(model.state_dict())
    round_weights(model)
    assert all(torch.equal(tensor, once[name]) for name, tensor in model.state_dict().items())


def test_weights_move_by_half_a_step_and_the_largest_by_a_sixteenth(model):
    unit = units(model)[0]
    with torch.no_grad():
        unit.conv.weight[0] = 0.0
    before = unit.conv.weight.detach().flatten(1).clone()
    round_weights(model)
    after = unit.conv.weight.detach().flatten(1)
    largest = before.abs().amax(1, keepdim=True)
    assert ((after - before).abs() <= largest / 16).all()
    inner = before.abs() < largest * 0.92
    assert ((after - before).abs()[inner] <= (largest / 127 * 0.54).expand_as(before)[inner]).all()
    assert not after[0].any()
    steps = after[1:] / after[1:].abs().amax(1, keepdim=True) * 127
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-9)


def test_bfloat16_takes_steps_only_where_all_weights_are_some():
    steps = torch.randint(-127, 128, (2, 5, 1, 1), dtype=torch.float64)
    steps[:, 0] = 127
    weight = steps * 0.0123
    weight[1, 1] += 0.004
    rounded, scale = to_bfloat16(weight)
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded[0].double(), steps[0])
    assert scale.tolist() == pytest.approx([0.0123, 1.0])
    assert torch.equal(rounded[1], weight[1].to(torch.bfloat16))


@pytest.mark.parametrize("groups", [1, 4])
def test_bfloat16_products_of_steps(groups):
    steps = torch.randint(-127, 128, (8, 8 // groups, 3, 3), dtype=torch.float64)
    steps[:, 0, 0, 0] = 127
    folded = Folded(steps * 0.0123, torch.randn(8, dtype=torch.float64))
    x = torch.randint(0, 4, (2, 6, 5, 8)).double()
    exact = Projection([folded], 1, groups, torch.float64)(x)
    found = Projection([folded], 1, groups, torch.bfloat16)(x.float())
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


def test_other_models_are_refused():
    with pytest.raises(TypeError, match="model is a Linear, expected a QKFormer or MaxFormer"):
        round_weights(nn.Linear(3, 3))


def test_weights_that_are_not_finite_are_refused_before_any_is_rounded(model):
    name = next(name for name, unit in model.named_modules() if unit is units(model)[-1])
    with torch.no_grad():
        model.get_submodule(name).conv.weight[0] = float("nan")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=rf"{re.escape(name)}\.conv\.weight has values that are not finite"):
        round_weights(model)
    after = model.state_dict()
    assert all(torch.equal(after[name].nan_to_num(), tensor.nan_to_num()) for name, tensor in before.items())
