"""Training with packed activations against the plain modules: the same values and gradients, less kept."""

import copy
import gc
import warnings
from functools import partial

import pytest
import timm
import torch
from torch import nn

import tiny
from timm_qkformer.execution import BINARY, REAL, counts, execution_policy, packing
from timm_qkformer.layers import ConvNorm, SpikingConv, SpikingMlp, SpikingPatchEmbed, output_range, packed
from timm_qkformer.neurons import IF, LIF, ParametricLIF, compiled
from timm_qkformer.operators import base as operators

TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}

lively = partial(tiny.lively, bias=(0.5, 2.0))


def spikes(*shape, most=1, dtype=torch.float64):
    return torch.randint(0, most + 1, shape).to(dtype)


def train(layer, x, is_packed, neurons="eager", seed=0):
    """Output, gradients and buffers of one training step on a copy of the layer."""
    layer = copy.deepcopy(layer).train()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    torch.manual_seed(seed)
    with execution_policy(packed=is_packed, neurons=neurons):
        out = layer(x * 1.0)
        weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
        (out * weight).sum().backward()
    grads = {"input": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}
    return out.detach(), grads, dict(layer.named_buffers())


def check(layer, x, neurons="eager", same_spikes=True, **tolerance):
    tolerance = tolerance or TOLERANCE
    plain = train(layer, x, False, neurons)
    ours = train(layer, x, True, neurons)
    if same_spikes:
        assert torch.equal(ours[0], plain[0])
    torch.testing.assert_close(ours[0], plain[0], **tolerance)
    for theirs, own in zip(plain[1:], ours[1:], strict=True):
        assert theirs.keys() == own.keys()
        for name, wanted in theirs.items():
            torch.testing.assert_close(own[name], wanted, **tolerance, msg=lambda text, name=name: f"{name}: {text}")
    return ours


@pytest.fixture
def saved():
    """Shapes and dtypes of what is kept for the backward pass, parameters aside."""
    kept = []

    def pack(x):
        if not isinstance(x, nn.Parameter):
            kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield kept


def kept_bytes(kept):
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}.values())


Unit = partial(SpikingConv, input_range=BINARY)
UNITS = {
    "1x1": partial(Unit, 6, 10),
    "1x1, bias": partial(Unit, 6, 10, bias=True),
    "1x1, stride": partial(Unit, 6, 10, 1, 2),
    "3x3": partial(Unit, 6, 10, 3),
    "3x3, stride": partial(Unit, 6, 10, 3, 2),
    "3x3, pool": partial(Unit, 6, 10, 3, pool=True),
    "depth-wise": partial(Unit, 6, 6, 5, groups=6, bias=True),
    "integrate and fire": partial(Unit, 6, 10, neuron_layer=IF),
    "parametric": partial(Unit, 6, 10, neuron_layer=ParametricLIF),
    "soft reset": partial(Unit, 6, 10, neuron_layer=partial(LIF, v_reset=None, surrogate="atan")),
    "reset differentiated": partial(Unit, 6, 10, neuron_layer=partial(ParametricLIF, detach_reset=False)),
    "coupled": partial(Unit, 6, 10, batch_coupled=True),
    "no neurons": partial(ConvNorm, 6, 10, 3, pool=True, input_range=BINARY),
}
SHAPES = [(4, 2, 6, 8, 8), (3, 1, 6, 5, 7), (1, 2, 6, 7, 4), (2, 3, 6, 1, 3), (17, 1, 6, 3, 3)]


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_units(unit, shape):
    same = unit != "no neurons"
    out = check(lively(UNITS[unit]()), spikes(*shape), same_spikes=same)[0]
    assert shape != SHAPES[0] or not same or 0.05 < out.mean() < 0.95
    check(lively(UNITS[unit](input_range=counts(4))), spikes(*shape, most=4), same_spikes=same)
    check(lively(UNITS[unit](input_range=REAL)), torch.randn(shape, dtype=torch.float64), same_spikes=same)


def clip():
    return torch.rand(2, 5, 2, 32, 32, dtype=torch.float64)


LAYERS = {
    **{
        f"embedding {pools}": (partial(SpikingPatchEmbed, 6, 10, pools), lambda: spikes(3, 2, 6, 9, 7))
        for pools in [(True, False), (False, True), (True, True), (False,)]
    },
    "dropout": (partial(SpikingMlp, 6, 12, drop=0.3), lambda: spikes(3, 2, 6, 5, 5)),
    "channels last": (
        UNITS["3x3, pool"],
        lambda: spikes(8, 6, 5, 4).contiguous(memory_format=torch.channels_last).unflatten(0, (4, 2)),
    ),
    "batch before time": (UNITS["3x3"], lambda: spikes(2, 4, 6, 5, 4).transpose(0, 1)),
    "slice": (UNITS["3x3, pool"], lambda: spikes(4, 2, 6, 5, 9)[..., 2:6]),
    "steps apart": (UNITS["3x3"], lambda: spikes(8, 2, 6, 5, 4)[::2]),
    **{
        name: (
            partial(timm.create_model, name, drop_path_rate=0.2, neuron="plif"),
            partial(tiny.images, 3, 3, (37, 50)),
        )
        for name in ("test_qkformer", "test_qkformer_ms", "test_maxformer")
    },
    "event clips": (partial(timm.create_model, "qkformer_hst2_256", embed_dims=(16, 32, 64), num_heads=4), clip),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_layouts_and_models(name):
    make, x = LAYERS[name]
    layer = (tiny.lively if "former" in name or "clips" in name else lively)(make())
    check(layer, x(), same_spikes=False)


@pytest.mark.parametrize("shape", [(1, 1, 6, 1, 1), (4, 0, 6, 5, 5)])
@pytest.mark.parametrize("unit", ["3x3", "3x3, pool"])
def test_too_little_to_normalise_is_as_ever(shape, unit):
    layer, outcomes = lively(UNITS[unit]()).train(), []
    for enabled in (False, True):
        with execution_policy(packed=enabled):
            try:
                outcomes.append(layer(spikes(*shape)).shape)
            except ValueError as error:
                outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]
    assert "more than 1 value per channel" in outcomes[0] or outcomes[0][1] == 0


@pytest.mark.parametrize("in_chs", [3, 4, 6])
def test_narrow_strided_convolutions(in_chs):
    """Whose gradients by oneDNN, channels last and in single precision, write where they should not."""
    layer = lively(Unit(in_chs, 16, 1, 2)).float()
    for _ in range(4):
        check(layer, spikes(2, 4, in_chs, 32, 32, dtype=torch.float32), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_one_pair_of_compiled_kernels_for_all_shapes(dtype, monkeypatch):
    monkeypatch.setattr(compiled, "_kernels", {})
    tolerance = TOLERANCE if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-3}
    for in_chs, out_chs, shape in [(6, 10, (2, 8, 8)), (6, 10, (1, 5, 7)), (5, 24, (3, 2, 3))]:
        layer = lively(Unit(in_chs, out_chs, 3)).to(dtype)
        B, H, W = shape
        x = spikes(3, B, in_chs, H, W, dtype=dtype)
        eager, ours = train(layer, x, True, "eager"), train(layer, x, True, "compile")
        assert torch.equal(ours[0], eager[0])  # bit for bit
        for name, wanted in eager[1].items():
            torch.testing.assert_close(ours[1][name], wanted, **tolerance)
    assert len(compiled._kernels) == 2
    assert {(key.backward, key.affine) for key in compiled._kernels} == {(False, True), (True, True)}


@pytest.mark.parametrize("unit", ["3x3", "3x3, pool"])
def test_batch_norms_of_all_kinds(unit):
    x = spikes(3, 2, 6, 5, 5)
    for change in ({"momentum": None}, {"momentum": 0.4}, {"eps": 0.1}, {"num_batches_tracked": None}):
        layer = lively(UNITS[unit]())
        for name, value in change.items():
            setattr(layer.bn, name, value)
        check(layer, x)
        layer.bn.track_running_stats = False
        check(layer, x)
    layer = lively(UNITS[unit]())
    layer.bn = nn.BatchNorm2d(10, track_running_stats=False).double()
    check(layer, x)
    layer.bn = nn.BatchNorm2d(10, affine=False).double()
    check(layer, x)
    layer.bn = nn.BatchNorm2d(10).double()
    layer.bn.register_parameter("bias", None)  # as torch's own argument has it since 2.12
    check(layer, x)


@pytest.mark.parametrize(
    "change",
    [
        {"pool": nn.MaxPool2d(2, 2)},
        {"pool": nn.MaxPool2d(3, 2, 1, ceil_mode=True)},
        {"pool": nn.MaxPool2d((3, 3), (2, 2), (1, 1))},
        {"conv": nn.Conv2d(6, 10, 3, padding=1, padding_mode="circular")},
        {"conv": nn.Conv2d(6, 10, 3, padding="same")},
    ],
    ids=str,
)
def test_other_settings_of_convolution_and_pooling(change):
    layer = UNITS["3x3, pool"]()
    for name, module in change.items():
        setattr(layer, name, module)
    check(lively(layer), spikes(3, 2, 6, 6, 6))


@pytest.mark.parametrize("unit", ["1x1, bias", "3x3, pool"])
def test_frozen_batch_norms(unit):
    layer = lively(UNITS[unit]())
    layer.bn.train = lambda mode=True: None  # stays in eval mode, as fine-tuning has it
    check(layer, spikes(3, 2, 6, 5, 5))


def test_frozen_weights_keep_no_input(saved):
    layer = lively(UNITS["3x3"]()).train()
    layer.conv.weight.requires_grad_(False)
    x = spikes(4, 2, 6, 8, 8).requires_grad_()
    layer(x * 1.0).sum().backward()
    assert not any(t.dtype == torch.uint8 for t in saved)
    grad = x.grad
    x.grad = None
    with execution_policy(packed=False):
        layer(x * 1.0).sum().backward()
    torch.testing.assert_close(grad, x.grad, **TOLERANCE)


def test_what_is_kept(saved):
    T, B, C, H, W = 4, 2, 16, 8, 8
    elements = T * B * C * H * W
    layer = Unit(C, C).train()
    layer(spikes(T, B, C, H, W, dtype=torch.float32))
    large = [t for t in saved if t.numel() > C]
    assert sorted((t.dtype, t.numel()) for t in large if t.dtype == torch.uint8) == [(torch.uint8, elements // 8)]
    assert [t.numel() for t in large if t.dtype == torch.float32] == [elements]  # the convolution's output


@pytest.mark.parametrize("half", [False, True])
def test_bytes_of_hst4_384(half, saved):
    """The largest claim of docs/execution.md, at a quarter of the width."""
    model = timm.create_model("qkformer_hst4_384", embed_dims=(24, 48, 96)).train()
    x = torch.rand(2, 3, 32, 32)
    sizes = []
    for enabled in (False, True):
        saved.clear()
        with execution_policy(packed=enabled), torch.autocast("cpu", torch.bfloat16, enabled=half):
            model(x)
        sizes.append(kept_bytes(saved))
    assert sizes[1] < 0.4 * sizes[0]
    per_image_at_full_width = 4 * sizes[1] / len(x) / 1e6
    assert per_image_at_full_width < (25 if half else 46)


def test_autocast():
    layer = lively(UNITS["3x3"]()).float()
    x = spikes(4, 2, 6, 8, 8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        plain, ours = (train(layer, x, enabled) for enabled in (False, True))
    assert ours[0].dtype == plain[0].dtype == torch.bfloat16
    assert (ours[0] != plain[0]).float().mean() < 0.02
    for name, grad in plain[1].items():
        assert ours[1][name].dtype == grad.dtype
        cosine = torch.cosine_similarity(ours[1][name].flatten().double(), grad.flatten().double(), dim=0)
        # A bias in front of a batch norm has no gradient but rounding errors.
        assert cosine > 0.98 or name == "conv.bias"


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", ["test_qkformer", "test_qkformer_ms", "test_maxformer"])
def test_models_train_under_autocast(name, inside):
    model = timm.create_model(name, num_classes=5).train()
    x = torch.rand(2, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
        loss = logits.float().square().sum()
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    assert logits.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    model.zero_grad()
    logits = model.bfloat16()(x.bfloat16())
    assert logits.dtype == torch.bfloat16
    logits.sum().backward()
    assert all(p.grad.dtype == torch.bfloat16 for p in model.parameters())


def test_second_derivatives_are_refused_with_a_way_out():
    layer = lively(UNITS["1x1"]()).train()
    x = torch.randn(3, 2, 6, 5, 5, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"create_graph=True.*packed=False"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    with execution_policy(packed=False):
        grad = torch.autograd.grad(layer(x).sum(), x, create_graph=True)[0]
        grad.square().sum().backward()
    layer.eval()
    torch.autograd.grad(layer(x).sum(), x, create_graph=True)[0].square().sum().backward()


@pytest.fixture
def packed_calls(monkeypatch):
    """Names of the functions that save memory, as they run from here on."""
    calls = []
    names = {packed: ("convolve", "norm_and_fire", "max_pool"), operators: ("call_packed",)}
    for module, name in ((module, name) for module, own in names.items() for name in own):
        function = getattr(module, name)

        def spy(*args, function=function, name=name):
            calls.append(name)
            return function(*args)

        monkeypatch.setattr(module, name, spy)
    return calls


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_who_takes_the_packed_path(packed_calls):
    model, x = timm.create_model("test_qkformer", num_classes=5).train(), torch.rand(2, 3, 32, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # all ranges hold
        model(x)
    assert len(set(packed_calls)) == 4
    assert packed_calls.count("convolve") == sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert packed_calls.count("call_packed") == sum(isinstance(m, operators.Operator) for m in model.modules())
    packed_calls.clear()

    with execution_policy(packed=False):
        model(x)
    with torch.no_grad():
        model(x)
    with execution_policy(neurons="spikingjelly"):
        model(x)
    torch.compile(model, fullgraph=True, backend="eager")(x)
    torch.jit.script(model)(x)
    torch.jit.trace(model, x, check_trace=False)
    params = {k: v.detach() for k, v in model.named_parameters()}
    model.eval()
    model(x)
    torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).sum())(params)
    assert packed_calls == []


def test_replaced_modules_run():
    layer = lively(UNITS["3x3"]()).float().train()
    x = spikes(3, 2, 6, 5, 5, dtype=torch.float32)
    layer.bn = nn.Sequential(layer.bn, nn.Hardtanh(-1e9, -1e8))
    assert layer(x).sum() == 0
    layer = lively(UNITS["3x3"]()).float().train()
    layer.conv = nn.Sequential(layer.conv, nn.Threshold(1e9, 0.0))
    out = layer(x)
    assert torch.equal(out.amax((1, 3, 4)), out.amin((1, 3, 4)))
    layer = nn.utils.parametrizations.weight_norm(UNITS["3x3"]().train().conv)
    assert not packed._is_plain_conv(layer)
    patched = nn.Conv2d(1, 1, 1)
    patched.forward = lambda x: x
    assert not packed._is_plain_conv(patched)


MODEL_PARTS = [
    "stem.neuron", "stem", "stages.1.embed.main.0", "stages.1.embed.main", "stages.1.embed.shortcut",
    "stages.2.embed.main.0.neuron", "stages.0.blocks.0.attn.q", "stages.2.blocks.0.attn.k.neuron",
    "stages.0.blocks.0.attn.attn_neuron", "stages.2.blocks.0.attn.attn_neuron", "stages.2.blocks.0.attn",
    "stages.2.blocks.0.mlp.fc1.neuron", "stages.2.blocks.0.mlp.fc1", "stages.2.blocks.0.drop_path",
    "stages.2.blocks.0.mlp.fc1.bn",
]  # fmt: skip


class Scaled(nn.Module):
    """Somebody else's module, which takes the place of one of ours: its answer times a factor."""

    def __init__(self, module, factor):
        super().__init__()
        self.module, self.factor = module, factor

    def forward(self, *args):
        return self.module(*args) * self.factor


@pytest.mark.filterwarnings("ignore:a layer's input should hold")
@pytest.mark.parametrize("name", ["test_qkformer", "test_qkformer_ms"])
@pytest.mark.parametrize(
    ("factor", "how"), [(0.6, "hook"), (2.0, "hook"), (-1.0, "hook"), (2.0, "module"), (0.6, "subclass")]
)
@pytest.mark.parametrize("path", MODEL_PARTS)
def test_gradients_are_right_whatever_somebody_changes(path, factor, how, name):
    """Ranges are declared, not trusted."""
    model = tiny.tiny(name, depths=(1, 0, 1), time_steps=2)
    parent, _, child = path.rpartition(".")
    module = model.get_submodule(path)
    if how == "hook":
        module.register_forward_hook(lambda _module, _args, out: out * factor)
    elif how == "module":
        setattr(model.get_submodule(parent), child, Scaled(module, factor))
    else:
        cls = type(module)
        forward = lambda self, *args: cls.forward(self, *args) * factor  # noqa: E731
        module.__class__ = type("Own", (cls,), {"forward": forward})
    # A wrong range is off by percents; sums in another order, through batch norms of little variance, by this much.
    check(model, tiny.images(2, size=(16, 16)), same_spikes=False, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("factor", [0.6, 2.0])
def test_an_input_that_does_not_fit_is_kept_as_it_is_after_one_warning(factor, saved, monkeypatch):
    monkeypatch.setattr(packing, "_warned", set())
    layer = lively(UNITS["3x3"]())
    x = spikes(3, 2, 6, 5, 5)
    with pytest.warns(RuntimeWarning, match="a layer's input should hold whole numbers from 0 to 1"):
        check(layer, factor * x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(layer, factor * x)
    check(lively(UNITS["3x3"](input_range=BINARY.dropped())), factor * x)  # nothing was promised, nobody is warned
    saved.clear()
    layer.train()(factor * x)
    assert not any(t.dtype == torch.uint8 for t in saved)


@pytest.fixture
def asked(monkeypatch):
    """Neurons' kernels pack what they fire, as on CUDA, here as torch operations; yields what else was packed."""
    monkeypatch.setattr(compiled, "_PACKING_DEVICES", {"cpu"})
    monkeypatch.setattr(compiled, "_MIN_ELEMENTS", {"cpu": 0})
    monkeypatch.setattr(compiled, "_kernels", {})
    monkeypatch.setattr(compiled, "_compile", compiled.kernel_body)
    found, own = [], packing.pack
    monkeypatch.setattr(packing, "pack", lambda x, held: found.append(x.shape) or own(x, held))
    return found


class Ternary(LIF):
    levels = "ternary"


@pytest.mark.parametrize("neuron", [LIF, Ternary])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
def test_spikes_come_packed_from_the_kernel_that_fires(steps, neuron, asked):
    first = SpikingConv(6, 10, 3, input_range=BINARY, neuron_layer=neuron)
    layer = lively(nn.Sequential(first, SpikingConv(10, 4, input_range=output_range(first))).double())
    out, *_ = check(layer, spikes(steps, 2, 6, 8, 8), neurons="compile")
    assert asked == [(2 * steps, 6, 8, 8)], "the input alone"
    assert 0.02 < out.mean() < 0.98


def test_steps_that_do_not_divide_are_packed_afterwards(asked):
    layer = lively(
        nn.Sequential(SpikingConv(6, 10, 3, input_range=BINARY), SpikingConv(10, 4, input_range=BINARY)).double()
    )
    check(layer, spikes(4, 1, 6, 3, 3), neurons="compile")  # nine pixels, in two parts
    assert asked == [(4, 6, 3, 3), (4, 10, 3, 3)]


@pytest.mark.parametrize("name", ["test_qkformer", "test_spikformer", "test_sdt"])
def test_models_with_spikes_that_come_packed(name, asked):
    model, x = tiny.tiny(name, time_steps=4), tiny.images(2)
    check(model, x, neurons="compile", same_spikes=False, rtol=1e-6, atol=1e-7)
    many = len(asked)
    asked.clear()
    with execution_policy(neurons="eager"):
        model.train()(x).sum().backward()
    assert many < len(asked)


def test_spikes_that_were_changed_since_are_packed_anew():
    x = spikes(4, 2, 3, 4, 4)
    data = packing.pack(x.flatten(0, 1), BINARY).data
    packing.remember(x, data, BINARY)
    assert packing.SharedInput(x, BINARY).packed.data is data
    assert packing.SharedInput(x, counts(2)).packed.data is not data
    assert packing.SharedInput(x.clone(), BINARY).packed.data is not data
    x.neg_().add_(1)
    again = packing.SharedInput(x, BINARY).packed
    assert torch.equal(packing.unpack(again, x.dtype).unflatten(0, (4, 2)), x)
    number = id(x)
    assert number in map(id, packing._known)
    del x
    gc.collect()
    assert number not in map(id, packing._known)


def test_spikes_are_saved_without_what_is_known_of_them(tmp_path):
    x = spikes(4, 2, 3, 4, 4)
    packing.remember(x, packing.pack(x.flatten(0, 1), BINARY).data, BINARY)
    torch.save(x, tmp_path / "x.pt")
    assert torch.equal(torch.load(tmp_path / "x.pt", weights_only=True), x)
