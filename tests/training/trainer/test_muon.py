"""Muon iterates in a precision that the device multiplies."""

import pytest
import torch
from timm.optim import create_optimizer_v2, muon
from tiny_runs import PLAIN, run
from torch import nn

from timm_qkformer.training.trainer import muon as ours


@pytest.fixture
def precisions(monkeypatch):
    """Precisions of all iterations; the CPU says what `multiplies` holds."""
    seen: list[torch.dtype] = []
    own = muon.zeropower_via_newtonschulz

    def watched(G, steps, coefficients, dtype=torch.bfloat16, **kwargs):
        seen.append(dtype)
        return own(G, steps, coefficients, dtype=dtype, **kwargs)

    monkeypatch.setattr(muon, "zeropower_via_newtonschulz", watched)
    return seen


def step(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 16, 3), nn.Flatten(), nn.Linear(16 * 36, 10))
    optimizer = create_optimizer_v2(model, opt="nmuon", lr=0.1)
    model(torch.randn(2, 4, 8, 8)).square().sum().backward()
    with ours.muon_precision(device):
        optimizer.step()
    return model


@pytest.mark.parametrize(
    ("multiplies", "device", "precision"),
    [(False, "cpu", torch.float32), (True, "cpu", torch.bfloat16), (False, "cuda", torch.bfloat16)],
)
def test_precision_is_what_the_device_multiplies(precisions, monkeypatch, multiplies, device, precision):
    monkeypatch.setattr(ours, "cpu_multiplies", lambda dtype: multiplies)
    step(torch.device(device))
    assert precisions
    assert set(precisions) == {precision}


def test_timms_own_comes_back_even_after_an_error(monkeypatch):
    monkeypatch.setattr(ours, "cpu_multiplies", lambda dtype: False)
    own = muon.zeropower_via_newtonschulz

    def fails() -> None:
        with ours.muon_precision(torch.device("cpu")):
            assert muon.zeropower_via_newtonschulz is not own
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert muon.zeropower_via_newtonschulz is own


def test_the_trainer_uses_it(monkeypatch, data, tmp_path, precisions):
    monkeypatch.setattr(ours, "cpu_multiplies", lambda dtype: False)
    run(data, tmp_path, **PLAIN, opt="nmuon")
    assert precisions
    assert set(precisions) == {torch.float32}
