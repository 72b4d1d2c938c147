"""The same losses as timm's train.py, to the last digit, where it is at hand."""

import csv
import os
import shutil

import pytest
from tiny_runs import PLAIN, command, flags, run, write_recipe

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
        {"amp": True, "amp_dtype": "bfloat16", "channels_last": True},
    ],
    ids=["recipe", "workers", "accumulation", "plain", "average", "amp"],
)
def test_losses(changes, data, tmp_path):
    # Beside its checkout Python would import the timm there.
    script = shutil.copy(os.environ["TIMM_TRAIN_PY"], tmp_path / "train.py")
    recipe = write_recipe(tmp_path / "theirs.yaml", **changes)
    recipe.write_text("".join(line for line in recipe.open() if not line.startswith("tensorboard")))
    with command(str(script), *flags(data, tmp_path, "theirs", recipe)) as process:
        out = process.stdout.read()
    assert process.returncode == 0, out
    ours = run(data, tmp_path, "ours", **changes)
    theirs = rows(tmp_path / "theirs")
    assert len(theirs) == 2
    for a, b in zip(rows(ours.folder), theirs, strict=True):
        assert a[:2] == b[:2]
        # train.py's validation adds up in float32, batch by batch.
        assert a[2:] == pytest.approx(b[2:], rel=1e-5 if not changes.get("amp") else 1e-2)
