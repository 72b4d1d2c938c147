"""Weights under attack: config.json files and checkpoint contents that state anything.

What is held: an honest file's answer, or an error of one kind (ValueError, OSError), in seconds; nothing in between.
"""

import argparse
import copy
import json
import random
import re
import time

import timm
import torch

from timm_qkformer.hub import convert
from timm_qkformer.hub.folder import check_folder
from timm_qkformer.hub.loading import load_model

SMALL = {"embed_dims": [8, 16, 32], "depths": [1, 1, 1], "time_steps": 2}
ODD = (
    None, True, -1, 0, 3, 7, 2**31, 2**70, 10**9, 10**400, 0.5, -0.0, float("inf"), float("nan"), "", "x", "lif",
    "qkca",
    "\x1b[2J", "a" * 10**5, "../..", [], [1], [0, 0, 0], [10**6, 1, 1], [-1, 1, 1], ["x"], [[1]], {}, {"a": 1},
    {"v_threshold": "x"}, {"v_threshold": 1e400}, [None] * 70,
)  # fmt: skip
KEYS = ("depths", "neuron_args", "num_classes", "x", "file", "url", "in_chans", "mixer")
MOST_SECONDS = 20.0


def honest_model():
    torch.manual_seed(0)
    return timm.create_model("test_qkformer", num_classes=3, **SMALL).eval()


def places(value, path=()):
    """The paths of all entries."""
    if isinstance(value, dict):
        for key in value:
            yield (*path, key)
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for index in range(len(value)):
            yield (*path, index)


def spoil(content, rng):
    """Change, remove or add one to three entries."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        *path, last = rng.choice(list(places(content)))
        parent = content
        for key in path:
            parent = parent[key]
        deed = rng.randrange(4)
        if deed == 0 and isinstance(parent, dict):
            del parent[last]
        elif deed == 1 and isinstance(parent, dict):
            parent[rng.choice(KEYS)] = rng.choice(ODD)
        else:
            parent[last] = copy.deepcopy(rng.choice(ODD))
        if not isinstance(content, dict) or not list(places(content)):
            return


def attack(trials, seed, attempt, tally):
    """Run `attempt(rng)`, which takes what it read, or refuses it without what a terminal acts on, in seconds."""
    taken = refused = 0
    for trial in range(trials):
        rng = random.Random(1000 * seed + trial)
        start, shown = time.process_time(), f"{trial}"
        try:
            attempt(rng)
            held, taken = True, taken + 1
        except (ValueError, OSError) as error:
            held, refused = not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", str(error)), refused + 1
            shown += f": {error!r}"
        except Exception as error:
            held, shown = False, f"{shown}: {error!r}"
        tally.attempt(held and time.process_time() - start < MOST_SECONDS, shown)
    assert taken
    assert refused > trials // 4


def test_config_json(tmp_path, tally):
    folder = tmp_path / "out"
    model = honest_model()
    torch.save(
        {"state_dict": model.state_dict(), "arch": "test_qkformer", "args": {"model_kwargs": SMALL}}, tmp_path / "x"
    )
    convert(tmp_path / "x", folder)
    honest = json.loads((folder / "config.json").read_text())
    x = 3 * torch.randn(1, 3, 32, 32)

    def attempt(rng):
        config = copy.deepcopy(honest)
        spoil(config, rng)
        (folder / "config.json").write_text(json.dumps(config))
        check_folder(folder)
        loaded = load_model(f"local-dir:{folder}").model
        assert loaded(x).shape == (1, 3)
        timm.data.create_transform(**timm.data.resolve_model_data_config(loaded))

    attack(200, 1, attempt, tally)


def test_what_a_checkpoint_states(tmp_path, tally):
    model = honest_model()
    args = {"model": "test_qkformer", "num_classes": 3, "in_chans": 3, "input_size": [3, 32, 32], "crop_pct": 0.9}
    args |= {"gp": "avg", "mean": [0.5], "std": [0.5], "interpolation": "bicubic", "T": 2, "dataset": ""}
    args |= {"model_kwargs": dict(SMALL)}
    path = tmp_path / "x.pth"

    def attempt(rng):
        content = {"epoch": 3, "args": copy.deepcopy(args), "trainer": {"class_names": ["a", "b", "c"]}}
        spoil(content, rng)
        named = isinstance(content.get("args"), dict) and content["args"].get("model") == "test_qkformer"
        if isinstance(content.get("args"), dict) and rng.random() < 0.5:
            content["args"] = argparse.Namespace(**{str(key): value for key, value in content["args"].items()})
        content["state_dict"] = model.state_dict()
        torch.save(content, path)
        done = convert(path, tmp_path / "out", force=True)
        assert not named or done.model == "test_qkformer"
        check_folder(tmp_path / "out")  # what convert writes is what it would take
        assert load_model(str(tmp_path / "out")).model.time_steps == load_model(str(path)).model.time_steps

    attack(120, 2, attempt, tally)
