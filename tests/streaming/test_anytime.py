"""anytime: a sample stops when the model is sure, with the logits of that step, whoever else is in its batch."""

import math

import pytest
import timm
import torch
from torch import nn

from timm_qkformer import anytime, deploy
from timm_qkformer.streaming import ExitRule, calibrated_rule
from timm_qkformer.streaming.exits import certainty
from tiny import images, lively, tiny

T = 4


def make(kind: str) -> nn.Module:
    name, bias = ("test_qkformer_ms", (-0.6, 0.8)) if kind == "membrane" else ("test_qkformer", (0.2, 1.2))
    model = lively(timm.create_model(name, num_classes=7, time_steps=T), bias)
    model.head.weight.data.mul_(10.0)
    return deploy(model.float(), kind) if kind in ("fp32", "int8") else model


def sample(model: nn.Module, clip: bool, batch: int = 4) -> torch.Tensor:
    x = 3.0 * images(batch) if not clip else torch.randn(batch, T, 3, 32, 32, dtype=torch.float64)
    return x.to(model.head.weight.dtype)


def all_steps(model, x) -> torch.Tensor:
    """Logits of each sample alone after each step, [T, B, K]."""
    rows = []
    for one in x.split(1):
        state, logits = None, []
        for step in range(T):
            answer, state = model.step(one[:, step] if x.dim() == 5 else one, state)
            logits.append(answer)
        rows.append(torch.cat(logits))
    return torch.stack(rows, 1)


def telling(logits: torch.Tensor, exit: str) -> float:
    """A threshold at which some samples stop earlier than others, none of them by rounding."""
    ordered = certainty(logits[:-1], exit).unique()
    for threshold in ((ordered[1:] + ordered[:-1]) / 2)[ordered.diff() > 1e-6].tolist():
        if len(stops(logits, ExitRule(exit, threshold)).unique()) > 1:
            return threshold
    raise AssertionError("all samples stop at the same step: nothing would be tested")


def stops(logits: torch.Tensor, rule: ExitRule) -> torch.Tensor:
    """At which step, from 0, each sample of [T, B, K] stops."""
    sure = rule.stops(logits)
    sure[-1] = True
    return sure.int().argmax(0)


@pytest.mark.parametrize("kind", ["plain", "membrane", "fp32", "int8"])
@pytest.mark.parametrize("clip", [False, True], ids=["images", "clips"])
@torch.no_grad()
def test_each_sample_stops_alone(kind, clip):
    model = make(kind)
    x = sample(model, clip)
    logits = all_steps(model, x)
    for exit in ("confidence", "margin", "entropy"):
        threshold = telling(logits, exit)
        found = anytime(model, exit, threshold)(x)
        expected = stops(logits, ExitRule(exit, threshold))
        assert torch.equal(found.steps, expected + 1)
        torch.testing.assert_close(found.logits, logits[expected, range(len(x))])
        assert anytime(model, exit, threshold, max_steps=1)(x).steps.tolist() == [1] * len(x)


@torch.no_grad()
def test_samples_that_stop_cost_nothing():
    model, batches = make("plain"), []
    x = sample(model, clip=False)
    model.stages.register_forward_hook(lambda module, args, out: batches.append(args[0].shape[1]))
    steps = anytime(model, threshold=telling(all_steps(model, x), "confidence"))(x).steps
    batches = batches[-int(steps.max()) :]
    assert batches == [int((steps >= step).sum()) for step in range(1, int(steps.max()) + 1)]
    assert batches[0] == len(x) > batches[-1]


def test_certainty():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0], [200.0, 0.0, 0.0]])
    p = logits.double().softmax(-1)[0]
    expected = {
        "confidence": [p[0], 1 / 3, 1.0],
        "margin": [p[0] - p[1], 0.0, 1.0],
        "entropy": [-(p * p.log()).sum() / math.log(3), 1.0, 0.0],
    }
    for exit, values in expected.items():
        torch.testing.assert_close(certainty(logits, exit), torch.tensor([float(v) for v in values]))
    assert ExitRule("entropy", 0.5).stops(logits).tolist() == [False, False, True]
    assert ExitRule("margin", 0.5).stops(logits).tolist() == [False, False, True]
    assert ExitRule("confidence", 0.4).stops(logits).tolist() == [True, False, True]


@torch.no_grad()
def test_results():
    model = make("plain")
    result = anytime(model, threshold=1.0)(sample(model, clip=False, batch=2))
    logits, steps = result
    assert logits.shape == (2, 7)
    assert repr(result) == f"AnytimeResult(2 samples, 7 classes, {steps.double().mean():.2f} steps on average)"
    empty = anytime(model, threshold=0.5)(sample(model, clip=False)[:0])
    assert (empty.logits.shape, empty.steps.shape) == ((0, 7), (0,))
    assert repr(anytime(model, "margin", 0.25, 2)) == "Anytime(QKFormer, exit='margin', threshold=0.25, max_steps=2)"
    clip = torch.randn(1, 2, 3, 32, 32, dtype=torch.float64)
    assert anytime(model, threshold=1.0, max_steps=9)(clip).steps.tolist() == [2]  # a clip has no more


def test_what_is_refused():
    model = make("plain")
    for arguments, message in (
        ({"exit": "certainty"}, "threshold is missing"),
        ({"exit": "certainty", "threshold": 0.5}, "exit='certainty' is unknown"),
        ({"threshold": 1.5}, "threshold=1.5 must be from 0 to 1"),
        ({"threshold": math.nan}, "must be from 0 to 1"),
        ({"threshold": 0.5, "max_steps": 0}, "max_steps=0 must be an integer"),
        ({}, "the model has none of its own"),
    ):
        with pytest.raises(ValueError, match=message):
            anytime(model, **arguments)
    with pytest.raises(ValueError, match="num_classes=0"):
        anytime(tiny("test_qkformer", num_classes=0), threshold=0.5)
    with pytest.raises(TypeError, match="model is a Linear"):
        anytime(nn.Linear(2, 2), threshold=0.5)
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        anytime(model.train(), threshold=0.5)(images(2))


def test_a_model_s_own_rule():
    overlay = {"notes": ["trained for a test", "anytime: entropy 0.25, T = 4"]}
    model = timm.create_model("test_qkformer", pretrained_cfg_overlay=overlay).eval()
    for own in (model, deploy(model)):
        assert calibrated_rule(own) == ExitRule("entropy", 0.25)
        assert anytime(own).rule == anytime(own, "entropy").rule == ExitRule("entropy", 0.25)
        assert anytime(own, "margin", 0.5).rule == ExitRule("margin", 0.5)
        with pytest.raises(ValueError, match="the model's own is of exit='entropy'"):
            anytime(own, "margin")
    for note in ("anytime: entropy much, T = 4", "anytime: entropy 7, T = 4", "anytime: luck 0.5, T = 4"):
        model.pretrained_cfg["notes"] = note
        with pytest.raises(ValueError, match=r"the model's pretrained_cfg has the note 'anytime: "):
            anytime(model)
