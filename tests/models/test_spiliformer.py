"""SpiLiFormer: parity with the release, the two passes against their equations, and its parts in every form."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F

from golden import GoldenCase
from timm_qkformer import deploy, quantize_weights
from timm_qkformer.analysis import energy, firing_rates
from timm_qkformer.execution import execution_policy
from timm_qkformer.layers import Feedback, FeedbackSpec
from timm_qkformer.layers.feedback import choose_tokens
from timm_qkformer.models.spiliformer import FEEDBACKS, checkpoint_filter_fn
from timm_qkformer.neurons import LIF, run_with_state
from tiny import images, lively, tiny

CASES = {
    "spiliformer_cifar10_4_384_t4": "spiliformer_4_384",
    "spiliformer_imagenet_10_768_t4_64px": "spiliformer_10_768",
}
TOLERANCE = {"rtol": 0.0, "atol": 1e-9}


def load(case, golden, **kwargs):
    classes = len(golden.one_by_one[0])
    model = timm.create_model(CASES[case], num_classes=classes, **kwargs).double().eval()
    model.load_state_dict(checkpoint_filter_fn(golden.checkpoint, model), strict=True)
    return model


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] if "imagenet" in case else []) for case in CASES]
)
@torch.inference_mode()
def test_agrees_with_the_release(case):
    golden = GoldenCase(case)
    model = load(case, golden)
    assert sum(p.numel() for p in model.parameters()) == golden.params
    first, second = model.forward_passes(golden.input)
    torch.testing.assert_close(first, golden.first_pass, **TOLERANCE)
    torch.testing.assert_close(second, golden.one_by_one, **TOLERANCE)
    torch.testing.assert_close(model(golden.input), golden.one_by_one, **TOLERANCE)
    torch.testing.assert_close(deploy(model)(golden.input), golden.one_by_one, **TOLERANCE)
    means = {layer.path: layer.mean for layer in firing_rates(model, golden.input[:1]).layers if layer.is_neuron}
    expected = [sum(of_passes) / len(of_passes) for of_passes in golden.firing_rates.values()]
    assert list(means.values()) == pytest.approx(expected, abs=1e-9)

    coupled = load(case, golden, batch_coupled=True)
    torch.testing.assert_close(coupled(golden.input), golden.batched, **TOLERANCE)
    torch.testing.assert_close(deploy(coupled)(golden.input), golden.batched, **TOLERANCE)
    assert not torch.allclose(golden.batched, golden.one_by_one, atol=1e-3)


@pytest.mark.parametrize(("classes", "params"), [(10, 7_003_450), (100, 7_038_100)])
def test_parameters_of_cifar_models(classes, params):
    model = timm.create_model("spiliformer_4_384", num_classes=classes, device="meta")
    assert sum(p.numel() for p in model.parameters()) == params
    feedback = model.stages[2].feedback
    assert (feedback.gain, feedback.misread) == ((2.0, False) if classes == 100 else (1.0, True))
    kept = timm.create_model("spiliformer_4_384", num_classes=classes, feedback="imagenet", device="meta")
    assert not kept.stages[2].feedback.last_first


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_silent_tokens_in_half_precision(feedback, half):
    torch.manual_seed(0)
    model, x = timm.create_model("test_spiliformer", feedback=feedback).train(), torch.randn(2, 3, 64, 64)
    if half:
        model, x = model.half(), x.half()
    with torch.autocast("cpu", torch.float16, enabled=not half):
        y = model(x)
    y.float().square().mean().backward()
    for name, value in [*model.state_dict().items(), *((n, p.grad) for n, p in model.named_parameters())]:
        assert value.isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tokens_are_chosen_in_single_precision(dtype):
    torch.manual_seed(0)
    z, p, q = torch.randint(0, 4, (2, 2, 8, 3, 2)).to(dtype), torch.randn(8).to(dtype), torch.randn(8).to(dtype)
    z[:, :, :, 0, 0] = 0  # no token
    expected = choose_tokens(z.float(), p.float(), q.float(), 2.0, 2)
    assert torch.equal(choose_tokens(z, p, q, 2.0, 2), expected.to(dtype))


SPECS = [FeedbackSpec(), FeedbackSpec(last_first=True, misread=True), FeedbackSpec(2.0, True, True)]


@pytest.mark.parametrize("spec", SPECS)
@torch.inference_mode()
def test_feedback_follows_its_equations(spec):
    torch.manual_seed(0)
    feedback, lif = lively(Feedback(8, 3, spec)), LIF()
    for decoder in feedback.decoders:
        torch.nn.init.normal_(decoder.conv.weight)
    z = torch.randint(0, 4, (4, 2, 8, 3, 2)).double()
    z[:, :, :, 0, 0] = 0  # no token
    tokens = z.permute(0, 1, 3, 4, 2)
    masks = [F.cosine_similarity(tokens, p, dim=-1).clamp(0, 1) for p in (feedback.prompt, feedback.prompt_2)]
    x = spec.gain * tokens * (masks[0] - masks[1]).unsqueeze(-1)
    expected = []
    for decoder in feedback.decoders:
        matrix, norm = decoder.conv.weight.flatten(1), decoder.bn
        if spec.norm_first:
            x = norm(x.flatten(0, 1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).unflatten(0, z.shape[:2]) @ matrix.T
        else:
            x = norm((x @ matrix.T).flatten(0, 1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).unflatten(0, z.shape[:2])
        x = lif(x)
        if spec.misread:
            x = torch.stack([step.reshape(8, 6).T.reshape(3, 2, 8) for step in x.flatten(0, 1)]).view(x.shape)
        expected.append(x.permute(0, 1, 4, 2, 3))
    found = feedback(z)
    assert all(0 < f.mean() < 1 for f in found)
    order = reversed(expected) if spec.last_first else expected
    assert all(torch.equal(a, b) for a, b in zip(found, order, strict=True))


@torch.inference_mode()
def test_the_second_pass_sees_the_feedback_and_nothing_else_of_the_first():
    model, x = tiny("test_spiliformer"), images(2, size=(64, 64))
    first, second = model.forward_passes(x)
    assert not torch.allclose(first, second)
    assert torch.equal(model(x), second)
    for decoder in model.stages[2].feedback.decoders:  # silent decoders
        decoder.bn.weight.zero_()
        decoder.bn.bias.zero_()
    assert torch.equal(model(x), first)


def test_loss_of_both_passes():
    model, x, target = tiny("test_spiliformer").train(), images(2, size=(64, 64)), torch.tensor([0, 3])
    first, second = model.forward_passes(x)
    loss = model.training_loss(x, target, F.cross_entropy, beta=0.7)
    torch.testing.assert_close(loss, 0.3 * F.cross_entropy(first, target) + 0.7 * F.cross_entropy(second, target))
    grads = torch.autograd.grad(loss, list(model.parameters()))
    assert all(grad.isfinite().all() for grad in grads)
    assert grads[[n for n, _ in model.named_parameters()].index("stages.2.feedback.prompt")].count_nonzero() > 0


@pytest.mark.parametrize("feedback", ["imagenet", "cifar100"])
def test_packed_and_recomputed_training_have_autograds_gradients(feedback):
    model, x = tiny("test_spiliformer", feedback=feedback).train(), images(2, size=(64, 64))
    state = copy.deepcopy(model.state_dict())

    def gradients(packed, checkpointing=False):
        model.load_state_dict(state)
        model.set_grad_checkpointing(checkpointing)
        with execution_policy(packed=packed, neurons="eager"):
            loss = F.cross_entropy(model(x), torch.tensor([1, 4]))
            grads = torch.autograd.grad(loss, list(model.parameters()))
        return [loss.detach(), *grads, *(buffer.clone() for buffer in model.buffers())]

    plain = gradients(packed=False)
    for other in (gradients(packed=True), gradients(packed=False, checkpointing=True)):
        for a, b in zip(plain, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("feedback", ["cifar10", "cifar100"])
@pytest.mark.filterwarnings("ignore:.*(rounded weights are multiplied|8-bit|bfloat16 arithmetic)")
@torch.inference_mode()
def test_deployed_in_three_precisions(feedback):
    model, x = tiny("test_spiliformer", feedback=feedback), images(3, size=(64, 64))
    for decoder in model.stages[2].feedback.decoders:
        torch.nn.init.normal_(decoder.conv.weight)
    quantize_weights(model)
    if feedback == "cifar100":  # deployed, the norm is part of the weights that are rounded
        for decoder in model.stages[2].feedback.decoders:
            for name, value in (("weight", 1.0), ("running_var", 1.0 - 1e-5)):
                getattr(decoder.bn, name).fill_(value)
    expected = model(x)
    for precision in ("fp32", "bf16", "int8"):
        for kernels in ("auto", "never"):
            with execution_policy(kernels=kernels):
                found = deploy(model, precision)(x)
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6, msg=f"{precision}, kernels={kernels}")


@torch.inference_mode()
def test_steps_equal_the_sequence():
    model = tiny("test_spiliformer")
    clip = torch.randn(2, 4, 3, 64, 64, dtype=torch.float64)

    class Backbone(torch.nn.Module):
        def forward(self, x):  # [B, T, C, H, W]
            return model.stages(model.stem(x, 1))

    whole, _ = run_with_state(Backbone(), clip)
    state, steps = None, []
    for t in range(4):
        y, state = run_with_state(Backbone(), clip[:, t : t + 1], state=state)
        steps.append(y)
    assert torch.equal(torch.cat(steps), whole)


def test_energy_counts_both_passes():
    model = tiny("test_spiliformer")
    found = energy(model, images(1))
    once = found["stages.1.blocks.0.attn.k.conv", "convolution"]
    twice = found["stages.2.blocks.0.attn.k.conv", "convolution"]
    assert once.steps == twice.steps == model.time_steps
    assert once.flops == 32 * 32 * 16
    assert twice.flops == 2 * 64 * 64 * 4  # 2 x 2 tokens
    seen = []
    model.stages[2].blocks[0].attn.k.conv.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    torch.manual_seed(0)
    energy(model, images(1))
    again = energy(model, torch.zeros(1, 3, 32, 32, dtype=torch.float64))
    assert len(seen) == 4
    assert again["stages.2.blocks.0.attn.k.conv", "convolution"].sops == sum(x.sum() for x in seen[2:]) * 64
    assert found["stages.2.feedback", "choice of tokens"].input == "real numbers"


@pytest.mark.parametrize("form", ["script", pytest.param("export", marks=pytest.mark.slow)])
@torch.inference_mode()
def test_exports(form):
    model, x = tiny("test_spiliformer", feedback="cifar10", time_steps=2), images(2, size=(64, 64))
    other = torch.jit.script(model) if form == "script" else torch.export.export(model, (x,)).module()
    torch.testing.assert_close(other(x), model(x), rtol=1e-10, atol=1e-10)


def test_operators_that_take_no_feedback_are_named():
    said = r"attn='ssa': 'ssa' takes no feedback.*a2os2a and fb_lidiff do: .*attn=\('ssa', 'ssa', 'fb_lidiff'\)"
    with pytest.raises(ValueError, match=said):
        timm.create_model("test_spiliformer", attn="ssa")
    with pytest.raises(ValueError, match=r"attn=.*'dwc3' takes no feedback.*'ff_lidiff', 'fb_lidiff'\)"):
        timm.create_model("test_spiliformer", attn=("qkta", "qkta", ["fb_lidiff", "dwc3"]))
    assert timm.create_model("test_spiliformer", attn=("ssa", "ssa", "fb_lidiff"), num_classes=2).num_classes == 2
    with pytest.raises(ValueError, match="feedback='svhn' is unknown"):
        timm.create_model("test_spiliformer", feedback="svhn")
    with pytest.raises(ValueError, match="heads of 1 channels"):
        timm.create_model("test_spiliformer", num_heads=(16, 4, 4))


@pytest.mark.parametrize("case", CASES)
def test_names_of_nobody_are_matched_by_position(case):
    golden = GoldenCase(case)
    model = timm.create_model(CASES[case], num_classes=len(golden.one_by_one[0]), device="meta")
    expected = checkpoint_filter_fn(golden.checkpoint, model)
    strange = {f"t{i}": tensor for i, tensor in enumerate(golden.checkpoint.values())}
    found = checkpoint_filter_fn({"model": strange}, model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    with pytest.raises(ValueError, match="by position, misshapen: "):
        checkpoint_filter_fn(dict(reversed(strange.items())), model)


def test_checkpoints_are_strict():
    golden = GoldenCase("spiliformer_cifar10_4_384_t4")
    model = timm.create_model("spiliformer_4_384", num_classes=10, device="meta")
    for change, said in (
        ({"decoder_stage_3.2.decoder_bn.bias": torch.zeros(384)}, "does not know: decoder_stage_3.2"),
        ({"prompt": torch.zeros(12)}, r"misshapen: prompt \[12\] instead of \[384\]"),
    ):
        with pytest.raises(ValueError, match=said):
            checkpoint_filter_fn({**golden.checkpoint, **change}, model)
    with pytest.raises(ValueError, match=r"missing: .*prompt_2"):
        checkpoint_filter_fn({k: v for k, v in golden.checkpoint.items() if k != "prompt_2"}, model)


@pytest.mark.parametrize("beta", [2, -1, float("nan"), "x"])
def test_shares_of_the_passes(beta):
    model = timm.create_model("test_spiliformer", time_steps=1)
    with pytest.raises(ValueError, match=f"beta={beta!r} must be a number between 0 and 1"):
        model.training_loss(torch.randn(1, 3, 64, 64), torch.zeros(1, dtype=torch.long), F.cross_entropy, beta)
