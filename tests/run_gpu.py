"""What `make gpu` runs on a machine with a CUDA device: the tests marked `cuda`, benchmarks/gpu.py, and one report.

    python tests/run_gpu.py [--out .]              # gpu-report.json, and the same as gpu-report.md
    python tests/run_gpu.py --check                # exit status 2 if there is no CUDA device; needs no package
    python tests/run_gpu.py --device cpu -k units --out /tmp  # tries this script: its report says nothing of a GPU

The report is written after each part, so that a crash leaves what was found before. Exit status 1: something failed.
"""

import argparse
import ctypes
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests" / "cuda"
PACKAGES = (
    "timm-qkformer",
    "torch",
    "triton",
    "timm",
    "spikingjelly",
    "numpy",
    "nvidia-cudnn-cu13",
    "nvidia-cudnn-cu12",
)
NO_DEVICE = (
    "make gpu: no CUDA device here (the NVIDIA driver finds none), so nothing was installed and nothing was run."
)
NO_TORCH_CUDA = (
    "make gpu: this machine has a CUDA device, but the torch in .venv cannot use it (torch.cuda.is_available() is "
    "False): install a build of torch that fits the driver (https://pytorch.org/get-started/locally) and run it again."
)
_TRACEBACK_LINES = 40


def count_devices() -> int:
    """CUDA devices that the driver shows this process, asked without any package."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int()
    return count.value if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0


def environment(device: str) -> dict[str, Any]:
    """Device, driver and versions."""
    import torch

    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "system": platform.platform(),
        "versions": versions,
    }
    if device != "cuda":
        return {"device": device, "trial": "TRIAL OF THE SCRIPT: no GPU was used", **facts}
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **facts,
    }


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def run_tests(device: str, selection: str, folder: Path) -> list[dict[str, Any]]:
    """Results of the tests marked `cuda`. Each file has a process of its own: a failed kernel ruins its process."""
    results = []
    for file in sorted(TESTS.glob("test_*.py")):
        xml = folder / f"{file.stem}.xml"
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-m", "cuda", f"--junitxml={xml}", str(file)]
        command += ["-k", selection] if selection else []
        environ = {**os.environ, "TIMM_QKFORMER_CUDA_TESTS_DEVICE": device}
        code = subprocess.run(command, cwd=ROOT, env=environ, check=False).returncode
        results += read_results(xml, file.stem, code)
    return results


def read_results(xml: Path, name: str, code: int) -> list[dict[str, Any]]:
    """pytest's results of one file: test, outcome, seconds, and why, from its JUnit XML.

    Args:
        xml: The file, which a process that died has not written.
        name: Of the file with the tests.
        code: pytest's exit status; 5 means that nothing was selected.
    """
    if not xml.exists():
        why = f"the process ended with status {code} and left no results"
        return [{"test": name, "outcome": "crashed", "seconds": 0.0, "why": why}]
    found = []
    for case in ElementTree.parse(xml).iter("testcase"):
        result = {"test": f"{name}::{case.get('name')}", "outcome": "passed", "seconds": float(case.get("time", 0))}
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                lines = (child.text or child.get("message") or "").strip().splitlines()
                result |= {
                    "outcome": {"failure": "failed"}.get(child.tag, child.tag),
                    "why": (child.get("message") or "")
                    if child.tag == "skipped"
                    else "\n".join(lines[-_TRACEBACK_LINES:]),
                }
        found.append(result)
    return found


def run_benchmark(device: str, folder: Path) -> dict[str, Any]:
    """What benchmarks/gpu.py wrote, or why it wrote nothing."""
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--device", device, "--out", str(folder)]
    command += [] if device == "cuda" else ["--tiny", "--rounds", "2"]
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False)
    path = folder / "gpu.json"
    if done.returncode or not path.exists():
        last = "\n".join(done.stderr.strip().splitlines()[-_TRACEBACK_LINES:])
        return {"failed": f"benchmarks/gpu.py ended with status {done.returncode}:\n{last}"}
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def counted(results: list[dict[str, Any]]) -> dict[str, int]:
    """How many tests had each outcome."""
    outcomes = [result["outcome"] for result in results]
    return {outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))}


def as_markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    facts = report["environment"]
    lines = [f"# timm-qkformer on {facts['device']}", ""]
    if "trial" in facts:
        lines += [f"**{facts['trial']}.**", ""]
    rows = {key: value for key, value in facts.items() if key not in ("trial", "versions")} | facts["versions"]
    lines += ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items()), ""]

    results = report["tests"]
    lines += ["## Tests", "", ", ".join(f"{count} {outcome}" for outcome, count in counted(results).items()), ""]
    bad = [result for result in results if result["outcome"] not in ("passed", "skipped")]
    for result in bad:
        lines += [f"### {result['test']}: {result['outcome']}", "", "```", result["why"], "```", ""]
    reasons = sorted({result["why"] for result in results if result["outcome"] == "skipped"})
    lines += [f"- skipped: {reason}" for reason in reasons] + [""]
    lines += ["| test | outcome | seconds |", "|---|---|--:|"]
    lines += [f"| {result['test']} | {result['outcome']} | {result['seconds']:.1f} |" for result in results]

    lines += ["", "## Benchmarks", ""]
    benchmark = report["benchmark"]
    if benchmark is None:
        lines += ["not run"]
    else:
        lines += ["```", *([benchmark["label"]] if "label" in benchmark else [])]
        lines += [benchmark.get("failed") or benchmark["text"].strip("\n"), "```"]
    return "\n".join(lines) + "\n"


def write(report: dict[str, Any], folder: Path) -> None:
    """gpu-report.json and gpu-report.md, of which either is to be sent."""
    folder.mkdir(parents=True, exist_ok=True)
    text = as_markdown(report)
    (folder / "gpu-report.json").write_text(json.dumps({**report, "text": text}, indent=2) + "\n")
    (folder / "gpu-report.md").write_text(text)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="say whether there is a CUDA device, and nothing else")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu tries this script itself")
    parser.add_argument("--out", type=Path, default=ROOT, help="folder for the report")
    parser.add_argument("-k", dest="selection", default="", help="pytest's -k: which tests")
    args = parser.parse_args(arguments)
    if args.device == "cuda":
        if not count_devices():
            print(NO_DEVICE, file=sys.stderr)
            return 2
        if args.check:
            return 0
        import torch

        if not torch.cuda.is_available():
            print(NO_TORCH_CUDA, file=sys.stderr)
            return 2

    report: dict[str, Any] = {"environment": environment(args.device), "tests": [], "benchmark": None}
    with tempfile.TemporaryDirectory() as folder:
        report["tests"] = run_tests(args.device, args.selection, Path(folder))
        write(report, args.out)
        report["benchmark"] = run_benchmark(args.device, Path(folder))
        write(report, args.out)
    print(f"{counted(report['tests'])}; the report to send: {args.out / 'gpu-report.json'} (gpu-report.md to read)")
    failed = counted(report["tests"]).keys() - {"passed", "skipped"}
    return int(bool(failed) or "failed" in report["benchmark"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
