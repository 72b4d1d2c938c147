"""What rounded weights cost a model that has been trained, on real images: the demo's, on scikit-learn's digits."""

import pytest
import timm
import torch
import torch.nn.functional as F

import timm_qkformer
from timm_qkformer.training import demo

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The model, held-out images and their labels."""
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("digits")
    timm.utils.random_seed(42)
    demo._write_digits(folder, seed=42)
    model = timm.create_model(demo.MODEL, **demo.MODEL_ARGS)
    demo._train(model, folder, epochs=12)
    images, labels = (torch.cat(parts) for parts in zip(*demo._loader(folder, "test", 64), strict=True))
    return model.eval(), images, labels


@pytest.mark.parametrize(("precision", "least_similarity"), [("fp32", 0.999), ("bf16", 0.95), ("int8", 0.95)])
@torch.inference_mode()
def test_answers_as_the_plain_model(trained, precision, least_similarity, capsys):
    model, images, labels = trained
    features = model.forward_features(images)
    answers = model.forward_head(features).argmax(1)
    deployed = timm_qkformer.deploy(model, precision)
    found = deployed.forward_features(images)
    similarity = F.cosine_similarity(found.flatten(), features.flatten(), 0).item()
    same = (deployed.forward_head(found).argmax(1) == answers).float().mean().item()
    right = (answers == labels).float().mean().item()
    with capsys.disabled():
        print(
            f"\n{precision}: cosine similarity {similarity:.5f}, same top-1 {same:.2%}; plain model right {right:.2%}"
        )
    assert right > 0.95  # it has learned
    assert same >= 0.98
    assert similarity > least_similarity


@torch.inference_mode()
def test_in_float64_spike_for_spike(trained):
    model, images, _ = trained
    exact = timm.create_model(demo.MODEL, **demo.MODEL_ARGS).double().eval()
    exact.load_state_dict(model.state_dict())
    images = images.double()
    assert torch.equal(timm_qkformer.deploy(exact).forward_features(images), exact.forward_features(images))
