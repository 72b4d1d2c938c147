"""What holds for every registered operator with every registered neuron and both kinds of shortcut.

Parametrised over the registries, so an operator or neuron that somebody adds is tested, or fails, without a line here.
"""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import own  # registers an operator and a neuron from outside of the package
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import timm_qkformer
from timm_qkformer.execution import execution_policy
from timm_qkformer.layers import SpikingBlock
from timm_qkformer.models import (
    Architecture,
    BlockSpec,
    ChainSpec,
    MixerSpec,
    PositionSpec,
    QKFormer,
    SpikingTransformer,
    StageSpec,
    UnitSpec,
)
from timm_qkformer.neurons import SpikingNeuron, get_neuron_layer, neuron_names, run_with_state
from timm_qkformer.operators import Operator, get_operator, operator_names, register_operator

assert own  # imported for what it registers

T, B, DIM, SIDE = 3, 2, 16, 4
SHORTCUTS = ("SEW", "MS")
SLOW = [pytest.mark.slow]
USUAL_MS = {(name, "lif") for name in ("qkta", "ssa", "dwc3", "tim", "own_sdsa")} | {("own_sdsa", "own_ternary")}


@pytest.fixture(params=operator_names())
def operator(request):
    return request.param


@pytest.fixture(params=neuron_names())
def neuron(request):
    return request.param


@pytest.fixture(params=SHORTCUTS)
def shortcut(request):
    return request.param


def _cases():
    """Each operator with the usual neuron, each neuron with one operator; all other pairs in the slow suite."""
    for operator in operator_names():
        for neuron in neuron_names():
            usual = neuron == "lif" or operator == "own_sdsa"
            yield pytest.param((operator, neuron), id=f"{operator}-{neuron}", marks=[] if usual else pytest.mark.slow)


def _export_cases():
    """As `_cases`, with both kinds of shortcut; by default each operator once, which takes long enough."""
    for case in _cases():
        for shortcut in SHORTCUTS:
            usual = not case.marks and case.values[0][1] == "lif" and shortcut == "SEW"
            marks = [] if usual else [pytest.mark.slow]
            yield pytest.param((*case.values[0], shortcut), id=f"{case.id}-{shortcut}", marks=marks)


@pytest.fixture(params=_export_cases())
def export_case(request):
    """A small model to be exported."""
    return make_model(*request.param)


def _model_cases():
    """As `_cases`, with both kinds of shortcut; by default membrane shortcuts with one operator of each kind."""
    for case in _cases():
        for shortcut in SHORTCUTS:
            usual = not case.marks and (shortcut == "SEW" or case.values[0] in USUAL_MS)
            yield pytest.param((*case.values[0], shortcut), id=f"{case.id}-{shortcut}", marks=[] if usual else SLOW)


@pytest.fixture(params=_model_cases())
def model_case(request):
    """A small model, and its name in errors."""
    return make_model(*request.param)


def make_block(operator: str, neuron: str, shortcut: str) -> SpikingBlock:
    torch.manual_seed(1)
    layer = get_neuron_layer(neuron)
    mixer = get_operator(operator)
    block = SpikingBlock(DIM, [_with_heads(mixer)], 2.0, neuron_layer=layer, membrane_shortcut=shortcut == "MS")
    _make_lively(block)
    return block.double()


def _with_heads(mixer):
    return lambda *args, **kwargs: mixer(*args, num_heads=2, **kwargs)


def input_shapes(mixer: Operator) -> list[tuple[int, ...]]:
    """[heads, channels of a head, tokens] of each input."""
    return [(*mixer.input_shape(name), SIDE**2) for name in mixer.inputs]


def _make_lively(module):
    """Batch norms after which neurons of threshold 1 fire now and then, none always."""
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(part.weight, 2.0, 0.5)
            torch.nn.init.normal_(part.bias, 0.5, 0.5)


def block_input(shortcut: str, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(T, B, DIM, SIDE, SIDE, generator=generator, dtype=torch.float64)
    return (x < 0.4).double() if shortcut == "SEW" else 4 * x - 1


def make_model(operator: str, neuron: str, shortcut: str, **kwargs) -> QKFormer:
    torch.manual_seed(2)
    model = QKFormer(
        patch_embed="small",
        attn=operator,
        embed_dims=(16, 16, 16),
        depths=(1, 0, 1),
        num_heads=2,
        mlp_ratio=2.0,
        neuron=neuron,
        membrane_shortcut=shortcut == "MS",
        num_classes=5,
        time_steps=T,
        **kwargs,
    ).double()
    _make_lively(model)
    with torch.no_grad():
        for _ in range(3):  # running statistics of something
            model(torch.randn(4, 3, 16, 16, dtype=torch.float64))
    return model.eval()


def images(count: int = B) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def gradients(module, x):
    x = x.clone().requires_grad_()
    y = module(x)
    weights = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(4))
    parameters = [p for p in module.parameters() if p.requires_grad]
    return y.detach(), torch.autograd.grad((y * weights).sum(), [x, *parameters], allow_unused=True)


def assert_same(one, other, tolerance=1e-10):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_packed_training_has_the_values_and_gradients_of_autograd(operator, neuron, shortcut):
    block, x = make_block(operator, neuron, shortcut), block_input(shortcut)
    state = copy.deepcopy(block.state_dict())
    packed, packed_grads = gradients(block, x)
    moved = copy.deepcopy(block.state_dict())
    block.load_state_dict(state)
    with execution_policy(packed=False, neurons="eager"):
        plain, plain_grads = gradients(block, x)
    assert_same([packed], [plain])
    assert_same(packed_grads, plain_grads, 1e-9)
    assert_same(list(moved.values()), list(block.state_dict().values()))  # running statistics moved once
    assert any(grad is not None and grad.abs().sum() > 0 for grad in plain_grads)


def test_inputs_are_kept_in_bits(operator, shortcut):
    """Binary neurons: of what the operator's own inputs hold, no tensor is kept in floating point."""
    block, x = make_block(operator, "lif", shortcut), block_input(shortcut).float()
    block = block.float()

    def kept(packed: bool) -> int:
        sizes: dict[int, int] = {}

        def note(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        inputs = x.clone().requires_grad_()
        with (
            execution_policy(packed=packed, neurons="eager"),
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        ):
            held = block(inputs)  # storages stay alive, so that none is counted twice
        fixed = {p.untyped_storage().data_ptr() for p in [*block.parameters(), *block.buffers(), inputs]}
        del held
        return sum(size for pointer, size in sizes.items() if pointer not in fixed)

    assert kept(True) < 0.55 * kept(False)


def test_what_attend_gives_is_in_the_declared_range(operator, neuron, shortcut):
    block = make_block(operator, neuron, shortcut).eval()
    mixer = block.attn
    seen = []
    getattr(mixer, mixer.output).register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    block(block_input(shortcut))
    held = getattr(mixer, mixer.output).input_range
    (attended,) = seen
    assert attended.min() >= held.low
    assert attended.max() <= held.high
    if not held.is_real:
        assert torch.equal(attended, attended.round())
    if neuron != "relu":
        assert not held.is_real


def test_steps_one_at_a_time_equal_one_call(operator, neuron, shortcut):
    block, x = make_block(operator, neuron, shortcut).eval(), block_input(shortcut)
    whole, final = run_with_state(block, x)
    assert torch.equal(whole, block(x))
    state, steps = None, []
    for t in range(T):
        y, state = run_with_state(block, x[t : t + 1], state=state)
        steps.append(y)
    assert torch.equal(torch.cat(steps), whole)
    assert len(state) == len(final)
    assert all(torch.equal(a, b) for a, b in zip(state, final, strict=True))


def test_gradients_through_steps_equal_those_of_one_call(operator, neuron, shortcut):
    block, x = make_block(operator, neuron, shortcut).eval(), block_input(shortcut)

    class Stepwise(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block

        def forward(self, x):
            state, steps = None, []
            for t in range(T):
                y, state = run_with_state(self.block, x[t : t + 1], state=state)
                steps.append(y)
            return torch.cat(steps)

    assert_same(gradients(Stepwise(), x)[1], gradients(block, x)[1])


@torch.no_grad()
def test_steps_of_a_model_equal_one_call(model_case):
    """To the last bit, plain and deployed: frames that differ, and a state that is passed from one to the next."""
    clip = torch.randn(B, T, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    for model in (model_case, timm_qkformer.deploy(copy.deepcopy(model_case).float(), "fp32")):
        state, frames = None, clip.to(next(iter(model.state_dict().values())).dtype)
        for frame in frames.unbind(1):
            logits, state = model.step(frame, state)
        assert torch.equal(logits, model(frames))


def test_a_sample_does_not_depend_on_its_batch_mates(model_case):
    model, x = model_case, images(3)
    with torch.no_grad():
        torch.testing.assert_close(torch.cat([model(one[None]) for one in x]), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*(deprecated|rounded weights are multiplied|8-bit|bfloat16 arithmetic)")
def test_deployed_equals_plain(model_case):
    model, x = model_case, images()
    timm_qkformer.quantize_weights(model)
    with torch.no_grad():
        expected = model(x)
    for precision in ("fp32", "bf16", "int8"):
        for kernels in ("auto", "never"):
            with execution_policy(kernels=kernels):
                found = timm_qkformer.deploy(model, precision)(x)
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6, msg=f"{precision}, kernels={kernels}")


def make_model_on_currents(operator: str, neuron: str) -> SpikingTransformer:
    """Blocks that add spikes to a stream of real numbers: the chain before them ends without neurons."""
    torch.manual_seed(2)
    block = BlockSpec((MixerSpec(operator, 2), MixerSpec("dwc3", 2)), 2.0)
    chain = ChainSpec((UnitSpec(DIM, "currents", fires=False),), PositionSpec(fires=True))
    stages = (StageSpec(DIM, chain, (block,)),)
    model = SpikingTransformer(Architecture(UnitSpec(8), stages), neuron=neuron, num_classes=5, time_steps=T)
    _make_lively(model.double())
    return model.eval()


@pytest.mark.filterwarnings("ignore:.*(rounded weights are multiplied|8-bit|bfloat16 arithmetic)")
@pytest.mark.parametrize("case", list(_cases()))
@torch.no_grad()
def test_spikes_added_to_currents_are_deployed_as_they_are(case):
    model, x = make_model_on_currents(*case), images()
    timm_qkformer.quantize_weights(model)
    expected = model(x)
    assert not torch.equal(expected, model(x.flip(0)))
    for precision in ("fp32", "int8"):
        found = timm_qkformer.deploy(model, precision)(x)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6, msg=precision)
    with pytest.raises(ValueError, match=r'products="events": stages\.0 passes on real numbers'):
        timm_qkformer.deploy(model, products="events")


@pytest.mark.filterwarnings("ignore:.*(rounded weights are multiplied|8-bit|bfloat16 arithmetic)")
def test_deployed_in_float32_equals_plain_in_float64(model_case, event_kernels):
    """Spikes add up in other orders: on weights that are whole steps, sums of few are exact, and no spike flips."""
    model, x = model_case.float(), images().float()
    timm_qkformer.quantize_weights(model)
    with torch.no_grad():
        expected = model.double()(x.double()).float()
    deployed = timm_qkformer.deploy(model.float(), "int8")
    torch.testing.assert_close(deployed(x), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_exports_equal_plain(export_case):
    model, x = export_case, images()
    with torch.no_grad():
        expected = model(x)
        for name, exported in {
            "script": torch.jit.script(model),
            "trace": torch.jit.trace(model, (x,), check_trace=False),
            "export": torch.export.export(model, (x,)).module(),
        }.items():
            torch.testing.assert_close(exported(x), expected, rtol=1e-10, atol=1e-10, msg=name)


def test_copies_pickles_and_threads(model_case):
    model, x = model_case, images()
    with torch.no_grad():
        expected = model(x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x), expected)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(y, expected) for y in pool.map(lambda _: model(x).detach(), range(8)))


class _Counter(TorchDispatchMode):
    """Scalar operations between tensors: sums, products, matrix products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        aten = torch.ops.aten
        if func in (aten.bmm.default, aten.mm.default):
            self.count += out.numel() * args[0].shape[-1]
        elif func is aten.sum.dim_IntList:
            self.count += args[0].numel()
        elif func is aten.mul.Tensor and isinstance(args[1], torch.Tensor) and args[1].dim() > 0:
            self.count += out.numel()
        return out


def test_operations_are_those_that_run(operator):
    mixer: Operator = get_operator(operator)(DIM, num_heads=2)
    for name, inner in mixer.inner_modules().items():
        if isinstance(inner, SpikingNeuron):
            setattr(mixer, name, torch.nn.Identity())  # neurons are counted by nobody
    spikes = [torch.ones(1, 1, *shape) for shape in input_shapes(mixer)]
    declared = mixer.operations(*spikes, *mixer.map_size(SIDE, SIDE))
    with _Counter() as counter:
        if mixer.inputs:
            mixer.attend(*spikes, *mixer.map_size(SIDE, SIDE))
    assert sum(op.spikes.numel() * op.fan_out for op in declared) == counter.count
    assert all(0 <= op.spikes.abs().sum() * op.fan_out for op in declared)
    # Where everything fires, all of them take place.
    assert all(op.additions in (None, op.spikes.numel() * op.fan_out) for op in declared)
    none = mixer.operations(*(torch.zeros_like(s) for s in spikes), *mixer.map_size(SIDE, SIDE))
    assert all(not op.additions and op.spikes.sum() == 0 for op in none)


def test_views_have_a_value_for_each_token_and_channel(operator):
    mixer: Operator = get_operator(operator)(DIM, num_heads=2)
    if not mixer.inputs:
        pytest.skip("has no heads to look into")
    shapes = zip(mixer.inputs, input_shapes(mixer), strict=True)
    spikes = {name: (torch.rand(T, B, *shape) < 0.5).float() for name, shape in shapes}
    inner = {}
    for name, module in mixer.inner_modules().items():
        module.register_forward_hook(lambda _module, _inputs, out, name=name: inner.update({name: out}))
    attended = mixer.attend(*spikes.values(), *mixer.map_size(SIDE, SIDE))
    views = mixer.views(spikes, inner, attended)
    assert views.tokens.shape == (T, B, mixer.num_heads, SIDE**2)
    assert views.channels.shape == (T, B, mixer.num_heads, DIM // mixer.num_heads)


@pytest.mark.parametrize(
    ("declared", "said"),
    [
        ({"attend": Operator.attend}, "must declare attend"),
        ({"attended_range": Operator.attended_range}, "must declare attended_range"),
        ({"operations": Operator.operations}, "must declare operations"),
    ],
)
def test_an_operator_that_declares_too_little_is_refused_by_name(declared, said):
    incomplete = type("Incomplete", (own.SpikeDrivenAttention,), declared)
    with pytest.raises(TypeError, match=f"'too_little': Incomplete {said}"):
        register_operator("too_little")(incomplete)
    assert "too_little" not in operator_names()


def test_names_that_are_taken_or_unknown():
    with pytest.raises(ValueError, match="'ssa' is registered already"):
        register_operator("ssa")(own.SpikeDrivenAttention)
    with pytest.raises(ValueError, match=r"'nothing' is unknown, choose from .*'own_sdsa'"):
        get_operator("nothing")
    with pytest.raises(ValueError, match=r"attn=.*'nothing' is unknown"):
        QKFormer(attn="nothing")
    assert get_operator("QKTA")(DIM, num_heads=2).operator_name == "qkta"
