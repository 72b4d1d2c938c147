"""The paper's ablations at a small scale, Tables 4, 5, 6 and 9, and two questions more: shortcuts, coupling.

Runs `timm-qkformer train -c cpu_ablation` for every variant and seed on a subset of CIFAR-10, each in one process with
one thread, and keeps what is done, so that an interrupted run goes on. Prints means and spreads.

    python benchmarks/ablations.py --data-dir CIFAR10        # CIFAR10/train/<class>/ and CIFAR10/test/<class>/
"""

import argparse
import csv
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from timm_qkformer.files import write_atomically

RESULTS = Path(__file__).parents[1] / "src" / "timm_qkformer" / "training" / "results" / "ablations.json"
TRAIN_IMAGES = 1000  # of each class
SEEDS = (0, 1, 2, 3, 4)
BASE = "patch_embed=imagenet embed_dims=(32,64,128) depths=(1,1,1) num_heads=4"
FULL = f"{BASE} time_steps=4"
# The first or full variant, T = 4 with QKTA + SSA and LIF, belongs to all experiments; it is trained once a seed.
EXPERIMENTS = {
    "ablation_time_steps": {
        "T = 1": f"{BASE} time_steps=1",
        "T = 2": f"{BASE} time_steps=2",
        "T = 4": FULL,
    },
    "ablation_attention": {
        "QKTA + SSA": FULL,
        "QKCA + SSA": f"{FULL} attn=('QKCA','QKCA','ssa')",
        "QKTA + QKCA": f"{FULL} attn=('QKTA','QKTA','QKCA')",
    },
    "ablation_neuron": {
        "LIF": FULL,
        "IF": f"{FULL} neuron=if",
        "PLIF": f"{FULL} neuron=plif",
    },
    "ablation_patch_embed": {
        "SPEDS": FULL,
        "SPS": f"{FULL} patch_embed=sps_imagenet",
    },
    "ablation_shortcut": {
        "SEW": FULL,
        "MS": f"{FULL} membrane_shortcut=True",
    },
    "ablation_coupling": {
        "per sample": FULL,
        "coupled": f"{FULL} batch_coupled=True",
    },
}
T_QUANTILE = 2.776  # of Student's distribution with 4 degrees of freedom, 97.5 %

Case = tuple[str, str, int]  # experiment, variant and seed


@dataclass(frozen=True)
class Result:
    """One finished training run."""

    experiment: str
    variant: str
    seed: int
    top1: float  # percent, after the last epoch
    epochs: int
    seconds: float  # wall time, training and evaluation
    command: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="CIFAR-10 as train/<class>/ and test/<class>/")
    parser.add_argument("--work-dir", type=Path, default=Path("output/ablations"), help="subset and training output")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON file to go on from and to write")
    parser.add_argument("--epochs", type=int, help="instead of the recipe's")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each on one core")
    args = parser.parse_args()
    subset = make_subset(args.data_dir, args.work_dir / "data")
    results = [Result(**row) for row in json.loads(args.results.read_text())] if args.results.exists() else []
    # Seed by seed, so that an interrupted run has whole experiments.
    cases = [(name, variant, seed) for seed in SEEDS for name in EXPERIMENTS for variant in EXPERIMENTS[name]]
    order = {case: i for i, case in enumerate(cases)}
    done = {(r.experiment, r.variant, r.seed) for r in results}
    runs: dict[str, list[Case]] = {}  # the cases that each command settles
    for case in cases:
        if case not in done:
            experiment, variant, seed = case
            command = train_command(EXPERIMENTS[experiment][variant], seed, args.epochs)
            runs.setdefault(shlex.join(command), []).append(case)
    known = {r.command: r for r in results}

    def settle(command: str) -> Result:
        return known.get(command) or run(command, subset, args.work_dir, runs[command][0])

    with ThreadPoolExecutor(args.jobs) as pool:
        futures = [pool.submit(settle, command) for command in runs]
        try:
            for future in as_completed(futures):
                result = future.result()
                for experiment, variant, seed in runs[result.command]:
                    results.append(replace(result, experiment=experiment, variant=variant, seed=seed))
                    name = f"{experiment:20s} {variant:12s} seed {seed}"
                    print(f"{name}: {result.top1:.2f} % in {result.seconds:.0f} s", flush=True)
                results.sort(key=lambda r: order.get((r.experiment, r.variant, r.seed), len(order)))
                save(results, args.results)
        except BaseException:
            pool.shutdown(cancel_futures=True)  # what has not begun need not
            raise
    print_tables(results)


def make_subset(source: Path, target: Path) -> Path:
    """Links to the first images of each class, in the order of their names, and to all test images."""
    for split, count in (("train", TRAIN_IMAGES), ("test", None)):
        classes = sorted(folder for folder in (source / split).glob("*") if folder.is_dir())
        if len(classes) != 10:
            raise SystemExit(f"--data-dir {source}: {split}/ has {len(classes)} class folders, expected CIFAR-10's 10")
        for folder in classes:
            (target / split / folder.name).mkdir(parents=True, exist_ok=True)
            for image in sorted(folder.iterdir())[:count]:
                link = target / split / folder.name / image.name
                if not link.is_symlink():
                    link.symlink_to(image.resolve())
    return target


def train_command(model_kwargs: str, seed: int, epochs: int | None) -> list[str]:
    """The arguments that decide the result; folders come on top."""
    command = ["timm-qkformer", "train", "-c", "cpu_ablation", "--seed", str(seed)]
    if epochs is not None:
        command += ["--epochs", str(epochs)]
    return [*command, "--model-kwargs", *model_kwargs.split()]


def run(command: str, data: Path, work_dir: Path, case: Case) -> Result:
    experiment, variant, seed = case
    name = "-".join([experiment, *"".join(c if c.isalnum() else " " for c in variant).split(), str(seed)])
    output = work_dir / "runs"
    program = [sys.executable, "-m", "timm_qkformer.cli", *shlex.split(command)[1:]]
    folders = ["--data-dir", str(data), "--output", str(output), "--experiment", name, "--resume", "auto"]
    start = time.perf_counter()
    log = output / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as stream:
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(
            [*program[:4], *folders, *program[4:]], check=True, env=env, stdout=stream, stderr=subprocess.STDOUT
        )
    with (output / name / "summary.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    seconds = time.perf_counter() - start
    epochs = int(rows[-1]["epoch"]) + 1
    return Result(experiment, variant, seed, float(rows[-1]["eval_top1"]), epochs, seconds, command)


def save(results: list[Result], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps([asdict(r) for r in results], indent=1) + "\n")


def print_tables(results: list[Result]) -> None:
    for experiment, variants in EXPERIMENTS.items():
        first = next(iter(variants))
        print(f"\n{experiment}: top-1 in %, mean ± standard deviation over {len(SEEDS)} seeds")
        print(f"  and the difference from {first}, seed by seed, with the 95 % interval of its mean")
        scores = {
            variant: [r.top1 for r in results if (r.experiment, r.variant) == (experiment, variant)]
            for variant in variants
        }
        for variant, top1 in scores.items():
            against = difference(top1, scores[first])
            print(f"  {variant:12s} {statistics.mean(top1):6.2f} ± {statistics.stdev(top1):.2f}{against}")


def difference(top1: list[float], base: list[float]) -> str:
    """Mean difference of runs with the same seed, and its interval."""
    if top1 is base:
        return ""
    by_seed = [a - b for a, b in zip(top1, base, strict=True)]
    half = T_QUANTILE * statistics.stdev(by_seed) / len(by_seed) ** 0.5
    mean = statistics.mean(by_seed)
    return f"  {mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f})"


if __name__ == "__main__":
    main()
