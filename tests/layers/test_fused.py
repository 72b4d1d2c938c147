"""How fused kernels come about: one for all layers and sizes, when it pays, or not at all with one warning."""

import copy
import io
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from torch._dynamo.utils import counters

from timm_qkformer.layers import (
    LIF,
    SpikingMlp,
    fused,
    integrate_and_fire,
    integrate_and_fire_reference,
    set_lif_backend,
)


@pytest.fixture(autouse=True)
def _own_kernels(monkeypatch):
    monkeypatch.setattr(fused, "_entries", {})
    monkeypatch.setattr(fused, "_no_compiler", set())


@pytest.fixture
def compilations(monkeypatch):
    """Keys of the kernels compiled; "compiling" them is free and calls torch ops."""
    keys = []

    def fake_compile(key):
        keys.append(key)
        return fused.kernel_body(key)

    monkeypatch.setattr(fused, "_compile", fake_compile)
    return keys


def graphs() -> int:
    """Graphs that torch.compile has compiled in this process: grows with every recompilation."""
    return counters["stats"]["unique_graphs"]


def train_step(model, x):
    model(x).square().sum().backward()


def test_one_kernel_for_all_layers_and_sizes():
    model = timm.create_model("test_qkformer", num_classes=5)
    before = graphs()
    with set_lif_backend("compile"):
        train_step(model, torch.rand(2, 3, 64, 64))
        # Forward and backward; each once more for the stem, whose current is the same at every step, and once more
        # together with the batch norm.
        assert len(fused._entries) == graphs() - before == 6
        for size, batch in [(64, 1), (96, 3), (80, 2)]:
            train_step(model, torch.rand(batch, 3, size, size))
        # channels last
        model.to(memory_format=torch.channels_last)
        train_step(model, torch.rand(2, 3, 64, 64).contiguous(memory_format=torch.channels_last))
        # inference, with and without inference mode
        model.eval()
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                model(torch.rand(1, 3, 64, 64))
        # other thresholds, leaks and steepnesses are operands
        x = torch.randn(4, 3, 7, requires_grad=True)
        for neuron in (LIF(tau=3.0), LIF(v_threshold=0.3, v_reset=-0.1), LIF(alpha=2.0)):
            neuron(x).sum().backward()
    assert len(fused._entries) == graphs() - before == 6


def test_autocast_needs_kernels_for_its_dtype_only(compilations):
    model = timm.create_model("test_qkformer", num_classes=5)
    x = torch.rand(2, 3, 64, 64)
    with set_lif_backend("compile"), torch.autocast("cpu", dtype=torch.bfloat16):
        train_step(model, x)
    assert {key.dtype for key in compilations} <= {torch.bfloat16, torch.float32}
    assert len(compilations) <= 8
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_auto_compiles_when_eager_mode_has_cost_as_much(compilations, monkeypatch):
    size = fused._MIN_ELEMENTS["cpu"]
    monkeypatch.setitem(fused.AUTO_BUDGET, "cpu", 3 * size)
    x = torch.randn(4, size // 4)
    with set_lif_backend("auto"):
        for _ in range(3):
            integrate_and_fire(x, 0.5)
        assert compilations == []
        integrate_and_fire(x, 0.5)
        assert len(compilations) == 1
        assert not compilations[0].backward
        # every kernel has a budget of its own
        integrate_and_fire(x.double(), 0.5)
        y = x.clone().requires_grad_()
        integrate_and_fire(y, 0.5).sum().backward()
        assert len(compilations) == 1
        for _ in range(3):
            integrate_and_fire(y, 0.5).sum().backward()
        assert [key.backward for key in compilations] == [False, True]


def test_auto_never_compiles_for_small_tensors(compilations, monkeypatch):
    monkeypatch.setitem(fused.AUTO_BUDGET, "cpu", 0)
    with set_lif_backend("auto"):
        integrate_and_fire(torch.randn(4, fused._MIN_ELEMENTS["cpu"] // 4 - 1), 0.5)
        assert compilations == []
        integrate_and_fire(torch.randn(4, fused._MIN_ELEMENTS["cpu"] // 4), 0.5)
    assert len(compilations) == 1


def test_auto_leaves_small_runs_in_eager_mode(compilations):
    model = timm.create_model("test_qkformer", num_classes=5)
    with set_lif_backend("auto"):
        for _ in range(3):
            train_step(model, torch.rand(2, 3, 64, 64))
    assert compilations == []


def test_long_sequences_and_odd_inputs_stay_in_eager_mode(compilations):
    with set_lif_backend("compile"):
        for x in (
            torch.randn(fused.MAX_STEPS + 1, 5),
            torch.randn(4, 1),
            torch.randn(4, 0),
            torch.randn(4, 5, dtype=torch.float64).to(torch.float8_e4m3fn).to(torch.float32).as_subclass(Subclass),
        ):
            integrate_and_fire(x, 0.5)
    assert compilations == []


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize("backend", ["auto", "compile"])
def test_without_a_compiler_it_warns_once(backend, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no C++ compiler here")

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setitem(fused.AUTO_BUDGET, "cpu", 0)
    x = torch.randn(4, fused._MIN_ELEMENTS["cpu"], requires_grad=True)
    with set_lif_backend(backend), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            spikes = integrate_and_fire(x, 0.5)
            spikes.sum().backward()
            integrate_and_fire(x.double(), 0.5)
    assert [w.category for w in caught] == [RuntimeWarning]
    assert "torch.compile does not work there" in str(caught[0].message)
    assert "no C++ compiler here" in str(caught[0].message)
    assert torch.equal(spikes, integrate_and_fire_reference(x, torch.tensor(0.5)))


def test_a_missing_compiler_in_earnest(monkeypatch, tmp_path):
    # torch.compile itself finds out: Inductor is told to use a compiler that is not there.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    options = {"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}
    monkeypatch.setattr(fused, "inductor_options", lambda _: options)
    x = torch.randn(3, 7)
    with set_lif_backend("compile"):
        with pytest.warns(RuntimeWarning, match="spiking neurons run unfused"):
            spikes = integrate_and_fire(x, 0.5)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            integrate_and_fire(x, 0.5)
    assert torch.equal(spikes, integrate_and_fire_reference(x, torch.tensor(0.5)))


def test_threads_share_kernels(compilations, monkeypatch):
    monkeypatch.setattr(fused, "_entries", {})
    start = threading.Barrier(4)
    inputs = [torch.randn(4, 11 * (i + 1), requires_grad=True) for i in range(4)]

    def work(x):
        start.wait()
        with set_lif_backend("compile"):
            for _ in range(20):
                spikes = integrate_and_fire(x, 0.5)
                grad = torch.autograd.grad(spikes.sum(), x)[0]
        return spikes, grad

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(work, inputs))
    assert len(compilations) == 2
    for x, (spikes, grad) in zip(inputs, results, strict=True):
        wanted = integrate_and_fire_reference(x, torch.tensor(0.5))
        assert torch.equal(spikes, wanted)
        torch.testing.assert_close(grad, torch.autograd.grad(wanted.sum(), x)[0])


def test_threads_compile_at_the_same_time():
    start = threading.Barrier(2)
    x = torch.randn(4, 100)

    def work(options):
        start.wait()
        with set_lif_backend("compile"):
            return [integrate_and_fire(x * i, 0.5, **options) for i in (1, 2)]

    cases = [{}, {"soft_reset": True}]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(work, cases))
    for options, spikes in zip(cases, results, strict=True):
        for i in (1, 2):
            assert torch.equal(spikes[i - 1], integrate_and_fire_reference(x * i, torch.tensor(0.5), **options))


def test_models_copy_and_save_as_ever():
    model = timm.create_model("test_qkformer", num_classes=5).eval()
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad(), set_lif_backend("compile"):
        expected = model(x)
        assert torch.equal(copy.deepcopy(model)(x), expected)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False)(x), expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_may_see_both_paths(use_reentrant, compilations, monkeypatch):
    # Eager mode in the forward pass, the kernel when it is computed again.
    x = torch.randn(4, fused._MIN_ELEMENTS["cpu"], requires_grad=True)
    with set_lif_backend("auto"):
        neuron = LIF()
        spikes = torch.utils.checkpoint.checkpoint(lambda x: neuron(x * 1.0), x, use_reentrant=use_reentrant)
        assert compilations == []
        monkeypatch.setitem(fused.AUTO_BUDGET, "cpu", 0)
        spikes.sum().backward()
    assert len(compilations) == 2
    wanted = torch.autograd.grad(integrate_and_fire_reference(x, torch.tensor(0.5)).sum(), x)[0]
    torch.testing.assert_close(x.grad, wanted)


def test_distributed_data_parallel(tmp_path, compilations):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    try:
        model = timm.create_model("test_qkformer", num_classes=5)
        parallel = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(model))
        x = torch.rand(2, 3, 64, 64)
        with set_lif_backend("compile"):
            train_step(parallel, x)
            train_step(model, x)
    finally:
        torch.distributed.destroy_process_group()
    assert compilations
    for own, other in zip(model.parameters(), parallel.module.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad)


@pytest.mark.parametrize("training", [False, True])
def test_export(training):
    # In float64: in float32 a neuron near its threshold may flip with how a convolution sums.
    model = timm.create_model("test_qkformer", num_classes=5).double().train(training)
    x = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    program = torch.export.export(model, (x,))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x))


def check_compiled(model, compiler, training, x):
    model.train(training)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    if not training:
        with torch.no_grad(), set_lif_backend("compile"):
            outputs = compiled(x)
        assert fused._entries == {}  # no kernel within the kernel
        torch.testing.assert_close(outputs, twin(x))
        return
    with set_lif_backend("compile"):
        train_step(compiled, x)
    assert fused._entries == {}
    train_step(twin, x)
    for own, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("training", [False, True])
def test_neurons_in_a_compiled_module(training):
    module = SpikingMlp(4, 6).double()
    check_compiled(module, "aot_eager", training, torch.randn(4, 2, 4, 3, 5, dtype=torch.float64))


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_compiling_a_whole_model(training):
    model = timm.create_model("test_qkformer", num_classes=5).double()
    check_compiled(model, "inductor", training, torch.rand(2, 3, 64, 64, dtype=torch.float64))


def test_vectors_of_another_width_are_other_kernels_on_disk(monkeypatch):
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("needs AVX-512")
    widths = []
    for capability in ("avx2", "avx512"):
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", capability)
        widths.append(fused.inductor_options("cpu")["cpp.simdlen"])
    assert widths == [256, 512]
