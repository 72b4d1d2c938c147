import os
import sys
from pathlib import Path

import pytest
import torch

from timm_qkformer.execution import events

os.environ.setdefault("TIMM_QKFORMER_CALIBRATION", "off")  # tests choose by typical numbers, not by this hour's load

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def event_kernels():
    """Skips the test on machines that cannot compile the kernels of event-driven convolutions."""
    if not events.can_run(torch.zeros(1, dtype=torch.uint8)):
        pytest.skip("no C++ compiler here")
