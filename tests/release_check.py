"""Build sdist and wheels of the last commit from clean, and try them as a stranger would: `make release-check`.

What comes out is in dist/: the sdist, a wheel for every machine and, on Linux, one with kernels for this kind. Checked
are the version (against the changelog and a tag, if one is given), metadata, what the files hold and how large they
are; then the wheel for this machine is installed in an empty environment, `pip check` is asked, and README's example
and commands run outside of the checkout. With the file of a wheel as argument, that one is checked and tried.
"""

import email
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMITS = {".whl": 12, ".gz": 12}  # MB; the weights of two models are 3.7


def main(arguments: list[str]) -> None:
    """Exits with a message at the first thing that is wrong."""
    given = arguments[0] if arguments else None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if given and given.endswith(".whl"):
            wheel = Path(given).resolve()
            version = _check_metadata(wheel)
            _check_wheel(wheel)
            _try(folder, wheel)
            print(f"{wheel.name} is sound")
            return
        sdist, *wheels = _build(folder)
        for wheel in wheels:
            version = _check_metadata(wheel)
            _check_wheel(wheel)
        if given and given != f"v{version}":
            raise SystemExit(f"the tag is {given}, the package's version {version}")
        _check_changelog(version, released=bool(given))
        _check_sdist(sdist)
        _try(folder, wheels[-1])
    print(f"{version} can be released: dist/ has the files")


def _run(*command: object, cwd: Path | None = None, **env: str) -> str:
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")} | env
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} ended with {done.returncode}\n{done.stdout}")
    return done.stdout


def _build(folder: Path) -> list[Path]:
    """The files in dist/, built from the last commit in an environment of their own: sdist, pure wheel, Linux's."""
    if _run("git", "status", "--porcelain", cwd=ROOT):
        print("note: changes that are not committed are left out", file=sys.stderr)
    archive = folder / "source.tar"
    _run("git", "archive", "-o", archive, "HEAD", cwd=ROOT)
    with tarfile.open(archive) as source:
        source.extractall(folder / "source", filter="data")
    venv.create(folder / "build", with_pip=True)
    python = folder / "build/bin/python"
    _run(python, "-m", "pip", "install", "--quiet", "build", "twine")
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    build = (python, "-m", "build", "--outdir", dist)
    _run(*build, folder / "source", TIMM_QKFORMER_BUILD_KERNELS="0")  # the wheel is built from the sdist
    (sdist,) = dist.glob("*.tar.gz")
    if sys.platform == "linux":
        with tarfile.open(sdist) as source:
            source.extractall(folder / "unpacked", filter="data")
        (unpacked,) = (folder / "unpacked").iterdir()
        _run(*build, "--wheel", unpacked, TIMM_QKFORMER_BUILD_KERNELS="1")
    _run(python, "-m", "twine", "check", "--strict", *dist.iterdir())
    wheels = sorted(dist.glob("*.whl"))  # "any" comes before "linux"
    tags = [wheel.stem.split("-", 2)[2] for wheel in wheels]
    expected = ["py3-none-any", f"py3-none-linux_{platform.machine()}"][: 1 + (sys.platform == "linux")]
    if tags != expected:
        raise SystemExit(f"expected wheels for {expected}, got {tags}")
    return [sdist, *wheels]


def _check_metadata(wheel: Path) -> str:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    for key in ("Summary", "License-Expression", "Requires-Python", "Description-Content-Type", "Keywords"):
        if not metadata[key]:
            raise SystemExit(f"{wheel.name}: metadata has no {key}")
    version = str(metadata["Version"])
    stated = re.search(r'^__version__ = "(.*)"$', (ROOT / "src/timm_qkformer/__init__.py").read_text(), re.MULTILINE)
    cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    if not stated or not cited or {stated[1], cited[1]} != {version}:
        raise SystemExit(f"the wheel's version is {version}, __version__ and CITATION.cff say otherwise")
    return version


def _check_changelog(version: str, released: bool) -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    if released and not any(re.fullmatch(rf"\[?{re.escape(version)}\]? - \d{{4}}-\d\d-\d\d", h) for h in headings):
        raise SystemExit(f"CHANGELOG.md has no heading '## {version} - DATE', but {headings[:3]}")


def _check_size(path: Path) -> None:
    size = path.stat().st_size / 1e6
    print(f"{path.name}: {size:.1f} MB")
    if size > LIMITS[path.suffix]:
        raise SystemExit(f"{path.name} has {size:.1f} MB, more than {LIMITS[path.suffix]}")


def _check_wheel(wheel: Path) -> None:
    _check_size(wheel)
    with zipfile.ZipFile(wheel) as archive:
        inside = archive.namelist()
    roots = {name.split("/")[0] for name in inside}
    strangers = {root for root in roots if not root.endswith(".dist-info")} - {
        "timm_qkformer",
        "timm_qkformer_autoload.py",
    }
    if strangers or any("__pycache__" in name for name in inside):
        raise SystemExit(f"the wheel holds what it should not: {sorted(strangers)}")
    _check_kernels(wheel.name, inside)


def _check_kernels(wheel: str, inside: list[str]) -> None:
    """For each level of the wheel's machine a library of each source; none in a wheel for all."""
    found = {(Path(name).parent.name, Path(name).name.split("-")[0]) for name in inside if name.endswith(".so")}
    sources = {Path(name).stem for name in inside if name.endswith(".cpp")} - {"common"}
    levels = {"x86_64": ("x86-64-v2", "x86-64-v3", "x86-64-v4"), "aarch64": ("armv8-a",)}
    machine = next((machine for machine in levels if wheel.endswith(f"_{machine}.whl")), "")
    if found != {(level, source) for level in levels.get(machine, ()) for source in sources}:
        raise SystemExit(f"{wheel} has kernels {sorted(found)} for the sources {sorted(sources)}")


def _check_sdist(sdist: Path) -> None:
    _check_size(sdist)
    with tarfile.open(sdist) as archive:
        source = {name.partition("/")[2] for name in archive.getnames()}
    for needed in (
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "LICENSE",
        "Makefile",
        "hatch_build.py",
        "mkdocs.yml",
        "tests/test_cli.py",
    ):
        if needed not in source:
            raise SystemExit(f"the sdist has no {needed}")


def _try(folder: Path, wheel: Path) -> None:
    """Install the wheel in an empty environment and do what README says."""
    venv.create(folder / "empty", with_pip=True)
    binaries, elsewhere = folder / "empty/bin", folder / "elsewhere"
    elsewhere.mkdir()
    _run(binaries / "python", "-m", "pip", "install", "--quiet", wheel)
    print(_run(binaries / "python", "-m", "pip", "check").strip())
    print(_run(binaries / "timm-qkformer", "--version", cwd=elsewhere).strip())
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    answer = _run(binaries / "python", "-c", example[1] if example else "", cwd=elsewhere).strip()
    print(f"README's example: {answer}")
    if answer != "frog":
        raise SystemExit("README's example answers something else than the comment behind it")
    kernels = json.loads(_run(binaries / "timm-qkformer", "doctor", "--json", cwd=elsewhere))["kernels"]
    print(f"kernels: {kernels}")
    if not wheel.name.endswith("-any.whl") and not kernels.startswith("prebuilt"):
        raise SystemExit("the kernels that came with the wheel do not run here")
    _run(binaries / "timm-qkformer", "profile", "test_qkformer", "--random", "--limit", "1", "--json", cwd=elsewhere)


if __name__ == "__main__":
    main(sys.argv[1:])
