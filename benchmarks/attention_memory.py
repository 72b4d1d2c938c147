"""Memory and time of attention against the number of tokens: QKTA and SSA, beside the paper's figures.

    python benchmarks/attention_memory.py [--sides 10,20,...,200] [--rounds 5] [--out benchmarks/results]

C = 256, T = B = 1, one head. The memory is counted, not estimated, and the same on every machine; the time is not. See
benchmarks/README.md.
"""

import time
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from _common import argument_parser, environment, save_figure, write_json
from timm_qkformer.analysis.memory import PAPER_SIDES, AttentionMemory, attention_memory

LARGE = 80  # beyond this side one round has to do: the cost of (Q K^T) V grows with its fourth power
QUADRATIC = "SSA as (Q K^T) V"
KINDS = ("QKTA", "SSA", QUADRATIC)
STYLES = {"QKTA": ("#2166ac", "o"), "SSA": ("#4d9221", "s"), QUADRATIC: ("#b2182b", "^")}


def free_bytes(device: str) -> float:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    except OSError:  # not Linux
        return float("inf")
    return 1024.0 * int(lines["MemAvailable"].split()[0])


def needed_bytes(kind: str, side: int, dim: int) -> float:
    """More than the attention will take."""
    tokens = side**2
    return 4.0 * (8 * tokens * dim + dim**2 + (tokens**2 if kind == QUADRATIC else 0))


def measure(sides: list[int], rounds: int, dim: int, device: str) -> tuple[list[AttentionMemory], list[str]]:
    """What was measured, and what was left out because it would not fit into half of the free memory."""
    results, left_out = [], []
    for side in tqdm(sides, unit="size", leave=False, disable=None):
        fit = [kind for kind in KINDS if needed_bytes(kind, side, dim) < free_bytes(device) / 2]
        left_out += [f"{kind}, sqrt(N) = {side}" for kind in KINDS if kind not in fit]
        results += attention_memory(fit, [side], dim, rounds if side <= LARGE else 1, device=device)
    return results, left_out


def print_table(results: list[AttentionMemory]) -> None:
    by_side: dict[int, dict[str, AttentionMemory]] = {}
    for result in results:
        by_side.setdefault(result.side, {})[result.kind] = result
    names = {"QKTA": "QKTA", "SSA": "SSA", QUADRATIC: "(Q K^T) V"}
    header = [f"{names[kind]:>10}" for kind in KINDS]
    print(f"{'':>7} | {'MiB':^32} | {'published MiB':^21} | {'ms':^32}")
    print(f"{'sqrt(N)':>7} | {' '.join(header)} | {'QKTA':>10} {'SSA':>10} | {' '.join(header)}")
    for side, row in by_side.items():

        def cells(value, row=row):
            return " ".join(f"{value(row[kind]):10.2f}" if kind in row else f"{'-':>10}" for kind in KINDS)

        paper = [row[kind].paper_mib if kind in row else None for kind in ("QKTA", QUADRATIC)]
        published = " ".join(f"{'-':>10}" if mib is None else f"{mib:10.2f}" for mib in paper)
        memory = cells(lambda result: result.peak_bytes / 2**20)
        print(f"{side:7d} | {memory} | {published} | {cells(lambda result: 1e3 * result.seconds)}")


def draw(results: list[AttentionMemory], title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    memory, clock = figure.subplots(1, 2)
    for kind in KINDS:
        own = [result for result in results if result.kind == kind]
        colour, marker = STYLES[kind]
        name = "SSA as Q (K^T V), this package" if kind == "SSA" else kind
        sides = [result.side for result in own]
        style = {"color": colour, "marker": marker, "markersize": 4, "label": name}
        memory.plot(sides, [result.peak_bytes / 2**20 for result in own], **style)
        clock.plot(sides, [1e3 * result.seconds for result in own], **style)
        published = [(result.side, result.paper_mib) for result in own if result.paper_mib is not None]
        if published:
            memory.plot(*zip(*published, strict=True), "x", color="black", label=f"{kind}, published")
    memory.set_ylabel("memory beyond Q, K, V in MiB")
    clock.set_ylabel("median time in milliseconds")
    for axis in (memory, clock):
        axis.set_yscale("log")
        axis.set_xlabel("side of the token map, sqrt(N)")
        axis.grid(color="0.9")
    memory.legend(fontsize=8)
    figure.suptitle(title)
    save_figure(figure, path)


def main() -> None:
    parser = argument_parser(__doc__, rounds=5, least=1)
    parser.add_argument("--sides", default=",".join(map(str, PAPER_SIDES)), help="sides sqrt(N) of the token maps")
    parser.add_argument("--dim", type=int, default=256, help="channels C")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    args = parser.parse_args()

    start = time.perf_counter()
    results, left_out = measure([int(side) for side in args.sides.split(",")], args.rounds, args.dim, args.device)
    print_table(results)
    for kind in left_out:
        print(f"left out, needs more memory than is free: {kind}")
    args.out.mkdir(parents=True, exist_ok=True)
    content = {
        "dim": args.dim,
        "time_steps": 1,
        "batch_size": 1,
        "heads": 1,
        "dtype": "float32",
        "device": args.device,
        "rounds": {f"sqrt(N) <= {LARGE}": args.rounds, "above": 1},
        "rows": [asdict(result) for result in results],
        "left_out": left_out,
        "total_seconds": time.perf_counter() - start,
        **environment(),
    }
    write_json(content, args.out / "attention_memory.json")
    draw(results, f"Attention, C = {args.dim}, T = B = 1, float32, {args.device}", args.out / "attention_memory.png")


if __name__ == "__main__":
    main()
