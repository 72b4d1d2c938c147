"""`timm-qkformer validate` against the same sums by hand."""

import csv
import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import create_dataset, create_transform
from tiny_runs import PLAIN, RECIPE, flags, make_images, run, write_recipe

from timm_qkformer import cli
from timm_qkformer.hub import convert
from timm_qkformer.training.trainer.evaluate import resolve_validate, validate


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs")
    return run(data, output, "run", epochs=1, lr=0.05, **PLAIN).folder / "last.pth.tar"


def measure(data, **given):
    given = {"model": RECIPE["model"], "data_dir": str(data), "device": "cpu", "workers": 0, **given}
    return validate(resolve_validate(given), show=False)


def by_hand(data, checkpoint):
    model = timm.create_model(RECIPE["model"], num_classes=3, **RECIPE["model_kwargs"]).eval()
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    cfg = model.pretrained_cfg
    transform = create_transform(
        cfg["input_size"], crop_pct=1.0, mean=cfg["mean"], std=cfg["std"], interpolation=cfg["interpolation"]
    )
    samples = [(transform(x), y) for x, y in create_dataset("", str(data), split="test")]
    with torch.inference_mode():
        logits = torch.cat([model(x[None]) for x, _ in samples])
    targets = torch.tensor([y for _, y in samples])
    top1 = 100 * (logits.argmax(1) == targets).double().mean().item()
    return top1, torch.nn.functional.cross_entropy(logits.double(), targets).item()


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_every_sample_counts_once(batch_size, data, trained):
    results = measure(data, checkpoint=str(trained), batch_size=batch_size)
    top1, loss = by_hand(data, trained)
    assert results["samples"] == 15
    assert results["top1"] == pytest.approx(top1, abs=1e-9)
    assert results["loss"] == pytest.approx(loss, abs=1e-5)
    assert results["top5"] == 100.0
    assert 0 < results["firing_rate"] < 1


def test_results_are_those_of_the_training_run(data, trained):
    content = torch.load(trained, weights_only=True)
    row = content["trainer"]["history"][-1]
    results = measure(data, checkpoint=str(trained))
    assert results["top1"] == pytest.approx(row["eval_top1"], abs=1e-9)
    assert results["loss"] == pytest.approx(row["eval_loss"], rel=1e-5)


def test_weights_alone_and_a_recipe(data, trained, tmp_path):
    expected = measure(data, checkpoint=str(trained))
    save_file(torch.load(trained, weights_only=True)["state_dict"], tmp_path / "w.safetensors")
    recipe = write_recipe(tmp_path / "recipe.yaml")
    results = measure(data, checkpoint=str(tmp_path / "w.safetensors"), config=str(recipe))
    assert results["top1"] == expected["top1"]
    assert results["loss"] == pytest.approx(expected["loss"], rel=1e-6)


@pytest.mark.parametrize("suffix", [".json", ".csv"])
def test_command_and_file(suffix, data, trained, tmp_path, capsys):
    path = tmp_path / f"results{suffix}"
    line = ["validate", RECIPE["model"], "--data-dir", str(data), "--checkpoint", str(trained), "--device", "cpu"]
    line += ["--workers", "0", "--results-file", str(path)]
    assert cli.main(line) == 0
    out = capsys.readouterr().out
    results = json.loads(path.read_text()) if suffix == ".json" else next(csv.DictReader(path.open()))
    assert f"top-1 {float(results['top1']):.3f} %" in out
    assert float(results["images_per_second"]) > 0
    assert cli.main(line) == 2
    assert "exists already; choose another name" in capsys.readouterr().err


def test_errors(data, trained, tmp_path, capsys):
    def fails(model, *more, root=data):
        assert cli.main(["validate", model, "--data-dir", str(root), "--device", "cpu", *map(str, more)]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    assert "is of the model qkformer_hst4_384, not of qkformer_hst2_256" in fails(
        "qkformer_hst2_256", "--checkpoint", trained
    )
    assert "it is a file; name its model, and the file with --checkpoint" in fails(str(trained))
    assert "nowhere: there is no such file" in fails(RECIPE["model"], "--checkpoint", "nowhere")
    assert "needs to end in .json or .csv" in fails(RECIPE["model"], "--results-file", tmp_path / "r.txt")
    assert "does not exist" in fails(RECIPE["model"], "--checkpoint", trained, root=tmp_path / "no")
    two = make_images(tmp_path / "two", 1, 2, classes=("ant", "bee"))
    assert "has 2 classes (ant, bee), but the model has num_classes=3" in fails(
        RECIPE["model"], "--checkpoint", trained, root=two
    )
    assert "does not fit the model" in fails(RECIPE["model"], "--checkpoint", trained, "--num-classes", 4)


def test_moving_average(data, tmp_path):
    last = run(data, tmp_path, "ema", epochs=1, model_ema=True, model_ema_decay=0.9).folder / "last.pth.tar"
    average, itself = (measure(data, checkpoint=str(last), no_ema=no) for no in (False, True))
    assert average["loss"] != itself["loss"]
    row = torch.load(last, weights_only=True)["trainer"]["history"][-1]
    assert average["loss"] == pytest.approx(row["eval_loss"], rel=1e-5)


def test_flags_of_the_train_command_are_not_all_there(data, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml")
    with pytest.raises(SystemExit):
        cli.main(["validate", RECIPE["model"], *flags(data, tmp_path, "x", recipe)])


def test_arguments_of_the_model_are_merged(data, trained, tmp_path, caplog):
    """One that is given leaves the checkpoint's others alone, and says what it replaces."""
    stated = torch.load(trained, weights_only=True)["args"]["model_kwargs"]
    settings = resolve_validate(
        {"model": RECIPE["model"], "data_dir": str(data), "checkpoint": str(trained), "model_kwargs": {"time_steps": 3}}
    )
    assert settings.model_kwargs == {**stated, "time_steps": 3}
    assert f"time_steps=3 replaces the checkpoint's {stated['time_steps']}" in caplog.text
    assert measure(data, checkpoint=str(trained), time_steps=3)["time_steps"] == 3
    with pytest.raises(ValueError, match="disagree"):
        measure(data, checkpoint=str(trained), time_steps=3, model_kwargs={"time_steps": 2})


def test_a_folder_is_shown_what_the_training_was(data, tmp_path):
    seen = {"crop_pct": 0.4, "interpolation": "nearest", "input_size": [3, 33, 47]}
    last = run(data, tmp_path, "run", epochs=1, **PLAIN, **seen).folder / "last.pth.tar"
    convert(last, tmp_path / "out")
    expected = measure(data, checkpoint=str(last))
    for model in (str(tmp_path / "out"), f"local-dir:{tmp_path / 'out'}"):
        found = measure(data, model=model, split="test")
        for key in ("loss", "firing_rate"):
            assert found[key] == pytest.approx(expected[key], rel=1e-6)
        assert (found["top1"], found["input_size"]) == (expected["top1"], [3, 33, 47])
    classes = sorted(path.name for path in (data / "train").iterdir())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["label_names"] == classes
