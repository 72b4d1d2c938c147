"""The sections of the page that look into one model: firing rates and attention."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, cat, nn

from ..analysis.attention import record_attention
from ..analysis.drawing import draw_query_key, draw_token_masks, save_picture
from ..analysis.hooks import recalibrated_norms
from ..analysis.inputs import ModelInputs, input_pictures
from ..analysis.rates import PAPER_RATES, firing_rates
from .published import COPY
from .tables import table

_TILES = 2  # rows of tiles that a photograph is cut into


@dataclass(frozen=True)
class Subject:
    """The model whose rates and attention the page shows, and what it is shown."""

    model: nn.Module  # a model whose attention has masks
    title: str  # its name and where its weights come from
    untrained: bool  # whether these are random
    x: Tensor  # batch for it, images [B, C, H, W] or event clips [B, T, C, H, W]
    data: str  # what the batch is, in words
    mean: Sequence[float] = ()  # of the normalisation, to be undone for pictures; empty for none
    std: Sequence[float] = ()  # likewise


def photographs(inputs: ModelInputs) -> Tensor:
    """Square tiles of the two photographs that scikit-learn ships, as the model takes images: [B, C, H, W].

    Raises:
        ValueError: If the model takes events.
    """
    from PIL import Image
    from sklearn.datasets import load_sample_images

    tiles = []
    for photograph in load_sample_images().images:
        side = photograph.shape[0] // _TILES
        for top in range(0, photograph.shape[0] - side + 1, side):
            for left in range(0, photograph.shape[1] - side + 1, side):
                tile = Image.fromarray(photograph[top : top + side, left : left + side])
                tiles.append(inputs.image(tile, "a photograph"))
    return cat(tiles)


def rates_section(subject: Subject) -> list[str]:
    """Table 7: firing rates."""
    with _calibrated(subject):
        found = firing_rates(subject.model, subject.x)
    rates = found.by_stage()
    stages = sorted({stage for of_name in rates.values() for stage in of_name})
    names = [*PAPER_RATES, *(name for name in rates if name not in PAPER_RATES)]
    rows = []
    for name in names:
        theirs = PAPER_RATES.get(name, {})
        published = (f"{theirs[stage]:.4f}{COPY}" if stage in theirs else "-" for stage in (1, 2))
        ours = rates.get(name, {})
        rows.append([name, *published, *(f"{ours[stage]:.4f}" if stage in ours else "-" for stage in stages)])
    measured = " | ".join(f"Stage {stage}, measured" for stage in stages)
    return [
        "## Table 7: firing rates",
        "",
        *table(f"Neurons | Stage 1, published | Stage 2, published | {measured}", rows),
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
    """Fig. 3: queries, masks and keys."""
    x = subject.x[:1]
    with _calibrated(subject):
        records = [record for record in record_attention(subject.model, x) if record.mask is not None]
    if not records:
        return ["## Fig. 3: attention", "", f"{subject.title} has no attention with a mask; nothing is drawn."]
    token = [record for record in records if record.main_view == "tokens"] or records
    step = token[0].time_steps // 2
    save_picture(draw_query_key(token[:3], step=step, title=subject.title), matrices)
    pictures = input_pictures(x, subject.mean, subject.std)
    save_picture(draw_token_masks(token[0], pictures, title=subject.title), masks)
    return [
        "## Fig. 3: Q-K attention",
        "",
        f"![Q, mask, K and X' as matrices]({matrices.name})",
        "",
        f"![The token mask by head and time step]({masks.name})",
        "",
        f"Measured: {subject.title}; the first of {subject.data}. Of each layer the head is shown whose mask is "
        f"nearest to keeping half of the tokens, at t = {step + 1}.",
        *_caveat(subject),
    ]


def _calibrated(subject: Subject) -> AbstractContextManager[None]:
    return recalibrated_norms(subject.model, [subject.x]) if subject.untrained else nullcontext()
