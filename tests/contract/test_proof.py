"""The proof of the design: `own.py`, outside of the package, defines an operator and a neuron.

Public calls do all else. What they share with others is in the contract suite; here both go a user's whole way.
"""

import own  # registers them
import pytest
import timm
import torch

import timm_qkformer
from timm_qkformer.execution import execution_policy
from timm_qkformer.neurons import run_with_state

assert own


@pytest.fixture(params=[pytest.param("lif", marks=pytest.mark.slow), "own_ternary"])
def model(request):
    torch.manual_seed(0)
    return timm.create_model(
        "test_qkformer",
        attn=("own_sdsa", "qkta", "own_sdsa"),
        neuron=request.param,
        neuron_args={"v_threshold": 0.5},
        num_classes=4,
        time_steps=3,
    ).double()


def images(count=2):
    return torch.randn(count, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def settle(model):
    for module in model.modules():  # batch norms after which neurons fire now and then
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.weight, 1.5, 0.5)
            torch.nn.init.normal_(module.bias, 0.3, 0.3)
    with torch.no_grad():
        for _ in range(5):
            model(images(8))
    return model.eval()


def test_trains_with_packed_activations(model):
    parameters = list(model.parameters())
    labels = torch.tensor([0, 3])

    def gradients(packed):
        with execution_policy(packed=packed):
            loss = torch.nn.functional.cross_entropy(model(images()), labels)
            return loss.detach(), torch.autograd.grad(loss, parameters)

    (loss, packed), (expected_loss, plain) = gradients(True), gradients(False)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=1e-12)
    for a, b in zip(packed, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    optimizer = torch.optim.AdamW(parameters, 3e-3)
    for _ in range(12):
        loss = torch.nn.functional.cross_entropy(model(images()), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.7 * expected_loss


@pytest.mark.filterwarnings("ignore:.*(rounded weights are multiplied|bfloat16 arithmetic)")
def test_deploys_and_exports(model):
    settle(model)
    timm_qkformer.quantize_weights(model)
    with torch.no_grad():
        expected = model(images())
        for precision in ("fp32", "bf16", "int8"):
            deployed = timm_qkformer.deploy(model, precision)(images())
            torch.testing.assert_close(deployed, expected, rtol=1e-6, atol=1e-6)
        exported = torch.export.export(model, (images(),)).module()
        scripted = torch.jit.script(model)
        for form in (exported, scripted):
            torch.testing.assert_close(form(images()), expected, rtol=1e-10, atol=1e-10)


def test_steps_with_explicit_state(model):
    settle(model)
    clip = torch.randn(5, 2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    class Backbone(torch.nn.Module):
        def forward(self, x):  # [T, B, C, H, W]: what is before the readout
            return model.stages(model.stem(x.transpose(0, 1), 1))

    with torch.no_grad():
        whole, _ = run_with_state(Backbone(), clip)
        state, steps = None, []
        for t in range(len(clip)):
            y, state = run_with_state(Backbone(), clip[t : t + 1], state=state)
            steps.append(y)
    assert torch.equal(torch.cat(steps), whole)
    assert whole.abs().sum() > 0


def brute_force(model, x):
    """Additions of the operators, and of the 1x1 convolutions, spike by spike."""
    found: dict[str, float] = {}
    hooks = []
    for name, module in model.named_modules():
        if getattr(module, "operator_name", "") == "own_sdsa":
            kept: dict[str, torch.Tensor] = {}
            for part in module.inputs:
                hook = getattr(module, part).register_forward_hook(
                    lambda _m, _i, out, part=part, kept=kept: kept.update({part: out})
                )
                hooks.append(hook)

            def count(_module, _inputs, _out, name=name, kept=kept):
                q, k, v = (kept[part].abs() for part in ("q", "k", "v"))
                found[name] = float(k.sum() + (k * v).sum() + q.sum())

            hooks.append(module.register_forward_hook(count))
        elif isinstance(module, torch.nn.Conv2d) and module.kernel_size == (1, 1) and module.stride == (1, 1):

            def count_conv(conv, inputs, name=name):
                found[name] = float(inputs[0].abs().sum()) * conv.out_channels

            hooks.append(module.register_forward_pre_hook(count_conv))
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return found


def test_energy_equals_brute_force_counts(model):
    from timm_qkformer.analysis import energy

    settle(model)
    x = images(1)
    expected = brute_force(model, x)
    measured: dict[str, float] = {}
    for layer in energy(model, x).layers:
        if layer.rate is not None:
            measured[layer.path] = measured.get(layer.path, 0.0) + layer.additions
    assert sum("attn" in name and "." not in name.split("attn")[1] for name in expected) == 3
    assert {name: measured[name] for name in expected} == pytest.approx(expected, abs=0)


def test_profiled_and_drawn(model, tmp_path):
    from timm_qkformer.analysis import firing_rates, record_attention

    settle(model)
    rates = firing_rates(model, images(1))
    names = {layer.path: layer.name for layer in rates.layers}
    assert names["stages.0.blocks.0.attn.mask_neuron"] == "S"
    records = record_attention(model, images(1))
    assert [record.operator for record in records] == ["own_sdsa", "qkta", "own_sdsa", "own_sdsa"]
    assert records[0].views.tokens.shape[:3] == (3, 1, 4)
