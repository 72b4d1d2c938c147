"""`convert`: what it infers and writes, and that the folder gives the checkpoint's logits wherever it loads."""

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from hub_client import logits_of
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file

from golden import CASES, GoldenCase
from release import in_release_order, release_state_dict
from timm_qkformer import quantize_weights
from timm_qkformer.hub import CheckpointError, convert, infer, read_checkpoint, verify
from timm_qkformer.hub.infer import RELEASES, find_release
from training_dict import training_checkpoint


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "out"


def save(content, path):
    torch.save(content, path)
    return path


def test_training_checkpoint_gives_its_own_logits(tiny_model, tiny_checkpoint, folder):
    done = convert(tiny_checkpoint, folder)
    assert (done.model, done.tag) == ("test_qkformer", "custom")
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert (loaded.time_steps, loaded.num_classes) == (2, 10)  # the training's, not the defaults
    assert logits_of(loaded.eval()) == logits_of(tiny_model)
    assert any(any(row) for row in logits_of(tiny_model))


def test_folder_holds_weights_config_and_card(tiny_model, tiny_checkpoint, folder):
    convert(tiny_checkpoint, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert [path.name for path in folder.parent.iterdir()] == ["out"]
    tensors = load_file(folder / "model.safetensors")
    assert tensors.keys() == tiny_model.state_dict().keys()
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "test_qkformer"
    assert config["num_classes"] == 10
    assert config["model_args"]["time_steps"] == 2
    assert config["model_args"]["batch_coupled"] is False
    assert config["pretrained_cfg"]["input_size"] == [3, 64, 64]
    assert config["pretrained_cfg"]["paper_ids"] == "arXiv:2403.16552"
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "timm"
    assert card.data.license == "unknown"
    facts = ("Time steps:** 2", "checkpoint-199.pth", "Epoch:** 199", "issue 14", "zhou2024qkformer", "Not measured")
    for words in facts:
        assert words in card.text


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_transformers_gives_the_same_logits(tiny_model, tiny_checkpoint, folder):
    """In a process that imports transformers alone: the plugin registers the models when transformers imports timm."""
    convert(tiny_checkpoint, folder)
    code = """
import json, sys
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained(sys.argv[1]).eval()
sys.path.insert(0, sys.argv[2])
from hub_client import logits_of
print(json.dumps(logits_of(lambda x: model(x).logits)))
"""
    command = [sys.executable, "-c", code, str(folder), str(Path(__file__).parent)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == logits_of(tiny_model)


@pytest.mark.parametrize(("name", "time_steps"), [("imagenet_10_384_t1", 1), ("imagenet_10_384_t4_batch3_64px", 4)])
def test_synthetic_training_checkpoint_matches_the_golden_logits(name, time_steps, folder, tmp_path):
    golden = GoldenCase(name)
    content = training_checkpoint(golden.checkpoint, model="QKFormer_10_384", time_step=time_steps)
    source = save(content, tmp_path / "checkpoint-199.pth")
    done = convert(source, folder, dtype="float64")
    source.unlink()
    assert done.model == CASES[name][0]
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, dtype=torch.float64).eval()
    assert model.time_steps == time_steps
    with torch.inference_mode():
        torch.testing.assert_close(model(golden.input), golden.one_by_one, rtol=0.0, atol=1e-9)
        coupled = timm.create_model(
            f"local-dir:{folder}", pretrained=True, dtype=torch.float64, batch_coupled=True
        ).eval()
        torch.testing.assert_close(coupled(golden.input), golden.batched, rtol=0.0, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "model", "args"),
    [
        ("cifar10_4_384_t4_batch3", "qkformer_hst4_384", {}),
        ("cifar10dvs_2_256_t10", "qkformer_hst2_256", {}),
        ("ms_imagenet_10_384_t4", "qkformer_hst10_384_ms", {}),
        ("maxformer_imagenet_10_384_t4", "maxformer_10_384", {}),
    ],
)
def test_every_family_is_inferred(name, model, args, folder, tmp_path):
    golden = GoldenCase(name)
    done = convert(save({"state_dict": golden.checkpoint}, tmp_path / "checkpoint.pth"), folder, time_steps=3)
    assert done.model == model
    assert done.model_args["time_steps"] == 3
    assert timm.create_model(f"local-dir:{folder}", pretrained=True).time_steps == 3


def test_public_file_is_taken_by_position_going_by_its_name(folder, tmp_path):
    golden = GoldenCase("ms_imagenet_10_384_t4")
    tensors = {f"tensor{i}": tensor for i, tensor in enumerate(golden.checkpoint.values())}
    source = save({"state_dict": tensors}, tmp_path / "ms_qk_10-384_T4.pth.tar")
    done = convert(source, folder, dtype="float64")
    assert (done.model, done.tag, done.model_args["time_steps"]) == ("qkformer_hst10_384_ms", "t4_in1k", 4)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, dtype=torch.float64).eval()
    with torch.inference_mode():
        torch.testing.assert_close(model(golden.input), golden.one_by_one, rtol=0.0, atol=1e-9)


def variant(**kwargs):
    torch.manual_seed(2)
    return timm.create_model("test_qkformer", **{"num_classes": 7, **kwargs})


def test_classes_channels_and_mlp_ratio_come_from_the_tensors(folder, tmp_path):
    model = variant(in_chans=2, mlp_ratio=2.0)
    convert(save(release_state_dict(model), tmp_path / "x.pth"), folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["num_classes"] == 7
    assert config["model_args"]["in_chans"] == 2
    assert config["model_args"]["mlp_ratio"] == 2.0
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0.0, atol=0.0)


def test_order_of_tensors_does_not_matter(folder, tmp_path):
    model = variant()
    tensors = {name: value.contiguous() for name, value in release_state_dict(model).items()}
    save_file(dict(sorted(tensors.items(), reverse=True)), tmp_path / "x.safetensors")
    assert convert(tmp_path / "x.safetensors", folder).model == "test_qkformer"
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert torch.equal(loaded.stem.conv.weight, model.stem.conv.weight)


def test_our_own_training_checkpoints_name_their_model(folder, tmp_path):
    # timm's trainer writes such checkpoints; the membrane-shortcut variant has the same tensors.
    args = argparse.Namespace(model="test_qkformer_ms")
    model = timm.create_model("test_qkformer_ms", num_classes=7)
    content = {"arch": "test_qkformer_ms", "state_dict": model.state_dict(), "args": args}
    assert convert(save(content, tmp_path / "x.pth"), folder).model == "test_qkformer_ms"
    done = convert(save(model.state_dict(), tmp_path / "y.pth"), folder, force=True)
    assert done.model == "test_qkformer"
    assert any("test_qkformer_ms" in line and "--model" in line for line in done.report)


def test_our_own_training_checkpoints_state_the_arguments_of_their_model(folder, tmp_path):
    kwargs = {"embed_dims": [8, 16, 32], "depths": [1, 0, 1], "attn": "qkca", "time_steps": 3, "mlp_ratio": 2.0}
    kwargs |= {"neuron": "plif", "neuron_args": {"v_threshold": 0.25}}
    model = timm.create_model("qkformer_hst3_192", num_classes=7, **kwargs).eval()
    args = argparse.Namespace(model="qkformer_hst3_192", model_kwargs=kwargs, num_classes=7, drop_path=0.2)
    source = save({"state_dict": model.state_dict(), "args": args}, tmp_path / "x.pth")
    done = convert(source, folder)
    assert done.model == "qkformer_hst3_192"
    assert done.model_args["neuron_args"] == {"v_threshold": 0.25}
    assert any("T = 3 from the training's arguments, time_steps=3" in line for line in done.report)
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = 3 * torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(x), model(x))
    assert loaded(x).std() > 0
    args.model_kwargs = {**kwargs, "depths": [1, 10**9, 1]}
    with pytest.raises(CheckpointError, match=r"its training states depths=\[1, 1000000000, 1\], but it has \d+ t"):
        convert(save({"state_dict": model.state_dict(), "args": args}, tmp_path / "w.pth"), folder, force=True)
    args.model_kwargs = {**kwargs, "attn": "softmax"}
    with pytest.raises(CheckpointError, match="qkformer_hst3_192: attn='softmax': operator 'softmax' is unknown"):
        convert(save({"state_dict": model.state_dict(), "args": args}, tmp_path / "y.pth"), folder, force=True)
    args.model_kwargs = {**kwargs, "mixer": "ssa"}
    with pytest.raises(CheckpointError, match=r"not with the arguments that its training states: .*mixer"):
        convert(save({"state_dict": model.state_dict(), "args": args}, tmp_path / "z.pth"), folder, force=True)


def test_position_counts_only_for_a_model_that_is_named(folder, tmp_path):
    tensors = in_release_order(release_state_dict(timm.create_model("test_qkformer", num_classes=7)))
    renamed = {name if "head" in name or "patch_embed1" in name else f"old.{name}": t for name, t in tensors.items()}
    source = save(renamed, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="test_qkformer_ms: fits by the order of its tensors alone"):
        convert(source, folder)
    save({f"tensor{i}": tensor for i, tensor in enumerate(tensors.values())}, source)
    with pytest.raises(CheckpointError, match="no classifier"):
        convert(source, folder)
    done = convert(source, folder, model="test_qkformer_ms")
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert done.model == "test_qkformer_ms"
    assert torch.equal(loaded.stages[2].blocks[1].mlp.fc2.conv.bias, tensors["stage3.1.mlp.fc2_conv.bias"])


def test_a_classifier_without_a_name_may_have_decoders_behind_it(folder, tmp_path):
    golden = GoldenCase("spiliformer_cifar10_4_384_t4")
    strange = {f"tensor{i}": tensor for i, tensor in enumerate(golden.checkpoint.values())}
    done = convert(save(strange, tmp_path / "x.pth"), folder, model="spiliformer_4_384")
    assert done.model == "spiliformer_4_384"
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert loaded.num_classes == 10
    torch.testing.assert_close(loaded.head.weight, golden.checkpoint["head.weight"].float())


def test_time_steps_come_from_arguments_then_the_file_name_then_the_model(folder, tmp_path):
    tensors = release_state_dict(variant())
    for name, content, expected, source in [
        ("tiny_T6.pth", {"model": tensors, "args": argparse.Namespace(T=5)}, 5, "T=5"),
        ("tiny_T6.pth", {"model": tensors}, 6, "file's name"),
        ("tiny.pth", {"model": tensors, "args": argparse.Namespace(time_step=0)}, 4, "by default"),
    ]:
        done = convert(save(content, tmp_path / name), folder, force=True)
        assert done.model_args["time_steps"] == expected
        assert any(source in line for line in done.report)
    assert convert(tmp_path / "tiny_T6.pth", folder, time_steps=1, force=True).model_args["time_steps"] == 1


def test_known_md5_gives_tag_input_size_and_published_accuracy(tiny_model, folder, tmp_path, monkeypatch):
    source = save(release_state_dict(tiny_model), tmp_path / "x.pth")
    known = RELEASES[4]._replace(model="test_qkformer", md5=read_checkpoint(source).md5)
    monkeypatch.setattr(infer, "RELEASES", (known,))
    done = convert(source, folder)
    assert done.tag == "ft384_in1k"
    cfg = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    assert cfg["input_size"] == [3, 384, 384]
    assert cfg["crop_pct"] == 1.0
    card = (folder / "README.md").read_text()
    assert "85.65 % | | 50,000 | coupled | published by the authors" in card
    assert "hf-hub:timm-qkformer/test_qkformer.ft384_in1k" in card
    assert "imagenet-1k" in card


def test_tag_of_another_file_brings_its_size_but_not_its_accuracy(folder, tmp_path):
    model = timm.create_model("qkformer_hst10_768")
    source = save(release_state_dict(model), tmp_path / "x.pth")
    done = convert(source, folder, tag="ft384_in1k")
    assert any("99a671118f67a680aa38b6ac5aae449a; this file is another" in line for line in done.report)
    config = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{folder}", pretrained=True))
    assert (config["input_size"], config["crop_pct"]) == ((3, 384, 384), 1.0)
    card = (folder / "README.md").read_text()
    assert "model card for qkformer_hst10_768.ft384_in1k" in card.lower()
    assert "85.65" not in card


def test_release_table_is_that_of_the_pretrained_configs():
    for release in RELEASES:
        assert find_release(release.md5) == release
        cfg = timm.get_pretrained_cfg(release.name)
        assert cfg.input_size == (3, release.input_size, release.input_size)
        assert cfg.hf_hub_id == f"timm-qkformer/{release.name}"


def test_input_size_sets_the_crop_of_the_release(folder, tmp_path):
    source = save({"model": release_state_dict(variant()), "args": {"input_size": 96}}, tmp_path / "x.pth")
    for given, expected in [(None, 96), (128, 128)]:
        convert(source, folder, input_size=given, force=True)
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
        assert timm.data.resolve_model_data_config(model)["input_size"] == (3, expected, expected)


def test_normalisation_is_that_of_the_training(folder, tmp_path):
    args = argparse.Namespace(mean=[0.5, 0.4, 0.3], std=(0.2, 0.2, 0.1), input_size=[3, 80, 80])
    convert(save({"model": release_state_dict(variant()), "args": args}, tmp_path / "x.pth"), folder)
    config = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{folder}", pretrained=True))
    assert (list(config["mean"]), list(config["std"])) == ([0.5, 0.4, 0.3], [0.2, 0.2, 0.1])
    assert config["input_size"] == (3, 80, 80)
    args.std = [0.0, float("nan"), 0.1]
    convert(save({"model": release_state_dict(variant()), "args": args}, tmp_path / "x.pth"), folder, force=True)
    assert "NaN" not in (folder / "config.json").read_text()


@pytest.mark.parametrize("values", [(0.3, 0.35), None])
def test_a_grey_model_keeps_what_it_was_trained_with(values, folder, tmp_path):
    model = timm.create_model("qkformer_hst3_192", num_classes=7, in_chans=1, global_pool="max", batch_coupled=True)
    args = argparse.Namespace(model="qkformer_hst3_192", gp="max", model_kwargs={"batch_coupled": True})
    if values is not None:
        args.mean, args.std = [values[0]], [values[1]]
    convert(save({"state_dict": model.state_dict(), "args": args}, tmp_path / "x.pth"), folder)
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(loaded)
    assert config["input_size"] == (1, 32, 32)
    assert len(config["mean"]) == len(config["std"]) == 1
    assert values is None or (config["mean"][0], config["std"][0]) == values
    x = 3 * torch.randn(2, 1, 32, 32)
    assert torch.equal(loaded(x), model.eval()(x))
    (tmp_path / "data").mkdir()
    for i in range(7):
        (tmp_path / "data" / str(i)).mkdir()
        Image.new("L", (32, 32), 30 * i).save(tmp_path / "data" / str(i) / "a.png")
    results = verify(str(folder), tmp_path / "data", workers=0, device="cpu", quiet=True)
    assert [result["images"] for result in results] == [7, 7]


def test_dtypes_are_widened_exactly_and_never_narrowed_silently(folder, tmp_path):
    model = variant()
    half = {name: t.half() if t.is_floating_point() else t for name, t in release_state_dict(model).items()}
    done = convert(save(half, tmp_path / "x.pth"), folder)
    assert any("tensors were float16, written as float32" in line for line in done.report)
    written = load_file(folder / "model.safetensors")["head.weight"]
    assert written.dtype == torch.float32
    assert torch.equal(written, half["head.weight"].float())
    huge = {name: t.double() if t.is_floating_point() else t for name, t in release_state_dict(model).items()}
    huge["head.bias"][0] = 1e300
    source = save(huge, tmp_path / "y.pth")
    with pytest.raises(CheckpointError, match=r"head\.bias has values too large for torch\.float32"):
        convert(source, folder, force=True)
    convert(source, folder, force=True, dtype="float64")
    assert load_file(folder / "model.safetensors")["head.bias"][0] == 1e300


def test_half_precision_halves_the_file_and_computes_in_single(folder, tmp_path):
    weights = release_state_dict(variant())
    convert(save(weights, tmp_path / "x.pth"), folder, dtype="float16")
    written = load_file(folder / "model.safetensors")
    assert {t.dtype for name, t in written.items() if not name.endswith("num_batches_tracked")} == {torch.float16}
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert model.head.weight.dtype == torch.float32
    assert torch.equal(model.head.weight, weights["head.weight"].half().float())


def test_quantized_weights_are_exact_in_half_precision_and_no_longer_the_authors(folder, tmp_path, monkeypatch):
    model = variant()
    source = save(release_state_dict(model), tmp_path / "x.pth")
    known = RELEASES[4]._replace(model="test_qkformer", md5=read_checkpoint(source).md5)
    monkeypatch.setattr(infer, "RELEASES", (known,))
    done = convert(source, folder, dtype="float16", quantize_weights=True)
    assert done.tag == "custom"
    assert "weights rounded to 8 bits, one step per output channel" in done.report
    card = (folder / "README.md").read_text()
    assert "**Quantization:** weights rounded to 8 bits" in card
    assert "published by the authors" not in card
    found = timm.create_model(f"local-dir:{folder}", pretrained=True).state_dict()
    quantize_weights(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(found[name], tensor.half().float() if tensor.is_floating_point() else tensor)
    name = "stages.0.embed.main.0.conv.weight"
    assert torch.equal(found[name], model.state_dict()[name])


def test_nothing_is_overwritten_without_force(tiny_checkpoint, folder):
    folder.mkdir()
    convert(tiny_checkpoint, folder)  # an empty folder will do
    before = (folder / "model.safetensors").stat().st_ino
    with pytest.raises(FileExistsError, match="is not empty"):
        convert(tiny_checkpoint, folder)
    assert (folder / "model.safetensors").stat().st_ino == before
    convert(tiny_checkpoint, folder, force=True)
    assert (folder / "model.safetensors").stat().st_ino != before
    (folder / "thesis.txt").touch()
    with pytest.raises(FileExistsError, match=r"holds thesis\.txt besides a converted model"):
        convert(tiny_checkpoint, folder, force=True)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(FileExistsError, match="something other than a converted model"):
        convert(tiny_checkpoint, folder, force=True)
    assert (folder / "thesis.txt").exists()
    file = folder.parent / "file"
    file.touch()
    with pytest.raises(FileExistsError, match="not a folder"):
        convert(tiny_checkpoint, file, force=True)


def test_a_failure_leaves_the_old_folder_and_nothing_else(tiny_checkpoint, folder, monkeypatch):
    convert(tiny_checkpoint, folder)
    card = (folder / "README.md").read_text()

    def fail(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tiny_checkpoint, folder, force=True, measure=fail)
    real = Path.rename

    def rename(self, target):
        if target == folder and not self.name.endswith(".former"):
            raise OSError("no room")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="no room"):
        convert(tiny_checkpoint, folder, force=True)
    assert (folder / "README.md").read_text() == card
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


def test_measured_accuracy_stands_in_the_card(tiny_checkpoint, folder):
    def measure(path):
        assert timm.create_model(f"local-dir:{path}", pretrained=True).time_steps == 2
        return [{"batch_coupled": False, "top1": 12.5, "top5": 50.0, "images": 24, "time_steps": 2}]

    convert(tiny_checkpoint, folder, measure=measure)
    assert "| 12.50 % | 50.00 % | 24 | per sample |" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "resnet18"}, "model='resnet18' is unknown"),
        ({"model": "qkformer_hst10_384"}, "width of none of qkformer_hst10_384"),
        ({"time_steps": 0}, "time_steps=0 must be at least 1"),
        ({"input_size": 0}, "input_size=0 must be"),
        ({"dtype": "int8"}, "dtype='int8' is unknown"),
        ({"ema": True}, "no moving average"),
    ],
)
def test_arguments_outside_their_range_are_refused(arguments, message, tiny_checkpoint, folder):
    with pytest.raises(ValueError, match=message):
        convert(tiny_checkpoint, folder, **arguments)
    assert not folder.exists()


def test_coupled_neurons_are_written_down_where_there_are_any(tiny_checkpoint, folder, tmp_path):
    assert convert(tiny_checkpoint, folder, batch_coupled=True).model_args["batch_coupled"] is True
    model = timm.create_model("test_maxformer", num_classes=7)
    source = save(model.state_dict(), tmp_path / "x.pth")
    with pytest.raises(ValueError, match="no coupled neurons"):
        convert(source, tmp_path / "max", batch_coupled=True, model="test_maxformer")
