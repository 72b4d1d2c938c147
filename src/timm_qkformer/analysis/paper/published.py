"""Figures that the QKFormer paper (arXiv 2403.16552) and its repository state, beside which ours are put.

Those of complexity, firing rates and memory stand with the instruments that measure the same.

Two sources. README: the table in the authors' repository, https://github.com/zhouchenlin2096/QKFormer. Copy: a public
conversion of the paper to Markdown, which we could not compare with the PDF and whose conclusion is not the paper's; a
figure found there alone is marked with a dagger wherever it is printed.
"""

from typing import NamedTuple

__all__ = ["ATTENTION_PARAMETERS", "COPY", "PARAMETERS", "README", "TOP1", "Published"]

README = "README"
COPY = "†"


class Published(NamedTuple):
    """A published figure and where it was read."""

    value: float
    source: str

    def __str__(self) -> str:
        return f"{self.value:.2f}{COPY if self.source == COPY else ''}"


# Millions of parameters, by registered model.
PARAMETERS: dict[str, Published] = {
    "qkformer_hst10_384": Published(16.47, README),
    "qkformer_hst10_512": Published(29.08, README),
    "qkformer_hst10_768": Published(64.96, README),
    "qkformer_hst4_384": Published(6.74, COPY),  # for CIFAR-10 and CIFAR-100 alike
    "qkformer_hst2_256": Published(1.50, COPY),  # for CIFAR10-DVS and DVS128 Gesture alike
}

# Top-1 on CIFAR-100 in percent, by experiment and variant; HST-4-384, T = 4 unless the variant says otherwise.
TOP1: dict[str, dict[str, Published]] = {
    "ablation_time_steps": {
        "T = 1": Published(78.51, COPY),
        "T = 2": Published(80.08, COPY),
        "T = 4": Published(81.15, COPY),
        "T = 6": Published(81.30, COPY),
    },
    "ablation_attention": {
        "QKTA + SSA": Published(81.15, COPY),
        "QKCA + SSA": Published(81.07, COPY),
        "QKTA + QKCA": Published(81.04, COPY),
        "SSA": Published(81.23, COPY),
        "QKCA": Published(81.00, COPY),
        "QKTA": Published(79.09, COPY),
    },
    "ablation_neuron": {
        "LIF": Published(81.15, COPY),
        "IF": Published(80.95, COPY),
        "PLIF": Published(81.12, COPY),
    },
}

# Millions of parameters with these kinds of attention in the first two stages and in the last: HST-4-384 for CIFAR-100,
# HST-2-256 for CIFAR10-DVS.
ATTENTION_PARAMETERS: dict[str, tuple[Published, Published]] = {
    "QKTA + SSA": (Published(6.74, COPY), Published(1.50, COPY)),
    "QKCA + SSA": (Published(6.74, COPY), Published(1.50, COPY)),
    "QKTA + QKCA": (Published(6.44, COPY), Published(1.44, COPY)),
    "SSA": (Published(6.79, COPY), Published(1.52, COPY)),
    "QKCA": (Published(6.44, COPY), Published(1.44, COPY)),
    "QKTA": (Published(6.44, COPY), Published(1.44, COPY)),
}
