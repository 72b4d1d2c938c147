"""Deployed models, steps, batches and files."""

import io

import pytest
import torch
from on_device import cosine

import timm_qkformer
import tiny

CLOSE = {"rtol": 0.0, "atol": 1e-9}


@pytest.mark.parametrize("name", tiny.NAMES)
@torch.inference_mode()
def test_deployed_is_the_plain_model_in_float64(name, device):
    model = tiny.tiny(name).to(device)
    x = tiny.images(2, model.in_chans).to(device)
    torch.testing.assert_close(timm_qkformer.deploy(model)(x), model(x), **CLOSE)


@pytest.mark.filterwarnings("ignore:precision=")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@torch.inference_mode()
def test_deployed_in_each_precision(precision, device):
    model = tiny.tiny("test_qkformer").float().to(device)
    x = tiny.images(4).float().to(device)
    deployed = timm_qkformer.deploy(model, precision)
    maps, wanted = deployed.forward_features(x), model.forward_features(x)
    assert maps.device.type == device.type
    assert cosine(maps, wanted) > {"fp32": 0.99, "bf16": 0.9, "int8": 0.9}[precision]
    # Deployed there or moved there: the same weights, the same answers.
    moved = timm_qkformer.deploy(model.cpu(), precision, products="dense").to(device)
    dense = timm_qkformer.deploy(model.to(device), precision, products="dense")
    assert torch.equal(moved(x), dense(x))


@pytest.mark.parametrize("make", [lambda model: model, timm_qkformer.deploy], ids=["plain", "deployed"])
@torch.inference_mode()
def test_steps_equal_one_call(make, device):
    model = make(tiny.tiny("test_qkformer", time_steps=3).to(device))
    clip = torch.randn(2, 3, 3, 32, 32, dtype=torch.float64, device=device)
    state = None
    for frame in clip.unbind(1):
        logits, state = model.step(frame, state)
    torch.testing.assert_close(logits, model(clip), **CLOSE)


@pytest.mark.parametrize("make", [lambda model: model, timm_qkformer.deploy], ids=["plain", "deployed"])
@torch.inference_mode()
def test_a_sample_is_answered_alike_in_any_batch(make, device):
    model = make(tiny.tiny("test_qkformer").to(device))
    x = tiny.images(5).to(device)
    whole = model(x)
    torch.testing.assert_close(torch.cat([model(part) for part in x.split(2)]), whole, **CLOSE)
    torch.testing.assert_close(model(x.flip(0)).flip(0), whole, **CLOSE)


@pytest.mark.parametrize("precision", [None, "fp32", "bf16", "int8"])
@pytest.mark.filterwarnings("ignore:precision=")
@torch.inference_mode()
def test_saved_there_and_loaded_here(precision, device):
    def make():
        model = tiny.tiny("test_qkformer").float()
        return model if precision is None else timm_qkformer.deploy(model, precision, products="dense")

    x = tiny.images(2).float()
    model = make().to(device)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    on_cpu = make()
    on_cpu.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    assert all(
        torch.equal(a.cpu(), b) for a, b in zip(model.state_dict().values(), on_cpu.state_dict().values(), strict=True)
    )
    back = make().to(device)
    back.load_state_dict(on_cpu.state_dict())
    assert torch.equal(back(x.to(device)), model(x.to(device)))


@torch.inference_mode()
def test_images_on_another_device_are_refused(cuda):
    model = tiny.tiny("test_qkformer").to(cuda)
    for network in (model, timm_qkformer.deploy(model)):
        with pytest.raises(RuntimeError, match=r"(?i)device|cuda"):
            network(tiny.images(1))
