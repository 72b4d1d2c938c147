"""Files of releases whose tensors are those of several networks: told apart by what they state, or refused by name."""

import argparse
import json

import pytest
import timm
import torch

from golden import CASES, FLAT_CASES, SHARED
from timm_qkformer.cli import main
from timm_qkformer.hub import CheckpointError, convert, read_checkpoint
from timm_qkformer.hub.infer import infer_architecture

# Case: the networks that its tensors are those of, if it is more than one.
ALIKE = {
    "sdt_cifar10dvs_2_256_t10": ("sdt_2_256_dvs", "sdt_2_256_gesture"),
    "spikingformer_imagenet_8_384_t4": ("spikingformer_8_384", "spikingformer_8_384_cml"),
    "cml_spikingformer_imagenet_8_384_t4": ("spikingformer_8_384", "spikingformer_8_384_cml"),
    "spikingformer_cifar10dvs_2_256_t10": ("spikingformer_2_256_dvs", "spikingformer_2_256_dvs_cml"),
    "cml_spikingformer_cifar10dvs_2_256_t10": ("spikingformer_2_256_dvs", "spikingformer_2_256_dvs_cml"),
}
ALL = {**CASES, **FLAT_CASES}


def release_file(case, path, **content):
    """A file of the release's names and shapes, and nothing else of it."""
    source = SHARED / "golden" / f"{case}.json"
    if not source.exists():
        pytest.skip(f"golden cases are not here: {source} does not exist")
    spec = json.loads(source.read_text())["spec"]
    tensors = {name: torch.zeros(shape, dtype=torch.long if name.endswith("tracked") else None) for name, shape in spec}
    torch.save({"model": tensors, **content}, path)
    return read_checkpoint(path)


def cases():
    quick = [*ALIKE, "spikingformer_cifar100_4_384_t4", "sdt_cifar100_2_256_t4", "cifar10dvs_2_256_t10"]
    for case in ALL:
        if "batch" not in case:
            big = case not in quick or "imagenet" in case
            yield pytest.param(case, marks=[pytest.mark.slow] if big else [])


@pytest.mark.parametrize("case", list(cases()))
def test_a_release_is_its_own_model_or_is_refused(case, tmp_path):
    file = release_file(case, tmp_path / "checkpoint.pth")
    name, args = ALL[case]
    if case in ALIKE:
        one, other = ALIKE[case]
        said = (
            rf"those of {one} and of {other}, which are different networks, and .*\(--model {one} or --model {other}\)"
        )
        with pytest.raises(CheckpointError, match=said):
            infer_architecture(file)
        assert infer_architecture(file, other).model == other
    else:
        found = infer_architecture(file)
        assert (found.model, found.also_fits) == (name, [])
        default = timm.get_pretrained_cfg(name).num_classes
        shown = {key: value for key, value in args.items() if key != "time_steps"}
        assert found.model_args == {
            key: value for key, value in shown.items() if (key, value) != ("num_classes", default)
        }


@pytest.mark.parametrize(
    ("stated", "model", "args"),
    [
        ({"pooling_stat": "0011", "dvs_mode": True, "num_heads": 8}, "sdt_2_256_dvs", {}),
        ({"pooling_stat": "0111", "dvs_mode": False, "num_heads": 8}, "sdt_2_256_gesture", {}),
        ({"pooling_stat": "0011", "dvs_mode": False, "num_heads": 4}, "sdt_2_256", {"in_chans": 2, "num_heads": 4}),
    ],
)
def test_what_a_training_states_tells_networks_apart(stated, model, args, tmp_path):
    content = {"arch": "sdt", "args": argparse.Namespace(model="sdt", time_steps=10, **stated)}
    found = infer_architecture(release_file("sdt_cifar10dvs_2_256_t10", tmp_path / "x.pth", **content))
    assert (found.model, found.model_args, found.time_steps) == (model, args, 10)


def test_heads_that_a_training_states_or_the_command_line_gives(tmp_path, capsys):
    case, path = "spikingformer_cifar10_4_384_t4_batch3", tmp_path / "x.pth"
    found = infer_architecture(release_file(case, path, args=argparse.Namespace(num_heads=8)))
    assert (found.model, found.model_args) == ("spikingformer_4_384", {"num_heads": 8})
    given = ["convert", str(path), str(tmp_path / "out"), "--model-kwargs", "num_heads=6"]
    assert main(given) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_args"]["num_heads"] == 6
    assert "num_heads=6" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "args", "taken", "steps"),
    [
        ("sdt_2_256", {}, "sdt_2_256", 4),
        ("spikformer_2_256_dvs", {}, "sdt_2_256_dvs", 10),  # which it may be; what takes three channels comes later
        ("a2os2a_2_256", {"num_classes": 100}, "sdt_2_256", 4),
    ],
)
def test_of_models_with_the_same_tensors_the_likeliest_is_taken_with_a_warning(name, args, taken, steps, tmp_path):
    torch.save(timm.create_model(name, **args).state_dict(), tmp_path / "x.pth")
    found = infer_architecture(read_checkpoint(tmp_path / "x.pth"))
    assert (found.model, found.time_steps) == (taken, steps)
    assert {name, "a2os2a_2_256"} <= {found.model, *found.also_fits}
    assert found.model not in found.also_fits
    assert infer_architecture(read_checkpoint(tmp_path / "x.pth"), name).model == name


def test_arguments_that_a_user_gives_are_not_the_trainings(tmp_path):
    torch.save(timm.create_model("test_sdt").state_dict(), tmp_path / "x.pth")
    file = read_checkpoint(tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"not with the arguments that are given: .*nope") as error:
        infer_architecture(file, "test_sdt", model_args={"nope": 1})
    assert "training" not in str(error.value)
    file.args.update(model="test_sdt", model_kwargs={"num_heads": 4})
    with pytest.raises(CheckpointError, match=r"that its training states and that are given: .*nope"):
        infer_architecture(file, model_args={"nope": 1})


def test_addition_only_attention_has_no_release(tmp_path):
    release_file("sdt_cifar10_2_512_t4_batch3", tmp_path / "x.pth")
    assert convert(tmp_path / "x.pth", tmp_path / "out").model == "sdt_2_512"
    with pytest.raises(CheckpointError, match="a release's names, and A2OS2A has none"):
        convert(tmp_path / "x.pth", tmp_path / "out", model="a2os2a_2_512", force=True)
