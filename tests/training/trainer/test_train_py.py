"""The same losses as timm's train.py, to the last digit, where it is at hand."""

import csv
import os
import shutil

import pytest
from tiny_runs import PLAIN, command, flags, run, write_recipe

from timm_qkformer.training.recipes import recipe_path
from timm_qkformer.training.trainer.config import parse_train
from timm_qkformer.training.trainer.engine import train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "TIMM_TRAIN_PY" not in os.environ, reason="set TIMM_TRAIN_PY to the train.py of a timm checkout"
    ),
]
COLUMNS = ("epoch", "train_loss", "eval_loss", "eval_top1", "eval_top5", "lr")


def rows(folder):
    with (folder / "summary.csv").open() as file:
        return [[float(row[name]) for name in COLUMNS] for row in csv.DictReader(file)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"workers": 2},
        {"no_prefetcher": True, "grad_accum_steps": 2, "clip_grad": 0.5},
        {**PLAIN, "opt": "sgd", "sched_on_updates": True, "layer_decay": 0.8, "bce_loss": True},
        {"model_ema": True, "model_ema_decay": 0.9, "cutmix": 1.0, "cutmix_minmax": [0.2, 0.8]},
        {"amp": True, "amp_dtype": "bfloat16"},
    ],
    ids=["recipe", "workers", "accumulation", "plain", "average", "amp"],
)
def test_losses(changes, data, tmp_path):
    recipe = write_recipe(tmp_path / "theirs.yaml", **changes)
    recipe.write_text("".join(line for line in recipe.open() if not line.startswith("tensorboard")))
    theirs = train_py(tmp_path, *flags(data, tmp_path, "theirs", recipe))
    ours = run(data, tmp_path, "ours", **changes)
    compare(rows(ours.folder), theirs, rel=1e-2 if changes.get("amp") else 1e-5)


@pytest.mark.parametrize("name", ["cpu_cifar10", "cpu_digits", "cpu_fashion_mnist"])
def test_recipes_shortened(name, data, tmp_path):
    short = ["--dataset", "", "--val-split", "test", "--epochs", "2", "--warmup-epochs", "1", "--batch-size", "8"]
    arguments = ["--data-dir", str(data), "--output", str(tmp_path), "--num-classes", "3", *short]
    theirs = train_py(tmp_path, "-c", str(recipe_path(name)), "--experiment", "theirs", *arguments)
    ours = train(parse_train(["-c", name, "--experiment", "ours", *arguments]))
    compare(rows(ours.folder), theirs, rel=1e-5)


def train_py(folder, *arguments):
    # Beside its checkout Python would import the timm there.
    script = shutil.copy(os.environ["TIMM_TRAIN_PY"], folder / "train.py")
    with command(str(script), *arguments) as process:
        out = process.stdout.read()
    assert process.returncode == 0, out
    return rows(folder / "theirs")


def compare(ours, theirs, rel):
    assert len(ours) == len(theirs) == 2
    for a, b in zip(ours, theirs, strict=True):
        assert a[:2] == b[:2]  # epoch and training loss
        assert a[2:] == pytest.approx(b[2:], rel=rel)  # train.py's validation adds up in float32, batch by batch
