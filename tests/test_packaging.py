"""The wheel without kernels: its contents, timm knows the models where it is installed; why kernels are left out."""

import os
import subprocess
import sys
import zipfile
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    without = {**os.environ, "TIMM_QKFORMER_BUILD_KERNELS": "0"}  # test_prebuilt_wheel.py builds one with kernels
    subprocess.run([*pip, "--wheel-dir", folder, ROOT], check=True, env=without)
    return next(folder.glob("*.whl"))


def test_wheel_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not any(name.endswith(".so") for name in names)
    assert "timm_qkformer_autoload.py" in names
    assert "timm_qkformer/py.typed" in names
    assert "timm_qkformer/training/recipes/cifar10.yaml" in names
    assert "timm_qkformer/training/results/ablations.json" in names
    for name in ("execution/common", "execution/events", "execution/packing", "inference/kernels", "operators/ssa"):
        assert f"timm_qkformer/{name}.cpp" in names
    assert "timm_qkformer/training/demo/cifar10.png" in names
    assert "timm_qkformer/models/weights/qkformer_hst2_224.cifar10.safetensors" in names
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


HERE = 'case $1 in -dumpmachine) echo "$(uname -m)-linux-gnu";;'  # a compiler for this machine


class Said:
    """What stands in for hatchling's application."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.display_warning = self.display_success = self.lines.append


def run_hook(folder, version="standard"):
    hatch_build = pytest.importorskip("hatchling") and load_hook()
    said, data = Said(), {"force_include": {}, "pure_python": True}
    hatch_build.KernelsHook(str(ROOT), {}, None, None, str(folder), "wheel", said).initialize(version, data)
    return said.lines, data


def load_hook():
    spec = spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no compiler is asked")
@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        (None, "No such file"),
        ("exit 1", "ended with 1"),
        ("echo mips64-linux-gnu", "compiles for mips64-linux-gnu"),
        (f'{HERE} *) echo "#define __GNUC__ #define __clang__";; esac', "is not GCC"),
        (f'{HERE} -dM) echo "#define __GNUC__";; *) exit 3;; esac', "ended with 3"),
    ],
)
def test_kernels_are_left_out_where_they_cannot_be_built_and_that_is_said(tmp_path, monkeypatch, answers, reason):
    compiler = tmp_path / "c++"
    if answers is not None:
        compiler.write_text(f"#!/bin/sh\n{answers}\n")
        compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.delenv("TIMM_QKFORMER_BUILD_KERNELS", raising=False)
    (line,), data = run_hook(tmp_path)
    assert line.startswith("a wheel without kernels, which are compiled when first needed: ")
    assert reason in line
    assert data == {"force_include": {}, "pure_python": True}
    monkeypatch.setenv("TIMM_QKFORMER_BUILD_KERNELS", "1")
    with pytest.raises(SystemExit, match=reason):
        run_hook(tmp_path)


def test_editable_installs_and_those_who_ask_for_it_build_no_kernels(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "/no/such/compiler")
    for setting, version in (("1", "editable"), ("0", "standard")):
        monkeypatch.setenv("TIMM_QKFORMER_BUILD_KERNELS", setting)
        assert run_hook(tmp_path, version) == ([], {"force_include": {}, "pure_python": True})
    monkeypatch.setenv("TIMM_QKFORMER_BUILD_KERNELS", "maybe")
    with pytest.raises(ValueError, match="TIMM_QKFORMER_BUILD_KERNELS='maybe': choose 0 or 1"):
        run_hook(tmp_path)
