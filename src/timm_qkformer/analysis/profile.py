"""Everything about a model at a glance: firing rates, operations and energy, parameters, memory and speed."""

import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor, nn

from ..data.sampling import draw
from .energy import AC_PJ, MAC_PJ, Energy, EnergyMeter
from .inputs import ModelInputs, find_files
from .memory import peak_memory
from .rates import FiringRates, RateMeter
from .running import Data, bare_model, inference, observe

__all__ = ["Profile", "Speed", "file_data", "noise_data", "profile"]

_ROUNDS = 5


@dataclass(frozen=True)
class Speed:
    """How fast batches run: median and quartiles of the rounds, the first one left out.

    Attributes:
        batch_size: Samples in a batch.
        rounds: Batches timed.
        per_second: Samples a second.
        quartiles: Lower and upper.
        device, dtype, threads: What it ran on.
    """

    batch_size: int
    rounds: int
    per_second: float
    quartiles: tuple[float, float]
    device: str
    dtype: str
    threads: int


@dataclass(frozen=True)
class Profile:
    """What `profile` measured.

    Attributes:
        model: Name of the model.
        weights: Where its weights come from.
        is_random: Whether they are untrained: then rates and energy say nothing about a trained model's.
        data: What it ran on.
        parameters: Of the model.
        peak_bytes: Of a forward pass of one batch, see `peak_memory`.
        speed: Of batches of the same size.
        rates, energy: Per layer and total.
    """

    model: str
    weights: str
    is_random: bool
    data: str
    parameters: int
    peak_bytes: int
    speed: Speed
    rates: FiringRates
    energy: Energy

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the attributes, with those of the parts."""
        return asdict(self)


def profile(
    model: nn.Module,
    data: Data,
    *,
    name: str = "",
    weights: str = "as given",
    is_random: bool = False,
    data_name: str = "as given",
    batch_size: int = 1,
    rounds: int = _ROUNDS,
    mac_pj: float = MAC_PJ,
    ac_pj: float = AC_PJ,
) -> Profile:
    """Measure a model on data, in one pass over it.

    Args:
        model: A model made of this package's layers, see `energy`.
        data: See `firing_rates`.
        name: Of the model. Empty: its class's.
        weights: Where they come from, for the report.
        is_random: Whether the model is untrained.
        data_name: What the data are, for the report.
        batch_size: Samples in the batches that are timed and whose memory is taken: the first of the data, over again
            if there are fewer.
        rounds: Batches timed, 2 or more.
        mac_pj, ac_pj: See `energy`.

    Raises:
        ValueError: As `energy`, and for a `batch_size` or `rounds` that is too small.
    """
    if batch_size < 1 or rounds < 2:
        raise ValueError(f"batch_size={batch_size} must be at least 1, rounds={rounds} at least 2")
    model = bare_model(model)
    first: list[Tensor] = []

    def keep_first(x: Tensor) -> None:
        if len(first) < batch_size:
            first.append(x)

    rate_meter, energy_meter = RateMeter(), EnergyMeter()
    samples, shape = observe(model, data, [rate_meter, energy_meter], keep_first)
    batch = torch.cat([first[i % len(first)] for i in range(batch_size)])
    return Profile(
        name or type(model).__name__,
        weights,
        is_random,
        data_name,
        sum(p.numel() for p in model.parameters()),
        peak_memory(model, batch),
        _speed(model, batch, rounds),
        rate_meter.result(samples, shape),
        energy_meter.result(samples, shape, mac_pj, ac_pj),
    )


def noise_data(model: Any, samples: int, seed: int = 0) -> tuple[str, Iterator[Tensor]]:
    """Noise of the shape of a model's input, and what to call it.

    Images are normally distributed, mean 0 and variance 1, as normalised pixels are on average; clips for models of two
    channels, which are for events, have a count drawn from a Poisson distribution of mean 0.1 in every pixel and step.
    """
    if samples < 1:
        raise ValueError(f"samples={samples} must be at least 1")
    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    _, height, width = config.get("input_size", (3, 224, 224))
    generator = torch.Generator().manual_seed(seed)
    if model.in_chans == 2:
        shape = (1, model.time_steps, 2, height, width)
        drawn = (torch.poisson(torch.full(shape, 0.1), generator) for _ in range(samples))
        return f"{samples} clips of random noise (Poisson counts of mean 0.1, seed {seed}), no real recordings", drawn
    drawn = (torch.randn(1, model.in_chans, height, width, generator=generator) for _ in range(samples))
    return f"{samples} images of random noise (normally distributed, seed {seed}), no real images", drawn


def file_data(
    model: Any, folder: Path, limit: Optional[int] = None, sensor_size: Optional[tuple[int, int]] = None
) -> tuple[str, Iterator[Tensor]]:
    """Images or recordings below a folder as the model takes them, one by one, and what to call them.

    Args:
        model: A model with its config.
        folder: Folder, or a file.
        limit: Take so many, the first ones of a fixed random order of all. None: all, sorted.
        sensor_size: (height, width) of the event camera, see `ModelInputs`.

    Raises:
        ValueError: For a `limit` below 1, or files that the model cannot take.
        FileNotFoundError: If there is no such folder.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1")
    files = find_files(folder)
    name = f"{len(files)} files of {folder.name}"
    drawn = draw(files, limit)
    if len(drawn) < len(files):
        name = f"{limit} of {name}, drawn at random"
    inputs = ModelInputs(model, sensor_size)
    return name, (inputs.read(path).x for path in drawn)


@torch.no_grad()
def _speed(model: nn.Module, batch: Tensor, rounds: int) -> Speed:
    seconds = []
    with inference(model):
        for _ in range(rounds + 1):
            start = time.perf_counter()
            model(batch)
            if batch.is_cuda:
                torch.cuda.synchronize(batch.device)
            seconds.append(time.perf_counter() - start)
    rates = [len(batch) / elapsed for elapsed in seconds[1:]]
    lower, median, upper = statistics.quantiles(rates, n=4)
    dtype = str(batch.dtype).removeprefix("torch.")
    return Speed(len(batch), rounds, median, (lower, upper), str(batch.device), dtype, torch.get_num_threads())
