"""execution_policy: what it sets, for whom and how long."""

import asyncio
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from timm_qkformer.execution import Policy, current_policy, execution_policy, set_lif_backend
from timm_qkformer.execution.policy import ENVIRONMENT_VARIABLE
from timm_qkformer.neurons import LIF


@pytest.fixture(autouse=True)
def _unset(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr("timm_qkformer.execution.policy._newest", None)


def in_new_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_a_call_sets_it_for_all_threads():
    assert current_policy() == Policy("auto", "auto", True)
    execution_policy(neurons="eager", packed=False)
    assert current_policy() == in_new_thread(current_policy) == Policy("eager", "auto", False)
    execution_policy(neurons="auto", kernels="never")  # what is not named stays
    assert current_policy() == in_new_thread(current_policy) == Policy("auto", "never", False)


@pytest.mark.parametrize("make", [set_lif_backend, execution_policy])
def test_a_block_sets_it_for_itself_and_puts_it_back(make):
    execution_policy(neurons="compile")
    with make("eager") as setting:
        assert current_policy().neurons == "eager"
        assert in_new_thread(current_policy).neurons == "compile"
        with execution_policy(neurons="spikingjelly", kernels="always"):
            with execution_policy(packed=False):
                assert current_policy() == Policy("spikingjelly", "always", False)
            assert current_policy() == Policy("spikingjelly", "always", True)
        with setting:  # reentrant
            assert current_policy().neurons == "eager"
        assert current_policy().neurons == "eager"
        execution_policy(kernels="never")  # for everyone, within a block
        assert current_policy() == Policy("eager", "never", True)
    assert current_policy() == Policy("compile", "never", True)
    with pytest.raises(ZeroDivisionError), make("eager"):
        raise ZeroDivisionError
    assert current_policy().neurons == "compile"


def test_blocks_in_threads_that_overlap_leave_nothing_behind():
    made, entered = threading.Barrier(2), threading.Barrier(2)

    def block(name):
        setting = execution_policy(neurons=name)
        made.wait()  # both constructors have run before either block begins
        with setting:
            entered.wait()
            return current_policy().neurons

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(block, ["eager", "compile"])) == ["eager", "compile"]
    assert current_policy() == Policy()


def test_blocks_in_asyncio_tasks_are_their_own():
    async def block(name):
        with execution_policy(neurons=name):
            await asyncio.sleep(0)
            return current_policy().neurons

    async def both():
        return await asyncio.gather(block("eager"), block("compile"))

    assert asyncio.run(both()) == ["eager", "compile"]


def test_the_environment_decides_where_nobody_has(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "neurons=eager, packed=0,kernels=never,")
    assert current_policy() == Policy("eager", "never", False)
    with execution_policy(neurons="compile"):
        assert current_policy() == Policy("compile", "never", False)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "packed=True")
    assert current_policy() == Policy()
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "")
    assert current_policy() == Policy()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: set_lif_backend("cupy"), r"backend='cupy' is unknown, choose one of \['auto', 'eager'"),
        (lambda: set_lif_backend(None), r"backend=None is unknown"),
        (lambda: execution_policy(neurons="cupy"), r"neurons='cupy' is unknown, choose one of \['auto', 'eager'"),
        (lambda: execution_policy(kernels="sometimes"), r"kernels='sometimes' is unknown.*always"),
        (lambda: execution_policy(packed="yes"), r"packed='yes' is unknown.*True"),
    ],
)
def test_unknown_values_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
    assert current_policy() == Policy()


@pytest.mark.parametrize("text", ["fast", "neurons=fast", "packed=maybe", "neurons", "speed=high", "packed="])
def test_unknown_environments_are_refused(text, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "kernels=never," + text)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"environment variable TIMM_QKFORMER_EXECUTION='kernels=never,{text}'"):
            LIF()(torch.zeros(1, 2))


def test_spikingjelly_is_imported_when_used_only():
    code = (
        "import sys, torch; from timm_qkformer.neurons import LIF; from timm_qkformer.execution import set_lif_backend;"
        "x = torch.zeros(2, 3); LIF()(x);"
        "assert not any(m.startswith('spikingjelly.activation_based.functional') for m in sys.modules);"
        "set_lif_backend('spikingjelly'); LIF()(x);"
        "assert any(m.startswith('spikingjelly.activation_based.functional') for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
