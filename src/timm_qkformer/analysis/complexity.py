"""What attention costs against the number of tokens N and channels D, counted while it runs: the paper's Table 1.

Counted are the scalar operations of the attention proper, from Q, K and V to X', with one head and without the neuron:
an addition for each element that a sum takes in, a multiplication for each element of a product, a multiply-accumulate
for each term of a matrix product. The paper's O(D) for QKTA and O(N) for QKCA count a row or column as one operation
("when applying mask operation"); scalar by scalar it states O(N D), which is what is found here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..neurons import LIF
from ..operators import get_operator, operator_names

# Time and space in the paper's Table 1 (arXiv 2403.16552).
PAPER_COMPLEXITY: dict[str, tuple[str, str]] = {
    "QKTA": ("O(D)", "O(N)"),
    "QKCA": ("O(N)", "O(D)"),
    "SSA": ("O(N^2 D)", "O(N^2 + N D)"),
}

# Self-attention in the order that the papers write down; this package and the release run it as Q (K^T V).
QUADRATIC = "SSA as (Q K^T) V"

aten = torch.ops.aten


def attention_kinds() -> dict[str, str]:
    """What can be measured, as tables call it, with the name of its operator; `QUADRATIC` has none."""
    names = {name.upper(): name for name in operator_names() if get_operator(name)(2, num_heads=1).inputs}
    return {**names, QUADRATIC: ""}


def attention_core(
    kind: str, dim: int, with_neurons: bool = True, device: str = "cpu"
) -> tuple[Callable[..., Tensor], list[int]]:
    """What one of `attention_kinds`, with D = `dim` and one head, makes of its inputs, and their channels, mostly D.

    It maps spikes [T, B, 1, channels, N] for each input to X' [T, B, 1, D, N], or to what its neuron would be given.

    Raises:
        ValueError: For an unknown kind.
    """
    if kind == QUADRATIC:
        neuron = LIF(v_threshold=0.5) if with_neurons else nn.Identity()
        return lambda q, k, v: neuron(v @ (k.transpose(-2, -1) @ q) * 0.125), [dim] * 3
    kinds = attention_kinds()
    if kind not in kinds:
        raise ValueError(f"kind={kind!r} is unknown, choose one of {list(kinds)}")
    layer: Any = get_operator(kinds[kind])(dim, num_heads=1, device=device)
    for name in () if with_neurons else layer.inner_neurons:
        setattr(layer, name, nn.Identity())
    # As if all tokens stood in one row: where they stand makes no difference to what it costs.
    widths = [getattr(layer, name).conv.out_channels for name in layer.inputs]
    return lambda *spikes: layer.attend(*spikes, *layer.map_size(1, spikes[0].shape[-1])), widths


@dataclass(frozen=True)
class OperationCounts:
    """Counted for one number of tokens and channels."""

    tokens: int  # N
    dim: int  # D
    operations: int  # scalar operations
    state: int  # elements of what stands between queries and result: attention vector, K^T V or Q K^T


@dataclass(frozen=True)
class Complexity:
    """How the cost of one kind of attention grows."""

    kind: str  # see `attention_kinds`
    counts: tuple[OperationCounts, ...]  # all measured points
    operations_n: float  # exponent of N in the operations, fitted to the points
    operations_d: float  # exponent of D
    state_n: float  # likewise of the state
    state_d: float  # likewise
    paper: tuple[str, str] | None  # the paper's time and space, where it has the kind


def attention_complexity(
    tokens: Sequence[int] = (64, 128, 256, 512), dims: Sequence[int] = (32, 64, 128, 256)
) -> list[Complexity]:
    """Count the operations of every kind of attention for all pairs of N and D and fit their exponents.

    Args:
        tokens: Numbers of tokens N, two or more.
        dims: Numbers of channels D, two or more.

    Raises:
        ValueError: For fewer than two different numbers, one below 1, or an operator that cannot be counted.
    """
    for name, numbers in (("tokens", tokens), ("dims", dims)):
        if len(set(numbers)) < 2 or min(numbers) < 1:
            raise ValueError(f"{name}={tuple(numbers)!r} must be two or more different numbers of at least 1")
    results = []
    for kind in attention_kinds():
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
    """Counts scalar operations, and keeps the size of the first result that is not a view."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.state: int | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
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
    if func.overloadpacket in (aten.sum, aten.mean, aten.amax, aten.amin, aten.cumsum):
        return args[0].numel()
    copies = (aten._unsafe_view, aten._to_copy, aten.clone, aten.stack, aten.cat)
    if func.is_view or func.overloadpacket in copies:
        return 0
    if torch.Tag.pointwise in func.tags:
        return out.numel()
    raise ValueError(f"{func} is not known to the operation counter")


@torch.no_grad()
def _count(kind: str, tokens: int, dim: int) -> OperationCounts:
    attend, widths = attention_core(kind, dim, with_neurons=False)
    spikes = [torch.ones(1, 1, 1, width, tokens) for width in widths]
    try:
        with _Operations() as counter:
            attend(*spikes)
    except ValueError as error:
        raise ValueError(f"{kind} cannot be counted: {error}") from error
    if counter.state is None:
        raise ValueError(f"{kind} does nothing with its inputs that could be counted")
    return OperationCounts(tokens, dim, counter.operations, counter.state)


def _exponents(counts: Sequence[OperationCounts], values: Sequence[int]) -> tuple[float, float]:
    """Exponents a and b of value = c N^a D^b, by least squares of the logarithms."""
    rows = torch.tensor([[1.0, log(c.tokens), log(c.dim)] for c in counts], dtype=torch.float64)
    logs = torch.tensor([[log(value)] for value in values], dtype=torch.float64)
    solution: Tensor = torch.linalg.lstsq(rows, logs).solution
    return float(solution[1]), float(solution[2])
