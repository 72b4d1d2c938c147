"""Deployed models under tracers and exporters, on tensors without numbers, and copied in inference mode."""

import copy
import io
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import tiny
from timm_qkformer import deploy
from timm_qkformer.execution import execution_policy

PRECISIONS = ["fp32", "bf16", "int8"]
X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=PRECISIONS)
def fast(request):
    torch.manual_seed(0)
    return deploy(tiny.tiny("test_qkformer").float(), request.param)


def fake(model):
    with FakeTensorMode(allow_non_fake_inputs=True):
        return model(torch.randn(2, 3, 16, 16))


def fake_from_outside(model):
    return model(FakeTensorMode(allow_non_fake_inputs=True).from_tensor(X))


TRACERS = {
    "FakeTensorMode": fake,
    "fake tensor": fake_from_outside,
    "meta": lambda model: model(X.to("meta")),
    "functionalize": lambda model: torch.func.functionalize(model)(X),
    "vmap": lambda model: torch.vmap(model)(X[:, None]),
    "make_fx": lambda model: make_fx(model)(X),
    "make_fx, fake": lambda model: make_fx(model, tracing_mode="fake")(X),
    "make_fx, symbolic": lambda model: make_fx(model, tracing_mode="symbolic")(X),
    "trace": lambda model: torch.jit.trace(model, X, check_trace=False),
    "script": torch.jit.script,
    "fx": torch.fx.symbolic_trace,
    "export": lambda model: torch.export.export(model, (X,), strict=False),
    "export, strict": lambda model: torch.export.export(model, (X,), strict=True),
    "onnx": lambda model: torch.onnx.export(model, (X,), io.BytesIO(), dynamo=False),
}


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tracers_and_tensors_without_numbers_are_refused_in_one_sentence(fast, tracer, warm):
    model = copy.deepcopy(fast)
    if warm:
        model(X)
    with pytest.raises(Exception, match=r"export the original") as caught:
        TRACERS[tracer](model)
    if tracer != "export, strict":  # dynamo wraps it
        assert isinstance(caught.value, RuntimeError)
    assert torch.equal(model(X), fast(X))  # nothing of it was kept


def test_what_only_watches_is_let_in(fast):
    expected = fast(X)
    with execution_policy(kernels="never"):
        stand_in = fast(X)
    with FlopCounterMode(display=False) as counter:
        found = fast(X)
    assert counter.get_total_flops() > 0
    assert torch.equal(found, stand_in)
    rounds = fast.precision == "bf16" and tiny.rounds_currents("bf16", "dense")  # and then some neurons fire otherwise
    if not rounds:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)

    class Image(torch.Tensor):  # as torchvision has it
        pass

    torch.testing.assert_close(fast(X.as_subclass(Image)).as_subclass(torch.Tensor), expected, rtol=1e-4, atol=1e-3)


def copies(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assigned = copy.deepcopy(model)
    assigned.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    return {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "load": torch.load(buffer, weights_only=False),
        "assign": assigned,
    }


@pytest.mark.parametrize("ran", [False, True], ids=["fresh", "after a forward pass"])
def test_copies_made_in_inference_mode_run_ever_after(fast, ran):
    model = copy.deepcopy(fast)
    expected = fast(X)
    with torch.inference_mode():
        if ran:
            model(X)
        made = copies(model)
        for name, twin in made.items():
            assert torch.equal(twin(X), expected), name
    for name, twin in made.items():
        assert torch.equal(twin(X), expected), name
        assert torch.equal(copy.deepcopy(twin)(X), expected), name


def test_changed_weights_of_such_a_copy_are_seen(fast):
    with torch.inference_mode():
        twin = copy.deepcopy(fast)
        twin(X)
        changed = {name: tensor.clone() for name, tensor in fast.state_dict().items()}
        changed["head.bias"] += 1
        changed["stem.projection.bias"] += 0.5
        twin.load_state_dict(changed)
        assert not torch.allclose(twin.forward_features(X), fast.forward_features(X))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["test_qkformer", "qkformer_hst3_192"])
def test_pixels_that_are_no_numbers_do_what_they_do_in_the_original(name, value):
    """Max pooling hands NaN on; neurons that see one stay silent."""
    small = {"embed_dims": (8, 16, 32), "num_heads": 2, "depths": (1, 1, 1)} if name != "test_qkformer" else {}
    model = tiny.tiny(name, **small)
    x = tiny.images(2)
    expected = model(x)
    x[0, :, 9:13, 20] = value
    with torch.no_grad():
        assert torch.equal(deploy(model)(x).isfinite(), model(x).isfinite())
        torch.testing.assert_close(deploy(model)(x), model(x), rtol=1e-9, atol=1e-9)
        assert not torch.allclose(model(x)[0], expected[0])
        torch.testing.assert_close(model(x)[1], expected[1])


@pytest.mark.slow
def test_a_network_too_deep_for_256_spikes_in_bfloat16_is_exact():
    """Every neuron always fires, so the last stage puts out 2 + 2 * 130."""
    import timm

    model = timm.create_model("test_qkformer", depths=(1, 1, 130), num_classes=3)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.constant_(module.bias, 4.0)
    with pytest.warns(RuntimeWarning, match="0 to 262"):
        fast = deploy(model, "bf16")
    assert fast.forward_features(X[:1]).max() == 262


def test_both_reasons_are_named_when_both_do_not_fit():
    import timm

    model = timm.create_model("test_qkformer", depths=(1, 1, 64))
    with pytest.raises(ValueError, match=r'precision="int8" and products="events": sums of spikes in stages\.2'):
        deploy(model, "int8", "events")
