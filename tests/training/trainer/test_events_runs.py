"""Training and validating on recordings of events."""

import sys

import pytest
import torch
from tiny_runs import flags, run, run_and_stop, same_weights, weights, write_recipe

from event_files import random_events, write_aedat4, write_atis
from timm_qkformer import cli
from timm_qkformer.training.trainer.evaluate import resolve_validate, validate

CHANGES = {
    "dataset": "events/folder",
    "event_sensor_size": [34, 34],
    "model": "qkformer_hst2_256",
    "num_classes": 2,
    "model_kwargs": {"embed_dims": [8, 16, 32], "num_heads": 4, "time_steps": 2},
    "input_size": [2, 32, 32],
    "scale": [0.08, 1.0],
    "aa": "snn-wide",
    "reprob": 0.0,
    "crop_pct": None,
    "mean": [0.0, 0.0],
    "std": [1.0, 1.0],
    "mixup": 0.5,
    "mixup_off_epoch": 1,
}


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    root = tmp_path_factory.mktemp("events")
    for split, number in (("train", 7), ("test", 3)):
        for c, name in enumerate(("clap", "wave")):
            (root / split / name).mkdir(parents=True)
            for i in range(number):
                write_atis(root / split / name / f"{i}.bin", random_events(300 + 500 * c, seed=10 * i + c))
    return root


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_run_ends_with_the_same_weights(workers, recordings, tmp_path):
    changes = {**CHANGES, "workers": workers, "recovery_interval": 1}
    whole = run(recordings, tmp_path, "whole", **changes)
    run_and_stop(2, recordings, tmp_path, "stopped", **changes)
    resumed = run(recordings, tmp_path, "stopped", "--resume", "auto", **changes)
    assert same_weights(weights(whole.folder), weights(resumed.folder))
    assert 0 < whole.history[-1]["firing_rate"] < 1


def test_the_default_split_and_flags_in_errors(recordings, tmp_path):
    facts = run(
        recordings, tmp_path, "run", **{**CHANGES, "val_split": "validation", "epochs": 1, "input_size": [2, 32, 24]}
    )
    data = torch.load(facts.folder / "last.pth.tar", weights_only=True)["trainer"]["data"]
    assert data["input_size"] == [2, 32, 24]
    assert data["events"] == {"name": "folder", "time_steps": 2, "split_by": "number", "size": [32, 24],
                              "sensor_size": [34, 34]}  # fmt: skip
    with pytest.raises(ValueError, match=r"^--train-split: split='trian' needs to be one of"):
        run(recordings, tmp_path, "x", **CHANGES, train_split="trian")


def test_validation_agrees_and_does_not_depend_on_batches(recordings, tmp_path):
    result = run(recordings, tmp_path, "run", **CHANGES)
    row = result.history[-1]
    for batch_size in (1, 4):
        given = {"model": CHANGES["model"], "data_dir": str(recordings), "device": "cpu", "workers": 0}
        given |= {"checkpoint": str(result.folder / "last.pth.tar"), "batch_size": batch_size}
        measured = validate(resolve_validate(given), show=False)
        assert measured["samples"] == 6
        assert measured["top1"] == pytest.approx(row["eval_top1"])
        assert measured["loss"] == pytest.approx(row["eval_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 3}, r"has 2 classes \(clap, wave\), but the model has num_classes=3"),
        ({"in_chans": 3, "input_size": None, "mean": None, "std": None}, "has samples of 2 channels, but the model"),
        ({"event_sensor_size": None}, "sensor_size"),
        ({"dataset": "events/nothing"}, "name='nothing' is unknown"),
    ],
)
def test_bad_settings(changes, message, recordings, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(recordings, tmp_path, "run", **{**CHANGES, **changes})


def test_recordings_without_the_package_that_reads_them(tmp_path, monkeypatch, capsys):
    for split in ("train", "test"):
        for name in ("clap", "wave"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            write_aedat4(tmp_path / "data" / split / name / "a.aedat4", random_events(100))
    monkeypatch.setitem(sys.modules, "aedat", None)
    recipe = write_recipe(tmp_path / "recipe.yaml", **CHANGES)
    assert cli.main(["train", *flags(tmp_path / "data", tmp_path, "run", recipe)]) == 2
    assert "aedat is missing: pip install 'timm-qkformer[events]'" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 1])
def test_a_recording_spoilt_while_training_is_named(workers, recordings, tmp_path):
    import shutil

    root = shutil.copytree(recordings, tmp_path / "spoilt")
    real = torch.nn.Module.train

    def spoil(self, mode=True):  # when the data set has been checked already
        for path in (root / "train" / "wave").iterdir():
            path.write_bytes(b"123")
        return real(self, mode)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "timm_qkformer.training.trainer.loop.TrainLoader.begin", lambda *_, **__: spoil(torch.nn.Identity())
        )
        with pytest.raises(ValueError, match=r"wave.*\.bin: has 3 bytes") as error:
            run(root, tmp_path, "run", **{**CHANGES, "workers": workers})
    assert "\n" not in str(error.value)
