"""model.step: T steps are one call, plain and deployed; the state is a value that moves, cuts, joins and saves."""

import io

import pytest
import torch
from torch.utils import _pytree

from timm_qkformer import deploy
from timm_qkformer.models import StreamState
from timm_qkformer.neurons import run_with_state
from tiny import NAMES, images, tiny


def frames_of(model, steps: int = 3, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, steps, *model.default_cfg["input_size"], dtype=torch.float64)


def run_steps(model, clip, state=None):
    for frame in clip.unbind(1):
        logits, state = model.step(frame, state)
    return logits, state


@pytest.mark.parametrize("name", NAMES)
def test_steps_of_a_clip_are_one_call(name):
    torch.manual_seed(0)
    model = tiny(name)
    clip = frames_of(model)
    with torch.no_grad():
        assert torch.equal(run_steps(model, clip)[0], model(clip))
        for precision in ("fp32", "int8"):
            deployed = deploy(model.float(), precision)
            assert torch.equal(run_steps(deployed, clip.float())[0], deployed(clip.float())), precision
            _, state = run_steps(deployed, clip[:, :1].float())
            for frame in clip[:, 1:].float().unbind(1):
                logits, state = deployed.step(frame, state, donate=True)
            assert torch.equal(logits, deployed(clip.float())), precision


@pytest.mark.parametrize("name", ["test_qkformer", "test_qkformer_ms"])
def test_gradients_of_steps_are_those_of_one_call(name):
    torch.manual_seed(0)
    model = tiny(name)
    clip = frames_of(model)
    parameters = list(model.parameters())
    whole = torch.autograd.grad(model(clip).sum(), parameters)
    stepwise = torch.autograd.grad(run_steps(model, clip)[0].sum(), parameters)
    for one, other in zip(stepwise, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    _, state = run_steps(model, clip[:, :2])
    assert not model.step(clip[:, 2], state.detach())[1].detach().sums[0].requires_grad


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tiny("test_qkformer_ms")


def test_a_static_image_is_convolved_once(model):
    x, calls = images(), []
    model.stem.conv.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        expected = model(x)
        calls.clear()
        _, state = model.step(x)
        for _ in range(3):
            logits, state = model.step(None, state)
        assert len(calls) == 1
        assert torch.equal(logits, expected)


@pytest.mark.parametrize("make", [lambda model: model, deploy], ids=["plain", "deployed"])
def test_frames_may_lie_where_others_lay(make, model):
    """In a camera's buffer, in a tensor that was freed and whose memory is used again: never taken for the last one."""
    model, clip = make(model), frames_of(model, steps=4)
    buffer = clip[:, 0].numpy().copy()
    shared = torch.from_numpy(buffer)

    def read(step):
        buffer[:] = clip[:, step].numpy()  # past torch's count of versions
        return shared

    with torch.no_grad():
        expected = run_steps(model, clip)[0]
        for frame in (read, lambda step: torch.from_numpy(clip[:, step].numpy().copy())):
            logits, state = model.step(frame(0))
            for step in range(1, 4):
                logits, state = model.step(frame(step), state)
            assert torch.equal(logits, expected)


@pytest.mark.parametrize("name", ["test_qkformer_ms", "test_tim"])
def test_samples_leave_and_join(name):
    torch.manual_seed(0)
    model = tiny(name)
    clip = frames_of(model, steps=4, batch=3)
    with torch.no_grad():
        expected = model(clip)
        _, state = run_steps(model, clip[:, :2])
        kept = state.select(torch.tensor([True, False, True]))
        assert torch.equal(run_steps(model, clip[[0, 2], 2:], kept)[0], expected[[0, 2]])
        donated = run_steps(model, clip[:, :2])[1].select([0, 2], donate=True)
        assert torch.equal(run_steps(model, clip[[0, 2], 2:], donated)[0], expected[[0, 2]])
        other = run_steps(model, clip[1:2, :3])[1]
        joined = StreamState.cat([other, run_steps(model, clip[:1, :2])[1]])
        assert joined.steps.tolist() == [3, 2]
        logits, joined = model.step(torch.stack([clip[1, 3], clip[0, 2]]), joined)
        torch.testing.assert_close(logits[:1], expected[1:2], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(logits[1:], model(clip[:1, :3]), rtol=1e-12, atol=1e-12)


def test_a_state_is_saved_and_is_a_pytree(model):
    clip = frames_of(model)
    with torch.no_grad():
        _, state = run_steps(model, clip[:, :2])
        file = io.BytesIO()
        torch.save({"whole": state, "named": state.state_dict()}, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        named = StreamState.from_state_dict(loaded["named"])
        leaves, spec = _pytree.tree_flatten(state)
        for copy in (loaded["whole"], named, _pytree.tree_unflatten(leaves, spec), state.to("cpu")):
            assert torch.equal(model.step(clip[:, 2], copy)[0], model(clip))
    with pytest.raises(ValueError, match="no state of a model"):
        StreamState.from_state_dict({"sums.0": torch.zeros(1), "steps": torch.zeros(1)})


def test_states_of_something_else_are_refused(model):
    x = images(2)
    with torch.no_grad():
        _, state = model.step(x)
        for other, frame in (
            (tiny("test_qkformer"), x),
            (tiny("test_qkformer_ms", depths=(1, 1, 1)), x),
            (deploy(model), x),
            (model, images(2, size=(48, 48))),
            (tiny("test_qkformer_ms").float(), x.float()),
        ):
            with pytest.raises(ValueError, match="another model or input"):
                other.step(frame, state)
        with pytest.raises(ValueError, match=r"state\.select"):
            model.step(images(3), state)
        with pytest.raises(TypeError, match="state is a tuple"):
            model.step(x, state.potentials)
        with pytest.raises(ValueError, match="one time step"):
            model.step(frames_of(model))
        with pytest.raises(ValueError, match="give the first one"):
            model.step(None)
        with pytest.raises(TypeError, match="mask, indices or a slice"):
            state.select(0)


@pytest.mark.parametrize("make", [lambda model: model, deploy], ids=["plain", "deployed"])
def test_states_that_were_changed_by_hand_are_refused(make, model):
    changed = make(tiny("test_qkformer_ms", depths=(1, 1, 1)))
    model, x = make(model), images(2)
    with torch.no_grad():
        _, state = model.step(x)
        named = state.state_dict()
        for name, value in (
            ("potentials.0", named["potentials.0"][:1]),
            ("potentials.0", named["potentials.0"].float()),
            ("potentials.0", named["potentials.0"].to("meta")),
            ("potentials.1", named["potentials.0"]),
            ("sums.0", named["sums.0"][:1]),
            ("sums.0", named["sums.0"][:, :1]),
            ("sums.2", named["sums.0"]),
            ("steps", named["steps"].double()),
        ):
            spoilt = StreamState.from_state_dict({**named, name: value})
            for frame in (x, None):
                with pytest.raises(ValueError, match=r"the state|potential v"):
                    model.step(frame, spoilt)
        with pytest.raises(ValueError, match=r"where torch\.float64 of 2 samples on cpu is expected"):
            model.step(x, state.to(torch.float32))
        with pytest.raises(ValueError, match="another model"):
            changed.step(None, state)
        with pytest.raises(ValueError, match="1 sums, the model's readout adds up 2"):
            model.step(x, StreamState.from_state_dict({k: v for k, v in named.items() if k != "sums.1"}))
        with pytest.raises((TypeError, RuntimeError), match="list"):
            model.step([x])


@pytest.mark.parametrize("make", [lambda model: model, deploy], ids=["plain", "deployed"])
def test_coupled_samples_cannot_stream(make):
    with pytest.raises(ValueError, match="batch_coupled=True"):
        make(tiny("test_qkformer", batch_coupled=True)).step(images())


def test_an_exported_program_carries_no_state():
    from timm_qkformer.neurons import LIF

    x = torch.randn(3, 2, 4)
    exported = torch.export.export(torch.nn.Sequential(LIF()), (x,)).module()
    with pytest.raises(ValueError, match="no neuron of the module carries a state"):
        run_with_state(exported, x)
