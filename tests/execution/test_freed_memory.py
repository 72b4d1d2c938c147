"""Freed memory of a process that trains."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource
import torch
from timm_qkformer.execution.memory import keep_freed_memory

kept = keep_freed_memory()
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)  # 64 MB, and freed
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(kept, faults)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
@pytest.mark.parametrize(
    "tuned", [{}, {"MALLOC_MMAP_THRESHOLD_": "1048576"}, {"GLIBC_TUNABLES": "glibc.malloc.perturb=0"}]
)
def test_large_blocks_are_reused_unless_the_environment_says_otherwise(tuned, monkeypatch):
    for name, value in tuned.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    kept, faults = done.stdout.split()
    if not tuned and kept == "False":
        pytest.skip("another C library")
    assert kept == str(not tuned)
    assert (int(faults) < 1000) == (not tuned)  # of 16,384 pages, where pages have 4 KB
