"""The weights that come with the package: small, listed, loaded without a network, as accurate as their cards say."""

import csv
import re
import socket
import tarfile
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import timm_qkformer
from golden import SHARED
from timm_qkformer.cli import main
from timm_qkformer.hub.loading import shipped_models

WEIGHTS = Path(timm_qkformer.__file__).parent / "models" / "weights"
SHIPPED = {
    "qkformer_hst2_224.cifar10": (4, 3, 32, 32),
    "qkformer_hst3_128.nmnist": (4, 8, 2, 34, 34),
    "qkformer_hst3_192.cifar10": (4, 3, 32, 32),
    "test_qkformer.digits": (4, 3, 32, 32),
}


def test_each_file_has_its_config_and_card_and_all_are_small():
    files = sorted(path.name.removesuffix(".safetensors") for path in WEIGHTS.glob("*.safetensors"))
    assert files == sorted(SHIPPED)
    assert sorted(path.stem for path in WEIGHTS.glob("*.md")) == files
    assert sum(path.stat().st_size for path in WEIGHTS.iterdir()) < 10_000_000


@pytest.mark.parametrize("name", SHIPPED)
def test_loads_without_a_network(name, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    assert name in timm.list_pretrained("*qkformer*")
    model = timm.create_model(name, pretrained=True).eval()
    assert model.time_steps == timm.create_model(name.split(".")[0]).time_steps
    assert model(torch.rand(SHIPPED[name])).shape == (4, 10)
    for key, value in timm.create_model(name, pretrained=True, num_classes=3, in_chans=1).state_dict().items():
        assert torch.isfinite(value).all(), key


def test_weights_of_other_input_channels_are_added_up_in_float32():
    rgb, grey = (timm.create_model("qkformer_hst2_224", pretrained=True, in_chans=n).stem.conv.weight for n in (3, 1))
    torch.testing.assert_close(grey, rgb.sum(1, keepdim=True), rtol=1e-6, atol=1e-7)


def test_cifar10_s_classes_are_named():
    for name in ("qkformer_hst2_224.cifar10", "qkformer_hst3_192.cifar10"):
        names = timm.get_pretrained_cfg(name).label_names
        assert len(names) == 10
        assert list(names) == sorted(names)  # as folders are numbered


def test_bulk_scripts_find_weights_of_the_tiny_model():
    """As timm's test_vit: small, and trained on something."""
    assert timm.list_models("test_qkformer*", pretrained=True) == ["test_qkformer.digits"]
    assert (WEIGHTS / "test_qkformer.digits.safetensors").stat().st_size < 450_000
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    model = timm.create_model("test_qkformer", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    scans = [Image.fromarray((scan * 255 / 16).astype("uint8")).convert("RGB") for scan in digits.images[:100]]
    with torch.inference_mode():
        right = model(torch.stack([transform(scan) for scan in scans])).argmax(1).numpy() == digits.target[:100]
    assert right.mean() > 0.9
    assert "test_qkformer.digits" not in shipped_models()  # nothing to show to anybody


def _top1_on_card(name: str) -> str:
    found = re.search(r"\*\*Top-1:\*\* ([\d.]+) %", (WEIGHTS / f"{name}.md").read_text())
    assert found is not None
    return found[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "archive", "folder", "flags"),
    [
        (
            "qkformer_hst3_128.nmnist",
            "nmnist_small.tar.gz",
            "nmnist_small",
            ["--dataset", "events/nmnist", "--split", "test"],
        ),
        ("qkformer_hst2_224.cifar10", "cifar10.tar.gz", "cifar10", ["--split", "test"]),
        ("qkformer_hst3_192.cifar10", "cifar10.tar.gz", "cifar10", ["--split", "test"]),
    ],
)
def test_the_card_s_accuracy_is_reproduced_to_the_last_digit(name, archive, folder, flags, tmp_path):
    if not (SHARED / "data" / archive).exists():
        pytest.skip(f"needs {archive} of the shared data")
    with tarfile.open(SHARED / "data" / archive) as tar:
        tar.extractall(tmp_path, filter="data")
    results = tmp_path / "results.csv"
    command = ["validate", name, "--data-dir", str(tmp_path / folder), *flags, "--results-file", str(results)]
    assert main([*command, "--batch-size", "50", "--workers", "1", "--device", "cpu"]) == 0
    with results.open() as file:
        (row,) = csv.DictReader(file)
    assert f"{float(row['top1']):.2f}" == _top1_on_card(name)
