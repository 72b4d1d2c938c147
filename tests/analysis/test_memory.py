"""Memory and operations of attention: closed forms, the allocator's own account, the paper's figures, parameters."""

import pytest
import timm
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from timm_qkformer.analysis import attention_complexity, attention_memory, parameter_counts, peak_memory
from timm_qkformer.analysis.complexity import QUADRATIC
from timm_qkformer.analysis.memory import PAPER_MEMORY, PAPER_SIDES, LiveTensors
from timm_qkformer.execution import execution_policy

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
    with torch.no_grad(), execution_policy(neurons="eager"):
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


@pytest.mark.parametrize("side", [10, 20, 30, 50])
def test_closed_forms_and_the_papers_figures(side):
    """Those of QKTA are met. Those of SSA belong to (Q K^T) V, without what its neuron needs, and are met where the
    matrix of tokens outweighs that."""
    qkta, quadratic = attention_memory(["QKTA", QUADRATIC], [side])
    tokens, result_bytes = side**2, 4 * side**2 * 256
    assert result_bytes < qkta.peak_bytes <= result_bytes + 4 * 4 * tokens  # and a few attention vectors
    assert qkta.seconds is None
    assert qkta.paper_mib == PAPER_MEMORY["QKTA"][side] == pytest.approx(qkta.peak_bytes / MIB, rel=0.03)
    if side >= 30:
        assert quadratic.peak_bytes == 4 * tokens**2 + result_bytes
        assert quadratic.peak_bytes / MIB == pytest.approx(quadratic.paper_mib, rel=0.02)


def test_self_attention_as_it_is_run_is_linear_in_tokens():
    small, large = attention_memory(["SSA"], [40, 80])
    assert large.peak_bytes / small.peak_bytes == pytest.approx(4.0, rel=0.05)


def test_published_values_follow_their_closed_form():
    """A slip in copying the table would show here: 4 N C bytes, and 4 N^2 + 4 N C, up to an allocator's rounding."""
    for side in PAPER_SIDES:
        tokens = side**2
        assert PAPER_MEMORY["QKTA"][side] * MIB == pytest.approx(4 * tokens * 256, rel=0.10), side
        assert PAPER_MEMORY[QUADRATIC][side] * MIB == pytest.approx(4 * tokens**2 + 4 * tokens * 256, rel=0.10), side


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


@pytest.fixture(scope="module")
def results():
    return {result.kind: result for result in attention_complexity((16, 32, 64, 128), (16, 32, 64))}


@pytest.mark.parametrize(
    ("kind", "operations", "state", "exponents"),
    [
        ("QKTA", lambda n, d: 2 * n * d, lambda n, d: n, (1, 1, 1, 0)),
        ("QKCA", lambda n, d: 2 * n * d, lambda n, d: d, (1, 1, 0, 1)),
        ("SSA", lambda n, d: 2 * n * d * d + n * d, lambda n, d: d * d, (1, 2, 0, 2)),
        ("SSA as (Q K^T) V", lambda n, d: 2 * n * n * d + n * d, lambda n, d: n * n, (2, 1, 2, 0)),
    ],
)
def test_counts_are_the_closed_form(results, kind, operations, state, exponents):
    found = results[kind]
    assert len(found.counts) == 12
    for count in found.counts:
        assert count.operations == operations(count.tokens, count.dim)
        assert count.state == state(count.tokens, count.dim)
    fitted = (found.operations_n, found.operations_d, found.state_n, found.state_d)
    assert fitted == pytest.approx(exponents, abs=0.03)  # of 2 N D^2 + N D: a little less than 2


def test_the_papers_formulas_stand_beside(results):
    assert results["QKTA"].paper == ("O(D)", "O(N)")
    assert results["SSA"].paper == results["SSA as (Q K^T) V"].paper == ("O(N^2 D)", "O(N^2 + N D)")


@pytest.mark.parametrize("args", [{"tokens": (8,)}, {"dims": (8, 8)}, {"dims": (0, 8)}])
def test_exponents_need_two_sizes(args):
    with pytest.raises(ValueError, match="two or more different numbers"):
        attention_complexity(**args)


def test_parameter_counts():
    counts = parameter_counts()
    assert set(counts) == {*timm.list_models(module="qkformer"), *timm.list_models(module="maxformer")}
    model = timm.create_model("test_maxformer")
    assert counts["test_maxformer"] == sum(p.numel() for p in model.parameters())
