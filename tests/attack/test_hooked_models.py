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


def test_hooks_and_replacements(tally):
    """One to four modules of each model are disturbed; in every fourth, every fifth module is."""
    for trial in range(TRIALS):
        rng = hooked.shuffled(trial)
        torch.manual_seed(trial)
        name, options = MODELS[trial % len(MODELS)]
        model = tiny.tiny(name, **options)
        paths = hooked.candidates(model)
        chosen = paths[trial % 5 :: 5] if trial % 4 == 0 else rng.sample(paths, rng.randint(1, 4))
        done = []
        for path in sorted(chosen, key=lambda path: -path.count(".")):  # a replaced module hides what is in it
            done.append(hooked.disturb(model, path, rng))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            difference = hooked.largest_difference(model, tiny.images(2, size=(16, 16)))
        tally.attempt(difference <= 1e-8, (trial, name, difference, done))
