"""What attention costs against the number of tokens N and channels D, counted while it runs: the paper's Table 1.

Counted are the scalar operations of the attention proper, from Q, K and V to X', with one head and without the neuron:
an addition for each element that a sum takes in, a multiplication for each element of a product, a multiply-accumulate
for each term of a matrix product. The paper's O(D) for QKTA and O(N) for QKCA count a row or column as one operation
("when applying mask operation"); scalar by scalar it states O(N D), which is what is found here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from typing import Any, Optional

import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .attention_core import ATTENTION_CORES, AttentionCore

__all__ = ["PAPER_COMPLEXITY", "Complexity", "OperationCounts", "attention_complexity", "parameter_counts"]

# Time and space in the paper's Table 1 (arXiv 2403.16552).
PAPER_COMPLEXITY: dict[str, tuple[str, str]] = {
    "QKTA": ("O(D)", "O(N)"),
    "QKCA": ("O(N)", "O(D)"),
    "SSA": ("O(N^2 D)", "O(N^2 + N D)"),
}

aten = torch.ops.aten


@dataclass(frozen=True)
class OperationCounts:
    """Counted for one number of tokens and channels.

    Attributes:
        tokens, dim: N and D.
        operations: Scalar operations.
        state: Elements of what stands between queries and result: attention vector, K^T V or Q K^T.
    """

    tokens: int
    dim: int
    operations: int
    state: int


@dataclass(frozen=True)
class Complexity:
    """How the cost of one kind of attention grows.

    Attributes:
        kind: "QKTA", "QKCA", "SSA" (as this package and the release run it, Q (K^T V)) or "SSA as (Q K^T) V".
        counts: All measured points.
        operations_n, operations_d: Exponents of N and D of the operations, fitted to the points.
        state_n, state_d: Likewise of the state.
        paper: The paper's time and space, where it has the kind.
    """

    kind: str
    counts: tuple[OperationCounts, ...]
    operations_n: float
    operations_d: float
    state_n: float
    state_d: float
    paper: Optional[tuple[str, str]]


def attention_complexity(
    tokens: Sequence[int] = (64, 128, 256, 512), dims: Sequence[int] = (32, 64, 128, 256)
) -> list[Complexity]:
    """Count the operations of every kind of attention for all pairs of N and D and fit their exponents.

    Args:
        tokens: Numbers of tokens N, two or more.
        dims: Numbers of channels D, two or more.

    Raises:
        ValueError: For fewer than two different numbers, or one below 1.
    """
    for name, numbers in (("tokens", tokens), ("dims", dims)):
        if len(set(numbers)) < 2 or min(numbers) < 1:
            raise ValueError(f"{name}={tuple(numbers)!r} must be two or more different numbers of at least 1")
    results = []
    for kind in ATTENTION_CORES:
        counts = tuple(_count(kind, n, d) for n in tokens for d in dims)
        operations_n, operations_d = _exponents(counts, [c.operations for c in counts])
        state_n, state_d = _exponents(counts, [c.state for c in counts])
        paper = PAPER_COMPLEXITY.get(kind.partition(" ")[0])
        results.append(Complexity(kind, counts, operations_n, operations_d, state_n, state_d, paper))
    return results


def parameter_counts() -> dict[str, int]:
    """Parameters of every registered model of this package, with its default number of classes (Table 2)."""
    names = [name for module in ("qkformer", "maxformer") for name in timm.list_models(module=module)]
    return {name: sum(p.numel() for p in timm.create_model(name, device="meta").parameters()) for name in names}


class _Operations(TorchDispatchMode):
    """Counts scalar operations, and notes the size of the first result that is not a view."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.state: Optional[int] = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Optional[dict[str, Any]] = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        count = _operations_of(func, args, out)
        if count > 0:
            self.operations += count
            if self.state is None:
                self.state = out.numel()
        return out


def _operations_of(func: Any, args: tuple[Any, ...], out: Any) -> int:
    if func in (aten.bmm.default, aten.mm.default):
        return out.numel() * args[0].shape[-1]
    if func in (aten.sum.default, aten.sum.dim_IntList):
        return args[0].numel()
    if func in (aten.mul.Tensor, aten.mul.Scalar):
        return out.numel()
    if func.is_view or func in (aten._unsafe_view.default, aten._to_copy.default, aten.clone.default):
        return 0
    raise NotImplementedError(f"{func} is not known to the operation counter")


@torch.no_grad()
def _count(kind: str, tokens: int, dim: int) -> OperationCounts:
    core = AttentionCore(kind, dim, neuron_layer=_no_neuron)
    spikes = [torch.ones(1, 1, dim, tokens, 1) for _ in core.inputs]
    with _Operations() as counter:
        core(*spikes)
    assert counter.state is not None
    return OperationCounts(tokens, dim, counter.operations, counter.state)


def _no_neuron(**_kwargs: Any) -> nn.Module:
    return nn.Identity()


def _exponents(counts: Sequence[OperationCounts], values: Sequence[int]) -> tuple[float, float]:
    """Exponents a and b of value = c N^a D^b, by least squares of the logarithms."""
    rows = torch.tensor([[1.0, log(c.tokens), log(c.dim)] for c in counts], dtype=torch.float64)
    logs = torch.tensor([[log(value)] for value in values], dtype=torch.float64)
    solution: Tensor = torch.linalg.lstsq(rows, logs).solution
    return float(solution[1]), float(solution[2])
