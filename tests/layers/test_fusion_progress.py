"""A resumed process fuses its neurons at the call where the first one would have."""

import pytest
import torch

from timm_qkformer.layers import LIF, fused
from timm_qkformer.layers.fusion_progress import fusion_progress, resume_fusion

CALLS = 4


@pytest.fixture
def compiled(monkeypatch):
    """Which kernels would be compiled, without a compiler: the budget is that of the first three calls."""
    kernels = []

    def note(key):
        kernels.append(key)
        return None  # eager mode goes on

    monkeypatch.setattr(fused, "_entries", {})
    monkeypatch.setattr(fused, "_compile", note)
    monkeypatch.setitem(fused.AUTO_BUDGET, "cpu", 3 * 2**15)
    return kernels


def call(neuron):
    neuron(torch.zeros(2, 2**14, requires_grad=True)).sum().backward()


def test_counted_on(compiled, monkeypatch, tmp_path):
    neuron = LIF()
    for _ in range(2):
        call(neuron)
    assert not compiled
    torch.save(fusion_progress(), tmp_path / "progress.pt")
    monkeypatch.setattr(fused, "_entries", {})  # another process
    resume_fusion(torch.load(tmp_path / "progress.pt", weights_only=True))
    call(neuron)
    assert not compiled
    call(neuron)
    assert {key.backward for key in compiled} == {False, True}


def test_without_it_the_count_begins_anew(compiled, monkeypatch):
    neuron = LIF()
    for _ in range(CALLS - 1):
        call(neuron)
    monkeypatch.setattr(fused, "_entries", {})
    call(neuron)
    assert not compiled


def test_kernels_of_another_version_are_left_out(compiled):
    call(LIF())
    (first, *rest, events) = fusion_progress()
    assert events["kernel"] == "events"
    first["unheard_of"] = 1
    fused._entries.clear()
    resume_fusion([first, *rest, events])
    assert len(fused._entries) == len(rest)
