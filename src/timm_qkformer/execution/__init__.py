"""How things run: the policy, packed activations, event-driven products, and kernels in C++.

Nothing here changes a result. User's view: docs/execution.md.
"""

from .budget import load_state_dict, state_dict
from .memory import keep_freed_memory
from .packing import BINARY, REAL, TERNARY, Range, counts
from .policy import Policy, current_policy, execution_policy, set_lif_backend
from .recompute import checkpoint_once

__all__ = [
    "BINARY",
    "REAL",
    "TERNARY",
    "Policy",
    "Range",
    "checkpoint_once",
    "counts",
    "current_policy",
    "execution_policy",
    "keep_freed_memory",
    "load_state_dict",
    "set_lif_backend",
    "state_dict",
]
