"""Inference: a QKFormer as it is and deployed, beside spikingjelly 2.0's and timm's ANNs, in one run.

    python benchmarks/inference.py [--batch-size 1] [--rounds 5] [--out benchmarks/results]

Contenders take turns within every round; ratios are medians of the rounds' ratios. See benchmarks/README.md.
"""

import argparse
import copy
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import timm_qkformer
from _common import (
    ANN,
    OURS,
    OURS_SLOWER,
    PEER,
    Bar,
    Spread,
    argument_parser,
    draw_bars,
    environment,
    ratios,
    spikingjelly_like,
    take_turns,
    write_json,
)
from _runtimes import NEEDED, missing, run_in
from timm_qkformer.execution import keep_freed_memory
from timm_qkformer.inference.projection import Projection
from timm_qkformer.inference.weights import has_onednn, spikes_dtype

PLAIN, SPIKINGJELLY = "plain", "spikingjelly"
PRECISIONS = ("fp32", "bf16", "int8")
FORCED = tuple(f"{precision}, {products}" for precision in PRECISIONS for products in ("events", "dense"))
ANNS = ("deit_base_patch16_224", "swin_base_patch4_window7_224")
RUNTIMES = tuple(NEEDED)
# The same network, or the first ANN, in another runtime.
ELSEWHERE = (f"{PLAIN}, openvino", *(f"{ANNS[0]}, {runtime}" for runtime in RUNTIMES))
CONTENDERS = (SPIKINGJELLY, PLAIN, *PRECISIONS, *FORCED, *ANNS, *ELSEWHERE)
COLOURS = {
    SPIKINGJELLY: PEER,
    PLAIN: OURS_SLOWER,
    **dict.fromkeys(PRECISIONS, OURS),
    **dict.fromkeys(FORCED, OURS_SLOWER),
    **dict.fromkeys((*ANNS, *ELSEWHERE), ANN),
}

# The claims: spikingjelly's time over ours, ours over the better of all events and all dense, int8's over an ANN's.
TARGET_SPEEDUP = {"fp32": 4.0, "bf16": 4.5, "int8": 6.0}
TARGET_CHOICE = 1.02
TARGET_ANN = {ANNS[0]: 0.5, f"{ANNS[0]}, openvino": 1.4}


def lively(model: nn.Module, run: Callable[[nn.Module, Tensor], object], images: Tensor) -> nn.Module:
    """Batch norms as training leaves them, with the statistics of what they see: neurons fire throughout."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # all of the statistics are this batch's
    run(model.train(), images)
    return model.eval()


def run_spikingjelly(model: nn.Module, images: Tensor) -> Tensor:
    from spikingjelly.activation_based import functional

    functional.reset_net(model)  # a stateful network's rest
    return model(images)


def check_spikes(plain: nn.Module, size: int = 64) -> None:
    """Deployed in float64 it must be the plain model, spike for spike."""
    exact = copy.deepcopy(plain).double()
    images = torch.randn(1, plain.in_chans, size, size, dtype=torch.float64)
    if not torch.equal(timm_qkformer.deploy(exact).forward_features(images), exact.forward_features(images)):
        raise SystemExit("the deployed model's firing rates differ from the plain model's in float64")


def check_deployed(plain: nn.Module, deployed: nn.Module, precision: str, size: int = 64) -> float:
    """Cosine similarity of the deployed model's firing-rate map with the plain model's."""
    images = torch.randn(2, plain.in_chans, size, size)
    expected, found = plain.forward_features(images), deployed.forward_features(images)
    similarity = F.cosine_similarity(expected.flatten(), found.flatten(), 0).item()
    # Random weights have no margins: a rounding error flips spikes, and these others. Trained ones: docs/deploy.md.
    if not similarity > 0.3:
        raise SystemExit(f"{precision}: the firing-rate map's cosine similarity with the plain model's is {similarity}")
    return similarity


def count_operations(deployed: nn.Module, images: Tensor) -> tuple[int, float]:
    """Multiplications and additions of one forward pass's convolutions as dense products, and the share of their
    inputs that are not zero."""
    counted, of_events = 0, 0.0

    def count(projection: Projection, inputs: tuple[Tensor, ...], currents: Tensor) -> None:
        nonlocal counted, of_events
        operations = 2 * currents.numel() * projection.weight[0].numel()
        counted += operations
        of_events += operations * inputs[0].count_nonzero().item() / inputs[0].numel()

    handles = [m.register_forward_hook(count) for m in deployed.modules() if isinstance(m, Projection)]
    deployed(images)
    for handle in handles:
        handle.remove()
    return counted, of_events / counted


def matrix_product(dtype: torch.dtype, size: int) -> Callable[[], object]:
    """A large matrix product through oneDNN, in the arithmetic that goes with spikes of this dtype."""
    spikes = torch.randint(0, 2, (size, size)).to(dtype)
    weight = torch.randint(-127, 128, (size, size))
    if dtype == torch.uint8:
        scale, zero = torch.ones(size), torch.zeros(size, dtype=torch.int32)
        packed = torch.ops.onednn.qlinear_prepack(weight.to(torch.int8), [size, size])
        result = (torch.zeros(size), 1.0, 0, torch.float32, "none", [], "")
        return lambda: torch.ops.onednn.qlinear_pointwise(spikes, 1.0, 0, packed, scale, zero, *result)
    if has_onednn(dtype, spikes.device):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype), size)
        return lambda: torch.ops.mkldnn._linear_pointwise(spikes, packed, None, "none", [], "")
    matrix = weight.to(dtype)
    return lambda: spikes @ matrix


class Row(NamedTuple):
    """What a table's line says."""

    name: str
    milliseconds: Spread
    speedup: Spread | None  # against spikingjelly
    peak: float | None  # share of the matrix peak
    arithmetic: str


@torch.inference_mode()
def measure(args: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    images = torch.randn(args.batch_size, 3, args.size, args.size)
    statistics = torch.randn(2, 3, args.size, args.size)
    plain = lively(timm.create_model(args.model), nn.Module.__call__, statistics)
    deployments = (*PRECISIONS, *FORCED)
    if set(args.contenders) & set(deployments):
        check_spikes(plain)
    runs: dict[str, Callable[[], object]] = {}
    arithmetic: dict[str, torch.dtype] = {}
    similarity: dict[str, float] = {}
    chosen: dict[str, dict[str, str]] = {}
    dense = timm_qkformer.deploy(plain, products="dense")
    operations, share_of_events = count_operations(dense, images[:1])
    for name in args.contenders:
        if name == SPIKINGJELLY:
            runs[name] = partial(
                run_spikingjelly, lively(spikingjelly_like(plain), run_spikingjelly, statistics), images
            )
        elif name == PLAIN:
            runs[name] = partial(plain, images)
        elif name in deployments:
            precision, _, products = name.partition(", ")
            deployed = timm_qkformer.deploy(plain, precision, products or "auto", images=None if products else images)
            if not products:
                chosen[name] = deployed.products
            similarity[name] = check_deployed(plain, deployed, name)
            # The products that events replace are those of this precision.
            arithmetic[name] = spikes_dtype(precision, deployed.stem.projection.weight, False, deployed.numbers)
            runs[name] = partial(deployed, images)
        elif name in ELSEWHERE:
            network, _, runtime = name.partition(", ")
            if missing(runtime):
                print(f"{name}: {NEEDED[runtime]} is not installed, left out")
                continue
            model = copy.deepcopy(plain) if network == PLAIN else timm.create_model(network).eval()
            runs[name] = run_in(runtime, model, images)
        else:
            runs[name] = partial(timm.create_model(name).eval(), images)
    products = {f"peak {dtype}": matrix_product(dtype, args.peak_size) for dtype in set(arithmetic.values())}
    times = take_turns(runs | products, args.rounds, warm_up=args.warm_up)

    peaks = {precision: 2 * args.peak_size**3 / min(times[f"peak {dtype}"]) for precision, dtype in arithmetic.items()}
    rows = []
    for name in runs:
        spread = Spread.of(times[name])
        speedup = ratios(times[SPIKINGJELLY], times[name]) if SPIKINGJELLY in times else None
        share = len(images) * operations / spread.median / peaks[name] if name in peaks else None
        rows.append(Row(name, spread.scaled(1e3), speedup, share, str(arithmetic.get(name, torch.float32))[6:]))
    return {
        "rows": rows,
        "seconds": times,
        "operations_of_an_image": operations,
        "share_of_events": share_of_events,
        "operations_per_second_at_peak": peaks,
        "similarity_of_firing_rate_maps": similarity,
        "chosen_products": chosen,
    }


def print_table(result: dict[str, Any]) -> None:
    print(
        f"{'':30} {'ms (quartiles)':>32} {'against spikingjelly 2.0':>26} {'of peak':>8}  arithmetic of dense products"
    )
    for row in result["rows"]:
        speedup = f"{row.speedup:.2f}" if row.speedup else ""
        share = f"{100 * row.peak:.0f} %" if row.peak else ""
        print(f"{row.name:30} {f'{row.milliseconds:.0f}':>32} {speedup:>26} {share:>8}  {row.arithmetic}")
    print(f"of the convolutions' inputs {100 * result['share_of_events']:.1f} % are not zero, weighted by operations")
    for precision, peak in result["operations_per_second_at_peak"].items():
        print(f"matrix peak for {precision}: {peak / 1e9:.0f} G operations/s")
    rows = {row.name: row for row in result["rows"]}
    seconds = result["seconds"]
    for precision in PRECISIONS:
        if precision not in rows:
            continue
        speedup = rows[precision].speedup
        if speedup:
            _claim(f"{precision} against spikingjelly", speedup.median, TARGET_SPEEDUP[precision], at_least=True)
        layers = list(result["chosen_products"][precision].values())
        print(f"{precision}: {layers.count('events')} of {len(layers)} convolutions add events up")
        others = [name for name in FORCED if name.startswith(f"{precision},") and name in rows]
        if len(others) == 2:
            better = min(others, key=lambda name: rows[name].milliseconds.median)
            worth = ratios(seconds[precision], seconds[better]).median
            _claim(f"{precision}'s own choice over {better}", worth, TARGET_CHOICE, at_least=False)
    for name, target in TARGET_ANN.items():
        if "int8" in rows and name in rows:
            _claim(f"int8's time over {name}'s", ratios(seconds["int8"], seconds[name]).median, target, at_least=False)


def _claim(what: str, value: float, target: float, at_least: bool) -> None:
    reached = value >= target if at_least else value <= target
    bound = "at least" if at_least else "at most"
    print(f"{what}: {value:.2f}, target {bound} {target}: {'reached' if reached else 'NOT reached'}")


def main() -> None:
    parser = argument_parser(__doc__, rounds=5)
    parser.add_argument("--model", default="qkformer_hst10_768", help="a qkformer_hst10 model")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--warm-up", type=int, default=1, help="rounds before those that count")
    parser.add_argument("--contenders", nargs="+", default=CONTENDERS, choices=CONTENDERS)
    parser.add_argument("--keep-freed-memory", action="store_true", help="for all, as `keep_freed_memory` does")
    parser.add_argument("--peak-size", type=int, default=2048, help="side of the matrices for the matrix peak")
    args = parser.parse_args()
    if set(args.contenders) & {*ANNS, *ELSEWHERE} and args.size != 224:
        parser.error(f"--size={args.size}: {' and '.join(ANNS)} take 224, choose other --contenders")

    start = time.perf_counter()
    reuse = args.keep_freed_memory and keep_freed_memory()
    result = measure(args)
    title = f"{args.model}, T = 4, {args.size} px, batch {args.batch_size}, {torch.get_num_threads()} CPU threads"
    print(f"{title}, {args.rounds} rounds, {'freed memory reused' if reuse else 'plain malloc'}")
    print_table(result)

    args.out.mkdir(parents=True, exist_ok=True)
    name = f"inference_batch{args.batch_size}" + ("_kept_memory" if reuse else "")
    content = {
        **{key: value for key, value in vars(args).items() if key != "out"},
        "freed_memory_reused": reuse,
        **environment("timm", "spikingjelly"),
        **result,
        "rows": [row._asdict() for row in result["rows"]],
        "total_seconds": time.perf_counter() - start,
    }
    write_json(content, args.out / f"{name}.json")
    bars = [
        Bar(row.name, row.milliseconds, f"{row.speedup.median:.1f} x" if row.speedup else "", COLOURS[row.name])
        for row in result["rows"]
    ]
    draw_bars({"inference": bars}, "milliseconds", title, args.out / f"{name}.png")


if __name__ == "__main__":
    main()
