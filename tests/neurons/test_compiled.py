"""How compiled kernels come about: one for all layers and sizes, when it pays, or not at all with one warning.

All options by kernel bodies in eager mode: test_dynamics.py. Each kernel that is compiled here takes some seconds.
"""

import copy
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from neuron_cases import DIAGONAL, assert_same, currents, differentiate, make, reference
from torch._dynamo.utils import counters

from timm_qkformer.execution import execution_policy
from timm_qkformer.layers import SpikingMlp
from timm_qkformer.neurons import (
    LIF,
    NeuronSpec,
    ParametricLIF,
    compiled,
    integrate_and_fire,
    integrate_and_fire_reference,
)

SPEC = NeuronSpec(0.5)
SMALLEST = compiled._MIN_ELEMENTS["cpu"]


def wanted(x, leak=0.5, **options):
    return integrate_and_fire_reference(x, torch.tensor(leak, dtype=torch.float64), **options)[0]


@pytest.fixture(autouse=True)
def _own_kernels(monkeypatch):
    monkeypatch.setattr(compiled, "_kernels", {})
    monkeypatch.setattr(compiled._budget, "work", {})
    monkeypatch.setattr(compiled, "_no_compiler", set())


@pytest.fixture
def compilations(monkeypatch):
    """Keys of the kernels compiled; "compiling" them is free and calls torch operations."""
    keys = []

    def fake_compile(key):
        keys.append(key)
        return compiled.kernel_body(key)

    monkeypatch.setattr(compiled, "_compile", fake_compile)
    return keys


def graphs() -> int:
    """Graphs that torch.compile has compiled in this process: grows with every recompilation."""
    return counters["stats"]["unique_graphs"]


def train_step(model, x):
    model(x).square().sum().backward()


USUAL = ["plif-hard-decay-detached-sigmoid", "ternary-soft-whole-attached-atan"]


@pytest.mark.parametrize(
    "case",
    [*USUAL, *(pytest.param(case, marks=pytest.mark.slow) for case in DIAGONAL if case not in [*USUAL, "relu"])],
)
def test_compiled_neurons_equal_the_reference(case):
    """Also with another potential, size and memory layout than the kernel was compiled with."""
    neuron, before = make(case, torch.float32), graphs()
    with execution_policy(neurons="compile"):
        for shape, start in (((3, 2, 70), False), ((3, 5, 4, 6), True)):
            x = currents(*shape, dtype=torch.float32)
            v = currents(*shape[1:], dtype=torch.float32, seed=5).movedim(0, -1).contiguous().movedim(-1, 0)
            found = differentiate(neuron.run, neuron, x, v if start else None)
            expected = differentiate(lambda x, v: reference(case, neuron, x, v), neuron, x, v if start else None)
            assert_same(found, expected, torch.float32)
    assert len(compiled._kernels) == graphs() - before == 2


def test_one_kernel_for_all_layers_and_sizes():
    model = timm.create_model("test_qkformer", num_classes=5)
    before = graphs()
    with execution_policy(neurons="compile"):
        train_step(model, torch.rand(2, 3, 64, 64))
        # Forward and backward; each once more for the stem, whose current is the same at every step, and once more
        # together with the batch norm.
        assert len(compiled._kernels) == graphs() - before == 6
        for size, batch in [(64, 1), (96, 3), (80, 2)]:
            train_step(model, torch.rand(batch, 3, size, size))
        model.to(memory_format=torch.channels_last)
        train_step(model, torch.rand(2, 3, 64, 64).contiguous(memory_format=torch.channels_last))
        model.eval()
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                model(torch.rand(1, 3, 64, 64))
        # other thresholds, leaks and steepnesses are operands
        x = torch.randn(4, 3, 7, requires_grad=True)
        for neuron in (LIF(tau=3.0), LIF(v_threshold=0.3, v_reset=-0.1), LIF(alpha=2.0)):
            neuron(x).sum().backward()
        # Potentials within a rounding error of the threshold: were products not rounded before they are added (fused
        # multiply-add), or terms summed in another order, some of these neurons would fire differently.
        leak, threshold = torch.tensor(1 / 3), 0.7
        v = torch.rand(20_000) * 0.6
        x = torch.stack([v / leak, v + (threshold - v) / leak, *currents(2, 20_000, dtype=torch.float32)])
        spikes = integrate_and_fire(x, NeuronSpec(1 / 3, threshold))
    assert len(compiled._kernels) == graphs() - before == 6
    with execution_policy(neurons="eager"):
        assert torch.equal(spikes, integrate_and_fire(x, NeuronSpec(1 / 3, threshold)))
    v = x[0] * leak
    rounded_once = (v.double() + (x[1] - v).double() * leak.double()).float() >= threshold
    assert (rounded_once != spikes[1].bool()).sum() > 100  # such differences would have been seen


def test_auto_compiles_when_eager_mode_has_cost_as_much(compilations, monkeypatch):
    monkeypatch.setitem(compiled.AUTO_BUDGET, "cpu", 3 * SMALLEST)
    x = torch.randn(4, SMALLEST // 4)
    with execution_policy(neurons="auto"):
        for _ in range(3):
            integrate_and_fire(x, SPEC)
        assert compilations == []
        integrate_and_fire(x, SPEC)
        assert len(compilations) == 1
        assert not compilations[0].backward
        # every kernel has a budget of its own
        integrate_and_fire(x.double(), SPEC)
        y = x.clone().requires_grad_()
        integrate_and_fire(y, SPEC).sum().backward()
        assert len(compilations) == 1
        for _ in range(3):
            integrate_and_fire(y, SPEC).sum().backward()
        assert [key.backward for key in compilations] == [False, True]


def test_auto_leaves_small_tensors_and_runs_in_eager_mode(compilations, monkeypatch):
    model = timm.create_model("test_qkformer", num_classes=5)
    with execution_policy(neurons="auto"):
        for _ in range(3):
            train_step(model, torch.rand(2, 3, 64, 64))
        monkeypatch.setitem(compiled.AUTO_BUDGET, "cpu", 0)
        integrate_and_fire(torch.randn(4, SMALLEST // 4 - 1), SPEC)
        assert compilations == []
        integrate_and_fire(torch.randn(4, SMALLEST // 4), SPEC)
    assert len(compilations) == 1


class Subclass(torch.Tensor):
    pass


def test_long_sequences_and_odd_inputs_stay_in_eager_mode(compilations):
    odd = [torch.randn(compiled.MAX_STEPS + 1, 5), torch.randn(4, 1), torch.randn(4, 0)]
    with execution_policy(neurons="compile"):
        for x in (*odd, torch.randn(4, 5).as_subclass(Subclass)):
            integrate_and_fire(x, SPEC)
    assert compilations == []


def test_captured_graphs_take_kernels_that_exist_and_compile_none(monkeypatch):
    calls = []

    def counting(key):
        run = compiled.kernel_body(key)
        return lambda *args: calls.append(key) or run(*args)

    monkeypatch.setattr(compiled, "_compile", counting)
    x = torch.randn(4, 6)
    with execution_policy(neurons="compile"):
        monkeypatch.setattr(compiled, "_is_capturing", lambda _: True)
        assert torch.equal(integrate_and_fire(x, SPEC), wanted(x))
        assert compiled._kernels == {}
        monkeypatch.setattr(compiled, "_is_capturing", lambda _: False)
        integrate_and_fire(x, SPEC)
        monkeypatch.setattr(compiled, "_is_capturing", lambda _: True)
        assert torch.equal(integrate_and_fire(x, SPEC), wanted(x))
    assert len(compiled._kernels) == 1
    assert len(calls) == 2


@pytest.mark.parametrize("backend", ["auto", "compile"])
def test_without_a_compiler_it_warns_once(backend, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no C++ compiler here")

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setitem(compiled.AUTO_BUDGET, "cpu", 0)
    x = torch.randn(4, SMALLEST, requires_grad=True)
    with execution_policy(neurons=backend), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            spikes = integrate_and_fire(x, SPEC)
            spikes.sum().backward()
            integrate_and_fire(x.double(), SPEC)
    assert [w.category for w in caught] == [RuntimeWarning]
    assert "torch.compile does not work there" in str(caught[0].message)
    assert "no C++ compiler here" in str(caught[0].message)
    assert torch.equal(spikes, wanted(x))


def test_torch_compile_itself_finds_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    options = {"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}
    monkeypatch.setattr(compiled, "inductor_options", lambda _: options)
    x = torch.randn(3, 7)
    with execution_policy(neurons="compile"):
        with pytest.warns(RuntimeWarning, match="spiking neurons run in eager mode"):
            spikes = integrate_and_fire(x, SPEC)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            integrate_and_fire(x, SPEC)
    assert torch.equal(spikes, wanted(x))


def test_threads_share_kernels(compilations):
    start = threading.Barrier(4)
    inputs = [torch.randn(4, 11 * (i + 1), requires_grad=True) for i in range(4)]

    def work(x):
        start.wait()
        with execution_policy(neurons="compile"):
            for _ in range(20):
                spikes = integrate_and_fire(x, SPEC)
                grad = torch.autograd.grad(spikes.sum(), x)[0]
        return spikes, grad

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(work, inputs))
    assert len(compilations) == 2
    for x, (spikes, grad) in zip(inputs, results, strict=True):
        assert torch.equal(spikes, wanted(x))
        torch.testing.assert_close(grad, torch.autograd.grad(wanted(x).sum(), x)[0])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_may_see_both_paths(use_reentrant, compilations, monkeypatch):
    """Eager mode in the forward pass, the kernel when it is computed again."""
    x = torch.randn(4, SMALLEST, requires_grad=True)
    with execution_policy(neurons="auto"):
        neuron = LIF()
        spikes = torch.utils.checkpoint.checkpoint(lambda x: neuron(x * 1.0), x, use_reentrant=use_reentrant)
        assert compilations == []
        monkeypatch.setitem(compiled.AUTO_BUDGET, "cpu", 0)
        spikes.sum().backward()
    assert len(compilations) == 2
    torch.testing.assert_close(x.grad, torch.autograd.grad(wanted(x).sum(), x)[0])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_in_somebody_elses_compiled_graph(compiler, training, compilations):
    if compiler == "inductor":
        model, x = timm.create_model("test_qkformer", num_classes=5).double(), torch.rand(2, 3, 64, 64).double()
    else:
        model, x = SpikingMlp(4, 6, neuron_layer=ParametricLIF).double(), torch.randn(4, 2, 4, 3, 5).double()
    twin = copy.deepcopy(model.train(training))
    whole = torch.compile(model, fullgraph=True, backend=compiler)
    with torch.set_grad_enabled(training), execution_policy(neurons="compile"):
        outputs = whole(x)
        if training:
            outputs.square().sum().backward()
    assert not compilations  # no kernel within the kernel
    with torch.set_grad_enabled(training):
        expected = twin(x)
        torch.testing.assert_close(outputs, expected)
    if training:
        expected.square().sum().backward()
        for own, other in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(own.grad, other.grad, rtol=1e-6, atol=1e-8)


def test_vectors_of_another_width_are_other_kernels_on_disk(monkeypatch):
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("needs AVX-512")
    widths = []
    for capability in ("avx2", "avx512"):
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", capability)
        widths.append(compiled.inductor_options("cpu")["cpp.simdlen"])
    assert widths == [256, 512]
