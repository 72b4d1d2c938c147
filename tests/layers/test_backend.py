"""set_lif_backend: what it sets, for whom and how long."""

import asyncio
import copy
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from timm_qkformer.layers import LIF, current_lif_backend, set_lif_backend
from timm_qkformer.layers.backend import ENVIRONMENT_VARIABLE


@pytest.fixture(autouse=True)
def _unset(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr("timm_qkformer.layers.backend._newest", None)


def in_new_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_auto_unless_told_otherwise():
    assert current_lif_backend() == "auto"


def test_a_call_sets_it_for_all_threads():
    set_lif_backend("eager")
    assert current_lif_backend() == "eager"
    assert in_new_thread(current_lif_backend) == "eager"
    set_lif_backend("auto")
    assert in_new_thread(current_lif_backend) == "auto"


def test_a_block_sets_it_for_itself_and_puts_it_back():
    set_lif_backend("compile")
    with set_lif_backend("eager") as setting:
        assert setting.backend == "eager"
        assert current_lif_backend() == "eager"
        assert in_new_thread(current_lif_backend) == "compile"
        with set_lif_backend("spikingjelly"):
            assert current_lif_backend() == "spikingjelly"
        with setting:  # reentrant
            assert current_lif_backend() == "eager"
        assert current_lif_backend() == "eager"
    assert current_lif_backend() == "compile"
    with pytest.raises(ZeroDivisionError), set_lif_backend("eager"):
        raise ZeroDivisionError
    assert current_lif_backend() == "compile"


def test_blocks_in_threads_that_overlap_leave_nothing_behind():
    made = threading.Barrier(2)
    entered = threading.Barrier(2)

    def block(name):
        setting = set_lif_backend(name)
        made.wait()  # both constructors have run before either block begins
        with setting:
            entered.wait()
            return current_lif_backend()

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(block, ["eager", "compile"])) == ["eager", "compile"]
    assert current_lif_backend() == "auto"


def test_blocks_in_asyncio_tasks_are_their_own():
    async def block(name):
        with set_lif_backend(name):
            await asyncio.sleep(0)
            return current_lif_backend()

    async def both():
        return await asyncio.gather(block("eager"), block("compile"))

    assert asyncio.run(both()) == ["eager", "compile"]


def test_the_environment_decides_where_nobody_has(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "eager")
    assert current_lif_backend() == "eager"
    with set_lif_backend("compile"):
        assert current_lif_backend() == "compile"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "")
    assert current_lif_backend() == "auto"


def test_unknown_names_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"backend='cupy' is unknown, choose one of \['auto', 'eager'"):
        set_lif_backend("cupy")
    assert current_lif_backend() == "auto"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "fast")
    with pytest.raises(ValueError, match="environment variable TIMM_QKFORMER_LIF_BACKEND='fast' is unknown"):
        LIF()(torch.zeros(1, 2))


def test_modules_hold_no_backend():
    neuron = LIF()
    with set_lif_backend("eager"):
        state = pickle.dumps(neuron)
        twin = copy.deepcopy(neuron)
    assert pickle.dumps(LIF()) == state
    assert twin.__dict__.keys() == LIF().__dict__.keys()


def test_spikingjelly_is_imported_when_used_only():
    code = (
        "import sys, torch; from timm_qkformer.layers import LIF, set_lif_backend; x = torch.zeros(2, 3); LIF()(x);"
        "assert not any(m.startswith('spikingjelly.activation_based.functional') for m in sys.modules);"
        "set_lif_backend('spikingjelly'); LIF()(x);"
        "assert any(m.startswith('spikingjelly.activation_based.functional') for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
