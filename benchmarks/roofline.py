"""What bounds event-driven inference: its additions, or the weights' way from the caches.

    python benchmarks/roofline.py [--rounds 5] [--out benchmarks/results]

First what the processor adds up in one endless row of spikes, weights in the first cache; then the kernel alone, all
inputs spiking, with weights that stay in the first cache or come from the second; then each convolution of
QKFormer-10-768 on the spikes it sees, and the whole deployed model: additions of weights a second, and their share of
the processor's. See benchmarks/README.md.
"""

import argparse
import ctypes
import time
from collections.abc import Callable
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

import timm_qkformer
from _common import Spread, argument_parser, environment, take_turns, write_json
from inference import lively
from timm_qkformer.execution import compiler
from timm_qkformer.execution.events import EventWeights
from timm_qkformer.execution.libraries import COMMON, Source
from timm_qkformer.inference.projection import Projection

PRECISIONS = {"fp32": torch.float32, "int8": torch.int8}
# Input channels with which a tile's weights, of 64 outputs, fit into the first cache of 32 KB, or the second alone.
CEILINGS = {"fp32": {"first cache": 64, "second cache": 1024}, "int8": {"first cache": 256, "second cache": 4096}}


class Layer(NamedTuple):
    """A convolution of spikes as a model runs it."""

    name: str
    projection: Projection
    spikes: Tensor  # [M, H, W, C], bytes

    @property
    def additions(self) -> float:
        """Of weights: spikes (sums of several count once) times outputs that see them, as far as borders allow."""
        weight = self.projection.weight
        outputs = weight.shape[0] * weight.shape[2] * weight.shape[3] / self.projection.stride**2
        return float(self.spikes.count_nonzero()) * outputs


def layers_of(model: nn.Module, precision: str, images: Tensor) -> tuple[nn.Module, list[Layer]]:
    """The model deployed with events everywhere, and its convolutions of spikes with their inputs."""
    dense = timm_qkformer.deploy(model, precision, products="dense")
    found: list[Layer] = []

    def see(projection: Projection, inputs: tuple[Tensor, ...], _: Tensor, name: str) -> None:
        x = inputs[0]
        spikes = x.to(torch.uint8)
        if (
            EventWeights.take(projection.weight, spikes)
            and projection.groups == 1
            and torch.equal(spikes.to(x.dtype), x)
        ):
            found.append(Layer(name, projection, spikes))

    for name, module in dense.named_modules():
        if isinstance(module, Projection):
            module.register_forward_hook(partial(see, name=name))
    dense(images)
    return timm_qkformer.deploy(model, precision, products="events"), found


@cache
def library() -> ctypes.CDLL:
    common = files("timm_qkformer.execution") / COMMON
    return compiler.load(Source.of(common, Path(__file__).with_suffix(".cpp")).whole(), "roofline")


def endless_row(dtype: torch.dtype, events: int = 2**20) -> tuple[Callable[[], object], float]:
    """The kernel's inner loop without end, weights in the first cache, and its additions."""
    threads, width = torch.get_num_threads(), 64
    weights = torch.zeros(64 * 4 // dtype.itemsize, width, dtype=dtype)  # 16 KB
    rows = torch.randint(len(weights), (events,), dtype=torch.int16)
    sums = torch.empty(threads, width, dtype=torch.float32)
    add = getattr(library(), f"add_{str(dtype).removeprefix('torch.')}")
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (weights, rows)]
    operands = [*pointers, ctypes.c_int64(events), ctypes.c_void_p(sums.data_ptr()), ctypes.c_int(threads)]

    def run(*_: Tensor) -> None:
        add(*operands)

    return partial(run, weights, rows, sums), float(events * width * threads)  # tensors live as long as their addresses


def kernel(
    dtype: torch.dtype, channels: int, outputs: int = 1024, pixels: int = 1024
) -> tuple[Callable[[], Tensor], float]:
    """A 1x1 convolution in which every input spikes, and its additions."""
    weight = torch.randn(outputs, channels, 1, 1)
    scale = torch.ones(outputs) if dtype == torch.int8 else None
    weight = (weight * 30).round().clamp(-127, 127) if dtype == torch.int8 else weight
    pixels = max(pixels * 64 // channels, 128)
    x = torch.ones(1, pixels, 1, channels, dtype=torch.uint8)
    return partial(EventWeights(weight.to(dtype), torch.zeros(outputs), scale, 1).currents, x), float(
        x.numel() * outputs
    )


def run(layer: Layer) -> Callable[[], Tensor]:
    projection = layer.projection
    weights = EventWeights(projection.weight, projection.bias, projection.scale, projection.stride)
    return partial(weights.currents, layer.spikes)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    images = torch.randn(1, 3, args.size, args.size)
    plain = lively(timm.create_model(args.model), nn.Module.__call__, torch.randn(2, 3, args.size, args.size))
    result: dict[str, Any] = {}
    for precision, dtype in PRECISIONS.items():
        deployed, layers = layers_of(plain, precision, images)
        additions = {layer.name: layer.additions for layer in layers}
        runs: dict[str, Callable[[], object]] = {layer.name: run(layer) for layer in layers}
        runs["endless row"], additions["endless row"] = endless_row(dtype)
        for place, channels in CEILINGS[precision].items():
            runs[place], additions[place] = kernel(dtype, channels)
        runs["model"], additions["model"] = partial(deployed, images), sum(layer.additions for layer in layers)
        times = {name: Spread.of(values) for name, values in take_turns(runs, args.rounds).items()}
        rates = {name: additions[name] / spread.median for name, spread in times.items()}
        top = rates["endless row"]
        print(f"{precision}, G additions a second: {top / 1e9:.1f} in an endless row", end=", ")
        print(", ".join(f"{rates[place] / 1e9:.1f} from the {place}" for place in CEILINGS[precision]))
        print(f"{'':44}{'spiking':>8}{'G additions':>13}{'ms':>8}{'of the endless row':>20}")
        for layer in sorted(layers, key=lambda layer: -times[layer.name].median)[: args.rows]:
            density = layer.spikes.count_nonzero().item() / layer.spikes.numel()
            milliseconds, share = 1e3 * times[layer.name].median, rates[layer.name] / top
            count = additions[layer.name] / 1e9
            print(f"{layer.name:44}{density:>8.0%}{count:>13.2f}{milliseconds:>8.1f}{share:>20.0%}")
        alone = sum(times[layer.name].median for layer in layers)
        print(
            f"{'convolutions, each by itself':52}{additions['model'] / 1e9:>13.2f}{1e3 * alone:>8.1f}"
            f"{additions['model'] / alone / top:>20.0%}"
        )
        print(
            f"{'the whole model':52}{additions['model'] / 1e9:>13.2f}{1e3 * times['model'].median:>8.1f}"
            f"{rates['model'] / top:>20.0%}"
        )
        result[precision] = {"additions": additions, "seconds": times, "convolutions_seconds": alone}
    return result


def main() -> None:
    parser = argument_parser(__doc__, rounds=5)
    parser.add_argument("--model", default="qkformer_hst10_768", help="a qkformer_hst10 model")
    parser.add_argument("--size", type=int, default=224, help="height and width of the image")
    parser.add_argument("--rows", type=int, default=10, help="layers to print, slowest first")
    args = parser.parse_args()
    start = time.perf_counter()
    with torch.inference_mode():
        result = measure(args)
    args.out.mkdir(parents=True, exist_ok=True)
    content = {"model": args.model, "size": args.size, "rounds": args.rounds, **environment("timm"), **result}
    write_json({**content, "total_seconds": time.perf_counter() - start}, args.out / "roofline.json")


if __name__ == "__main__":
    main()
