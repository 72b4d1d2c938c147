"""CIFAR-10 from nothing on a CPU: a network of rectifiers first, then the same one with spikes.

    python benchmarks/cifar10.py --data-dir CIFAR10 --seed 42        # CIFAR10/train/<class>/ and CIFAR10/test/<class>/

The second run begins with the weights of the first and is distilled from it. Stopped, the same line goes on; further
flags go to `timm-qkformer train`, both times. Prints the accuracy on the test images, the firing rate and the
core-hours, and writes them to OUTPUT/SEED/result.json.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from timm_qkformer.devices import processor_name
from timm_qkformer.files import write_atomically

RECIPE = "cpu_cifar10_hst2_224"
TEACHER = "--model-kwargs neuron=relu --epochs 25 --lr 0.04 --weight-decay 0.1"
TEACHER += " --firing-rate-penalty 0 --no-quantize-weights"
STUDENT = "--distill-loss-weight 0.9 --task-loss-weight 0.1"
# So small a model has memory to spare, and packing its activations takes time.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TIMM_QKFORMER_EXECUTION": "packed=0"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="CIFAR-10 as train/<class>/ and test/<class>/")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output", type=Path, default=Path("output/cifar10"), help="folder of the runs (%(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="processes of one thread each (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=256, help="of all processes together (%(default)s)")
    args, args.more = parser.parse_known_args()
    folder = args.output / str(args.seed)
    seconds = {"teacher": train(args, folder, "teacher", TEACHER.split())}
    teacher = convert(folder, "teacher")
    flags = [*STUDENT.split(), "--kd-model-name", f"local-dir:{teacher}"]
    flags += ["--initial-checkpoint", str(folder / "teacher" / "last.pth.tar")]
    seconds["student"] = train(args, folder, "student", flags)
    weights = convert(folder, "student", "--quantize-weights", "--dtype", "float16")
    result = {
        "seed": args.seed,
        **validate(args, weights),
        "teacher_top1": validate(args, teacher)["top1"],
        "core_hours": {name: args.processes * s / 3600 for name, s in seconds.items()},
        "processor": processor_name(),
    }
    write_atomically(folder / "result.json", json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def command(*words: Any) -> list[str]:
    return ["-m", "timm_qkformer.cli", *map(str, words)]


def train(args: argparse.Namespace, folder: Path, name: str, flags: list[str]) -> float:
    """Train, or go on; seconds that this took, pauses left out and repeated updates included."""
    spent = folder / f"{name}.seconds"
    before = float(spent.read_text()) if spent.exists() else 0.0
    if weights_of(folder, name).exists():
        return before
    folder.mkdir(parents=True, exist_ok=True)
    amp = ["--amp", "--amp-dtype", "bfloat16"] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else []
    words = ["train", "-c", RECIPE, "--dataset", "", "--val-split", "test", "--seed", args.seed]
    words += ["--data-dir", args.data_dir]
    words += ["--batch-size", args.batch_size // args.processes, "--output", folder, "--experiment", name]
    words += ["--resume", "auto", "--recovery-interval", 100, *amp, *flags, *args.more]
    program = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(args.processes)]
    start = time.monotonic() - before
    with subprocess.Popen([*program, *command(*words)], env={**ENVIRONMENT, **os.environ}) as process:
        while process.returncode is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            elapsed = time.monotonic() - start
            write_atomically(spent, f"{elapsed:.1f}\n")
    if process.returncode:
        raise SystemExit(f"training {name} failed; the same line goes on where it was")
    return elapsed


def weights_of(folder: Path, name: str) -> Path:
    return folder / f"{name}-weights"


def convert(folder: Path, name: str, *flags: str) -> Path:
    target = weights_of(folder, name)
    if not target.exists():
        checkpoint = folder / name / "last.pth.tar"
        subprocess.run([sys.executable, *command("convert", *flags, checkpoint, target)], check=True)
    return target


def validate(args: argparse.Namespace, weights: Path) -> dict[str, float]:
    """Top-1 on the test images in percent, and the firing rate."""
    words = ["validate", f"local-dir:{weights}", "--split", "test", "--data-dir", args.data_dir, "--device", "cpu"]
    words += ["--workers", 1, "--json"]
    printed = subprocess.run([sys.executable, *command(*words)], check=True, stdout=subprocess.PIPE, text=True).stdout
    measured = json.loads(printed)
    return {name: measured[name] for name in ("top1", "firing_rate")}


if __name__ == "__main__":
    main()
