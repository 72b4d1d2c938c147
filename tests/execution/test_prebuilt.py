"""Kernels that come with a wheel: which are chosen, what is passed over, whose threads they use."""

import ctypes
import logging
import shutil
import sys
from pathlib import Path

import pytest
import torch

from timm_qkformer.execution import compiler, execution_policy, libraries, native, packing, prebuilt
from timm_qkformer.execution.libraries import LEVELS, Source

V2 = "cx16 lahf_lm pni popcnt sse4_1 sse4_2 ssse3 "
V3 = V2 + "abm avx avx2 bmi1 bmi2 f16c fma movbe "
V4 = V3 + "avx512f avx512bw avx512cd avx512dq avx512vl "
SOURCE = Source("answer.cpp", "", 'extern "C" int answer() { return 42; }\n')
LEVEL = {level.name: level for level in LEVELS}


@pytest.fixture
def processor(monkeypatch):
    """Says what this processor has."""

    def have(flags: str, machine: str = "x86_64") -> None:
        monkeypatch.setattr(sys, "platform", "linux")
        monkeypatch.setattr(prebuilt.platform, "machine", lambda: machine)
        monkeypatch.setattr(prebuilt, "_instructions", lambda: frozenset(flags.split()))

    monkeypatch.delenv(prebuilt.ENVIRONMENT_VARIABLE, raising=False)
    return have


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(prebuilt, "FOLDER", tmp_path / "kernels")
    return tmp_path / "kernels"


def put(folder: Path, level: str, content: bytes, source: Source = SOURCE) -> Path:
    path = folder / level / libraries.name(source.key(LEVEL[level]), content)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("flags", "machine", "expected"),
    [
        (V4 + "avx512_vnni avx512_bf16 amx_tile", "x86_64", ["x86-64-v4", "x86-64-v3", "x86-64-v2"]),
        (V4.replace("avx512vl", ""), "x86_64", ["x86-64-v3", "x86-64-v2"]),
        (V3, "x86_64", ["x86-64-v3", "x86-64-v2"]),
        (V3.replace("fma", "fma4"), "x86_64", ["x86-64-v2"]),
        ("sse sse2", "x86_64", []),
        ("fp asimd evtstrm asimddp", "aarch64", ["armv8-a"]),
        ("", "riscv64", []),
    ],
)
def test_levels_are_those_that_the_processor_can_run_best_first(processor, flags, machine, expected):
    processor(flags, machine)
    assert [level.name for level in prebuilt.levels()] == expected


def test_other_systems_have_none(processor, monkeypatch):
    processor(V4)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert prebuilt.levels() == ()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/cpuinfo")
def test_this_processor_is_read_as_torch_reads_it():
    able = {level.name for level in prebuilt.levels()}
    capability = torch.backends.cpu.get_cpu_capability()
    assert ("x86-64-v3" in able) == (capability in ("AVX2", "AVX512"))
    assert ("x86-64-v4" in able) == (capability == "AVX512")


def test_the_environment_variable_ignores_them_or_chooses_one(processor, folder, monkeypatch):
    processor(V3)
    put(folder, "x86-64-v3", b"three")
    lower = put(folder, "x86-64-v2", b"two")
    for ignore in ("0", "off", "No"):
        monkeypatch.setenv(prebuilt.ENVIRONMENT_VARIABLE, ignore)
        assert prebuilt.find(SOURCE) is None
    monkeypatch.setenv(prebuilt.ENVIRONMENT_VARIABLE, "x86-64-v2")
    assert prebuilt.find(SOURCE) == (LEVEL["x86-64-v2"], lower)
    for wrong in ("x86-64-v4", "fast"):
        monkeypatch.setenv(prebuilt.ENVIRONMENT_VARIABLE, wrong)
        with pytest.raises(
            ValueError, match=rf"{prebuilt.ENVIRONMENT_VARIABLE}='{wrong}': choose 0, 1 or one of \['x86"
        ):
            prebuilt.find(SOURCE)


def test_the_best_intact_one_of_this_very_source_is_found(processor, folder, caplog):
    processor(V3)
    put(folder, "x86-64-v4", b"four")
    best, lower = put(folder, "x86-64-v3", b"three"), put(folder, "x86-64-v2", b"two")
    assert prebuilt.find(SOURCE) == (LEVEL["x86-64-v3"], best)
    assert prebuilt.find(SOURCE._replace(own=SOURCE.own.replace("42", "43"))) is None
    assert prebuilt.find(SOURCE._replace(common="// changed")) is None
    assert not caplog.records
    best.write_bytes(b"thre")
    with caplog.at_level(logging.WARNING):
        assert prebuilt.find(SOURCE) == (LEVEL["x86-64-v2"], lower)
    assert [r.getMessage() for r in caplog.records] == [
        "the kernels of answer.cpp for x86-64-v3 are damaged: install timm-qkformer again"
    ]


def test_flags_are_part_of_the_name(monkeypatch):
    key = SOURCE.key(LEVEL["x86-64-v3"])
    assert key != SOURCE.key(LEVEL["x86-64-v2"])
    monkeypatch.setattr(libraries, "FLAGS", (*libraries.FLAGS, "-ffast-math"))
    assert key != SOURCE.key(LEVEL["x86-64-v3"])


@pytest.fixture
def answer(processor, folder, event_kernels):
    """The path of a library that works, for the best level."""
    processor(V2)
    compiler.load(SOURCE.text(""), SOURCE.file)
    kept = libraries.intact(compiler.cache_folder(), compiler.machine_key(SOURCE.text("")))
    return put(folder, "x86-64-v2", kept.read_bytes())


def test_a_library_is_loaded_if_it_has_what_is_asked_for(answer, monkeypatch):
    assert prebuilt.load(SOURCE, ["answer"]).answer() == 42
    assert prebuilt.load(SOURCE, ["answer", "question"]) is None
    monkeypatch.setattr(prebuilt, "shares_openmp", lambda: False)
    assert prebuilt.load(SOURCE, ["answer"]) is None


def test_a_library_that_does_not_load_is_passed_over(processor, folder, caplog):
    processor(V2)
    put(folder, "x86-64-v2", b"of another system")
    with caplog.at_level(logging.WARNING):
        assert prebuilt.load(SOURCE, ["answer"]) is None
    assert "cannot be loaded" in caplog.text


@pytest.mark.skipif(sys.platform != "linux", reason="the names of mapped files")
def test_openmp_is_the_runtime_that_torch_has_loaded(event_kernels):
    def runtimes() -> set[str]:
        mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
        return {path for path in mapped if any(name in Path(path).name for name in ("libgomp", "libomp", "libiomp"))}

    torch.ones(2**20).sum()
    before = runtimes()
    assert prebuilt._publish_openmp() in before
    assert hasattr(ctypes.CDLL(None), "GOMP_parallel")
    assert runtimes() == before


@pytest.fixture(scope="module")
def hook():
    pytest.importorskip("hatchling")
    sys.path.insert(0, str(Path(__file__).parents[2]))
    try:
        import hatch_build
    finally:
        sys.path.pop(0)
    return hatch_build


@pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("g++") is None, reason="wheels get kernels on Linux, by GCC"
)
def test_what_the_hook_builds_runs_and_compiles_nothing(hook, folder, monkeypatch, tmp_path):
    source = next(source for source in hook.sources() if source.file == "packing.cpp")
    level = prebuilt.levels()[-1]
    hook.compile_source(["g++"], level, source, folder)
    monkeypatch.setattr(native, "_libraries", {})
    monkeypatch.setattr(native.compiler, "load", lambda *args: pytest.fail("compiled"))
    x = torch.randint(0, 2, (1000,)).float()
    with execution_policy(kernels="always"):
        data, spikes = packing._pack_natively(packing._kernel("pack", x), x, packing.BINARY)
    assert spikes == int(x.sum())
    out = torch.empty_like(x)
    packing._unpack_in_torch(data, packing.BINARY, out)
    assert torch.equal(out, x)
    assert native.provenance()["packing.cpp"] == f"prebuilt {level.name}"


@pytest.mark.parametrize("kept", [True, False])
def test_provenance_of_what_did_not_come_along(folder, monkeypatch, kept):
    monkeypatch.setattr(compiler, "compiler_path", lambda: None)
    monkeypatch.setattr(compiler, "is_kept", lambda source: kept)
    assert set(native.provenance().values()) == {"built here" if kept else "none"}
    monkeypatch.setattr(compiler, "compiler_path", lambda: "/usr/bin/g++")
    assert set(native.provenance().values()) == {"built here"}


def test_every_source_is_one_that_wheels_carry():
    package = Path(native.__file__).parents[1]
    found = {source.file: source for source in libraries.sources(package)}
    assert {"events.cpp", "event_gradients.cpp", "packing.cpp", "kernels.cpp", "ssa.cpp"} <= set(found)
    assert "KERNEL(float32_uint8, float, std::uint8_t)\n" in found["ssa.cpp"].whole()
    assert found["events.cpp"].instances() == ("",)
