"""The sections of the page that look into one model: firing rates and attention."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from ..attention import record_attention
from ..capture import settle_norms
from ..pictures import draw_query_key, draw_token_masks, input_pictures, save_picture
from ..rates import PAPER_RATES, firing_rates
from .markdown import table
from .published import COPY

__all__ = ["Subject", "attention_section", "rates_section"]


@dataclass(frozen=True)
class Subject:
    """The model whose rates and attention the page shows, and what it is shown.

    Attributes:
        model: A model with Q-K attention.
        title: Its name and where its weights come from.
        untrained: Whether these are random.
        x: Batch for it, images [B, C, H, W] or event clips [B, T, C, H, W].
        data: What the batch is, in words.
        mean, std: Normalisation of the batch, to be undone for pictures; empty for none.
    """

    model: nn.Module
    title: str
    untrained: bool
    x: Tensor
    data: str
    mean: Sequence[float] = ()
    std: Sequence[float] = ()


def rates_section(subject: Subject) -> list[str]:
    with _settled(subject):
        found = firing_rates(subject.model, subject.x)
    rates = found.by_stage()
    stages = sorted({stage for of_name in rates.values() for stage in of_name})
    names = [*PAPER_RATES, *(name for name in rates if name not in PAPER_RATES)]
    rows = []
    for name in names:
        theirs = PAPER_RATES.get(name, {})
        rows.append(
            [
                name,
                *(f"{theirs[stage]:.4f}{COPY}" if stage in theirs else "-" for stage in (1, 2)),
                *(f"{rates[name][stage]:.4f}" if stage in rates.get(name, {}) else "-" for stage in stages),
            ]
        )
    header = ["Neurons", "Stage 1, published", "Stage 2, published", *(f"Stage {stage}, measured" for stage in stages)]
    return [
        "## Table 7: firing rates",
        "",
        *table(header, rows),
        "",
        "Spikes per neuron and time step, means over the blocks of a stage. Published: † the copy's Table 4; "
        f"HST-10-768, ImageNet-1k test set, 224 px. Measured: {subject.title}; {subject.data}; T = {found.time_steps}; "
        f"all neurons together {found.mean:.4f}.",
        *_caveat(subject),
    ]


def _caveat(subject: Subject) -> list[str]:
    if not subject.untrained:
        return []
    return [
        "",
        "**The weights are random**: the layout is the paper's, the numbers say nothing about a trained model. Batch "
        "norm statistics are those of the data shown, since hardly a neuron would fire otherwise.",
    ]


def attention_section(subject: Subject, matrices: Path, masks: Path) -> list[str]:
    x = subject.x[:1]
    with _settled(subject):
        records = [record for record in record_attention(subject.model, x) if record.mask is not None]
    if not records:
        return ["## Fig. 3: attention", "", f"{subject.title} has no Q-K attention; nothing is drawn."]
    token = [record for record in records if record.kind == "qkta"] or records
    step = token[0].time_steps // 2
    save_picture(draw_query_key(token[:3], step=step, title=subject.title), matrices)
    pictures = input_pictures(x, subject.mean, subject.std)
    save_picture(draw_token_masks(token[0], pictures, title=subject.title), masks)
    return [
        "## Fig. 3: Q-K token attention",
        "",
        f"![Q, A_t, K and X' as matrices]({matrices.name})",
        "",
        f"![The token mask by head and time step]({masks.name})",
        "",
        f"Measured: {subject.title}; the first of {subject.data}. Of each layer the head is shown whose mask is "
        f"nearest to keeping half of the tokens, at t = {step + 1}.",
        *_caveat(subject),
    ]


def _settled(subject: Subject) -> AbstractContextManager[None]:
    return settle_norms(subject.model, [subject.x]) if subject.untrained else nullcontext()
