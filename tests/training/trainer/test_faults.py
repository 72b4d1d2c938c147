"""What happens to runs in the world: two in one folder, bits that rot, kills at bad moments, checkpoints of others."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from PIL import Image
from tiny_runs import PLAIN, SRC, flags, make_images, run, run_and_stop, same_weights, weights, write_recipe

from timm_qkformer.hub.checkpoints import CheckpointError
from timm_qkformer.training.trainer import checkpoint, engine
from timm_qkformer.training.trainer.checkpoint import read_run
from timm_qkformer.training.trainer.config import parse_train, read_recipe
from timm_qkformer.training.trainer.engine import train
from timm_qkformer.training.trainer.folder import FolderLock, RunFolder, RunInUseError

SMALL = {**PLAIN, "model": "test_resnet", "model_kwargs": {}, "input_size": [3, 32, 32], "epochs": 1}


# ---- two runs in one folder


def test_a_folder_is_of_one_process_until_it_ends(tmp_path):
    code = "import sys, time\nfrom pathlib import Path\nfrom timm_qkformer.training.trainer.folder import FolderLock\n"
    code += f"lock = FolderLock(Path({str(tmp_path)!r}))\nprint('held', flush=True)\ntime.sleep(60)"
    environment = {**os.environ, "PYTHONPATH": str(SRC)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunInUseError, match=rf"is in use by another run \(process {other.pid} on .*--experiment"):
            FolderLock(tmp_path)
        other.kill()
    lock = FolderLock(tmp_path)  # the system gave it back
    with pytest.raises(RunInUseError):
        FolderLock(tmp_path)
    if pid := os.fork():
        assert os.waitpid(pid, 0)[1] == 0
    else:  # a loader's worker, which must not keep the lock
        os._exit(len(lock._path.read_text()) == 0)
    lock.release()
    assert not list(tmp_path.iterdir())
    FolderLock(tmp_path).release()


def test_a_second_run_is_refused_and_leaves_the_first_alone(data, tmp_path, monkeypatch):
    real = engine.Progress.update

    def update(self, *args):
        real(self, *args)
        for more in ((), ("--resume", "auto")):
            with pytest.raises((RunInUseError, FileExistsError), match=r"in use by another run|holds a run already"):
                train(parse_train(flags(data, tmp_path, "run", tmp_path / "recipe.yaml", *more)))

    monkeypatch.setattr(engine.Progress, "update", update)
    folder = run(data, tmp_path, "run", **SMALL).folder
    assert not list(folder.glob(".*"))
    monkeypatch.undo()


def test_default_names_of_the_same_second(tmp_path):
    settings = parse_train([str(tmp_path), "--output", str(tmp_path / "runs"), "--model", "test_resnet"])
    first, second = RunFolder(settings), RunFolder(settings)
    name = first.choose(None, 32)
    assert [place.begin(name).name for place in (first, second)] == [name.name, f"{name.name}-2"]
    first.close()
    second.close()


@pytest.mark.parametrize("name", ["../up", "/tmp/elsewhere", "..", "a/b", "a\\b", "line\nbreak", "\x1b[31mred"])
def test_names_that_are_not_one_folder(name):
    with pytest.raises(ValueError, match=r"experiment=.* needs to be the name of one folder"):
        parse_train(["data", "--experiment", name])


# ---- bit rot, and contents that no run wrote


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A run of two epochs, to copy."""
    output = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "draw_curves", lambda *_: None)
        return run(data, output, "run", **{**SMALL, "epochs": 2, "opt": "adamw"}).folder


def resumed(data, finished, tmp_path, epochs=2):
    shutil.copytree(finished.parent, tmp_path, dirs_exist_ok=True)
    return lambda: run(data, tmp_path, "run", "--resume", "auto", **{**SMALL, "epochs": epochs, "opt": "adamw"})


def test_auto_passes_over_rotten_bits(data, finished, tmp_path, capsys):
    go = resumed(data, finished, tmp_path)
    last = tmp_path / "run" / "last.pth.tar"
    content = bytearray(last.read_bytes())
    weight = next(w for w in weights(tmp_path / "run").values() if w.numel() > 500)
    content[content.index(weight.numpy().tobytes()) + 1000] ^= 4
    last.unlink()  # the others are links to it
    last.write_bytes(content)
    with pytest.warns(UserWarning, match=r"passed over: .*last.pth.tar: damaged .* does not match its checksum"):
        go()
    assert "checkpoint-1.pth.tar" in capsys.readouterr().out


def without(*path):
    def change(content):
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    return change


def put(value, *path):
    def change(content):
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


CONTENTS = {
    "trainer.epoch": without("trainer", "epoch"),
    "trainer.consumed": put(10**9, "trainer", "consumed"),
    "trainer.history": put([{"epoch": 0}], "trainer", "history"),
    "trainer.processes": put([], "trainer", "processes"),
    "numpy": put(torch.zeros(3, dtype=torch.uint8), "trainer", "processes", 0, "position", "now", "numpy"),
    "optimizer.state.5": put(None, "optimizer", "state", 5),
    "lacks exp_avg": without("optimizer", "state", 5, "exp_avg"),
    "exp_avg of shape": put(torch.zeros(1, 1), "optimizer", "state", 5, "exp_avg"),
    "optimizer.param_groups": put("all", "optimizer", "param_groups"),
    "state_dict.": put(7, "state_dict", "conv1.weight"),
    "saver.checkpoint_files.0.0": put([("../../precious", 1.0)], "saver", "checkpoint_files"),
    "saver.pending": put((None, None, None), "saver", "pending"),
    "args": put([1], "args"),
}


@pytest.mark.parametrize("named", CONTENTS)
def test_auto_passes_over_contents_that_no_run_wrote(named, data, finished, tmp_path):
    go = resumed(data, finished, tmp_path)
    last = tmp_path / "run" / "last.pth.tar"
    content = torch.load(last, weights_only=True)
    CONTENTS[named](content)
    last.unlink()
    torch.save(content, last)
    with pytest.warns(UserWarning, match=f"passed over: .*last.pth.tar: .*{named}"):
        go()
    with pytest.raises(CheckpointError, match=named):
        run(data, tmp_path, "other", "--resume", str(last), **{**SMALL, "epochs": 3, "opt": "adamw"})


# ---- kills


class Killed(BaseException):
    pass


def kill_at(number, monkeypatch):
    """As if the process were killed before the number-th file gets its name."""
    calls = []

    def dying(real):
        def call(*args, **kwargs):
            calls.append(args)
            if len(calls) >= number:
                raise Killed
            return real(*args, **kwargs)

        return call

    for name in ("replace", "link", "unlink", "remove"):
        monkeypatch.setattr(os, name, dying(getattr(os, name)))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    "number", [3, 4, pytest.param(5, marks=pytest.mark.slow), pytest.param(6, marks=pytest.mark.slow)]
)
def test_a_kill_between_two_files_loses_no_checkpoint(number, data, tmp_path, monkeypatch):
    whole = run(data, tmp_path, "whole", **SMALL)
    with monkeypatch.context() as patch:
        kill_at(number, patch)
        with pytest.raises(Killed):
            run(data, tmp_path, "run", **SMALL)
    again = run(data, tmp_path, "run", "--resume", "auto", **SMALL)
    assert names(again.folder) == names(whole.folder)
    assert again.best_epoch == whole.best_epoch == 0
    assert same_weights(weights(again.folder), weights(whole.folder))
    best = torch.load(again.folder / "model_best.pth.tar", weights_only=True)["state_dict"]
    assert same_weights(best, weights(whole.folder))


def test_an_epoch_is_saved_before_its_validation(data, tmp_path, monkeypatch, capsys):
    def evaluate(*_, **__):
        raise KeyboardInterrupt

    whole = run(data, tmp_path, "whole", epochs=1)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "evaluate", evaluate)
        with pytest.raises(KeyboardInterrupt):
            run(data, tmp_path, "run", epochs=1)
    again = run(data, tmp_path, "run", "--resume", "auto", epochs=1)
    assert "epoch 0, to be validated" in capsys.readouterr().out
    assert same_weights(weights(again.folder), weights(whole.folder))
    assert [row["train_loss"] for row in again.history] == [row["train_loss"] for row in whole.history]
    assert names(again.folder) == names(whole.folder)


@pytest.mark.parametrize(("interval", "stop", "expected"), [(7, 11, "epoch 1, batch 1"), (5, 13, "epoch 1, to be")])
def test_between_validations_there_are_checkpoints(interval, stop, expected, data, tmp_path, capsys):
    """Six updates are an epoch: an interval may be longer, and a validation far away."""
    changes = {**SMALL, "epochs": 4, "val_interval": 100, "recovery_interval": interval}
    run_and_stop(stop, data, tmp_path, "run", **changes)
    again = run(data, tmp_path, "run", "--resume", "auto", **changes)
    assert f"resumed from {tmp_path}/run/recovery-1" in (said := capsys.readouterr().out)
    assert expected in said
    assert same_weights(weights(again.folder), weights(run(data, tmp_path, "whole", **changes).folder))


# ---- settings


def test_second_order_optimizers(data, tmp_path):
    changes = {**PLAIN, "opt": "adahessian", "recovery_interval": 2, "epochs": 1, "val_split": ""}
    whole = run(data, tmp_path, "whole", **changes)
    run_and_stop(3, data, tmp_path, "run", **changes)
    again = run(data, tmp_path, "run", "--resume", "auto", **changes)
    assert same_weights(weights(again.folder), weights(whole.folder))


def test_frozen_modules_and_class_weights(data, tmp_path):
    model = {"epochs": 1, "freeze": ["stem", "stages.0"], "class_weights": [1.0, 2.0, 0.5]}
    still = run(data, tmp_path, "still", **PLAIN, **{**model, "lr": 1e-12})
    moved = run(data, tmp_path, "moved", **PLAIN, **model)
    a, b = weights(still.folder), weights(moved.folder)
    frozen = [name for name in a if name.startswith(("stem.", "stages.0."))]
    assert any("running_mean" in name for name in frozen)
    assert all(torch.equal(a[name], b[name]) for name in frozen)
    assert not torch.equal(a["head.weight"], b["head.weight"])
    equal = run(data, tmp_path, "equal", **PLAIN, **{**model, "class_weights": [1.0, 1.0, 1.0]})
    assert equal.history[0]["train_loss"] != moved.history[0]["train_loss"]
    with pytest.raises(ValueError, match=r"freeze='stam' names no parameters; .*stem"):
        run(data, tmp_path, "x", **{**model, "freeze": ["stam"]})
    with pytest.raises(ValueError, match="class_weights are 2, the model has num_classes=3"):
        run(data, tmp_path, "x", **PLAIN, **{**model, "class_weights": [1.0, 2.0]})


def test_what_the_data_was_is_in_the_checkpoint(data, tmp_path):
    settings = {**SMALL, "input_size": [3, 32, 48], "crop_pct": 0.5, "interpolation": "nearest", "std": [0.5]}
    facts = read_run(run(data, tmp_path, "run", **settings).folder / "last.pth.tar")["trainer"]
    assert facts["data"].items() >= {"input_size": [3, 32, 48], "crop_pct": 0.5, "interpolation": "nearest"}.items()
    assert facts["data"]["std"] == [0.5] * 3
    assert facts["class_names"] == ["ant", "bee", "cat"]


def test_replaced_images_and_another_thread_count_are_named(tmp_path, capsys, monkeypatch):
    root = make_images(tmp_path / "images", 4, 2)
    run(root, tmp_path, "run", **SMALL)
    moved = shutil.move(root, tmp_path / "moved")
    run(moved, tmp_path, "run", "--resume", "auto", **{**SMALL, "epochs": 2})
    assert "files or labels" not in capsys.readouterr().out
    Image.new("RGB", (36, 36)).save(moved / "train" / "bee" / "1.png")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    run(moved, tmp_path, "run", "--resume", "auto", **{**SMALL, "epochs": 3})
    said = capsys.readouterr().out
    assert "not an exact continuation: the files or labels to train on are not those of the checkpoint" in said
    assert "not an exact continuation: 64 threads instead of" in said
    assert "hint: 64 threads compute on " in said
    assert "OMP_NUM_THREADS=" in said


def test_pictures_that_are_left_out_are_counted(tmp_path):
    root = make_images(tmp_path / "images", 4, 2)
    for name in ("x.bmp", "y.webp", "z.bmp"):
        Image.new("RGB", (36, 36)).save(root / "train" / "ant" / name)
    with pytest.warns(UserWarning, match=r"15 pictures, 12 used; left out are 2 \.bmp, 1 \.webp \(read: "):
        run(root, tmp_path, "run", **SMALL)


@pytest.mark.parametrize("text", ["ant 0\nbee x y\n", "", "dog\n"])
def test_class_maps_that_do_not_fit(text, data, tmp_path):
    (tmp_path / "map.txt").write_text(text)
    with pytest.raises(ValueError, match=r"class_map=|classes|samples|images"):
        run(data, tmp_path, "run", **SMALL, class_map=str(tmp_path / "map.txt"))


def test_a_killed_worker_is_one_line(data, tmp_path, monkeypatch):
    class Killing(torch.utils.data.Dataset):
        def __init__(self, dataset):
            self.dataset, self.reader, self.parent = dataset, dataset.reader, os.getpid()

        def __len__(self):
            return len(self.dataset)

        def __getitem__(self, index):
            if os.getpid() != self.parent:
                os.kill(os.getpid(), 9)
            self.dataset.transform = self.transform
            return self.dataset[index]

    real = engine.open_split
    monkeypatch.setattr(engine, "open_split", lambda *args: Killing(real(*args)))
    with pytest.raises(ValueError, match=r"a process that loads data was ended from outside .*fewer --workers"):
        run(data, tmp_path, "run", **SMALL, workers=1)


def test_an_args_file_that_cannot_be_written_is_named(data, tmp_path, monkeypatch):
    def write_atomically(path, text):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(engine, "write_atomically", write_atomically)
    with pytest.raises(OSError, match=r"args\.yaml"):
        run(data, tmp_path, "run", **SMALL)


# ---- recipes


def laughs(depth):
    lines = ["a0: &a0 [1, 1]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, depth)]
    return "\n".join([*lines, f"lr: *a{depth - 1}"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (laughs(12), "its aliases stand for .* values, a recipe has at most 10,000"),
        ("lr: &a [*a]", "recipe"),
        ("lr: " + "[" * 1500 + "]" * 1500, "nested too deeply"),
        ("lr: 2020-13-45", "is not YAML for a recipe|needs to be float"),
        ("{[1, 2]: 3}", "recipe"),
        ("lr: " + "9" * 5000, "recipe"),
        ("lr: [" + "1, " * 2000 + "1]", "needs to be float, got"),
        ("x: " + "y" * (1 << 21), "bytes, more than a recipe needs"),
    ],
)
def test_hostile_recipes(text, message, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_recipe(str(path))
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "changes",
    [
        {"lr": float("nan")},
        {"weight_decay": float("inf")},
        {"hflip": 2.0},
        {"workers": 10**6},
        {"model_kwargs": {"depths": 1_000_000}},
        {"model_kwargs": {"time_steps": 10**9}},
        {"model_kwargs": {"mlp_ratio": float("inf")}},
        {"model_kwargs": {"global_pool": 5}},
    ],
    ids=str,
)
def test_settings_that_nothing_can_do(changes, data, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml", model="test_qkformer", **{"model_kwargs": {}, **changes})
    (name, _), *_ = changes.get("model_kwargs", changes).items()
    with pytest.raises(ValueError, match=name):
        train(parse_train(flags(data, tmp_path, "run", recipe)))
    assert yaml.safe_load(recipe.read_text())


def test_the_temporary_names_of_two_savers_differ(tmp_path, finished, monkeypatch):
    seen = []
    monkeypatch.setattr(
        checkpoint.torch, "save", lambda state, file: seen.append(os.readlink(f"/proc/self/fd/{file.fileno()}"))
    )
    saver = checkpoint.RunSaver.__new__(checkpoint.RunSaver)

    class Task:
        def get_checkpoint_state(self, ema=False):
            return {} if ema else {"state_dict": {}}

    saver.args, saver.amp_scaler, saver.task, saver.trainer_state = {"model": "m"}, None, Task(), {}
    saver.optimizer, saver.checkpoint_files, saver.best_epoch, saver.best_metric = (
        torch.optim.SGD([torch.zeros(1)]),
        [],
        None,
        None,
    )
    for _ in range(2):
        saver._save(str(tmp_path / "tmp.pth.tar"), 0)
    assert len(set(seen)) == 2
