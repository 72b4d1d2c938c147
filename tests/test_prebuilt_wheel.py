"""A wheel with kernels, installed where no compiler is and nothing is kept: they run at once, and answer alike."""

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import venv
import zipfile
from pathlib import Path

import pytest

from timm_qkformer.execution import libraries, prebuilt

ROOT = Path(__file__).resolve().parents[1]
MACHINE = platform.machine()
SOURCES = list(libraries.sources(ROOT / "src/timm_qkformer"))
COMPILERS = ("g++", "gcc", "c++", "cc", "clang++", "clang")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        sys.platform != "linux" or shutil.which("g++") is None or not prebuilt.levels(),
        reason="wheels get kernels on Linux, by GCC, for the processors in execution/libraries.py",
    ),
]

FIRST_FORWARD = """
    import time
    start = time.perf_counter()
    import json, hashlib
    from pathlib import Path
    import timm, torch
    imported = time.perf_counter()
    import timm_qkformer
    from timm_qkformer.execution import native
    torch.manual_seed(0)
    model, x = timm.create_model("test_qkformer"), torch.randn(1, 3, 64, 64)
    made = time.perf_counter()
    deployed = timm_qkformer.deploy(model, "fp32")
    results = [deployed(x)]
    done = time.perf_counter()
    results += [timm_qkformer.deploy(model, precision)(x) for precision in ("bf16", "int8")]
    with timm_qkformer.execution.execution_policy(neurons="eager", kernels="always"):
        model.train()(torch.randn(2, 3, 64, 64)).sum().backward()
    results += [parameter.grad for parameter in model.parameters()]
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    runtimes = [p for p in mapped if Path(p).name.startswith(("libgomp", "libomp", "libiomp"))]
    print(json.dumps({
        "package": timm_qkformer.__file__,
        "import torch and timm": imported - start,
        "make the model": made - imported,
        "deploy, first forward": done - made,
        "whole process": done - start,
        "openmp": runtimes,
        "kernels": sorted(set(native.provenance().values())),
        "levels": sorted({Path(p).parent.name for p in mapped if "/execution/kernels/" in p}),
        "libraries": sorted(Path(p).name.split("-")[0] for p in mapped if "/execution/kernels/" in p),
        "results": hashlib.sha256(b"".join(y.detach().numpy().tobytes() for y in results)).hexdigest(),
    }))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [*pip, "--wheel-dir", folder, ROOT], check=True, env={**os.environ, "TIMM_QKFORMER_BUILD_KERNELS": "1"}
    )
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """An environment with the wheel that sees this one's torch and timm, and a PATH of compilers that note calls."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv/bin/python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.strip())
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (site / "outer.pth").write_text(sysconfig.get_path("purelib"))
    (folder / "bin").mkdir()
    for name in COMPILERS:
        (folder / "bin" / name).write_text(f"#!/bin/sh\necho {name} >> {folder}/called\nexit 1\n")
        (folder / "bin" / name).chmod(0o755)

    def run(code=FIRST_FORWARD, **env):
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CXX", "TIMM_QKFORMER_EXECUTION")}
        cache = folder / "cache"
        shutil.rmtree(cache, ignore_errors=True)
        env = {**kept, "PATH": str(folder / "bin"), "TORCHINDUCTOR_CACHE_DIR": str(cache), **env}
        done = subprocess.run(
            [python, "-W", "error:the kernels of", "-c", textwrap.dedent(code)],
            cwd=folder,
            env=env,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    run.called = folder / "called"
    run.cache = folder / "cache"
    run.site = site
    return run


def test_the_wheel_is_for_this_platform_and_any_python(wheel):
    assert wheel.name.endswith(f"-py3-none-linux_{MACHINE}.whl")
    names = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    levels = {level.name for level in libraries.LEVELS if level.machine == MACHINE}
    assert {Path(name).parent.name for name in names} == levels
    assert len(names) == len(levels) * len(SOURCES)
    assert wheel.stat().st_size < 12e6
    metadata = next(name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".dist-info/WHEEL"))
    assert "Root-Is-Purelib: false" in zipfile.ZipFile(wheel).read(metadata).decode()


def test_the_first_forward_of_a_fresh_process_calls_no_compiler(installed):
    installed()  # once before, so that files of torch are not read from the disk
    found = installed()
    print({name: value for name, value in found.items() if isinstance(value, float)})
    assert Path(found["package"]).is_relative_to(installed.site)
    assert found["kernels"] == [f"prebuilt {prebuilt.levels()[0].name}"]
    assert found["levels"] == [prebuilt.levels()[0].name]
    assert found["libraries"] == sorted(Path(source.file).stem for source in SOURCES)  # all that there are
    assert len(found["openmp"]) == 1
    assert not installed.called.exists()
    assert not list(installed.cache.rglob("*.so"))
    assert found["make the model"] + found["deploy, first forward"] < 3


def test_every_level_answers_what_kernels_that_were_built_here_answer(installed, tmp_path):
    with_compiler = {"PATH": os.environ["PATH"], "TIMM_QKFORMER_PREBUILT": "0"}
    here = installed(**with_compiler)
    assert here["kernels"] == ["built here"]
    assert here["libraries"] == []
    for level in prebuilt.levels():
        assert installed(TIMM_QKFORMER_PREBUILT=level.name)["results"] == here["results"]


def test_a_source_that_was_changed_and_a_file_that_was_damaged_are_not_used(installed):
    code = """
        import json
        from timm_qkformer.execution import native
        print(json.dumps(native.provenance()))
    """
    best = prebuilt.levels()[0].name
    source = installed.site / "timm_qkformer/execution/packing.cpp"
    (library,) = (installed.site / "timm_qkformer/execution/kernels" / best).glob("events-*.so")
    text, content = source.read_text(), library.read_bytes()
    try:
        source.write_text(text + "// changed\n")
        library.write_bytes(content[:-1])
        found = installed(code)
    finally:
        source.write_text(text)
        library.write_bytes(content)
    assert found["packing.cpp"] == "built here"  # by the compilers on the PATH, for all it knows
    assert found["events.cpp"] != f"prebuilt {best}"
    assert found["kernels.cpp"] == f"prebuilt {best}"
