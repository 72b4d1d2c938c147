"""The lean training step against the plain modules: the same values and gradients, less kept."""

import copy
import threading
from functools import partial

import pytest
import timm
import torch
from torch import nn

import tiny
from timm_qkformer.layers import (
    IF,
    LIF,
    ParametricLIF,
    QKChannelAttention,
    QKTokenAttention,
    SpikingConv,
    SpikingMlp,
    SpikingPatchEmbed,
    SpikingSelfAttention,
    fused,
    is_lean_training,
    lean,
    lean_training,
    set_lif_backend,
)
from timm_qkformer.layers.conv import ConvNorm
from timm_qkformer.layers.counts import counts_bound, note_counts

TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}

lively = partial(tiny.lively, bias=(0.5, 2.0))


def spikes(*shape, bound=1, noted=True, dtype=torch.float64):
    x = torch.randint(0, bound + 1, shape).to(dtype)
    return note_counts(x, bound) if noted else x


def train(layer, x, enabled, backend="eager", seed=0):
    """Output, gradients and buffers of one training step on a copy of the layer."""
    layer = copy.deepcopy(layer).train()
    bound = counts_bound(x)
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    inner = x * 1.0
    if bound is not None:
        note_counts(inner, bound)
    torch.manual_seed(seed)
    with lean_training(enabled), set_lif_backend(backend):
        out = layer(inner)
        weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
        (out * weight).sum().backward()
    grads = {"input": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}
    return out.detach(), grads, dict(layer.named_buffers())


def check(layer, x, backend="eager", same_spikes=True, **tolerance):
    tolerance = tolerance or TOLERANCE
    plain = train(layer, x, False, backend)
    ours = train(layer, x, True, backend)
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


UNITS = {
    "1x1": partial(SpikingConv, 6, 10),
    "1x1, bias": partial(SpikingConv, 6, 10, bias=True),
    "1x1, stride": partial(SpikingConv, 6, 10, 1, 2),
    "3x3": partial(SpikingConv, 6, 10, 3),
    "3x3, stride": partial(SpikingConv, 6, 10, 3, 2),
    "3x3, pool": partial(SpikingConv, 6, 10, 3, pool=True),
    "depth-wise": partial(SpikingConv, 6, 6, 5, groups=6, bias=True),
    "integrate and fire": partial(SpikingConv, 6, 10, neuron_layer=IF),
    "parametric": partial(SpikingConv, 6, 10, neuron_layer=ParametricLIF),
    "soft reset": partial(SpikingConv, 6, 10, neuron_layer=partial(LIF, v_reset=None, surrogate="atan")),
    "reset differentiated": partial(SpikingConv, 6, 10, neuron_layer=partial(ParametricLIF, detach_reset=False)),
    "coupled": partial(SpikingConv, 6, 10, batch_coupled=True),
    "no neurons": partial(ConvNorm, 6, 10, 3, pool=True),
}
SHAPES = [(4, 2, 6, 8, 8), (3, 1, 6, 5, 7), (1, 2, 6, 7, 4), (2, 3, 6, 1, 3), (17, 1, 6, 3, 3)]


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_units(unit, shape):
    layer = lively(UNITS[unit]())
    out = check(layer, spikes(*shape), same_spikes=unit != "no neurons")[0]
    if shape == SHAPES[0] and unit != "no neurons":
        assert 0.05 < out.mean() < 0.95
    check(layer, spikes(*shape, bound=4), same_spikes=unit != "no neurons")
    check(layer, torch.randn(shape, dtype=torch.float64), same_spikes=unit != "no neurons")


@pytest.mark.parametrize("layout", ["channels last", "batch before time", "slice", "steps apart"])
def test_memory_layouts(layout):
    x = {
        "channels last": spikes(8, 6, 5, 4).contiguous(memory_format=torch.channels_last).unflatten(0, (4, 2)),
        "batch before time": spikes(2, 4, 6, 5, 4).transpose(0, 1),
        "slice": spikes(4, 2, 6, 5, 9)[..., 2:6],
        "steps apart": spikes(8, 2, 6, 5, 4)[::2],
    }[layout]
    for unit in ("3x3", "3x3, pool"):
        check(lively(UNITS[unit]()), note_counts(x, 1))


@pytest.mark.parametrize("in_chs", [3, 4, 6])
def test_narrow_strided_convolutions(in_chs):
    """Whose gradients by oneDNN, channels last and in single precision, write where they should not."""
    layer = lively(SpikingConv(in_chs, 16, 1, 2)).float()
    for _ in range(4):
        check(layer, spikes(2, 4, in_chs, 32, 32, dtype=torch.float32), rtol=1e-3, atol=1e-3)


def compiled_keys():
    return {key for key, entry in fused._entries.items() if key.affine and entry.run is not None}


@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_one_pair_of_compiled_kernels_for_all_shapes(dtype):
    before = compiled_keys()
    tolerance = TOLERANCE if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-3}
    for in_chs, out_chs, shape in [(6, 10, (2, 8, 8)), (6, 10, (1, 5, 7)), (5, 24, (3, 2, 3))]:
        layer = lively(SpikingConv(in_chs, out_chs, 3)).to(dtype)
        B, H, W = shape
        x = spikes(3, B, in_chs, H, W, dtype=dtype)
        spikes_fired = check(layer, x, "compile", same_spikes=dtype == torch.float64, **tolerance)[0]
        assert torch.equal(spikes_fired, train(layer, x, True, "eager")[0])  # bit for bit
    new = compiled_keys() - before
    assert len(new) == 2
    assert {key.backward for key in new} == {False, True}


@pytest.mark.parametrize("attention", [QKTokenAttention, QKChannelAttention, SpikingSelfAttention])
@pytest.mark.parametrize("shape", [(4, 2, 16, 5, 4), (1, 1, 16, 1, 3)])
def test_attention(attention, shape):
    layer = lively(attention(16, 4, neuron_layer=ParametricLIF))
    check(layer, spikes(*shape, bound=2))
    check(lively(attention(16, 2, membrane_shortcut=True)), spikes(*shape), same_spikes=False)


@pytest.mark.parametrize("pools", [(True, False), (False, True), (True, True), (False,)])
def test_patch_embedding(pools):
    check(lively(SpikingPatchEmbed(6, 10, pools)), spikes(3, 2, 6, 9, 7))


def test_dropout_draws_alike():
    check(lively(SpikingMlp(6, 12, drop=0.3)), spikes(3, 2, 6, 5, 5))


@pytest.mark.parametrize("name", ["test_qkformer", "test_qkformer_ms", "test_maxformer"])
def test_models(name):
    model = tiny.tiny(name, drop_path_rate=0.2, neuron="plif")
    check(model, tiny.images(3, size=(37, 50)), same_spikes=False)


def test_event_clips():
    model = tiny.tiny("qkformer_hst2_256", embed_dims=(16, 32, 64), num_heads=4)
    clip = torch.rand(2, 5, 2, 32, 32, dtype=torch.float64)
    check(model, clip, same_spikes=False)


def batch_norms(layer):
    return [m for m in layer.modules() if isinstance(m, nn.BatchNorm2d)]


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
    layer.bn.train = lambda mode=True: layer.bn  # stays in eval mode, as fine-tuning has it
    x = spikes(3, 2, 6, 5, 5).requires_grad_()
    grads = []
    for enabled in (False, True):
        layer.train()
        layer.zero_grad()
        x.grad = None
        with lean_training(enabled):
            layer(note_counts(x * 1.0, 1)).square().sum().backward()
        grads.append([x.grad.clone(), *(p.grad.clone() for p in layer.parameters())])
    for plain, own in zip(*grads, strict=True):
        torch.testing.assert_close(own, plain, **TOLERANCE)


def test_frozen_weights_keep_no_input(saved):
    layer = lively(UNITS["3x3"]()).train()
    layer.conv.weight.requires_grad_(False)
    x = spikes(4, 2, 6, 8, 8).requires_grad_()
    layer(note_counts(x * 1.0, 1)).sum().backward()
    assert not any(t.dtype == torch.uint8 for t in saved)
    grad = x.grad
    x.grad = None
    with lean_training(False):
        layer(x * 1.0).sum().backward()
    torch.testing.assert_close(grad, x.grad, **TOLERANCE)


@pytest.mark.parametrize("unit", ["3x3", "3x3, pool"])
def test_too_little_to_normalise_is_refused_as_ever(unit):
    layer = lively(UNITS[unit]()).train()
    messages = []
    for enabled in (False, True):
        with lean_training(enabled), pytest.raises(ValueError, match="more than 1 value per channel") as caught:
            layer(spikes(1, 1, 6, 1, 1))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_empty_batches():
    layer = lively(UNITS["1x1"]()).eval()
    assert layer(spikes(4, 0, 6, 5, 5)).shape == (4, 0, 10, 5, 5)
    layer.train()
    outcomes = []
    for enabled in (False, True):
        with lean_training(enabled):
            outcomes.append(layer(spikes(4, 0, 6, 5, 5)).shape)
    assert outcomes[0] == outcomes[1] == (4, 0, 10, 5, 5)


def test_what_is_kept(saved):
    T, B, C, H, W = 4, 2, 16, 8, 8
    elements = T * B * C * H * W
    layer = SpikingConv(C, C).train()
    layer(spikes(T, B, C, H, W, dtype=torch.float32))
    large = [t for t in saved if t.numel() > C]
    assert sorted((t.dtype, t.numel()) for t in large if t.dtype == torch.uint8) == [(torch.uint8, elements // 8)]
    assert [t.numel() for t in large if t.dtype == torch.float32] == [elements]  # the convolution's output


@pytest.mark.parametrize("half", [False, True])
def test_bytes_of_hst4_384(half, saved):
    """The largest claim of docs/lean.md, at a quarter of the width."""
    model = timm.create_model("qkformer_hst4_384", embed_dims=(24, 48, 96)).train()
    x = torch.rand(2, 3, 32, 32)
    sizes = []
    for enabled in (False, True):
        saved.clear()
        with lean_training(enabled), torch.autocast("cpu", torch.bfloat16, enabled=half):
            model(x)
        sizes.append(kept_bytes(saved))
    assert sizes[1] < 0.4 * sizes[0]
    per_image_at_full_width = 4 * sizes[1] / len(x) / 1e6
    assert per_image_at_full_width < (26 if half else 50)


def test_activations_that_are_no_counts_are_kept_as_they_are():
    """After stochastic depth sums are scaled; nothing may be rounded."""
    layer = lively(UNITS["3x3"]())
    x = spikes(3, 2, 6, 5, 5, noted=False) / 0.9
    check(layer, x)
    block = tiny.tiny("test_qkformer", drop_path_rate=0.5).stages[2].train()
    seen = []
    block.blocks[1].mlp.fc1.register_forward_pre_hook(lambda _m, args: seen.append(counts_bound(args[0])))
    block(spikes(4, 8, 32, 8, 8))
    assert seen == [None]


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
@pytest.mark.parametrize("name", ["test_qkformer", "test_qkformer_ms"])
def test_models_train_under_autocast(name, inside):
    model = timm.create_model(name, num_classes=5).train()
    x = torch.rand(2, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x).float().square().sum()
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_half_precision_parameters():
    model = timm.create_model("test_qkformer", num_classes=5).bfloat16().train()
    model(torch.rand(2, 3, 64, 64).bfloat16()).sum().backward()
    assert all(p.grad.dtype == torch.bfloat16 for p in model.parameters())


def test_gradients_accumulate():
    model = tiny.tiny("test_qkformer").train()
    first, second = tiny.images(2), tiny.images(3)
    model(first).sum().backward()
    once = [p.grad.clone() for p in model.parameters()]
    model(second).sum().backward()
    both = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(second).sum().backward()
    for p, a, ab in zip(model.parameters(), once, both, strict=True):
        torch.testing.assert_close(a + p.grad, ab, **TOLERANCE)


def test_two_forward_passes_before_one_backward_pass():
    model = tiny.tiny("test_qkformer").train()
    first, second = tiny.images(2), tiny.images(3)
    (model(first).sum() + model(second).sum()).backward()
    both = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(first).sum().backward()
    model(second).sum().backward()
    for p, wanted in zip(model.parameters(), both, strict=True):
        torch.testing.assert_close(p.grad, wanted, **TOLERANCE)


def test_second_derivatives_are_refused_with_a_way_out():
    layer = lively(UNITS["1x1"]()).train()
    x = torch.randn(3, 2, 6, 5, 5, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"create_graph=True.*lean_training\(False\)"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    with lean_training(False):
        grad = torch.autograd.grad(layer(x).sum(), x, create_graph=True)[0]
        grad.square().sum().backward()
    layer.eval()
    torch.autograd.grad(layer(x).sum(), x, create_graph=True)[0].square().sum().backward()


@pytest.fixture
def lean_calls(monkeypatch):
    """Names of the lean functions that run from here on."""
    calls = []
    names = ("conv_keeps_counts", "norm_and_fire", "pool_keeps_places", "gate_keeps_counts", "mix_keeps_counts")
    for name in names:
        function = getattr(lean, name)

        def spy(*args, function=function, name=name):
            calls.append(name)
            return function(*args)

        monkeypatch.setattr(lean, name, spy)
    return calls


def test_who_takes_the_lean_path(lean_calls):
    model, x = timm.create_model("test_qkformer", num_classes=5).train(), torch.rand(2, 3, 32, 32)
    model(x)
    assert len(set(lean_calls)) == 5
    assert lean_calls.count("conv_keeps_counts") == sum(isinstance(m, nn.Conv2d) for m in model.modules())
    lean_calls.clear()

    with lean_training(False):
        model(x)
    with torch.no_grad():
        model(x)
    with set_lif_backend("spikingjelly"):
        model(x)
    torch.compile(model, fullgraph=True, backend="eager")(x)
    torch.jit.script(model)(x)
    torch.jit.trace(model, x, check_trace=False)
    params = {k: v.detach() for k, v in model.named_parameters()}
    model.eval()
    model(x)
    torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).sum())(params)
    assert lean_calls == []


def test_hooks_see_their_modules(lean_calls):
    x = spikes(3, 2, 6, 5, 5, dtype=torch.float32)
    for name in ("conv", "bn", "neuron", "pool"):
        layer = lively(UNITS["3x3, pool"]() if name == "pool" else UNITS["3x3"]()).float().train()
        seen = []
        handle = layer.get_submodule(name).register_forward_hook(lambda *_args, seen=seen: seen.append(1))
        layer(x)
        assert seen == [1], name
        handle.remove()
    lean_calls.clear()
    with torch.nn.modules.module.register_module_forward_hook(lambda *_: None):
        layer(x)
    assert lean_calls == []


def test_replaced_modules_run():
    layer = lively(UNITS["3x3"]()).float().train()
    x = spikes(3, 2, 6, 5, 5, dtype=torch.float32)
    layer.bn = nn.Sequential(layer.bn, nn.Hardtanh(-1e9, -1e8))
    assert layer(x).sum() == 0
    layer = lively(UNITS["3x3"]()).float().train()
    layer.conv = nn.Sequential(layer.conv, nn.Threshold(1e9, 0.0))
    out = layer(x)
    assert torch.equal(out.amax((1, 3, 4)), out.amin((1, 3, 4)))
    layer = nn.utils.parametrizations.weight_norm(lively(UNITS["3x3"]()).float().train().conv)
    assert not lean.runs_plainly(layer, nn.Conv2d)
    patched = nn.Conv2d(1, 1, 1)
    patched.forward = lambda x: x
    assert not lean.runs_plainly(patched, nn.Conv2d)


def test_the_setting(monkeypatch):
    monkeypatch.delenv(lean.ENVIRONMENT_VARIABLE, raising=False)
    assert is_lean_training()
    with lean_training(False):
        assert not is_lean_training()
        elsewhere = []
        thread = threading.Thread(target=lambda: elsewhere.append(is_lean_training()))
        thread.start()
        thread.join()
        assert elsewhere == [True]
        with lean_training():
            assert is_lean_training()
    monkeypatch.setenv(lean.ENVIRONMENT_VARIABLE, "0")
    assert not is_lean_training()
    monkeypatch.setenv(lean.ENVIRONMENT_VARIABLE, "maybe")
    with pytest.raises(ValueError, match="TIMM_QKFORMER_LEAN_TRAINING='maybe' must be 0 or 1"):
        is_lean_training()


def test_copies_of_a_trained_model():
    model = tiny.tiny("test_qkformer").train()
    x = tiny.images(2)
    model(x).sum().backward()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))


def _half_of_the_batch(rank, folder, x, model):
    """Two processes, each with half of the batch, in eval-mode batch norms so that halves add up to the whole."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        parallel = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        parallel.train()
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.eval()
        parallel(x[rank::2]).square().mean().backward()
        if rank == 0:
            torch.save([p.grad for p in model.parameters()], folder / "gradients.pt")
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes(tmp_path):
    model = tiny.tiny("test_qkformer", depths=(1, 0, 1), time_steps=2)
    x = tiny.images(4)
    torch.multiprocessing.spawn(_half_of_the_batch, args=(tmp_path, x, model), nprocs=2)
    with lean_training(False):
        model.eval()(x).square().mean().backward()
    grads = torch.load(tmp_path / "gradients.pt", weights_only=True)
    for p, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(grad, p.grad, rtol=1e-9, atol=1e-12)
