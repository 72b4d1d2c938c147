"""T drawn for each batch, and the loss of each step (TET)."""

import pytest
import timm
import torch
from test_resume import compare
from tiny_runs import PLAIN, RECIPE, flags, run, write_recipe

from timm_qkformer.models import QKFormer
from timm_qkformer.training.trainer.config import parse_train
from timm_qkformer.training.trainer.settings import Settings
from timm_qkformer.training.trainer.steps import StepsTask, drawn_time_steps, shown_for, step_logits
from tiny import images, tiny

STEPS = {"time_steps_random": [1, 3]}


@pytest.fixture
def shown(monkeypatch):
    """T of each training step."""
    found, real = [], QKFormer.forward

    def forward(self, x):
        if self.training:
            found.append(self.time_steps)
        return real(self, x)

    monkeypatch.setattr(QKFormer, "forward", forward)
    return found


def test_each_batch_has_the_t_that_follows_from_its_number(data, tmp_path, shown):
    result = run(data, tmp_path, **PLAIN, **STEPS)
    settings = Settings(**STEPS)
    assert shown == [drawn_time_steps(settings, epoch, index) for epoch in range(2) for index in range(6)]
    assert set(shown) == {1, 2, 3}
    saved = torch.load(result.folder / "last.pth.tar", weights_only=True)
    assert saved["trainer"]["model"]["time_steps"] == 2, "the model's own"
    assert saved["args"]["time_steps_random"] == [1, 3]
    draws = {seed: [drawn_time_steps(Settings(seed=seed, **STEPS), 0, i) for i in range(200)] for seed in (0, 1)}
    assert draws[0] != draws[1] != [drawn_time_steps(Settings(seed=1, **STEPS), 1, i) for i in range(200)]
    assert all(40 < draws[0].count(T) < 95 for T in (1, 2, 3))
    assert drawn_time_steps(Settings(), 0, 0) is None


def test_before_the_first_epoch_of_draws_t_is_1(data, tmp_path, shown):
    steps = {"time_steps_random": [2, 3]}
    run(data, tmp_path, **PLAIN, **steps, time_steps_random_from=1)
    drawn = [drawn_time_steps(Settings(**steps), 1, index) for index in range(6)]
    assert shown == [1] * 6 + drawn
    assert set(drawn) == {2, 3}


def test_a_resumed_run_is_the_same_bit_for_bit(data, tmp_path, capsys):
    compare(data, tmp_path, 8, tet=0.5, **STEPS)
    assert "not an exact continuation" not in capsys.readouterr().out


def test_the_model_gets_its_t_back_and_clips_are_cut():
    model = timm.create_model("test_qkformer", time_steps=4)
    clip = torch.rand(1, 4, 3, 32, 32)
    try:
        with shown_for(model, clip, 3) as x:
            assert (x.shape[1], model.time_steps) == (3, 3)
            raise KeyError
    except KeyError:
        pass
    assert model.time_steps == model._model_args["time_steps"] == 4
    with shown_for(model, clip, None) as x:
        assert x is clip


@pytest.mark.parametrize("name", ["test_qkformer", "test_qkformer_ms"])
def test_logits_of_each_step(name):
    model, x = tiny(name, time_steps=3), images(2)
    with torch.no_grad():
        found = step_logits(model, model.stages(model.stem(x, 3)))
        torch.testing.assert_close(found.mean(0), model(x))
        before, state = torch.zeros_like(found[0]), None
        for step, logits in enumerate(found, start=1):
            after, state = model.step(x, state)
            torch.testing.assert_close(logits, step * after - (step - 1) * before)
            before = after


def test_the_loss_of_each_step():
    model, x, target = tiny("test_qkformer_ms", time_steps=3), images(2), torch.tensor([1, 4])
    criterion = torch.nn.CrossEntropyLoss()
    model.head.weight.data.mul_(5.0)
    whole = criterion(model(x), target)
    own = torch.stack([criterion(logits, target) for logits in step_logits(model, model.stages(model.stem(x, 3)))])
    assert (whole - own.mean()).abs() > 1e-4
    for weight in (0.25, 1.0):
        task = StepsTask(weight, model=model, criterion=criterion, verbose=False)
        found = task(x, target)
        torch.testing.assert_close(found["loss"], (1 - weight) * whole + weight * own.mean())
        torch.testing.assert_close(found["output"], model(x))
        expected = torch.autograd.grad((1 - weight) * whole + weight * own.mean(), model.head.weight, retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(found["loss"], model.head.weight), expected)
    assert not model.readout._forward_pre_hooks


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"time_steps_random": [0, 4]}, r"time_steps_random=\[0, 4\] needs to be LOW HIGH"),
        ({"time_steps_random": [4, 2]}, r"time_steps_random=\[4, 2\] needs to be LOW HIGH"),
        ({"time_steps_random": [4]}, "time_steps_random needs to be int"),
        ({"time_steps_random_from": 2}, "time_steps_random_from=2 needs time_steps_random LOW HIGH"),
        ({**STEPS, "time_steps_random_from": -1}, "time_steps_random_from=-1 needs to be at least 0"),
        ({"tet": 1.5}, "tet=1.5 needs to be from 0 to 1"),
        ({"tet": 0.5, "torchcompile": "eager"}, "torchcompile does not allow"),
        ({"tet": 1.0, "tet_lambda": 1.5}, "tet_lambda=1.5 needs to be from 0 to 1"),
        ({"tet_lambda": 0.1}, "tet_lambda=0.1 is a part of .* need tet above 0"),
    ],
)
def test_settings_that_cannot_be(changes, message, data, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(data, tmp_path, **PLAIN, **changes)


def test_models_without_time_steps_are_refused(data, tmp_path):
    for change in (STEPS, {"tet": 0.5}):
        with pytest.raises(ValueError, match="resnet18 has no time steps"):
            run(data, tmp_path, **PLAIN, model="resnet18", model_kwargs={}, **change)


def test_flags_and_recipes(data, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml")
    given = parse_train(flags(data, tmp_path, "x", recipe, "--time-steps-random", "1", "4", "--tet", "0.3"))
    assert (given.time_steps_random, given.tet) == ([1, 4], 0.3)
    plain = parse_train(flags(data, tmp_path, "x", recipe))
    assert (plain.time_steps_random, plain.tet) == (None, None)
    assert "tet" not in RECIPE


def test_the_second_term_pulls_each_steps_logits_to_one():
    model, x, target = tiny("test_qkformer_ms", time_steps=3), images(2), torch.tensor([1, 4])
    criterion = torch.nn.CrossEntropyLoss()
    logits = step_logits(model, model.stages(model.stem(x, 3)))
    # The release's own lines (Spike-driven Transformer, criterion.py): all steps at once against a constant.
    distance = torch.nn.functional.mse_loss(logits, torch.full_like(logits, 1.0))
    own = torch.stack([criterion(of_step, target) for of_step in logits]).mean()
    found = StepsTask(1.0, 0.25, model=model, criterion=criterion, verbose=False)(x, target)["loss"]
    torch.testing.assert_close(found, 0.75 * own + 0.25 * distance)
    assert (found - own).abs() > 1e-2


def test_the_loss_of_sdts_event_recipe(data, tmp_path):
    result = run(data, tmp_path, **PLAIN, tet=1.0, tet_lambda=0.001)
    saved = torch.load(result.folder / "last.pth.tar", weights_only=True)
    assert (saved["args"]["tet"], saved["args"]["tet_lambda"]) == (1.0, 0.001)
