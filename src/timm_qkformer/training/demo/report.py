"""What the demo shows of a model's answers: a table, and the attention masks behind them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ...analysis import record_attention
from ...analysis.attention import select_layers
from ...analysis.drawing import save_picture
from ...analysis.inputs import input_pictures


@dataclass(frozen=True)
class Answers:
    """A model's answers to labelled images."""

    images: Tensor  # [B, C, H, W], normalised
    labels: Tensor  # [B]
    logits: Tensor  # [B, classes]
    names: Sequence[str]  # of the classes
    mean: Sequence[float]  # of the normalisation, one for each channel
    std: Sequence[float]

    @property
    def predicted(self) -> Tensor:
        """The classes with the largest logits, [B]."""
        return self.logits.argmax(1)

    @property
    def correct(self) -> int:
        """Number of right answers."""
        return int((self.predicted == self.labels).sum())

    @property
    def top1(self) -> float:
        """Right answers in percent."""
        return 100.0 * self.correct / len(self.labels)

    def name(self, label: Tensor) -> str:
        """A class's name."""
        return self.names[int(label)]

    def some(self, number: int) -> list[int]:
        """Indices of samples spread evenly over all."""
        return torch.linspace(0, len(self.labels) - 1, number).long().tolist()


def print_answers(answers: Answers, rows: int) -> None:
    """Some answers, spread evenly, and as many mistakes."""
    confidence = answers.logits.softmax(1).amax(1)
    mistakes = (answers.predicted != answers.labels).nonzero().flatten().tolist()
    width = max(9, *map(len, answers.names))
    print(f"\n {'true':>{width}s}  {'predicted':>{width}s}  confidence")
    for i in sorted({*answers.some(rows), *mistakes[:rows]}):
        true, read = answers.name(answers.labels[i]), answers.name(answers.predicted[i])
        mark = "" if true == read else "  wrong"
        print(f" {true:>{width}s}  {read:>{width}s}  {100 * confidence[i]:8.1f} %{mark}")
    print()


def draw_masks(model: nn.Module, answers: Answers, path: Path, columns: int = 8) -> Path:
    """Inputs above the token masks of the first Q-K attention: at each time step, the mean of its heads."""
    from matplotlib.figure import Figure

    picked = answers.some(columns)
    (record,) = record_attention(model, answers.images[picked], list(select_layers(model))[:1])
    mask = record.views.tokens.mean(2)  # [T, B, H, W]
    most = max(1.0, float(mask.max()))  # integer neurons fire more than once

    figure = Figure(figsize=(1.6 * columns + 1, 1.7 * (1 + len(mask))), layout="constrained")
    axes = figure.subplots(1 + len(mask), columns, squeeze=False)
    inputs = input_pictures(answers.images[picked], answers.mean, answers.std)[:, 0]
    for column, i in enumerate(picked):
        true, read = answers.name(answers.labels[i]), answers.name(answers.predicted[i])
        axes[0, column].imshow(inputs[column])
        axes[0, column].set_title(true if true == read else f"{true}, taken\nfor {read}", fontsize=10)
        for t in range(len(mask)):
            shown = axes[t + 1, column].imshow(mask[t, column], cmap="gray", vmin=0, vmax=most)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    axes[0, 0].set_ylabel("input")
    for t in range(len(mask)):
        axes[t + 1, 0].set_ylabel(f"mask, t = {t + 1}" if len(mask) > 1 else "mask")
    figure.colorbar(shown, ax=axes[1:, :], label="mean of heads")
    figure.suptitle("Q-K token attention: 0 drops the token")
    return save_picture(figure, path)
