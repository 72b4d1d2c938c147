"""Tests of what a CUDA device may do differently: `make gpu` runs them where there is one and writes a report.

All are marked `cuda` and left out by default. TIMM_QKFORMER_CUDA_TESTS_DEVICE=cpu pytest -m cuda tests/cuda runs the
same tests on a CPU, but for those that take streams and CUDA graphs, so that their own mistakes show without one.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

NAME = os.environ.get("TIMM_QKFORMER_CUDA_TESTS_DEVICE", "cuda")

sys.path.insert(0, str(Path(__file__).parents[1] / "neurons"))  # neuron_cases


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    skip = pytest.mark.skip(reason="no CUDA device here: torch.cuda.is_available() is False")
    is_missing = NAME.startswith("cuda") and not torch.cuda.is_available()
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.cuda)
            if is_missing:
                item.add_marker(skip)


@pytest.fixture
def device():
    """Where the tests run."""
    return torch.device(NAME)


@pytest.fixture
def cuda(device):
    """The same, for what CUDA alone has."""
    if device.type != "cuda":
        pytest.skip("needs CUDA's streams, graphs or memory counts")
    return device


@pytest.fixture(autouse=True)
def _exact_products():
    """Products in the precision that they say, and the same ones each time."""
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield
    torch.backends.cuda.matmul.allow_tf32 = tf32
