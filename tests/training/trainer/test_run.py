"""What a run leaves behind, and what stops it."""

import csv
import json
import re
import resource
import subprocess
from contextlib import contextmanager
from dataclasses import replace
from urllib.error import URLError

import pytest
import timm
import torch
import yaml
from PIL import Image
from timm.models import load_checkpoint
from tiny_runs import PLAIN, RECIPE, flags, make_images, run, same_weights, weights, write_recipe

from timm_qkformer import cli
from timm_qkformer.hub.checkpoints import read_checkpoint
from timm_qkformer.training.trainer import data as trainer_data
from timm_qkformer.training.trainer import loop
from timm_qkformer.training.trainer.config import parse_train
from timm_qkformer.training.trainer.distributed import Processes
from timm_qkformer.training.trainer.engine import train


@pytest.fixture
def fails(capsys, tmp_path):
    """Train, and return the one line of an error, with exit status 2."""

    def fails(data, *more, experiment="run", **changes):
        recipe = write_recipe(tmp_path / "recipe.yaml", **changes)
        assert cli.main(["train", *flags(data, tmp_path, experiment, recipe, *more)]) == 2
        err = capsys.readouterr().err.strip().splitlines()
        errors = [line for line in err if line.startswith("timm-qkformer: error: ")]
        assert len(errors) == 1
        assert err[-1] == errors[0]
        return errors[0].removeprefix("timm-qkformer: error: ")

    return fails


def test_files_and_columns(data, tmp_path, capsys):
    pytest.importorskip("tensorboard")
    result = run(data, tmp_path, "run", tensorboard=True, checkpoint_hist=1)
    names = {path.name for path in result.folder.iterdir()}
    assert {"args.yaml", "summary.csv", "last.pth.tar", "model_best.pth.tar"} < names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert len([name for name in names if name.startswith("checkpoint-")]) == 1
    with (result.folder / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    train_py = ["epoch", "train_loss", "eval_loss", "eval_top1", "eval_top5", "lr"]
    assert list(rows[0]) == [*train_py, "images_per_second", "firing_rate"]
    assert len(rows) == 2
    assert 0 < float(rows[1]["firing_rate"]) < 1
    assert float(rows[1]["images_per_second"]) > 0
    out = capsys.readouterr().out
    assert "epoch 1 [6/6] loss" in out
    assert "best top1" in out


def test_json_is_all_that_train_prints(data, tmp_path, capsys):
    recipe = write_recipe(tmp_path / "recipe.yaml", **PLAIN, epochs=1)
    assert cli.main(["train", *flags(data, tmp_path, "run", recipe), "--json"]) == 0
    printed = capsys.readouterr()
    values = json.loads(printed.out)
    assert values["folder"] == str(tmp_path / "run")
    assert [row["epoch"] for row in values["history"]] == [0]
    assert "done: " in printed.err


def test_curves_are_drawn(data, tmp_path):
    pytest.importorskip("matplotlib")
    folder = run(data, tmp_path, "run", **PLAIN).folder
    with Image.open(folder / "curves.png") as picture:
        assert picture.width > 1000
        grey = picture.convert("L")
        colours = {rgb[:3] for _, rgb in picture.convert("RGB").getcolors(1 << 20)}
    assert len(grey.getcolors(256)) > 20
    assert all(max(c) - min(c) <= 2 for c in colours), "readable in grey: there is nothing but grey"


def test_it_learns(data, tmp_path):
    small = {"model": "test_resnet", "model_kwargs": {}, "input_size": [3, 32, 32], "epochs": 6, "lr": 0.01}
    result = run(data, tmp_path, "run", **{**PLAIN, **small})
    assert result.history[-1]["train_loss"] < 0.75 * result.history[0]["train_loss"]
    assert result.history[-1]["firing_rate"] is None
    assert result.best_metric > 60


def test_weights_load_in_timm(data, tmp_path):
    folder = run(data, tmp_path, "run", epochs=1, model_ema=True, model_ema_decay=0.5).folder
    model = timm.create_model(RECIPE["model"], num_classes=3, **RECIPE["model_kwargs"])
    load_checkpoint(model, str(folder / "last.pth.tar"))
    assert same_weights(dict(model.state_dict()), weights(folder, "state_dict_ema"))
    # The reader of `convert` and `profile`, which allows fewer kinds of objects than torch does.
    assert same_weights(read_checkpoint(folder / "last.pth.tar").tensors, weights(folder, "state_dict_ema"))
    again = run(data, tmp_path, "again", "--initial-checkpoint", str(folder / "last.pth.tar"), epochs=1, lr=1e-12)
    old, new = weights(folder, "state_dict_ema"), weights(again.folder)
    assert all(torch.allclose(old[n], new[n], atol=1e-6) for n, _ in model.named_parameters())


@pytest.mark.parametrize(
    "changes",
    [
        {"bce_loss": True, "cutmix": 1.0},
        {"bce_loss": True, "mixup": 0.0, "val_split": "", "grad_checkpointing": True},
        {"clip_grad": 0.1, "clip_mode": "agc", "opt": "sgd", "lr_base": 0.1, "lr": None, "layer_decay": 0.5},
    ],
    ids=["cutmix", "no validation", "agc"],
)
def test_other_losses_and_optimizers(changes, data, tmp_path):
    result = run(data, tmp_path, "run", epochs=1, **changes)
    row = result.history[0]
    assert 0 < row["train_loss"] < 10
    if changes.get("val_split") == "":
        assert "eval_top1" not in row
        assert result.best_metric == row["train_loss"]


@pytest.mark.parametrize("workers", [0, 1])
def test_mixup_stops_at_its_epoch(workers, data, tmp_path, monkeypatch):
    real_begin, real_prepare = loop.TrainLoader.begin, loop._prepare
    mixed = {}  # epoch: whether a batch had targets of several classes

    def begin(self, epoch, mixup):
        mixed[epoch] = False
        real_begin(self, epoch, mixup)

    def prepare(parts, x, target):
        x, target = real_prepare(parts, x, target)
        mixed[max(mixed)] |= bool((target.sort(1).values[:, -2] > 0.02).any())
        return x, target

    monkeypatch.setattr(loop.TrainLoader, "begin", begin)
    monkeypatch.setattr(loop, "_prepare", prepare)
    changes = {"mixup": 5.0, "mixup_prob": 1.0, "mixup_off_epoch": 1, "smoothing": 0.03}
    run(data, tmp_path, "run", workers=workers, **changes)
    assert mixed == {0: True, 1: False}


def test_a_loss_that_is_not_finite_stops_the_run(data, tmp_path, fails, monkeypatch):
    real, calls = torch.nn.functional.log_softmax, []

    def log_softmax(*args, **kwargs):  # of the training loss
        calls.append(None)
        return real(*args, **kwargs) * (float("nan") if len(calls) == 9 else 1.0)

    monkeypatch.setattr(torch.nn.functional, "log_softmax", log_softmax)
    error = fails(data, recovery_interval=2)
    newest = tmp_path / "run" / "recovery-1-2.pth.tar"
    assert error == f"the loss is nan at step 8 (epoch 1, learning rate 0.005); the last good checkpoint is {newest}"
    assert all(w.isfinite().all() for w in torch.load(newest, weights_only=True)["state_dict"].values())


def test_a_loss_that_is_not_finite_on_another_process(data, tmp_path, fails, monkeypatch):
    real = loop._require_finite

    def require_finite(loss, parts, *where):
        if where[1] == 2:  # as if a second process were there and had found it
            monkeypatch.setattr(torch.distributed, "all_reduce", lambda bad: bad.add_(1))
            parts = replace(parts, processes=replace(parts.processes, distributed=True))
        real(loss, parts, *where)

    monkeypatch.setattr(loop, "_require_finite", require_finite)
    monkeypatch.setattr("timm_qkformer.training.trainer.engine.join_processes", one_process)
    error = fails(data, recovery_interval=1)
    newest = tmp_path / "run" / "recovery-0-2.pth.tar"
    reason = "the loss is not finite on another process at step 2 (epoch 0, learning rate 0.01)"
    assert error == f"{reason}; the last good checkpoint is {newest}"


@contextmanager
def one_process(device):
    """`join_processes` without a group to leave."""
    yield Processes(torch.device(device))


def test_weights_that_are_not_finite_are_not_saved(data, tmp_path, fails, monkeypatch):
    calls = []

    def clip(parameters, **_):
        calls.append(None)
        if len(calls) == 4:
            next(iter(parameters)).grad.fill_(float("nan"))

    monkeypatch.setattr(loop, "dispatch_clip_grad", clip)
    error = fails(data, recovery_interval=1, clip_grad=1.0)
    assert "not finite" in error
    assert error.endswith("recovery-0-3.pth.tar")


def test_without_a_schedule_the_learning_rate_stays(data, tmp_path):
    history = run(data, tmp_path, "run", **PLAIN, sched="none", lr=0.02).history
    assert [row["lr"] for row in history] == [0.02, 0.02]


def test_a_later_start_has_its_learning_rate(data, tmp_path):
    last = run(data, tmp_path, "whole", **PLAIN, epochs=3)
    weights_alone = str(last.folder / "checkpoint-1.pth.tar")
    changes = {"sched_on_updates": True, "initial_checkpoint": weights_alone, "start_epoch": 2, "epochs": 3}
    late = run(data, tmp_path, "late", **PLAIN, **changes)
    assert [row["epoch"] for row in late.history] == [2]
    by_update = run(data, tmp_path, "by update", **PLAIN, sched_on_updates=True, epochs=3)
    assert late.history[0]["lr"] == by_update.history[2]["lr"]
    by_epoch = run(data, tmp_path, "by epoch", **PLAIN, **{**changes, "sched_on_updates": False})
    assert by_epoch.history[0]["lr"] == last.history[2]["lr"]


def test_the_settings_of_a_run_are_a_recipe(data, tmp_path):
    first = run(data, tmp_path, "first", epochs=1)
    recipe = first.folder / "args.yaml"
    again = train(parse_train(["-c", str(recipe), "--experiment", "again"]))
    assert again.folder == tmp_path / "again"
    assert same_weights(weights(first.folder), weights(again.folder))
    assert yaml.safe_load(recipe.read_text()).items() >= {"model": "qkformer_hst4_384", "batch_size": 4}.items()
    content = torch.load(first.folder / "last.pth.tar", weights_only=True)
    assert (content["args"]["lr"], content["arch"], content["epoch"]) == (0.01, "qkformer_hst4_384", 0)


def test_a_converted_folder_is_a_model_to_start_from_and_to_validate(data, tmp_path, capsys):
    first = run(data, tmp_path, "first", epochs=1, **PLAIN)
    assert cli.main(["convert", str(first.folder / "last.pth.tar"), str(tmp_path / "converted")]) == 0
    model = f"local-dir:{tmp_path / 'converted'}"
    still = {**PLAIN, "lr": 1e-12, "epochs": 1, "model": model, "model_kwargs": {}, "pretrained": True}
    second = run(data, tmp_path, "second", **still)
    name = "stages.0.blocks.0.mlp.fc1.conv.weight"
    torch.testing.assert_close(weights(second.folder)[name], weights(first.folder)[name])
    arguments = ["--data-dir", str(data), "--split", "test", "--device", "cpu", "--workers", "0"]
    capsys.readouterr()
    assert cli.main(["validate", model, *arguments]) == 0
    assert f"top-1 {first.history[0]['eval_top1']:.3f} %" in capsys.readouterr().out


def test_a_class_map_says_which_classes_there_are(tmp_path):
    root = make_images(tmp_path / "images", 4, 2)
    (root / "train" / ".ipynb_checkpoints").mkdir()
    assert len(run(root, tmp_path, "all", epochs=1, **PLAIN).history) == 1
    (tmp_path / "map.txt").write_text("cat\nant\n")
    changes = {"class_map": str(tmp_path / "map.txt"), "num_classes": 2, "epochs": 1}
    assert len(run(root, tmp_path, "two", **changes, **PLAIN).history) == 1


def test_full_disk(data, tmp_path, fails):
    done = run(data, tmp_path, "run", epochs=1)
    before = (done.folder / "last.pth.tar").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        error = fails(data, "--resume", "auto", epochs=3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "could not be written (File too large); those before it are intact" in error
    assert (done.folder / "last.pth.tar").read_bytes() == before
    assert not list(done.folder.glob("*tmp*"))
    resumed = run(data, tmp_path, "run", "--resume", "auto", epochs=2)
    assert [row["epoch"] for row in resumed.history] == [0, 1]


def test_an_existing_run_is_not_overwritten(data, tmp_path, fails):
    folder = run(data, tmp_path, "run", epochs=1, **PLAIN).folder
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    error = fails(data)
    assert error == f"{folder} holds a run already; --resume auto resumes it, or choose another name"
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "qkformer_hst2_256"}, "is of the model qkformer_hst4_384, this run trains qkformer_hst2_256"),
        ({"embed_dims": [8, 16, 48]}, "does not fit this run's qkformer_hst4_384: .* have another shape"),
        ({"time_steps": 3}, "with time_steps=2, this run's qkformer_hst4_384 has time_steps=3"),
    ],
)
def test_checkpoints_of_other_models(changes, message, data, tmp_path, fails):
    last = run(data, tmp_path, "run", epochs=1, **PLAIN).folder / "last.pth.tar"
    if "model" in changes:
        changes |= {"model_kwargs": {}, "in_chans": 3}
    else:
        changes = {"model_kwargs": {**RECIPE["model_kwargs"], **changes}}
    error = fails(data, "--resume", str(last), experiment="other", **changes)
    assert re.search(message, error), error
    assert str(last) in error
    assert not (tmp_path / "other").exists()


def test_checkpoint_with_another_number_of_classes(data, tmp_path, fails):
    last = run(data, tmp_path, "run", epochs=1, **PLAIN).folder / "last.pth.tar"
    two = make_images(tmp_path / "two", 4, 2, classes=("ant", "bee"))
    error = fails(two, "--resume", str(last), experiment="other", num_classes=2)
    assert "with num_classes=3, this run's qkformer_hst4_384 has num_classes=2" in error
    error = fails(two, "--initial-checkpoint", str(last), experiment="other", num_classes=2)
    assert "does not fit the model qkformer_hst4_384: 2 have another shape" in error


def test_pickled_code_is_not_run(data, tmp_path, fails):
    path = tmp_path / "evil.pth.tar"
    torch.save({"state_dict": {}, "args": subprocess.Popen}, path)
    assert "which could run code" in fails(data, "--resume", str(path))


def test_a_download_without_a_network_says_so(fails, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise URLError("[Errno -3] Temporary failure in name resolution")

    monkeypatch.setattr(trainer_data, "create_dataset", refuse)
    message = fails(tmp_path / "data", "--dataset-download", dataset="torch/cifar10")
    assert message.startswith("dataset 'torch/cifar10' cannot be downloaded to ")
    assert "put it there yourself" in message


def folder_without(tmp_path, what):
    root = make_images(tmp_path / "images", 4, 2)
    if what == "class":
        for path in (root / "train" / "bee").iterdir():
            path.unlink()
    elif what == "test class":
        for path in (root / "test" / "bee").iterdir():
            path.unlink()
        (root / "test" / "bee").rmdir()
    elif what == "split":
        (root / "test").rename(root / "elsewhere")
    elif what == "image":
        (root / "train" / "cat" / "2.png").write_bytes(b"not a picture")
    return root


@pytest.mark.parametrize(
    ("what", "changes", "message"),
    [
        ("class", {}, "no images in the class folders bee"),
        ("test class", {}, "the split 'test' lacks bee, unlike the training split"),
        ("split", {}, "has no folder 'test' for that split, only elsewhere, train"),
        ("image", {"workers": 0}, "cat/2.png is not a readable image"),
        ("image", {"workers": 2}, "cat/2.png is not a readable image"),
        ("", {"num_classes": 4}, "the split 'train' has 3 classes (ant, bee, cat), but the model has num_classes=4"),
        ("", {"in_chans": 5, "input_size": [5, 32, 32]}, "has samples of 1 channels, but the model takes 5"),
        ("", {"mean": [0.1, 0.2]}, "mean=[0.1, 0.2] and std=None need one value, or one for each channel"),
        ("", {"batch_size": 16}, "batch_size=16 is more than the 12 images that a process has to train on"),
        ("", {"model": "qkformer_hst4_348"}, "did you mean qkformer_hst4_384"),
        ("", {"model_kwargs": {"time_stepz": 2}}, "does not take these arguments"),
        ("", {"device": "cuda:7"}, "device='cuda:7' is not available here"),
        ("", {"initial_checkpoint": "nowhere.pt"}, "initial_checkpoint: there is no file nowhere.pt"),
        ("", {"resume": "nowhere.pt"}, "nowhere.pt: there is no such file"),
        ("", {"dataset": "torch/cifar10"}, "--dataset-download gets it"),
        ("", {"opt_kwargs": {"foo": 1}}, "optimizer adamw cannot be made with opt='adamw', weight_decay=0.05, opt_k"),
        ("", {"aa": "bad"}, "batches to train on cannot be made with "),
        ("", {"aa": "bad"}, "aa='bad'"),
        ("", {"scale": [0.5]}, "scale=[0.5]"),
        ("", {"train_crop_mode": "bad"}, "train_crop_mode='bad'"),
        ("", {"interpolation": "bad"}, "batches to validate on cannot be made with interpolation='bad', crop_pct=1.0"),
        ("", {"gp": "bad"}, "the pooling cannot be made with global_pool='bad'"),
        ("", {"torchcompile": "bad"}, "torchcompile='bad' is unknown, torch has "),
        ("", {"device": "mps"}, "device='mps' cannot be used"),
        ("", {"model": "local-dir:nowhere"}, "nowhere"),
        ("", {"start_epoch": 2}, "start_epoch=2 needs to be below the run's 2 epochs"),
    ],
)
def test_bad_data_and_settings(what, changes, message, tmp_path, fails):
    if changes.get("device") and torch.cuda.is_available():
        pytest.skip("there is such a device")
    root = folder_without(tmp_path, what)
    error = fails(root, **changes)
    assert message in error
    assert "\n" not in error
    # A run that could not begin does not stand in the way of the corrected one.
    assert not (tmp_path / "run").exists() or what == "image"


def test_missing_folder(tmp_path, fails):
    error = fails(tmp_path / "nowhere")
    assert error == f"data_dir='{tmp_path / 'nowhere'}' does not exist"


def test_unreadable_images_can_be_skipped(tmp_path):
    root = folder_without(tmp_path, "image")
    assert run(root, tmp_path, "run", on_error="skip", epochs=1, **PLAIN).history[0]["train_loss"] > 0


def test_tensorboard_asked_for_and_missing(data, tmp_path, fails, monkeypatch):
    monkeypatch.setattr("timm_qkformer.training.trainer.log.importlib.util.find_spec", lambda name: None)
    error = fails(data, "--tensorboard")
    assert "pip install 'timm-qkformer[train]'" in error
