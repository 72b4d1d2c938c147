"""Event streams in real time: N-MNIST recordings in windows, one after the other, at the recordings' own pace.

    python benchmarks/stream.py --data-dir FOLDER [--window 10] [--precisions fp32 int8]

FOLDER has N-MNIST's .bs2 files with test100.txt, or Test/<digit>/*.bin. See benchmarks/README.md.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

import timm_qkformer
from _common import argument_parser, environment, write_json
from timm_qkformer.data import create_event_dataset
from timm_qkformer.execution import keep_freed_memory
from timm_qkformer.streaming import StreamReport, cut_windows, stream


def measure(model: Any, recordings: list[tuple[Path, int]], window: int) -> dict[str, float]:
    """Latency in milliseconds, and how many windows were answered too late."""
    reports, counting, reading, right = [], [], 0.0, 0
    for path, label in recordings:
        begin = time.perf_counter()
        windows = list(cut_windows(path, duration=window * 1000, sensor_size=(34, 34)))
        reading += time.perf_counter() - begin
        counting += [w.seconds for w in windows]
        reports.append(StreamReport.of(stream(model, windows, states=False)))
        right += reports[-1].rows[-1].label == label
    milliseconds = 1e3 * np.array([row.seconds for report in reports for row in report.rows])
    late = sum(report.late for report in reports)
    return {
        "windows": len(milliseconds),
        "median_ms": float(np.median(milliseconds)),
        "percentile_99_ms": float(np.percentile(milliseconds, 99)),
        "most_ms": float(milliseconds.max()),
        "counting_ms": 1e3 * float(np.median(counting)),
        "reading_ms_per_window": 1e3 * reading / len(milliseconds),
        "late": late,
        "keeps_up": late <= 0.01 * len(milliseconds),
        "right": right / len(recordings),
    }


def main() -> None:
    parser = argument_parser(__doc__ or "", rounds=3, least=1)
    parser.add_argument("--data-dir", required=True, help="folder of N-MNIST")
    parser.add_argument("--window", type=int, default=10, help="milliseconds (%(default)s)")
    parser.add_argument("--limit", type=int, default=100, help="recordings (%(default)s)")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "int8"])
    parser.add_argument("--threads", type=int, help="of torch (default: as it is)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    keep_freed_memory()
    recordings = create_event_dataset("nmnist", args.data_dir, "test", time_steps=1).recordings
    recordings = recordings[:: max(len(recordings) // args.limit, 1)]
    model = timm.create_model("qkformer_hst3_128.nmnist", pretrained=True).eval()
    models = {precision: timm_qkformer.deploy(model, precision) for precision in args.precisions}
    results: dict[str, list[dict[str, float]]] = {precision: [] for precision in models}
    print(
        "| Precision | Windows | Median, ms | 99th percentile | Most | Late | Keeps up | Right |\n" + 8 * "|---" + "|"
    )
    for _ in range(args.rounds):
        for precision, runner in models.items():
            found = measure(runner, recordings, args.window)
            results[precision].append(found)
            print(
                f"| {precision} | {found['windows']} | {found['median_ms']:.2f} | {found['percentile_99_ms']:.2f} "
                f"| {found['most_ms']:.1f} | {found['late']} | {'yes' if found['keeps_up'] else 'NO'} "
                f"| {100 * found['right']:.0f} % |",
                flush=True,
            )
    args.out.mkdir(parents=True, exist_ok=True)
    found = {"environment": environment(), "window_ms": args.window, "rounds": results}
    write_json(found, args.out / "stream.json")


if __name__ == "__main__":
    main()
