"""`verify`: classes, transform, counts, both kinds of neurons, resuming."""

import json
import shutil
import sys

import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config

from golden import SHARED
from timm_qkformer.cli import main
from timm_qkformer.hub import convert, verify
from timm_qkformer.hub.verify import find_samples

SYNSETS = ImageNetInfo("imagenet-1k").label_names()
verify_module = sys.modules[verify.__module__]


@pytest.fixture(scope="module")
def folder(tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "tiny"
    convert(tiny_checkpoint, folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two images for each of ten classes."""
    data = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(5)
    for name in "abcdefghij":
        (data / name).mkdir()
        for i in range(2):
            pixels = torch.randint(0, 256, (70, 90, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).resize((180, 140)).save(data / name / f"{i}.png")
    return data


def expected_counts(folder, images, batch_size, coupled):
    """Top-1, top-5 and loss by hand: one transform, one forward pass for each batch."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, batch_coupled=coupled).eval()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    paths = sorted(images.rglob("*.png"))
    inputs = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])
    targets = torch.tensor([sorted({p.parent.name for p in paths}).index(path.parent.name) for path in paths])
    with torch.inference_mode():
        logits = torch.cat([model(batch) for batch in inputs.split(batch_size)])
    hits = logits.topk(5).indices == targets.unsqueeze(1)
    loss = torch.nn.functional.cross_entropy(logits, targets).item()
    return 100 * hits[:, 0].float().mean().item(), 100 * hits.any(1).float().mean().item(), loss


def test_counts_are_those_of_the_plain_loop(folder, images):
    per_sample, coupled = verify(str(folder), images, batch_size=7, workers=0, device="cpu", quiet=True)
    for result, is_coupled in ((per_sample, False), (coupled, True)):
        assert result["batch_coupled"] is is_coupled
        expected = expected_counts(folder, images, 7, is_coupled)
        assert (result["top1"], result["top5"], result["loss"]) == pytest.approx(expected)
        assert result["images"] == 20
        assert result["time_steps"] == 2
        assert result["images_per_second"] > 0
        assert result["input_size"] == [3, 64, 64]


def test_neurons_and_time_steps_can_be_chosen(folder, images):
    args = {"time_steps": 1, "workers": 0, "limit": 3, "device": "cpu", "quiet": True}
    (result,) = verify(str(folder), images, neurons="coupled", **args)
    assert (result["batch_coupled"], result["time_steps"], result["images"]) == (True, 1, 3)


def test_interrupted_run_is_resumed(folder, images, tmp_path, monkeypatch):
    progress = tmp_path / "progress.json"
    args = {"batch_size": 6, "workers": 0, "device": "cpu", "quiet": True, "progress": progress}
    whole = verify(str(folder), images, **{**args, "progress": None})
    monkeypatch.setattr(verify_module, "_SAVE_EVERY", 0.0)
    classify, calls = verify_module._Pass.__call__, []

    def interrupted(self, x):
        calls.append(len(x))
        if len(calls) == 5:  # the third batch, with the first kind of neurons
            raise KeyboardInterrupt
        return classify(self, x)

    monkeypatch.setattr(verify_module._Pass, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        verify(str(folder), images, **args)
    half = json.loads(progress.read_text())
    assert half["done"] == 12
    assert [path.name for path in tmp_path.iterdir()] == ["progress.json"]
    calls = ["not the fifth"] * 9
    resumed = verify(str(folder), images, **args)
    assert calls[9:] == [6, 6, 2, 2]
    for a, b in zip(whole, resumed, strict=True):
        assert {k: v for k, v in a.items() if k != "images_per_second"} == {
            k: v for k, v in b.items() if k != "images_per_second"
        }
    assert verify(str(folder), images, **args)[0]["top1"] == whole[0]["top1"]
    assert len(calls) == 13  # complete
    for counts in half["counts"].values():  # as earlier versions wrote it
        del counts["loss"]
    progress.write_text(json.dumps(half))
    again = verify(str(folder), images, **args)
    assert [(r["top1"], r["loss"]) for r in again] == [(r["top1"], None) for r in whole]


def test_progress_of_another_run_is_refused(folder, images, tmp_path):
    progress = tmp_path / "progress.json"
    args = {"workers": 0, "limit": 2, "device": "cpu", "quiet": True, "progress": progress}
    verify(str(folder), images, **args)
    for other in ({"limit": 3}, {"time_steps": 1}, {"batch_size": 1}, {"neurons": "coupled"}):
        with pytest.raises(ValueError, match="belongs to a run with other"):
            verify(str(folder), images, **{**args, **other})
    progress.write_text("[]")
    with pytest.raises(ValueError, match="is not a progress file"):
        verify(str(folder), images, **args)


class TestSamples:
    def touch(self, root, *paths):
        for path in paths:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).touch()
        return root

    def classes(self, samples, root):
        return [(path.removeprefix(f"{root}/"), index) for path, index in samples]

    def test_part_of_imagenet_has_imagenets_indices(self, tmp_path):
        root = self.touch(tmp_path, f"{SYNSETS[999]}/a.JPEG", f"{SYNSETS[3]}/b.png", f"{SYNSETS[3]}/notes.txt")
        found = self.classes(find_samples(root, 1000), root)
        assert found == [(f"{SYNSETS[3]}/b.png", 3), (f"{SYNSETS[999]}/a.JPEG", 999)]

    def test_all_of_imagenet_is_the_sorted_order(self, tmp_path):
        root = self.touch(tmp_path, *(f"val/{synset}/x.jpg" for synset in SYNSETS), "train/n0/x.jpg")
        assert [index for _, index in find_samples(root, 1000)] == list(range(1000))
        assert sorted(SYNSETS) == SYNSETS

    def test_flat_folder_with_synsets_in_the_names(self, tmp_path):
        root = self.touch(tmp_path, f"{SYNSETS[7]}_cock.JPEG", f"ILSVRC2012_val_00000001_{SYNSETS[9]}.jpg")
        assert {index for _, index in find_samples(root, 1000)} == {7, 9}

    @pytest.mark.parametrize(
        ("paths", "num_classes", "message"),
        [
            ((), 1000, "has no images"),
            (("a/x.jpg", "b/y.jpg"), 10, "has 2 class folders .* model 10 classes"),
            (("a/x.jpg", "y.jpg"), 2, "both beside and inside"),
            (("x.jpg",), 1000, "no ImageNet-1k synset"),
            (("n00000001_x.jpg",), 1000, "no ImageNet-1k synset"),
            ((f"{SYNSETS[0]}_x.jpg",), 10, "for ImageNet-1k, and the model has 10"),
            ((f"{SYNSETS[0]}/x.jpg",), 10, "has 1 class folders"),
        ],
    )
    def test_images_without_a_known_class(self, tmp_path, paths, num_classes, message):
        with pytest.raises(ValueError, match=message):
            find_samples(self.touch(tmp_path, *paths), num_classes)

    def test_no_folder(self, tmp_path):
        with pytest.raises(ValueError, match="is not a folder"):
            find_samples(tmp_path / "nothing", 10)


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_images_are_named_not_skipped(workers, folder, images, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(images, data)
    (data / "c" / "1.png").write_bytes((data / "c" / "1.png").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"^/.*c/1\.png is not a readable image: [^\n]+$"):
        verify(str(folder), data, workers=workers, device="cpu", quiet=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"neurons": "none"}, "neurons='none' is unknown"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"limit": 0}, "limit=0"),
        ({"workers": -1}, "workers=-1"),
    ],
)
def test_arguments_outside_their_range_are_refused(arguments, message, folder, images):
    with pytest.raises(ValueError, match=message):
        verify(str(folder), images, **arguments)


def test_unknown_models_are_refused(images, tmp_path):
    for name in ("no_such_model", str(tmp_path)):
        with pytest.raises(ValueError, match=r"neither a folder with a config\.json nor a model"):
            verify(name, images)


def test_models_without_coupled_neurons_are_measured_per_sample(images, tmp_path):
    model = timm.create_model("test_maxformer", num_classes=10)
    torch.save(model.state_dict(), tmp_path / "x.pth")
    convert(tmp_path / "x.pth", tmp_path / "out", model="test_maxformer")
    args = {"workers": 0, "limit": 2, "device": "cpu", "quiet": True}
    assert [result["batch_coupled"] for result in verify(str(tmp_path / "out"), images, **args)] == [False]
    with pytest.raises(ValueError, match="no coupled neurons"):
        verify(str(tmp_path / "out"), images, neurons="coupled", **args)


def test_command_writes_its_results_once(folder, images, tmp_path, capsys):
    output = tmp_path / "result.json"
    argv = ["verify", str(folder), "--data", str(images), "--limit", "4", "--workers", "0", "--device", "cpu"]
    assert main([*argv, "--output", str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["per sample", "coupled", f"wrote {output}"]
    assert all("4 images of 64x64, T = 2" in line for line in lines[:2])
    assert [result["images"] for result in json.loads(output.read_text())] == [4, 4]
    assert main([*argv, "--output", str(output)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_imagenet_photographs(tmp_path):
    """The smoke test on real photographs: a model with random weights knows none, and every one is looked at."""
    photographs = SHARED / "data" / "imagenet_samples"
    if not photographs.is_dir():
        pytest.skip(f"the photographs are not here: {photographs} does not exist")
    model = timm.create_model("test_qkformer", num_classes=1000)
    torch.save(model.state_dict(), tmp_path / "x.pth")
    convert(tmp_path / "x.pth", tmp_path / "out", model="test_qkformer")
    (result, _) = verify(str(tmp_path / "out"), photographs, workers=2, device="cpu", quiet=True)
    assert result["images"] == 24
    assert 0 <= result["top1"] <= result["top5"] <= 100
    assert len({index for _, index in find_samples(photographs, 1000)}) > 20
