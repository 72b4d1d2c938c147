"""Hooks and replacements on every module: packed gradients are those of plain autograd, in float64."""

import warnings

import pytest
import torch

import hooked
import tiny

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

MODELS = [
    ("test_qkformer", {}),
    ("test_qkformer_ms", {}),
    ("test_maxformer", {}),
    ("test_qkformer", {"attn": ("ssa", "qkca", "qkta"), "neuron": "plif"}),
    ("test_qkformer", {"drop_path_rate": 0.2, "proj_drop_rate": 0.1}),
]
TRIALS = 120
OTHERS = [name for name in tiny.NAMES if name not in ("test_qkformer", "test_qkformer_ms", "test_maxformer")]


def attack(model, seed, many):
    """Disturb one to four modules, or every fifth one; returns by how much gradients differ, and what was done."""
    rng = hooked.shuffled(seed)
    paths = hooked.candidates(model)
    chosen = paths[seed % 5 :: 5] if many else rng.sample(paths, rng.randint(1, 4))
    done = []
    for path in sorted(chosen, key=lambda path: -path.count(".")):  # a replaced module hides what is in it
        done.append(hooked.disturb(model, path, rng))
    x = tiny.images(2, model.in_chans, size=(16, 16))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return hooked.largest_difference(model, x), done


def test_hooks_and_replacements(tally):
    """In every fourth trial every fifth module is disturbed."""
    for trial in range(TRIALS):
        torch.manual_seed(trial)
        name, options = MODELS[trial % len(MODELS)]
        difference, done = attack(tiny.tiny(name, **options), trial, trial % 4 == 0)
        tally.attempt(difference <= 1e-8, (trial, name, difference, done))


def test_hooks_in_every_other_family(tally):
    for trial in range(4 * len(OTHERS)):
        torch.manual_seed(trial)
        name = OTHERS[trial % len(OTHERS)]
        difference, done = attack(tiny.tiny(name), 1000 + trial, trial < len(OTHERS))
        tally.attempt(difference <= 1e-8, (trial, name, difference, done))
