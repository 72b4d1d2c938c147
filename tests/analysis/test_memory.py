"""Memory of attention: closed forms, the allocator's own account, the paper's figures."""

import pytest
import timm
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from timm_qkformer.analysis import attention_memory, peak_memory
from timm_qkformer.analysis.live_tensors import LiveTensors
from timm_qkformer.analysis.memory import PAPER_MEMORY, PAPER_SIDES
from timm_qkformer.layers import set_lif_backend

QUADRATIC = "SSA as (Q K^T) V"
MIB = 2**20


def test_live_tensors_by_hand():
    x = torch.ones(1000)
    with LiveTensors([x]) as live:
        a = x + 1  # 4,000 bytes
        b = a * a  # 8,000
        del a
        b.add_(1.0)  # in place
        c = b.view(10, 100).t()  # a view
        (c @ torch.ones(10, 10)).sum()  # 4,000 + 400 + 4,000
        x.mul_(2.0)  # was there before
    assert live.peak == 8400


def test_live_tensors_agree_with_the_allocator():
    model = timm.create_model("test_qkformer").eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad(), set_lif_backend("eager"):
        model(x)
        with LiveTensors([*model.parameters(), *model.buffers(), x]) as live:
            model(x)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            model(x)
    # Every allocation and release on the CPU, in order; a kernel's scratch memory included.
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held, peak = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    assert live.peak <= peak * 1.001
    assert live.peak == pytest.approx(peak, rel=0.25)


@pytest.mark.parametrize("side", [10, 30, 50])
def test_qkta_holds_its_result_and_little_else(side):
    (result,) = attention_memory(["QKTA"], [side])
    tokens = side**2
    result_bytes = 4 * tokens * 256
    assert result_bytes < result.peak_bytes <= result_bytes + 4 * 4 * tokens  # and a few attention vectors
    assert result.seconds is None
    assert result.paper_mib == PAPER_MEMORY[side][0]


@pytest.mark.parametrize("side", [30, 50, 60])
def test_quadratic_attention_holds_a_matrix_of_tokens(side):
    (result,) = attention_memory([QUADRATIC], [side])
    tokens = side**2
    assert result.peak_bytes == 4 * tokens**2 + 4 * tokens * 256


def test_self_attention_as_it_is_run_is_linear_in_tokens():
    small, large = attention_memory(["SSA"], [40, 80])
    assert large.peak_bytes / small.peak_bytes == pytest.approx(4.0, rel=0.05)


@pytest.mark.parametrize("side", [10, 20, 30, 50])
def test_the_papers_figures(side):
    """Those of QKTA are met. Those of SSA belong to (Q K^T) V, without what its neuron needs, and are met where the
    matrix of tokens outweighs that."""
    qkta, quadratic = attention_memory(["QKTA", QUADRATIC], [side])
    assert qkta.peak_bytes / MIB == pytest.approx(qkta.paper_mib, rel=0.03)
    if side >= 30:
        assert quadratic.peak_bytes / MIB == pytest.approx(quadratic.paper_mib, rel=0.02)


def test_published_values_follow_their_closed_form():
    """A slip in copying the table would show here: 4 N C bytes, and 4 N^2 + 4 N C, up to an allocator's rounding."""
    assert PAPER_SIDES == tuple(range(10, 201, 10))
    for side, (qkta, ssa) in PAPER_MEMORY.items():
        tokens = side**2
        assert qkta * MIB == pytest.approx(4 * tokens * 256, rel=0.10), side
        assert ssa * MIB == pytest.approx(4 * tokens**2 + 4 * tokens * 256, rel=0.10), side


def test_every_kind_and_size_is_timed():
    results = attention_memory(["QKTA", "QKCA"], [4, 8], dim=16, rounds=3)
    assert [(result.kind, result.side) for result in results] == [("QKTA", 4), ("QKCA", 4), ("QKTA", 8), ("QKCA", 8)]
    assert all(result.seconds > 0 and result.paper_mib is None for result in results)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"kinds": ["VSA"]}, "kind='VSA' is unknown"),
        ({"sides": [0]}, r"sides=\(0,\)"),
        ({"rounds": -1}, "rounds=-1"),
        ({"rate": 1.5}, "rate=1.5"),
    ],
)
def test_bad_arguments(args, message):
    with pytest.raises(ValueError, match=message):
        attention_memory(**args)


def test_peak_memory_of_a_model():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1000))

        def forward(self, x):
            return (x + self.weight).relu().sum()

    model = Wide().train()
    # Weights and input 4,000 bytes each, two intermediate results.
    assert peak_memory(model, torch.ones(1000)) == 4 * 4000
    assert model.training
    spiking = timm.create_model("test_qkformer")
    one, four = (peak_memory(spiking, torch.randn(batch, 3, 32, 32)) for batch in (1, 4))
    fixed = sum(tensor.nbytes for tensor in (*spiking.parameters(), *spiking.buffers()))
    assert (four - fixed) / (one - fixed) == pytest.approx(4.0, rel=0.05)
