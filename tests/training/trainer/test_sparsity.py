"""The penalty on firing rates above a target."""

import pytest
import timm
import torch
from test_resume import compare
from tiny_runs import PLAIN, RECIPE, run

from timm_qkformer.analysis import firing_rates
from timm_qkformer.execution import execution_policy
from timm_qkformer.neurons import LIF
from timm_qkformer.training.trainer.sparsity import FiringRatePenalty


def tiny(**kwargs):
    return timm.create_model("test_qkformer", num_classes=3, **kwargs)


@pytest.mark.parametrize("neuron", ["lif", "ilif"])
def test_it_is_the_rate_that_is_reported_above_the_target(neuron):
    torch.manual_seed(0)
    model = tiny(time_steps=3, neuron=neuron).train()
    with torch.no_grad():  # batch norms as in eval mode
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None
                module.reset_running_stats()
    x = torch.rand(1, 3, 32, 32)
    model(x)
    penalty = FiringRatePenalty(model, 2.0, 0.01)
    for module in model.modules():
        module.training = not isinstance(module, torch.nn.BatchNorm2d)
    loss = penalty_of(penalty, model, x)
    assert loss.item() == pytest.approx(2.0 * (firing_rates(model, x).mean - 0.01), rel=1e-5)
    assert loss > 0
    loss.backward()
    assert model.stem.conv.weight.grad.abs().sum() > 0


def penalty_of(penalty, model, x):
    model(x)
    return penalty.take()


def test_below_the_target_it_is_nothing_and_outside_of_training_it_does_not_look():
    model = tiny().train()
    x = torch.rand(2, 3, 32, 32)
    penalty = FiringRatePenalty(model, 2.0, 1.0)
    assert penalty_of(penalty, model, x).item() == 0.0
    with torch.no_grad():
        model(x)
    model.eval()
    model(x)
    assert penalty.take().item() == 0.0
    assert not penalty._seen


def test_packed_or_not_gradients_are_the_same():
    model, x = tiny().train(), torch.rand(4, 3, 32, 32)
    penalty = FiringRatePenalty(model, 2.0, 0.0)
    found = []
    for packed in (True, False):
        with execution_policy(packed=packed):
            model.zero_grad()
            (penalty_of(penalty, model, x)).backward()
        found.append(model.stages[0].embed.main[0].conv.weight.grad.clone())
    torch.testing.assert_close(*found)
    assert found[0].abs().sum() > 0


@pytest.mark.parametrize("levels", ["binary", "ternary"])
def test_its_gradient_is_the_surrogate_s_of_all_spikes(levels):
    """Those of neurons that stay silent, too; spikes of both signs count as one each."""
    torch.manual_seed(0)
    neurons = LIF(surrogate="atan").double()
    neurons.levels = levels
    x = torch.randn(3, 2, 40, dtype=torch.float64, requires_grad=True)
    weights = torch.randn_like(x)
    spikes = neurons(3 * x)
    fired = spikes.abs() if levels == "ternary" else spikes
    (expected,) = torch.autograd.grad((spikes * weights).sum() + 2.0 * (fired.mean() - 0.1), x)
    penalty = FiringRatePenalty(neurons, 2.0, 0.1)
    (found,) = torch.autograd.grad((neurons(3 * x) * weights).sum() + penalty.take(), x)
    assert fired.mean() > 0.1
    assert (spikes < 0).any() == (levels == "ternary")
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)  # the rate is in single precision


def test_training_against_it_alone_silences_a_network():
    torch.manual_seed(0)
    model, x = tiny().train(), torch.rand(8, 3, 32, 32)
    penalty = FiringRatePenalty(model, 1.0, 0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
    found = []
    for _ in range(30):
        loss = penalty_of(penalty, model, x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert found[-1] < 0.7 * found[0]


def test_a_resumed_run_is_the_same_bit_for_bit(data, tmp_path):
    more = {"model_ema": True, "quantize_weights": True, "time_steps_random": [1, 2], "amp_dtype": "bfloat16"}
    compare(data, tmp_path, 8, amp=True, firing_rate_penalty=0.5, firing_rate_target=0.02, **more)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"firing_rate_penalty": -1.0}, "firing_rate_penalty=-1.0 needs to be at least 0"),
        ({"firing_rate_target": 0.1}, "firing_rate_target=0.1 needs firing_rate_penalty"),
        ({"firing_rate_penalty": 1.0, "firing_rate_target": 1.5}, "firing_rate_target=1.5 needs to be from 0 to 1"),
        ({"firing_rate_penalty": 1.0, "torchcompile": "eager"}, "torchcompile does not allow"),
        ({"firing_rate_penalty": 1.0, "grad_checkpointing": True}, "grad_checkpointing does not allow"),
        ({"firing_rate_penalty": 1.0, "model": "resnet18", "model_kwargs": {}}, "ResNet has no neurons that spike"),
        (
            {"firing_rate_penalty": 1.0, "model_kwargs": {**RECIPE["model_kwargs"], "neuron": "relu"}},
            "QKFormer has no neurons that spike",
        ),
    ],
)
def test_what_cannot_be_is_refused(changes, message, data, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(data, tmp_path, **{**PLAIN, **changes})
