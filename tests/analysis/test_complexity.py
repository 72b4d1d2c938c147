"""Counted operations of attention: closed forms, fitted exponents, and parameters of every model."""

import pytest
import timm

from timm_qkformer.analysis import attention_complexity, parameter_counts


@pytest.fixture(scope="module")
def results():
    return {result.kind: result for result in attention_complexity((16, 32, 64, 128), (16, 32, 64))}


@pytest.mark.parametrize(
    ("kind", "operations", "state"),
    [
        ("QKTA", lambda n, d: 2 * n * d, lambda n, d: n),
        ("QKCA", lambda n, d: 2 * n * d, lambda n, d: d),
        ("SSA", lambda n, d: 2 * n * d * d + n * d, lambda n, d: d * d),
        ("SSA as (Q K^T) V", lambda n, d: 2 * n * n * d + n * d, lambda n, d: n * n),
    ],
)
def test_counts_are_the_closed_form(results, kind, operations, state):
    counts = results[kind].counts
    assert len(counts) == 12
    for count in counts:
        assert count.operations == operations(count.tokens, count.dim)
        assert count.state == state(count.tokens, count.dim)


@pytest.mark.parametrize(
    ("kind", "exponents"),
    [
        ("QKTA", (1, 1, 1, 0)),
        ("QKCA", (1, 1, 0, 1)),
        ("SSA", (1, 2, 0, 2)),
        ("SSA as (Q K^T) V", (2, 1, 2, 0)),
    ],
)
def test_exponents(results, kind, exponents):
    result = results[kind]
    fitted = (result.operations_n, result.operations_d, result.state_n, result.state_d)
    assert fitted == pytest.approx(exponents, abs=0.03)  # of 2 N D^2 + N D: a little less than 2


def test_the_papers_formulas_stand_beside(results):
    assert results["QKTA"].paper == ("O(D)", "O(N)")
    assert results["SSA"].paper == results["SSA as (Q K^T) V"].paper == ("O(N^2 D)", "O(N^2 + N D)")


@pytest.mark.parametrize("args", [{"tokens": (8,)}, {"dims": (8, 8)}, {"dims": (0, 8)}])
def test_bad_arguments(args):
    with pytest.raises(ValueError, match="two or more different numbers"):
        attention_complexity(**args)


def test_parameter_counts():
    counts = parameter_counts()
    assert set(counts) == {*timm.list_models(module="qkformer"), *timm.list_models(module="maxformer")}
    # The paper's Table 2: 16.47, 29.08 and 64.96 million.
    assert [counts[f"qkformer_hst10_{width}"] for width in (384, 512, 768)] == [16473688, 29079336, 64962760]
    model = timm.create_model("test_maxformer")
    assert counts["test_maxformer"] == sum(p.numel() for p in model.parameters())
