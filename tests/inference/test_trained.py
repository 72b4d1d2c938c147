"""Deployed, a model that was trained for 8 bits answers as before, on photographs: the shipped one for CIFAR-10."""

import copy
import tarfile

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.data import create_dataset, create_transform, resolve_model_data_config

import timm_qkformer
from golden import SHARED
from timm_qkformer.training.demo import MODEL, classify_photographs

# Least cosine similarity of the maps, least share of the same top-1. The shipped weights are rounded, but sums run in
# another order: a potential within a rounding error of its threshold may fire here and not there, and others with it.
SIMILARITY, SAME = 0.998, 0.99
PRECISIONS = ("fp32", "bf16", "int8")


@pytest.fixture(scope="module")
def trained():
    return timm.create_model(MODEL, pretrained=True).eval()


@pytest.fixture(scope="module")
def photographs(trained):
    return classify_photographs(trained)


def compare(model, precision, images):
    """Cosine similarity of the firing-rate maps, and the share of images with the same top-1."""
    features = model.forward_features(images)
    deployed = timm_qkformer.deploy(model, precision, "events")  # dense ones round currents, too, in bf16
    found = deployed.forward_features(images)
    same = deployed.forward_head(found).argmax(1) == model.forward_head(features).argmax(1)
    return F.cosine_similarity(found.flatten(), features.flatten(), 0).item(), same.float().mean().item()


def test_rounding_again_changes_nothing(trained):
    model = copy.deepcopy(trained)
    timm_qkformer.quantize_weights(model)
    for name, value in trained.state_dict().items():
        found = model.state_dict()[name]
        if value.dim() == 4:  # channels of weights so tiny that float16, which they are kept in, rounds them to 2**-24
            tiny = value.flatten(1).abs().amax(1) < torch.finfo(torch.float16).tiny
            torch.testing.assert_close(found[tiny], value[tiny], rtol=0, atol=2.0**-24, msg=name)
            found, value = found[~tiny], value[~tiny]
        assert torch.equal(found, value), name


@pytest.mark.parametrize("precision", PRECISIONS)
@torch.inference_mode()
def test_photographs_as_the_plain_model(trained, photographs, precision):
    similarity, same = compare(trained, precision, photographs.images)
    assert similarity > SIMILARITY
    assert same >= SAME - 0.025  # 40 photographs: one more may differ


@torch.inference_mode()
def test_in_float64_spike_for_spike(trained, photographs):
    exact = timm.create_model(MODEL).double().eval()
    exact.load_state_dict(trained.state_dict())
    images = photographs.images[::4].double()
    assert torch.equal(timm_qkformer.deploy(exact).forward_features(images), exact.forward_features(images))


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@torch.inference_mode()
def test_a_thousand_images_as_the_plain_model(trained, precision, tmp_path, capsys):
    archive = SHARED / "data" / "cifar10.tar.gz"
    if not archive.exists():
        pytest.skip(f"needs {archive.name} of the shared data")
    with tarfile.open(archive) as tar:
        wanted = [member for member in tar.getmembers() if "/test/" in member.name]
        tar.extractall(tmp_path, members=wanted, filter="data")
    transform = create_transform(**resolve_model_data_config(trained), is_training=False)
    dataset = create_dataset("", tmp_path / "cifar10", split="test", transform=transform)
    images = torch.stack([dataset[i][0] for i in range(0, len(dataset), 10)])
    similarity, same = compare(trained, precision, images)
    with capsys.disabled():
        print(f"\n{precision}: cosine similarity {similarity:.5f}, same top-1 {same:.2%} of {len(images)}")
    assert similarity > SIMILARITY
    assert same >= SAME
