"""The authors' answers in float64, plain and deployed."""

import pytest
import torch

from golden import ALL_CASES, CASES, GoldenCase, create
from timm_qkformer import deploy

TOLERANCE = {"rtol": 0.0, "atol": 1e-9}


@pytest.mark.parametrize("name", ALL_CASES)
@torch.inference_mode()
def test_agrees_with_the_release(name, device):
    golden = GoldenCase(name)
    x = golden.input.to(device)
    model = create(name, golden.checkpoint).to(device)
    torch.testing.assert_close(model(x).cpu(), golden.one_by_one, **TOLERANCE)
    torch.testing.assert_close(deploy(model)(x).cpu(), golden.one_by_one, **TOLERANCE)
    torch.testing.assert_close(model(x[:1]).cpu(), golden.one_by_one[:1], **TOLERANCE)
    if name in CASES:
        coupled = create(name, golden.checkpoint, batch_coupled=True).to(device)
        torch.testing.assert_close(coupled(x).cpu(), golden.batched, **TOLERANCE)
