"""Calibration: what is recorded, which threshold is chosen on what, and where it is written; the command as typed."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from timm_qkformer import anytime, cli
from timm_qkformer.streaming import ExitRule
from timm_qkformer.streaming.calibration import Recorded, calibrate, choose, curve, halves, outcome, record
from tiny import lively


def planted() -> Recorded:
    """Eight samples, three steps: the surer after step 1, the likelier right; all right after step 3 but the last."""
    sure = torch.tensor([0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6])
    right = torch.tensor(
        [[1, 1, 1, 1, 0, 1, 0, 0], [1, 1, 1, 1, 1, 0, 0, 1], [1, 1, 1, 1, 1, 1, 1, 0]], dtype=torch.bool
    )
    p = torch.where(right.unsqueeze(-1), torch.stack([sure, 1 - sure], -1), torch.stack([1 - sure, sure], -1))
    return Recorded(p.log(), torch.zeros(8, dtype=torch.int64))


def test_outcome_and_curve():
    recorded = planted()
    assert recorded.top1 == [62.5, 75.0, 87.5]
    assert outcome(recorded, ExitRule("confidence", 0.72)) == (0.72, 1 + 2 * 3 / 8, 100 * (4 + 0 + 2) / 8)
    for exit in ("confidence", "margin", "entropy"):
        points = curve(recorded, exit)
        assert points[0].steps == 3.0, "the strictest stops nobody"
        assert points[-1][1:] == (1.0, 62.5), "the loosest stops everybody"
        assert [p.steps for p in points] == sorted((p.steps for p in points), reverse=True)
        for point in points:
            assert outcome(recorded, ExitRule(exit, point.threshold)) == point


@pytest.mark.parametrize("exit", ["confidence", "margin", "entropy"])
def test_the_loosest_threshold_within_the_points(exit):
    recorded = planted()
    for points, stopped in ((0.0, 4), (12.5, 6), (100.0, 8)):  # the fifth, stopped early, is wrong; so is the seventh
        rule = choose(recorded, exit, points)
        found = outcome(recorded, rule)
        assert found.steps == pytest.approx(1 + 2 * (8 - stopped) / 8), (points, rule)
        assert found.top1 >= recorded.top1[-1] - points
    with pytest.raises(ValueError, match="points=-1 must be"):
        choose(recorded, exit, -1)


def test_what_is_chosen_on_is_not_reported_on():
    recorded = Recorded(torch.randn(3, 40, 4), torch.arange(40) % 4)
    first, second = halves(recorded)
    together = torch.cat([first.logits, second.logits], 1)[0, :, 0]
    assert torch.equal(together.sort().values, recorded.logits[0, :, 0].sort().values)
    assert first.targets.bincount().tolist() == second.targets.bincount().tolist() == [5] * 4
    found = calibrate(planted(), recorded, "confidence", 0.0, ("a", "b"))
    assert found.rule == choose(planted(), "confidence", 0.0)
    assert (found.chosen_on["samples"], found.reported_on["samples"]) == (8, 40)
    assert found.reported_on["top1_by_step"] == recorded.top1
    early = outcome(recorded, found.rule)
    assert (found.reported_on["steps"], found.reported_on["top1"]) == early[1:]
    json.dumps(found.to_dict())


@torch.no_grad()
def test_recorded_logits_are_those_of_so_many_steps():
    model = lively(timm.create_model("test_qkformer", num_classes=4))
    for shape in ((3, 3, 32, 32), (3, 3, 3, 32, 32)):
        x, targets = torch.randn(shape, dtype=torch.float64), torch.arange(3)
        recorded = record(model, [(x[:2], targets[:2]), (x[2:], targets[2:])], 3)
        for steps in (1, 2, 3):
            model.set_time_steps(steps)
            expected = model(x[:, :steps] if x.dim() == 5 else x)
            torch.testing.assert_close(recorded.logits[steps - 1], expected.float())
    with pytest.raises(ValueError, match="clips have 3 time steps, calibration needs 4"):
        record(model, [(x, targets)], 4)
    with pytest.raises(ValueError, match="no samples"):
        record(model, [], 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A converted folder of a tiny model, and images of its classes."""
    root = tmp_path_factory.mktemp("calibrate")
    torch.manual_seed(0)
    model = lively(timm.create_model("test_qkformer", num_classes=2)).float()
    torch.save(model.state_dict(), root / "model.pth")
    convert = ["convert", str(root / "model.pth"), str(root / "model"), "--model", "test_qkformer", "--time-steps", "3"]
    assert cli.main([*convert, "--input-size", "32"]) == 0
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 5)):
        for name in ("ant", "bee"):
            place = root / "data" / split / name
            place.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(place / f"{i}.png")
    return root


def test_the_command_writes_what_anytime_takes(folder, tmp_path, capsys):
    config = folder / "model" / "config.json"
    before = json.loads(config.read_text())
    command = ["calibrate", str(folder / "model"), "--data-dir", str(folder / "data"), "--split", "test"]
    command += ["--device", "cpu", "--workers", "0", "--exit", "margin", "--points", "20"]
    numbers, picture = tmp_path / "numbers.json", tmp_path / "curve.png"
    more = ["--calibration-split", "train", "--json", str(numbers), "--output", str(picture), "--precision", "int8"]
    assert cli.main([*command, *more]) == 0
    said = capsys.readouterr().out
    assert "chosen on 12 samples ('train')" in said
    assert "measured on 10 others ('test')" in said
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = json.loads(numbers.read_text())
    after = json.loads(config.read_text())
    threshold = found["rule"]["threshold"]
    assert after["pretrained_cfg"].pop("notes") == [f"anytime: margin {threshold:.9g}, T = 3"]
    assert after == before
    model = timm.create_model(f"local-dir:{folder / 'model'}", pretrained=True).eval()
    assert anytime(model).rule == ExitRule("margin", threshold)
    assert not [path for path in config.parent.iterdir() if path.name.endswith(".tmp")]

    assert cli.main([*command, "--limit", "8"]) == 0  # in place of the one before
    assert "half of 'test'" in capsys.readouterr().out
    assert len(json.loads(config.read_text())["pretrained_cfg"]["notes"]) == 1
    written = config.read_text()
    assert cli.main([*command, "--no-write", "--exit", "entropy"]) == 0
    assert config.read_text() == written
    assert "anytime(model, 'entropy'" in capsys.readouterr().out


def test_the_command_refuses_in_one_line(folder, tmp_path, capsys):
    command = [
        "calibrate",
        str(folder / "model"),
        "--data-dir",
        str(folder / "data"),
        "--device",
        "cpu",
        "--split",
        "test",
    ]
    for more, message in (
        (["--calibration-split", "test"], "calibration_split='test' is what is reported on"),
        (["--points", "-1"], "points=-1.0 must be"),
        (["--limit", "1"], "limit=1 must be at least 2"),
        (["--time-steps", "1"], "T = 1: there is no step to leave out"),
        (["--json", str(folder / "model.pth")], "exists already"),
    ):
        assert cli.main([*command, *more]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
