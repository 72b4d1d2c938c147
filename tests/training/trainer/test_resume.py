"""A run that was stopped anywhere ends with the weights of one that was not."""

import csv
import random
import signal

import pytest
import torch
from tiny_runs import PLAIN, command, flags, run, run_and_stop, same_weights, weights, write_recipe


def rows(folder):
    """summary.csv without what depends on the clock."""
    with (folder / "summary.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "images_per_second"} for row in csv.DictReader(file)]


def compare(data, output, updates, more=(), **changes):
    """Run whole, run with a stop and resume; the two folders."""
    whole = run(data, output, "whole", *more, recovery_interval=2, **changes)
    run_and_stop(updates, data, output, "stopped", *more, recovery_interval=2, **changes)
    resumed = run(data, output, "stopped", *more, "--resume", "auto", recovery_interval=2, **changes)
    assert same_weights(weights(whole.folder), weights(resumed.folder))
    assert rows(whole.folder) == rows(resumed.folder)
    assert whole.best_metric == resumed.best_metric
    assert not list(resumed.folder.glob("recovery*"))
    return whole.folder, resumed.folder


# Six batches in an epoch.
@pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated")
@pytest.mark.parametrize(
    ("updates", "changes"),
    [
        (9, {"workers": 2, "model_ema": True, "model_ema_warmup": True}),
        (2, {"grad_accum_steps": 2, "no_prefetcher": True, "sched_on_updates": True, "clip_grad": 1.0}),
        (7, {"sched": "plateau", "patience_epochs": 0, "amp": True, "amp_dtype": "bfloat16", "layer_decay": 0.7}),
    ],
)
def test_resumed_run_ends_with_the_same_weights(updates, changes, data, tmp_path, capsys):
    whole, resumed = compare(data, tmp_path, updates, **changes)
    out = capsys.readouterr().out
    assert "resumed from" in out
    assert "not an exact continuation" not in out
    if changes.get("model_ema"):
        assert same_weights(weights(whole, "state_dict_ema"), weights(resumed, "state_dict_ema"))
        assert not same_weights(weights(whole), weights(whole, "state_dict_ema"))


@pytest.fixture
def one_thread():
    """As in the processes that `command` starts: sums are then in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.slow
def test_kill_9_at_a_random_step(data, tmp_path, capsys):
    more = {"workers": 1, "recovery_interval": 1}
    recipe = write_recipe(tmp_path / "recipe.yaml", **more)
    number = random.SystemRandom().randrange(1, 12)
    with command("-m", "timm_qkformer.cli", "train", *flags(data, tmp_path, "killed", recipe)) as process:
        steps = 0
        for line in process.stdout:
            steps += line.startswith("epoch") and "[" in line
            if steps == number:
                process.send_signal(signal.SIGKILL)
                break
        process.stdout.read()
    assert process.returncode == -signal.SIGKILL, f"ended by itself before step {number}"
    resumed = run(data, tmp_path, "killed", "--resume", "auto", **more)
    said = capsys.readouterr().out
    assert "resumed from" in said or number == 1, "a kill may come before the first checkpoint is written"
    whole = run(data, tmp_path, "whole", **more)
    assert same_weights(weights(whole.folder), weights(resumed.folder)), f"killed at step {number}"
    assert rows(whole.folder) == rows(resumed.folder)


def test_a_run_stopped_before_its_first_checkpoint_begins_anew(data, tmp_path, capsys):
    folder = tmp_path / "stopped"
    folder.mkdir()
    unfinished = ("tmp.pth.tar", "recovery_tmp.pth.tar")
    for name in ("args.yaml", "events.out.tfevents.1.host.2.0", ".last.pth.tar.x1.tmp", *unfinished):
        (folder / name).write_text("what a killed process left")
    run(data, tmp_path, "stopped", "--resume", "auto", epochs=1)
    assert "nothing to resume, this is a new run" in capsys.readouterr().out
    assert (folder / "last.pth.tar").is_file()


def test_a_folder_with_something_else_in_it_is_left_alone(data, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "args.yaml").write_text("a: 1")
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds a run already"):
        run(data, tmp_path, "mine", "--resume", "auto", epochs=1)
    assert (folder / "args.yaml").read_text() == "a: 1"


def test_a_path_and_a_new_folder(data, tmp_path, capsys):
    first = run(data, tmp_path, "first", epochs=1)
    second = run(data, tmp_path, "second", "--resume", str(first.folder / "last.pth.tar"), epochs=2, lr=0.02)
    assert [row["epoch"] for row in second.history] == [0, 1]
    assert sorted(path.name for path in first.folder.glob("*.pth.tar")) == [
        "checkpoint-0.pth.tar",
        "last.pth.tar",
        "model_best.pth.tar",
    ]
    out = capsys.readouterr().out
    assert "not an exact continuation: setting lr is 0.02, it was 0.01" in out
    assert "setting epochs is 2, it was 1" in out


def test_a_recovery_file_of_another_run_stays(data, tmp_path):
    run_and_stop(3, data, tmp_path, "first", recovery_interval=1)
    before = sorted((tmp_path / "first").iterdir())
    second = run(data, tmp_path, "second", "--resume", str(tmp_path / "first" / "recovery-0-3.pth.tar"),
                 recovery_interval=1)  # fmt: skip
    assert sorted((tmp_path / "first").iterdir()) == before
    assert same_weights(weights(second.folder), weights(run(data, tmp_path, "whole").folder))


def test_settings_of_the_optimizer_are_those_of_now(data, tmp_path, capsys):
    more = {"opt_betas": [0.8, 0.9], "weight_decay": 0.3, "lr": 0.02}
    last = run(data, tmp_path, "first", epochs=1).folder / "last.pth.tar"
    second = run(data, tmp_path, "second", "--resume", str(last), epochs=2, **more)
    assert "setting weight_decay is 0.3, it was 0.05" in capsys.readouterr().out
    groups = torch.load(second.folder / "last.pth.tar", weights_only=True)["optimizer"]["param_groups"]
    assert sorted(group["weight_decay"] for group in groups) == [0.0, 0.3]
    assert all(list(group["betas"]) == [0.8, 0.9] for group in groups)
    # Also within the first epoch, whose learning rate no schedule sets.
    run_and_stop(3, data, tmp_path, "third", recovery_interval=1)
    third = run(data, tmp_path, "third", "--resume", "auto", epochs=1, **more)
    capsys.readouterr()
    groups = torch.load(third.folder / "last.pth.tar", weights_only=True)["optimizer"]["param_groups"]
    assert all(group["initial_lr"] == 0.02 for group in groups)


def test_a_checkpoint_without_the_optimizer_that_is_asked_for(data, tmp_path):
    last = run(data, tmp_path, "first", epochs=1, **PLAIN).folder / "last.pth.tar"
    with pytest.raises(
        ValueError, match=r"has the state of the optimizer adamw, this run's opt is sgd; --no-resume-op"
    ):
        run(data, tmp_path, "second", "--resume", str(last), opt="sgd", **PLAIN)
    with pytest.raises(ValueError, match="the optimizer's state is of other parameters"):
        run(data, tmp_path, "second", "--resume", str(last), layer_decay=0.5, **PLAIN)
    alone = tmp_path / "alone.pth"
    torch.save({"state_dict": weights(last.parent)}, alone)
    with pytest.raises(ValueError, match="has no state of an optimizer; --initial-checkpoint starts from its weights"):
        run(data, tmp_path, "second", "--resume", str(alone), **PLAIN)
    assert not (tmp_path / "second").exists()
    result = run(data, tmp_path, "second", "--resume", str(last), "--no-resume-opt", opt="sgd", **PLAIN)
    assert [row["epoch"] for row in result.history] == [0, 1]


@pytest.mark.parametrize("size", [0, 5000])
def test_the_best_checkpoints_are_left_where_the_last_is_damaged(size, data, tmp_path, capsys):
    folder = run(data, tmp_path, "run", epochs=2, **PLAIN).folder
    last = folder / "last.pth.tar"
    start = last.read_bytes()[:size]
    last.unlink()
    last.write_bytes(start)
    with pytest.warns(UserWarning, match="passed over: .*last.pth.tar: (damaged or cut off|neither a)"):
        resumed = run(data, tmp_path, "run", "--resume", "auto", epochs=3, **PLAIN)
    assert "checkpoint-1.pth.tar: epoch 2" in capsys.readouterr().out
    assert [row["epoch"] for row in resumed.history] == [0, 1, 2]


def test_auto_without_anything_to_resume_begins(data, tmp_path, capsys):
    result = run(data, tmp_path, "new", "--resume", "auto", epochs=1, **PLAIN)
    assert len(result.history) == 1
    assert "nothing to resume" in capsys.readouterr().out
    again = run(data, tmp_path, "new", "--resume", "auto", epochs=1, **PLAIN)
    assert len(again.history) == 1


def test_auto_without_a_name_takes_the_newest_run(data, tmp_path):
    run(data, tmp_path, "a", epochs=1, **PLAIN)
    b = run(data, tmp_path, "b", epochs=1, **PLAIN)
    result = run(data, tmp_path, "", "--resume", "auto", epochs=2, **PLAIN)
    assert result.folder == b.folder
    assert [row["epoch"] for row in result.history] == [0, 1]


def test_a_damaged_newest_checkpoint_is_passed_over(data, tmp_path):
    run_and_stop(5, data, tmp_path, "run", recovery_interval=2)
    newest = tmp_path / "run" / "recovery-0-4.pth.tar"
    newest.write_bytes(newest.read_bytes()[:5000])
    with pytest.warns(UserWarning, match="passed over: .*recovery-0-4.*: damaged or cut off"):
        resumed = run(data, tmp_path, "run", "--resume", "auto", recovery_interval=2)
    assert same_weights(weights(resumed.folder), weights(run(data, tmp_path, "whole").folder))


def test_within_an_epoch_the_batches_have_to_be_the_same(data, tmp_path):
    run_and_stop(3, data, tmp_path, "run", recovery_interval=2)
    with pytest.raises(ValueError, match=r"from within an epoch.* were \[6, 4, 1, 1\] and are \[12, 2, 1, 1\]"):
        run(data, tmp_path, "run", "--resume", "auto", batch_size=2)
