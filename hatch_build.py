"""Wheels carry their kernels: compiles all sources for several kinds of processors where there is a compiler.

On Linux with GCC alone, whose OpenMP calls all of torch's runtimes understand. Elsewhere, and for `pip install -e`,
nothing is built: kernels are compiled when they are first needed, as docs/execution.md says.

    CXX=g++-14                       the compiler
    TIMM_QKFORMER_BUILD_KERNELS=0    leave them out;  1: fail rather than leave them out
"""

import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = Path(__file__).parent / "src" / "timm_qkformer"
ENVIRONMENT_VARIABLE = "TIMM_QKFORMER_BUILD_KERNELS"
TIMEOUT = 600  # seconds for one source


def _load_libraries() -> Any:
    """execution/libraries.py without its package, which needs torch."""
    spec = spec_from_file_location("timm_qkformer_libraries", PACKAGE / "execution" / "libraries.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


libraries = _load_libraries()


class UnfitError(Exception):
    """Why there are no kernels in this wheel."""


class KernelsHook(BuildHookInterface):
    """Adds libraries to the wheel, which is then for this platform."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        setting = os.environ.get(ENVIRONMENT_VARIABLE, "")
        if setting not in ("", "0", "1"):
            raise ValueError(f"environment variable {ENVIRONMENT_VARIABLE}={setting!r}: choose 0 or 1")
        if version == "editable" or setting == "0":
            return
        try:
            platform = sysconfig.get_platform()
            machine = linux_machine(platform)
            compiler = find_compiler(machine)
            self._folder = tempfile.TemporaryDirectory(prefix="timm-qkformer-kernels-")
            built = build(compiler, machine, Path(self._folder.name))
        except UnfitError as reason:
            if setting == "1":
                raise SystemExit(f"no kernels: {reason}") from reason
            self.app.display_warning(f"a wheel without kernels, which are compiled when first needed: {reason}")
            return
        for path in built:
            inside = path.relative_to(self._folder.name).as_posix()
            build_data["force_include"][str(path)] = f"timm_qkformer/execution/kernels/{inside}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform.replace('-', '_').replace('.', '_')}"
        levels = ", ".join(sorted({path.parent.name for path in built}))
        self.app.display_success(f"{len(built)} libraries of kernels for {levels}")

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if hasattr(self, "_folder"):
            self._folder.cleanup()


def linux_machine(platform: str) -> str:
    """The machine of a platform such as linux-x86_64."""
    system, _, machine = platform.partition("-")
    if system != "linux" or not sys.platform.startswith("linux"):
        raise UnfitError(f"{platform} is no Linux")
    if all(level.machine != machine for level in libraries.LEVELS):
        raise UnfitError(f"nobody has tried them on {machine}")
    return machine


def find_compiler(machine: str) -> list[str]:
    """The command that calls the compiler, if it is GCC for this machine."""
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    target = _run([*compiler, "-dumpmachine"]).strip()
    if target.partition("-")[0] != machine:
        raise UnfitError(f"{shlex.join(compiler)} compiles for {target}, not for {machine}")
    macros = _run([*compiler, "-dM", "-E", "-x", "c++", os.devnull])
    if "__GNUC__" not in macros or "__clang__" in macros:
        raise UnfitError(
            f"{shlex.join(compiler)} is not GCC, and calls an OpenMP runtime that torch does not bring along"
        )
    return compiler


def build(compiler: list[str], machine: str, folder: Path) -> list[Path]:
    """The libraries of all sources for all levels of a machine, LEVEL/NAME in a folder."""
    tasks = [(level, source) for level in libraries.LEVELS if level.machine == machine for source in sources()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda task: compile_source(compiler, *task, folder), tasks))


def sources() -> list[Any]:
    return list(libraries.sources(PACKAGE))


def compile_source(compiler: list[str], level: Any, source: Any, folder: Path) -> Path:
    """One library, in the folder of its level. Linked without OpenMP: at run time, torch's is there."""
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "kernels.cpp").write_text(source.whole(), "utf-8")
        _run([*compiler, *libraries.FLAGS, *level.flags, "-c", "kernels.cpp", "-o", "kernels.o"], name)
        _run([*compiler, "-shared", "-s", "-Wl,--build-id=none", "kernels.o", "-o", "kernels.so"], name)
        content = (Path(name) / "kernels.so").read_bytes()
    path = folder / level.name / libraries.name(source.key(level), content)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def _run(command: list[str], folder: str | None = None) -> str:
    try:
        done = subprocess.run(
            command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnfitError(str(error)) from error
    if done.returncode:
        raise UnfitError(f"{shlex.join(command)} ended with {done.returncode}: {done.stderr.strip()[-1000:]}")
    return done.stdout
