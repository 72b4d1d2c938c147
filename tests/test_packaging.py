"""The wheel: what it holds, and that timm knows the models where it is installed."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", folder, ROOT], check=True)
    return next(folder.glob("*.whl"))


def test_wheel_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "timm_qkformer_autoload.py" in names
    assert "timm_qkformer/py.typed" in names
    assert "timm_qkformer/training/recipes/cifar10.yaml" in names
    assert "timm_qkformer/training/results/ablations.json" in names
    for name in ("execution/common", "execution/events", "execution/packing", "inference/kernels", "operators/ssa"):
        assert f"timm_qkformer/{name}.cpp" in names
    assert "timm_qkformer/training/demo/cifar10.png" in names
    assert "timm_qkformer/models/weights/qkformer_hst3_192.cifar10.safetensors" in names
    assert "timm_qkformer/models/weights/qkformer_hst3_128.nmnist.safetensors" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    roots = {name.split("/")[0] for name in names}
    assert {r for r in roots if not r.endswith(".dist-info")} == {"timm_qkformer", "timm_qkformer_autoload.py"}


def test_an_installed_wheel_registers_with_timm(wheel, tmp_path):
    target = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)  # what pip does with a pure wheel; the metadata comes along
    code = """
        import timm, sys
        model = timm.create_model("test_qkformer")
        print(sys.modules["timm_qkformer_autoload"].__file__, sys.modules["timm_qkformer"].__file__, sep="\\n")
    """
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(line.strip() for line in code.splitlines())],
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
        env={**os.environ, "PYTHONPATH": str(target)},
    )
    assert [Path(line).is_relative_to(target) for line in result.stdout.split()] == [True, True]
