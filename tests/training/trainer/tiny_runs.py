"""Folders of generated pictures, and runs of a tiny model on them."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from timm_qkformer.training.trainer import engine
from timm_qkformer.training.trainer.config import parse_train
from timm_qkformer.training.trainer.engine import TrainResult, train

CLASSES = ("ant", "bee", "cat")
SRC = Path(__file__).resolve().parents[3] / "src"

# Everything that draws random numbers, in the main process and in workers.
RECIPE = {
    "val_split": "test",
    "model": "qkformer_hst4_384",
    "num_classes": 3,
    "model_kwargs": {
        "patch_embed": "imagenet",
        "embed_dims": [8, 16, 32],
        "depths": [1, 1, 1],
        "num_heads": 4,
        "time_steps": 2,
    },
    "device": "cpu",
    "amp": False,
    "batch_size": 4,
    "opt": "adamw",
    "weight_decay": 0.05,
    "lr": 0.01,
    "sched": "cosine",
    "epochs": 2,
    "warmup_epochs": 0,
    "scale": [0.6, 1.0],
    "aa": "rand-m7-n1-mstd0.4-inc1",
    "reprob": 0.5,
    "mixup": 0.2,
    "mixup_prob": 0.5,
    "drop_path": 0.2,
    "crop_pct": 1.0,
    "workers": 0,
    "log_interval": 1,
    "tensorboard": False,
}
# The same without anything random but the order.
PLAIN = {"no_aug": True, "mixup": 0.0, "reprob": 0.0, "drop_path": 0.0}


def make_images(root: Path, train: int = 8, test: int = 5, classes: tuple[str, ...] = CLASSES) -> Path:
    """root/{train,test}/<class>/<i>.png: noise, brighter in one colour for each class."""
    rng = np.random.default_rng(0)
    for split, number in (("train", train), ("test", test)):
        for c, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(number):
                pixels = rng.integers(0, 120, (36, 36, 3), dtype=np.uint8)
                pixels[:, :, c % 3] += 100
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def write_recipe(path: Path, **changes) -> Path:
    path.write_text(yaml.safe_dump({**RECIPE, **changes}))
    return path


def flags(data: Path, output: Path, experiment: str, recipe: Path, *more: str) -> list[str]:
    return ["-c", str(recipe), "--data-dir", str(data), "--output", str(output), "--experiment", experiment, *more]


def run(data: Path, output: Path, experiment: str = "run", *more: str, **changes) -> TrainResult:
    """Train in this process."""
    output.mkdir(exist_ok=True)
    recipe = write_recipe(output / "recipe.yaml", **changes)
    return train(parse_train(flags(data, output, experiment, recipe, *more)))


def run_and_stop(updates: int, *args, **kwargs) -> None:
    """Train, and break off after so many updates, as if nothing could be done any more."""
    real, seen = engine.Progress.update, []

    def update(self, *args):
        real(self, *args)
        seen.append(None)
        if len(seen) > updates:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.Progress, "update", update)
        with pytest.raises(KeyboardInterrupt):
            run(*args, **kwargs)


def command(*arguments: str, **kwargs) -> subprocess.Popen:
    """Start the command line in a process of its own, on one thread."""
    environment = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **kwargs,
    )


def weights(folder: Path, key: str = "state_dict") -> dict[str, torch.Tensor]:
    return torch.load(folder / "last.pth.tar", weights_only=True)[key]


def same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
