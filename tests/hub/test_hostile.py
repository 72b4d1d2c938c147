"""Hostile and broken files are refused with their reason, run nothing and use no memory to speak of."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hostile import CASES, saved
from safetensors.torch import save_file

from release import release_state_dict
from timm_qkformer.hub import CheckpointError, convert, read_checkpoint
from training_dict import training_checkpoint


@pytest.fixture(scope="module")
def honest(tiny_model):
    return release_state_dict(tiny_model)


def test_there_are_enough_cases():
    assert len(CASES) >= 200


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("case", sorted(CASES))
def test_hostile_files_are_refused(case, honest, tmp_path):
    build, reason = CASES[case]
    marker = tmp_path / "marker"
    source, folder = tmp_path / "checkpoint.pth", tmp_path / "out"
    source.write_bytes(build({name: tensor.clone() for name, tensor in honest.items()}, marker))
    with pytest.raises(CheckpointError, match=reason) as refusal:
        convert(source, folder)
    assert not marker.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pth"]
    message = str(refusal.value)
    assert message.startswith(f"{source}: ")
    assert len(message) < 4000


MEASURE = """
import contextlib, json, resource, sys, warnings
from pathlib import Path
from timm_qkformer.hub import CheckpointError, convert
warnings.simplefilter("ignore")
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
folder = Path(sys.argv[1])
start = peak()
convert(folder / "honest", folder / "out")
honest, peaks = peak(), {}
for path in sorted((folder / "hostile").iterdir()):
    before = peak()
    with contextlib.suppress(CheckpointError):
        convert(path, folder / "never")
    peaks[path.name] = peak() - before
print(json.dumps({"start": start, "honest": honest, "growth": peaks, "all": peak()}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux alone")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.slow
def test_hostile_files_use_less_than_three_times_the_honest_memory(honest, tmp_path):
    (tmp_path / "hostile").mkdir()
    torch.save(training_checkpoint(honest, time_step=2), tmp_path / "honest")
    greedy = [name for name in CASES if name.startswith(("bomb-", "ten-thousand-", "truncated-9", "random-"))]
    for number, name in enumerate(greedy):
        build, _ = CASES[name]
        tensors = {name: tensor.clone() for name, tensor in honest.items()}
        (tmp_path / "hostile" / str(number)).write_bytes(build(tensors, tmp_path / "marker"))
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True, env=env
    )
    peaks = json.loads(run.stdout.splitlines()[-1])
    worst = max(peaks["growth"], key=peaks["growth"].get)
    assert peaks["all"] < 3 * peaks["honest"], greedy[int(worst)]
    # That holds easily while PyTorch itself is most of it; the files here could ask for gigabytes.
    assert peaks["all"] - peaks["honest"] < 200 << 20, greedy[int(worst)]


def test_plain_and_wrapped_checkpoints_hold_the_same(honest, tmp_path):
    contents = {
        "plain.pth": honest,
        "training.pth": training_checkpoint(honest, time_step=2),
        "state_dict.pth": {"state_dict": honest, "epoch": 3, "args": {"T": 6}},
        "ddp.pth": {"model": {f"module.{name}": tensor for name, tensor in honest.items()}},
    }
    for name, content in contents.items():
        torch.save(content, tmp_path / name)
    save_file({name: tensor.contiguous() for name, tensor in honest.items()}, tmp_path / "model.safetensors")
    for name in (*contents, "model.safetensors"):
        read = read_checkpoint(tmp_path / name)
        assert read.tensors.keys() == honest.keys()
        assert all(torch.equal(read.tensors[key], honest[key]) for key in honest)
        assert re.fullmatch(r"[0-9a-f]{32}", read.md5)
    assert read_checkpoint(tmp_path / "training.pth").args["time_step"] == 2
    assert read_checkpoint(tmp_path / "training.pth").epoch == 199
    assert read_checkpoint(tmp_path / "state_dict.pth").args == {"T": 6}


def test_moving_average_is_taken_where_there_is_one(honest, tmp_path):
    path = tmp_path / "checkpoint.pth"
    average = {name: tensor + 1 for name, tensor in honest.items()}
    torch.save({"model": honest, "model_ema": average}, path)
    for ema, expected, words in [
        (None, average, "moving average"),
        (True, average, "model_ema"),
        (False, honest, "'model'"),
    ]:
        read = read_checkpoint(path, ema)
        assert torch.equal(read.tensors["head.bias"], expected["head.bias"])
        assert words in read.weights
    torch.save({"model": honest}, path)
    with pytest.raises(CheckpointError, match="no moving average"):
        read_checkpoint(path, ema=True)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for path in (tmp_path / "nothing.pth", tmp_path):
        with pytest.raises(CheckpointError, match="there is no such file"):
            read_checkpoint(path)


def test_honest_bytes_are_what_the_cases_start_from(honest, tmp_path):
    """The tampered cases differ from a file that converts by what was tampered with alone."""
    path = Path(tmp_path / "checkpoint.pth")
    path.write_bytes(saved(honest))
    assert convert(path, tmp_path / "out").model == "test_qkformer"
