"""A resumed process compiles its kernels at the call where the first one would have."""

from typing import NamedTuple

import pytest
import torch

from timm_qkformer import execution
from timm_qkformer.execution import budget, native
from timm_qkformer.neurons import LIF, compiled

CALLS = 4
EARLIER = [  # as version 0.1's trainer saved it
    {
        "work": 2 * 2**15,
        "backward": backward,
        "steps": 2,
        "constant": False,
        "row": 1,
        "dtype": "torch.dtype float32",
        "device": "torch.device cpu",
        "leak_device": "torch.device cpu",
        "soft_reset": False,
        "decay_input": True,
        "detach_reset": True,
        "surrogate": "sigmoid" if backward else "",
        "leak_gradient": False,
        "affine": False,
    }
    for backward in (False, True)
] + [{"work": 5, "kernel": "events"}]


@pytest.fixture(autouse=True)
def new_process(monkeypatch):
    def begin():
        monkeypatch.setattr(compiled._budget, "work", {})
        monkeypatch.setattr(native._budget, "work", {})
        monkeypatch.setattr(compiled, "_kernels", {})

    begin()
    return begin


@pytest.fixture
def kernels(monkeypatch):
    """Which kernels would be compiled, without a compiler: the budget is that of the first three calls."""
    keys = []
    monkeypatch.setattr(compiled, "_compile", keys.append)  # which gives no kernel: eager mode continues
    monkeypatch.setitem(compiled.AUTO_BUDGET, "cpu", 3 * 2**15)
    return keys


def call():
    LIF()(torch.zeros(2, 2**14, requires_grad=True)).sum().backward()


def test_the_count_continues(kernels, new_process, tmp_path):
    for _ in range(2):
        call()
    native.count_training_work(7)
    torch.save(execution.state_dict(), tmp_path / "progress.pt")
    new_process()
    native.count_training_work(100)  # what this process did before it resumed does not add up
    state = torch.load(tmp_path / "progress.pt", weights_only=True)
    execution.load_state_dict(state)
    assert execution.state_dict() == state
    assert native._budget.work[native._TRAINING] == 7
    call()
    assert not kernels
    call()
    assert {key.backward for key in kernels} == {False, True}


def test_without_it_the_count_begins_anew(kernels, new_process):
    for _ in range(CALLS - 1):
        call()
    new_process()
    call()
    assert not kernels


def test_what_an_earlier_version_saved(kernels):
    execution.load_state_dict(EARLIER)
    assert native._budget.work[native._TRAINING] == 5
    call()
    assert not kernels
    call()
    assert [key.backward for key in kernels] == [False, True]


def test_kernels_of_another_version_are_left_out():
    execution.load_state_dict([{**EARLIER[0], "unheard_of": 1}, {"work": 3, "steps": 2}, *EARLIER[1:]])
    assert len(compiled._budget.work) == len(native._budget.work) == 1


def test_a_budget_of_its_own(monkeypatch):
    class Key(NamedTuple):
        name: str
        dtype: torch.dtype = torch.float32

    monkeypatch.setattr(budget, "_budgets", [])
    own = budget.Budget(Key)
    assert [own.spend(Key("a"), 2, 5) for _ in range(3)] == [True, True, False]
    assert own.spend(Key("b", torch.float64), 2, 5)
    assert budget.state_dict() == [
        {"work": 6, "name": "a", "dtype": "torch.dtype float32"},
        {"work": 2, "name": "b", "dtype": "torch.dtype float64"},
    ]
    assert own.load({"name": "c"}, 4)
    assert own.work[Key("c")] == 4
    assert not own.load({"dtype": torch.float32}, 4)
