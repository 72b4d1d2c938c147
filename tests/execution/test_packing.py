"""Packed tensors of few whole numbers, in torch and by the kernel, and the ranges that say what a tensor may hold."""

import warnings

import pytest
import torch

from timm_qkformer.execution import BINARY, REAL, TERNARY, Range, counts, execution_policy, packing
from timm_qkformer.execution.packing import SharedInput, pack, unpack

RANGES = [counts(most) for most in (1, 2, 3, 4, 15, 16, 255)] + [TERNARY, Range(-2, 2), Range(-8, 7), Range(-128, 127)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(2, 3, 4, 5, 7), (1, 1, 1, 1), (3, 8, 4, 4), (1, 3, 2, 1), (4, 0, 3, 2, 2)]


@pytest.fixture(params=["torch", "kernel"])
def path(request):
    """How tensors are packed; the kernel has float32 and bfloat16."""
    if request.param == "kernel":
        request.getfixturevalue("event_kernels")
    with execution_policy(kernels="always" if request.param == "kernel" else "never"):
        yield request.param


@pytest.fixture(autouse=True)
def _warn_again(monkeypatch):
    monkeypatch.setattr(packing, "_warned", set())


def numbers(held: Range, shape, dtype=torch.float32):
    x = torch.randint(int(held.low), int(held.high) + 1, shape).to(dtype)
    if x.numel() > 1:
        x.view(-1)[0], x.view(-1)[-1] = held.low, held.high
    return x


@pytest.mark.parametrize("held", RANGES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packing_loses_nothing(held, dtype, shape, path):
    x = numbers(held, shape, dtype)
    for given in (x, x.movedim(-3, -1).contiguous().movedim(-1, -3), x.flip(-1)):
        packed = pack(given, held)
        assert packed.data.dtype == torch.uint8
        assert packed.data.numel() == -(-x.numel() * held.bits // 8)
        assert packed.spikes in (None, given.abs().sum(dtype=torch.float64))
        again = unpack(packed, dtype)
        assert again.dtype == dtype
        assert torch.equal(again, given)
        assert again.movedim(-3, -1).is_contiguous()
        if held.low == 0:
            assert torch.equal(unpack(packed, torch.uint8), given.to(torch.uint8))


def test_both_ways_to_pack_give_the_same_bytes(event_kernels):
    for held in RANGES:
        x = numbers(held, (3, 5, 40, 41))  # more than a chunk
        with execution_policy(kernels="never"):
            plain = pack(x, held)
        with execution_policy(kernels="always"):
            native = pack(x, held)
        assert torch.equal(plain.data, native.data)
        assert native.spikes == x.abs().sum()


@pytest.mark.parametrize("wrong", [0.5, -1.0, 16.0, 257.0, 3.0e38, float("inf"), float("-inf"), float("nan"), 1e-7])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("held", [BINARY, counts(15)], ids=str)
@pytest.mark.parametrize("index", [0, 7, 90, -1])
def test_what_does_not_fit_is_refused_with_one_warning(wrong, dtype, held, index, path):
    x = numbers(held, (1, 3, 5, 9), dtype)
    fits = x.clone()
    x.view(-1)[index] = wrong
    with pytest.warns(RuntimeWarning, match=f"{held} by the way its network is built, and does not"):
        assert pack(x, held) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pack(x, held) is None
        assert pack(fits, held) is not None


def test_ranges():
    assert [held.bits for held in RANGES] == [1, 2, 2, 4, 4, 8, 8, 2, 4, 4, 8]
    assert (REAL.bits, counts(256).bits, REAL.is_real, TERNARY.is_real) == (None, None, True, False)
    assert BINARY.plus(TERNARY) == Range(-1, 2)
    assert BINARY.plus(REAL).is_real
    assert REAL.plus(REAL).bits is None
    assert TERNARY.times(counts(3)) == Range(-3, 3)
    assert Range(-2, 1).times(Range(-1, 3)) == Range(-6, 3)
    assert BINARY.times(REAL) == REAL
    dropped = BINARY.dropped()
    assert (dropped.bits, dropped.high, dropped.is_real) == (None, 1, False)
    assert BINARY.dropped(False) == BINARY
    assert not BINARY.plus(dropped).in_training
    assert not dropped.times(BINARY).in_training
    assert str(TERNARY) == "whole numbers from -1 to 1"
    assert str(REAL) == "real numbers"


def test_layers_share_one_packed_form():
    x = (torch.rand(2, 3, 4, 5, 5) > 0.5).float()
    shared = SharedInput(x, BINARY)
    assert shared.packed is shared.packed
    assert torch.equal(unpack(shared.packed, x.dtype).unflatten(0, (2, 3)), x)
    assert SharedInput(x, REAL).packed is None
    assert SharedInput(x, BINARY.dropped()).packed is None
