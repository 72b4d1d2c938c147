"""Flags, recipes, and what is refused."""

from dataclasses import FrozenInstanceError

import pytest
import yaml

from timm_qkformer.training.recipes import list_recipes, recipe_path
from timm_qkformer.training.trainer.config import parse_train, read_recipe
from timm_qkformer.training.trainer.settings import OPTIONS, UNSUPPORTED
from training_dict import TRAIN_PY_KEYS as KEYS


def recipe(tmp_path, **content):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_every_key_of_train_py_is_taken_or_refused():
    own = {name for name, option in OPTIONS.items() if option.group == "not in train.py"}
    theirs = OPTIONS.keys() - own
    assert theirs | UNSUPPORTED.keys() == KEYS
    assert not theirs & UNSUPPORTED.keys()
    assert not own & KEYS


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_is_taken_by_its_name(name):
    args = parse_train(["-c", name, "--data-dir", "data"])
    for key, value in yaml.safe_load(recipe_path(name).read_text()).items():
        assert getattr(args, key) == value


def test_the_command_line_overrides_the_recipe_and_this_the_defaults(tmp_path):
    path = recipe(tmp_path, amp=True, lr="1e-3", model_kwargs={"time_steps": 2}, opt="adamw")
    args = parse_train(["-c", path, "data", "--no-amp", "--opt", "lamb"])
    assert (args.amp, args.lr, args.opt, args.data_dir) == (False, 1e-3, "lamb", "data")
    assert args.model_kwargs == {"time_steps": 2}
    assert args.momentum == 0.9
    args = parse_train(["-c", path, "data", "--model-kwargs", "time_steps=4", "depths=(1,1,1)"])
    assert args.model_kwargs == {"time_steps": 4, "depths": (1, 1, 1)}


def test_nothing_changes_settings():
    with pytest.raises(FrozenInstanceError):
        parse_train(["data"]).lr = 0.1


def test_the_former_name_of_a_setting(tmp_path):
    former, current = recipe(tmp_path, round_weights=True), parse_train(["data", "--quantize-weights"])
    assert parse_train(["data", "--round-weights"]) == current == parse_train(["data", "-c", former])
    assert not parse_train(["data", "-c", former, "--no-quantize-weights"]).quantize_weights


def test_spellings_of_train_py():
    line = (
        "DIR -b 32 -vb 8 -j 0 --dr 0.5 --torchcompile --no-aug --no-prefetcher --scale 0.5 1 --input-size 1 28 28 "
        "--opt-betas 0.9 0.99 --clip-grad 1 --clip-mode agc --recovery-interval 5 --local_rank 1"
    )
    args = parse_train(line.split())
    assert (args.batch_size, args.validation_batch_size, args.workers, args.decay_rate) == (32, 8, 0, 0.5)
    assert args.torchcompile == "inductor"
    assert args.no_aug
    assert args.no_prefetcher
    assert args.scale == [0.5, 1.0]
    assert args.input_size == [1, 28, 28]
    assert args.clip_mode == "agc"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("drop_pth", 0.1, "key 'drop_pth' is unknown; did you mean 'drop_path'"),
        ("zzz", 1, "key 'zzz' is unknown$"),
        ("batch_size", "many", "batch_size needs to be int, got 'many'"),
        ("batch_size", 1.5, "batch_size needs to be int, got 1.5"),
        ("amp", "yes!", "amp needs to be true or false"),
        ("lr", "fast", "lr needs to be float"),
        ("mean", 0.5, "mean needs to be float .list of any number."),
        ("input_size", [3, 32], "input_size needs to be int .list of 3."),
        ("model_kwargs", "T=4", "model_kwargs needs to be a mapping"),
        ("clip_mode", "soft", "clip_mode needs to be 'norm' or 'value' or 'agc'"),
        ("epochs", None, "epochs needs to be int, got None"),
        ("kd_loss_type", "mse", "kd_loss_type 'mse' is not supported: a teacher"),
        ("torchscript", True, "torchscript True is not supported"),
        ("naflex_max_seq_len", 100, "is not supported: NaFlex"),
    ],
)
def test_bad_recipes(key, value, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        read_recipe(recipe(tmp_path, **{key: value}))
    assert "recipe.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_defaults_of_what_is_not_supported_are_fine(tmp_path):
    read_recipe(recipe(tmp_path, **{key: default for key, (default, _) in UNSUPPORTED.items()}))
    parse_train(["data", "--kd-temperature", "4.0", "--naflex-train-seq-lens", "128", "256", "576", "784", "1024"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--torchscript", "--torchscript True is not supported: TorchScript is not trained"),
        ("--log-wandb", "--log-wandb True is not supported: Weights & Biases"),
        ("--aug-splits 3", "--aug-splits 3 is not supported"),
        ("--kd-loss-type mse", "--kd-loss-type 'mse' is not supported"),
        ("--epochs 0", "epochs=0 needs to be at least 1"),
        ("--batch-size 3 --mixup 0.1", "batch_size=3 needs to be even"),
        ("--lr 0", "lr=0.0 needs to be above 0"),
        ("--in-chans 1 --input-size 3 32 32", "in_chans=1 and input_size=.3, 32, 32. disagree"),
        ("--start-epoch -1", "start_epoch=-1 needs to be at least 0"),
        ("--pretrained-path file.pth", "pretrained_path='file.pth' needs pretrained, too"),
        ("--amp --model-dtype bfloat16", "model_dtype='bfloat16' does not go with amp"),
        ("--dataset tfds/cifar10", "dataset='tfds/cifar10' is streamed"),
        ("-c cifar11", "recipe 'cifar11' is neither a file nor one of .*cifar10"),
        ("--dataset events/nmnist --reprob 0.25", "reprob=0.25 is for images and has no meaning for events/nmnist"),
        ("--dataset events/nmnist --aa rand-m9", "aa='rand-m9' is for images; for events it needs to be 'snn-wide'"),
    ],
)
def test_bad_flags(flags, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        parse_train(["data", *flags.split()])


@pytest.mark.parametrize("flags", [[], ["--dataset", "torch/cifar10"]])
def test_data_is_needed(flags):
    with pytest.raises(ValueError, match="--data-dir DIR"):
        parse_train(flags)


@pytest.mark.parametrize("content", ["- a\n- b\n", "a: [\n", ""])
def test_recipe_that_is_none(content, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"recipe .*recipe.yaml (is not YAML|needs to hold)"):
        read_recipe(str(path))
