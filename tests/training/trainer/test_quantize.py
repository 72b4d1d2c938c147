"""Training with quantized weights."""

import copy

import pytest
import torch
from timm.optim import create_optimizer_v2
from tiny_runs import PLAIN, RECIPE, run, weights

from timm_qkformer import quantize_weights
from timm_qkformer.training.trainer.evaluate import resolve_validate, validate
from timm_qkformer.training.trainer.quantize import quantized_weights
from tiny import images, tiny

ARGS = {"embed_dims": (8, 16, 32), "depths": (1, 1, 1), "num_heads": 4, "time_steps": 2}


@pytest.fixture
def model():
    return tiny("qkformer_hst4_384", patch_embed="imagenet", **ARGS)


def values(model):
    return [weight.detach().clone() for weight in model.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def gradients(model, x):
    model.zero_grad()
    model(x).square().sum().backward()
    return [weight.grad.clone() for weight in model.parameters()]


def test_weights_come_back_also_after_an_error(model):
    before = values(model)
    rounded = copy.deepcopy(model)
    quantize_weights(rounded)
    with quantized_weights(model):
        assert same(values(model), values(rounded))
    assert same(values(model), before)
    with pytest.raises(KeyError), quantized_weights(model):
        raise KeyError
    assert same(values(model), before)


@pytest.mark.parametrize("opt", ["momentum", "lookahead_momentum"])
def test_gradients_at_quantized_weights_move_the_weights_themselves(opt, model):
    x = images(2)
    optimizer = create_optimizer_v2(model, opt=opt, lr=0.1, weight_decay=0.0, momentum=0.0)
    before = values(model)
    rounded = copy.deepcopy(model)
    quantize_weights(rounded)
    expected = [w - 0.1 * g for w, g in zip(before, gradients(rounded, x), strict=True)]
    assert not same(gradients(model, x), gradients(rounded, x))
    with quantized_weights(model, optimizer):
        gradients(model, x)
        optimizer.step()
    for found, wanted in zip(values(model), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    optimizer.step()  # no longer watched
    assert not same(values(model), expected)


def test_validation_is_that_of_the_quantized_weights(data, tmp_path):
    result = run(data, tmp_path, "run", **PLAIN, quantize_weights=True, lr=0.1, model_ema=True, model_ema_decay=0.5)
    state = weights(result.folder, "state_dict_ema")
    model = tiny("qkformer_hst4_384", num_classes=3, patch_embed="imagenet", **ARGS).float()
    model.load_state_dict(state)
    quantize_weights(model)
    assert any(not torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    torch.save(model.state_dict(), tmp_path / "rounded.pth")
    given = {name: RECIPE[name] for name in ("model", "model_kwargs", "num_classes", "device", "workers", "crop_pct")}
    given |= {"data_dir": str(data), "val_split": "test", "checkpoint": str(tmp_path / "rounded.pth")}
    found = validate(resolve_validate(given), show=False)
    assert found["loss"] == pytest.approx(result.history[-1]["eval_loss"], rel=1e-5)
    # The run's own checkpoint has the weights before rounding, and says that they are to be rounded. Older ones say so
    # in another word.
    last = result.folder / "last.pth.tar"
    content = torch.load(last, weights_only=True)
    content["args"]["round_weights"] = content["args"].pop("quantize_weights")
    torch.save(content, tmp_path / "older.pth.tar")
    for path in (last, tmp_path / "older.pth.tar"):
        own = {**given, "checkpoint": str(path)}
        assert validate(resolve_validate(own), show=False)["loss"] == pytest.approx(found["loss"], rel=1e-5)
        unrounded = validate(resolve_validate({**own, "quantize_weights": False}), show=False)
        assert unrounded["loss"] != pytest.approx(found["loss"], rel=1e-4)


def test_other_models_are_refused(data, tmp_path):
    message = "quantize_weights=True: model test_resnet is a ResNet, expected a QKFormer or MaxFormer"
    with pytest.raises(ValueError, match=message):
        run(data, tmp_path, "run", **PLAIN, quantize_weights=True, model="test_resnet", model_kwargs={})
