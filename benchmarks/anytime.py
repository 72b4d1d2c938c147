"""Anytime inference: a deployed model that stops early beside the same with all of its steps, in one run.

    python benchmarks/anytime.py --data-dir cifar10 [--rounds 5] [--batch-size 64] [--limit 1000]

Both classify the same test images in the same batches, in turns. The threshold is the shipped one, or --threshold's.
See benchmarks/README.md.
"""

import time
from typing import Any

import timm
import torch
from timm.data import create_dataset, create_transform, resolve_model_data_config
from torch import Tensor

import timm_qkformer
from _common import (
    OURS,
    OURS_SLOWER,
    Bar,
    Spread,
    argument_parser,
    draw_bars,
    environment,
    ratios,
    take_turns,
    write_json,
)
from timm_qkformer.data.sampling import draw

TARGET_RATIO, TARGET_STEPS, TARGET_POINTS = 0.6, 1.9, 0.2


def load_images(model: Any, folder: str, split: str, limit: int | None) -> tuple[Tensor, Tensor]:
    """Images as the model takes them, and their classes."""
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    dataset = create_dataset("", folder, split=split, transform=transform)
    samples = [dataset[i] for i in draw(range(len(dataset)), limit)]
    return torch.stack([x for x, _ in samples]), torch.tensor([target for _, target in samples])


@torch.inference_mode()
def measure(args: Any) -> dict[str, Any]:
    model = timm.create_model(args.model, pretrained=True).eval()
    x, targets = load_images(model, args.data_dir, args.split, args.limit)
    deployed = timm_qkformer.deploy(model, args.precision)
    early = timm_qkformer.anytime(deployed, args.exit, args.threshold)
    batches = x.split(args.batch_size)
    answers: dict[str, Any] = {}

    def run_all() -> None:
        answers["all"] = [deployed(batch) for batch in batches]

    def run_early() -> None:
        answers["early"] = [early(batch) for batch in batches]

    times = take_turns({"all": run_all, "early": run_early}, args.rounds, warm_up=1)
    steps = torch.cat([result.steps for result in answers["early"]])
    predictions = {
        "all": torch.cat(answers["all"]).argmax(1),
        "early": torch.cat([result.logits for result in answers["early"]]).argmax(1),
    }
    top1 = {name: 100.0 * (found == targets).double().mean().item() for name, found in predictions.items()}
    share = ratios(times["early"], times["all"])  # early's time over that of all
    return {
        "rule": repr(early.rule),
        "images": len(x),
        "time_steps": deployed.time_steps,
        "mean_steps": steps.double().mean().item(),
        "stopped_after": steps.bincount(minlength=deployed.time_steps + 1)[1:].tolist(),
        "top1": top1,
        "seconds": times,
        "milliseconds_per_image": {n: Spread.of(t).scaled(1e3 / len(x)) for n, t in times.items()},
        "ratio": share,
    }


def main() -> None:
    parser = argument_parser(__doc__, rounds=5)
    parser.add_argument("--data-dir", required=True, metavar="DIR", help="images in folders, DIR/SPLIT/CLASS")
    parser.add_argument("--split", default="test")
    parser.add_argument("--model", default="qkformer_hst3_192.cifar10")
    parser.add_argument("--precision", default="int8", choices=("fp32", "bf16", "int8"))
    parser.add_argument("--exit", choices=("confidence", "margin", "entropy"), help="default: the model's own")
    parser.add_argument("--threshold", type=float, help="default: the model's own")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--limit", type=int, default=1000, help="images, drawn at random (%(default)s)")
    args = parser.parse_args()
    start = time.perf_counter()
    result = measure(args)
    T, top1 = result["time_steps"], result["top1"]
    title = f"{args.model}, {args.precision}, batch {args.batch_size}, {torch.get_num_threads()} CPU threads"
    print(f"{title}, {result['images']:,} images, {args.rounds} rounds; {result['rule']}")
    for name, label in (("all", f"T = {T}"), ("early", f"{result['mean_steps']:.2f} steps on average")):
        print(f"{label:>28}: {top1[name]:6.2f} %, {result['milliseconds_per_image'][name]:.2f} ms an image")
    print(f"stopped after 1 to {T} steps: {result['stopped_after']}")
    for claim, value, target in (
        ("time over that of all steps", result["ratio"].median, TARGET_RATIO),
        ("mean steps", result["mean_steps"], TARGET_STEPS),
        ("points lost", top1["all"] - top1["early"], TARGET_POINTS),
    ):
        print(f"{claim}: {value:.3f}, target at most {target}: {'reached' if value <= target else 'NOT reached'}")
    print(f"ratio with quartiles: {result['ratio']:.3f}")

    args.out.mkdir(parents=True, exist_ok=True)
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "data_dir")}
    content = {**settings, **environment("timm"), **result, "total_seconds": time.perf_counter() - start}
    write_json(content, args.out / "anytime.json")
    bars = [
        Bar(f"T = {T}", result["milliseconds_per_image"]["all"], f"{top1['all']:.2f} %", OURS_SLOWER),
        Bar(
            f"{result['mean_steps']:.2f} steps",
            result["milliseconds_per_image"]["early"],
            f"{top1['early']:.2f} %",
            OURS,
        ),
    ]
    draw_bars({"anytime inference": bars}, "milliseconds an image", title, args.out / "anytime.png")


if __name__ == "__main__":
    main()
