"""One page with the paper's tables and figures as far as they can be made here, and where every number comes from.

Table numbers are those under which this project speaks of them; versions of the paper number them differently.
"""

import os
import platform
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

from ..files import refuse_existing, write_atomically
from ..progress import Bar
from .comparison import comparison_section, shipped_rows
from .results import Run, read_runs
from .subject import Subject, attention_section, rates_section
from .tables import (
    ABLATIONS,
    ablation_section,
    complexity_section,
    memory_section,
    other_runs_section,
    parameters_section,
)


def write_page(
    output: Path, subject: Subject, command: str, quick: bool = False, runs: Sequence[Run] | None = None
) -> list[Path]:
    """Measure, draw and write paper.md with its pictures.

    Args:
        output: Folder, made if missing.
        subject: Model and data of Table 7 and Fig. 3.
        command: What was typed, for the page.
        quick: Fewer and smaller measurements: seconds, for trying it out.
        runs: Training runs for Tables 4, 5, 6 and 9 and others; None for those that ship.

    Returns:
        The files written: the page first.

    Raises:
        FileExistsError: If one of them is there already; nothing is written then.
    """
    written = [output / name for name in ("paper.md", "fig3-matrices.png", "fig3-masks.png", "fig4-memory.png")]
    refuse_existing(*written)
    output.mkdir(parents=True, exist_ok=True)
    page, matrices, masks, memory = written
    found = read_runs() if runs is None else list(runs)
    sections: list[tuple[str, Callable[[], list[str]]]] = [
        ("complexity", partial(complexity_section, quick)),
        ("parameters", parameters_section),
        *((name, partial(ablation_section, name, found)) for name in ABLATIONS),
        ("other runs", partial(other_runs_section, found)),
        ("comparison", partial(comparison_section, shipped_rows())),
        ("firing rates", partial(rates_section, subject)),
        ("attention", partial(attention_section, subject, matrices, masks)),
        ("memory", partial(memory_section, memory, quick)),
    ]
    lines = _head(command, quick)
    with Bar(sections, unit="table") as bar:
        for name, section in bar:
            bar.set_description(name)
            lines += ["", *section()]
    write_atomically(page, "\n".join(lines) + "\n")
    return written


def _head(command: str, quick: bool) -> list[str]:
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    versions = ", ".join(f"{name} {version(name)}" for name in ("timm-qkformer", "torch", "timm", "matplotlib"))
    return [
        "# QKFormer's tables and figures, as far as they can be made here",
        "",
        "QKFormer: Hierarchical Spiking Transformer using Q-K Attention, [arXiv 2403.16552]"
        "(https://arxiv.org/abs/2403.16552).",
        "",
        f"- *Measured*: by this package on {date.today().isoformat()} with `{command}`, on {platform.machine()}, "
        f"{os.cpu_count()} CPU cores, {accelerator}; Python {platform.python_version()}, {versions}."
        + (" **With --quick: shortened measurements.**" if quick else ""),
        "- *Published*: the authors' figures, from the table in [their repository]"
        "(https://github.com/zhouchenlin2096/QKFormer) or, where marked †, from a public conversion of the paper to "
        "Markdown alone. We could not compare that copy with the PDF, and its conclusion is not the paper's.",
        "- Versions of the paper number its tables differently; in the copy, Table 5 and 9 here are part of Table 7, "
        "Table 7 here is Table 4, and Table 8 here is Table 9.",
    ]
