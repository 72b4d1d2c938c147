"""Models from names, folders and files, with their weights or, said so, without; and the hub's commands."""

import argparse

import pytest
import timm
import torch
from safetensors.torch import save_file

from timm_qkformer.cli import main
from timm_qkformer.hub import convert
from timm_qkformer.hub.loading import load_model, shipped_models


@pytest.fixture
def checkpoint(tmp_path):
    model = timm.create_model("test_qkformer", num_classes=5)
    path = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), path)
    return path


def same_weights(model, path):
    from safetensors.torch import load_file

    state = model.state_dict()
    return all(torch.equal(value, state[name]) for name, value in load_file(path).items())


def test_a_name_without_weights_is_random_and_says_so():
    loaded = load_model("test_maxformer", time_steps=2)
    assert loaded.is_random
    assert loaded.title == "test_maxformer (time_steps=2), random weights (seed 0)"
    assert loaded.model.time_steps == 2
    assert not loaded.model.training


def test_random_weights_are_those_of_the_seed_and_leave_the_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second, other = (load_model("test_maxformer", seed=seed).model.head.weight for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_a_checkpoint_file_alone(checkpoint):
    loaded = load_model(str(checkpoint))
    assert (loaded.is_random, loaded.weights) == (False, "weights of weights.safetensors")
    assert loaded.name == "test_qkformer"
    assert same_weights(loaded.model, checkpoint)


def test_a_checkpoint_of_a_model_with_arguments(tmp_path):
    args = {"embed_dims": (8, 16, 32), "num_classes": 3}
    path = tmp_path / "small.pth"
    torch.save({"state_dict": timm.create_model("test_qkformer", **args).state_dict()}, path)
    loaded = load_model("test_qkformer", checkpoint=path, model_args=args)
    assert loaded.title == "test_qkformer (embed_dims=(8, 16, 32), num_classes=3), weights of small.pth"
    with pytest.raises(ValueError, match=r"small\.pth: .*misshapen"):
        load_model("test_qkformer", checkpoint=path)


def test_a_training_checkpoint_says_what_it_is_of(tmp_path):
    args = {"embed_dims": [8, 16, 32], "attn": ["qkca", "qkta", "ssa"], "patch_embed": "cifar", "time_steps": 3}
    trained = timm.create_model("test_qkformer", num_classes=3, in_chans=1, **args)
    written = argparse.Namespace(
        model="test_qkformer", model_kwargs=args, num_classes=3, input_size=[1, 20, 24], mean=[0.3],
        std=[0.35], crop_pct=None, interpolation="", lr=0.1,
    )  # fmt: skip
    path = tmp_path / "last.pth.tar"
    torch.save({"state_dict": trained.state_dict(), "arch": "test_qkformer", "args": written, "epoch": 1}, path)
    loaded = load_model(str(path))
    assert loaded.title == "test_qkformer, weights of last.pth.tar"
    state = loaded.model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in trained.state_dict().items())
    assert loaded.model.time_steps == 3
    config = timm.data.resolve_model_data_config(loaded.model)
    assert (config["input_size"], config["mean"], config["std"]) == ((1, 20, 24), (0.3,), (0.35,))
    assert load_model(str(path), time_steps=5).model.time_steps == 5

    written.model_kwargs = dict(args, embed_dims=[10**6, 10**6, 10**6])
    torch.save({"state_dict": trained.state_dict(), "args": written}, path)
    with pytest.raises(ValueError, match="names the model test_qkformer, which it does not fit"):
        load_model(str(path))


def test_a_converted_folder(checkpoint, tmp_path):
    convert(checkpoint, tmp_path / "folder", model="test_qkformer")
    for source in (str(tmp_path / "folder"), f"local-dir:{tmp_path / 'folder'}"):
        loaded = load_model(source)
        assert (loaded.is_random, loaded.weights) == (False, "pretrained weights")
        assert loaded.name == "folder.custom"
        assert same_weights(loaded.model, checkpoint)
    assert load_model(source, random=True).is_random


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("no_such_model", {}, "neither a registered model"),
        ("FOLDER", {}, "no config.json"),
        ("test_qkformer", {"random": True, "checkpoint": "x.pth"}, "exclude each other"),
        ("FILE", {"random": True}, "stands for itself"),
        ("local-dir:FOLDER", {"checkpoint": "x.pth"}, "weights of its own"),
    ],
)
def test_what_does_not_go_together(source, options, message, checkpoint, tmp_path):
    source = source.replace("FOLDER", str(tmp_path)).replace("FILE", str(checkpoint))
    with pytest.raises(ValueError, match=message):
        load_model(source, **options)


def test_weights_that_are_nowhere(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the variable is read at import
    with pytest.raises(OSError, match="qkformer_hst10_384"):
        load_model("qkformer_hst10_384")
    assert load_model("qkformer_hst10_384", random=True).is_random


def test_shipped_models_load():
    assert "qkformer_hst3_128.nmnist" in shipped_models()
    for name in shipped_models():
        assert not load_model(name).is_random


def test_convert_says_what_it_inferred(checkpoint, tmp_path, capsys):
    more = ["--time-steps", "2", "--model", "test_qkformer"]
    assert main(["convert", str(checkpoint), str(tmp_path / "out"), *more]) == 0
    out = capsys.readouterr().out
    for words in ("plain weights", "md5 ", "model test_qkformer (num_classes=5, ", "T = 2 as given", "local-dir:"):
        assert words in out


def test_errors_are_one_line_and_status_2(checkpoint, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    for argv, words in [
        (["convert", str(checkpoint), str(tmp_path / "out")], "is not empty"),
        (["convert", str(tmp_path / "none.pth"), str(tmp_path / "new")], "there is no such file"),
        (["convert", str(checkpoint), str(tmp_path / "new"), "--time-steps", "0"], "time_steps=0"),
        (["verify", "qkformer_hst4_384", "--data", str(tmp_path)], "has no pretrained weights"),
        (["verify", "nonsense", "--data", str(tmp_path)], "nor a model that timm knows"),
        (["publish", str(tmp_path / "out"), "me/model"], "has no model.safetensors"),
    ]:
        assert main(argv) == 2
        err = capsys.readouterr().err
        assert err.startswith("timm-qkformer: error: ")
        assert words in err
        assert "Traceback" not in err


def test_interrupt_is_not_a_traceback(checkpoint, tmp_path, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("timm_qkformer.hub.convert", interrupted)
    assert main(["convert", str(checkpoint), str(tmp_path / "out")]) == 130
    assert "interrupted" in capsys.readouterr().err
