"""The compiled neurons' CUDA code, checked without a GPU: docs/execution.md says what this proves and what it does not.

Inductor's Triton source for a fake device: one kernel, every input loaded once, every output stored once. Triton's
compiler takes it for sm_80 and sm_90. Triton's interpreter, which runs it on the CPU, gives the reference's answer.
"""

import functools

import pytest
import torch

from timm_qkformer.execution.packing import BINARY, TERNARY, _pack_in_torch, parts_of_a_step
from timm_qkformer.neurons import integrate_and_fire_reference, kernel
from timm_qkformer.neurons.kernel import Key

triton = pytest.importorskip("triton", reason="needs Triton's compiler and interpreter")
triton_codegen = pytest.importorskip("triton_codegen")

CPU = torch.device("cpu")

NEURONS = {
    "lif": {"decay_input": True, "leak": 0.5},
    "ternary": {"decay_input": True, "leak": 0.5, "levels": "ternary"},
    "if": {"decay_input": False, "leak": 0.0},
    "plif": {"decay_input": True, "leak": 0.3, "leak_gradient": True},
}


def forward_key(neuron, steps, row, dtype):
    return Key(
        backward=False,
        steps=steps,
        constant=False,
        row=row,
        dtype=dtype,
        device=CPU,
        leak_device=CPU,
        soft_reset=False,
        decay_input=NEURONS[neuron]["decay_input"],
        levels=NEURONS[neuron].get("levels", "binary"),
    )


@functools.cache
def generated(neuron, backward, capability=90, dtype=torch.float32, constant=False, row=16, steps=4, soft_reset=False):
    leak_gradient = bool(NEURONS[neuron].get("leak_gradient")) and backward
    key = forward_key(neuron, steps, row, dtype)
    key = key._replace(backward=backward, constant=constant, soft_reset=soft_reset)
    if backward:
        key = key._replace(surrogate="sigmoid", leak_gradient=leak_gradient)
    operands = kernel.example_operands(key)
    # A learned leak is on the device, other scalars stay on the host and become arguments of the launch.
    leak = 2 if backward else 1
    on_device = [operand.dim() > 0 or (i == leak and neuron == "plif") for i, operand in enumerate(operands)]
    code = triton_codegen.generate(
        kernel.kernel_body(key), operands, capability, kernel.inductor_options("cuda"), on_device
    )
    return code, key


CASES = [
    pytest.param("lif", False, {}, id="lif forward"),
    pytest.param("lif", True, {}, id="lif backward"),
    pytest.param("plif", True, {}, id="plif backward"),
    *(
        pytest.param(neuron, backward, options, id=f"{neuron} {name} {direction}", marks=pytest.mark.slow)
        for neuron, name, options in [
            ("lif", "sm_80", {"capability": 80}),
            ("lif", "bfloat16", {"dtype": torch.bfloat16}),
            ("lif", "of a constant current", {"constant": True}),
            ("lif", "of odd size", {"row": 1}),
            ("lif", "soft reset", {"soft_reset": True}),
            ("lif", "16 steps", {"steps": 16}),
            ("ternary", "", {}),
            ("ternary", "soft reset", {"soft_reset": True}),
            ("if", "", {}),
            ("plif", "of odd size", {"row": 1}),
        ]
        for backward, direction in [(False, "forward"), (True, "backward")]
    ),
    pytest.param("plif", False, {}, id="plif forward", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("neuron", "backward", "options"), CASES)
def test_one_kernel_reads_once_and_writes_once(neuron, backward, options):
    code, key = generated(neuron, backward, **options)
    assert len(code.kernels) == len(code.launches) == 1
    assert code.other_calls == []
    found = code.kernels[0]
    tensors = (1 if key.constant else key.steps) + (key.steps if backward else 0)
    assert len(found.loads) == len(set(found.loads)) == tensors
    assert found.source.count("tl.load(") == tensors + (neuron == "plif")  # the learned leak, one number
    # Gradients of the leak come out summed over rows of 16.
    assert len(found.stores) == len(set(found.stores)) == key.steps + key.leak_gradient
    # Nothing is allocated but the results.
    assert code.source.count("= empty_strided_cuda(") == 1 + key.leak_gradient


@pytest.mark.parametrize(("neuron", "backward", "options"), CASES)
def test_triton_compiles_it(neuron, backward, options, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    code, key = generated(neuron, backward, **options)
    for capability in (80, 90):
        ptx = code.kernels[0].ptx(capability, tmp_path, block=64 if key.leak_gradient and key.row > 1 else 1024)
        assert f".target sm_{capability}" in ptx
        if not backward:
            assert "fma." not in ptx  # products are rounded before they are added, as in eager mode
        if key.row == 16 and key.dtype == torch.float32 and not key.leak_gradient:
            # Vectors of four, loaded and stored.
            assert ptx.count(".v4.b32") >= key.steps


@pytest.mark.parametrize(("neuron", "backward", "options"), CASES)
def test_the_interpreter_gives_the_references_answer(neuron, backward, options):
    code, key = generated(neuron, backward, **options)
    if key.dtype == torch.bfloat16 and not backward:
        pytest.skip("Triton's interpreter cannot cast bool to bfloat16, its compiler can")
    rows = 37  # another size than it was generated with, and no multiple of a block
    size = rows * key.row
    x = (torch.randn(1 if key.constant else key.steps, size, dtype=torch.float64) * 2 + 0.5).to(key.dtype)
    grad = torch.randn(key.steps, size).to(key.dtype)
    leak, threshold, alpha = torch.tensor(NEURONS[neuron]["leak"]), torch.tensor(0.75), torch.tensor(3.0)

    wanted_x = x.expand(key.steps, size).detach().clone().requires_grad_()
    wanted_leak = leak.clone().requires_grad_()
    options = (key.soft_reset, key.decay_input, key.levels)
    spikes, _ = integrate_and_fire_reference(wanted_x, wanted_leak, 0.75, *options, alpha=3.0)

    shape = (rows, key.row) if key.row > 1 else (rows,)
    flat_x = x[0].view(shape) if key.constant else x.view(-1, *shape)
    operands = [flat_x, leak, threshold]
    if backward:
        operands = [grad.view(-1, *shape), *operands, alpha]
    results = code.interpret(operands, rows)
    if not backward:
        assert torch.equal(results[0].flatten(1), spikes)
        return
    spikes.backward(grad)
    tolerance = {"rtol": 2e-2, "atol": 1e-3} if key.dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(results[0].flatten(1), wanted_x.grad, **tolerance)
    if key.leak_gradient:
        assert results[1].shape == ((rows,) if key.row > 1 else (size,))
        torch.testing.assert_close(results[1].sum(), wanted_leak.grad, rtol=1e-4, atol=1e-4)


@functools.cache
def packing(steps, neuron="lif", dtype=torch.bfloat16):
    numbers = TERNARY if neuron == "ternary" else BINARY
    key = forward_key(neuron, steps, 1, dtype)._replace(affine=True, packs=numbers)
    operands = kernel.example_operands(key)
    options = kernel.inductor_options("cuda") | kernel.unsplit(steps)
    on_device = [operand.dim() > 0 for operand in operands]
    return triton_codegen.generate(kernel.kernel_body(key), operands, 90, options, on_device), key


PACKING = [
    pytest.param(4, "lif"),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in [(1, "lif"), (2, "lif"), (8, "lif"), (10, "lif")]),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in [(16, "lif"), (4, "ternary")]),
]


@pytest.mark.parametrize(("steps", "neuron"), PACKING)
def test_the_kernel_that_fires_packs(steps, neuron, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    code, key = packing(steps, neuron)
    assert len(code.kernels) == len(code.launches) == 1
    assert code.other_calls == []
    found, chunks = code.kernels[0], steps * parts_of_a_step(steps, key.packs)
    assert len(found.loads) == len(set(found.loads)) == chunks + 2  # scale and shift of the channel
    assert len(found.stores) == len(set(found.stores)) == chunks + chunks * key.packs.bits // 8
    assert code.source.count("= empty_strided_cuda(") == 2
    assert ".target sm_90" in found.ptx(90, tmp_path, block=256)


@pytest.mark.parametrize(("steps", "neuron"), PACKING)
def test_what_it_packs_are_its_spikes(steps, neuron):
    code, key = packing(steps, neuron, torch.float32)
    parts, size, channels = parts_of_a_step(steps, key.packs), 7, 5
    x = torch.randn(steps, parts * size, channels) * 2
    scale, shift, leak, threshold = (
        torch.rand(channels) + 0.5,
        torch.randn(channels),
        torch.tensor(0.5),
        torch.tensor(0.75),
    )
    operands = [x.view(steps, parts, size, channels), scale, shift, leak, threshold]
    spikes, packed = code.interpret(operands, size, channels)
    wanted, _ = integrate_and_fire_reference(x * scale + shift, leak, 0.75, False, True, key.levels)
    assert torch.equal(spikes.view(x.shape), wanted)
    assert 0.1 < wanted.abs().mean() < 0.9
    data, _ = _pack_in_torch(wanted.flatten(), key.packs)
    assert torch.equal(packed.flatten(), data)
