"""CUDA graphs, `torch.compile` of a training step, and two streams."""

import copy
import threading

import pytest
import torch
from on_device import Step

import timm_qkformer
import tiny
from timm_qkformer.execution import execution_policy

PRECISIONS = [None, "fp32", "bf16", "int8"]  # None: not deployed


def network(precision, device):
    model = tiny.tiny("test_qkformer", time_steps=2).float().to(device)
    return model if precision is None else timm_qkformer.deploy(model, precision)


def on_another_stream(run, times=3):
    """What is prepared once (kernels, packed weights, libraries' workspaces), as capturing a graph asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(times):
            run()
    torch.cuda.current_stream().wait_stream(stream)


@pytest.mark.filterwarnings("ignore:precision=")
@pytest.mark.parametrize("neurons", ["eager", "compile"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_inference_in_a_cuda_graph(precision, neurons, cuda):
    model = network(precision, cuda)
    inputs = [tiny.images(2).float().to(cuda) for _ in range(3)]
    with torch.no_grad(), execution_policy(neurons=neurons):
        wanted = [model(x) for x in inputs]
        x = inputs[0].clone()
        on_another_stream(lambda: model(x))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = model(x)
        for image, expected in zip(inputs, wanted, strict=True):
            x.copy_(image)
            graph.replay()
            assert torch.equal(logits, expected)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("neurons", ["eager", "compile"])
def test_a_training_step_in_a_cuda_graph(neurons, packed, cuda):
    model = tiny.tiny("test_qkformer", time_steps=2).to(cuda).train()
    twin = copy.deepcopy(model)
    with execution_policy(neurons=neurons, packed=packed):
        captured = torch.cuda.make_graphed_callables(model, (tiny.images(2).to(cuda),))
        for _ in range(2):
            x = tiny.images(2).to(cuda)
            results = []
            for run, owner in ((captured, model), (twin, twin)):
                owner.zero_grad(set_to_none=True)
                logits = run(x)
                logits.square().sum().backward()
                results.append((logits.detach().clone(), [p.grad.clone() for p in owner.parameters()]))
            torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("packed", [True, False])
def test_torch_compile_of_a_training_step(packed, device):
    """On CUDA by Inductor; elsewhere the graph alone is made, which tests/neurons holds to the same answers."""
    model = tiny.tiny("test_qkformer", time_steps=2).to(device)
    x = tiny.images(2).to(device)
    wanted = Step(model, x, packed=packed, neurons="eager")
    compiled = torch.compile(copy.deepcopy(model).train(), backend="inductor" if device.type == "cuda" else "aot_eager")
    inner = x.detach().clone().requires_grad_()
    with execution_policy(packed=packed):
        out = compiled(inner * 1.0)
        weight = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        (out * weight.to(out)).sum().backward()
    torch.testing.assert_close(out.detach(), wanted.out, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(inner.grad, wanted.grads["input"], rtol=1e-6, atol=1e-7)


def in_two_threads(work):
    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.filterwarnings("ignore:precision=")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_two_streams_share_a_model(precision, cuda):
    model = network(precision, cuda)
    inputs = [tiny.images(4).float().to(cuda) for _ in range(2)]
    with torch.no_grad():
        wanted = [model(x) for x in inputs]
    torch.cuda.synchronize()
    found = [[], []]

    def work(index):
        with torch.cuda.stream(torch.cuda.Stream()), torch.no_grad():
            for _ in range(20):
                found[index].append(model(inputs[index]))
            torch.cuda.current_stream().synchronize()

    in_two_threads(work)
    for own, expected in zip(found, wanted, strict=True):
        assert len(own) == 20
        assert all(torch.equal(logits, expected) for logits in own)


def test_two_streams_train_two_copies(cuda):
    model = tiny.tiny("test_qkformer", time_steps=2).to(cuda)
    x = tiny.images(2).to(cuda)
    wanted = Step(model, x, neurons="eager")
    torch.cuda.synchronize()
    steps = {}

    def work(index):
        with torch.cuda.stream(torch.cuda.Stream()):
            steps[index] = Step(model, x, neurons="eager")
            torch.cuda.current_stream().synchronize()

    in_two_threads(work)
    assert len(steps) == 2
    for step in steps.values():
        torch.testing.assert_close(step.out, wanted.out, rtol=1e-9, atol=1e-9)
        step.assert_close_to(wanted, rtol=1e-6, atol=1e-7)
