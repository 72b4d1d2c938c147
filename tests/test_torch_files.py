"""What torch.save wrote is read as it was written or not at all, by any number of threads."""

import argparse
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from timm.models import load_checkpoint, load_state_dict

from timm_qkformer.hub.checkpoints import CheckpointError, read_content
from timm_qkformer.models.loading import WeightsError
from timm_qkformer.torch_files import DamagedFileError, check_file, load_restricted
from timm_qkformer.training.trainer.network import load_weights


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of a linear layer with a Namespace in it, and where its weights begin."""
    path, weight = tmp_path / "last.pth.tar", torch.arange(1.0, 257.0).view(16, 16)
    torch.save({"state_dict": {"weight": weight, "bias": torch.zeros(16)}, "args": argparse.Namespace(lr=0.1)}, path)
    return path, path.read_bytes().index(weight.numpy().tobytes())


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)


def readers(model):
    return {
        "convert and the trainer": lambda path: read_content(path, mmap=True),
        "initial_checkpoint": lambda path: load_weights(model, str(path), "linear"),
        "pretrained": lambda path: timm.create_model(
            "test_qkformer", pretrained=True, pretrained_cfg_overlay={"file": str(path)}
        ),
    }


@pytest.mark.parametrize("reader", readers(None))
def test_a_flipped_bit_is_found_by_every_reader(reader, saved):
    path, start = saved
    flip(path, start + 100)
    with pytest.raises((CheckpointError, WeightsError, ValueError), match="does not match its checksum"):
        readers(torch.nn.Linear(16, 16))[reader](path)


def test_any_byte_of_the_file_may_be_damaged(saved):
    path, _ = saved
    content = path.read_bytes()
    expected = torch.load(path, weights_only=False)["state_dict"]["weight"]
    for position in range(0, len(content), 37):
        path.write_bytes(content)
        flip(path, position)
        try:
            read = read_content(path)
        except CheckpointError:
            continue
        assert torch.equal(read["state_dict"]["weight"], expected), position  # padding, dates


def test_damaged_directories_and_other_containers(saved, tmp_path):
    path, _ = saved
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(DamagedFileError, match="its zip directory is damaged"):
        check_file(path)
    text = tmp_path / "text"
    text.write_text("PK? no zip")
    check_file(text)


def test_eight_threads_read_at_the_same_time(saved):
    path, _ = saved
    model = torch.nn.Linear(16, 16)

    def read(number):
        if number % 4 == 0:  # a reader of another library, which takes the permission away for everyone
            try:
                load_state_dict(str(path))
            except RuntimeError:
                return "theirs"
        elif number % 4 == 1:
            load_weights(model, str(path), "linear")
        else:
            assert (load_restricted if number % 2 else read_content)(path)["args"].lr == 0.1
        return "read"

    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(read, range(96)))
    assert set(results) <= {"read", "theirs"}


def test_nothing_is_left_allowed(saved):
    before = set(torch.serialization.get_safe_globals())  # a list in the order of a set
    with ThreadPoolExecutor(4) as threads:
        assert len(list(threads.map(lambda _: read_content(saved[0]), range(16)))) == 16
    assert set(torch.serialization.get_safe_globals()) == before


def test_load_weights_takes_a_training_checkpoint(saved):
    model = torch.nn.Linear(16, 16)
    load_weights(model, str(saved[0]), "linear")
    other = torch.nn.Linear(16, 16)
    load_checkpoint(other, str(saved[0]))
    assert torch.equal(model.weight, other.weight)
